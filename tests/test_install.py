"""What `pip install .` installs: everything that a run needs, and a command that works anywhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.packaged import CONFIGS, MANIFESTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BUILT = ("cdp", "pipelines", CONFIGS, MANIFESTS)
"""Folders that a wheel is built from."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built without network from a copy of the sources; not from the tree itself, where a
    `build` folder of an earlier version would leave its files in it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools here to build a wheel with")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT:
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder as site-packages has it after the installation."""
    place = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def list_files(folder):
    return {
        path.relative_to(folder).as_posix()
        for name in ("cdp", "pipelines")
        for suffix in ("py", "typed", "yaml", "html", "css", "js")
        for path in (folder / name).rglob(f"*.{suffix}")
    }


def test_a_wheel_holds_every_file_of_the_packages(installed):
    links = {
        f"pipelines/{folder}/{path.name}"
        for folder in (CONFIGS, MANIFESTS)
        for path in (ROOT / folder).glob("*.yaml")
    }
    # rglob follows no links, which is what the folders of settings are in a checkout.
    assert list_files(installed) == list_files(ROOT) | links
    assert not any(path.is_symlink() for path in installed.rglob("*"))


def test_an_installed_command_plans_the_default_run_in_any_folder(installed, tmp_path):
    done = run_installed(installed, tmp_path, "run", "--config", "default", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ingest    run   not published yet")
    done = run_installed(installed, tmp_path, "run", "--config", "nothing")
    assert done.returncode == 2
    assert "default, demo, lfw" in done.stderr


def run_installed(place, folder, *arguments):
    code = (
        "import sys; from pipelines import command; "
        f"assert command.__file__.startswith({str(place)!r}); "
        "sys.argv[0] = 'cdp'; sys.exit(command.main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(place)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_wheel_offers_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "cdp = pipelines.command:main" in archive.read(points).decode()
