"""The MLP of the mediator, compiled: two hidden layers, ReLU, the logit of a two-way softmax.

The contract:
- Enters: rows chosen from a matrix of features, standardised when read, and their labels. Leaves:
  parameters; `score_rows` computes the logits of an ensemble from them.
- Training runs in compiled code, `CHUNK` rows at a time, which with all weights stay in the second
  cache: for a network this small, a call for every product and every ReLU costs more than the
  arithmetic.
- A row has the same score wherever it stands among others (`cdp.mediator.row_products`).
- A batch is always summed as two halves, so that a second thread changes nothing. The same seed
  gives the same parameters.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from cdp.arrays.cosine import as_readonly
from cdp.arrays.threads import limit_blas
from cdp.mediator.row_products import multiply, rounds_alike

STANDARD_LIMIT = 8.0
"""A standardised input is clipped to +- this: no labelled pair trains the region beyond."""


ARRAY_NAMES = (
    *("mean", "inverse_deviation", "calibration"),
    *("weight_0", "bias_0", "weight_1", "bias_1", "weight_2", "bias_2"),
)


def score_rows(
    features: np.ndarray,
    arrays: dict[str, np.ndarray],
    clip: bool,
    threads: int = 1,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """Raw logits of each pair by each MLP, (m, ensemble size) float64; 0 where not `wanted`."""
    out = np.zeros((len(features), len(arrays["bias_2"])), np.float64)
    weights = [arrays[name] for name in ARRAY_NAMES if name != "calibration"]
    limit = np.float32(STANDARD_LIMIT if clip else np.inf)
    features = as_readonly(features)
    if wanted is None:
        wanted = np.ones(out.shape, bool)
    layers = arrays["weight_0"].shape[1:], arrays["weight_1"].shape[1:]

    def run(rows: slice) -> None:
        _score_block(features[rows], wanted[rows], *weights, limit, by_blas, out[rows])  # type: ignore[call-arg]

    with limit_blas():
        by_blas = all(rounds_alike(CHUNK, *layer) for layer in layers)
        if threads <= 1:
            run(slice(None))
            return out
        edges = np.linspace(0, len(features), threads + 1).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, [slice(a, b) for a, b in pairwise(edges)]))
    return out


CHUNK = 256
"""Rows at a time: 256 rows of three layers and all weights fit 512 KiB."""
_NO_MASK = np.empty((0, 0), np.float32)


class Rows:
    """The training rows of an MLP: raw features, standardised when read, and their labels.

    features : (m, F) float32, C order, maybe mapped. mean, inverse : (F,) float32; a row is read as
        `(features - mean) * inverse`, clipped to +- `limit`. truth : (m,) float32, 0 or 1.
    weight : (m,) float32 >= 0, of each row in the loss; None: 1 each.
    """

    def __init__(
        self,
        features: np.ndarray,
        truth: np.ndarray,
        mean: np.ndarray,
        inverse: np.ndarray,
        limit: float = np.inf,
        weight: np.ndarray | None = None,
    ) -> None:
        self.features, self.truth = as_readonly(features), truth
        self.weight = np.ones(len(truth), np.float32) if weight is None else weight
        self.how = (mean, inverse, np.float32(limit))

    def take(self, chosen: np.ndarray) -> Rows:
        """Some rows, copied, in the order of `chosen`."""
        mean, inverse, limit = self.how
        truth, weight = self.truth[chosen], self.weight[chosen]
        return Rows(self.features[chosen], truth, mean, inverse, float(limit), weight)


class Perceptron:
    """One MLP in training: parameters, gradients and optimizer state, flat with views by layer.

    width : inputs. hidden : widths of the two hidden layers.
    optimizer : "adam" (AdamW, Loshchilov & Hutter 2019) or "sgd" (momentum .9).
    random : draws the initial weights (Glorot & Bengio 2010) and the dropout masks.
    helper : one thread that computes half of each batch; None: this thread computes both.
    """

    def __init__(
        self,
        width: int,
        hidden: tuple[int, int],
        random: torch.Generator,
        *,
        optimizer: str = "adam",
        learning_rate: float = 0.002,
        weight_decay: float = 1e-4,
        dropout: float = 0.0,
        helper: ThreadPoolExecutor | None = None,
    ) -> None:
        first, second = hidden
        shapes = [(width, first), (first,), (first, second), (second,), (second, 2), (2,)]
        sizes = [math.prod(shape) for shape in shapes]
        edges = np.cumsum([0, *sizes])

        def split(flat: np.ndarray) -> list[np.ndarray]:
            return [
                flat[low : low + size].reshape(shape)
                for low, size, shape in zip(edges, sizes, shapes, strict=False)
            ]

        self.random, self.dropout, self.helper = random, dropout, helper
        self.adam, self.rate, self.decay = optimizer == "adam", learning_rate, weight_decay
        self.steps = 0
        self.value = np.zeros(edges[-1], np.float32)
        self.halves = np.zeros((2, edges[-1]), np.float32)
        self._memory = np.zeros((2, edges[-1]), np.float32)
        self.layers = split(self.value)
        self._gradients = [split(half) for half in self.halves]
        for weight in self.layers[::2]:
            torch.nn.init.xavier_uniform_(torch.from_numpy(weight), generator=random)

    @property
    def gradient(self) -> np.ndarray:
        """(p,) float32, of the last batch."""
        return self.halves.sum(0)

    def logits(self, rows: Rows, chosen: np.ndarray) -> np.ndarray:
        """The logits of the chosen rows, (len(chosen),) float32, without dropout."""
        out = np.empty(len(chosen), np.float32)
        _compute_logits(rows.features, chosen, *rows.how, *self.layers, out)  # type: ignore[call-arg]
        return out

    def learn(self, rows: Rows, chosen: np.ndarray) -> float:
        """One step on the chosen rows, (b,) int64; their mean weighted cross-entropy before it."""
        masks = [_NO_MASK, _NO_MASK]
        if self.dropout:
            masks = [self._draw_mask(len(chosen), len(self.layers[at])) for at in (1, 3)]
        middle = len(chosen) // 2

        def run(half: int) -> float:
            part = slice(middle, None) if half else slice(0, middle)
            own = [mask[part] if len(mask) else mask for mask in masks]
            return _add_gradients(  # type: ignore[call-arg]
                rows.features, chosen[part], rows.truth, rows.weight, *rows.how, *own,
                *self.layers, *self._gradients[half], len(chosen),
            )  # fmt: skip

        if self.helper is None:
            loss = run(0) + run(1)
        else:
            later = self.helper.submit(run, 1)
            loss = run(0) + later.result()
        self.steps += 1
        _update(
            self.value, *self.halves, *self._memory, self.adam, self.rate, self.decay, self.steps
        )  # type: ignore[call-arg]
        return loss

    def _draw_mask(self, rows: int, width: int) -> np.ndarray:
        keep = torch.rand(rows, width, generator=self.random) >= self.dropout
        return (keep / (1 - self.dropout)).float().numpy()


def _compile(function: Any) -> Any:
    """Compile; sums may be reordered and fused for SIMD, NaN and infinity keep their meaning."""
    return numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})(function)


@_compile
def _read_rows(features, rows, mean, inverse, limit, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for n in range(len(rows)):
        for i in range(len(mean)):
            value = (features[rows[n], i] - mean[i]) * inverse[i]
            out[n, i] = min(max(value, -limit), limit)


@_compile
def _activate(bias, mask, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for n in range(len(out)):
        for j in range(len(bias)):
            out[n, j] = max(out[n, j] + bias[j], np.float32(0))
        if len(mask):
            for j in range(len(bias)):
                out[n, j] *= mask[n, j]


@_compile
def _forward(x, weight, bias, mask, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    np.dot(x, weight, out)
    _activate(bias, mask, out)


@_compile
def _compute_logit(row, bias, difference):  # type: ignore[no-untyped-def]  # pragma: no cover
    logit = bias[1] - bias[0]
    for j in range(len(difference)):
        logit += row[j] * difference[j]
    return logit


@_compile
def _backward(back, active, mask, grad_bias):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Backpropagate through a layer's ReLU and dropout; add up the gradients of its biases."""
    for m in range(len(back)):
        for j in range(len(grad_bias)):
            back[m, j] = back[m, j] if active[m, j] > 0 else np.float32(0)
        if len(mask):
            for j in range(len(grad_bias)):
                back[m, j] *= mask[m, j]
        for j in range(len(grad_bias)):
            grad_bias[j] += back[m, j]


