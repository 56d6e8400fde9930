"""SphereFace head (Liu et al. 2017, A-Softmax): the angle times m, classes of unit length."""

from __future__ import annotations

from pytorch_metric_learning.losses import SphereFaceLoss

from cdp.models.heads.multiplied import MultipliedAngleHead


class SphereFaceHead(MultipliedAngleHead):
    """Logits are `|embedding| * cos(theta)`; for the own class `|embedding| * psi(theta)`."""

    library = SphereFaceLoss
