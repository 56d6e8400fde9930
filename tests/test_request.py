"""request: settings become a plan and a spec, and face sets cross to another process whole."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

from cdp.recognizer.fit import FaceSet
from cdp.training.sets import MaskedNegatives, SoftTargets
from pipelines.config import TrainingSettings
from pipelines.training.request import TrainingRequest, name_arrays, read_face_sets, train_requested

pytestmark = pytest.mark.torch

OTHER = {
    "input_px": 16,
    "embedding_dim": 16,
    "neck": "subdecisions",
    "head": "arcface",
    "head_options": {"margin_rad": 0.3},
    "degradation": "surveillance",
    "epochs": 3,
    "batch_size": 7,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "warmup_epochs": 0.5,
    "margin_warmup_epochs": 0.5,
    "gradient_clip": None,
    "ema_decay": 0.9,
    "auxiliary": {"coco": {"weight": 0.1}},
    "sampling": "identity",
    "images_per_identity": 2,
    "sampled_classes": 5,
}


@pytest.mark.parametrize("name", TrainingSettings.model_fields)
def test_every_setting_reaches_the_plan_or_the_spec(name: str) -> None:
    def make(**changed):
        settings = TrainingSettings(**changed)
        return settings.make_plan(seed=0), settings.make_spec("plain", 1.0)

    assert make(**{name: OTHER[name]}) != make()


def draw_sets() -> dict[str, FaceSet]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 12, 16, 16, 3)).astype(np.uint8)
    teacher = rng.normal(size=(3, 12, 8)).astype(np.float32)
    rows = np.arange(4)
    pseudo = FaceSet(
        images[1],
        np.arange(12) // 3,
        np.linspace(0.5, 1, 12).astype(np.float32),
        SoftTargets(rows, rows % 2, np.full(4, 0.5)),
        MaskedNegatives(rows, 3 - rows // 3),
        teacher[1],
    )
    return {
        "labelled": FaceSet(images[0], np.arange(12) // 4, teacher=teacher[0]),
        "pseudo": pseudo,
        "extra": FaceSet(images[2], teacher=teacher[2]),
    }


def test_face_sets_are_read_back(tmp_path: Path) -> None:
    sets = draw_sets()
    arrays = name_arrays(sets)
    assert {"labelled.images", "pseudo.soft.row", "extra.teacher"} <= set(arrays)
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in arrays}
    found = read_face_sets(mapped)
    assert list(found) == list(sets)
    for role, faces in sets.items():
        for field in fields(FaceSet):
            before, after = getattr(faces, field.name), getattr(found[role], field.name)
            assert type(before) is type(after) or isinstance(after, np.memmap)
            if isinstance(before, SoftTargets | MaskedNegatives):
                before, after = asdict(before), asdict(after)
            np.testing.assert_equal(after, before)


def test_a_request_trains_the_sets_of_its_roles() -> None:
    sets = draw_sets()
    settings = TrainingSettings(input_px=16, embedding_dim=16, epochs=1, batch_size=8)
    request = TrainingRequest(
        "r", "plain", 0.5, settings.model_dump(), 0, None, 1.0, 1.0, checkpoint=None
    )

    def train(**changed) -> np.ndarray:
        recognizer, _ = train_requested(request, {**sets, **changed}, "cpu")
        return recognizer.embed(sets["labelled"].images)

    whole = train()
    np.testing.assert_array_equal(train(), whole)
    for role in sets:
        images = np.ascontiguousarray(sets[role].images[::-1])
        assert not np.array_equal(train(**{role: replace(sets[role], images=images)}), whole)
