"""The export command: `cdp export labels --run runs/x --to csv --out labels.csv`.

The contract:
- One module a subcommand: `add_parser(subparsers)` adds its options and sets the default `export`,
  a function of the options that returns a summary line. `rests_on` names the stage it exports;
  warnings on stderr say where results that this stage rests on were made from others than the
  run's present ones, and where they do not follow the reviewers' present decisions.
- An export appears complete under its name, or not at all; nothing is overwritten.
- Exit code 0: done; 1: it could not be written; 2: an error in the command or the run.
"""

from __future__ import annotations

import argparse
import sys

from cdp.errors import CdpError, StageError
from pipelines.export import degradations, heatmaps, labels, recognizer, restorer
from pipelines.invocation import format_command
from pipelines.outdated import find_unapplied
from pipelines.results import RunResults
from pipelines.store import find_misfits

SUBCOMMANDS = (labels, recognizer, degradations, heatmaps, restorer)


def build_parser() -> argparse.ArgumentParser:
    """The options of every subcommand."""
    parser = argparse.ArgumentParser(
        prog=format_command("export"), description="Export results of a run for other programs."
    )
    subparsers = parser.add_subparsers(required=True, metavar="WHAT")
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Export, print the summary line, return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        print(options.export(options))
        _warn_of_outdated(options)
    except CdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, StageError) else 2
    return 0


def _warn_of_outdated(options: argparse.Namespace) -> None:
    """Say what the exported stage does not follow: present results, present decisions."""
    stage = str(getattr(options, "rests_on", ""))
    if not stage:  # an export of no run
        return
    again = RunResults(options.run).compose_command("--stage", "all", "--until", stage)
    misfits = find_misfits(options.run, stage)
    if misfits:
        made = "; ".join(f"{name} from another {upstream}" for name, upstream in misfits)
        print(
            f"warning: {options.run}: stages were made from other results than those published "
            f"now: {made}. They were exported all the same. To bring them up to date, run: {again}",
            file=sys.stderr,
        )
    unapplied = find_unapplied(options.run, stage)
    if unapplied:
        print(
            f"warning: {options.run}: decisions were made or undone in a review since "
            f"{' and '.join(unapplied)} ran, and what was exported does not follow them. To apply "
            f"them, run: {again}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
