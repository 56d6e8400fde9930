"""The console command: `cdp run`, `check`, `align`, `review`, `export`, `identify` and others.

The contract:
- `cdp NAME ...` takes the options and returns the exit codes of `python -m pipelines.NAME ...`.
- Ctrl-C ends any command with one message and the exit code 130, also while it is being loaded.
- `cdp --help` and `cdp --version` import no command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pipelines.invocation import COMMAND

COMMANDS = {
    "demo": ("pipelines.demo", (), "cluster a small set of synthetic faces, in under a minute"),
    "run": ("pipelines.run", (), "label unlabelled faces and train a recognizer on them"),
    "check": ("pipelines.check", (), "look at data and models before a run costs time"),
    "review": (
        "pipelines.review.__main__",
        (),
        "judge and correct the clusters of a run in a browser",
    ),
    "export": ("pipelines.export.__main__", (), "write labels or the recognizer of a run"),
    "identify": ("pipelines.identify", (), "name the faces of a folder among enrolled people"),
    "align": ("pipelines.align", (), "find the faces of photos and cut them out upright"),
    "degrade": (
        "pipelines.export.__main__",
        ("degradations",),
        "draw faces through every degradation, as one PNG",
    ),
}
"""Name -> the module whose `main` it calls, arguments put before the user's, one line of help."""
USAGE = f"""\
usage: {COMMAND} COMMAND [OPTION]...
       {COMMAND} COMMAND --help
       {COMMAND} --version

Pseudo-labels for unlabelled faces, and a low-resolution recognizer trained on them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_compose_help())
        return 0 if given else 2
    if given[0] == "--version":
        import cdp

        print(f"{COMMAND} {cdp.__version__}")
        return 0
    if given[0] not in COMMANDS:
        print(
            f"error: {COMMAND} has no command {given[0]!r}; choose one of: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module, before, _ = COMMANDS[given[0]]
    try:
        code: int = import_module(module).main([*before, *given[1:]])
    except KeyboardInterrupt:
        print(f"\ninterrupted: {COMMAND} {given[0]} did not end", file=sys.stderr)
        return 130
    return code


def _compose_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join([USAGE, "Commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
