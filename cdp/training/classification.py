"""The heads' losses of a batch: of each image, or of BBN's mixtures of two images.

The contract:
- A loss is one number an image, (b,) float32.
- An image with several classes (soft targets) has the weighted mean of its losses.
- A mixture has two classes, those of its two images, weighed as its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdp.errors import ConfigError
from cdp.models.heads import Head
from cdp.training.batches import Targets


def classify(head: Head, embedding: Tensor, target: Targets) -> tuple[Tensor, Tensor]:
    """The head's loss an image (b,), and the number of correctly classified images."""
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


def classify_bilaterally(
    head: Head, embedding: Tensor, target: Targets, usual: float
) -> tuple[Tensor, Tensor]:
    """The head's loss of mixtures of a usual and a rare image, each counted for both: (b,).

    Source: Zhou et al. 2020 (BBN), eq. 1 to 3: f = 2 [a f_usual; (1 - a) f_rare], and the loss is
    a times that of the usual label plus 1 - a times that of the rare one.

    Parameters
    ----------
    head : Head
    embedding : (b, d) float
        First the usual images, then as many rare ones.
    target : Targets
    usual : float
        a, the share of the usual images, 0..1.
    """
    label, half = target.label, len(embedding) // 2
    assert label is not None
    if target.soft is not None:
        raise ConfigError("sampling bilateral takes one class an image: set targets to hard")
    mixed = mix_halves(embedding, usual)
    classes = torch.stack([label[:half], label[half:]], 1).ravel()
    place = torch.arange(half, device=label.device).repeat_interleave(2)
    masked = None
    if target.masked is not None:
        image, other = target.masked.unbind(1)
        row = torch.cat([2 * (image % half), 2 * (image % half) + 1])
        other = other.repeat(2)
        foreign = classes[row] != other
        masked = torch.stack([row[foreign], other[foreign]], 1)
    losses, logits = head(mixed[place], classes, masked)
    first, second = losses.unflatten(0, (half, 2)).unbind(1)
    loss = usual * first + (1 - usual) * second
    found = logits.detach()[::2].argmax(1)
    hits = (found == head.place(label[:half])) | (found == head.place(label[half:]))
    return torch.cat([loss, loss]), 2 * hits.sum()


def mix_halves(embedding: Tensor, usual: float) -> Tensor:
    """2 [a first half of a usual; (1 - a) second half of a rare image]: (b, d) to (b / 2, d)."""
    half, length = len(embedding) // 2, embedding.shape[1] - embedding.shape[1] // 2
    first, second = embedding[:half, :length], embedding[half:, length:]
    return 2 * torch.cat([usual * first, (1 - usual) * second], 1)
