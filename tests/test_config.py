"""What a user relies on when writing a config."""

from pathlib import Path

import pytest
import yaml

from cdp.errors import ConfigError
from pipelines.choices import check_choices
from pipelines.config import read_config

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "data": "data.yaml",
                "committee": {
                    "base": {"name": "base", "backbone": "residual"},
                    "members": [{"name": "other", "onnx": "other.onnx"}],
                },
            }
        )
    )
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert read_config(path, []).name == path.stem


def test_run_is_named_after_its_file(config_path):
    assert read_config(config_path, []).name == "mine"
    assert read_config(config_path, ["name=other"]).name == "other"


def test_overrides_reach_nested_fields_with_their_yaml_type(config_path):
    config = read_config(
        config_path,
        ["propagate.max_size=300", "train.head_options.margin_rad=0.3", "evaluate.far=[0.5]"],
    )
    assert config.propagate.max_size == 300
    assert config.train.head_options == {"margin_rad": 0.3}
    assert config.evaluate.far == (0.5,)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("propagate.maxsize=3", "propagate.maxsize: no such setting; .*known here: .*max_size"),
        ("propagate.max_size=many", "propagate.max_size: .*valid integer, got 'many'"),
        ("propagate.max_size='3'", "propagate.max_size: .*valid integer, got '3'"),
        ("knn.k=0", "knn.k: .*greater than or equal to 1, got 0"),
        ("knn.backend=annoy", "knn.backend: .*'nmslib'.*got 'annoy'"),
        ("propagate.threshold=1.5", "threshold must be 'auto' or lie in"),
        ("seed=-1", "seed: "),
        ("committee.base={name: base}", "exactly one of backbone, onnx, checkpoint"),
        ("committee.base={name: other, backbone: plain}", "two members share a name"),
        ("name=../escape", "name: "),
        (
            "retrain.teacher=nobody",
            r"member of the committee expected \(base, other\), got 'nobody'",
        ),
        ("propagate", "expected section.field=value"),
        ("seed.deeper=1", "seed: .*valid integer"),
    ],
)
def test_a_wrong_setting_is_named(config_path, override, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config(config_path, [override])


def test_a_missing_file_names_its_neighbours(config_path):
    with pytest.raises(ConfigError, match=r"no such file: .*typo\.yaml; there are mine\.yaml"):
        read_config(config_path.with_name("typo.yaml"), [])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object:os.system {}\n", ""])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_config(path, [])


@pytest.mark.torch
def test_more_votes_than_members_are_refused_before_a_run(config_path):
    config = read_config(config_path, ["mediate.vote.min_votes=3"])
    with pytest.raises(ConfigError, match=r"mediate\.vote\.min_votes: expected 0 to 1, .* got 3"):
        check_choices(config, {"mediate"})
    check_choices(config, {"propagate"})
    check_choices(read_config(config_path, ["mediate.vote.min_votes=1"]), {"mediate"})
    alone = read_config(config_path, ["mediate.vote.min_votes=3", "committee.members=[]"])
    check_choices(alone, {"mediate"})
