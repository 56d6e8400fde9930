"""What several tests share: a tiny data set, a way to run the command line, real data."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

# One thread a process: tests run side by side, and spinning threads of two torches starve each
# other. Set before anything imports torch, and inherited by every process a test starts.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import pyarrow.parquet as pq
import pytest
import yaml

TINY_DATA = {
    "name": "tiny",
    "kind": "synthetic",
    "size_px": 48,
    "synthetic": {
        "labelled_identities": 16,
        "unlabelled_identities": 20,
        "evaluation_identities": 12,
        "images_min": 4,
        "images_max": 8,
        "evaluation_images": 4,
    },
}
TINY_CONFIG = {
    "name": "tiny",
    "data": "data.yaml",
    "committee": {
        "base": {"name": "base", "backbone": "plain", "width": 0.5},
        "members": [{"name": "other", "backbone": "separable", "width": 0.5}],
    },
    "train": {"mediator_share": 0.5, "epochs": 2, "batch_size": 16, "embedding_dim": 16,
              "input_px": 16},
    "knn": {"k": 5},
    "retrain": {"epochs": 2, "batch_size": 16, "embedding_dim": 16, "input_px": 16,
                "backbone": "plain", "width": 0.5},
    "evaluate": {"probe_px": [16], "folds": 2, "pairs_per_fold": 20},
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Where nmslib has no build (Python 3.13), its tests say so and the others go on."""
    if importlib.util.find_spec("nmslib") is None:
        skipped = pytest.mark.skip(reason="no nmslib here; it has no build for Python 3.13")
        for item in items:
            drawn = getattr(item, "callspec", None)
            wanted = drawn is not None and drawn.params.get("backend") == "nmslib"
            if wanted or item.get_closest_marker("nmslib"):
                item.add_marker(skipped)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with the config and the manifest of a run that takes seconds."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "configs").mkdir()
    (place / "configs" / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))
    (place / "data.yaml").write_text(yaml.safe_dump(TINY_DATA))
    return place / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def data_root():
    """Real faces, where they are at hand; a run with CI=true must find them."""
    root = Path(os.environ.get("CDP_DATA_ROOT", Path(__file__).parents[1] / "../shared/data"))
    if not root.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no real data at {root}; set CDP_DATA_ROOT")
        pytest.skip(f"no real data at {root}; set CDP_DATA_ROOT")
    return root.resolve()


@pytest.fixture(scope="session")
def finished_run(tiny, tmp_path_factory):
    """A finished tiny run; made once, whichever worker asks first. Copy it before changing it."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    runs = tmp_path_factory.getbasetemp().parent / f"finished-{session}"
    runs.mkdir(exist_ok=True)
    with (runs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (runs / "tiny" / "report").exists():
            from pipelines.run import main

            assert main(["--config", str(tiny), "--runs-dir", str(runs), "--workers", "1"]) == 0
    return runs / "tiny"


@pytest.fixture
def one_thread():
    """Small tensors: a second thread costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    passing = shutil.ignore_patterns("logs", ".*draft*")  # another test may be running there
    shutil.copytree(finished_run.parent, tmp_path / "runs", symlinks=True, ignore=passing)
    return tmp_path / "runs" / "tiny"


def digest_run(run: Path) -> dict[str, str]:
    """Logical digests of every table of a run: columns and values, without wall times."""
    return {
        f"{stage.name}/{table}": digest
        for stage in sorted(run.iterdir())
        if stage.is_symlink()
        for table, digest in digest_tables(stage).items()
    }


def digest_tables(stage: Path) -> dict[str, str]:
    """The same of one stage."""
    digests = {}
    for path in sorted(stage.glob("**/*.parquet")):
        if path.is_dir():
            continue
        table = pq.read_table(path)
        if "seconds" in table.column_names:
            table = table.drop_columns(["seconds"])
        total = hashlib.sha256(str(table.schema).encode())
        for name in table.column_names:
            if table.schema.field(name).type == "binary":
                total.update(b"\0".join(table[name].to_pylist()))
                table = table.drop_columns([name])
        total.update(table.to_pandas().to_json(double_precision=15).encode())
        digests[path.relative_to(stage).as_posix()] = total.hexdigest()
    return digests
