"""Sections of the report: sets compared, faces as the models see them, the map of embeddings."""

import base64
import re
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cdp.errors import DataError
from cdp.images.preprocessing import CANDIDATES, PRESETS, Preprocessing
from pipelines.pages.compared_sets import BINS, choose_edges, compare_sets, draw_side_by_side
from pipelines.pages.embedding_map import choose_rows, draw_map, place_rows
from pipelines.pages.model_inputs import SHOWN, choose_images, show_inputs


def make_samples(width, height, sharpness):
    count = len(width)
    splits = np.repeat(["labelled", "unlabelled", "evaluation"], count // 3)
    paths = [f"{each}.png" for each in range(count)]
    samples = pd.DataFrame({"sample_id": np.arange(count), "split": splits, "width": width,
                            "height": height, "path": paths})  # fmt: skip
    measured = pd.DataFrame({"sample_id": np.arange(count), "side_px": np.minimum(width, height),
                             "sharpness": sharpness})  # fmt: skip
    return samples, measured


def test_the_sets_stand_side_by_side_on_the_same_axes():
    random = np.random.default_rng(0)
    size = random.integers(30, 200, 90)
    found = compare_sets(*make_samples(size, 2 * size, random.uniform(10, 5000, 90)))
    for name in ("size", "sharpness"):
        for title in ("labelled: 30", "unlabelled: 30", "held out: 30"):
            assert title in found[name]
    assert found["shape"] == "Every image has 0.5 times the width of its height."


def test_bins_hold_every_value_and_grow_where_values_spread_widely():
    values = np.r_[np.linspace(10, 20, 998), 5, 1e6]
    edges, grows = choose_edges(values)
    assert not grows
    assert len(edges) == BINS + 1
    wide, grows = choose_edges(np.geomspace(1, 1e4, 100))
    assert grows
    np.testing.assert_allclose(np.diff(np.log(wide)), np.diff(np.log(wide))[0])
    assert "<svg" in draw_side_by_side({"one": values, "two": values[:3]}, "px")


def test_equal_images_and_features_need_no_figure():
    square = np.full(9, 48)
    samples, measured = make_samples(square, square, np.full(9, np.nan))
    found = compare_sets(samples, measured)
    assert found == {"size": "Every image has a side of 48 px.", "shape": "Every image is square."}
    assert compare_sets(samples, measured[:0]) == {}


@pytest.mark.parametrize("way", [*PRESETS.values(), *CANDIDATES])
def test_what_a_model_is_shown_is_undone_exactly(way):
    faces = np.random.default_rng(1).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    shown = way.prepare(np.ascontiguousarray(faces.transpose(0, 3, 1, 2), np.float32))
    np.testing.assert_array_equal(way.undo(shown), faces)


class Halving:
    """An embedder's `prepare` that halves faces and shows them in an order and range of its own."""

    preprocessing = Preprocessing(127.5, 127.5, "bgr")

    def prepare(self, images):
        small = images[:, ::2, ::2].transpose(0, 3, 1, 2).astype(np.float32)
        return self.preprocessing.prepare(small)


def read_strip(strip):
    return np.asarray(Image.open(BytesIO(base64.b64decode(strip.data))).convert("RGB"))


def test_faces_are_shown_as_the_models_see_them():
    red = np.zeros((3, 16, 16, 3), np.uint8)
    red[..., 0] = 200

    def fail():
        raise DataError("no such file")

    members = [("half", "half.onnx", Halving), ("gone", "gone.onnx", fail)]
    given, half, gone = show_inputs({"labelled": red}, lambda faces: faces, members)
    assert "16 x 16 px" in given.text
    assert "BGR in -1..1, 8 x 8 px" in half.text
    assert "from -1 to 0.569" in half.text
    assert gone.text == "gone.onnx: cannot be shown, no such file"
    assert not gone.strips
    assert read_strip(half.strips[0]).shape == (8, 24, 3)
    for row in (given, half):  # red stays red: the order of colours is undone
        assert np.abs(read_strip(row.strips[0]).mean((0, 1)) - [200, 0, 0]).max() < 8


def test_a_few_images_of_each_set_are_chosen_by_the_seed():
    samples, _ = make_samples(np.full(90, 9), np.full(90, 9), np.ones(90))
    found = choose_images(samples, 0)
    assert {title: len(paths) for title, paths in found.items()} == {
        "labelled": SHOWN, "unlabelled": SHOWN, "held out": SHOWN
    }  # fmt: skip
    assert found == choose_images(samples, 0) != choose_images(samples, 1)


def test_the_map_of_many_images_shows_whole_clusters_and_a_share_of_the_others():
    label = np.r_[np.repeat(np.arange(100), 10), np.full(1000, -1)]
    rows = choose_rows(label, 0, most=205)
    assert 190 < len(rows) <= 205
    shown = label[rows]
    size = np.bincount(shown[shown >= 0])
    assert set(size) == {0, 10}
    assert (shown == -1).sum() == 102
    np.testing.assert_array_equal(rows, choose_rows(label, 0, most=205))
    assert len(choose_rows(label, 0, most=5000)) == len(label)
    assert len(choose_rows(np.zeros(50, np.int64), 0, most=20)) == 20  # one that is too large
    assert len(choose_rows(np.full(50, -1), 0, most=20)) == 20


def test_the_map_keeps_neighbours_and_is_the_same_every_time():
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(4), 12)
    vectors = random.normal(size=(4, 32))[label] + 0.3 * random.normal(size=(48, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    places = place_rows(vectors, 0)
    np.testing.assert_array_equal(places, place_rows(vectors, 0))
    distance = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(48)
    assert (label[distance.argmin(1)] == label).all()
    assert place_rows(vectors[:9], 0) is None
    label[::12] = -1
    drawn = str(draw_map(places, label))
    assert sorted(map(int, re.findall(r'data-point="(\d+)"', drawn))) == list(range(48))
    assert len(re.findall(r'class="cluster"', drawn)) == 4
    assert len(re.findall(r'class="alone"', drawn)) == 1
    x, y = (np.array(re.findall(rf'{c}="([\d.]+)"', drawn), float) for c in ("cx", "cy"))
    assert x.min() >= 0
    assert x.max() <= 1000
    assert y.max() <= 620
