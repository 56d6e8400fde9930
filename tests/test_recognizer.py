"""recognizer: sets with and without labels, distillation, options, and saving to a file."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cdp
from cdp.errors import ConfigError, DataError
from cdp.images.degradation import get_degradation
from cdp.models import build_backbone
from cdp.models.auxiliary import AUXILIARIES
from cdp.models.heads import HEADS
from cdp.recognizer.fit import FaceSet, RecognizerSpec, select_classes, train_recognizer
from cdp.recognizer.recognizer import Recognizer
from cdp.training.distillation import fit_target
from cdp.training.plan import TrainingPlan
from cdp.training.sets import MaskedNegatives, SoftTargets, TrainingSet

SMALL = RecognizerSpec("plain", input_px=16, embedding_dim=16, width=0.5)


pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]


def draw_people(people: int, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(40, 215, (people, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    label = np.repeat(np.arange(people), each)
    noisy = patterns[label] + rng.normal(0, 60, (len(label), 16, 16, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), label


PLAN = TrainingPlan(epochs=3, batch_size=16, flip=False)


def train(*sets, plan: TrainingPlan = PLAN, spec: RecognizerSpec = SMALL, **options):
    return train_recognizer(*sets, plan=plan, spec=spec, device="cpu", progress=False, **options)


@given(st.lists(st.integers(-1, 6), max_size=40), st.integers(1, 4))
def test_classes_are_selected_by_size(labels: list[int], min_size: int) -> None:
    label = np.array(labels, dtype=np.int64)
    rows, renumbered = select_classes(label, min_size=min_size)
    expected = [i for i, v in enumerate(labels) if v != -1 and labels.count(v) >= min_size]
    assert rows.tolist() == expected
    kept = sorted({labels[i] for i in expected})
    assert renumbered.tolist() == [kept.index(labels[i]) for i in expected]


def test_two_heads_train_and_unlabelled_images_are_left_out() -> None:
    images, label = draw_people(5, 6, seed=0)
    others, pseudo = draw_people(8, 6, seed=1)
    pseudo = pseudo * 10
    pseudo[::6] = -1  # no label
    pseudo[1] = 777  # a cluster of one
    known = FaceSet(images, label)
    recognizer, history = train(known, FaceSet(others, pseudo, min_size=2), meta={"k": 20})
    assert len(history) == 3
    assert recognizer.meta == {"k": 20}
    kept = np.flatnonzero((pseudo != -1) & (pseudo != 777))
    again, _ = train(known, FaceSet(others[kept], pseudo[kept]))
    np.testing.assert_array_equal(recognizer.embed(others), again.embed(others))


def test_equals_a_training_by_hand() -> None:
    from cdp.models.heads import build_head
    from cdp.training.loop import train_model

    images, label = draw_people(4, 5, seed=0)
    others, pseudo = draw_people(6, 5, seed=1)
    confidence = np.linspace(0.2, 1, len(pseudo))
    recognizer, history = train(FaceSet(images, label), FaceSet(others, pseudo, confidence))
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
    training_sets = [
        TrainingSet(build_head("adaface", 16, 4, seed=0), images, label),
        TrainingSet(build_head("adaface", 16, 6, seed=1), others, pseudo, confidence),
    ]
    expected = train_model(backbone, training_sets, PLAN, device="cpu", progress=False)
    assert [h["loss"] for h in history] == [h["loss"] for h in expected]
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, recognizer.backbone.state_dict()[key])


def test_one_set_alone_is_enough() -> None:
    images, label = draw_people(4, 5, seed=0)
    faces = FaceSet(images, label)
    only_true, _ = train(faces)
    only_pseudo, _ = train(None, faces)
    empty = FaceSet(images, np.full(len(label), -1))
    nothing_found, _ = train(faces, empty, pseudo_share=0.5)
    expected = only_true.embed(images)
    np.testing.assert_array_equal(only_pseudo.embed(images), expected)
    np.testing.assert_array_equal(nothing_found.embed(images), expected)


def test_a_share_moves_the_result_and_resume_does_not() -> None:
    images, label = draw_people(4, 5, seed=0)
    others, pseudo = draw_people(6, 5, seed=1)
    sets = FaceSet(images, label), FaceSet(others, pseudo)
    plain, _ = train(*sets)
    shared, _ = train(*sets, pseudo_share=0.2)
    assert not np.array_equal(plain.embed(images), shared.embed(images))
    constant, _ = train(*sets, pseudo_share=(0.2, 0.2))
    np.testing.assert_array_equal(constant.embed(images), shared.embed(images))
    states = []
    train(*sets, on_epoch=states.append)
    resumed, history = train(*sets, resume=states[1])
    np.testing.assert_array_equal(plain.embed(images), resumed.embed(images))
    assert len(history) == 3


def test_soft_targets_of_classes_left_out_are_dropped() -> None:
    """Numbers of propagation in, with classes that are too small and images without a label."""
    images, label = draw_people(4, 5, seed=0)
    others, pseudo = draw_people(6, 5, seed=1)
    pseudo = pseudo * 10
    pseudo[3], pseudo[7] = 999, -1
    row = np.array([0, 0, 3, 7, 8, 8])
    soft = SoftTargets(row, np.array([0, 10, 999, 20, 10, 999]), np.array([3, 1, 1, 1, 1, 4.0]))
    known = FaceSet(images, label)
    found, _ = train(known, FaceSet(others, pseudo, soft=soft, min_size=2))
    kept = np.flatnonzero((pseudo != 999) & (pseudo != -1))
    rows = np.searchsorted(kept, [0, 0, 8])
    left = SoftTargets(rows, np.array([0, 1, 1]), np.array([3, 1, 1.0]))
    expected, _ = train(known, FaceSet(others[kept], pseudo[kept] // 10, soft=left))
    hard, _ = train(known, FaceSet(others[kept], pseudo[kept]))
    np.testing.assert_array_equal(found.embed(others), expected.embed(others))
    assert not np.array_equal(found.embed(others), hard.embed(others))


def test_masked_negatives_keep_their_numbers() -> None:
    images, label = draw_people(4, 5, seed=0)
    others, pseudo = draw_people(6, 5, seed=1)
    pseudo = pseudo * 10
    pseudo[7] = -1
    masked = MaskedNegatives(np.array([0, 7, 8]), np.array([20, 30, 50]))
    known = FaceSet(images, label)
    found, _ = train(known, FaceSet(others, pseudo, masked_negatives=masked))
    kept = np.flatnonzero(pseudo != -1)
    left = MaskedNegatives(np.searchsorted(kept, [0, 8]), np.array([2, 5]))
    rest = FaceSet(others[kept], pseudo[kept] // 10)
    expected, _ = train(known, dataclasses.replace(rest, masked_negatives=left))
    without, _ = train(known, rest)
    np.testing.assert_array_equal(found.embed(others), expected.embed(others))
    assert not np.array_equal(found.embed(others), without.embed(others))


def test_a_teacher_reaches_every_image() -> None:
    """Two sets with heads, and the images without a class in a set without one."""
    from cdp.models.heads import build_head
    from cdp.training.loop import train_model

    images, label = draw_people(4, 5, seed=0)
    others, pseudo = draw_people(6, 5, seed=1)
    pseudo[::4] = -1
    vectors = np.random.default_rng(0).normal(size=(50, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    known = FaceSet(images, label, teacher=vectors[:20])
    guessed = FaceSet(others, pseudo, teacher=vectors[20:])
    found, history = train(known, guessed)
    target = fit_target(vectors, 16)
    kept, rest = np.flatnonzero(pseudo != -1), np.flatnonzero(pseudo == -1)
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
    heads = [build_head("adaface", 16, count, seed=i) for i, count in enumerate((4, 6))]
    training_sets = [
        TrainingSet(heads[0], images, label, teacher=target[:20]),
        TrainingSet(heads[1], others[kept], pseudo[kept], teacher=target[20:][kept]),
        TrainingSet(None, others[rest], None, teacher=target[20:][rest]),
    ]
    expected = train_model(backbone, training_sets, PLAN, device="cpu", progress=False)
    assert [h["loss"] for h in history] == [h["loss"] for h in expected]
    np.testing.assert_array_equal(
        found.embed(others), Recognizer(backbone, device="cpu").embed(others)
    )
    unlabelled = FaceSet(others, teacher=vectors[20:])
    without_labels, _ = train(None, unlabelled)
    assert np.isfinite(without_labels.embed(others)).all()
    further = np.random.default_rng(1).normal(size=(20, 24))
    further /= np.linalg.norm(further, axis=1, keepdims=True)
    faces, more_label = draw_people(5, 4, seed=2)
    extra = FaceSet(faces, teacher=further)
    with_extra, _ = train(None, unlabelled, extra)
    aim = fit_target(np.concatenate([vectors[20:], further]), 16)[30:]
    reached, before = ((each.embed(faces) * aim).sum(1) for each in (with_extra, without_labels))
    assert reached.mean() > before.mean() + 0.05
    for wrong in (FaceSet(faces), dataclasses.replace(extra, label=more_label)):
        with pytest.raises(DataError, match="used for distillation only"):
            train(known, None, wrong)
    with pytest.raises(DataError, match="one teacher vector an image"):
        FaceSet(images, label, teacher=vectors)
    with pytest.raises(DataError, match="different lengths"):
        train(FaceSet(images, label, teacher=vectors[:20, :9]), guessed)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (
            {"auxiliaries": {"center": {"weight": 0.003}, "coco": {"weight": 0.1, "scale": 10.0}}},
            {},
        ),
        ({"sampled_classes": 5}, {"batch_size": 4}),
        ({}, {"sampling": "identity", "images_per_identity": 2}),
    ],
    ids=["auxiliaries", "sampled", "balanced"],
)
def test_options_reach_both_heads_and_resume(spec, plan) -> None:
    sets = [FaceSet(*draw_people(people, 5, seed)) for seed, people in enumerate((8, 9))]
    others = sets[1].images
    spec, plan = dataclasses.replace(SMALL, **spec), dataclasses.replace(PLAN, **plan)
    states = []
    plain, _ = train(*sets, plan=dataclasses.replace(plan, sampling="image"))
    whole, _ = train(*sets, spec=spec, plan=plan, on_epoch=states.append)
    again, _ = train(*sets, spec=spec, plan=plan, resume=states[1])
    np.testing.assert_array_equal(whole.embed(others), again.embed(others))
    assert not np.array_equal(whole.embed(others), plain.embed(others))


def test_vectors_are_unit_and_faces_of_any_size_will_do() -> None:
    recognizer = Recognizer(build_backbone("plain"), device="cpu")
    for side in (12, 24, 40):
        faces = np.random.default_rng(0).integers(0, 256, (5, side, side, 3)).astype(np.uint8)
        vectors = recognizer.embed(faces)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(recognizer.embed(faces[:, :, ::-1]), vectors, atol=1e-4)
    assert recognizer.embed(faces[:0]).shape == (0, 128)


def test_a_file_gives_it_back(tmp_path) -> None:
    recognizer = Recognizer(build_backbone("mixer"), {"people": 12, "data": "drawn"})
    path = tmp_path / "recognizer.safetensors"
    recognizer.save(path)
    again = cdp.Recognizer.load(path)
    faces = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3)).astype(np.uint8)
    np.testing.assert_array_equal(again.embed(faces), recognizer.embed(faces))
    assert again.meta == recognizer.meta
    assert (again.input_px, again.embedding_dim) == (24, 128)
    twin = Recognizer.from_state(*recognizer.state())
    np.testing.assert_array_equal(twin.embed(faces), recognizer.embed(faces))
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match="safetensors model expected"):
        Recognizer.load(path)


@pytest.fixture(scope="module")
def default_faces():
    """The default data set: labelled faces to train on, held-out identities to verify."""
    from cdp.metrics.verification import sample_verification_pairs
    from cdp.synthetic.identities import SyntheticFaces

    faces = SyntheticFaces(size_px=48)
    rows = {split: np.flatnonzero(faces.split == split) for split in ("labelled", "evaluation")}
    images = {split: faces.draw(found) for split, found in rows.items()}
    label = {s: np.unique(faces.identity[r], return_inverse=True)[1] for s, r in rows.items()}
    pairs = sample_verification_pairs(label["evaluation"], 100, 5)
    return images["labelled"], label["labelled"], images["evaluation"], pairs


@pytest.mark.long
@pytest.mark.parametrize(
    "spec",
    [RecognizerSpec("plain", head=name) for name in HEADS]
    + [RecognizerSpec("plain", sampled_classes=64)]
    + [
        RecognizerSpec(
            "plain",
            head="normface",
            auxiliaries={name: {"weight": 0.003 if name in ("center", "range") else 0.3}},
        )
        for name in AUXILIARIES
    ],
    ids=lambda spec: "-".join(
        [spec.head, *spec.auxiliaries, *(["sampled"] * (spec.sampled_classes is not None))]
    ),
)
def test_it_trains_on_the_default_set(spec, default_faces) -> None:
    """Every head and every added loss: unseen identities are separated."""
    from cdp.metrics.verification import compare_pairs, verification_accuracy

    images, label, held_out, pairs = default_faces

    def measure(recognizer: Recognizer) -> float:
        similarity = compare_pairs(recognizer.embed(held_out), pairs.source, pairs.target)
        return verification_accuracy(similarity, pairs.same, pairs.fold)[0]

    plan = TrainingPlan(epochs=6, degradation=get_degradation("adaface"))
    if spec.auxiliaries:
        plan = dataclasses.replace(plan, sampling="identity", images_per_identity=2)
    recognizer, history = train_recognizer(
        FaceSet(images, label), spec=spec, plan=plan, device="cpu", progress=False
    )
    before = measure(Recognizer(build_backbone("plain"), device="cpu"))
    after = measure(recognizer)
    print(f"{spec}: accuracy {before:.3f} -> {after:.3f}, on training {history[-1]['accuracy']}")
    assert after > before + 0.1


def test_errors() -> None:
    images, label = draw_people(4, 5, seed=0)
    faces = FaceSet(images, label)
    with pytest.raises(DataError, match="two identities"):
        train(FaceSet(images, label * 0))
    with pytest.raises(DataError, match="two identities"):
        train(None, FaceSet(images, label, min_size=6))
    with pytest.raises(DataError, match="20 images and 19 labels"):
        FaceSet(images, label[1:])
    with pytest.raises(DataError, match="20 images and 19 weights"):
        FaceSet(images, label, np.ones(19))
    with pytest.raises(ConfigError, match="share"):
        train(faces, faces, pseudo_share=1.0)
    with pytest.raises(ConfigError, match="pseudo_share"):
        train(faces, faces, pseudo_share=(0.5, 0.0))
    with pytest.raises(ConfigError, match="unknown head"):
        train(faces, spec=dataclasses.replace(SMALL, head="none"))
