"""Reasons why files are rejected, grouped by kind.

The contract:
- The kind of a reason holds no name of a file or person and no number, so that alike faults of many
  files are one kind.
"""

from __future__ import annotations

import re


def name_reason(reason: str) -> str:
    """The kind of a reason: without names of files and people, and without numbers."""
    for start, kind in (
        ("same bytes as", "same bytes as another"),
        ("the same file is under the names", "the same file under two names"),
        ("set aside in review", "set aside in review"),
    ):
        if reason.startswith(start):
            return kind
    return re.sub(r"\s+", " ", re.split(r"[:;(]|\d", reason, maxsplit=1)[0]).strip() or "other"
