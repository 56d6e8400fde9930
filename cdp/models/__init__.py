"""Backbones by name, and their weights as plain tensors.

The contract:
- `BACKBONES` lists every family; `build_backbone` is the one way to make one, `pack_model` and
  `unpack_model` the one way to write its weights down and get it back.
- A packed model is a flat dict of contiguous CPU tensors and a dict of strings: what a safetensors
  file holds, so that nothing is pickled and nothing is executed on load.
- Building is deterministic given `seed` and leaves torch's random state as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdp.errors import ConfigError, DataError
from cdp.models.backbone import Backbone, BackboneSpec, Features, Neck
from cdp.models.dense import DenseBackbone
from cdp.models.inception import InceptionBackbone
from cdp.models.mixer import MixerBackbone
from cdp.models.necks import NECKS
from cdp.models.plain import PlainBackbone
from cdp.models.pretrained import PretrainedBackbone
from cdp.models.residual import ResidualBackbone
from cdp.models.separable import SeparableBackbone

__all__ = [
    "BACKBONES",
    "NECKS",
    "PRETRAINED",
    "Backbone",
    "BackboneSpec",
    "Features",
    "Neck",
    "build_backbone",
    "load_model",
    "pack_model",
    "save_model",
    "unpack_model",
]

BACKBONES: dict[str, type[Backbone]] = {
    "residual": ResidualBackbone,
    "dense": DenseBackbone,
    "plain": PlainBackbone,
    "inception": InceptionBackbone,
    "separable": SeparableBackbone,
    "mixer": MixerBackbone,
}
"""Family name -> class, called with (input_px, embedding_dim, width)."""

PRETRAINED = "pretrained"
"""Name of a backbone that is a ready network."""

_SPEC_KEY = "cdp.backbone"


def build_backbone(
    name: str,
    *,
    input_px: int = 24,
    embedding_dim: int = 128,
    width: float = 1.0,
    neck: str = "own",
    network: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Backbone:
    """Make a backbone with fresh weights.

    Parameters
    ----------
    name : str
        A key of `BACKBONES`, or `PRETRAINED` with the layers of `network`.
    input_px : int
        Side of its input, in pixels; 8 or more. The families are made for 16..32.
    embedding_dim : int
        Length of its output.
    width : float
        Factor on all channel counts.
    neck : str
        "own", the family's ending, or a key of `NECKS`.
    network : mapping of JSON values, or None
        As `read_network` describes it; its weights are loaded by `load_state_dict`.
    seed : int
        Of the initial weights.

    Raises
    ------
    ConfigError
        An unknown name, or a size that cannot be built.
    """
    if name not in BACKBONES and network is None:
        raise ConfigError(f"unknown backbone {name!r}; choose one of: {', '.join(BACKBONES)}")
    if input_px < 8:
        raise ConfigError(f"backbone {name}: input_px must be 8 or more, got {input_px}")
    if embedding_dim < 1:
        raise ConfigError(f"backbone {name}: embedding_dim must be 1 or more, got {embedding_dim}")
    if not width > 0:
        raise ConfigError(f"backbone {name}: width must be above 0, got {width}")
    if neck != "own" and neck not in NECKS:
        raise ConfigError(f"unknown neck {neck!r}; choose one of: own, {', '.join(NECKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network is None:
            backbone = BACKBONES[name](input_px, embedding_dim, width)
        else:
            backbone = PretrainedBackbone(network, embedding_dim)
        backbone.spec = BackboneSpec(name, input_px, embedding_dim, width, neck, network)
        backbone.measure_maps()
        if neck != "own":
            backbone.ending = NECKS[neck](backbone.map_shape, backbone.early_shape, embedding_dim)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # as for normalisation
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def pack_model(
    backbone: Backbone, meta: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A backbone as tensors and strings.

    Parameters
    ----------
    backbone : Backbone
        Made by `build_backbone`.
    meta : mapping of str to JSON values
        Whatever should travel with the weights.

    Returns
    -------
    tensors : dict of str to Tensor
        Weights and buffers, copied, contiguous, on the CPU.
    metadata : dict of str to str
        The spec and `meta`, each value as JSON: fit for a safetensors header.
    """
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in backbone.state_dict().items()
    }
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in (meta or {}).items()}
    metadata[_SPEC_KEY] = json.dumps(backbone.spec.describe(), sort_keys=True)
    return tensors, metadata


def unpack_model(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Backbone, dict[str, Any]]:
    """The backbone that `pack_model` packed, in `eval` mode, and its `meta`.

    Raises
    ------
    DataError
        The metadata names no backbone, or the weights do not fit the one it names.
    """
    if _SPEC_KEY not in metadata:
        raise DataError(
            f"no {_SPEC_KEY!r} in the model's metadata, only: {', '.join(metadata) or 'nothing'}; "
            "this is not a model of ours: an ONNX file is opened by OnnxEmbedder"
        )
    try:
        recipe = json.loads(metadata[_SPEC_KEY])
        with torch.device("meta"):  # shapes without memory: the header may ask for any size
            shapes = {k: v.shape for k, v in build_backbone(**recipe).state_dict().items()}
        if shapes != {key: value.shape for key, value in tensors.items()}:
            raise ValueError("they are others, or of other shapes")
        backbone = build_backbone(**recipe)
        backbone.load_state_dict(dict(tensors))
        meta = {key: json.loads(value) for key, value in metadata.items() if key != _SPEC_KEY}
    except (ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(
            f"weights that fit the backbone {metadata[_SPEC_KEY][:200]} expected: {error}"
        ) from error
    return backbone.eval(), meta


def save_model(path: str | Path, backbone: Backbone, meta: Mapping[str, Any] | None = None) -> None:
    """Write a backbone and its `meta` to a safetensors file (not atomic: the caller's to do)."""
    tensors, metadata = pack_model(backbone, meta)
    save_file(tensors, str(path), metadata=metadata)


def load_model(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """Read what `save_model` wrote: the backbone in `eval` mode, and its `meta`.

    Raises
    ------
    DataError
        The file is missing, is no safetensors file, or holds no backbone of ours.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"a safetensors model expected at {path}: {error}") from error
    try:
        return unpack_model(tensors, metadata)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
