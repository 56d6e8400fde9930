"""Data-parallel training: several processes train one model, with the result of one process.

The contract:
- Each process degrades its part of every batch and runs the trunk over it. The embeddings are
  gathered, and every process computes the heads and losses over the whole batch.
- Batch normalisations use the moments of the whole batch, and the trunk's gradients are summed:
  up to rounding, the weights are those of one process. A training that is itself unstable
  magnifies rounding, in one process as in many.
- Processes find each other by the environment variables of `torchrun`. Without them a team is one
  process, and nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cdp.errors import BackendError

_PATIENCE = timedelta(days=7)
"""How long the other processes wait while the first one runs other stages."""


@dataclass(frozen=True)
class Team:
    """This process's number, from 0, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes files and messages."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """First and last (excluded) of this process's part of `count` images."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size


def find_team() -> Team:
    """The team this process has joined, or a team of one."""
    if distributed.is_available() and distributed.is_initialized():
        return Team(distributed.get_rank(), distributed.get_world_size())
    return Team()


@contextmanager
def join_team() -> Iterator[Team]:
    """Join the processes that `torchrun` started, for the length of a block.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL; each process takes the GPU of its
    local number.

    Raises
    ------
    BackendError
        The processes cannot reach each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield find_team()
        return
    try:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"the processes of this training cannot reach each other: {error}. Start them by "
            "torchrun, all on machines that see the same address"
        ) from error
    try:
        yield find_team()
    finally:
        distributed.destroy_process_group()


def broadcast_text(text: str, team: Team) -> str:
    """The first process's text, in every process; the other processes' argument is ignored."""
    if team.size == 1:
        return text
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(encoded))
    distributed.broadcast(length, 0)
    if not int(length):
        return ""
    if not team.leads:
        encoded = torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(encoded, 0)
    return bytes(encoded.tolist()).decode()


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        distributed.all_reduce(total)
        return total


@contextmanager
def share_moments(network: nn.Module, team: Team) -> Iterator[None]:
    """Let batch normalisations use the moments of the whole batch, for the length of a block."""
    shared = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for module in shared if team.size > 1 else ():
        vars(module)["forward"] = partial(_normalise, module)
    try:
        yield
    finally:
        for module in shared:
            vars(module).pop("forward", None)


def _normalise(module: _BatchNorm, images: Tensor) -> Tensor:
    """Batch normalisation over the images of all processes."""
    if not module.training:
        return type(module).forward(module, images)
    dims = [0, *range(2, images.ndim)]
    shape = [1, -1, *[1] * (images.ndim - 2)]
    values = images.float()
    count = _Sum.apply(values.new_tensor(values.numel() / values.shape[1]))
    mean = _Sum.apply(values.sum(dims)) / count
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims)) / count
    if module.track_running_stats and module.running_mean is not None:
        with torch.no_grad():
            share = module.momentum if module.momentum is not None else 0.1
            module.running_mean.lerp_(mean, share)
            assert module.running_var is not None
            module.running_var.lerp_(variance * (count / (count - 1)), share)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked += 1
    result = centred * (variance + module.eps).rsqrt().view(shape)
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(images.dtype)


def gather_rows(own: Tensor, count: int, team: Team) -> Tensor:
    """The rows of all processes, (count, d); only this process's rows carry a gradient."""
    if team.size == 1:
        return own
    most = -(-count // team.size)
    padded = own.new_zeros(most, own.shape[1])
    padded[: len(own)] = own.detach()
    every = [torch.empty_like(padded) for _ in range(team.size)]
    distributed.all_gather(every, padded)
    parts = []
    for rank, rows in enumerate(every):
        first, last = Team(rank, team.size).part(count)
        parts.append(own if rank == team.rank else rows[: last - first])
    return torch.cat(parts)


def sum_gradients(parameters: Iterable[nn.Parameter], team: Team) -> None:
    """Add up the gradients of all processes, in place, in one message."""
    if team.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
