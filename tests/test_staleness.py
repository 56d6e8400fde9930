"""Change any setting, and exactly what depends on it is stale."""

import json
import os
import shutil

import pytest
import yaml
from pydantic import BaseModel

from pipelines.config import CommitteeSettings, MemberSettings, RunConfig
from pipelines.data.dataset import Dataset
from pipelines.engine import Engine
from pipelines.files import FileDigests
from pipelines.run import main
from pipelines.stage import Runtime, collect_ingredients, explain_change
from pipelines.stages import STAGES
from pipelines.store import Store
from pipelines.yaml_files import validate_settings

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ORDER = ("ingest", "train", "embed", "knn", "mediate", "propagate", "retrain", "evaluate",
         "thumbnails", "report")  # fmt: skip
CLUSTERED = {"propagate", "retrain", "evaluate", "report"}
STALE = {
    "seed": set(ORDER),
    "ingest": set(ORDER),
    "committee": set(ORDER) - {"ingest", "thumbnails"},
    "train": set(ORDER) - {"ingest", "thumbnails"},
    "embed": {"embed", "knn", "mediate"} | CLUSTERED,
    "knn": {"knn", "mediate"} | CLUSTERED,
    "mediate": {"mediate"} | CLUSTERED,
    "propagate": CLUSTERED,
    "retrain": {"retrain", "evaluate", "report"},
    "evaluate": {"evaluate", "report"},
}
"""Section of the config -> the stages whose results it is part of, written down by hand."""

TRAINING = {
    "input_px": 20, "embedding_dim": 24, "head": "cosface", "head_options": {"margin": 0.1},
    "degradation": "lowres", "epochs": 3, "batch_size": 18, "optimizer": "adamw",
    "learning_rate": 0.07, "weight_decay": 0.001, "warmup_epochs": 0.5,
    "margin_warmup_epochs": 0.5, "gradient_clip": None, "ema_decay": 0.9,
    "auxiliary": {"center": {"weight": 0.003}}, "sampling": "identity", "neck": "twofold",
    "images_per_identity": 2, "sampled_classes": 8,
}  # fmt: skip
OTHER = {
    "seed": 1000,
    "ingest": {"min_px": 9, "max_pixels": 1000, "min_quality": 0.1, "pose": True},
    "train": {**TRAINING, "mediator_share": 0.4},
    "embed": {"reduce_px": None, "flip": True, "degrade_labelled": "never"},
    "knn": {"k": 6, "backend": "exact", "options": {"M": 12}, "recall_sample": 10, "joint": False,
            "near_equal": False, "label_check": False},
    "mediate": {
        "method": "paper", "candidates": "all", "second_stage": False, "self_training": False,
        "dropout": 0.1,
        "vote": {"min_similarity": 0.6, "min_votes": 0},
    },
    "propagate": {
        "threshold": 0.9, "split": "raise_threshold", "max_size": 7, "step": 0.05,
        "target_precision": 0.9, "tracks": False,
        "soft_labels": {"depth": 2, "decay": 0.5, "min_weight": 0.1},
    },
    "retrain": {
        **TRAINING, "backbone": "separable", "width": 0.75, "pretrained": "base",
        "min_cluster_size": 3,
        "leftovers": "alone", "mask_negatives_above": 0.1,
        "weigh_by_confidence": True, "targets": "soft", "pseudo_share": 0.5,
        "same_person": "merge", "merge_far": 0.02, "teacher": "base", "teacher_px": 12,
        "distil_weight": 1.0, "class_weight": 0.5, "student": {"epochs": 4}, "blends": 10,
        "adapt": "moments",
    },
    "evaluate": {
        "probe_px": [12], "degradations": ["none"], "gallery": "probe", "folds": 3,
        "pairs_per_fold": 10, "far": [0.2], "pair_images": 3, "ranks": [1], "enrolled": 0.4,
        "fpir": [0.2], "fpir_rank": 5, "draws": 20,
        "set_sizes": [3], "set_weights": "quality", "rejected": [0.25], "supervised": False,
        "embedders": False,
    },
}  # fmt: skip
"""Every field of every config model -> another value for it."""

APART = {"name", "rounds", "data", "committee"}
"""Which runs there are, and on what: tests of their own below."""

MEMBER = {"name": "third", "backbone": "dense", "width": 0.25}
"""Another value for every field of a member trained here; its other origins are files."""


FREE = ("head_options", "auxiliary", "options", "student")
"""Settings that are mappings of any keys: each is one value."""


def flatten(values, path=""):
    """Dotted path -> value."""
    for key, value in values.items():
        place = f"{path}{key}"
        if isinstance(value, dict) and key not in (
            "head_options",
            "auxiliary",
            "options",
            "student",
        ):
            yield from flatten(value, f"{place}.")
        else:
            yield place, value


