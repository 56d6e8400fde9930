"""A network as a graph of operators in plain values, and the torch module that runs it.

The contract:
- A `Graph` is fit for JSON and holds no tensor; with its tensors it is the network.
- No code comes with a graph: its operators are those of `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdp.errors import DataError
from cdp.models.onnx_graph.operators import OPERATORS


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

    def cut(self, at: str) -> tuple[Graph, Graph]:
        """What leads to a value, and what is made of it; each keeps the tensors it reads."""
        return self.part(self.input, at), self.part(at, self.output)

    def part(self, start: str, end: str) -> Graph:
        """The nodes that make one value of another."""
        wanted, kept = {end}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs) and start not in node.outputs:
                kept.append(node)
                wanted.update(node.inputs)
        return Graph(
            tuple(kept[::-1]),
            {name: value for name, value in self.numbers.items() if name in wanted},
            {name: shape for name, shape in self.weights.items() if name in wanted},
            {name: each for name, each in self.constants.items() if name in wanted},
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

    def list_cut_points(self, images: Tensor) -> dict[str, torch.Size]:
        """Values through which every path from input to output leads, in order, with their shapes.

        images : (b, ...) float, as `forward`.
        """
        points = {}
        constant = {"", *self.graph.numbers, *self.graph.weights, *self.graph.constants}
        for node, values in zip(self.graph.nodes, self._run(images), strict=True):
            if constant.issuperset(node.inputs):
                constant.update(node.outputs)
            left = values.keys() - constant
            name = left.pop() if len(left) == 1 else self.graph.input
            if name != self.graph.input and isinstance(values[name], Tensor):
                points[name] = values[name].shape
        return points

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
