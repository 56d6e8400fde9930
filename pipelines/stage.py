"""Stages of the pipeline: fingerprint them, plan which run, execute and publish them.

The contract:
- A stage is a frozen value. Its fingerprint is the SHA-256 over name, version, schemas, the config
  fields it reads, the content of the files it reads, and the fingerprints of its inputs; the root
  is the content of the data set. Workers, device and paths are never in it.
- A stage reads only the tables and config fields it declares; anything else is a StageError.
- A stage is skipped only when the publication that the run links to has its fingerprint and all
  files of that publication are whole.
- A stage writes into a working directory that outlives a crash; a part whose output file
  (`Work.path`) is already there need not be computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from cdp.errors import ConfigError, StageError
from pipelines.config import RunConfig
from pipelines.data.dataset import Dataset
from pipelines.decisions import Decision, digest_decisions, list_active
from pipelines.engine import Engine
from pipelines.files import FileDigests, digest_json
from pipelines.peak_memory import PeakMemory
from pipelines.store import SCRATCH, Published, Store
from pipelines.tables import describe_schema, write_table

log = logging.getLogger("cdp")

ALIGN = "detect"
"""The stage that stands before the first one where the data manifest says `align`."""
RECOGNIZER = "labelled_pseudo.safetensors"
"""File name of the recognizer that `retrain` publishes."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline, as a frozen value.

    version : raised whenever the same inputs would give other outputs, or other names for them.
    inputs : tables it reads, as `stage.table`.
    outputs : table -> schema; a vector column is declared with length 0, which means any length.
    reads : top-level fields of `RunConfig` it may read.
    run : does the work and returns the facts for the manifest (plain JSON values).
    files : config -> paths below the data root whose content enters the fingerprint.
    borrows : config -> names of runs whose recognizer enters the fingerprint.
    reads_with_features : further fields of `RunConfig` it may read where features are ready.
    needs_images : left out for a data set of ready features.
    needs_align : left out where the data manifest does not say `align`.
    corrected : the actions of the reviewers' decisions that it reads; the digest of these decisions
        enters the fingerprint.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    outputs: Mapping[str, pa.Schema]
    reads: tuple[str, ...]
    run: Callable[[Work], Mapping[str, Any]]
    files: Callable[[RunConfig], tuple[str, ...]] = lambda config: ()
    borrows: Callable[[RunConfig], tuple[str, ...]] = lambda config: ()
    reads_with_features: tuple[str, ...] = ()
    needs_images: bool = False
    needs_align: bool = False
    corrected: tuple[str, ...] = ()

    @property
    def upstream(self) -> tuple[str, ...]:
        """The stages whose tables it reads, each once, in the order of `inputs`."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.inputs))


@dataclass(frozen=True)
class Runtime:
    """The surroundings of a run, which must not change a fingerprint: paths, workers, device."""

    config: RunConfig
    dataset: Dataset
    store: Store
    engine: Engine
    digests: FileDigests
    device: str = "auto"
    decisions: tuple[Decision, ...] = ()


class _DeclaredConfig:
    """The fields of a config that one stage declares in `reads`; any other is refused."""

    def __init__(self, config: RunConfig, stage: Stage) -> None:
        self._config, self._stage = config, stage

    def __getattr__(self, field: str) -> Any:
        if field not in (*self._stage.reads, *self._stage.reads_with_features):
            raise StageError(
                f"stage {self._stage.name} does not declare that it reads config.{field}; "
                f"it declares: {', '.join(self._stage.reads) or 'none'}"
            )
        return getattr(self._config, field)


def restrict_config(config: RunConfig, stage: Stage) -> RunConfig:
    """The config as one stage may read it: typed as the whole, StageError for undeclared fields.

    The type checker sees every field of `RunConfig`; what a stage has not declared would not be in
    its fingerprint, and is refused when it is read.
    """
    return cast(RunConfig, _DeclaredConfig(config, stage))


@dataclass
class Work:
    """All that a stage is given: its config fields, its input tables, a directory to write to.

    config : the fields in `stage.reads`; any other is a StageError.
    upstream : stage name -> its publication; a stage left out for features is missing.
    fresh : parts of an earlier attempt were deleted, because the user asked for --force.
    """

    stage: Stage
    config: RunConfig
    seed: int
    directory: Path
    runtime: Runtime
    upstream: Mapping[str, Published]
    fresh: bool = False

    @cached_property
    def dataset(self) -> Dataset:
        """The data set; after the stage detect, its images are the crops of that stage."""
        runtime = self.runtime
        if runtime.dataset.manifest.align is None or self.stage.needs_align:
            return runtime.dataset
        published = runtime.store.open_run(runtime.config.name, ALIGN)
        if published is None:
            raise StageError("stage detect has published no faces. Run --stage all --until detect")
        return replace(runtime.dataset, crops=published.directory.resolve())

    @property
    def engine(self) -> Engine:
        return self.runtime.engine

    @property
    def scratch(self) -> Path:
        """A directory for intermediate files, deleted at publication."""
        place = self.directory / SCRATCH
        place.mkdir(exist_ok=True)
        return place

    def read(self, table: str, part: str = "", columns: list[str] | None = None) -> pa.Table:
        """An input table: `read("embed.embeddings", "labelled/base")`."""
        published, name = self._find(table, part)
        return published.read(name, columns)

    def locate(self, table: str, part: str = "") -> Path:
        """The path of an input table, for workers that read it themselves."""
        published, name = self._find(table, part)
        return published.path(name)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The reviewers' decisions in force that it reads, as read when the run was planned."""
        if not self.stage.corrected:
            raise StageError(f"stage {self.stage.name} does not declare that it reads corrections")
        return list_active(self.runtime.decisions, self.stage.corrected)

    def locate_recognizer(self, run: str) -> Path:
        """The path of the weights of the recognizer that another run has published."""
        return _require_recognizer(self.runtime.store, run).directory / RECOGNIZER

    def input_facts(self, stage: str) -> Mapping[str, Any]:
        """The facts that an input stage wrote into its manifest."""
        return self.upstream[stage].facts

    def _find(self, table: str, part: str) -> tuple[Published, str]:
        if table not in self.stage.inputs:
            raise StageError(f"stage {self.stage.name} does not declare that it reads {table}")
        stage, _, name = table.partition(".")
        return self.upstream[stage], f"{name}/{part}" if part else name

    def path(self, table: str, part: str = "") -> Path:
        """The path to write an output table to."""
        if table not in self.stage.outputs:
            raise StageError(f"stage {self.stage.name} does not declare that it writes {table}")
        return self.directory / (f"{table}/{part}.parquet" if part else f"{table}.parquet")

    def write(self, table: str, columns: Mapping[str, Any] | pa.Table, part: str = "") -> None:
        """Write one output table in its declared schema."""
        write_table(self.path(table, part), columns, self.stage.outputs[table])


