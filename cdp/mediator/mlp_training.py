"""Training of the mediator's MLPs: each on the pairs outside its fold, validated on those inside.

The contract:
- Enters: labelled pairs with features, weights and folds. Leaves: the parameters of each MLP and a
  row for each validation.
- All MLPs draw their pairs from one sample of at most `settings.pair_budget` (`sample_pairs`).
- The same seed gives the same parameters, with any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from cdp.arrays.log_odds import to_probability
from cdp.arrays.threads import BLOCK, limit_blas, list_blocks
from cdp.errors import DataError
from cdp.mediator.mlp import Perceptron, Rows
from cdp.mediator.pair_sample import sample_pairs
from cdp.mediator.prior_shift import LOGIT_LIMIT
from cdp.mediator.settings import MediatorSettings

CHECK_STEPS = 1000
"""Training steps between two validations when an epoch is longer."""
_EPOCH_STEPS = 50
"""Least steps of an annealed epoch: batches are smaller where pairs are few."""
_LEAST_BATCH = 64
_RUN = 16
"""Rows of a sample that stay together when it is shuffled: memory is read in order. The sample
itself lies in random order."""
_FIRST_PAIRS = 20_000
_FIRST_EPOCHS = 3
"""Pairs and epochs of the MLP that measures how difficult each pair is."""


def train_ensemble(
    rows: Rows,
    held: np.ndarray,
    pair_weight: np.ndarray,
    settings: MediatorSettings,
    seed: int,
    workers: int,
) -> tuple[list[list[np.ndarray]], list[dict[str, float]]]:
    """Train every MLP.

    Parameters
    ----------
    rows : all labelled pairs; their weights in the loss are set here.
    held : (m, ensemble size) float32, the weight of each pair in each MLP's validation.
    pair_weight : (m,) float32 > 0.
    workers : threads: one each for as many MLPs, two each for those that are left.

    Returns
    -------
    Weights and biases of each MLP, layer after layer; and a row for each validation.
    """
    same, budget, difficulty = rows.truth > 0, settings.pair_budget, None
    with limit_blas():
        if budget is not None and len(same) > budget:
            difficulty = _measure_difficulty(rows, pair_weight, settings, seed, workers)
    chosen, weight = sample_pairs(same, pair_weight, budget, seed, difficulty)
    if len(chosen) < len(same):
        mixed = np.random.default_rng(seed).permutation(len(chosen))
        chosen, weight = chosen[mixed], weight[mixed]
        rows, held = rows.take(chosen), held[chosen]
    rows.weight[:] = weight
    count = settings.ensemble_size
    # as many as there are threads, a thread each; the rest two threads each
    alone = (count // workers * workers or count) if workers < 2 * count else 0
    with limit_blas(), ExitStack() as stack:

        def train(member: int) -> tuple[list[np.ndarray], list[dict[str, float]]]:
            helper = None if member < alone else stack.enter_context(ThreadPoolExecutor(1))
            own = held[:, member]
            network, history = _train_member(
                rows,
                np.flatnonzero(own == 0),
                np.flatnonzero(own),
                (own * weight)[own > 0],
                settings,
                seed,
                member,
                helper,
            )
            return network.layers, history

        trained: list[tuple[list[np.ndarray], list[dict[str, float]]]] = []
        for members, at_once in ((range(alone), workers), (range(alone, count), workers // 2)):
            pool = stack.enter_context(ThreadPoolExecutor(max(at_once, 1)))
            trained += pool.map(train, members)
    return [layers for layers, _ in trained], [row for _, history in trained for row in history]


def _measure_difficulty(
    rows: Rows, pair_weight: np.ndarray, settings: MediatorSettings, seed: int, workers: int
) -> np.ndarray:
    """|truth - probability| of each pair by one MLP trained briefly on few pairs, (m,) float32."""
    chosen, weight = sample_pairs(rows.truth > 0, pair_weight, _FIRST_PAIRS, seed)
    rows.weight[chosen] = weight
    brief = replace(settings, epochs=_FIRST_EPOCHS, patience=None)
    network, _ = _train_member(rows, chosen, chosen[:1], weight[:1], brief, seed, -1, None)
    difficulty = np.empty(len(rows.truth), np.float32)

    def measure(part: slice) -> None:
        places = np.arange(part.start, part.stop)
        logit = network.logits(rows, places)
        difficulty[part] = np.abs(rows.truth[part] - to_probability(logit, LOGIT_LIMIT))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(measure, list_blocks(0, len(difficulty), 64 * BLOCK)))
    return difficulty


def _train_member(
    rows: Rows,
    chosen: np.ndarray,
    held_rows: np.ndarray,
    held_weight: np.ndarray,
    settings: MediatorSettings,
    seed: int,
    member: int,
    helper: ThreadPoolExecutor | None,
) -> tuple[Perceptron, list[dict[str, float]]]:
    """One trained MLP, and a row for each validation.

    chosen : rows to train on. held_rows : rows to validate on. held_weight : their weights.
    """
    random = torch.Generator().manual_seed(seed * 1_000_003 + member % 1_000_003)
    width = rows.features.shape[1]
    network = Perceptron(
        width,
        settings.hidden or (3 * width, 3 * width),
        random,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        helper=helper,
    )
    history: list[dict[str, float]] = []
    best, best_loss, stale = network.value.copy(), math.inf, 0
    losses: list[float] = []
    for epoch, batch, is_check in _list_batches(chosen, settings, random, network):
        losses.append(network.learn(rows, batch))
        if not is_check:
            continue
        validation = _measure_loss(network, rows, held_rows, held_weight)
        history.append(
            {
                "member": member,
                "epoch": epoch,
                "training_loss": float(np.mean(losses)),
                "validation_loss": validation,
            }
        )
        losses.clear()
        if not math.isfinite(validation):
            raise DataError(
                f"mediator: the loss became {validation} in epoch {epoch + 1}; lower "
                f"mediator.learning_rate (now {settings.learning_rate}) or standardise"
            )
        if settings.patience is None or validation < best_loss:
            best[:] = network.value
            best_loss, stale = validation, 0
        else:
            stale += 1
        if settings.patience is not None and stale >= settings.patience:
            break
    network.value[:] = best
    return network, history


def _list_batches(
    chosen: np.ndarray, settings: MediatorSettings, random: torch.Generator, network: Perceptron
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """The epoch and the rows of each step, and whether to validate after it; sets the rate."""
    size = settings.batch_size
    if settings.anneal:
        size = min(size, max(len(chosen) // _EPOCH_STEPS, _LEAST_BATCH))
    steps = math.ceil(len(chosen) / size)
    run = 1 if settings.pair_budget is None else _RUN
    step = 0
    for epoch in range(settings.epochs):
        order = _shuffle(chosen, run, random)
        for start in range(0, len(order), size):
            if settings.anneal:
                passed = step / (steps * settings.epochs)
                network.rate = settings.learning_rate * (1 + math.cos(math.pi * passed)) / 2
            step += 1
            stop = start + size
            yield epoch, order[start:stop], stop >= len(order) or step % CHECK_STEPS == 0


def _shuffle(chosen: np.ndarray, run: int, random: torch.Generator) -> np.ndarray:
    """The rows in random order, `run` consecutive ones together."""
    runs = torch.randperm(math.ceil(len(chosen) / run), generator=random).numpy()
    place = (runs[:, None] * run + np.arange(run)).ravel()
    return chosen[place[place < len(chosen)]]


def _measure_loss(
    network: Perceptron, rows: Rows, held_rows: np.ndarray, held_weight: np.ndarray
) -> float:
    """The weighted cross-entropy of the held-out rows."""
    logits = network.logits(rows, held_rows).astype(np.float64)
    cross_entropy = np.logaddexp(0, logits) - logits * rows.truth[held_rows]
    return float(np.average(cross_entropy, weights=held_weight))
