"""What runs, what is skipped, and why: a toy pipeline of three stages."""

from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pytest

from cdp.errors import DataError, StageError
from pipelines.config import PropagateSettings, RunConfig
from pipelines.data.dataset import Dataset
from pipelines.engine import Engine
from pipelines.files import FileDigests
from pipelines.stage import Runtime, Stage, Work, execute_step, plan_run
from pipelines.store import Store
from pipelines.yaml_files import validate_settings

pytestmark = pytest.mark.torch

NUMBERS = pa.schema([("value", pa.int64())])


def make_stages(calls):
    def first(work):
        calls.append("first")
        work.write("numbers", {"value": [work.config.knn.k]})
        return {"rows": 1}

    def second(work):
        calls.append("second")
        value = work.read("first.numbers")["value"][0].as_py()
        work.write("doubled", {"value": [2 * value]})
        return {}

    def third(work):
        calls.append("third")
        value = work.read("second.doubled")["value"][0].as_py()
        work.write("final", {"value": [value + work.config.propagate.max_size]})
        return {}

    return (
        Stage("first", 1, (), {"numbers": NUMBERS}, ("knn",), first),
        Stage("second", 1, ("first.numbers",), {"doubled": NUMBERS}, (), second),
        Stage("third", 1, ("second.doubled",), {"final": NUMBERS}, ("propagate",), third),
    )


@pytest.fixture
def world(tmp_path):
    calls = []
    stages = make_stages(calls)

    def run(name="mine", stages=stages, k=20, max_size=600, seed=0, **options):
        config = validate_settings(
            RunConfig,
            {
                "name": name,
                "seed": seed,
                "data": "x",
                "committee": {"base": {"name": "base", "backbone": "plain"}},
                "knn": {"k": k},
                "propagate": {"max_size": max_size},
            },
            source="test",
        )
        dataset = Dataset.open(Path("data_manifests/synthetic.yaml"), None)
        store = Store(tmp_path / "runs")
        digests = FileDigests(tmp_path / "files.json")
        runtime = Runtime(config, dataset, store, Engine(), digests)
        steps = plan_run(stages, runtime, **options)
        calls.clear()
        for step in steps:
            if step.action in ("run", "link"):
                execute_step(step, runtime, force=options.get("force", False), environment={})
        final = store.open_run(name, "third")
        return {
            "steps": {step.stage.name: (step.action, step.reason) for step in steps},
            "calls": list(calls),
            "value": final and final.read("final")["value"][0].as_py(),
        }

    run.stages = stages
    run.root = tmp_path / "runs"
    run.calls = calls
    return run


def test_everything_runs_once_then_nothing(world):
    assert world()["calls"] == ["first", "second", "third"]
    again = world()
    assert again["calls"] == []
    assert set(again["steps"].values()) == {("skip", "up to date")}
    assert again["value"] == 640


def test_only_what_depends_on_a_setting_runs_again(world):
    world()
    result = world(max_size=10)
    assert result["calls"] == ["third"]
    assert result["steps"]["third"] == ("run", "propagate.max_size 600 -> 10")
    assert result["value"] == 50


def test_a_change_at_the_top_is_named_all_the_way_down(world):
    world()
    result = world(k=7)
    assert result["calls"] == ["first", "second", "third"]
    assert result["steps"]["first"] == ("run", "knn.k 20 -> 7")
    assert result["steps"]["second"] == ("run", "first changed")


def test_two_runs_share_what_they_have_in_common(world):
    world("mine")
    result = world("theirs", max_size=10)
    assert result["calls"] == ["third"]
    assert result["steps"]["first"] == ("link", "another run has published the same")


def test_going_back_to_an_earlier_setting_costs_nothing(world):
    world()
    world(max_size=10)
    result = world()
    assert result["calls"] == []
    assert result["value"] == 640


def test_one_stage_runs_from_what_is_published_upstream(world):
    world()
    result = world(only="third")
    assert result["calls"] == ["third"]
    assert result["steps"] == {"third": ("run", "asked for")}
    # Upstream is used as published, current or not.
    stale = world(only="third", k=7)
    assert stale["calls"] == ["third"]
    assert stale["value"] == 640


def test_one_stage_without_its_input_says_what_to_run(world):
    with pytest.raises(StageError, match="reads second, which run 'mine' has not published"):
        world(only="third")


def test_until_stops_after_a_stage(world):
    assert world(until="second")["calls"] == ["first", "second"]


def test_force_runs_what_is_up_to_date(world):
    world()
    assert world(force=True)["calls"] == ["first", "second", "third"]


def test_a_new_version_or_schema_runs_again(world):
    world()
    first, second, third = world.stages
    result = world(stages=(first, replace(second, version=2), third))
    assert result["calls"] == ["second", "third"]
    assert result["steps"]["second"] == ("run", "its code or tables changed")


def test_a_damaged_stage_runs_again_and_its_followers_do_not(world):
    world()
    (world.root / "mine" / "second" / "doubled.parquet").write_bytes(b"")
    result = world()
    assert result["calls"] == ["second"]
    assert "doubled.parquet has 0 bytes" in result["steps"]["second"][1]


def test_damage_of_the_same_length_is_found_by_verify(world):
    world()
    path = world.root / "mine" / "first" / "numbers.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 255
    path.write_bytes(data)
    assert world()["calls"] == []
    assert world(verify=True)["calls"] == ["first"]
    assert world(verify=True)["calls"] == []


def test_a_failing_stage_publishes_nothing_and_keeps_the_old(world):
    world()

    def fail(work):
        work.write("final", {"value": [0]})
        raise DataError("no")

    first, second, third = world.stages
    broken = replace(third, run=fail, version=2)
    with pytest.raises(DataError):
        world(stages=(first, second, broken))
    assert world()["value"] == 640


def test_a_stage_sees_only_what_it_declares(world):
    first, second, third = world.stages
    for run, expected in [
        (lambda work: work.read("first.numbers"), "does not declare that it reads first.numbers"),
        (lambda work: work.write("other", {}), "does not declare that it writes other"),
    ]:
        with pytest.raises(StageError, match=expected):
            world(stages=(first, second, replace(third, run=run)))
    expected = "does not declare that it reads config.knn; it declares: propagate"
    with pytest.raises(StageError, match=expected):
        world(stages=(first, second, replace(third, run=lambda work: work.config.knn)))


def test_the_type_checker_sees_the_settings_a_stage_reads():
    # What mypy then says of `work.config.propagate.treshold`:
    # "PropagateSettings" has no attribute "treshold"; maybe "threshold"?  [attr-defined]
    assert get_type_hints(Work)["config"] is RunConfig
    assert get_type_hints(RunConfig)["propagate"] is PropagateSettings


def test_finished_parts_outlive_a_crash(world):
    first, second, third = world.stages
    made = []

    def run(work):
        for number in range(3):
            path = work.path("final", f"part-{number}")
            if not path.exists():
                made.append(number)
                if len(made) == 2:
                    raise OSError("no space left")
                work.write("final", {"value": [number]}, f"part-{number}")
        work.write("final", {"value": [7]})
        return {}

    crashing = (first, second, replace(third, run=run))
    with pytest.raises(StageError, match="no space left"):
        world(stages=crashing)
    assert world(stages=crashing)["value"] == 7
    assert made == [0, 1, 1, 2]
