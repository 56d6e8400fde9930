"""The training loop: one backbone, one head a training set, batch by batch.

The contract:
- Everything drawn at random (order, degradation, flip, sampled classes) is a function of (seed,
  set, pass, image) and of nothing else. A run that is stopped after an epoch and resumed ends
  with the same bits as one that was not, on the CPU with the same number of torch threads.
- The loss is the mean of the training sets' losses, each weighted by its share among the sets with
  classes (Zhan et al. 2018, section 3.4), plus the mean distance to the teacher over all images
  that have one.
- Under `torchrun` the processes train one model together; see `cdp.training.distributed`.
- The state is a flat dict of CPU tensors: weights, heads, optimizer, averages, history. Nothing to
  pickle.
- Torch's random state, thread count and flags are left as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError, DataError, StageError
from cdp.models import Backbone
from cdp.progress import Progress, show_progress
from cdp.training.batches import Batches, Targets
from cdp.training.classification import classify, classify_bilaterally
from cdp.training.distributed import find_team, share_moments, sum_gradients
from cdp.training.observation import Observer, list_rows
from cdp.training.plan import HISTORY, State, TrainingPlan, resolve_device, resolve_precision
from cdp.training.sets import TrainingSet

_LOSS_CHECK_STEPS = 16


def train_model(
    backbone: Backbone,
    training_sets: Sequence[TrainingSet],
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
    training_sets : sequence of TrainingSet
    plan : TrainingPlan
    device : str
        "auto", "cpu", "cuda", ...
    resume : mapping or None
        A state that the same training passed to `on_epoch`. A finished one trains nothing.
    on_epoch : callable or None
        Called after each epoch with the state: the place to write a checkpoint. In a team of
        processes only the first calls it.
    progress : bool
        Show progress on stderr, see `cdp.progress`; in a team, only in the first process.
    description : str
        The label of the progress.

    Returns
    -------
    history : list of dict
        One record an epoch with the keys `HISTORY`, the epochs before `resume` included.

    Raises
    ------
    DataError
        No training set, or a state that does not fit.
    StageError
        The loss became infinite or NaN.
    """
    if not training_sets:
        raise DataError("nothing to train on: no training set was given")
    where = resolve_device(device)
    trainer = _Trainer(backbone, training_sets, plan, where)
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


