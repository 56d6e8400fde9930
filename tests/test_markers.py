"""The markers of the test files say what the files need."""

import subprocess
import sys
from pathlib import Path

from conftest import list_markers

ROOT = Path(__file__).parents[1]
FILES = sorted(Path(__file__).parent.glob("test_*.py"))
IMPORT_WITHOUT_TORCH = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pytorch_metric_learning"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error)
"""


def import_without_torch(folder, names):
    """What could not be imported, one line a file."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *names],
        cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_without_the_marker_torch_is_imported_without_torch():
    names = [path.stem for path in FILES if "torch" not in list_markers(path)]
    assert import_without_torch(ROOT / "tests", names) == []


def test_a_file_that_needs_torch_is_found(tmp_path):
    (tmp_path / "needs_it.py").write_text("import cdp.models.heads")
    (tmp_path / "needs_none.py").write_text("import numpy")
    (found,) = import_without_torch(tmp_path, ["needs_it", "needs_none"])
    assert found.startswith("needs_it torch")


def test_markers_are_read_from_one_and_from_many(tmp_path):
    path = tmp_path / "test_x.py"
    for text, expected in (
        ("x = 1", set()),
        ("pytestmark = pytest.mark.slow", {"slow"}),
        ("pytestmark = [pytest.mark.torch, pytest.mark.slow]", {"torch", "slow"}),
    ):
        path.write_text(text)
        assert list_markers(path) == expected
