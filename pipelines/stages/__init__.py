"""The stages in their order: one file each; data flows down this list and never up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.stage import Stage
from pipelines.stages import (
    detect,
    embed,
    evaluate,
    ingest,
    knn,
    mediate,
    propagate,
    report,
    retrain,
    thumbnails,
    train,
)

STAGES: tuple[Stage, ...] = (
    detect.STAGE,  # photos -> aligned faces, where the manifest says `align`
    ingest.STAGE,  # files -> samples that can be read, and rejected files
    train.STAGE,  # labelled samples -> the base and the committee
    embed.STAGE,  # samples -> one view a member
    knn.STAGE,  # views -> one k-NN graph a view and split
    mediate.STAGE,  # graphs -> candidate pairs with a probability
    propagate.STAGE,  # pairs -> pseudo-labels
    retrain.STAGE,  # labelled + pseudo-labelled -> the low-resolution recognizer
    evaluate.STAGE,  # recognizers, pseudo-labels and true identities -> metrics
    thumbnails.STAGE,  # unlabelled images -> small pictures for report and review
    report.STAGE,  # all of the above -> one page, a table and a text
)


def describe_facts(facts: Mapping[str, Any]) -> str:
    """The first counts and names among the facts of a stage, for its line on the console."""
    described = []
    for name, value in facts.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        number = f"{value:,}" if isinstance(value, int) else value
        number = f"{number:.3f}" if isinstance(number, float) else number
        described.append(f"{name.replace('_', ' ')} {number}")
    return ", ".join(described[:7])
