"""The store of a runs directory: published stages with their manifests, shared models, locks.

    runs/
      .store/<stage>/<fingerprint>.partial/    work in progress, resumable
      .store/<stage>/<fingerprint>-<attempt>/  published, never written again
      .store/model/<key>/                      one trained model, shared by every stage that asks
      <run>/<stage> -> ../.store/<stage>/...   the stable path to open
      <run>/run.json                           settings and data manifest of the run
      <run>/corrections.jsonl                  decisions of reviewers; append-only

The contract:
- A published directory is complete: the manifest is written last, one rename makes the directory
  appear, and one rename of a link makes it part of the run. A reader sees either all old tables or
  all new ones.
- A manifest lists every file with size and SHA-256, and ends with a digest of itself;
  `Published.find_damage` compares the files and the manifest with it.
- A table has the Arrow schema that its stage declares; reading one with another schema is an error.
- No pickle.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import ConfigError, StageError
from pipelines.files import (
    DIGEST,
    digest_file,
    digest_json,
    drop_drafts,
    sync_directory,
    write_text,
)
from pipelines.tables import types_agree

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What systems answer where a disk has no symbolic links."""

MANIFEST = "manifest.json"
SCRATCH = "_scratch"
RECORD = "run.json"


# ------------------------------------------------------------------------------------ manifests


@dataclass(frozen=True)
class Published:
    """One published stage: its directory and its manifest."""

    stage: str
    directory: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, stage: str, directory: Path) -> Published | None:
        """The publication in a directory; None when its manifest is missing or incomplete."""
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            raise StageError(
                f"cannot read {directory / MANIFEST}: {error.strerror}. Fix its permissions, or "
                f"make it again with --stage {stage} --force"
            ) from error
        whole = isinstance(manifest, dict) and {"fingerprint", "files", "facts"} <= manifest.keys()
        return cls(stage, directory.resolve(), manifest) if whole else None

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def facts(self) -> Mapping[str, Any]:
        return dict(self.manifest["facts"])

    def find_damage(self, *, rehash: bool = False) -> str | None:
        """The first difference between files and manifest, or None.

        rehash : compare SHA-256 too, of the files and of the manifest; sizes are always compared.
        """
        for name, record in self.manifest["files"].items():
            path = self.directory / name
            try:
                size = path.stat().st_size
            except OSError:
                return f"{path} is missing"
            if size != record["bytes"]:
                return f"{path} has {size} bytes, published with {record['bytes']}"
            if rehash and digest_file(path) != record["sha256"]:
                return f"{path} no longer has the SHA-256 it was published with"
        content = {name: value for name, value in self.manifest.items() if name != DIGEST}
        if rehash and self.manifest.get(DIGEST, digest_json(content)) != digest_json(content):
            return f"{self.directory / MANIFEST} differs from what was published"
        return None

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """One table, its types checked against the schema in the manifest."""
        path = self.path(table)
        try:
            read = pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise StageError(
                f"cannot read {path}: {error}. Repair it with --stage {self.stage} --force"
            ) from error
        declared = self.manifest["schemas"].get(table.split("/")[0], {})
        for field in read.schema:
            expected = declared.get(field.name)
            if expected is not None and not types_agree(expected, str(field.type)):
                raise StageError(
                    f"{path}: column {field.name} is {field.type}, its stage declares {expected}. "
                    f"Repair it with --stage {self.stage} --force"
                )
        return read

    def path(self, table: str) -> Path:
        """The path of a table: `labels` or, per split and member, `embeddings/labelled/base`."""
        return self.directory / f"{table}.parquet"


def find_misfits(run: Path, stage: str) -> list[tuple[str, str]]:
    """(stage, input) where a stage was made from another result than the run's present one.

    Looked for among the stages that `stage` rests on, directly or through others; reads manifests
    alone.
    """
    found: list[tuple[str, str]] = []
    left, seen = [stage], {stage}
    while left:
        name = left.pop()
        inputs = compare_inputs(run, name)
        found += [(name, upstream) for upstream, is_present in inputs.items() if not is_present]
        left += [upstream for upstream in inputs if upstream not in seen]
        seen.update(inputs)
    return found


def compare_inputs(run: Path, stage: str) -> dict[str, bool]:
    """Input of a published stage -> whether it was made from the run's present result of it."""
    published = Published.open(stage, run / stage)
    inputs = published.manifest.get("ingredients", {}).get("inputs", {}) if published else {}
    present = {name: Published.open(name, run / name) for name in inputs}
    return {
        name: other is not None and other.fingerprint == inputs[name]
        for name, other in present.items()
    }


