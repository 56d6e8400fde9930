"""The estimator and the pipeline agree on every default."""

import inspect

import pytest

from cdp import ConsensusClusterer
from cdp.mediator.pair_voter import PairVoter
from pipelines.config import (
    KnnSettings,
    MediateSettings,
    PropagateSettings,
    RunConfig,
    VoteSettings,
)

pytestmark = pytest.mark.torch

SAME = {
    "k": (KnnSettings, "k"),
    "backend": (KnnSettings, "backend"),
    "joint": (KnnSettings, "joint"),
    "label_check": (KnnSettings, "label_check"),
    "near_equal": (KnnSettings, "near_equal"),
    "variant": (MediateSettings, "method"),
    "candidates": (MediateSettings, "candidates"),
    "self_training": (MediateSettings, "self_training"),
    "second_stage": (MediateSettings, "second_stage"),
    "min_similarity": (VoteSettings, "min_similarity"),
    "min_votes": (VoteSettings, "min_votes"),
    "split": (PropagateSettings, "split"),
    "threshold": (PropagateSettings, "threshold"),
    "max_size": (PropagateSettings, "max_size"),
    "step": (PropagateSettings, "step"),
    "random_state": (RunConfig, "seed"),
}
"""Parameter of the estimator -> section and setting of a run."""
OWN = {"backend_settings": None, "mediator_settings": None, "threads": None}
"""Parameters without a setting of their own; `knn.options` is empty as None is."""


def list_defaults(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }


def test_every_parameter_is_compared():
    assert set(list_defaults(ConsensusClusterer)) == SAME.keys() | OWN.keys()


@pytest.mark.parametrize("parameter", SAME)
def test_defaults_are_the_same(parameter):
    section, setting = SAME[parameter]
    assert list_defaults(ConsensusClusterer)[parameter] == section.model_fields[setting].default


def test_what_has_no_setting_is_off():
    defaults = list_defaults(ConsensusClusterer)
    assert {name: defaults[name] for name in OWN} == OWN
    assert KnnSettings().options == {}


def test_the_voter_has_them_too():
    settings = VoteSettings()
    voter = PairVoter()
    assert (voter.min_similarity, voter.min_votes) == (settings.min_similarity, settings.min_votes)
