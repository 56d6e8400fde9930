"""The one training loop: a backbone, one head or several, images by number.

The contract:
- Everything drawn at random (order, degradation, flip, sampled classes) is a function of (seed,
  branch, pass, image) and of nothing else. A run that is stopped after an epoch and resumed ends
  with the same bits as one that was not, on the CPU with the same number of torch threads.
- Each batch holds of each branch its share. The loss is the branches' losses, each weighted by its
  share among those with classes (Zhan et al. 2018, section 3.4), plus the distance to the teacher
  over all images that have one.
- Under `torchrun` the processes train one model together; see `cdp.training.distributed`.
- The state is a flat dict of CPU tensors: weights, heads, optimizer, averages, history. Nothing to
  pickle.
- Torch's random state, thread count and flags are left as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError, DataError, StageError
from cdp.images.degradation import degrade
from cdp.models import Backbone
from cdp.models.heads import Head
from cdp.progress import Progress, show_progress
from cdp.training.batches import Order, apportion
from cdp.training.distributed import find_team, gather_rows, share_moments, sum_gradients
from cdp.training.plan import HISTORY, State, TrainingPlan, resolve_device, resolve_precision
from cdp.training.sets import Branch

_LOSS_CHECK_STEPS = 16

_LOOKAHEAD_IMAGES = 256
"""Images degraded at once, for some steps ahead: twice as fast as 32 at a time."""


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
        Called after each epoch with the state: the place to write a checkpoint. In a team of
        processes the first alone is asked.
    progress : bool
        Show progress on stderr, see `cdp.progress`; in a team, the first process alone.
    description : str
        The label of the progress.

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
    shown = show_progress(
        plan.epochs * trainer.steps_per_epoch,
        initial=trainer.epoch * trainer.steps_per_epoch,
        label=description,
        unit="step",
        enabled=progress and remaining > 0 and trainer.team.leads,
    )
    with shown as bar, _reproducible(where), share_moments(trainer.backbone, trainer.team):
        for _ in range(remaining):
            trainer.run_epoch(bar)
            if on_epoch is not None and trainer.team.leads:
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


class _Target(NamedTuple):
    """What is known of one branch's images in a batch.

    label : (b,) int64 or None, where there are no classes
    weight : (b,) float32 or None, where all weigh 1
    soft : (place (e,) int64, class (e,) int64, share (e,) float32) or None
    masked : (e, 2) int64 or None, a line of what the head is shown and a class
    teacher : (b, d) float32 or None
    """

    label: Tensor | None
    weight: Tensor | None
    soft: tuple[Tensor, Tensor, Tensor] | None
    masked: Tensor | None
    teacher: Tensor | None


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
        heads = [branch.head for branch in branches if branch.head is not None]
        self.heads = nn.ModuleList(heads).to(device)
        added = [module for branch in branches for _, module in branch.auxiliaries]
        self.auxiliaries = nn.ModuleList(added).to(device)
        sizes = np.array([len(branch.images) for branch in branches], dtype=float)
        wanted = [
            size / sizes.sum() if branch.share is None else branch.share
            for size, branch in zip(sizes, branches, strict=True)
        ]
        if min(wanted) <= 0:
            raise ConfigError(f"branch shares above 0 expected, got {wanted}")
        self.shares = np.array(wanted) / sum(wanted)
        self.counts = apportion(plan.batch_size, self.shares)
        classed = np.array([branch.head is not None for branch in branches])
        self.loss_shares = self.shares * classed / max(float(self.shares @ classed), 1e-12)
        self.asks_heads = plan.class_weight > 0
        if not self.asks_heads and all(branch.teacher is None for branch in branches):
            raise ConfigError("class_weight 0 leaves nothing to learn without a teacher; raise it")
        self.classed_count = int(np.array(self.counts) @ classed)
        self.team = find_team()
        if self.team.size > plan.batch_size:
            raise ConfigError(
                f"an image a process expected, got batches of {plan.batch_size} for "
                f"{self.team.size} processes; raise batch_size or start fewer"
            )
        dim = backbone.spec.embedding_dim
        for branch in branches:
            if branch.teacher is not None and branch.teacher.shape[1] != dim:
                raise DataError(
                    f"teacher vectors of length {dim} expected, as the student's, got "
                    f"{branch.teacher.shape[1]}; bring them there by "
                    "cdp.training.distillation.fit_target"
                )
        self.steps_per_epoch = math.ceil(sizes.sum() / plan.batch_size)
        self.orders = [Order(branch, plan.seed, i) for i, branch in enumerate(branches)]
        self.lookahead = max(1, _LOOKAHEAD_IMAGES // plan.batch_size)
        self.block = -1
        self.shown: list[tuple[np.ndarray, Tensor | None]] = []
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.optimizer = self._make_optimizer()
        self.average: State | None = None
        if plan.ema_decay is not None:
            self.average = {k: v.detach().clone() for k, v in backbone.state_dict().items()}

    def _parameters(self) -> list[nn.Parameter]:
        return [
            *self.backbone.parameters(),
            *self.heads.parameters(),
            *self.auxiliaries.parameters(),
        ]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = self._parameters()
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

    def _batch(self, step: int) -> tuple[Tensor, list[_Target]]:
        """Degraded images of all branches, this process's part; what is known of all of them."""
        block, place = divmod(step, self.lookahead)
        if block != self.block:
            self.block, self.shown = block, self._show_block(block)
        pictures, targets = [], []
        for branch, count, (rows, faces) in zip(
            self.branches, self.counts, self.shown, strict=True
        ):
            targets.append(self._describe(branch, rows[place * count : (place + 1) * count]))
            if faces is not None:
                pictures.append(faces[place])
        batch = torch.cat(pictures) if len(pictures) > 1 else pictures[0]
        return batch.contiguous(memory_format=torch.channels_last), targets

    def _show_block(self, block: int) -> list[tuple[np.ndarray, Tensor | None]]:
        """A few steps at once, a branch: all rows, and this process's faces (steps, b, 3, s, s).

        Blocks begin at fixed steps, so that a resumed training makes the very same ones.
        """
        start = block * self.lookahead
        steps = min(self.lookahead, self.plan.epochs * self.steps_per_epoch - start)
        shown: list[tuple[np.ndarray, Tensor | None]] = []
        first, last = self.team.part(sum(self.counts))
        for branch, order, count in zip(self.branches, self.orders, self.counts, strict=True):
            rows, seeds = order.take(start * count, steps * count)
            own = np.arange(count)[max(first, 0) : max(last, 0)]
            mine = (np.arange(steps)[:, None] * count + own).ravel()
            faces = None
            if len(own):
                faces = self._show(branch, rows[mine], seeds[mine])
                faces = faces.unflatten(0, (steps, len(own)))
            shown.append((rows, faces))
            first, last = first - count, last - count
        return shown

    def _show(self, branch: Branch, rows: np.ndarray, drawn: np.ndarray) -> Tensor:
        """Some images of a branch, degraded and mirrored by their seeds."""
        images = torch.from_numpy(np.ascontiguousarray(branch.images[rows])).to(self.device)
        seeds = torch.from_numpy(drawn).to(self.device)
        degraded = degrade(images, seeds, self.plan.degradation, self.backbone.spec.input_px)
        if self.plan.flip:
            mirrored = (seeds & 1).bool()[:, None, None, None]
            degraded = torch.where(mirrored, degraded.flip(3), degraded)
        return degraded

    def _describe(self, branch: Branch, rows: np.ndarray) -> _Target:
        def send(values: np.ndarray, kind: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).to(self.device)

        label = None if branch.label is None else branch.label[rows]
        soft = masked = None
        lines, own = np.arange(len(rows)), label
        if branch.soft is not None and label is not None:
            lines, own, shares = branch.soft.take(rows, label)
            soft = send(lines, np.int64), send(own, np.int64), send(shares, np.float32)
        if branch.masked is not None and own is not None:
            # An image with several classes is shown once for each, and masked the others.
            place, classes = branch.masked.take(rows[lines])
            foreign = classes != own[place]
            masked = send(np.stack([place, classes], 1)[foreign], np.int64)
        return _Target(
            None if label is None else send(label, np.int64),
            None if branch.weight is None else send(branch.weight[rows], np.float32),
            soft,
            masked,
            None if branch.teacher is None else send(branch.teacher[rows], np.float32),
        )

    def _loss(self, images: Tensor, targets: list[_Target]) -> tuple[Tensor, Tensor]:
        """The weighted loss of a batch, and how many images were told right."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16
        ):
            embedding = self.backbone(images)
        total = images.new_zeros(())
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        away, taught = images.new_zeros(()), 0
        parts = gather_rows(embedding.float(), sum(self.counts), self.team).split(self.counts)
        for branch, part, target, share in zip(
            self.branches, parts, targets, self.loss_shares, strict=True
        ):
            if branch.head is not None and target.label is not None and self.asks_heads:
                loss, hits = _judge(branch.head, part, target)
                for weight, added in branch.auxiliaries:
                    loss = loss + weight * added(part, target.label)
                weighted = loss if target.weight is None else loss * target.weight
                total = total + float(share) * weighted.mean()
                right += hits
            if target.teacher is not None:
                away = away + (1 - functional.cosine_similarity(part, target.teacher)).sum()
                taught += len(part)
        total = self.plan.class_weight * total
        if taught:
            total = total + self.plan.distil_weight * away / taught
        return total, right

    def _train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; its loss, and how many images were told right."""
        images, targets = self._batch(step)
        for branch, target in zip(self.branches, targets, strict=True):
            if branch.head is not None and target.label is not None and self.asks_heads:
                branch.head.margin_share = self._margin_share(step)
                seen = target.label if target.soft is None else target.soft[1]
                branch.head.begin_step(torch.cat([target.label, seen]), step, self.optimizer.state)
        loss, right = self._loss(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sum_gradients(self.backbone.parameters(), self.team)
        if self.plan.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.plan.gradient_clip)
        self.optimizer.step()
        for branch in self.branches:
            if branch.head is not None and self.asks_heads:
                branch.head.end_step(self.optimizer.state)
        self._update_average(step)
        return loss.detach(), right

    def run_epoch(self, bar: Progress) -> None:
        started = time.perf_counter()
        self.backbone.train()
        self.heads.train()
        self.auxiliaries.train()
        first = self.epoch * self.steps_per_epoch
        loss_sum = torch.zeros((), device=self.device)
        right_sum = torch.zeros((), dtype=torch.int64, device=self.device)
        for step in range(first, first + self.steps_per_epoch):
            rate = self._rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, right = self._train_step(step)
            loss_sum += loss
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
            float(right_sum) / max(steps * self.classed_count, 1),
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
        state |= {f"auxiliary.{k}": v for k, v in self.auxiliaries.state_dict().items()}
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
            self.auxiliaries.load_state_dict(_under("auxiliary.", state))
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
        self.auxiliaries.cpu().eval()


def _judge(head: Head, embedding: Tensor, target: _Target) -> tuple[Tensor, Tensor]:
    """The head's loss an image (b,), and how many it tells right."""
    assert target.label is not None
    if target.soft is None:
        loss, logits = head(embedding, target.label, target.masked)
    else:
        place, classes, share = target.soft
        losses, logits = head(embedding[place], classes, target.masked)
        loss = torch.zeros_like(losses[: len(embedding)]).index_add(0, place, share * losses)
        # The logits carry no margin, so those of any of an image's classes will do: its first.
        logits = logits[torch.searchsorted(place, torch.arange(len(loss), device=place.device))]
    return loss, (logits.detach().argmax(1) == head.place(target.label)).sum()


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _as_record(row: Sequence[float]) -> dict[str, float]:
    record: dict[str, float] = dict(zip(HISTORY, row, strict=True))
    record["epoch"], record["step"] = int(row[0]), int(row[1])
    return record
