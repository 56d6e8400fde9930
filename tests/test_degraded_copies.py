"""Sharp labelled pictures and a poor pile: a run trains on degraded copies of the labelled ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_CONFIG, digest_run
from known_clusters import KNOWN_K, LABELLED, write_known_config
from PIL import Image
from test_one_chain import read_labelled, read_labels, read_scores, read_views

from cdp import ConsensusClusterer
from cdp.errors import CdpWarning
from cdp.images.degradation import Degradation, degrade_pixels
from cdp.mediator.self_training import DEGRADED, SELF_TRAINED
from cdp.metrics.clustering import score_pairwise
from pipelines.copies import COPY_STEP, count_copies, find_originals
from pipelines.results import open_run
from pipelines.run import main

pytestmark = [pytest.mark.nmslib, pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
POOR = Degradation(low_res_rate=1.0, low_res_px=(9, 14), noise_rate=0.5, noise_sigma=(0.01, 0.03))
PHOTOS = (LABELLED[1], pytest.param(1, marks=pytest.mark.long))


def degrade_folder(folder):
    """Every picture below the folder as a poor camera takes it."""
    for seed, path in enumerate(sorted(folder.glob("*/*.png"))):
        face = np.array(Image.open(path))[None]
        poor = degrade_pixels(face, np.array([seed]), POOR, face.shape[1])
        Image.fromarray(poor[0]).save(path)


@pytest.fixture(scope="module", params=PHOTOS)
def poor(request, tmp_path_factory):
    """A run of so many sharp photos a labelled person and a poor pile, up to propagate."""
    place = tmp_path_factory.mktemp("poor")
    config = write_known_config(place, TINY_CONFIG)
    for photo in (place / "data" / "labelled").glob("*/*.png"):
        if int(photo.stem) >= request.param:
            photo.unlink()
    degrade_folder(place / "data" / "unlabelled")
    options = ["--config", str(config), "--data-root", str(place / "data"), "--workers", "1"]
    options += ["--runs-dir", str(place / "runs"), "--until", "propagate"]
    assert main(options) == 0
    return options, place / "runs" / "known", request.param


def read_copies(run):
    """What `fit` takes of the copies."""
    views, ids = read_views(run, "copies")
    originals = read_views(run, "labelled")[1].to_numpy()
    return {
        "degraded_views": views,
        "degraded_of": np.searchsorted(originals, find_originals(ids.to_numpy())),
    }


def test_copies_are_as_poor_as_the_pile_and_stand_in_place_of_the_photos(poor):
    _, run, photos = poor
    copies = count_copies(np.repeat(np.arange(LABELLED[0]), photos))
    assert copies == {6: 1, 1: 6}[photos]
    embed = open_run(run).manifest("embed")["facts"]
    assert embed["copies"] == LABELLED[0] * photos * copies
    ids = read_views(run, "copies")[1].to_numpy()
    assert sorted(np.unique(ids // COPY_STEP)) == list(range(1, copies + 1))
    shown = pd.read_parquet(run / "embed/appearance.parquet").set_index("measure")
    assert shown["shift"][["detail_1", "detail_2"]].max() > 1
    searched = pd.read_parquet(run / "knn/neighbours/labelled/base.parquet").sample_id
    assert set(searched) <= set(ids)
    assert len(searched) > 0.9 * len(ids)


def test_the_run_says_that_it_trained_on_copies(poor):
    mediate = open_run(poor[1]).manifest("mediate")["facts"]
    assert mediate["method"] == "extended"
    if mediate["self_trained"]:
        assert "on degraded copies of the labelled images" in mediate["warnings"][0]
        assert mediate["doubts"] == [SELF_TRAINED]
    else:
        assert DEGRADED in mediate["doubts"]
    assert open_run(poor[1]).manifest("propagate")["facts"]["estimated_f"] is None


def test_estimator_and_run_give_the_same_labels(poor, recwarn):
    _, run, _ = poor
    views, ids = read_views(run, "unlabelled")
    clusterer = ConsensusClusterer(k=KNOWN_K, random_state=TINY_CONFIG["seed"])
    clusterer.fit(views, **read_labelled(run), **read_copies(run))
    np.testing.assert_array_equal(clusterer.labels_, read_labels(run, ids))
    np.testing.assert_array_equal(clusterer.pair_scores_, read_scores(run))
    said = open_run(run).manifest("mediate")["facts"].get("warnings", [])
    assert [str(each.message) for each in recwarn if each.category is CdpWarning] == said


def test_people_of_a_poor_pile_are_found(poor):
    samples = pd.read_parquet(poor[1] / "ingest/samples.parquet").set_index("sample_id")
    labels = pd.read_parquet(poor[1] / "propagate/labels.parquet")
    shown = samples.path[labels.sample_id].str.split("/").str[1].to_numpy()
    certain = np.char.startswith(shown.astype(str), "u")
    truth = np.unique(shown[certain], return_inverse=True)[1]
    f = score_pairwise(truth, labels.pseudo_label.to_numpy()[certain])[2]
    assert f > 0.9


def test_labels_like_the_pile_need_no_copies(known, known_run, tmp_path):
    """Then the setting changes nothing but the measures of appearance."""
    runs = tmp_path / "runs"
    options = [*known, "--runs-dir", str(runs), "--until", "propagate"]
    assert main([*options, "embed.degrade_labelled=never"]) == 0
    compared, plain = digest_run(known_run), digest_run(runs / "known")
    assert "copies" not in open_run(known_run).manifest("embed")["facts"]
    assert compared.pop("embed/appearance.parquet") != plain.pop("embed/appearance.parquet")
    assert {name: compared[name] for name in plain} == plain
