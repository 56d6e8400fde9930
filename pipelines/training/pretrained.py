"""The network that a recognizer starts from: a committee member's, as a backbone to be trained.

The contract:
- A member that is an ONNX model starts with its own layers (`cdp.models.pretrained`), one that is a
  recognizer of ours with its backbone.
- Side, length of the vectors and neck that do not fit the settings are a `ConfigError`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdp.errors import ConfigError
from cdp.images.preprocessing import Preprocessing
from pipelines.config import MemberSettings, TrainingSettings
from pipelines.data.dataset import Dataset
from pipelines.files import digest_file
from pipelines.members import (
    describe_given,
    find_model,
    open_embedder,
    pack_preprocessing,
    unpack_preprocessing,
)
from pipelines.stage import Work

if TYPE_CHECKING:
    from cdp.models import Backbone


@dataclass(frozen=True)
class Pretrained:
    """A member's network.

    origin : its file.
    digest : SHA-256 of its bytes.
    shown : range and order of the pixels of an ONNX model; None for others.
    """

    origin: Path
    digest: str
    shown: Preprocessing | None = None

    def describe(self) -> list[Any]:
        """What determines it, for a key."""
        return [self.digest, None if self.shown is None else pack_preprocessing(self.shown)]

    def pack(self) -> dict[str, Any]:
        """All of it in JSON values."""
        shown = None if self.shown is None else pack_preprocessing(self.shown)
        return {"origin": str(self.origin.resolve()), "digest": self.digest, "shown": shown}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> Pretrained:
        """What `pack` packed."""
        shown = None if packed["shown"] is None else unpack_preprocessing(packed["shown"])
        return cls(Path(packed["origin"]), packed["digest"], shown)

    def open(self, settings: TrainingSettings) -> Backbone:
        """A new copy of the network, fit for a training with these settings.

        Raises
        ------
        ConfigError, DataError, BackendError
            As `open_pretrained`; or a recognizer of ours of another side, length or neck.
        """
        from cdp.embedding import OnnxEmbedder
        from cdp.recognizer import open_pretrained

        embedder = open_embedder(self.origin, "cpu", self.shown)
        if isinstance(embedder, OnnxEmbedder):
            return open_pretrained(
                embedder,
                input_px=settings.input_px,
                neck=settings.neck,
                embedding_dim=settings.embedding_dim,
            )
        backbone: Backbone = copy.deepcopy(embedder.backbone)  # the worker keeps the embedder
        for name in ("input_px", "embedding_dim", "neck"):
            found, asked = getattr(backbone.spec, name), getattr(settings, name)
            if found != asked:
                raise ConfigError(f"{name}: {found} expected, as {self.origin.name}, got {asked}")
        return backbone


def find_pretrained(work: Work, name: str | None) -> Pretrained | None:
    """The network of a member of the committee by name; None for None.

    Raises
    ------
    ConfigError
        There is no such member, or it has no model.
    """
    if name is None:
        return None
    origin, shown = find_model(work, name)
    return Pretrained(origin, digest_file(origin), shown)


def try_pretrained(dataset: Dataset, member: MemberSettings, settings: TrainingSettings) -> None:
    """Open a member that exists before a run as a training will; raises as `Pretrained.open`."""
    path = member.onnx or member.checkpoint
    if path is None:
        return
    origin = dataset.locate_model(path)
    shown = describe_given(dataset, member) if member.onnx else None
    Pretrained(origin, "", shown).open(settings)
