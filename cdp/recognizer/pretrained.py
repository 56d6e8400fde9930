"""Ready networks that are trained further: an ONNX model as the backbone of a recognizer.

The contract:
- A network is taken as it is shown and used as a committee member; before it is trained it embeds
  faces of the recognizer's side as that member does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cdp.embedding import OnnxEmbedder
from cdp.errors import CdpError, ConfigError
from cdp.models import PRETRAINED, Backbone, build_backbone
from cdp.models.pretrained import read_network


def open_pretrained(
    embedder: OnnxEmbedder,
    *,
    input_px: int = 24,
    neck: str = "own",
    embedding_dim: int | None = None,
) -> Backbone:
    """The network of an embedder as a backbone with its weights, to be trained.

    Parameters
    ----------
    embedder : OnnxEmbedder
    input_px : int
        Side of the faces that the backbone reads; it enlarges them to the network's.
    neck : str
        "own", the network's ending, or a key of `NECKS`, with fresh weights.
    embedding_dim : int or None
        Length of the vectors; None, or without a neck, that of the network's.

    Raises
    ------
    ConfigError
        Another length than the network's without a neck.
    DataError
        An operator that cannot be trained, or a network without a fixed side.
    BackendError
        The package onnx is not installed.
    """
    given = embedder.preprocessing
    if embedder.input_px is None:
        raise ConfigError(f"{embedder.name}: its side is free; name it (`input_px`)")
    layout: Literal["nhwc", "nchw"] = "nhwc" if embedder.layout == "nhwc" else "nchw"
    shown = replace(given, input_px=embedder.input_px, layout=layout)
    try:
        network, tensors, found = read_network(embedder.model, shown)
    except CdpError as error:
        raise type(error)(f"{embedder.name}: {error}") from error
    if neck == "own" and embedding_dim not in (None, found):
        raise ConfigError(
            f"embedding_dim: {found} expected, the length of the vectors of {embedder.name}, got "
            f"{embedding_dim}"
        )
    backbone = build_backbone(
        PRETRAINED,
        input_px=input_px,
        embedding_dim=embedding_dim or found,
        neck=neck,
        network=network,
    )
    state = backbone.state_dict()
    state.update({name: value for name, value in tensors.items() if name in state})
    backbone.load_state_dict(state)
    return backbone
