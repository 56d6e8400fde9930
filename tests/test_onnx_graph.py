"""onnx_graph: each operator is what onnxruntime makes of it, and lets gradients through."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cdp.errors import DataError
from cdp.models.onnx_graph import OPERATORS, GraphModule, read_graph

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
MAP = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32)
ROWS = RNG.normal(size=(3, 8)).astype(np.float32)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def whole(*values):
    return np.array(values, np.int64)


CASES = [
    ("Add", MAP, [draw(4, 1, 1)], {}),
    ("AveragePool", MAP, [], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    ("AveragePool", MAP, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", MAP, [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", MAP, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("BatchNormalization", MAP, [draw(4), draw(4), draw(4), draw(4) ** 2], {"epsilon": 1e-3}),
    ("Clip", MAP, [np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", MAP, [None, np.float32(0.1)], {}),
    ("Concat", MAP, [draw(2, 4, 7, 1)], {"axis": 3}),
    ("Conv", MAP, [draw(6, 4, 3, 3), draw(6)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("Conv", MAP, [draw(8, 1, 3, 3)], {"group": 4, "dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    ("Conv", MAP, [draw(6, 4, 3, 3)], {"pads": [0, 1, 2, 1]}),
    ("Conv", MAP, [draw(6, 4, 3, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", MAP, [draw(6, 4, 3, 2)], {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ("Cos", MAP, [], {}),
    ("CumSum", MAP, [np.array(2, np.int64)], {}),
    ("Div", MAP, [np.float32(3)], {}),
    ("Dropout", MAP, [], {}),
    ("Erf", MAP, [], {}),
    ("Exp", MAP, [], {}),
    ("Expand", draw(2, 1, 3), [whole(4, 2, 5, 1)], {}),
    ("Flatten", MAP, [], {"axis": 2}),
    ("Gather", MAP, [np.array(1, np.int64)], {"axis": 1}),
    ("Gather", MAP, [whole(2, 0, 1)], {"axis": 2}),
    ("Gather", MAP, [np.array([[0, 1], [3, 2]], np.int64)], {"axis": 1}),
    ("Gelu", MAP, [], {}),
    ("Gemm", ROWS, [draw(8, 5), draw(5)], {}),
    ("Gemm", ROWS, [draw(5, 8)], {"transB": 1, "alpha": 0.5}),
    ("Gemm", draw(8, 3), [draw(8, 5), draw(3, 5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("GlobalAveragePool", MAP, [], {}),
    ("HardSigmoid", MAP, [], {"alpha": 0.3}),
    ("HardSwish", MAP, [], {}),
    ("Identity", MAP, [], {}),
    ("LayerNormalization", MAP, [draw(6), draw(6)], {"epsilon": 1e-3}),
    ("LayerNormalization", MAP, [draw(7, 6)], {"axis": 2}),
    ("LeakyRelu", MAP, [], {"alpha": 0.3}),
    ("LpNormalization", MAP, [], {"axis": 1}),
    ("MatMul", MAP, [draw(6, 5)], {}),
    ("MaxPool", MAP, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", MAP, [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("Mul", MAP, [draw(1, 1, 1, 6)], {}),
    ("Neg", MAP, [], {}),
    ("PRelu", MAP, [draw(4, 1, 1)], {}),
    ("Pad", MAP, [whole(0, 1, 2, 0, 0, 0, 1, 3), np.float32(0.5)], {}),
    ("Pow", np.abs(MAP), [np.float32(1.5)], {}),
    ("ReduceL2", MAP, [whole(1, 2)], {"keepdims": 0}),
    ("ReduceMean", MAP, [whole(-1)], {}),
    ("ReduceSum", MAP, [], {}),
    ("Relu", MAP, [], {}),
    ("Reshape", MAP, [whole(0, -1, 6)], {}),
    ("Resize", MAP, [None, None, whole(2, 4, 13, 9)], {"mode": "linear"}),
    (
        "Resize",
        MAP,
        [None, np.array([1, 1, 2, 3], np.float32)],
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    ),
    (
        "Resize",
        MAP,
        [None, np.array([1, 1, 2, 2], np.float32)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    ("Sigmoid", MAP, [], {}),
    ("Sin", MAP, [], {}),
    ("Slice", MAP, [whole(1, -2), whole(4, 9999), whole(1, 3), whole(2, 1)], {}),
    ("Slice", MAP, [whole(-1), whole(-(2**62)), whole(1), whole(-1)], {}),
    ("Softmax", MAP, [], {"axis": 1}),
    ("Sqrt", np.abs(MAP), [], {}),
    ("Squeeze", draw(2, 1, 3, 1), [whole(1, -1)], {}),
    ("Squeeze", draw(2, 1, 3, 1), [], {}),
    ("Sub", MAP, [np.float32(3)], {}),
    ("Tanh", MAP, [], {}),
    ("Transpose", MAP, [], {"perm": [0, 2, 3, 1]}),
    ("Transpose", MAP, [], {}),
    ("Unsqueeze", ROWS, [whole(0, -1)], {}),
]
"""Operator, the values that go in, its constants, its attributes."""


def build(nodes, start, constants, end="out"):
    """A model of one input of that shape and the output `end`, whose shape is left open."""
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, list(start.shape))],
        [helper.make_empty_tensor_value_info(end)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if v is not None],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def run_both(model, start):
    """What onnxruntime makes of it, and what we do."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"in": start})
    graph, tensors = read_graph(model)
    module = GraphModule(graph)
    module.load_state_dict(tensors)
    return theirs, module


