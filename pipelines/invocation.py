"""The command line that started this process, for messages that name the next command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

COMMAND = "cdp"


def format_command(name: str, *arguments: str) -> str:
    """A shell line that runs a command of the project as this process was run.

    `cdp run --stage all` where the user typed `cdp`, else `python -m pipelines.run --stage all`,
    which works with and without an installation.
    """
    started_by = Path(sys.argv[0]).stem
    start = [COMMAND, name] if started_by == COMMAND else ["python", "-m", f"pipelines.{name}"]
    return shlex.join([*start, *arguments])
