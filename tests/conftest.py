"""What several tests share: a tiny data set, a way to run the command line, real data."""

import ast
import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections import Counter
from pathlib import Path

# One thread a process: tests run side by side, and spinning threads of two torches starve each
# other. Set before anything imports torch, and inherited by every process a test starts.
# CDP_TEST_THREADS takes another number.
THREADS = os.environ.get("CDP_TEST_THREADS", "1")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = THREADS

import pyarrow.parquet as pq
import pytest
import yaml
from known_clusters import write_known_config

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
    # Another seed stands for another processor: every weight, probability and cluster differs.
    "seed": int(os.environ.get("CDP_TEST_SEED", "0")),
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


def list_markers(path: Path) -> set[str]:
    """The names in a test file's `pytestmark`, read without importing the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    names = [ast.unparse(node) for mark in marks for node in ast.walk(mark)]
    return {name.removeprefix("pytest.mark.") for name in names if name.startswith("pytest.mark.")}


def pytest_ignore_collect(collection_path):
    """Where torch is missing, files marked `torch` are left out: their imports would fail."""
    if collection_path.suffix != ".py" or importlib.util.find_spec("torch") is not None:
        return None
    return True if "torch" in list_markers(collection_path) else None


def pytest_configure(config):
    """Workers take the files as they are sorted below, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Where nmslib has no build (Python 3.13), its tests say so and the others go on.

    Of several workers none ends with a long file while the others have nothing left: files of slow
    tests come first.
    """
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    if importlib.util.find_spec("nmslib") is None:
        skipped = pytest.mark.skip(reason="no nmslib here; it has no build for Python 3.13")
        for item in items:
            drawn = getattr(item, "callspec", None)
            wanted = drawn is not None and drawn.params.get("backend") == "nmslib"
            if wanted or item.get_closest_marker("nmslib"):
                item.add_marker(skipped)
    if any(item.get_closest_marker("slow") for item in items):
        fork_workers()


PRELOADED = ("torch", "onnxruntime", "cv2", "pandas", "pyarrow.parquet", "scipy.sparse", "numba",
             "cdp.clusterer", "pipelines.stages.embed", "pipelines.stages.ingest")  # fmt: skip


def fork_workers():
    """Runs made in this process fork their workers from one that has imported everything.

    A worker of its own takes some five seconds to import, and the tests start a hundred. Runs in
    processes of their own start workers as users' runs do.
    """
    import dask
    from distributed.utils import get_mp_context

    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    at_hand = [name for name in PRELOADED if importlib.util.find_spec(name.split(".")[0])]
    get_mp_context().set_forkserver_preload(["distributed", *at_hand])


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
def known(tmp_path_factory):
    """The options of a run whose clusters are known, see `known_clusters`."""
    place = tmp_path_factory.mktemp("known")
    config = write_known_config(place, TINY_CONFIG)
    return ["--config", str(config), "--data-root", str(place / "data"), "--workers", "1"]


@pytest.fixture(scope="session")
def finished_run(tiny, tmp_path_factory):
    """A finished tiny run; made once, whichever worker asks first. Copy it before changing it.

    Its clusters are what a short training gives: a test that needs a certain one takes `known_run`.
    """
    return finish_once("tiny", ["--config", str(tiny), "--workers", "1"], tmp_path_factory)


@pytest.fixture(scope="session")
def known_run(known, tmp_path_factory):
    """A finished run whose clusters are known; made once. Copy it before changing it."""
    return finish_once("known", known, tmp_path_factory)


def finish_once(name, options, tmp_path_factory):
    """The directory of a run that all workers of this session share."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    runs = tmp_path_factory.getbasetemp().parent / f"finished-{name}-{session}"
    runs.mkdir(exist_ok=True)
    with (runs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (runs / name / "report").exists():
            from pipelines.run import main

            assert main([*options, "--runs-dir", str(runs)]) == 0
    return runs / name


@pytest.fixture
def one_thread():
    """Small tensors: a second thread costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(THREADS))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    return copy_run(finished_run, tmp_path / "runs")


@pytest.fixture
def own_known_run(known_run, tmp_path):
    """A copy of the run with known clusters that a test may change."""
    return copy_run(known_run, tmp_path / "runs")


def copy_run(run: Path, runs: Path) -> Path:
    passing = shutil.ignore_patterns("logs", ".*draft*")  # another test may be running there
    shutil.copytree(run.parent, runs, symlinks=True, ignore=passing)
    return runs / run.name


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
