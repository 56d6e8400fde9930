"""A ready network as a backbone: faces are enlarged to its side, its own layers embed them.

The contract:
- Before it is trained it makes the embeddings that the network makes of the enlarged faces; an L2
  normalisation at the network's end is left out, so that the norm can follow quality.
- The trunk ends at the last square feature map on which alone the later layers depend; where there
  is none, the embedding itself is the map, of side 1.
- The ending is the network's own, with a batch normalisation behind it, as all backbones have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import DataError
from cdp.images.preprocessing import Preprocessing
from cdp.models.backbone import Backbone, MapShape
from cdp.models.onnx_graph import Graph, GraphModule, read_graph


class PretrainedBackbone(Backbone):
    """Enlarges faces, then a network's layers up to its last map, then those behind it.

    network : as `read_network` describes it.
    """

    def __init__(self, network: Mapping[str, Any], embedding_dim: int) -> None:
        super().__init__()
        first, *rest = (GraphModule(Graph.of(each)) for each in network["graphs"])
        behind: list[nn.Module] = [*rest] or [nn.Flatten()]
        self.map_shape = self.early_shape = MapShape(*network["map"])
        self.trunk = _Trunk(Preprocessing(**network["shown"]), first)
        self.ending = nn.Sequential(*behind, nn.BatchNorm1d(embedding_dim, affine=False))

    def measure_maps(self) -> None:
        """The map's shape is part of the network's description; there is no early map."""


class _Trunk(nn.Module):
    """Enlargement and preprocessing, and the network's layers up to a feature map."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shown: Preprocessing, layers: GraphModule) -> None:
        super().__init__()
        assert shown.input_px is not None
        self.shown, self.side_px = shown, shown.input_px
        self.layers = layers
        for name, values in (("mean", shown.mean), ("scale", shown.scale)):
            each = np.broadcast_to(np.asarray(values, np.float32), 3).copy()
            self.register_buffer(name, torch.tensor(each)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, p, p) float in [-1, 1] to the map (b, c, s, s)."""
        size = (self.side_px, self.side_px)
        if tuple(images.shape[2:]) != size:
            images = functional.interpolate(images, size, mode="bilinear", align_corners=False)
        pixels = (images + 1) * 127.5
        if self.shown.channels == "bgr":
            pixels = pixels.flip(1)
        pixels = (pixels - self.mean) / self.scale
        if self.shown.layout == "nhwc":
            pixels = pixels.permute(0, 2, 3, 1)
        feature_map: Tensor = self.layers(pixels)
        return feature_map if feature_map.ndim == 4 else feature_map[:, :, None, None]


def read_network(
    model: bytes, shown: Preprocessing
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Take a face network apart for `PretrainedBackbone`.

    Parameters
    ----------
    model : bytes
        An .onnx file: faces to vectors (n, d).
    shown : Preprocessing
        With the side and the layout named.

    Returns
    -------
    network : dict of JSON values
        What `build_backbone` takes as `network`.
    tensors : dict of str to Tensor
        Its weights and constants, by their names in the backbone's state.
    embedding_dim : int
        d.

    Raises
    ------
    DataError, BackendError
        As `read_graph`; or it makes no vectors (n, d).
    """
    graph, tensors = read_graph(model, shown.output)
    graph = graph.part(graph.input, _find_unnormalised(graph))
    whole = GraphModule(graph)
    whole.load_state_dict({name: tensors[name] for name in whole.state_dict()})
    side = shown.input_px or 0
    faces = torch.zeros((2, side, side, 3) if shown.layout == "nhwc" else (2, 3, side, side))
    try:
        with torch.no_grad():
            lone = whole.list_cut_points(faces)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"it cannot be run on two faces of {side} px: {reason}") from error
    vectors = lone.get(graph.output, torch.Size())
    if len(vectors) != 2 or vectors[0] != 2:
        raise DataError(f"vectors (n, d) expected as its output, found {tuple(vectors)}")
    maps = [name for name, shape in lone.items() if len(shape) == 4 and shape[2] == shape[3] > 1]
    map_name = next((name for name in reversed(maps) if graph.cut(name)[0].weights), None)
    graphs = (graph,) if map_name is None else graph.cut(map_name)
    names = ("trunk.layers", "ending.0")
    found = {
        f"{place}.{name}": tensors[name]
        for place, part in zip(names, graphs, strict=False)
        for name in (*part.weights, *part.constants)
    }
    network = {
        "shown": json.loads(json.dumps(asdict(shown))),  # triples as lists, as they are read back
        "graphs": [each.describe() for each in graphs],
        "map": [vectors[1], 1] if map_name is None else list(lone[map_name][1:3]),
    }
    return network, found, int(vectors[1])


def _find_unnormalised(graph: Graph) -> str:
    """The embedding before the L2 normalisation, where the network ends in one; else its output."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    last = makers[graph.output]
    if last.operator == "LpNormalization":
        return last.inputs[0]
    if last.operator != "Div":
        return graph.output
    node = makers.get(last.inputs[1])
    while node is not None and node.operator in ("Clip", "Expand", "Add"):
        node = makers.get(node.inputs[0])
    divided = node is not None and node.operator == "ReduceL2" and node.inputs[0] == last.inputs[0]
    return last.inputs[0] if divided else graph.output