@_compile
def _compute_logits(  # type: ignore[no-untyped-def]  # pragma: no cover
    features, rows, mean, inverse, limit,
    weight_0, bias_0, weight_1, bias_1, weight_2, bias_2, out,
):  # fmt: skip
    x = np.empty((CHUNK, len(mean)), np.float32)
    a = np.empty((CHUNK, len(bias_0)), np.float32)
    b = np.empty((CHUNK, len(bias_1)), np.float32)
    difference = weight_2[:, 1] - weight_2[:, 0]
    none = np.empty((0, 0), np.float32)
    for low in range(0, len(rows), CHUNK):
        part = rows[low : low + CHUNK]
        n = len(part)
        _read_rows(features, part, mean, inverse, limit, x[:n])
        _forward(x[:n], weight_0, bias_0, none, a[:n])
        _forward(a[:n], weight_1, bias_1, none, b[:n])
        for m in range(n):
            out[low + m] = _compute_logit(b[m], bias_2, difference)


@_compile
def _score_block(  # type: ignore[no-untyped-def]  # pragma: no cover
    features, wanted, mean, inverse,
    weight_0, bias_0, weight_1, bias_1, weight_2, bias_2, limit, by_blas, out,
):  # fmt: skip
    """`CHUNK` rows at a time, a short last chunk filled up, so that all products have one shape."""
    members, width, first = weight_0.shape
    second = weight_1.shape[2]
    x = np.zeros((CHUNK, width), np.float32)
    a = np.empty((CHUNK, first), np.float32)
    b = np.empty((CHUNK, second), np.float32)
    none = np.empty((0, 0), np.float32)
    chosen = np.empty(CHUNK, np.int64)
    for member in range(members):
        row = 0
        while row < len(features):
            n = 0
            while row < len(features) and n < CHUNK:
                if wanted[row, member]:
                    chosen[n] = row
                    n += 1
                row += 1
            if not n:
                break
            _read_rows(features, chosen[:n], mean, inverse, limit, x[:n])
            multiply(x, weight_0[member], by_blas, a)
            _activate(bias_0[member], none, a)
            multiply(a, weight_1[member], by_blas, b)
            _activate(bias_1[member], none, b)
            for m in range(n):
                total = np.float64(bias_2[member])
                for j in range(second):
                    total += np.float64(b[m, j]) * weight_2[member, j]
                out[chosen[m], member] = total