# ----------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Step:
    """The planned action for one stage (run, link, skip or omit) and the reason for it."""

    stage: Stage
    fingerprint: str
    ingredients: Mapping[str, Any]
    action: str
    reason: str


def collect_ingredients(
    stage: Stage, runtime: Runtime, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Everything the output of a stage depends on; the digest of it is the fingerprint."""
    dataset, config = runtime.dataset, runtime.config
    decided = digest_decisions(runtime.decisions, stage.corrected)
    reads = (*stage.reads, *(stage.reads_with_features if dataset.kind == "features" else ()))
    inputs = {name: fingerprints[name] for name in stage.upstream if name in fingerprints}
    first = not inputs and set(stage.upstream) <= {ALIGN}
    return {
        "stage": stage.name,
        "version": stage.version,
        "schemas": {name: describe_schema(schema) for name, schema in stage.outputs.items()},
        "config": config.pick(("seed", *reads)),
        "files": {
            path: runtime.digests.digest(_require_file(dataset, path))
            for path in stage.files(config)
        },
        **_name_recognizers(stage, runtime),
        "inputs": inputs,
        **({"data": dataset.digest(runtime.digests)} if first else {}),
        **({"corrections": decided} if decided else {}),
    }


def _name_recognizers(stage: Stage, runtime: Runtime) -> dict[str, Any]:
    runs = stage.borrows(runtime.config)
    found = {run: _require_recognizer(runtime.store, run).fingerprint for run in runs}
    return {"recognizers": found} if found else {}


def _require_recognizer(store: Store, run: str) -> Published:
    published = store.open_run(run, "retrain")
    if published is None or not (published.directory / RECOGNIZER).is_file():
        raise ConfigError(
            f"the committee names the recognizer of run {run!r}, which has none trained on "
            f"pseudo-labels under this --runs-dir. Make it first: name={run} --until retrain"
        )
    return published


def _require_file(dataset: Dataset, path: str) -> Path:
    place = dataset.locate_model(path)
    if not place.is_file():
        roots = [root for root in (dataset.models_root, dataset.root) if root is not None]
        raise ConfigError(
            f"the committee names {path!r}, and there is no such file below "
            f"{' or '.join(map(str, roots))}. --models-dir names a folder of models"
        )
    return place


def plan_run(
    stages: tuple[Stage, ...],
    runtime: Runtime,
    *,
    only: str | None = None,
    until: str | None = None,
    force: bool = False,
    verify: bool = False,
) -> list[Step]:
    """Decide for every stage whether it runs, and give the reason.

    With `only`, that stage alone runs, from what the run has published upstream, current or not.
    """
    store, run = runtime.store, runtime.config.name
    fingerprints: dict[str, str] = {}
    omitted: set[str] = set()
    steps: list[Step] = []
    for stage in stages:
        reason = explain_omission(stage, runtime.dataset)
        if reason:
            omitted.add(stage.name)
            if only == stage.name or (only is None and not stage.needs_align):
                steps.append(Step(stage, "", {}, "omit", reason))
            continue
        published = store.open_run(run, stage.name)
        if only is not None and stage.name != only:
            if published is not None:
                fingerprints[stage.name] = published.fingerprint
            continue
        if only is not None:
            _require_upstream(stage, runtime, fingerprints, omitted, verify=verify)
        ingredients = collect_ingredients(stage, runtime, fingerprints)
        fingerprint = digest_json(ingredients)
        fingerprints[stage.name] = fingerprint
        action, reason = _decide(stage, published, fingerprint, ingredients, store, verify=verify)
        torn = store.find_torn(run, stage.name)
        if torn is not None and action == "run":
            reason = f"damaged: {torn} is cut short"
        if force:
            action, reason = "run", "forced"
        elif only is not None and action != "run":
            action, reason = "run", "asked for"
        steps.append(Step(stage, fingerprint, ingredients, action, reason))
        if stage.name == until:
            break
    return steps


def explain_omission(stage: Stage, dataset: Dataset) -> str:
    """Why a run on this data set leaves the stage out, or an empty string."""
    if stage.needs_align and dataset.manifest.align is None:
        return "the data manifest does not say `align`"
    if stage.needs_images and dataset.kind == "features":
        return "the data set brings its own features"
    return ""


def _decide(
    stage: Stage,
    published: Published | None,
    fingerprint: str,
    ingredients: Mapping[str, Any],
    store: Store,
    *,
    verify: bool,
) -> tuple[str, str]:
    if published is not None and published.fingerprint == fingerprint:
        damage = published.find_damage(rehash=verify)
        if damage is None:
            return "skip", "up to date"
        return "run", f"damaged: {damage}"
    shared = store.find(stage.name, fingerprint)
    if shared is not None and not (verify and shared.find_damage(rehash=True)):
        return "link", "another run has published the same"
    if published is None:
        return "run", "not published yet"
    return "run", explain_change(published.manifest.get("ingredients", {}), ingredients)


def explain_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference between two sets of ingredients, in words."""
    if before.get("version") != now["version"] or before.get("schemas") != now["schemas"]:
        return "its code or tables changed"
    changes = _find_changes(before.get("config", {}), now["config"], "")
    if changes:
        return "; ".join(changes[:3]) + (" ..." if len(changes) > 3 else "")
    if before.get("data") != now.get("data"):
        return "the data set changed, in its manifest or its files"
    if before.get("corrections") != now.get("corrections"):
        return "the corrections changed"
    if before.get("files") != now["files"]:
        return "a model file changed"
    if before.get("recognizers") != now.get("recognizers"):
        return "the recognizer of another run changed"
    return f"{', '.join(find_changed_inputs(before, now)) or 'an input'} changed"


def find_changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The stages whose results are other ones in two sets of ingredients."""
    old, new = before.get("inputs", {}), now["inputs"]
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


def _find_changes(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(before.keys() | now.keys())
            for change in _find_changes(before.get(key), now.get(key), f"{path}.{key}".strip("."))
        ]
    if before == now:
        return []
    if isinstance(now, (list, dict)) or isinstance(before, (list, dict)):
        return [f"{path} changed"]
    return [f"{path} {before} -> {now}"]


def _require_upstream(
    stage: Stage,
    runtime: Runtime,
    fingerprints: Mapping[str, str],
    omitted: set[str],
    *,
    verify: bool,
) -> None:
    run = runtime.config.name
    for name in stage.upstream:
        if name in omitted:
            continue
        torn = runtime.store.find_torn(run, name)
        if torn is not None:
            raise StageError(f"{torn} is cut short. Repair it with --stage {name} --force")
        published = runtime.store.open_run(run, name)
        if name not in fingerprints or published is None:
            raise StageError(
                f"stage {stage.name} reads {name}, which run {run!r} has not published. "
                f"Run --stage all --until {stage.name}"
            )
        damage = published.find_damage(rehash=verify)
        if damage:
            raise StageError(f"{damage}. Repair it with --stage {name} --force")


# -------------------------------------------------------------------------------------- execute


def execute_step(
    step: Step, runtime: Runtime, *, force: bool, environment: Mapping[str, Any]
) -> Published:
    """Run one stage and publish it; after a failure the previous publication is still whole."""
    store, run, stage = runtime.store, runtime.config.name, step.stage

    waited = False

    def log_waiting(holder: str) -> None:
        nonlocal waited
        waited = True
        log.info("%-9s waiting for %s, which is making the same", stage.name, holder)

    with store.lock(f"{stage.name}/{step.fingerprint[:20]}", wait=True, waiting=log_waiting):
        if step.action == "link" or (waited and not force):
            shared = store.find(stage.name, step.fingerprint)
            if shared is not None:
                with report_disk_errors(stage.name):
                    store.link(run, shared)
                return shared
        directory = store.open_work(stage.name, step.fingerprint, fresh=force)
        upstream = {}
        for name in stage.upstream:
            published = store.open_run(run, name)
            if published is not None:
                upstream[name] = published
        work = Work(
            stage=stage,
            config=restrict_config(runtime.config, stage),
            seed=runtime.config.seed,
            directory=directory,
            runtime=runtime,
            upstream=upstream,
            fresh=force,
        )
        started = time.perf_counter()
        with PeakMemory() as memory, report_disk_errors(stage.name):
            facts = dict(stage.run(work))
        manifest = {
            "stage": stage.name,
            "fingerprint": step.fingerprint,
            "ingredients": step.ingredients,
            "schemas": step.ingredients["schemas"],
            "facts": facts,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_mib": memory.peak_mib,
            "environment": environment,
        }
        with report_disk_errors(stage.name):
            published = store.publish(stage.name, directory, manifest)
            store.link(run, published)
        return published


@contextmanager
def report_disk_errors(stage: str) -> Iterator[None]:
    """Raise an OSError of the block as a StageError; the system's message names the file."""
    try:
        yield
    except OSError as error:
        raise StageError(
            f"stage {stage} could not read or write: {error}. Earlier publications are untouched. "
            "Free space or correct the permissions, then run the same command again"
        ) from error
