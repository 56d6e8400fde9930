"""ONNX models as people export them: types, fixed batches, weights in other files, other files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cdp.embedding import OnnxEmbedder
from cdp.errors import DataError
from cdp.images.preprocessing import PRESETS, Preprocessing
from cdp.separation import rank_preprocessing
from pipelines.members import open_embedder

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3 * 64, 6)).astype(np.float32)
FACES = RNG.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
RAW = FACES.transpose(0, 3, 1, 2).reshape(5, -1) @ WEIGHT
EXPECTED = RAW / np.linalg.norm(RAW, axis=1, keepdims=True)


def export(
    kind: int = TensorProto.FLOAT,
    *,
    given: int = TensorProto.FLOAT,
    reshape: tuple[int, int] | None = None,
    opset: int = 17,
    version: int = 9,
) -> onnx.ModelProto:
    """A model that multiplies the pixels by a matrix.

    kind, given : types of its input and output. reshape : constants an exporter left in it.
    """
    tensors = [numpy_helper.from_array(WEIGHT, "weight")]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["embedding"], to=given),
    ]
    if reshape is not None:
        tensors.append(numpy_helper.from_array(np.array(reshape, np.int64), "shape"))
        nodes[1] = helper.make_node("Reshape", ["pixels", "shape"], ["flat"])
    graph = helper.make_graph(
        nodes,
        "exported",
        [helper.make_tensor_value_info("image", kind, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("embedding", given, ["n", 6])],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=version)


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "UINT8"])
@pytest.mark.parametrize("given", ["FLOAT", "DOUBLE"])
def test_inputs_and_outputs_of_other_types(kind, given):
    model = export(getattr(TensorProto, kind), given=getattr(TensorProto, given))
    vectors, norm = OnnxEmbedder(model.SerializeToString()).embed(FACES)
    np.testing.assert_allclose(vectors, EXPECTED, atol=1e-5)
    np.testing.assert_allclose(norm, np.linalg.norm(RAW, axis=1), rtol=1e-5)


def test_whole_numbers_are_shown_as_they_are():
    model = export(TensorProto.UINT8).SerializeToString()
    with pytest.raises(DataError, match=r"uint8, pixels in 0..255.*RGB in -1..1.*preset: plain"):
        OnnxEmbedder(model, preprocessing=PRESETS["insightface"])
    reverse = OnnxEmbedder(model, preprocessing=Preprocessing(channels="bgr")).embed(FACES)[0]
    np.testing.assert_allclose(reverse, OnnxEmbedder(model).embed(FACES[..., ::-1])[0], atol=1e-6)

    def embed(way: Preprocessing) -> np.ndarray:
        return OnnxEmbedder(model, preprocessing=way).embed(FACES)[0]

    ranked = rank_preprocessing(embed, np.array([0, 0, 1, 1, 2]), Preprocessing())
    assert sorted(way.channels for way, _ in ranked) == ["bgr", "rgb"]


@pytest.mark.parametrize("reshape", [(1, 192), (1, -1)])
def test_a_batch_of_one_left_in_the_model_is_found(reshape, capfd):
    embedder = OnnxEmbedder(export(reshape=reshape).SerializeToString())
    for rows in (slice(0, 5), slice(0, 1), slice(1, 4)):
        np.testing.assert_allclose(embedder.embed(FACES[rows])[0], EXPECTED[rows], atol=1e-5)
    flipped = OnnxEmbedder(export().SerializeToString()).embed(FACES, flip=True)[0]
    np.testing.assert_allclose(embedder.embed(FACES, flip=True)[0], flipped, atol=1e-5)
    assert capfd.readouterr().err == ""


def test_weights_in_another_file_are_named(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(export(), path, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(
        DataError, match=r"m: .*weights lie in another file.*onnx\.load\(old\), new"
    ):
        OnnxEmbedder(path.read_bytes(), name="m")
    onnx.save(onnx.load(path), tmp_path / "one.onnx")  # what the message says
    vectors, _ = OnnxEmbedder((tmp_path / "one.onnx").read_bytes()).embed(FACES)
    np.testing.assert_allclose(vectors, EXPECTED, atol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "MODEL.ONNX", "model.onnx.bin", "model"])
def test_an_onnx_member_is_one_whatever_its_file_is_called(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(export().SerializeToString())
    embedder = open_embedder(path, "cpu", Preprocessing(channels="bgr"))
    expected = OnnxEmbedder(export().SerializeToString()).embed(FACES[..., ::-1])[0]
    np.testing.assert_allclose(embedder.embed(FACES)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04\0\0", "PyTorch checkpoint"),
        (b"<!DOCTYPE html><html>", "it is a page"),
        (b"\x08\x09 nothing", "onnxruntime says"),
        (export(opset=999).SerializeToString(), "opset is newer.*Export it with opset 17"),
        (export(version=999).SerializeToString(), "IR version is newer.*ir_version = 8"),
    ],
    ids=["empty", "pointer", "checkpoint", "page", "junk", "opset", "version"],
)
def test_a_file_that_cannot_be_opened_says_what_to_do(data, expected):
    with pytest.raises(DataError, match=f"m.onnx: an ONNX model expected, .*{expected}"):
        OnnxEmbedder(data, name="m.onnx")
