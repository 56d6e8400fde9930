"""What is on disk: atomic files, published stages, their manifests, and the models they share.

    runs/
      .store/<stage>/<fingerprint>.partial/    work in progress, resumable
      .store/<stage>/<fingerprint>-<attempt>/  published, never written again
      .store/model/<key>/                      one trained model, shared by every stage that asks
      <run>/<stage> -> ../.store/<stage>/...   the stable path people open
      <run>/run.json                           what it was asked for: settings, data set
      <run>/corrections.jsonl                  what people decided; never rewritten

The contract:
- A published directory is complete: its manifest is written last, then one rename makes it appear,
  then one rename of a link makes it the run's. A reader sees the old tables or the new, whole.
- A manifest lists every file with size and SHA-256, and ends with a digest of itself;
  `Published.find_damage` holds the files and the manifest to it.
- Tables carry the Arrow schema their stage declares; a table with another schema is refused.
- Nothing here is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from cdp.errors import DataError, StageError
from cdp.types import PairTable

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
SCRATCH = "_scratch"
RECORD = "run.json"
DIGEST = "digest"


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_schema(schema: pa.Schema) -> dict[str, str]:
    """Column name -> Arrow type, the form in which a schema enters a fingerprint."""
    return {field.name: str(field.type) for field in schema}


# ---------------------------------------------------------------------------------------- files


@contextmanager
def open_atomically(path: Path) -> Iterator[Path]:
    """Give a sibling path to write to; move it to `path` once the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def reserve_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Make a .npy file to be mapped and give it all of its room; StageError when there is none.

    A mapped file without room ends the process that writes to it, without a word.
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        with path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> StageError:
    reason = getattr(error, "strerror", None) or error
    return StageError(
        f"cannot write {path}: {reason}; what was published before is untouched. Free "
        "space or mend the permissions, then run the same command again"
    )