@pytest.mark.parametrize(
    ("name", "start", "constants", "attributes"), CASES,
    ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)],
)  # fmt: skip
def test_an_operator_is_that_of_onnxruntime(name, start, constants, attributes) -> None:
    named = {f"c{number}": value for number, value in enumerate(constants)}
    inputs = ["in", *(key if value is not None else "" for key, value in named.items())]
    model = build([helper.make_node(name, inputs, ["out"], **attributes)], start, named)
    theirs, module = run_both(model, start)
    images = torch.from_numpy(start).requires_grad_()
    ours = module(images)
    assert tuple(ours.shape) == theirs.shape
    np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=2e-6, rtol=1e-5)
    ours.sum().backward()
    assert images.grad is not None
    for parameter in module.parameters():
        assert parameter.grad is not None


def test_split_gives_several_values() -> None:
    for sizes, attributes in (([whole(1, 3)], {}), ([], {"num_outputs": 2})):
        named = {f"c{number}": value for number, value in enumerate(sizes)}
        nodes = [
            helper.make_node("Split", ["in", *named], ["a", "b"], axis=1, **attributes),
            helper.make_node("Concat", ["b", "a"], ["out"], axis=1),
        ]
        theirs, module = run_both(build(nodes, MAP, named), MAP)
        np.testing.assert_array_equal(module(torch.from_numpy(MAP)).numpy(), theirs)


def test_sides_are_computed_with() -> None:
    """What exporters write for `x.reshape(n, c, h * w)`, a mask and an `expand` of it."""
    zero, ones = np.array(0, np.int64), whole(1)
    nodes = [
        helper.make_node("Shape", ["in"], ["sides"]),
        helper.make_node("Shape", ["in"], ["outer"], start=2, end=-1),
        helper.make_node("Squeeze", ["outer"], ["high"]),
        helper.make_node("Gather", ["sides", "three"], ["wide"]),
        helper.make_node("Mul", ["high", "wide"], ["cells"]),
        helper.make_node("Div", ["cells", "two"], ["half"]),
        helper.make_node("Sub", ["cells", "half"], ["rest"]),
        helper.make_node("Unsqueeze", ["rest", "axis"], ["rest1"]),
        helper.make_node("Slice", ["sides", "axis", "end"], ["batch"]),
        helper.make_node("Concat", ["batch", "minus", "rest1"], ["shape"], axis=0),
        helper.make_node("Reshape", ["in", "shape"], ["flat"]),
        helper.make_node("ConstantOfShape", ["shape3"], ["empty"]),
        helper.make_node("Cast", ["empty"], ["mask"], to=TensorProto.BOOL),
        helper.make_node("Not", ["mask"], ["full"]),
        helper.make_node("Cast", ["full"], ["one"], to=TensorProto.FLOAT),
        helper.make_node(
            "ConstantOfShape", ["rank"], ["ones"], value=numpy_helper.from_array(ones)
        ),
        helper.make_node("Equal", ["shape3", "minus"], ["free"]),
        helper.make_node("Where", ["free", "ones", "shape3"], ["wanted"]),
        helper.make_node("Expand", ["one", "wanted"], ["wide_one"]),
        helper.make_node("Add", ["flat", "wide_one"], ["out"]),
    ]
    constants = {"two": np.array(2, np.int64), "three": np.array(3, np.int64), "axis": whole(0),
                 "end": whole(1), "minus": whole(-1), "shape3": whole(1, 1, 1), "rank": whole(3),
                 "zero": zero}  # fmt: skip
    theirs, module = run_both(build(nodes, MAP, constants), MAP)
    np.testing.assert_array_equal(module(torch.from_numpy(MAP)).numpy(), theirs)


