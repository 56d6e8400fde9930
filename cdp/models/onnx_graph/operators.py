"""The operators of ONNX that face networks are made of, in torch, with gradients.

The contract:
- An operator is called with its inputs (None where one is left out), its attributes, and a
  device for what it makes; it returns one value, or a tuple where it has several outputs.
- A value is a tensor, or numbers: an int or a list of ints. Integers of at most one dimension are
  numbers, so that sides and axes are known where a tensor's would not be (while a graph is traced).
- Networks are trained further as they are used: batch normalisation keeps its moments, and dropout
  does nothing.

Source: the operator specification of ONNX, opsets 9 to 21.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import DataError

Attributes = Mapping[str, Any]
Operator = Callable[[Sequence[Any], Attributes, torch.device], Any]

_FLOATS = (1, 10, 11, 16)
"""Numbers of ONNX's types of floats; all are float32 here."""
_BOOL = 9


def _elementwise(of_tensors: Callable[..., Tensor], of_numbers: Callable[..., Any]) -> Operator:
    """An elementwise operator, on tensors or on numbers."""

    def apply(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
        if any(isinstance(value, Tensor) for value in inputs):
            return of_tensors(*(_as_tensor(value, device) for value in inputs))
        longest = max((len(value) for value in inputs if isinstance(value, list)), default=0)
        if not longest:
            return of_numbers(*inputs)
        spread = [value if isinstance(value, list) else [value] for value in inputs]
        return [
            of_numbers(*(value[at if len(value) > 1 else 0] for value in spread))
            for at in range(longest)
        ]

    return apply


def _of_tensor(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda inputs, attributes, device: function(inputs[0])


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, device=device)


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [int(value)]


def _optional(inputs: Sequence[Any], at: int, attributes: Attributes, name: str) -> Any:
    """What newer opsets give as an input and older ones as an attribute; None without it."""
    given = inputs[at] if len(inputs) > at else None
    return attributes.get(name) if given is None else given


def _pad_sides(attributes: Attributes, sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Rows above, columns left, rows below, columns right."""
    way = attributes.get("auto_pad", "NOTSET")
    if way in ("NOTSET", ""):
        return list(attributes.get("pads", [0, 0, 0, 0]))
    if way == "VALID":
        return [0, 0, 0, 0]
    strides = attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    before, after = [], []
    for side, size, stride, dilation in zip(sides, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(side / stride) - 1) * stride + dilation * (size - 1) + 1 - side)
        less, more = total // 2, total - total // 2
        before.append(less if way == "SAME_UPPER" else more)
        after.append(more if way == "SAME_UPPER" else less)
    return before + after


def _padded(
    images: Tensor, attributes: Attributes, kernel: Sequence[int], value: float = 0.0
) -> tuple[Tensor, list[int]]:
    """The images and what is left to pad alike on both ends; pads itself where ends differ."""
    top, left, bottom, right = _pad_sides(attributes, images.shape[2:], kernel)
    if (top, left) == (bottom, right) and value == 0:
        return images, [top, left]
    return functional.pad(images, (left, right, top, bottom), value=value), [0, 0]


def _convolve(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    images, weight = inputs[:2]
    images, pads = _padded(images, attributes, weight.shape[2:])
    return functional.conv2d(
        images,
        weight,
        inputs[2] if len(inputs) > 2 else None,
        stride=attributes.get("strides", [1, 1]),
        padding=pads,
        dilation=attributes.get("dilations", [1, 1]),
        groups=attributes.get("group", 1),
    )


def _pool_largest(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    kernel = attributes["kernel_shape"]
    images, pads = _padded(inputs[0], attributes, kernel, -math.inf)
    strides = attributes.get("strides", [1, 1])
    return functional.max_pool2d(
        images, kernel, strides, pads, ceil_mode=bool(attributes.get("ceil_mode", 0))
    )


def _pool_mean(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    kernel = attributes["kernel_shape"]
    strides = attributes.get("strides", [1, 1])
    rounded_up = bool(attributes.get("ceil_mode", 0))

    def pool(images: Tensor, counted: bool) -> Tensor:
        padded, pads = _padded(images, attributes, kernel)
        return functional.avg_pool2d(padded, kernel, strides, pads, rounded_up, counted)

    counted, pads = bool(attributes.get("count_include_pad", 0)), attributes.get("pads", [0] * 4)
    if counted or ("auto_pad" not in attributes and pads[:2] == pads[2:]):
        return pool(inputs[0], counted)
    return pool(inputs[0], True) / pool(torch.ones_like(inputs[0][:1, :1]), True)


def _normalise_batch(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    images, scale, shift, mean, variance = inputs
    return functional.batch_norm(
        images, mean, variance, scale, shift, eps=attributes.get("epsilon", 1e-5)
    )


def _normalise_layer(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    shape = inputs[0].shape[attributes.get("axis", -1) :]
    shift = inputs[2] if len(inputs) > 2 else None
    return functional.layer_norm(
        inputs[0], shape, inputs[1], shift, eps=attributes.get("epsilon", 1e-5)
    )


def _multiply_general(
    inputs: Sequence[Any], attributes: Attributes, device: torch.device
) -> Tensor:
    left, right = inputs[:2]
    if attributes.get("transA", 0):
        left = left.mT
    if not attributes.get("transB", 0):
        right = right.mT
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if alpha == beta == 1 and (len(inputs) < 3 or inputs[2] is None or inputs[2].ndim == 1):
        return functional.linear(left, right, inputs[2] if len(inputs) > 2 else None)
    product = alpha * (left @ right.mT)
    return product + beta * inputs[2] if len(inputs) > 2 else product


def _transpose(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    order = attributes.get("perm", list(range(inputs[0].ndim))[::-1])
    transposed: Tensor = inputs[0].permute(order)
    return transposed


def _reshape(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, shape = inputs[0], _as_list(inputs[1])
    if not isinstance(given, Tensor):
        return given if shape else _as_list(given)[0]
    if not attributes.get("allowzero", 0):
        shape = [given.shape[at] if side == 0 else side for at, side in enumerate(shape)]
    return given.reshape(shape)


def _flatten(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    given, axis = inputs[0], attributes.get("axis", 1)
    flat: Tensor = given.flatten(1) if axis == 1 else given.flatten(axis).flatten(0, axis - 1)
    return flat


def _unsqueeze(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, axes = inputs[0], _as_list(_optional(inputs, 1, attributes, "axes"))
    if not isinstance(given, Tensor):
        return _as_list(given)
    rank = given.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        given = given.unsqueeze(axis)
    return given


def _squeeze(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, axes = inputs[0], _optional(inputs, 1, attributes, "axes")
    if not isinstance(given, Tensor):
        return _as_list(given)[0]
    return given.squeeze() if axes is None else given.squeeze(tuple(_as_list(axes)))


def _concatenate(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    if not any(isinstance(value, Tensor) for value in inputs):
        return [number for value in inputs for number in _as_list(value)]
    return torch.cat([_as_tensor(value, device) for value in inputs], attributes["axis"])


def _split(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, axis = inputs[0], attributes.get("axis", 0)
    sizes = _optional(inputs, 1, attributes, "split")
    if sizes is None:
        return tuple(given.chunk(attributes["outputs"], axis))
    return tuple(given.split(_as_list(sizes), axis))


def _slice(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given = inputs[0]
    starts, ends = (
        _as_list(_optional(inputs, at, attributes, name))
        for at, name in ((1, "starts"), (2, "ends"))
    )
    axes = _optional(inputs, 3, attributes, "axes")
    steps = _as_list(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    if not isinstance(given, Tensor):
        return _as_list(given)[slice(starts[0], ends[0], steps[0])]
    for start, end, axis, step in zip(
        starts, ends, _as_list(axes) if axes is not None else range(len(starts)), steps, strict=True
    ):
        if step > 0:
            given = given[(slice(None),) * (axis % given.ndim) + (slice(start, end, step),)]
        else:
            size = given.shape[axis]
            rows = range(size)[slice(start, None if end < -size else end, step)]
            given = given.index_select(axis, torch.tensor(list(rows), device=given.device))
    return given


def _gather(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, rows, axis = inputs[0], inputs[1], attributes.get("axis", 0)
    if not isinstance(given, Tensor):
        numbers = _as_list(given)
        return [numbers[row] for row in rows] if isinstance(rows, list) else numbers[rows]
    if isinstance(rows, int):
        return given.select(axis, rows)
    if isinstance(rows, list):
        return given.index_select(axis, torch.tensor(rows, device=given.device))
    found = given.index_select(axis, rows.flatten())
    axis %= given.ndim
    return found.reshape(*given.shape[:axis], *rows.shape, *given.shape[axis + 1 :])


def _cast(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    given, kind = inputs[0], attributes["to"]
    if kind in _FLOATS:
        return _as_tensor(given, device).float()
    if not isinstance(given, Tensor):
        return given
    return given.bool() if kind == _BOOL else given.long()


def _fill(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    shape, value = _as_list(inputs[0]), attributes.get("value", 0.0)
    if isinstance(value, int) and not isinstance(value, bool) and len(shape) == 1:
        return [value] * shape[0]
    return torch.full(shape, value, device=device)


def _expand(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    given, shape = inputs[0], _as_list(inputs[1])
    own = [1] * (len(shape) - given.ndim) + list(given.shape)
    before, last = own[: -len(shape)], own[-len(shape) :]
    kept = [mine if side == 1 else side for mine, side in zip(last, shape, strict=True)]
    expanded: Tensor = given.expand(before + kept)
    return expanded


def _clip(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    low, high = _optional(inputs, 1, attributes, "min"), _optional(inputs, 2, attributes, "max")
    return torch.clamp(
        inputs[0],
        None if low is None else _as_tensor(low, device),
        None if high is None else _as_tensor(high, device),
    )


def _reducing(function: Callable[..., Tensor]) -> Operator:
    """An operator that takes one number of each group of axes."""

    def reduce(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
        axes = _optional(inputs, 1, attributes, "axes")
        over = list(range(inputs[0].ndim)) if axes is None else _as_list(axes)
        return function(inputs[0], dim=over, keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _pad(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    if attributes.get("mode", "constant") != "constant":
        raise DataError(f"Pad: mode constant expected, got {attributes['mode']}")
    pads = _as_list(_optional(inputs, 1, attributes, "pads"))
    half = len(pads) // 2
    ends = [side for axis in reversed(range(half)) for side in (pads[axis], pads[half + axis])]
    value = inputs[2] if len(inputs) > 2 and inputs[2] is not None else 0.0
    return functional.pad(inputs[0], ends, value=float(value))


_RESIZINGS = {
    ("linear", "half_pixel"): {"mode": "bilinear", "align_corners": False},
    ("linear", "pytorch_half_pixel"): {"mode": "bilinear", "align_corners": False},
    ("linear", "align_corners"): {"mode": "bilinear", "align_corners": True},
    ("nearest", "asymmetric"): {"mode": "nearest"},
}
"""Mode and transformation of coordinates -> what torch calls them."""


def _resize(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    way = (
        attributes.get("mode", "nearest"),
        attributes.get("coordinate_transformation_mode", "half_pixel"),
    )
    sizes = inputs[3] if len(inputs) > 3 else None
    if sizes is None:
        scales = [float(scale) for scale in inputs[2]]
        sizes = [int(side * by) for side, by in zip(inputs[0].shape, scales, strict=True)]
    rounded = way[0] == "nearest" and attributes.get("nearest_mode") != "floor"
    if way not in _RESIZINGS or rounded or attributes.get("antialias", 0):
        raise DataError(f"Resize: linear, or nearest with floor, expected, got {' '.join(way)}")
    return functional.interpolate(inputs[0], list(sizes[2:]), **_RESIZINGS[way])  # type: ignore[arg-type]


def _sum_up(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise DataError("CumSum: neither exclusive nor reverse expected")
    return inputs[0].cumsum(_as_list(inputs[1])[0])  # type: ignore[no-any-return]


def _choose(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Any:
    if not any(isinstance(value, Tensor) for value in inputs):
        return _elementwise(torch.where, lambda say, one, other: one if say else other)(
            inputs, attributes, device
        )
    return torch.where(*(_as_tensor(value, device) for value in inputs))


def _divide_tensors(one: Tensor, other: Tensor) -> Tensor:
    whole = not (one.is_floating_point() or other.is_floating_point())
    return torch.div(one, other, rounding_mode="trunc" if whole else None)


def _with_slope(inputs: Sequence[Any], attributes: Attributes, device: torch.device) -> Tensor:
    return functional.prelu(inputs[0], inputs[1].flatten())


OPERATORS: dict[str, Operator] = {
    "Add": _elementwise(torch.add, operator.add),
    "AveragePool": _pool_mean,
    "BatchNormalization": _normalise_batch,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenate,
    "ConstantOfShape": _fill,
    "Conv": _convolve,
    "Cos": _of_tensor(torch.cos),
    "CumSum": _sum_up,
    "Div": _elementwise(_divide_tensors, operator.floordiv),
    "Dropout": lambda inputs, attributes, device: inputs[0],
    "Equal": _elementwise(torch.eq, operator.eq),
    "Erf": _of_tensor(torch.erf),
    "Exp": _of_tensor(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda inputs, attributes, device: functional.gelu(
        inputs[0], approximate=attributes.get("approximate", "none")
    ),
    "Gemm": _multiply_general,
    "GlobalAveragePool": lambda inputs, attributes, device: inputs[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda inputs, attributes, device: torch.clamp(
        attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5), 0, 1
    ),
    "HardSwish": _of_tensor(functional.hardswish),
    "Identity": lambda inputs, attributes, device: inputs[0],
    "LayerNormalization": _normalise_layer,
    "LeakyRelu": lambda inputs, attributes, device: functional.leaky_relu(
        inputs[0], attributes.get("alpha", 0.01)
    ),
    "LpNormalization": lambda inputs, attributes, device: functional.normalize(
        inputs[0], attributes.get("p", 2), attributes.get("axis", -1)
    ),
    "MatMul": lambda inputs, attributes, device: inputs[0] @ inputs[1],
    "MaxPool": _pool_largest,
    "Mul": _elementwise(torch.mul, operator.mul),
    "Neg": _elementwise(torch.neg, operator.neg),
    "Not": _elementwise(torch.logical_not, operator.not_),
    "PRelu": _with_slope,
    "Pad": _pad,
    "Pow": _elementwise(torch.pow, operator.pow),
    "ReduceL2": _reducing(torch.linalg.vector_norm),
    "ReduceMean": _reducing(torch.mean),
    "ReduceSum": _reducing(torch.sum),
    "Relu": _of_tensor(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda inputs, attributes, device: list(
        inputs[0].shape[attributes.get("start", 0) : attributes.get("end")]
    ),
    "Sigmoid": _of_tensor(torch.sigmoid),
    "Sin": _of_tensor(torch.sin),
    "Slice": _slice,
    "Softmax": lambda inputs, attributes, device: inputs[0].softmax(attributes.get("axis", -1)),
    "Split": _split,
    "Sqrt": _of_tensor(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub, operator.sub),
    "Tanh": _of_tensor(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _choose,
}
"""Name of an operator -> what it does."""