@_compile
def _add_gradients(  # type: ignore[no-untyped-def]  # pragma: no cover
    features, rows, truth, weight, mean, inverse, limit, mask_0, mask_1,
    weight_0, bias_0, weight_1, bias_1, weight_2, bias_2,
    grad_weight_0, grad_bias_0, grad_weight_1, grad_bias_1, grad_weight_2, grad_bias_2, count,
):  # fmt: skip
    """Fill in the gradients of these rows' part of the mean loss over `count` rows; that part."""
    first, second = len(bias_0), len(bias_1)
    for grad_weight in (grad_weight_0, grad_weight_1, grad_weight_2):
        grad_weight[:] = 0
    for grad_bias in (grad_bias_0, grad_bias_1, grad_bias_2):
        grad_bias[:] = 0
    x = np.empty((CHUNK, len(mean)), np.float32)
    a, back_a = np.empty((CHUNK, first), np.float32), np.empty((CHUNK, first), np.float32)
    b, back_b = np.empty((CHUNK, second), np.float32), np.empty((CHUNK, second), np.float32)
    part_0, part_1 = np.empty_like(grad_weight_0), np.empty_like(grad_weight_1)
    difference = weight_2[:, 1] - weight_2[:, 0]
    output = np.zeros(second, np.float32)
    share = np.float32(1 / count)
    loss = 0.0
    for low in range(0, len(rows), CHUNK):
        part = rows[low : low + CHUNK]
        n = len(part)
        drop_0, drop_1 = mask_0[low : low + n], mask_1[low : low + n]
        _read_rows(features, part, mean, inverse, limit, x[:n])
        _forward(x[:n], weight_0, bias_0, drop_0, a[:n])
        _forward(a[:n], weight_1, bias_1, drop_1, b[:n])
        for m in range(n):
            logit = _compute_logit(b[m], bias_2, difference)
            answer, own = truth[part[m]], weight[part[m]]
            small = np.exp(-abs(logit))
            loss += own * (max(logit, np.float32(0)) - logit * answer + np.log1p(small))
            probability = 1 / (1 + small) if logit >= 0 else small / (1 + small)
            error = np.float32(probability - answer) * own * share
            grad_bias_2[1] += error
            for j in range(second):
                output[j] += b[m, j] * error
                back_b[m, j] = error * difference[j]
        _backward(back_b[:n], b[:n], drop_1, grad_bias_1)
        np.dot(a[:n].T, back_b[:n], part_1)
        np.dot(back_b[:n], weight_1.T, back_a[:n])
        _backward(back_a[:n], a[:n], drop_0, grad_bias_0)
        np.dot(x[:n].T, back_a[:n], part_0)
        grad_weight_0 += part_0
        grad_weight_1 += part_1
    grad_bias_2[0] = -grad_bias_2[1]
    grad_weight_2[:, 0] = -output
    grad_weight_2[:, 1] = output
    return loss * share


@_compile
def _update(  # type: ignore[no-untyped-def]  # pragma: no cover
    value, half_0, half_1, momentum, square, adam, rate, decay, steps
):
    rate, decay = np.float32(rate), np.float32(decay)
    keep = np.float32(1) - rate * decay
    root = np.float32(1 / np.sqrt(1 - 0.999**steps))
    step = np.float32(rate / (1 - 0.9**steps))
    for i in range(len(value)):
        gradient = half_0[i] + half_1[i]
        if adam:
            momentum[i] += np.float32(0.1) * (gradient - momentum[i])
            square[i] = np.float32(0.999) * square[i] + np.float32(0.001) * gradient * gradient
            spread = np.sqrt(square[i]) * root + np.float32(1e-8)
            value[i] = value[i] * keep - step * momentum[i] / spread
        else:
            momentum[i] = np.float32(0.9) * momentum[i] + gradient + decay * value[i]
            value[i] -= rate * momentum[i]
