"""The one training loop: a backbone, one head or several, images by number.

The contract:
- Everything drawn at random (order, degradation, flip) is a function of (seed, branch, pass, image)
  and of nothing else. A run that is stopped after an epoch and resumed ends with the same bits as
  one that was not, on the CPU with the same number of torch threads.
- A branch is a set of images with a head of its own. Each batch holds of each branch its share, and
  each branch's loss is weighted by that share (Zhan et al. 2018, section 3.4).
- The state is a flat dict of CPU tensors: weights, heads, optimizer, averages, history. Nothing to
  pickle.
- Torch's random state, thread count and flags are left as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cdp.errors import BackendError, ConfigError, DataError, StageError
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade
from cdp.models import Backbone
from cdp.models.heads import Head

State = dict[str, Tensor]

HISTORY = ("epoch", "step", "loss", "learning_rate", "accuracy", "seconds")
"""Keys of a history record: epochs and steps finished (from 1), the epoch's mean loss, its last
learning rate, its accuracy on the (degraded) training images in 0..1, its wall time."""

_LOSS_CHECK_STEPS = 16


@dataclass(frozen=True)
class Branch:
    """Images with labels and the head that learns them.

    head : Head
        Trained in place.
    images : (n, s, s, 3) uint8, RGB; a memory map will do
    label : (n,) int64 in 0..identities-1
    weight : (n,) float or None
        Factor on each image's loss, 0 or above; None is 1 for all.
    share : float or None
        Part of each batch, and weight of this branch's loss. None is the branch's part of all
        images. Shares are scaled to sum to 1.
    """

    head: Head
    images: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        count = len(self.images)
        if count == 0:
            raise DataError("a branch without images cannot be trained; leave it out")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                f"branch images (n, s, s, 3) uint8 expected, got {self.images.shape} "
                f"{self.images.dtype}"
            )
        if self.label.shape != (count,):
            raise DataError(f"{count} labels expected, got an array of {self.label.shape}")
        low, high = int(self.label.min()), int(self.label.max())
        if low < 0 or high >= self.head.identity_count:
            raise DataError(
                f"labels in 0..{self.head.identity_count - 1} expected, got {low}..{high}; "
                "leave unlabelled images out"
            )
        if self.weight is not None and (
            self.weight.shape != (count,)
            or not np.isfinite(self.weight).all()
            or self.weight.min() < 0
        ):
            raise DataError("a branch's weights must be (n,), finite and 0 or above")


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. The defaults suit ten epochs or so over some thousands of small faces."""

    epochs: int = 10
    batch_size: int = 32
    """Images a step, all branches together."""
    optimizer: str = "sgd"
    """"sgd" with Nesterov momentum, or "adamw" with betas (momentum, .999)."""
    learning_rate: float = 0.1
    """Its peak: reached linearly over the warm-up, left along a half cosine to 0."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On matrices and kernels; vectors (normalisations, biases) go free."""
    warmup_epochs: float = 1.0
    margin_warmup_epochs: float = 2.0
    """Over which the heads' margins grow from 0 to full."""
    gradient_clip: float | None = 5.0
    """Largest 2-norm of the gradient; None leaves it."""
    ema_decay: float | None = None
    """When given, the backbone ends with the exponential moving average of its weights."""
    degradation: Degradation = field(default_factory=lambda: DEGRADATIONS["none"])
    flip: bool = True
    """Mirror every other image."""
    precision: str = "auto"
    """"float32", "bfloat16", or "auto": bfloat16 where the hardware computes with it."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ConfigError(f"optimizer: sgd or adamw expected, got {self.optimizer!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(
                f"precision: auto, float32 or bfloat16 expected, got {self.precision!r}"
            )
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(
                f"epochs of 1 or more and batches of 2 or more expected, got {self.epochs} and "
                f"{self.batch_size}"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate above 0 expected, got {self.learning_rate}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay between 0 and 1 expected, got {self.ema_decay}")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" to the GPU where there is one, else the CPU; a name to its device.

    Raises
    ------
    BackendError
        The device asked for is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"device {str(device)!r} is not usable here ({str(error).splitlines()[0]}); "
            "choose cpu or auto"
        ) from error
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" to bfloat16 where the hardware has it; emulated it is ten times slower."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and any(
                getattr(torch.cpu, name, lambda: False)()
                for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            )
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def train_model(
    backbone: Backbone,
    branches: Sequence[Branch],
    plan: TrainingPlan,
    *,
    device: str | torch.device = "auto",
    resume: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[State], None] | None = None,
    progress: bool = True,
    description: str = "train",
) -> list[dict[str, float]]:
    """Train a backbone and its heads, in place.

    Parameters
    ----------
    backbone : Backbone
        Left in `eval` mode on the CPU; with the averaged weights when the plan has an EMA.
    branches : sequence of Branch
    plan : TrainingPlan
    device : str
        "auto", "cpu", "cuda", ...
    resume : mapping or None
        A state that `on_epoch` was given by the same training. A finished one trains nothing.
    on_epoch : callable or None
        Called after each epoch with the state: the place to write a checkpoint.
    progress : bool
        Show a progress bar on stderr.
    description : str
        Its title.

    Returns
    -------
    history : list of dict
        One record an epoch with the keys `HISTORY`, the epochs before `resume` included.

    Raises
    ------
    DataError
        No branch, or a state that does not fit.
    StageError
        The loss is not finite any more.
    """
    if not branches:
        raise DataError("nothing to train on: no branch with images was given")
    where = resolve_device(device)
    trainer = _Trainer(backbone, branches, plan, where)
    if resume is not None:
        trainer.load(resume)
    remaining = plan.epochs - trainer.epoch
    bar = tqdm(
        total=plan.epochs * trainer.steps_per_epoch,
        initial=trainer.epoch * trainer.steps_per_epoch,
        desc=description,
        unit="step",
        disable=not progress or remaining <= 0,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    with bar, _reproducible(where):
        for _ in range(remaining):
            trainer.run_epoch(bar)
            if on_epoch is not None:
                on_epoch(trainer.state())
    trainer.finish()
    return trainer.history


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """The same kernels in every run, for the length of a training."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