class _Trainer:
    """The moving parts of one training, so that their state can be saved and restored."""

    def __init__(
        self,
        backbone: Backbone,
        training_sets: Sequence[TrainingSet],
        plan: TrainingPlan,
        device: torch.device,
    ) -> None:
        _check_teachers(training_sets, backbone.spec.embedding_dim)
        self.trains_heads = plan.class_weight > 0
        if not self.trains_heads and all(each.teacher is None for each in training_sets):
            raise ConfigError("class_weight 0 leaves nothing to learn without a teacher; raise it")
        self.backbone = backbone.to(device)
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.training_sets = training_sets
        self.plan = plan
        self.device = device
        self.precision = resolve_precision(plan.precision, device)
        heads = [each.head for each in training_sets if each.head is not None]
        self.heads = nn.ModuleList(heads).to(device)
        added = [module for each in training_sets for _, module in each.auxiliaries]
        self.auxiliaries = nn.ModuleList(added).to(device)
        self.team = find_team()
        self.batches = Batches(
            training_sets, plan, input_px=backbone.spec.input_px, device=device, team=self.team
        )
        self.counts, self.steps_per_epoch = self.batches.counts, self.batches.steps_per_epoch
        self.observer = Observer(backbone, training_sets, self.batches, self.precision)
        self.rows = list_rows(self.counts)
        for each in training_sets:
            for _, loss in each.auxiliaries:
                if each.label is not None:
                    loss.prepare(torch.from_numpy(np.ascontiguousarray(each.label)).to(device))
        self.classed = np.array([each.head is not None for each in training_sets])
        self.classed_count = int(np.array(self.counts) @ self.classed)
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

    def _weigh_sets(self, step: int) -> np.ndarray:
        """Each set's weight in the loss, (sets,) float64: its share among the sets with classes."""
        shares = self.batches.shares_at(step)
        weight: np.ndarray = shares * self.classed / max(float(shares @ self.classed), 1e-12)
        return weight

    def _loss(self, images: Tensor, targets: list[Targets], step: int = 0) -> tuple[Tensor, Tensor]:
        """The weighted loss of a batch, and the number of correctly classified images."""
        features, twins = self.observer.run(images, targets, step)
        progress = step / max(1, self.plan.epochs * self.steps_per_epoch)
        total = images.new_zeros(())
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        distance, followers = images.new_zeros(()), 0
        for each, rows, target, share in zip(
            self.training_sets, self.rows, targets, self._weigh_sets(step), strict=True
        ):
            part = features.embedding[rows]
            if each.head is not None and target.label is not None and self.trains_heads:
                if self.plan.sampling == "bilateral":
                    usual = self.plan.usual_share_at(step, self.steps_per_epoch)
                    loss, hits = classify_bilaterally(each.head, part, target, usual)
                else:
                    loss, hits = classify(each.head, part, target)
                for weight, added in each.auxiliaries:
                    seen = self.observer.show(added, each, target, rows, features, twins, progress)
                    loss = loss + weight * added.look(seen)
                weighted = loss if target.weight is None else loss * target.weight
                total = total + float(share) * weighted.mean()
                correct += hits
            if target.teacher is not None:
                cosine = functional.cosine_similarity(part, target.teacher)
                distance = distance + (1 - cosine).sum()
                followers += len(part)
        total = self.plan.class_weight * total
        if followers:
            total = total + self.plan.distil_weight * distance / followers
        return total, correct

    def _train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; its loss, and the number of correctly classified images."""
        images, targets = self.batches.load(step)
        with self._head_steps(step, targets):
            loss, correct = self._loss(images, targets, step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            sum_gradients(self.backbone.parameters(), self.team)
            if self.plan.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self._parameters(), self.plan.gradient_clip)
            self.optimizer.step()
        self._update_average(step)
        return loss.detach(), correct

    @contextmanager
    def _head_steps(self, step: int, targets: list[Targets]) -> Iterator[None]:
        """The step of every head that is trained, for the length of a block."""
        margin_share = self.plan.margin_share_at(step, self.steps_per_epoch)
        with ExitStack() as stack:
            for each, target in zip(self.training_sets, targets, strict=True):
                if each.head is not None and self.trains_heads:
                    classes = target.list_classes()
                    stack.enter_context(each.head.step(step, classes, margin_share, self.optimizer))
            yield

    def run_epoch(self, bar: Progress) -> None:
        started = time.perf_counter()
        self.backbone.train()
        self.heads.train()
        self.auxiliaries.train()
        first = self.epoch * self.steps_per_epoch
        loss_sum = torch.zeros((), device=self.device)
        correct_sum = torch.zeros((), dtype=torch.int64, device=self.device)
        for step in range(first, first + self.steps_per_epoch):
            rate = self.plan.learning_rate_at(step, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, correct = self._train_step(step)
            loss_sum += loss
            correct_sum += correct
            # Reading the loss makes a GPU wait, so it is read every few steps.
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
            float(correct_sum) / max(steps * self.classed_count, 1),
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
        """Everything that `load` restores: copies, contiguous, on the CPU."""
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
        """Continue after the epoch that `state` was saved at; `DataError` if it does not fit."""
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
        """Leave all modules in `eval` mode on the CPU, the backbone with its average."""
        if self.average is not None:
            self.backbone.load_state_dict(self.average)
        self.backbone.cpu().eval()
        self.heads.cpu().eval()
        self.auxiliaries.cpu().eval()


def _check_teachers(training_sets: Sequence[TrainingSet], embedding_dim: int) -> None:
    for each in training_sets:
        if each.teacher is not None and each.teacher.shape[1] != embedding_dim:
            raise DataError(
                f"teacher vectors of length {embedding_dim} expected, as the student's, got "
                f"{each.teacher.shape[1]}; bring them there by "
                "cdp.training.distillation.fit_target"
            )


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _as_record(row: Sequence[float]) -> dict[str, float]:
    record: dict[str, float] = dict(zip(HISTORY, row, strict=True))
    record["epoch"], record["step"] = int(row[0]), int(row[1])
    return record
