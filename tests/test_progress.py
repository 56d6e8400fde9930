"""Progress is a bar on a terminal, and plain lines, seldom, everywhere else."""

import io
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cdp import progress
from cdp.progress import report_elapsed, show_progress
from pipelines import engine

ROOT = Path(__file__).parents[1]
LOOP = """
import time
from cdp import progress
progress.LINE_INTERVAL_S = 0.2
with progress.report_elapsed("train"), progress.show_progress(9, label="base", unit="step") as bar:
    for _ in range(9):
        bar.update()
        bar.set_postfix(refresh=False, epoch=1)
        time.sleep(0.1)
"""


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.05)


def wait_for_line(capsys):
    """What was written to stderr by the time a line is there."""
    written = ""
    for _ in range(600):
        written += capsys.readouterr().err
        if "\n" in written:
            return written
        time.sleep(0.05)
    raise AssertionError(f"no line within half a minute, only {written!r}")


def test_a_pipe_gets_whole_lines_and_no_bar():
    done = subprocess.run(
        [sys.executable, "-c", LOOP], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines
    # The inner loop alone writes: it knows more than the stage around it.
    assert all(line.startswith("base: ") for line in lines)
    assert all(" of 9 steps, epoch 1, " in line for line in lines)


def test_a_terminal_gets_a_bar():
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            read = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        written += read
    os.close(controller)
    assert process.wait() == 0
    assert b"\r" in written
    assert b"9/9" in written
    assert b"of 9 steps" not in written
    assert b"train" not in written


def test_short_work_writes_nothing(capsys):
    with show_progress(3, label="train", unit="step") as bar:
        bar.update(3)
    with report_elapsed("mediate"):
        pass
    assert capsys.readouterr().err == ""


def test_what_is_disabled_writes_nothing(often, capsys):
    with show_progress(3, label="train", unit="step", enabled=False) as bar:
        bar.update()
        bar.set_postfix(refresh=True, loss="0.1")
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_work_without_a_count_says_how_long_it_takes(often, capsys):
    with report_elapsed("mediate"):
        assert wait_for_line(capsys).startswith("mediate: 0 s\n")


def test_many_short_parts_do_not_add_up_to_silence(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.5)
    with report_elapsed("train"):
        for number in range(40):
            with show_progress(4, label=f"model {number}", unit="step"):
                time.sleep(0.05)
    assert ": 0 of 4 steps, 0 s\n" in capsys.readouterr().err


def test_the_outer_block_goes_on_after_the_inner_one(often, capsys):
    with report_elapsed("train"):
        with show_progress(4, label="base", unit="step", initial=1):
            assert "base: 1 of 4 steps, " in wait_for_line(capsys)
        capsys.readouterr()
        assert wait_for_line(capsys).startswith("train: ")


def test_an_error_ends_the_lines():
    with pytest.raises(KeyError), report_elapsed("train"):
        raise KeyError
    assert progress._open == []


def test_the_engine_counts_its_parts(monkeypatch):
    seen = []

    class Recorder(progress._Silent):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

        def update(self, n=1):
            seen.append(n)

    monkeypatch.setattr(engine, "show_progress", lambda *given, **named: Recorder())
    with engine.Engine(workers=1) as one:
        assert list(one.map(divmod, [(7, 2), (9, 3)], label="test")) == [(3, 1), (3, 0)]
    assert seen == [1, 1, "closed"]


def test_a_closed_stderr_is_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with show_progress(1, label="train", unit="step") as bar:
        bar.update()
    assert sys.stderr.getvalue() == ""
