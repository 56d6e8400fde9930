"""Training of a restorer on sharp faces, against a discriminator of two questions.

The contract:
- Small pictures are degraded here from the sharp ones, by seed; no pairs are needed.
- What is not a face is made here too: faces whose cells are shuffled.
- Everything drawn follows from the seed: the same values give the same weights.

Source: Bai et al. 2018, section 3: the squared errors of both generators, and the cross-entropies
of both answers of the discriminator, weighed by alpha and beta, which are set by hand. Read: a
re-implementation (EthanGuan/Finding-Tiny-Faces-with-GAN), which sums the squared errors over the
pixels and has alpha .0001, beta .001, Adam with .0001, a tenth of it after 3 of 6 epochs, batches
of 8. Ours: mean squared errors, so alpha .001 and beta .01 weigh more here than there; a learning
rate of .001, and a tenth of it for the discriminator, for small networks without trained weights;
shuffled faces as the background, and the term `identity`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError, DataError
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade
from cdp.images.twins import shuffle_cells
from cdp.models import Backbone
from cdp.progress import show_progress
from cdp.restoration.network import (
    ENLARGEMENT,
    Discriminator,
    Restorer,
    build_restorer,
)
from cdp.training.plan import resolve_device


@dataclass(frozen=True)
class RestorationPlan:
    """How to train a restorer."""

    small_px: int = 12
    """Side of the small faces; restored ones are four times as large."""
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    """Of the generators; the discriminator has a tenth. Adam, betas .9 and .999."""
    adversary: float = 0.001
    """alpha: weight of looking real."""
    face: float = 0.01
    """beta: weight of looking like a face where it is one, and unlike one where not."""
    identity: float = 0.0
    """Weight of 1 - cosine between a recognizer's vectors of the restored and the sharp face."""
    degradation: Degradation = field(default_factory=lambda: DEGRADATIONS["none"])
    """Of the small faces, beside their reduction."""
    width: int = 16
    blocks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.small_px < 4 or self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                f"small_px of 4, a step and a picture or more expected, got {self.small_px}, "
                f"{self.steps} and {self.batch_size}"
            )
        if min(self.adversary, self.face, self.identity) < 0 or not self.learning_rate > 0:
            raise ConfigError("weights of 0 or above and a learning rate above 0 expected")


def train_restorer(
    faces: np.ndarray,
    plan: RestorationPlan | None = None,
    *,
    recognizer: Backbone | None = None,
    device: str = "auto",
    progress: bool = True,
) -> tuple[Restorer, list[dict[str, float]]]:
    """Train a restorer.

    Parameters
    ----------
    faces : (n, s, s, 3) uint8, RGB
        Sharp aligned faces, of four times `plan.small_px` or more.
    plan : RestorationPlan or None
        None is the default one.
    recognizer : Backbone or None
        In `eval` mode; for `plan.identity`. It sees the faces at its own side.
    device : str
        "auto", "cpu", "cuda", ...
    progress : bool
        Show progress on stderr.

    Returns
    -------
    restorer : Restorer
        In `eval` mode on the CPU.
    history : list of dict
        A record a step: `pixels`, the sum of both generators' squared errors, and `discriminator`
        (8 ln 2 at chance).

    Raises
    ------
    DataError
        No faces, or smaller ones.
    ConfigError
        `plan.identity` without a recognizer.
    """
    plan = plan or RestorationPlan()
    large_px = ENLARGEMENT * plan.small_px
    if not len(faces) or faces.shape[1] < large_px:
        raise DataError(f"faces of {large_px} px or more expected, got {faces.shape}")
    if plan.identity > 0 and recognizer is None:
        raise ConfigError("the weight identity needs a recognizer; give one, or set it to 0")
    where = resolve_device(device)
    restorer = build_restorer(plan.width, plan.blocks, seed=plan.seed).to(where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed + 1)
        discriminator = Discriminator().to(where)
    if recognizer is not None:
        recognizer = recognizer.to(where).eval()
    generators = torch.optim.Adam(restorer.parameters(), lr=plan.learning_rate)
    judge = torch.optim.Adam(discriminator.parameters(), lr=plan.learning_rate / 10)
    rng = np.random.default_rng(plan.seed)
    history = []
    with show_progress(plan.steps, label="train restorer", unit="step", enabled=progress) as bar:
        for _ in range(plan.steps):
            small, sharp, is_face = _draw_batch(faces, plan, rng, where)
            first, second = restorer.restore_twice(small)
            judged = judge_pictures(discriminator, sharp, second.detach(), is_face)
            judge.zero_grad()
            judged.backward()
            judge.step()
            pixels = functional.mse_loss(first, sharp) + functional.mse_loss(second, sharp)
            total = pixels + _fool(discriminator, second, is_face, plan)
            if plan.identity > 0 and recognizer is not None:
                total = total + plan.identity * _compare(recognizer, second, sharp, is_face)
            generators.zero_grad()
            total.backward()
            generators.step()
            history.append({"pixels": pixels.item(), "discriminator": judged.item()})
            bar.update()
    if recognizer is not None:
        recognizer.cpu()
    return restorer.cpu().eval(), history


