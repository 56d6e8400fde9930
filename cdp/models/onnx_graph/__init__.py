"""ONNX networks as torch modules whose weights can be trained further.

- `reading.py`: `read_graph`, an ONNX file taken apart into a graph and its tensors
- `graph.py`: `Graph` in plain values, and `GraphModule`, which runs it
- `operators.py`: `OPERATORS`, what each operator does
"""

from cdp.models.onnx_graph.graph import Graph, GraphModule
from cdp.models.onnx_graph.operators import OPERATORS
from cdp.models.onnx_graph.reading import read_graph

__all__ = ["OPERATORS", "Graph", "GraphModule", "read_graph"]
