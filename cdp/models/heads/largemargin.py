"""Large-margin softmax head (Liu et al. 2016): the angle times m, classes any length."""

from __future__ import annotations

from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss

from cdp.models.heads.multiplied import MultipliedAngleHead


class LargeMarginHead(MultipliedAngleHead):
    """Logits are `|class| |embedding| cos(theta)`; for the own class with `psi(theta)`."""

    library = LargeMarginSoftmaxLoss