def _draw_batch(
    faces: np.ndarray, plan: RestorationPlan, rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Small and sharp pictures, first faces and then shuffled ones, and which are faces (b,)."""
    rows = rng.integers(0, len(faces), plan.batch_size)
    pixels = torch.from_numpy(np.array(faces[rows])).to(device)
    seeds = torch.from_numpy(rng.integers(0, 2**63 - 1, plan.batch_size)).to(device)
    large_px = ENLARGEMENT * plan.small_px
    sharp = degrade(pixels, seeds, DEGRADATIONS["none"], large_px)
    small = degrade(pixels, seeds, plan.degradation, plan.small_px)
    other, _ = shuffle_cells(sharp, seeds, 4, reach=2)
    other_small = functional.avg_pool2d(other, ENLARGEMENT)
    is_face = torch.arange(2 * len(rows), device=device) < len(rows)
    return torch.cat([small, other_small]), torch.cat([sharp, other]), is_face.float()


def judge_pictures(
    discriminator: Discriminator, real: Tensor, generated: Tensor, is_face: Tensor
) -> Tensor:
    """The discriminator's loss over real and generated, faces and not: 8 ln 2 at chance.

    Both questions are asked of each of the four kinds; a kind counts by its mean.
    """
    total = real.new_zeros(())
    for pictures, is_real in ((real, 1.0), (generated, 0.0)):
        logits = discriminator(pictures)
        target = torch.stack([torch.full_like(is_face, is_real), is_face], 1)
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        for kind in (is_face, 1 - is_face):
            total = total + (loss * kind).sum() / kind.sum().clamp(min=1)
    return total


def _fool(
    discriminator: Discriminator, generated: Tensor, is_face: Tensor, plan: RestorationPlan
) -> Tensor:
    """The generators' part against the discriminator."""
    if plan.adversary == plan.face == 0:
        return generated.new_zeros(())
    logits = discriminator(generated)
    real = functional.softplus(-logits[:, 0]).mean()
    face = functional.binary_cross_entropy_with_logits(logits[:, 1], is_face)
    return plan.adversary * real + plan.face * face


def _compare(recognizer: Backbone, restored: Tensor, sharp: Tensor, is_face: Tensor) -> Tensor:
    """Mean 1 - cosine of the recognizer's vectors, over the faces."""
    size = (recognizer.spec.input_px, recognizer.spec.input_px)
    rows = is_face > 0
    seen = [
        recognizer(functional.interpolate(each[rows], size=size, mode="area"))
        for each in (restored, sharp)
    ]
    return (1 - functional.cosine_similarity(seen[0], seen[1].detach())).mean()
