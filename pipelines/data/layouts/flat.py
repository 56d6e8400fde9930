"""One folder with the person in the name of each file.

The contract:
- A pattern is the name of a file without its suffix, with `{person}` for the person and `*` for
  anything: `{person}_*` finds Ann_Lee in Ann_Lee_0003.jpg. The person is as long as it can be.
- A file whose name does not fit is an entry with a fault.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace

from cdp.errors import ConfigError
from pipelines.data.manifest import Entry

PERSON = "{person}"


def name_people(entries: Iterable[Entry], pattern: str) -> list[Entry]:
    """The entries with the person that the name of each file says."""
    if pattern.count(PERSON) != 1:
        raise ConfigError(
            f"pattern: {PERSON} expected once, as in '{PERSON}_*' for Ann_Lee_0003.jpg; got "
            f"{pattern!r}"
        )
    parts = (".*" if part == "*" else "(.+)" if part == PERSON else re.escape(part)
             for part in re.split(r"(\*|\{person\})", pattern))  # fmt: skip
    expression = re.compile("".join(parts), re.DOTALL)
    named = []
    for entry in entries:
        match = expression.fullmatch(os.path.splitext(os.path.basename(entry.path))[0])
        if match is None and not entry.fault:
            entry = replace(entry, fault=f"its name does not fit the pattern {pattern}")
        named.append(replace(entry, identity=match[1]) if match is not None else entry)
    return named