class _Order:
    """Which images a branch gives to each step: permutation after permutation, without end."""

    def __init__(self, count: int, seed: int, branch: int) -> None:
        self.count = count
        self.key = (seed, branch)
        self.current = -1
        self.permutation = self.seeds = np.empty(0, dtype=np.int64)

    def take(self, start: int, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """Places start..start+amount of the sequence: image numbers and their random seeds."""
        rows, seeds = [], []
        while amount > 0:
            number, offset = divmod(start, self.count)
            if number != self.current:
                rng = np.random.default_rng([*self.key, number])
                self.permutation = rng.permutation(self.count)
                self.seeds = rng.integers(0, 2**63 - 1, self.count)
                self.current = number
            part = self.permutation[offset : offset + amount]
            rows.append(part)
            seeds.append(self.seeds[part])
            start, amount = start + len(part), amount - len(part)
        return np.concatenate(rows), np.concatenate(seeds)


def _apportion(batch_size: int, shares: np.ndarray) -> list[int]:
    """Whole images of a batch by share, by largest remainder, at least 1 each."""
    exact = shares * batch_size
    counts = np.maximum(np.floor(exact), 1).astype(int)
    while counts.sum() < batch_size:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > batch_size and counts.max() > 1:
        counts[np.argmax(counts)] -= 1
    return [int(c) for c in counts]


class _Trainer:
    """The moving parts of one training, so that their state can be taken and put back."""

    def __init__(
        self,
        backbone: Backbone,
        branches: Sequence[Branch],
        plan: TrainingPlan,
        device: torch.device,
    ) -> None:
        self.backbone = backbone.to(device)
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.branches = branches
        self.plan = plan
        self.device = device
        self.precision = resolve_precision(plan.precision, device)
        self.heads = nn.ModuleList([branch.head for branch in branches]).to(device)
        sizes = np.array([len(branch.images) for branch in branches], dtype=float)
        wanted = [
            size / sizes.sum() if branch.share is None else branch.share
            for size, branch in zip(sizes, branches, strict=True)
        ]
        if min(wanted) <= 0:
            raise ConfigError(f"branch shares above 0 expected, got {wanted}")
        self.shares = np.array(wanted) / sum(wanted)
        self.counts = _apportion(plan.batch_size, self.shares)
        self.steps_per_epoch = math.ceil(sizes.sum() / plan.batch_size)
        self.orders = [_Order(int(n), plan.seed, i) for i, n in enumerate(sizes)]
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.optimizer = self._make_optimizer()
        self.average: State | None = None
        if plan.ema_decay is not None:
            self.average = {k: v.detach().clone() for k, v in backbone.state_dict().items()}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.backbone.parameters(), *self.heads.parameters()]
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": self.plan.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate, momentum = self.plan.learning_rate, self.plan.momentum
        if self.plan.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999))
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)

    def _rate(self, step: int) -> float:
        total = self.plan.epochs * self.steps_per_epoch
        warmup = self.plan.warmup_epochs * self.steps_per_epoch
        rising = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        done = max(0.0, step - warmup) / max(1.0, total - warmup)
        return self.plan.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * done))

    def _margin_share(self, step: int) -> float:
        length = self.plan.margin_warmup_epochs * self.steps_per_epoch
        return min(1.0, step / length) if length > 0 else 1.0

    def _batch(self, step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """Degraded images of all branches, and each branch's labels and weights."""
        pictures, targets = [], []
        side = self.backbone.spec.input_px
        for branch, order, count in zip(self.branches, self.orders, self.counts, strict=True):
            rows, drawn = order.take(step * count, count)
            images = torch.from_numpy(np.ascontiguousarray(branch.images[rows])).to(self.device)
            seeds = torch.from_numpy(drawn).to(self.device)
            degraded = degrade(images, seeds, self.plan.degradation, side)
            if self.plan.flip:
                mirrored = (seeds & 1).bool()[:, None, None, None]
                degraded = torch.where(mirrored, degraded.flip(3), degraded)
            pictures.append(degraded)
            weight = None
            if branch.weight is not None:
                weight = torch.from_numpy(branch.weight[rows].astype(np.float32)).to(self.device)
            label = torch.from_numpy(branch.label[rows].astype(np.int64)).to(self.device)
            targets.append((label, weight))
        batch = torch.cat(pictures) if len(pictures) > 1 else pictures[0]
        return batch.contiguous(memory_format=torch.channels_last), targets

    def _loss(
        self, images: Tensor, targets: list[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of a batch, and how many images were told right."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16
        ):
            embedding = self.backbone(images)
        total = images.new_zeros(())
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        parts = embedding.float().split(self.counts)
        for head, part, (label, weight), share in zip(
            self.heads, parts, targets, self.shares, strict=True
        ):
            loss, logits = head(part, label)
            total = total + float(share) * (loss if weight is None else loss * weight).mean()
            right += (logits.detach().argmax(1) == label).sum()
        return total, right

    def run_epoch(self, bar: Any) -> None:
        started = time.perf_counter()
        self.backbone.train()
        self.heads.train()
        parameters = [*self.backbone.parameters(), *self.heads.parameters()]
        first = self.epoch * self.steps_per_epoch
        loss_sum = torch.zeros((), device=self.device)
        right_sum = torch.zeros((), dtype=torch.int64, device=self.device)
        for step in range(first, first + self.steps_per_epoch):
            rate = self._rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for head in self.heads:
                assert isinstance(head, Head)
                head.margin_share = self._margin_share(step)
            loss, right = self._loss(*self._batch(step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.plan.gradient_clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.plan.gradient_clip)
            self.optimizer.step()
            self._update_average(step)
            loss_sum += loss.detach()
            right_sum += right
            # Reading the loss makes a GPU wait, so it is looked at now and then.
            if (step + 1) % _LOSS_CHECK_STEPS == 0 or step + 1 == first + self.steps_per_epoch:
                mean = float(loss_sum) / (step + 1 - first)
                if not math.isfinite(mean):
                    raise StageError(
                        f"training diverged: the loss became {mean} in epoch {self.epoch + 1} by "
                        f"step {step + 1}; lower learning_rate (now {self.plan.learning_rate:g}), "
                        "set gradient_clip, or look for broken images"
                    )
                bar.set_postfix(epoch=self.epoch + 1, loss=f"{mean:.3f}", refresh=False)
            bar.update()
        self.epoch += 1
        steps = self.steps_per_epoch
        record = (
            self.epoch,
            self.epoch * steps,
            float(loss_sum) / steps,
            rate,
            float(right_sum) / (steps * sum(self.counts)),
            time.perf_counter() - started,
        )
        self.history.append(_as_record(record))

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        if self.average is None or self.plan.ema_decay is None:
            return
        # A short memory at first, or the random start would stay in the average of a short run.
        decay = min(self.plan.ema_decay, (1 + step) / (10 + step))
        for key, value in self.backbone.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def state(self) -> State:
        """All of it, as `load` wants it back: copies, contiguous, on the CPU."""
        state: State = {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()}
        state |= {f"head.{k}": v for k, v in self.heads.state_dict().items()}
        state |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer.{number}.{k}": torch.as_tensor(v)
                for k, v in values.items()
                if v is not None
            }
        state["epoch"] = torch.tensor(self.epoch)
        rows = [[record[key] for key in HISTORY] for record in self.history]
        state["history"] = torch.tensor(rows, dtype=torch.float64)
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        try:
            self.epoch = int(state["epoch"])
            self.history = [_as_record(row) for row in state["history"].tolist()]
            self.backbone.load_state_dict(_under("backbone.", state))
            self.heads.load_state_dict(_under("head.", state))
            if self.average is not None:
                saved = _under("average.", state)
                for key, value in self.average.items():
                    value.copy_(saved[key])
            self._load_optimizer(_under("optimizer.", state))
        except (KeyError, RuntimeError, ValueError) as error:
            raise DataError(
                f"a checkpoint of this very training expected, but it does not fit: {error}; "
                "remove it to start from the first epoch"
            ) from error
        if self.epoch > self.plan.epochs:
            raise DataError(
                f"the checkpoint is of epoch {self.epoch}, the plan ends at {self.plan.epochs}; "
                "remove it to start from the first epoch"
            )

    def _load_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in saved.items():
            number, key = name.split(".", 1)
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:
                # In the parameter's own memory order, or vectorised sums differ in the last bit.
                self.optimizer.state[parameter][key] = torch.empty_like(
                    parameter, requires_grad=False
                ).copy_(value)
            else:
                self.optimizer.state[parameter][key] = value.clone()

    def finish(self) -> None:
        """Hand the backbone over: averaged, in `eval` mode, on the CPU."""
        if self.average is not None:
            self.backbone.load_state_dict(self.average)
        for head in self.heads:
            assert isinstance(head, Head)
            head.margin_share = 1.0
        self.backbone.cpu().eval()
        self.heads.cpu().eval()


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _as_record(row: Sequence[float]) -> dict[str, float]:
    record: dict[str, float] = dict(zip(HISTORY, row, strict=True))
    record["epoch"], record["step"] = int(row[0]), int(row[1])
    return record
