"""pretrained: ready networks embed as before, are trained further, saved, loaded and exported."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from known_clusters import build_projection
from onnx import TensorProto, helper, numpy_helper

from cdp.embedding import OnnxEmbedder
from cdp.errors import ConfigError, DataError
from cdp.images.preprocessing import Preprocessing
from cdp.models import build_backbone
from cdp.recognizer import (
    FaceSet,
    Recognizer,
    RecognizerSpec,
    export_onnx,
    open_pretrained,
    train_recognizer,
)
from cdp.training import TrainingPlan
from pipelines.config import TrainingSettings
from pipelines.run import main
from pipelines.training.pretrained import Pretrained
from pipelines.training.request import TrainingRequest, train_requested

pytestmark = [pytest.mark.torch, pytest.mark.trains]

RNG = np.random.default_rng(0)


def draw_faces(count, side=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def build_network(
    *, channels_last=False, divided=True, square=True, side=32, dimension=20, seed=0
) -> bytes:
    """A small face network: convolutions, a batch normalisation, a pool, a division by length."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "first": draw(6, 3, 3, 3), "slope": np.full((6, 1, 1), 0.25, np.float32),
        "second": draw(8, 6, 3, 3), "scale": 1 + 0.1 * draw(8), "shift": draw(8),
        "mean": draw(8), "variance": np.full(8, 2.0, np.float32), "last": draw(8, dimension),
        "offset": np.full(dimension, 0.1, np.float32),
        "small": np.float32(1e-12), "axes": np.array([1], np.int64),
    }  # fmt: skip
    faces = ["n", side, side, 3] if channels_last else ["n", 3, side, side]
    strides = [2, 2] if square else [2, 1]
    make = helper.make_node
    nodes = [
        make("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2])
        if channels_last
        else make("Identity", ["image"], ["turned"]),
        make("Conv", ["turned", "first"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        make("PRelu", ["a", "slope"], ["b"]),
        make("Conv", ["b", "second"], ["c"], strides=strides, pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["d"]),
        make("Relu", ["d"], ["e"]),
        make("GlobalAveragePool", ["e"], ["f"]),
        make("Flatten", ["f"], ["g"]),
        make("Gemm", ["g", "last", "offset"], ["h"]),
    ]
    if divided:
        nodes += [
            make("ReduceL2", ["h", "axes"], ["length"], keepdims=1),
            make("Clip", ["length", "small"], ["bounded"]),
            make("Div", ["h", "bounded"], ["embedding"]),
        ]
    else:
        nodes += [make("Identity", ["h"], ["embedding"])]
    graph = helper.make_graph(
        nodes, "small face network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, faces)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dimension])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString()


USED = [
    ({}, {"mean": 127.5, "scale": 127.5}),
    ({"divided": False}, {"mean": (120.0, 110.0, 100.0), "scale": (60.0, 58.0, 57.0)}),
    ({"channels_last": True}, {"mean": 127.5, "scale": 128.0, "channels": "bgr"}),
    ({"square": False}, {"mean": 127.5, "scale": 127.5}),
]


@pytest.mark.parametrize(("network", "shown"), USED)
def test_before_training_it_embeds_as_the_network(network, shown) -> None:
    embedder = OnnxEmbedder(build_network(**network), preprocessing=Preprocessing(**shown))
    recognizer = Recognizer(open_pretrained(embedder), device="cpu")
    assert (recognizer.input_px, recognizer.embedding_dim) == (24, 20)
    faces = draw_faces(5)
    np.testing.assert_allclose(
        recognizer.embed(faces, flip=False), embedder.embed(faces)[0], atol=1e-5
    )
    shape = recognizer.backbone.map_shape
    assert shape == ((8, 8) if network.get("square", True) else (6, 16))
    found = recognizer.backbone.extract(torch.zeros(2, 3, 24, 24)).map
    assert tuple(found.shape) == (2, shape.channels, shape.side, shape.side)


def test_its_norm_is_that_before_the_division() -> None:
    faces = draw_faces(4)
    lengths = [
        Recognizer(open_pretrained(OnnxEmbedder(build_network(divided=divided))), device="cpu")
        .embedder.embed(faces)[1]
        for divided in (True, False)
    ]  # fmt: skip
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert np.ptp(lengths[0]) > 1e-3


@pytest.mark.parametrize("name", ["edgeface_xs", "edgeface_xxs", "mobilefacenet_casia"])
def test_networks_of_others_embed_as_before(data_root, name, tmp_path) -> None:
    embedder = OnnxEmbedder((data_root / "onnx" / f"{name}.onnx").read_bytes(), name=name)
    recognizer = Recognizer(open_pretrained(embedder), device="cpu")
    faces = draw_faces(3)
    expected = embedder.embed(faces)[0]
    vectors = recognizer.embed(faces, flip=False)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    recognizer.save(tmp_path / "saved.safetensors")
    again = Recognizer.load(tmp_path / "saved.safetensors", device="cpu")
    np.testing.assert_array_equal(
        again.embed(faces, flip=False), recognizer.embed(faces, flip=False)
    )


def train(backbone, faces, **changed):
    plan = TrainingPlan(epochs=4, batch_size=8, learning_rate=0.02, **changed)
    return train_recognizer(
        FaceSet(faces, np.arange(len(faces)) // 4),
        spec=RecognizerSpec(embedding_dim=backbone.spec.embedding_dim, head="softmax"),
        plan=plan,
        pretrained=backbone,
        device="cpu",
        progress=False,
    )


def test_it_is_trained_saved_and_exported(tmp_path) -> None:
    embedder = OnnxEmbedder(build_network())
    before = open_pretrained(embedder).state_dict()
    faces = draw_faces(40)
    recognizer, history = train(open_pretrained(embedder), faces)
    after = recognizer.backbone.state_dict()
    weights = [name for name in before if "weight" in name]
    kept = [name for name in before if "constant" in name]
    assert (len(weights), len(kept)) == (7, 2)  # kept are the moments
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert history[-1]["loss"] < history[0]["loss"]
    twin, _ = train(open_pretrained(embedder), faces)
    np.testing.assert_array_equal(twin.embed(faces), recognizer.embed(faces))
    recognizer.save(tmp_path / "trained.safetensors")
    again = Recognizer.load(tmp_path / "trained.safetensors", device="cpu")
    assert again.backbone.spec == recognizer.backbone.spec
    np.testing.assert_array_equal(again.embed(faces), recognizer.embed(faces))
    exported = OnnxEmbedder(export_onnx(again))
    np.testing.assert_allclose(exported.embed(faces)[0], again.embed(faces), atol=1e-5)
    # and what was exported can be trained again
    third = Recognizer(open_pretrained(exported, input_px=24), device="cpu")
    np.testing.assert_allclose(third.embed(faces, flip=False), again.embed(faces), atol=1e-4)


def test_a_student_of_its_own_vectors_starts_at_its_target() -> None:
    """A teacher's vectors are turned onto those that the student makes before it is trained."""
    embedder = OnnxEmbedder(build_network())
    faces = draw_faces(64)
    backbone = open_pretrained(embedder)
    plan = TrainingPlan(epochs=1, batch_size=64, learning_rate=1e-6, class_weight=0.0, flip=False)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0][:20]
    _, history = train_recognizer(
        None,
        None,
        FaceSet(faces, teacher=embedder.embed(faces)[0] @ turn),
        spec=RecognizerSpec(embedding_dim=20),
        plan=plan,
        pretrained=backbone,
        device="cpu",
        progress=False,
    )
    assert history[0]["loss"] < 0.5  # 1 - cosine; a turned target is at 1


def test_a_neck_takes_the_place_of_its_ending() -> None:
    embedder = OnnxEmbedder(build_network())
    backbone = open_pretrained(embedder, neck="subdecisions", embedding_dim=48)
    recognizer, _ = train(backbone, draw_faces(24))
    assert recognizer.embed(draw_faces(2)).shape == (2, 48)


def test_settings_that_do_not_fit_are_named() -> None:
    embedder = OnnxEmbedder(build_network(), name="small.onnx")
    with pytest.raises(ConfigError, match=r"embedding_dim: 20 expected.*small\.onnx, got 128"):
        open_pretrained(embedder, embedding_dim=128)
    with pytest.raises(ConfigError, match=r"20 expected.*got 64"):
        train_recognizer(
            FaceSet(draw_faces(8), np.arange(8) // 4),
            spec=RecognizerSpec(embedding_dim=64),
            plan=TrainingPlan(epochs=1),
            pretrained=open_pretrained(embedder),
        )


def test_a_network_of_one_face_at_a_time_is_refused() -> None:
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes, "one face",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 192])],
        [numpy_helper.from_array(np.array([1, 192], np.int64), "shape")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(DataError, match="cannot be run on two faces of 8 px"):
        open_pretrained(OnnxEmbedder(model.SerializeToString()))


def test_a_damaged_description_is_a_data_error(tmp_path) -> None:
    from cdp.models import pack_model, unpack_model

    tensors, metadata = pack_model(open_pretrained(OnnxEmbedder(build_network())))
    spec = json.loads(metadata["cdp.backbone"])
    spec["network"]["graphs"][0]["nodes"][1][0] = "Unknown"
    with pytest.raises(DataError):
        unpack_model(tensors, {**metadata, "cdp.backbone": json.dumps(spec)})
    del spec["network"]["graphs"]
    with pytest.raises(DataError):
        unpack_model(tensors, {**metadata, "cdp.backbone": json.dumps(spec)})


def test_a_pretrained_network_travels_as_json(tmp_path) -> None:
    (tmp_path / "net.onnx").write_bytes(build_network())
    shown = Preprocessing((1.0, 2.0, 3.0), 50.0, "bgr", input_px=32)
    packed = json.loads(json.dumps(Pretrained(tmp_path / "net.onnx", "abc", shown).pack()))
    assert Pretrained.unpack(packed) == Pretrained(tmp_path / "net.onnx", "abc", shown)


def test_a_training_that_was_stopped_ends_the_same(tmp_path) -> None:
    """Targets are turned onto the network as it came, not as it was when the training stopped."""
    embedder = OnnxEmbedder(build_network())
    faces = draw_faces(32)
    vectors = np.random.default_rng(2).normal(size=(32, 30))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    states = []

    def run(**given):
        return train_recognizer(
            FaceSet(faces, np.arange(32) // 4, teacher=vectors),
            spec=RecognizerSpec(embedding_dim=20),
            plan=TrainingPlan(epochs=3, batch_size=8, learning_rate=0.02),
            pretrained=open_pretrained(embedder),
            device="cpu",
            progress=False,
            **given,
        )[0].embed(faces)

    whole = run(on_epoch=states.append)
    np.testing.assert_array_equal(run(resume=states[0]), whole)


def test_a_team_gets_the_network_by_its_request(tmp_path) -> None:
    (tmp_path / "net.onnx").write_bytes(build_network())
    settings = TrainingSettings(input_px=24, embedding_dim=20, epochs=1, batch_size=8)
    packed = Pretrained(tmp_path / "net.onnx", "", Preprocessing()).pack()
    request = TrainingRequest(
        "r", "residual", 1.0, settings.model_dump(), 0, None, 0.0, 1.0, None, packed
    )
    request = TrainingRequest(**json.loads(json.dumps(asdict(request))))
    sets = {"labelled": FaceSet(draw_faces(16), np.arange(16) // 4)}
    recognizer, _ = train_requested(request, sets, "cpu")
    assert recognizer.backbone.spec.name == "pretrained"


def read_spec(path):
    from cdp.models import load_model

    return load_model(path)[0].spec


ONE = ["retrain.epochs=1", "retrain.learning_rate=0.01"]


def test_a_run_starts_from_a_member(known, known_run, own_known_run) -> None:
    """The members of this run are ONNX models of 128 and 96 numbers."""
    runs = own_known_run.parent
    options = [*known, "--runs-dir", str(runs), "--stage", "retrain", *ONE]
    assert main([*options, "retrain.pretrained=base", "retrain.embedding_dim=128"]) == 0
    spec = read_spec(own_known_run / "retrain" / "labelled_pseudo.safetensors")
    assert (spec.name, spec.embedding_dim, spec.input_px) == ("pretrained", 128, 16)


def test_what_does_not_fit_is_said_before_a_run(known, tmp_path, capsys) -> None:
    from pipelines.check import main as check

    options = [option for option in known if option != "--workers"][:-1]
    for settings, words in (
        (
            ["retrain.pretrained=base"],
            "pretrained: base needs a learning_rate of its own, 0.1 is for fresh weights",
        ),
        (
            ["retrain.pretrained=base", "retrain.learning_rate=0.01"],
            "retrain: embedding_dim: 128 expected",
        ),
        (
            ["retrain.pretrained=nobody", "retrain.learning_rate=0.01"],
            "a member of the committee with a model expected (base",
        ),
    ):
        assert check([*options, *settings]) == 2
        assert words in capsys.readouterr().err


def test_a_member_trained_here_can_be_trained_further(tiny, finished_run, own_run) -> None:
    options = ["--config", str(tiny), "--workers", "1", "--runs-dir", str(own_run.parent)]
    assert main([*options, "--stage", "retrain", "retrain.pretrained=base", *ONE]) == 0
    spec = read_spec(own_run / "retrain" / "labelled_pseudo.safetensors")
    assert (spec.name, spec.width) == ("plain", 0.5)
    wrong = [*options, "--stage", "retrain", "retrain.pretrained=base", *ONE, "retrain.input_px=24"]
    assert main(wrong) == 2


def test_a_projection_has_no_map() -> None:
    backbone = open_pretrained(OnnxEmbedder(build_projection(12, 0)))
    assert backbone.map_shape == (12, 1)
    assert build_backbone("plain").spec.network is None
