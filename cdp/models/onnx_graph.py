"""ONNX networks as torch modules whose weights can be trained further.

The contract:
- `read_graph` takes a network apart: a `Graph` in plain values, fit for JSON, and its tensors.
  `GraphModule` runs a graph as it is, so weights and graph together are the network.
- Initializers of floats are weights; single numbers, the moments of batch normalisations and the
  graph's own constants stay as they are.
- No code comes with a graph: its operators are those of `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cdp.errors import BackendError, DataError
from cdp.models.onnx_operators import OPERATORS

_WEIGHED = ("Conv", "Gemm", "MatMul")
"""Operators whose constants are weights, even where an exporter did not make them initializers."""

_FIXED = {"BatchNormalization": 3, "Resize": 1}
"""Operator -> the place from which on its inputs are no weights."""


@dataclass(frozen=True)
class Node:
    """One operation: names of values in and out ("" for one that is left out)."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """A network without its tensors.

    nodes : in an order in which they can be run.
    numbers : constant ints and lists of ints.
    weights : shapes of the tensors that are trained.
    constants : dtype and shape of those that are not.
    input, output : names of the values that go in and come out.
    """

    nodes: tuple[Node, ...]
    numbers: Mapping[str, int | list[int]]
    weights: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, tuple[str, tuple[int, ...]]]
    input: str
    output: str

    def describe(self) -> dict[str, Any]:
        """The graph in JSON values."""
        return {
            "nodes": [
                [node.operator, list(node.inputs), list(node.outputs), dict(node.attributes)]
                for node in self.nodes
            ],
            "numbers": dict(self.numbers),
            "weights": {name: list(shape) for name, shape in self.weights.items()},
            "constants": {name: [kind, list(s)] for name, (kind, s) in self.constants.items()},
            "input": self.input,
            "output": self.output,
        }

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Graph:
        """The graph that `describe` described."""
        return cls(
            tuple(
                Node(operator, tuple(inputs), tuple(outputs), attributes)
                for operator, inputs, outputs, attributes in described["nodes"]
            ),
            described["numbers"],
            {name: tuple(shape) for name, shape in described["weights"].items()},
            {name: (kind, tuple(s)) for name, (kind, s) in described["constants"].items()},
            described["input"],
            described["output"],
        )

    def until(self, output: str) -> Graph:
        """The nodes that lead to a value alone."""
        wanted, kept = {output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.inputs)
        return self._part(kept[::-1], self.input, output)

    def cut(self, at: str) -> tuple[Graph, Graph]:
        """The nodes up to a value, and those behind it; each keeps the tensors it reads."""
        place = next(number + 1 for number, node in enumerate(self.nodes) if at in node.outputs)
        first, second = self.nodes[:place], self.nodes[place:]
        return self._part(first, self.input, at), self._part(second, at, self.output)

    def _part(self, nodes: Sequence[Node], start: str, end: str) -> Graph:
        read = {name for node in nodes for name in node.inputs}
        return Graph(
            tuple(nodes),
            {name: value for name, value in self.numbers.items() if name in read},
            {name: shape for name, shape in self.weights.items() if name in read},
            {name: each for name, each in self.constants.items() if name in read},
            start,
            end,
        )


class GraphModule(nn.Module):
    """Runs a graph; its parameters are the graph's weights, its buffers the constants."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        unknown = {node.operator for node in graph.nodes} - set(OPERATORS)
        if unknown:
            raise DataError(
                f"operators {', '.join(sorted(unknown))} cannot be trained here; known are "
                f"{', '.join(OPERATORS)}"
            )
        self.graph = graph
        for name, shape in graph.weights.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, (kind, shape) in graph.constants.items():
            self.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, kind)))
        self._done = _find_last_uses(graph)

    def forward(self, images: Tensor) -> Tensor:
        """The value `output` of the graph for its `input`."""
        values: dict[str, Any] = {}
        for values in self._run(images):  # noqa: B007
            pass
        output: Tensor = values[self.graph.output]
        return output

    def list_lone_values(self, images: Tensor) -> dict[str, torch.Size]:
        """Values that all behind them is made of alone, in order, with their shapes: places to cut.

        images : (b, ...) float, as `forward`.
        """
        lone = {}
        constant = {"", *self.graph.numbers, *self.graph.weights, *self.graph.constants}
        for node, values in zip(self.graph.nodes, self._run(images), strict=True):
            if constant.issuperset(node.inputs):
                constant.update(node.outputs)
            left = values.keys() - constant
            if len(left) == 1:
                name = left.pop()
                if isinstance(values[name], Tensor):
                    lone[name] = values[name].shape
        return lone

    def _run(self, images: Tensor) -> Iterator[dict[str, Any]]:
        """The values by name after each node, without those that are not read again."""
        values: dict[str, Any] = {"": None, **self.graph.numbers, self.graph.input: images}
        values |= dict(self.named_parameters(recurse=False))
        values |= dict(self.named_buffers(recurse=False))
        for node, done in zip(self.graph.nodes, self._done, strict=True):
            found = OPERATORS[node.operator](
                [values[name] for name in node.inputs], node.attributes, images.device
            )
            values.update(
                zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False)
            )
            for name in done:
                del values[name]
            yield values


def _find_last_uses(graph: Graph) -> list[list[str]]:
    """Of each node, the values that no later node reads."""
    kept = {"", *graph.numbers, *graph.weights, *graph.constants, graph.output}
    done: list[list[str]] = []
    for node in reversed(graph.nodes):
        names = dict.fromkeys([*node.inputs, *node.outputs])
        done.append([name for name in names if name not in kept])
        kept.update(names)
    return done[::-1]


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
            value = next(iter(attributes.values()))
            arrays[node.output[0]] = np.asarray(value)
        elif node.op_type == "Split":
            attributes["outputs"] = len(node.output)
        if node.op_type == "ConstantOfShape" and "value" in attributes:
            attributes["value"] = np.asarray(attributes["value"]).reshape(-1)[0].item()
        if node.op_type != "Constant":
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
    kept = Graph(join_gelu(nodes, arrays), {}, {}, {}, start, end).until(end).nodes
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


def join_gelu(nodes: Sequence[Node], arrays: Mapping[str, np.ndarray]) -> tuple[Node, ...]:
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
