"""A run over archives that is killed in `ingest` ends as if it had been left in peace."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_layouts import encode, make_record, make_tar, write_records

import cdp
from pipelines.engine import Engine
from pipelines.run import main
from pipelines.stages import ingest

pytestmark = pytest.mark.torch
PART = 5
KILLED_BEFORE = "inspected-00002.parquet"
KILLED = f"""
import os, signal, sys
from pipelines.engine import Engine
from pipelines.run import main
from pipelines.stages import ingest

replace = os.replace

def replace_or_die(source, target, **options):
    if os.path.basename(target) == {KILLED_BEFORE!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target, **options)

os.replace = replace_or_die
ingest.PART_SIZE = {PART}
Engine.map = lambda engine, function, parts, *, label: (function(*part) for part in parts)
main(sys.argv[1:])
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A `.rec` without index that is cut, and two shards: one cut, one with names that lie."""
    pieces = [make_record(encode(value), [value // 2]) for value in range(1, 9)]
    write_records(tmp_path / "train.rec", [*pieces, pieces[0][:-30]], index=False)
    (tmp_path / "shards").mkdir()
    images = [(f"{value}.png", encode(value)) for value in range(20, 32)]
    whole = make_tar([*images, ("bad.png", b"none"), ("../x.png", encode(1))], links=("y.png",))
    (tmp_path / "shards/0.tar").write_bytes(whole)
    (tmp_path / "shards/1.tar").write_bytes(make_tar(images[:4])[: 3 * 1024 + 700])
    manifest = {"name": "archives", "kind": "images", "size_px": 20,
                "labelled": {"root": "train.rec"},
                "unlabelled": {"root": "shards", "layout": "pile"}}  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    config = {"data": "data.yaml", "committee": {"base": {"name": "base", "backbone": "plain"}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def list_arguments(place: Path, runs: str) -> list[str]:
    return ["--config", str(place / "tiny.yaml"), "--data-root", str(place), "--workers", "1",
            "--runs-dir", str(place / runs), "--until", "ingest"]  # fmt: skip


def test_killed_while_it_reads_archives_it_goes_on_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected: list[int] = []
    inspect = ingest.inspect_part

    def count(dataset, entries, settings):
        inspected.append(len(entries))
        return inspect(dataset, entries, settings)

    monkeypatch.setattr(ingest, "PART_SIZE", PART)
    monkeypatch.setattr(ingest, "inspect_part", count)
    monkeypatch.setattr(
        Engine, "map", lambda engine, function, parts, *, label: (function(*p) for p in parts)
    )
    assert main(list_arguments(place, "peace")) == 0
    every = len(inspected)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *list_arguments(place, "killed")],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    inspected.clear()
    assert main(list_arguments(place, "killed")) == 0
    assert len(inspected) == every - 2
    peace, again = (cdp.open_run(place / runs / "tiny") for runs in ("peace", "killed"))
    for table in ("samples", "rejected", "qualities", "truth"):
        assert again.read("ingest", table).equals(peace.read("ingest", table)), table
    assert peace.read("ingest", "samples").path.tolist()[7:9] == [
        "train.rec/00000007", "shards/0.tar/20.png",
    ]  # fmt: skip
    reasons = peace.read("ingest", "rejected").set_index("path").reason
    assert reasons["shards/0.tar/../x.png"] == "a name that leads out of the shard"
    assert reasons["shards/0.tar/bad.png"].startswith("not an image")
    assert len(reasons) == 5
    left = sorted(path.name for path in (place / "killed").rglob("*inspected*"))
    assert left == []
