"""An ONNX model, taken apart into a graph and its tensors.

The contract:
- Enters: the bytes of a file. Leaves: a `Graph`, as far as it leads to the output, and its tensors.
- Initializers of floats are weights; single numbers, the moments of batch normalisations and the
  graph's own constants stay as they are. All floats are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdp.errors import BackendError, DataError
from cdp.models.onnx_graph.graph import Graph, Node

_WEIGHED = ("Conv", "Gemm", "MatMul")
"""Operators whose constants are weights, even where an exporter did not make them initializers."""

_FIXED = {"BatchNormalization": 3, "Resize": 1}
"""Operator -> the place from which on its inputs are no weights."""


def read_graph(model: bytes, output: str | None = None) -> tuple[Graph, dict[str, Tensor]]:
    """Take an ONNX network apart.

    Parameters
    ----------
    model : bytes
        An .onnx file with one input.
    output : str or None
        Name of the output that is wanted; None for the only one.

    Returns
    -------
    graph : Graph
    tensors : dict of str to Tensor
        Its weights and constants.

    Raises
    ------
    DataError
        No ONNX network, or one with operators that are not trained here.
    BackendError
        The package onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BackendError(
            "the package onnx is needed to train a network that comes as ONNX: "
            "pip install 'cdp[onnx]'"
        ) from error
    try:
        graph = onnx.load_model_from_string(model).graph
    except Exception as error:  # protobuf's own exceptions differ between its implementations
        raise DataError(f"an ONNX model expected: {error}") from error
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    initial = set(arrays)
    nodes = []
    for node in graph.node:
        attributes = {each.name: _read_attribute(onnx, each) for each in node.attribute}
        if node.op_type == "Constant":
            arrays[node.output[0]] = np.asarray(next(iter(attributes.values())))
            continue
        if node.op_type == "Split":
            attributes["outputs"] = len(node.output)
        if node.op_type == "ConstantOfShape" and "value" in attributes:
            attributes["value"] = np.asarray(attributes["value"]).reshape(-1)[0].item()
        nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), attributes))
    inputs = [each.name for each in graph.input if each.name not in initial]
    outputs = [each.name for each in graph.output if output in (None, each.name)]
    if len(inputs) != 1 or len(outputs) != 1:
        raise DataError(
            f"one input and one output expected, found {', '.join(inputs)} and "
            f"{', '.join(each.name for each in graph.output)}; name the output (`output`)"
        )
    return _rename(nodes, arrays, initial, inputs[0], outputs[0])


def _read_attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return value if isinstance(value, int | float) else list(value)


def _rename(
    nodes: Sequence[Node],
    arrays: Mapping[str, np.ndarray],
    initial: set[str],
    start: str,
    end: str,
) -> tuple[Graph, dict[str, Tensor]]:
    """The graph with short names for its values, as far as it leads to the end, and its tensors."""
    kept = Graph(_join_gelu(nodes, arrays), {}, {}, {}, start, end).part(start, end).nodes
    fixed = {name for node in kept if node.operator in _FIXED
             for name in node.inputs[_FIXED[node.operator] :]}  # fmt: skip
    weighed = {name for node in kept if node.operator in _WEIGHED for name in node.inputs[1:]}
    names = {"": ""}
    numbers: dict[str, int | list[int]] = {}
    weights: dict[str, tuple[int, ...]] = {}
    constants: dict[str, tuple[str, tuple[int, ...]]] = {}
    tensors = {}
    for name in [name for node in kept for name in (*node.inputs, *node.outputs)]:
        if name in names:
            continue
        array = arrays.get(name)
        if array is None:
            names[name] = f"value{len(names)}"
        elif array.dtype.kind in "iu" and array.ndim <= 1:
            names[name] = f"number{len(names)}"
            numbers[names[name]] = array.tolist()
        else:
            tensor = torch.from_numpy(np.array(array))
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            trained = tensor.is_floating_point() and tensor.numel() > 1 and name not in fixed
            if trained and (name in initial or name in weighed):
                names[name] = f"weight{len(names)}"
                weights[names[name]] = tuple(tensor.shape)
            else:
                names[name] = f"constant{len(names)}"
                kind = str(tensor.dtype).removeprefix("torch.")
                constants[names[name]] = kind, tuple(tensor.shape)
            tensors[names[name]] = tensor
    renamed = tuple(
        Node(
            node.operator,
            tuple(names[name] for name in node.inputs),
            tuple(names.get(name, name) for name in node.outputs),
            node.attributes,
        )
        for node in kept
    )
    graph = Graph(renamed, numbers, weights, constants, names[start], names[end])
    return graph, tensors


def _join_gelu(nodes: Sequence[Node], arrays: Mapping[str, np.ndarray]) -> tuple[Node, ...]:
    """The nodes, where those that are a GELU, x / 2 (1 + erf(x / sqrt 2)), are one operation.

    As exporters write it: a division, erf, a sum and two products. Joined it trains faster, and
    remembers one map in place of four.
    """
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in nodes for name in node.outputs}

    def read_by(node: Node | None, operator: str, value: float | None = None) -> Node | None:
        """The one node that reads this one, if it is that operation, with that constant."""
        after = readers.get(node.outputs[0], []) if node else []
        if len(after) != 1 or after[0].operator != operator:
            return None
        constants = [arrays[name] for name in after[0].inputs if name in arrays]
        fits = value is None or any(np.allclose(each, value, rtol=1e-4) for each in constants)
        return after[0] if fits else None

    joined = {}
    for node in nodes:
        divided = makers.get(node.inputs[0]) if node.operator == "Erf" else None
        if divided is None or divided.operator != "Div" or divided.inputs[1] not in arrays:
            continue
        product = read_by(read_by(node, "Add", 1.0), "Mul")
        half = read_by(product, "Mul", 0.5)
        whole = np.allclose(arrays[divided.inputs[1]], np.sqrt(2), rtol=1e-4)
        if whole and half and product and divided.inputs[0] in product.inputs:
            joined[half.outputs[0]] = Node("Gelu", divided.inputs[:1], half.outputs, {})
    return tuple(joined.get(node.outputs[0], node) for node in nodes)