def drop_drafts(directory: Path) -> None:
    """Remove what writers that were killed left; for the holder of the directory's lock alone."""
    for draft in directory.rglob(".*.draft-*"):
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with open_atomically(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_table(path: Path, columns: Mapping[str, Any] | pa.Table, schema: pa.Schema) -> None:
    """Write one Parquet file atomically, cast to `schema`."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns), schema=schema)
    if not table.schema.equals(schema):
        table = table.select(schema.names).cast(schema)
    with open_atomically(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """(n, d) array -> Arrow fixed-size list column of n rows, without copying."""
    values = np.ascontiguousarray(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def list_pairs(pairs: pd.DataFrame, sample_id: np.ndarray) -> PairTable:
    """The table `mediate/pairs`, ids as positions in the ascending `sample_id`.

    Runs of earlier versions did not count listings: their pairs weigh alike.
    """
    listings = pairs.get("listings")
    return PairTable(
        np.searchsorted(sample_id, pairs.source.to_numpy()),
        np.searchsorted(sample_id, pairs.target.to_numpy()),
        None if listings is None else listings.to_numpy(),
    )


def read_vectors(path: Path, column: str) -> np.ndarray:
    """One fixed-size-list column of a Parquet table or directory -> (n, d) array.

    Row groups are copied one by one into the result, so the peak is the result plus one group.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    readers = [pq.ParquetFile(file) for file in files]
    count = sum(reader.metadata.num_rows for reader in readers)
    field = readers[0].schema_arrow.field(column).type
    result = np.empty((count, field.list_size), field.value_type.to_pandas_dtype())
    row = 0
    for reader in readers:
        for batch in reader.iter_batches(columns=[column]):
            block = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            result[row : row + len(batch)] = block.reshape(len(batch), -1)
            row += len(batch)
    return result


def open_vectors(path: Path, column: str, count: int, longest: int) -> np.ndarray:
    """Vectors of a Parquet file from anywhere -> (n, d) array, or a DataError.

    What its footer declares is held to what is expected before anything is read: a column of
    `count` fixed-size lists of at most `longest` floats, in one file. The rows are then held to the
    footer; none may be missing or null.
    """
    wanted = f"a column {column!r} of {count} fixed-size lists of 1 to {longest} floats"
    try:
        reader = pq.ParquetFile(path)
        schema, rows = reader.schema_arrow, reader.metadata.num_rows
        kind = schema.field(column).type if schema.get_field_index(column) >= 0 else None
        if kind is None or not pa.types.is_fixed_size_list(kind):
            raise DataError(f"{path}: {wanted} expected, found {describe_schema(schema)}")
        if (
            not pa.types.is_floating(kind.value_type)
            or not 1 <= kind.list_size <= longest
            or rows != count
        ):
            raise DataError(f"{path}: {wanted} expected, found {rows} of {kind}")
        result = np.empty((count, kind.list_size), kind.value_type.to_pandas_dtype())
        row = 0
        at_once = max(1, (1 << 22) // kind.list_size)
        for batch in reader.iter_batches(batch_size=at_once, columns=[column]):
            values = batch.column(0)
            if values.null_count or values.flatten().null_count or row + len(batch) > count:
                raise DataError(f"{path}: {wanted} expected, found nulls or more rows")
            block = values.flatten().to_numpy(zero_copy_only=False)
            result[row : row + len(batch)] = block.reshape(len(batch), -1)
            row += len(batch)
    except DataError:
        raise
    except Exception as error:  # a broken file can make the reader raise anything at all
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise DataError(f"{path}: {wanted} expected; it cannot be read: {reason}") from error
    if row != count:
        raise DataError(f"{path}: {wanted} expected, found {row}")
    return result


# ------------------------------------------------------------------------------------ manifests


@dataclass(frozen=True)
class Published:
    """One published stage: its directory and its manifest."""

    stage: str
    directory: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, stage: str, directory: Path) -> Published | None:
        """Read the manifest; None when there is none or it is cut short."""
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            raise StageError(
                f"cannot read {directory / MANIFEST}: {error.strerror}. Mend the permissions, or "
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
        """Hold every file to the manifest: size always, SHA-256 if `rehash`. None when whole."""
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
        said = {name: value for name, value in self.manifest.items() if name != DIGEST}
        if rehash and self.manifest.get(DIGEST, digest_json(said)) != digest_json(said):
            return f"{self.directory / MANIFEST} no longer says what it was published with"
        return None

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """One table, checked against the schema recorded at publication."""
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
            if expected is not None and not _types_agree(expected, str(field.type)):
                raise StageError(
                    f"{path}: column {field.name} is {field.type}, its stage declares {expected}. "
                    f"Repair it with --stage {self.stage} --force"
                )
        return read

    def path(self, table: str) -> Path:
        """Where a table lies: `labels` or, per split and member, `embeddings/labelled/base`."""
        return self.directory / f"{table}.parquet"


def _types_agree(declared: str, found: str) -> bool:
    """Vectors are declared without their length, which depends on the model."""
    return found == declared or (declared.endswith("[0]") and found.startswith(declared[:-3]))


class Store:
    """The directory under all runs in which stages and models are published."""

    def __init__(self, runs_directory: Path) -> None:
        self.runs_directory = runs_directory
        self.root = runs_directory / ".store"

    # -- stages

    def open_run(self, run: str, stage: str) -> Published | None:
        """What `runs/<run>/<stage>` points at, if it is published."""
        return Published.open(stage, self.runs_directory / run / stage)

    def find_torn(self, run: str, stage: str) -> Path | None:
        """The run's manifest of a stage when it is there and cannot be understood."""
        directory = self.runs_directory / run / stage
        there = (directory / MANIFEST).exists()
        torn = there and Published.open(stage, directory) is None
        return directory.resolve() / MANIFEST if torn else None

    def find(self, stage: str, fingerprint: str) -> Published | None:
        """A whole publication with this fingerprint, made by any run."""
        for directory in sorted(
            self.root.joinpath(stage).glob(f"{fingerprint[:20]}-*"), reverse=True
        ):
            found = Published.open(stage, directory)
            if found and found.fingerprint == fingerprint and not found.find_damage():
                return found
        return None

    def open_work(self, stage: str, fingerprint: str, *, fresh: bool) -> Path:
        """The working directory of a stage; what an earlier attempt left in it is kept."""
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
        """Write the manifest, then let the directory appear under its final name."""
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
        said = json.loads(json.dumps({**manifest, "files": files}))
        text = json.dumps({**said, DIGEST: digest_json(said)}, indent=1)
        write_text(work / MANIFEST, text + "\n")
        prefix = f"{manifest['fingerprint'][:20]}-"
        attempts = [int(d.name[len(prefix) :]) for d in work.parent.glob(f"{prefix}*")]
        final = work.parent / f"{prefix}{max(attempts, default=0) + 1}"
        work.rename(final)
        _sync_directory(final.parent)
        published = Published.open(stage, final)
        assert published is not None
        return published

    def link(self, run: str, published: Published) -> None:
        """Make a publication the run's own, then drop attempts no run points at any more."""
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

    def drop_left(self, run: str) -> None:
        """Remove the drafts of killed writers beside the stages; for the holder of the run."""
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
        """Where the model with this key is trained and kept."""
        return self.root / "model" / key[:20]

    # -- locks

    @contextmanager
    def lock(self, name: str, *, wait: bool, waiting: Any = None) -> Iterator[None]:
        """Hold `name` for this process; the lock of a dead process frees itself.

        With `wait`, another holder is waited for (`waiting(holder)` is told once); otherwise a
        StageError names it.
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


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- input files


class FileDigests:
    """SHA-256 of input files, remembered by path, size, inode and modification time.

    A file touched within two seconds of being remembered is read again next time, so that an edit
    in the same clock tick is never missed. `rehash` distrusts everything remembered.
    """

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if not rehash:
            try:
                self._known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                self._known = {}

    def digest(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        key = os.fspath(path)
        known = self._known.get(key)
        if known is not None and known[:3] == stamp:
            return str(known[3])
        value = digest_file(path)
        if stat.st_mtime_ns < time.time_ns() - 2_000_000_000:
            self._known[key] = [*stamp, value]
            self._changed = True
        return value

    def digest_tree(self, root: Path, paths: Iterable[str]) -> str:
        """One digest over (relative path, content) of many files.

        A file that cannot be read counts with the reason: it costs itself only, and once it can be
        read the digest is another one.
        """
        total = hashlib.sha256()
        for path in sorted(paths):
            try:
                content = self.digest(root / path)
            except OSError as error:
                content = f"unreadable: {error.errno}"
            total.update(path.encode("utf-8", "surrogateescape"))
            total.update(b"\0" + content.encode() + b"\n")
        return total.hexdigest()

    def save(self) -> None:
        """Remember for next time; a store that cannot be written is no reason to fail."""
        if self._changed:
            try:
                write_text(self._path, json.dumps(self._known))
            except (StageError, UnicodeError):
                return
            self._changed = False
