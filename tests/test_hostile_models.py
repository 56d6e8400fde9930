"""Hostile models: no file outside is read, no code of theirs runs, no bound is passed."""

import os
import resource

import numpy as np
import pytest
from onnx import TensorProto, helper

from cdp.embedding import LONGEST, OnnxEmbedder
from cdp.errors import DataError
from cdp.models import build_backbone, load_model, pack_model
from cdp.onnx_session import ARENA_BYTES

pytestmark = pytest.mark.torch

# ------------------------------------------------------------------------------------------- ONNX

WEIGHT = np.random.default_rng(0).normal(size=(192, 6)).astype(np.float32)
FLATTEN = helper.make_node("Flatten", ["image"], ["flat"])
MULTIPLY = helper.make_node("MatMul", ["flat", "weight"], ["embedding"])


def tensor(name: str, values: np.ndarray) -> TensorProto:
    kind = TensorProto.INT64 if values.dtype == np.int64 else TensorProto.FLOAT
    return helper.make_tensor(name, kind, values.shape, values.ravel())


def make_model(nodes, tensors, *, shape=("n", 3, 8, 8), given=("n", 6), domains=("",)) -> bytes:
    graph = helper.make_graph(
        nodes, "hostile",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, given)],
        tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid(name, 17 if not name else 1) for name in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


@pytest.mark.parametrize("where", ["w.bin", "../w.bin", "ABSOLUTE", "*/_ORT_MEM_ADDR_/*"])
def test_a_model_reads_no_other_file(tmp_path, monkeypatch, where):
    """Weights may lie in other files, says the format; here they may not, wherever one stands."""
    for folder in (tmp_path, tmp_path / "here"):
        folder.mkdir(exist_ok=True)
        WEIGHT.tofile(folder / "w.bin")
    monkeypatch.chdir(tmp_path / "here")
    outside = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    outside.data_location = TensorProto.EXTERNAL
    location = str(tmp_path / "w.bin") if where == "ABSOLUTE" else where
    for key, value in (("location", location), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
        outside.external_data.add(key=key, value=value)
    with pytest.raises(DataError, match="an ONNX model expected"):
        OnnxEmbedder(make_model([FLATTEN, MULTIPLY], [outside]))


def fill(size: int, *, at_once: bool) -> list:
    """Nodes that fill a tensor of `size` numbers: while loading, or for each image."""
    nodes = [] if at_once else [
        helper.make_node("Shape", ["image"], ["sides"], start=0, end=1),
        helper.make_node("Mul", ["sides", "count"], ["many"]),
    ]  # fmt: skip
    return [
        *nodes,
        helper.make_node("ConstantOfShape", ["count" if at_once else "many"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"]),
        FLATTEN,
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Add", ["product", "sum"], ["embedding"]),
    ], [tensor("weight", WEIGHT), tensor("count", np.array([size], np.int64))]


@pytest.mark.parametrize("at_once", [True, False], ids=["loading", "running"])
def test_a_model_cannot_ask_for_any_amount_of_memory(at_once):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="onnxruntime says"):
        OnnxEmbedder(make_model(*fill(ARENA_BYTES // 2, at_once=at_once))).embed(
            np.ones((2, 8, 8, 3), np.uint8)
        )
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200_000
    small = OnnxEmbedder(make_model(*fill(1000, at_once=at_once)))
    assert small.embed(np.ones((2, 8, 8, 3), np.uint8))[0].shape == (2, 6)


IDENTITY = helper.make_node("Identity", ["weight"], ["embedding"])
LIES = TensorProto(name="weight", data_type=1, dims=[10**9, 10**6], raw_data=b"1234")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (make_model([helper.make_node("Evil", ["image"], ["embedding"], domain="evil")], [],
                    domains=("", "evil")), "an ONNX model expected"),
        (make_model([FLATTEN, MULTIPLY], [LIES]), "an ONNX model expected"),
        (make_model([FLATTEN, MULTIPLY], [tensor("weight", WEIGHT)])[:-500], "an ONNX model"),
        (make_model([FLATTEN, MULTIPLY], [tensor("weight", WEIGHT)], shape=("n", 3, 10**6, 10**6)),
         "expected"),
        (make_model([FLATTEN, MULTIPLY], [tensor("weight", WEIGHT)], shape=(10**9, 3, 8, 8)),
         "expected"),
        (make_model([IDENTITY], [tensor("weight", np.zeros((1, 10**4), np.float32))],
                    given=("n", 10**4)), f"1 to {LONGEST} numbers expected"),
        (make_model([IDENTITY], [tensor("weight", WEIGHT)]), r"\(2, 6\) float32 expected"),
        (make_model([IDENTITY], [tensor("weight", WEIGHT)], given=("n", "d")), "float32 expected"),
    ],
    ids=["operator", "sizes", "cut", "side", "batch", "length", "rows", "any"],
)  # fmt: skip
def test_a_model_of_lies_is_one_message(model, expected):
    with pytest.raises(DataError, match=expected):
        OnnxEmbedder(model).embed(np.ones((2, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "recipe",
    ['{"name": "plain", "input_px": 24, "embedding_dim": 1000000000, "width": 1.0}',
     '{"name": "plain", "input_px": 24, "embedding_dim": 16, "width": 1e5}',
     '{"name": "plain", "input_px": 24, "embedding_dim": 16, "width": Infinity}',
     '{"name": "plain", "input_px": 1000000, "embedding_dim": 16, "width": 1.0}',
     '{"name": "__class__", "input_px": 24, "embedding_dim": 16, "width": 1.0}',
     '["plain"]', "[" * 100_000],
    ids=["dim", "width", "infinite", "px", "name", "list", "deep"],
)  # fmt: skip
def test_weights_whose_header_lies_cost_no_memory(tmp_path, recipe):
    from safetensors.torch import save_file

    tensors, metadata = pack_model(build_backbone("plain", embedding_dim=16))
    metadata["cdp.backbone"] = recipe
    save_file(tensors, str(tmp_path / "m.safetensors"), metadata=metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="weights that fit the backbone"):
        load_model(tmp_path / "m.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def open_onnx(path):
    return OnnxEmbedder(path.read_bytes())


def test_a_pickle_is_no_model(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name in ("m.safetensors", "m.pt", "m.onnx"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        opener = open_onnx if name.endswith("onnx") else load_model
        with pytest.raises(DataError):
            opener(tmp_path / name)
    assert not (tmp_path / "ran").exists()
