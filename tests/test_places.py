"""The places a run is in: folders that cannot be written, disks without links, no main program."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY_CONFIG, TINY_DATA

from cdp import numba_cache
from pipelines import engine
from pipelines.run import main

pytestmark = [pytest.mark.torch]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def closed(monkeypatch, tmp_path):
    """Only the folder for temporary files can be written."""
    monkeypatch.delenv(numba_cache.VARIABLE, raising=False)
    monkeypatch.setattr(numba_cache.os, "access", lambda path, mode: str(path).startswith("/tmp/x"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_compiled_code_goes_to_a_folder_of_this_user_alone(closed):
    numba_cache.choose_folder()
    chosen = Path(os.environ[numba_cache.VARIABLE])
    assert chosen.parent == closed
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
    numba_cache.choose_folder()
    assert Path(os.environ[numba_cache.VARIABLE]) == chosen


def test_a_folder_that_others_can_write_is_not_used(closed):
    (closed / f"cdp-numba-{os.getuid()}").mkdir(mode=0o777)
    (closed / f"cdp-numba-{os.getuid()}").chmod(0o777)
    numba_cache.choose_folder()
    chosen = Path(os.environ[numba_cache.VARIABLE])
    assert chosen != closed / f"cdp-numba-{os.getuid()}"
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700


def test_a_folder_is_chosen_only_where_it_is_needed(monkeypatch):
    monkeypatch.delenv(numba_cache.VARIABLE, raising=False)
    monkeypatch.setattr(numba_cache.os, "access", lambda path, mode: True)
    numba_cache.choose_folder()
    assert numba_cache.VARIABLE not in os.environ
    monkeypatch.setenv(numba_cache.VARIABLE, "/named")
    monkeypatch.setattr(numba_cache.os, "access", lambda path, mode: False)
    numba_cache.choose_folder()
    assert os.environ[numba_cache.VARIABLE] == "/named"


def test_fonts_are_listed_in_a_folder_of_this_user(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(numba_cache.FONTS_VARIABLE, raising=False)
    monkeypatch.setattr(numba_cache.os, "access", lambda path, mode: True)
    numba_cache.choose_font_folder()
    assert numba_cache.FONTS_VARIABLE not in os.environ
    monkeypatch.setattr(numba_cache.os, "access", lambda path, mode: ".cache" in str(path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    numba_cache.choose_font_folder()
    assert Path(os.environ[numba_cache.FONTS_VARIABLE]).parent == tmp_path
    monkeypatch.setenv(numba_cache.FONTS_VARIABLE, "/named")
    numba_cache.choose_font_folder()
    assert os.environ[numba_cache.FONTS_VARIABLE] == "/named"


def test_a_disk_without_links_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(TINY_DATA))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))

    def refuse(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    runs = tmp_path / "runs"
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--runs-dir", str(runs)]) == 2
    printed = capsys.readouterr()
    assert "cannot keep symbolic links (Operation not permitted)" in printed.err
    assert "--runs-dir" in printed.err
    assert "ingest" not in printed.out


def test_a_main_program_without_a_file_is_hidden(monkeypatch):
    main_module = sys.modules["__main__"]
    monkeypatch.setattr(main_module, "__file__", __file__, raising=False)
    engine._hide_missing_main()
    assert main_module.__file__ == __file__
    monkeypatch.setattr(main_module, "__file__", "<stdin>")
    engine._hide_missing_main()
    assert not hasattr(main_module, "__file__")
    main_module.__file__ = "<stdin>"  # what monkeypatch takes away again


@pytest.mark.slow
def test_a_run_starts_from_a_pipe(tmp_path):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(TINY_DATA))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))
    program = (
        "from pipelines.run import main\n"
        "code = main(['--config', 'tiny.yaml', '--until', 'ingest', '--workers', '1'])\n"
        "print('code', code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "code 0" in done.stdout, done.stderr
