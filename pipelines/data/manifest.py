"""Data manifests: the strict models of what a data set's YAML says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Positive, Settings, Share

SPLITS = ("labelled", "unlabelled", "evaluation")
LARGEST_PX = 512
"""Side of the faces that training and embedding hold by the thousand."""


class PairsSettings(Settings):
    """A list of verification pairs in folds, in the format of LFW's official file.

    The first line is `folds<tab>pairs`; each fold lists that many genuine pairs (`person i j`) and
    as many impostor pairs (`person i person j`) of `<person>/<person>_<number, 4 digits>`.

    held_out_folds : folds, from 1, whose people are evaluation people and nothing else.
    """

    file: str
    held_out_folds: tuple[Positive, ...] = ()


class PeopleSettings(Settings):
    """One folder of `<person>/<image>`, split by person with a seed.

    Shares count people with at least `min_images` images; everybody else is unlabelled. People of
    held-out folds of `pairs` are taken for evaluation first.
    """

    root: str
    seed: int = 0
    min_images: Positive = 2
    labelled: Share
    evaluation: Share
    pairs: PairsSettings | None = None


class FolderSettings(Settings):
    """One folder that is one split: `people` is `<person>/<image>`, `pile` any nesting."""

    root: str
    layout: Literal["people", "pile"] = "people"


class DataManifest(Settings):
    """`data_manifests/*.yaml`."""

    name: str
    kind: Literal["images", "synthetic", "features"]
    title: str = ""
    licence: str = ""
    source: str = ""
    notes: str = ""
    size_px: Annotated[int, Field(ge=1, le=LARGEST_PX)] = 112
    people: PeopleSettings | None = None
    labelled: FolderSettings | None = None
    unlabelled: FolderSettings | None = None
    evaluation: FolderSettings | None = None
    synthetic: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _kind_has_its_parts(self) -> DataManifest:
        folders = [self.labelled, self.unlabelled, self.evaluation]
        if self.kind == "images" and (self.people is None) == (not any(folders)):
            raise ValueError(
                "kind images needs either people (split by person) or the folders labelled, "
                "unlabelled and evaluation"
            )
        if self.kind == "images" and self.people is None and self.unlabelled is None:
            raise ValueError("kind images needs an unlabelled folder")
        if self.kind == "features" and self.unlabelled is None:
            raise ValueError("kind features needs an unlabelled folder")
        return self


@dataclass(frozen=True)
class Entry:
    """One image before it is read. `identity` is None when nobody knows it.

    fault : why it must not be read; empty for most.
    """

    path: str
    split: str
    identity: str | None
    fault: str = ""


@dataclass(frozen=True)
class ListedPair:
    """Two images to be told apart: their paths, whether they show one person, the fold from 0."""

    source: str
    target: str
    same: bool
    fold: int
