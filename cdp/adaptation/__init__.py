"""Adaptation: a trained recognizer is fitted to unlabelled pictures of the cameras it is used with.

- `moments.py`: the batch normalisations' moments anew, without training
- `adversarial.py`: ADDA, an adversarial copy of the network, anchored by pairs
"""

from cdp.adaptation.adversarial import AdaptationPlan, adapt_encoder
from cdp.adaptation.moments import adapt_moments

__all__ = ["AdaptationPlan", "adapt_encoder", "adapt_moments"]