class Store:
    """The directory under all runs in which stages and models are published."""

    def __init__(self, runs_directory: Path) -> None:
        self.runs_directory = runs_directory
        self.root = runs_directory / ".store"

    # -- stages

    def open_run(self, run: str, stage: str) -> Published | None:
        """The publication that `runs/<run>/<stage>` links to, if any."""
        return Published.open(stage, self.runs_directory / run / stage)

    def find_torn(self, run: str, stage: str) -> Path | None:
        """The path of a stage's manifest that exists and cannot be parsed; None otherwise."""
        directory = self.runs_directory / run / stage
        there = (directory / MANIFEST).exists()
        torn = there and Published.open(stage, directory) is None
        return directory.resolve() / MANIFEST if torn else None

    def find(self, stage: str, fingerprint: str) -> Published | None:
        """An undamaged publication with this fingerprint, from any run."""
        for directory in sorted(
            self.root.joinpath(stage).glob(f"{fingerprint[:20]}-*"), reverse=True
        ):
            found = Published.open(stage, directory)
            if found and found.fingerprint == fingerprint and not found.find_damage():
                return found
        return None

    def open_work(self, stage: str, fingerprint: str, *, fresh: bool) -> Path:
        """The working directory of a stage, with the parts of an earlier attempt unless `fresh`."""
        directory = self.root / stage / f"{fingerprint[:20]}.partial"
        if fresh and directory.exists():
            shutil.rmtree(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StageError(
                f"cannot make {directory}: {error.strerror}. Choose another place with --runs-dir"
            ) from error
        drop_drafts(directory)
        return directory

    def publish(self, stage: str, work: Path, manifest: Mapping[str, Any]) -> Published:
        """Write the manifest, then rename the working directory to its final name."""
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        files = {}
        for path in sorted(work.rglob("*")):
            if path.is_file() and path.name != MANIFEST:
                record: dict[str, Any] = {
                    "bytes": path.stat().st_size,
                    "sha256": digest_file(path),
                }
                if path.suffix == ".parquet":
                    record["rows"] = pq.ParquetFile(path).metadata.num_rows
                files[path.relative_to(work).as_posix()] = record
        content = json.loads(json.dumps({**manifest, "files": files}))
        text = json.dumps({**content, DIGEST: digest_json(content)}, indent=1)
        write_text(work / MANIFEST, text + "\n")
        prefix = f"{manifest['fingerprint'][:20]}-"
        attempts = [int(d.name[len(prefix) :]) for d in work.parent.glob(f"{prefix}*")]
        final = work.parent / f"{prefix}{max(attempts, default=0) + 1}"
        work.rename(final)
        sync_directory(final.parent)
        published = Published.open(stage, final)
        assert published is not None
        return published

    def link(self, run: str, published: Published) -> None:
        """Link a publication into the run, then delete attempts that no run links to any more."""
        link = self.runs_directory / run / published.stage
        link.parent.mkdir(parents=True, exist_ok=True)
        for left in link.parent.glob(f".{link.name}.draft-*"):
            left.unlink()
        target = os.path.relpath(published.directory, link.parent.resolve())
        if not (link.is_symlink() and os.readlink(link) == target):
            draft = link.with_name(f".{link.name}.draft-{os.getpid()}")
            draft.symlink_to(target)
            draft.replace(link)
        self._drop_replaced(published)

    def check_links(self) -> None:
        """Refuse a disk without symbolic links, which lead from a run to what it has published."""
        probe = self.root / f".link.draft-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.unlink(missing_ok=True)
            probe.symlink_to("nowhere")
            probe.unlink()
        except OSError as error:
            if error.errno not in _NO_LINKS:
                return  # the run itself says what cannot be written
            raise ConfigError(
                f"{self.runs_directory} cannot keep symbolic links ({error.strerror}), which a run "
                "needs; disks such as exFAT and some network shares have none. Choose a folder on "
                "another disk with --runs-dir"
            ) from error

    def drop_left(self, run: str) -> None:
        """Delete the drafts of killed writers beside the stages; call it with the run locked."""
        for draft in (self.runs_directory / run).glob(".*.draft-*"):
            draft.unlink(missing_ok=True)
        for draft in self.root.glob(".*.draft-*"):  # other runs may be writing theirs
            if not _is_alive(draft.name.rpartition("-")[2]):
                draft.unlink(missing_ok=True)

    def _drop_replaced(self, published: Published) -> None:
        kept = {
            link.resolve()
            for link in self.runs_directory.glob(f"*/{published.stage}")
            if link.is_symlink()
        }
        prefix = published.fingerprint[:20]
        for directory in published.directory.parent.glob(f"{prefix}-*"):
            if directory.resolve() not in kept and directory != published.directory:
                shutil.rmtree(directory, ignore_errors=True)

    # -- models

    def model_directory(self, key: str) -> Path:
        """The directory in which the model with this key is trained and stored."""
        return self.root / "model" / key[:20]

    # -- locks

    @contextmanager
    def lock(
        self, name: str, *, wait: bool, waiting: Callable[[str], None] | None = None
    ) -> Iterator[None]:
        """Hold the lock `name` for this process; the system frees the lock of a dead process.

        wait : wait for another holder, after calling `waiting(holder)` once; without it, a
            StageError names the holder.
        """
        path = self.root / "lock" / name.replace("/", "_")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+b", buffering=0)
        except OSError as error:
            raise StageError(
                f"cannot write below {self.root}: {error.strerror}. Choose another place with "
                "--runs-dir"
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().decode().strip() or "another process"
                if not wait:
                    raise StageError(
                        f"{name} is in use by {holder}. Wait for it to end, or choose another run "
                        "name or --runs-dir"
                    ) from None
                if waiting:
                    waiting(holder)
                fcntl.flock(stream, fcntl.LOCK_EX)
            with suppress(OSError):  # on a full disk the lock holds without its holder's name
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
            yield


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True
