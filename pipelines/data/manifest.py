"""Data manifests: the strict models behind `data_manifests/*.yaml`, and the entries of a data set.

The contract:
- A manifest describes one data set of one kind: `images`, `synthetic` or `features`.
- Paths are relative to the data root. An unknown key or a value out of range is a ConfigError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipelines.config import Positive, Settings, Share
from pipelines.data.folders import clean_folder
from pipelines.data.photos import AlignSettings

Folder = Annotated[str, AfterValidator(clean_folder)]
"""A folder below the data root."""
SPLITS = ("labelled", "unlabelled", "evaluation")
LARGEST_PX = 512
"""Largest side of a face in pixels; training and embedding hold thousands of them in memory."""


class PairsSettings(Settings):
    """A list of verification pairs in folds, in the format of LFW's official file or of CALFW's.

    LFW: the first line is `folds<tab>pairs`; each fold lists that many genuine pairs (`person i j`)
    and as many impostor pairs (`person i person j`) of `<person>/<person>_<number, 4 digits>`.
    CALFW, CPLFW: two lines a pair, `<person>_<number>.jpg <fold>`, the fold 0 for impostors; the
    images lie in one folder, so `people` needs the `pattern` "{person}_*".

    file : the list, relative to the data root.
    held_out_folds : folds, counted from 1, all of whose people go to the evaluation split.
    """

    file: str
    held_out_folds: tuple[Positive, ...] = ()


class PeopleSettings(Settings):
    """One folder of `<person>/<image>`, split at random by person.

    root : the folder, relative to the data root.
    seed : of the random split.
    min_images : a person with fewer images goes to the unlabelled split.
    labelled, evaluation : shares of the people with at least `min_images` images, in [0, 1]; the
        remaining people are unlabelled.
    pattern : where the name of a file says the person, as for one folder a split.
    pairs : verification pairs; people of its held-out folds go to evaluation before the shares are
        counted.
    """

    root: Folder
    seed: int = 0
    min_images: Positive = 2
    labelled: Share
    evaluation: Share
    pattern: str | None = None
    pairs: PairsSettings | None = None


class FolderSettings(Settings):
    """One folder that is one split.

    root : the folder, relative to the data root.
    layout : "people" is `<person>/<image>`, where the first folder is the person and deeper ones
        are nested at will; "pile" is images without identities, nested at will; "frames" is a pile
        where each folder is a clip, and the number at the end of a file's name its frame; "tracks"
        is a pile of cut faces, each folder a track of one person; null is "pile" for `unlabelled`
        and "people" for the others. The frames of a video need no layout.
    every : of videos, clips and tracks every so many frames are used; null is 5, of tracks 1.
    list : names the images and their people: a CSV, TSV, JSON lines, Parquet or `.lst` file,
        relative to the data root.
    pattern : where the name of a file says the person: `{person}_*` for Ann_Lee_0003.jpg. Of
        tracks, where the path says track and frame, maybe the clip: `{clip}/{frame}_{track}`.
    """

    root: Folder
    list: str | None = None
    pattern: str | None = None
    layout: Literal["people", "pile", "frames", "tracks"] | None = None
    every: Annotated[int, Field(ge=1)] | None = None

    @property
    def step(self) -> int:
        """Of videos, clips and tracks every so many frames are used."""
        return self.every or (1 if self.layout == "tracks" else 5)


class EvaluationSettings(FolderSettings):
    """The images to evaluate on: people of no other split, or a gallery and real probes of it.

    root : the folder of people who are in no other split; or else
    gallery : folder of `<person>/<image>` with the photos that people are enrolled by, which may be
        that of `labelled`.
    probes : folder of `<person>/<image>` with real probes: of people of the gallery, and of others.
    """

    root: Folder = ""
    gallery: Folder | None = None
    probes: Folder | None = None

    @model_validator(mode="before")
    @classmethod
    def _probes_are_the_folder(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("probes") and not value.get("root"):
            return {**value, "root": value["probes"]}
        return value

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> EvaluationSettings:
        if not self.root:
            raise ValueError("give root, or gallery and probes")
        if (self.gallery is None) != (self.probes is None) or self.root != (
            self.probes or self.root
        ):
            raise ValueError("give root, or gallery and probes: both of them")
        return self


class DataManifest(Settings):
    """One data set: `data_manifests/<name>.yaml`.

    kind : "images" (files below the data root), "synthetic" (drawn, no file) or "features" (ready
        embeddings).
    title, licence, source, notes : for the report and the model card; they do not enter the digest.
    size_px : side in pixels to which faces are read.
    square : how a picture that is not square becomes so: "crop" takes its centre, "pad" keeps all
        of it on grey.
    allow_links : follow links below the data root wherever they lead.
    dims : name of a model of ready features -> its dimension, for `.bin` files, which have no
        header; a `dims.txt` in or above the folder says the same.
    people : one folder, split by person; or else
    labelled, unlabelled, evaluation : one folder a split.
    align : how photos become aligned faces; null where the images are aligned faces already.
    synthetic : arguments of `cdp.synthetic.SyntheticFaces`.
    """

    name: str
    kind: Literal["images", "synthetic", "features"]
    title: str = ""
    licence: str = ""
    source: str = ""
    notes: str = ""
    size_px: Annotated[int, Field(ge=1, le=LARGEST_PX)] = 112
    square: Literal["crop", "pad"] = "crop"
    allow_links: bool = False
    dims: dict[str, Positive] = Field(default_factory=dict)
    people: PeopleSettings | None = None
    labelled: FolderSettings | None = None
    unlabelled: FolderSettings | None = None
    evaluation: EvaluationSettings | None = None
    align: AlignSettings | None = None
    synthetic: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _kind_has_its_parts(self) -> DataManifest:
        if self.align is not None and self.kind != "images":
            raise ValueError(f"align goes with kind images, not with kind {self.kind}")
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

    @property
    def has_real_probes(self) -> bool:
        """Whether people are evaluated by real probes against a gallery."""
        return self.evaluation is not None and self.evaluation.gallery is not None

    @property
    def gallery_apart(self) -> FolderSettings | None:
        """The folder of the gallery, where it is not that of the labelled people."""
        if self.evaluation is None or self.evaluation.gallery is None:
            return None
        known = self.labelled is not None and self.labelled.root == self.evaluation.gallery
        return None if known else FolderSettings(root=self.evaluation.gallery, layout="people")


@dataclass(frozen=True)
class Entry:
    """One image of a data set, before it is read.

    identity : the person, or None where the data set does not name one. In layout people the first
        folder is the person, also of a file that is not opened.
    fault : why the file must not be opened, or empty.
    clip, frame : the video or folder of frames, and the number of the frame; None for others.
    track : the name of its track, where the data set has tracks.
    """

    path: str
    split: str
    identity: str | None
    fault: str = ""
    clip: str | None = None
    frame: int | None = None
    track: str | None = None
