"""Adversarial adaptation (ADDA, Tzeng et al. 2017), anchored by pairs.

The contract:
- The source network stays as it is. The target starts as its copy and learns to give vectors of
  small faces that a discriminator cannot separate from the source's vectors of sharp faces.
- ADDA alone aligns the two sets as a whole, and may exchange identities. Ours: sharp faces are also
  degraded here, and the target's vector of each is held to the source's vector of the sharp one.
- Everything drawn follows from the seed; the same values give the same weights. It is short and has
  no checkpoints: one that is stopped begins anew.

Source: both losses are the paper's. Read: a re-implementation (corenel/pytorch-adda), whose Adam
has betas .5 and .9 and .0001 for both networks, and users' reports that the target needs .00001.
Ours: 500 steps, two layers of 500 units (from memory) and the anchor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.adaptation.moments import prepare_faces
from cdp.errors import ConfigError, DataError
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade
from cdp.models import Backbone
from cdp.progress import show_progress
from cdp.training.plan import resolve_device


@dataclass(frozen=True)
class AdaptationPlan:
    """How to adapt. The defaults are a short, careful training."""

    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-5
    """Of the target network (Adam, betas .5 and .9)."""
    discriminator_rate: float = 1e-4
    hidden: int = 500
    """Units of the discriminator's two hidden layers."""
    anchor: float = 10.0
    """Weight of 1 - cosine between the target's vector of a degraded face and the source's of it
    sharp."""
    degradation: Degradation = field(default_factory=lambda: DEGRADATIONS["surveillance"])
    """Of the anchors."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2:
            raise ConfigError(
                f"1 step or more of 2 images or more expected, got {self.steps} and "
                f"{self.batch_size}"
            )
        if not (self.learning_rate > 0 and self.discriminator_rate > 0 and self.anchor >= 0):
            raise ConfigError("learning rates above 0 and an anchor of 0 or above expected")


def adapt_encoder(
    source: Backbone,
    sharp: np.ndarray,
    small: np.ndarray,
    plan: AdaptationPlan | None = None,
    *,
    device: str = "auto",
    progress: bool = True,
) -> tuple[Backbone, list[dict[str, float]]]:
    """Adapt a copy of a network to small faces.

    Parameters
    ----------
    source : Backbone
        Left as it is, in `eval` mode on the CPU.
    sharp : (n, s, s, 3) uint8, RGB
        Faces of the kind the source was trained on; no labels are needed.
    small : (m, t, t, 3) uint8, RGB
        Unlabelled faces of the cameras.
    plan : AdaptationPlan or None
        None is the default one.
    device : str
        "auto", "cpu", "cuda", ...
    progress : bool
        Show progress on stderr, see `cdp.progress`.

    Returns
    -------
    target : Backbone
        In `eval` mode on the CPU.
    history : list of dict
        A record a step: `discriminator`, the discriminator's loss (2 ln 2 at chance), `target`, and
        `anchor`, the mean 1 - cosine.

    Raises
    ------
    DataError
        No images of either kind.
    """
    if not len(sharp) or not len(small):
        raise DataError(
            f"sharp and small faces expected to adapt with, got {len(sharp)} and {len(small)}"
        )
    plan = plan or AdaptationPlan()
    where = resolve_device(device)
    source = source.to(where).eval()
    target = copy.deepcopy(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        discriminator = make_discriminator(source.spec.embedding_dim, plan.hidden).to(where)
    rates = (plan.learning_rate, plan.discriminator_rate)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.9))
        for network, rate in zip((target, discriminator), rates, strict=True)
    ]
    history = []
    rng = np.random.default_rng(plan.seed)
    with show_progress(plan.steps, label="adapt", unit="step", enabled=progress) as bar:
        for _ in range(plan.steps):
            faces = sharp[rng.integers(0, len(sharp), plan.batch_size)]
            seeds = torch.from_numpy(rng.integers(0, 2**63 - 1, plan.batch_size)).to(where)
            pixels = torch.from_numpy(np.array(faces)).to(where)
            camera = small[rng.integers(0, len(small), plan.batch_size)]
            side_px = source.spec.input_px
            with torch.no_grad():
                known = source(prepare_faces(faces, side_px, where))
            found = target(prepare_faces(camera, side_px, where))
            paired = target(degrade(pixels, seeds, plan.degradation, side_px))
            history.append(_step(discriminator, known, found, paired, plan.anchor, optimizers))
            bar.update()
    source.cpu()
    return target.cpu().eval(), history


def make_discriminator(embedding_dim: int, hidden: int) -> nn.Sequential:
    """Two hidden layers; the logit that a vector is the source's."""
    return nn.Sequential(
        nn.Linear(embedding_dim, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )


def judge_domains(discriminator: nn.Module, known: Tensor, found: Tensor) -> Tensor:
    """-log D(source's) - log(1 - D(target's)), means over both: 2 ln 2 at chance."""
    first, second = discriminator(known), discriminator(found)
    return functional.softplus(-first).mean() + functional.softplus(second).mean()


def _step(
    discriminator: nn.Module,
    known: Tensor,
    found: Tensor,
    paired: Tensor,
    anchor: float,
    optimizers: list[torch.optim.Adam],
) -> dict[str, float]:
    """One step of the discriminator, then one of the target; their losses."""
    judged = judge_domains(discriminator, known, found.detach())
    optimizers[1].zero_grad()
    judged.backward()
    optimizers[1].step()
    fooled = functional.softplus(-discriminator(found)).mean()
    away = (1 - functional.cosine_similarity(paired, known)).mean()
    optimizers[0].zero_grad()
    (fooled + anchor * away).backward()
    optimizers[0].step()
    return {
        "discriminator": judged.item(),
        "target": fooled.item(),
        "anchor": away.item(),
    }