def test_a_part_keeps_the_constants_that_it_computes_with() -> None:
    """Both halves use a product of two constants, which is computed in the first."""
    nodes = [
        helper.make_node("Mul", ["one", "other"], ["both"]),
        helper.make_node("Add", ["in", "both"], ["middle"]),
        helper.make_node("Mul", ["middle", "both"], ["out"]),
    ]
    constants = {"one": draw(6), "other": draw(6)}
    theirs, module = run_both(build(nodes, MAP, constants), MAP)
    images, tensors = torch.from_numpy(MAP), module.state_dict()
    (lone, _) = module.list_cut_points(images)
    for graph in module.graph.cut(lone):
        part = GraphModule(graph)
        part.load_state_dict({name: tensors[name] for name in part.state_dict()})
        images = part(images)
    np.testing.assert_allclose(images.detach().numpy(), theirs, atol=1e-6)


def test_what_older_opsets_say_by_attributes() -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["in"], ["a"], axes=[0]),
        helper.make_node("ReduceMean", ["a"], ["b"], axes=[2], keepdims=1),
        helper.make_node("Squeeze", ["b"], ["c"], axes=[0]),
        helper.make_node("Clip", ["c"], ["d"], min=-0.5, max=0.5),
        helper.make_node("Slice", ["d"], ["e"], starts=[1], ends=[3], axes=[2]),
        helper.make_node("Pad", ["e"], ["out"], pads=[0, 0, 1, 0, 0, 0, 0, 2]),
    ]
    graph = helper.make_graph(
        nodes, "old",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, list(MAP.shape))],
        [helper.make_empty_tensor_value_info("out")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 9)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=4).SerializeToString()
    theirs, module = run_both(model, MAP)
    np.testing.assert_allclose(module(torch.from_numpy(MAP)).numpy(), theirs, atol=1e-6)


def build_gelu(root, readers):
    """A GELU as exporters write it, or nearly."""
    nodes = [
        helper.make_node("Div", ["in", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["in", "c"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["e"]),
        helper.make_node("Add", ["e", readers], ["out"]),
    ]
    constants = {"root": np.float32(root), "one": np.float32(1), "half": np.float32(0.5)}
    return build(nodes, MAP, constants)


@pytest.mark.parametrize(
    ("root", "reader", "joined"),
    [(np.sqrt(2), "in", True), (1.5, "in", False), (np.sqrt(2), "c", False)],
)
def test_a_gelu_is_one_operation(root, reader, joined) -> None:
    theirs, module = run_both(build_gelu(root, reader), MAP)
    names = [node.operator for node in module.graph.nodes]
    assert names == (["Gelu", "Add"] if joined else ["Div", "Erf", "Add", "Mul", "Mul", "Add"])
    ours = module(torch.from_numpy(MAP)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_operator_is_tried() -> None:
    tried = {case[0] for case in CASES}
    others = {"Cast", "ConstantOfShape", "Equal", "Not", "Shape", "Split", "Where"}
    assert tried | others == set(OPERATORS)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([helper.make_node("Selu", ["in"], ["out"])], "Selu"),
        ([helper.make_node("CumSum", ["in", "c"], ["out"], reverse=1)], "reverse"),
        ([helper.make_node("Pad", ["in", "pads"], ["out"], mode="reflect")], "reflect"),
        ([helper.make_node("Resize", ["in", "", "", "sides"], ["out"], mode="cubic")], "cubic"),
        (
            [
                helper.make_node(
                    "Resize",
                    ["in", "", "", "sides"],
                    ["out"],
                    mode="nearest",
                    coordinate_transformation_mode="asymmetric",
                )
            ],
            "nearest with floor",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(nodes, words) -> None:
    constants = {"c": np.array(1, np.int64), "pads": whole(0, 0, 1, 1, 0, 0, 1, 1),
                 "sides": whole(2, 4, 9, 9)}  # fmt: skip

    def run():
        run_both(build(nodes, MAP, constants), MAP)[1](torch.from_numpy(MAP))

    with pytest.raises(DataError, match=words):
        run()


def test_no_model_is_a_data_error() -> None:
    with pytest.raises(DataError, match="ONNX model expected"):
        read_graph(b"not a model")