def list_fields(model, path=""):
    """Dotted paths of every leaf of a config model."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from list_fields(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}"


FIELDS = dict(flatten(OTHER))


@pytest.fixture
def plan(finished_run, tiny, capsys):
    """Settings laid over the finished run -> what would happen to each stage."""

    def ask(*arguments, config=tiny, runs=finished_run.parent):
        capsys.readouterr()
        code = main(["--config", str(config), "--runs-dir", str(runs), "--dry-run", *arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return {line.split()[0]: line.split()[1] for line in printed.out.splitlines()}

    return ask


def find_stale(steps):
    return {stage for stage, action in steps.items() if action != "skip"}


def test_no_setting_is_missing_here():
    known = {field for field in list_fields(RunConfig) if field.partition(".")[0] not in APART}
    assert set(FIELDS) == known
    assert set(RunConfig.model_fields) == set(OTHER) | APART
    origins = {"onnx", "checkpoint", "recognizer", "features", "restore"}
    origins |= {  # what an ONNX model is shown
        "preprocessing", "preset", "mean", "scale", "channels", "layout", "output", "input_px",
    }  # fmt: skip
    assert set(MemberSettings.model_fields) == set(MEMBER) | origins
    assert set(CommitteeSettings.model_fields) == {"base", "members"}
    # `detect` takes part where the manifest says `align`; its settings are in the manifest.
    assert tuple(stage.name for stage in STAGES) == ("detect", *ORDER)
    assert set(STALE) == (set(OTHER) | {"committee"})


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_setting_makes_what_depends_on_it_stale(plan, field):
    steps = plan(f"{field}={json.dumps(FIELDS[field])}")
    assert tuple(steps) == ORDER
    assert find_stale(steps) == STALE[field.partition(".")[0]]


@pytest.mark.parametrize("field", MEMBER)
@pytest.mark.parametrize("role", ["base", "members"])
def test_a_changed_member_makes_what_depends_on_it_stale(plan, tiny, tmp_path, role, field):
    config = yaml.safe_load(tiny.read_text())
    member = config["committee"]["base"] if role == "base" else config["committee"]["members"][0]
    member[field] = MEMBER[field]
    steps = plan(config=write_config(tmp_path, tiny, config))
    assert find_stale(steps) == STALE["committee"]


def write_config(place, tiny, config):
    (place / "configs").mkdir()
    shutil.copy(tiny.parent.parent / "data.yaml", place)
    path = place / "configs" / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_content_of_a_model_file_counts_and_not_its_time(tmp_path):
    root = tmp_path / "root"
    (root / "staff").mkdir(parents=True)
    (root / "pile").mkdir()
    data = {
        "name": "mine",
        "kind": "images",
        "size_px": 48,
        "labelled": {"root": "staff"},
        "unlabelled": {"root": "pile"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    config = {
        "name": "mine",
        "data": "mine.yaml",
        "committee": {"base": {"name": "base", "checkpoint": "base.safetensors"}},
    }
    embed = next(stage for stage in STAGES if stage.name == "embed")

    def ask():
        runtime = Runtime(
            validate_settings(RunConfig, config, source="test"),
            Dataset.open(tmp_path / "mine.yaml", root),
            Store(tmp_path / "runs"),
            Engine(),
            FileDigests(tmp_path / "files.json"),
        )
        return collect_ingredients(embed, runtime, {})

    (root / "base.safetensors").write_bytes(b"one")
    first = ask()
    os.utime(root / "base.safetensors", (1, 1))
    assert ask() == first
    (root / "base.safetensors").write_bytes(b"two")
    assert explain_change(first, ask()) == "a model file changed"


@pytest.mark.parametrize("changed", ORDER)
def test_a_new_version_of_a_stage_makes_it_stale_and_what_reads_it(plan, monkeypatch, changed):
    from dataclasses import replace

    stages = tuple(
        replace(stage, version=stage.version + 1) if stage.name == changed else stage
        for stage in STAGES
    )
    monkeypatch.setattr("pipelines.run.STAGES", stages)
    expected = {"thumbnails": {"thumbnails", "report"}, "report": {"report"}}
    assert find_stale(plan()) == expected.get(changed, STALE.get(changed, set()))


def test_another_data_set_makes_everything_stale(plan, tiny, tmp_path):
    config = yaml.safe_load(tiny.read_text())
    path = write_config(tmp_path, tiny, config)
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    data["synthetic"]["images_max"] += 1
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    assert find_stale(plan(config=path)) == set(ORDER)


@pytest.mark.parametrize(
    "arguments",
    [("--workers", "7"), ("--device", "cuda"), ("--verify",), ("--scheduler", "tcp://nobody:1"),
     ("--memory-limit", "64GiB")],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_where_it_runs_makes_nothing_stale(plan, arguments):
    assert find_stale(plan(*arguments)) == set()


def test_a_moved_config_and_data_root_make_nothing_stale(plan, tiny, tmp_path):
    path = write_config(tmp_path, tiny, yaml.safe_load(tiny.read_text()))
    assert find_stale(plan("--data-root", str(tmp_path), config=path)) == set()


def test_a_run_of_another_name_takes_over_what_is_the_same(plan):
    planned = plan("name=another")
    assert planned.pop("report") == "run"  # its advice names the run
    assert set(planned.values()) == {"link"}


def test_moving_all_runs_makes_nothing_stale(own_run, plan):
    moved = own_run.parent.with_name("moved")
    own_run.parent.rename(moved)
    assert find_stale(plan(runs=moved)) == set()


@pytest.mark.parametrize("field", ["propagate.max_size", "evaluate.draws"])
def test_what_was_planned_is_what_runs(own_run, tiny, plan, field):
    """The plan is kept: stale stages are published anew, the others stay as they are."""
    runs = own_run.parent
    before = {stage: (own_run / stage).resolve() for stage in ORDER}
    override = f"{field}={json.dumps(FIELDS[field])}"
    stale = find_stale(plan(override, runs=runs))
    arguments = ["--config", str(tiny), "--runs-dir", str(runs), "--workers", "1", override]
    assert main(arguments) == 0
    assert {stage for stage in ORDER if (own_run / stage).resolve() != before[stage]} == stale
    assert find_stale(plan(override, runs=runs)) == set()
    assert find_stale(plan(runs=runs)) == stale
