"""The command `cdp run`, or `python -m pipelines.run`: make a run, stage by stage.

The contract:
- Exit 0 done, 1 a stage failed, 2 bad config or data, 130 interrupted. A user's mistake prints one
  message and no traceback; a failed stage names the log and the command that resumes.
- A stage prints one line when it starts and one when it is done. Into a file or a pipe, long work
  adds one line each half minute; on a terminal it shows a progress bar.
- Only this module sets up logging: messages go to stdout and, in full, to
  `runs/<run>/logs/<time>.log`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from cdp.errors import CdpError, ConfigError, DataError
from cdp.progress import report_elapsed
from pipelines.check import add_inputs, check_inputs
from pipelines.choices import check_choices
from pipelines.config import RunConfig, read_config
from pipelines.data.dataset import Dataset
from pipelines.decisions import CorrectionTable
from pipelines.engine import Engine, bound_memory
from pipelines.files import FileDigests, write_text
from pipelines.invocation import format_command
from pipelines.outdated import find_outdated, list_upstream
from pipelines.packaged import find_config, find_manifest
from pipelines.stage import Runtime, Step, execute_step, plan_run
from pipelines.stages import STAGES, describe_facts
from pipelines.stages.report import PAGE
from pipelines.store import RECORD, Store
from pipelines.training.team import run_as_team
from pipelines.verdict import compose_verdict, reach_verdict

log = logging.getLogger("cdp")

PACKAGES = (
    "torch", "nmslib-metabrainz", "faiss-cpu", "networkx", "numpy", "pandas", "dask", "pyarrow",
    "scipy", "scikit-learn", "numba", "onnxruntime", "pillow", "opencv-python-headless",
    "safetensors",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The options, each with what it does."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog=format_command("run"),
        description="Pseudo-label unlabelled faces and train a low-resolution recognizer on them.",
        epilog="Stages, in order: " + ", ".join(names),
    )
    add = parser.add_argument
    add(
        "--stage",
        default="all",
        choices=["all", *names],
        metavar="STAGE",
        help="all (what is missing or stale), or one stage from what is published upstream",
    )
    add("--until", choices=names, metavar="STAGE", help="with --stage all: stop after this stage")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR",
        help="where the results go (default: runs)")  # fmt: skip
    add("--dry-run", action="store_true", help="print what would run and why; change nothing")
    add("--force", action="store_true", help="run every stage again, even where it is up to date")
    add("--verify", action="store_true", help="rehash every input and published file first")
    add("--workers", type=int, metavar="N", help="local Dask workers (default: one a core)")
    add("--scheduler", metavar="ADDRESS", help="a running Dask scheduler, e.g. tcp://host:8786")
    add(
        "--memory-limit",
        metavar="SIZE",
        help="private memory of all processes together, e.g. 8GiB: half for the run itself, half "
        "for its local workers (of a --scheduler, `dask worker --memory-limit` bounds them)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N, for training and embedding")
    add_inputs(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        if "WORLD_SIZE" in os.environ:
            return run_as_team(options.device, lambda: _run(options))
        return _run(options)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished parts are kept. To resume: {_resume(arguments)}",
              file=sys.stderr)  # fmt: skip
        return 130
    except _StageFailure as failure:
        print(
            f"error: stage {failure.stage}: {_describe_error(failure.cause)}\n"
            f"full log: {failure.log_path}\n"
            f"to resume once that is fixed: {_resume(arguments)}",
            file=sys.stderr,
        )
        return _exit_code(failure.cause)
    except CdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return _exit_code(error)
    finally:
        _close_logs()


class _StageFailure(Exception):  # noqa: N818 - it carries the error of a stage
    def __init__(self, stage: str, cause: Exception, log_path: Path) -> None:
        super().__init__(stage)
        self.stage, self.cause, self.log_path = stage, cause, log_path


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, ConfigError | DataError) else 1


def _describe_error(error: Exception) -> str:
    return str(error) if isinstance(error, CdpError) else f"{type(error).__name__}: {error}"


def _run(options: argparse.Namespace) -> int:
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers: expected 1 or more, got {options.workers}")
    if options.stage != "all" and options.until:
        raise ConfigError("--until goes with --stage all only")
    options.config = find_config(options.config)
    *earlier, config = read_config(options.config, options.overrides).list_rounds()
    if options.stage == "all":
        for one in earlier:
            _carry_out(one, options, until="retrain")
    _carry_out(config, options, until=options.until)
    return 0


def _carry_out(config: RunConfig, options: argparse.Namespace, *, until: str | None) -> None:
    """Plan and make one run."""
    manifest = find_manifest(config.data, options.config)
    dataset = Dataset.open(manifest, options.data_root, options.models_dir)
    store = Store(options.runs_dir)
    if not options.dry_run:
        store.check_links()
    digests = FileDigests(store.root / "files.json", rehash=options.verify)
    engine = Engine(
        workers=options.workers,
        scheduler=options.scheduler,
        memory_limit=_read_size(options.memory_limit),
    )
    decisions = CorrectionTable(options.runs_dir / config.name).read()
    runtime = Runtime(config, dataset, store, engine, digests, options.device, decisions)
    only = None if options.stage == "all" else options.stage

    def plan() -> list[Step]:
        return plan_run(STAGES, runtime, only=only, until=until, force=options.force,
                        verify=options.verify)  # fmt: skip

    if options.dry_run:
        for step in plan():
            print(f"{step.stage.name:9} {step.action:5} {step.reason}")
        for text in _list_outdated(runtime, options):
            print(f"{options.stage:9} {text}")
        return
    with store.lock(f"run {config.name}", wait=False), engine:
        started = time.perf_counter()
        store.drop_left(config.name)
        steps = plan()
        outdated = _list_outdated(runtime, options)
        digests.save()
        log_path = _open_logs(options.runs_dir / config.name)
        _record_request(runtime, options)
        log.debug("config %s", config.model_dump_json())
        check_choices(config, {step.stage.name for step in steps if step.action == "run"})
        for text in outdated:
            log.warning("%-9s %s", only, text)
        if only is None:
            _check(runtime, steps)
        for step in steps:
            _take(step, runtime, options, log_path)
        place = options.runs_dir / config.name
        seconds = time.perf_counter() - started
        idle = all(step.action in ("skip", "omit") for step in steps)
        outcome = "nothing to do, everything is up to date" if idle else "done"
        log.info("%s: %s (%.1f s)", outcome, place, seconds)
        _log_outcome(store, config.name, place, steps[-1].stage.name == "report")


def _log_outcome(store: Store, run: str, place: Path, reported: bool) -> None:
    """The summary of a whole run, or the verdict on as much of it as there is."""
    report = store.open_run(run, "report") if reported else None
    if report is not None:
        log.info("\n%s", (report.directory / "summary.txt").read_text("utf-8").rstrip())
        log.info("\nreport: %s", place / "report" / PAGE)
        return
    found = {stage.name: store.open_run(run, stage.name) for stage in STAGES}
    present = {name: published for name, published in found.items() if published is not None}
    for line in compose_verdict(reach_verdict(present, place)):
        log.info(line)


def _check(runtime: Runtime, steps: list[Step]) -> None:
    """Look at data and models before stages that read them cost time; the first error ends it."""
    running = {step.stage.name for step in steps if step.action == "run"}
    if not running & {"detect", "ingest", "embed"}:
        return
    found = check_inputs(
        runtime.config,
        runtime.dataset,
        pictures=bool(running & {"detect", "ingest"}),
        models="embed" in running,
        counts="knn" in running,
    )
    for finding in found:
        if finding.level == "error":
            raise DataError(finding.text)
        log.info("%-9s %s", "check", finding)


def _list_outdated(runtime: Runtime, options: argparse.Namespace) -> list[str]:
    """With one stage: a warning where results upstream are out of date, and what is not known."""
    if options.stage == "all":
        return []
    found = find_outdated(STAGES, runtime, list_upstream(STAGES, options.stage))
    texts = [
        f"not known whether {name} is up to date: {reason}"
        for name, reason in found.unknown.items()
    ]
    if found:
        command = format_command(
            "run", *_list_inputs(options), "--stage", "all", "--until", options.stage
        )
        texts.append(
            f"warning: results that it reads are out of date (published -> now): {found}. They "
            f"are used as they were published. To bring them up to date, run: {command}"
        )
    return texts


def _take(step: Step, runtime: Runtime, options: argparse.Namespace, log_path: Path) -> None:
    """Run, link or skip one stage and log it."""
    name = step.stage.name
    log.info("%-9s %-5s %s", name, step.action, step.reason)
    if step.action in ("skip", "omit"):
        return
    try:
        with bound_memory(runtime.engine.own_limit), report_elapsed(name):
            published = execute_step(
                step,
                runtime,
                force=options.force,
                environment=_describe_environment(options, runtime.config.seed),
            )
    except Exception as error:
        log.debug("stage %s failed", name, exc_info=True)
        raise _StageFailure(name, error, log_path) from error
    runtime.engine.rest()
    manifest = published.manifest
    log.info(
        "%-9s done  %s (%.1f s, peak %d MiB)",
        name, describe_facts(published.facts), manifest["seconds"], manifest["peak_memory_mib"],
    )  # fmt: skip
    for text in published.facts.get("warnings", []):
        log.warning("%-9s warning: %s", name, text)


def _record_request(runtime: Runtime, options: argparse.Namespace) -> None:
    """Save config, data manifest and options beside the results; no fingerprint reads the file."""
    dataset = runtime.dataset
    record = {
        "config": runtime.config.model_dump(mode="json"),
        "data": dataset.manifest.model_dump(mode="json"),
        "data_root": None if dataset.root is None else str(dataset.root),
        "options": _list_inputs(options),
    }
    write_text(options.runs_dir / runtime.config.name / RECORD, json.dumps(record, indent=1) + "\n")


def _list_inputs(options: argparse.Namespace) -> list[str]:
    """The options and settings that name this run and its inputs, to make it again."""
    places = ("config", "data_root", "models_dir", "runs_dir")
    given = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in places]
    named = [text for name, value in given if value is not None for text in (name, str(value))]
    return [*named, *options.overrides]


def _read_size(text: str | None) -> int | None:
    from dask.utils import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--memory-limit: a size such as 8GiB expected, got {text!r}") from error


def _describe_environment(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Versions, device and threads, which figures may depend on; no fingerprint reads them."""
    import torch

    from cdp.training.plan import resolve_device

    device = resolve_device(options.device)
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": options.device,
        "device_used": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": {"training": torch.get_num_threads(), "part": 1},
        "seed": seed,
        "memory_limit": options.memory_limit,
        "scheduler": options.scheduler or "local",
        "workers": options.workers,
    }


def _resume(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return format_command("run", *given)


class _LogFile(logging.FileHandler):
    """A log that can no longer be written is reported once, and stops nothing."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            print(f"the log {self.baseFilename} ends here: {error.strerror}", file=sys.stderr)


def _open_logs(run_directory: Path) -> Path:
    place = run_directory / "logs"
    try:
        place.mkdir(parents=True, exist_ok=True)
        path = place / time.strftime("%Y%m%d-%H%M%S.log")
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write the log below {place}: {error.strerror}. Choose another --runs-dir"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers = [handler, console]
    return path


def _close_logs() -> None:
    for handler in log.handlers:
        with contextlib.suppress(OSError):  # reported already
            handler.close()
    log.handlers = []


if __name__ == "__main__":
    sys.exit(main())
