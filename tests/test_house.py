"""The walls of the house: who may import whom, and that the README names every room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("cdp/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
PLUMBING = {"pipelines", "dask", "distributed", "pyarrow", "argparse", "yaml"}


def list_imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    roots = {module.partition(".")[0] for module in list_imports(path)}
    if name.startswith("cdp/"):
        assert not roots & PLUMBING
    if name != "cdp/knn/libraries.py":
        assert not roots & {"faiss", "nmslib"}


def test_open_run_is_the_only_name_of_cdp_that_lives_in_the_plumbing():
    import cdp

    homes = {name: home for name, home in cdp._HOME.items() if not home.startswith("cdp.")}
    assert homes == {"open_run": "pipelines.results"}


def test_a_stage_does_not_import_a_later_stage():
    from pipelines.stages import STAGES

    order = [stage.name for stage in STAGES]
    for number, name in enumerate(order):
        path = ROOT / "pipelines" / "stages" / f"{name}.py"
        later = {f"pipelines.stages.{other}" for other in order[number + 1 :]}
        assert not later & set(list_imports(path))


def test_no_code_unpickles_or_evaluates():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load"}, path
        assert not {"pickle", "joblib", "shelve"} & set(list_imports(path)), path


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.name != "__init__.py" and f" {path.name} " not in readme
    ]
    assert not missing


def test_importing_cdp_is_cheap():
    code = "import sys, cdp; print([m for m in ('torch', 'numba', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.torch
def test_what_cdp_promises_is_there():
    import cdp

    for name in cdp.__all__:
        assert getattr(cdp, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cdp.nothing
