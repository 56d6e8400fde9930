"""Committee members on disk: the file of each member, what it is shown, and its embedder.

The contract:
- An embedder is opened once a process, and again when its file changes.
- What an ONNX model is shown comes from its settings; where they leave it open and labelled people
  are at hand, from the way that separates a few of them best. The same people give the same answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError, DataError
from cdp.images.preprocessing import Preprocessing
from cdp.separation import LEAST_NEARER, Separation, choose_people, rank_preprocessing
from pipelines.config import MemberSettings
from pipelines.data.dataset import Dataset
from pipelines.stage import Work

log = logging.getLogger("cdp")

REDUCED_PX = 24
"""Side to which the compared faces are reduced: on sharp ones the order of colours matters less."""
LEAST_PEOPLE = 4
"""People with two images or more, below which nothing is concluded from them."""


def find_origin(work: Work, member: MemberSettings) -> Path | None:
    """The file a member is read from; None for ready features."""
    if member.backbone is not None:
        return work.locate("train.history").parent / f"{member.name}.safetensors"
    if member.features is not None:
        return None
    if member.recognizer is not None:
        return work.locate_recognizer(member.recognizer)
    return work.dataset.locate_model(str(member.onnx or member.checkpoint))


def describe_origin(member: MemberSettings) -> str:
    """Where a member is from, in a few words, as the settings name it."""
    if member.backbone is not None:
        return f"backbone {member.backbone}, trained here"
    if member.recognizer is not None:
        return f"recognizer of the run {member.recognizer}"
    restored = f", behind the restorer {member.restore}" if member.restore else ""
    return f"{member.onnx or member.checkpoint or member.features}{restored}"


def find_model(work: Work, name: str) -> tuple[Path, Preprocessing | None]:
    """The file of a member by name, and what it is shown if it is an ONNX model.

    Raises
    ------
    ConfigError
        There is no such member, or it is a table of features.
    """
    members = {member.name: member for member in work.config.committee.all}
    if name not in members:
        raise ConfigError(
            f"{name!r} is no member of the committee; choose one of: {', '.join(members)}"
        )
    origin = find_origin(work, members[name])
    if origin is None:
        raise ConfigError(f"member {name!r} is a table of features; it cannot look at images")
    return origin, find_preprocessing(work, members[name], origin)


def find_preprocessing(
    work: Work, member: MemberSettings, origin: Path | None
) -> Preprocessing | None:
    """What an ONNX member is shown; None for any other member.

    Raises
    ------
    ConfigError
        `preprocessing: auto` without labelled people.
    """
    if member.onnx is None or origin is None:
        return None
    samples = work.read("ingest.samples", columns=["path", "split", "identity"]).to_pandas()
    labelled = samples[samples.split == "labelled"]
    ranked = rank_member(
        work.dataset, member, origin, labelled.path.tolist(), labelled.identity.tolist()
    )
    given = describe_given(work.dataset, member)
    if not member.is_pixel_range_open or not ranked:
        return given
    log.info("          %s", describe_choice(member.name, given, ranked))
    return ranked[0][0]


def describe_given(dataset: Dataset, member: MemberSettings) -> Preprocessing:
    """What the settings say; a model that leaves its side free is shown the data set's."""
    given = member.describe_preprocessing()
    if given.input_px is not None or not _leaves_side_free(dataset, member):
        return given
    return replace(given, input_px=dataset.manifest.size_px)


def _leaves_side_free(dataset: Dataset, member: MemberSettings) -> bool:
    origin = dataset.locate_model(str(member.onnx))
    return open_embedder(origin, "cpu", member.describe_preprocessing()).input_px is None


def pack_preprocessing(way: Preprocessing) -> list[Any]:
    """What a member is shown, as JSON values for the facts of a stage."""
    return list(astuple(way))


def unpack_preprocessing(packed: Sequence[Any]) -> Preprocessing:
    """What `pack_preprocessing` packed."""
    values: list[Any] = [tuple(each) if isinstance(each, list) else each for each in packed]
    return Preprocessing(*values)


def read_preprocessing(
    work: Work, member: MemberSettings, origin: Path | None
) -> Preprocessing | None:
    """What the stage embed showed an ONNX member; None for any other member."""
    packed = work.input_facts("embed").get("preprocessing", {}).get(member.name)
    if packed is None:  # a run of an earlier version
        return find_preprocessing(work, member, origin)
    return unpack_preprocessing(packed)


def rank_member(
    dataset: Dataset,
    member: MemberSettings,
    origin: Path,
    paths: Sequence[str],
    identity: Sequence[Any],
) -> tuple[tuple[Preprocessing, Separation], ...]:
    """The ways to show an ONNX member its faces, best first; empty with too few labelled people.

    paths, identity : of the labelled images.
    """
    rows = choose_people(identity)
    if len({identity[row] for row in rows.tolist()}) < LEAST_PEOPLE:
        if member.preprocessing == "auto":
            raise ConfigError(
                f"member {member.name}: preprocessing: auto needs {LEAST_PEOPLE} labelled people "
                "with two images or more; name a preset, or mean, scale and channels"
            )
        return ()
    chosen = tuple(paths[row] for row in rows.tolist())
    given = describe_given(dataset, member)
    size_px = dataset.manifest.size_px
    key = (origin, origin.stat().st_mtime_ns, given, chosen, size_px, dataset.manifest.square)
    if key not in _ranked:
        people = np.array([str(identity[row]) for row in rows.tolist()])
        _ranked[key] = rank_ways(dataset, given, origin, chosen, people)
    return _ranked[key]


_ranked: dict[Any, tuple[tuple[Preprocessing, Separation], ...]] = {}
"""What was found in this process: the check before a run and stage embed ask the same."""


def rank_ways(
    dataset: Dataset, given: Preprocessing, origin: Path, paths: Sequence[str], people: np.ndarray
) -> tuple[tuple[Preprocessing, Separation], ...]:
    """The ways to show an ONNX model the faces of some people, best first.

    people : (n,) whom each of the n paths shows.
    """
    from cdp.embedding import OnnxEmbedder

    faces = reduce_to(dataset.read_faces(paths), REDUCED_PX)
    model = origin.read_bytes()

    def embed(way: Preprocessing) -> np.ndarray:
        return OnnxEmbedder(model, preprocessing=way, name=origin.name).embed(faces)[0]

    return tuple(rank_preprocessing(embed, people, given))


def describe_choice(
    name: str, given: Preprocessing, ranked: Sequence[tuple[Preprocessing, Separation]]
) -> str:
    """How a member is shown its faces, and why, in a sentence."""
    way, best = ranked[0]
    found = f"{name} is shown {way.describe()}"
    if way != given:
        before = dict(ranked).get(given)
        worse = "which it fails on" if before is None else f"{before.distance:.1f}"
        found += (
            f": it separates the labelled people better so than by {given.describe()} "
            f"(d' {best.distance:.1f} against {worse})"
        )
    if best.nearer < LEAST_NEARER:
        found += (
            f"; and one person's faces are nearer than two people's in {best.nearer:.0%} "
            "of cases only: is it a model of aligned faces, and are these aligned?"
        )
    return found


def reduce_to(faces: np.ndarray, size_px: int | None) -> np.ndarray:
    """Faces reduced to a side as a camera further away would take them; smaller ones are kept."""
    from cdp.images.degradation import reduce_faces

    return faces if size_px is None or faces.shape[1] <= size_px else reduce_faces(faces, size_px)


def open_embedder(path: Path, device: str, shown: Preprocessing | None = None) -> Any:
    """The embedder in a file, ONNX or ours; kept open by the worker until the file changes.

    shown : what an ONNX model is shown. None where the file's name says what it is: one that ends
        in `.onnx` is shown RGB in 0..255, any other is ours.

    Raises
    ------
    DataError
        The file is larger than `MODEL_BYTES`, or holds no model.
    """
    if shown is None and path.suffix.lower() == ".onnx":
        shown = Preprocessing()
    return _open_embedder(path, path.stat().st_mtime_ns, device, shown)


def open_view(
    dataset: Dataset,
    member: MemberSettings,
    origin: Path,
    device: str,
    shown: Preprocessing | None = None,
) -> Any:
    """A member's embedder as the stage `embed` uses it: behind its restorer, where it has one."""
    embedder = open_embedder(origin, device, shown)
    if member.restore is None:
        return embedder
    from cdp.restoration import RestoringEmbedder

    path = dataset.locate(member.restore)
    return RestoringEmbedder(embedder, _open_restorer(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _open_restorer(path: Path, _changed_ns: int) -> Any:
    from cdp.restoration import load_restorer

    return load_restorer(path)


@lru_cache(maxsize=16)
def _open_embedder(path: Path, _changed_ns: int, device: str, shown: Preprocessing | None) -> Any:
    from cdp.embedding import BackboneEmbedder, OnnxEmbedder
    from cdp.models import load_model
    from cdp.onnx_session import MODEL_BYTES

    size = path.stat().st_size
    if size > MODEL_BYTES:
        raise DataError(f"{path}: {size} bytes, a model of at most {MODEL_BYTES} expected")
    if shown is not None:
        return OnnxEmbedder(path.read_bytes(), preprocessing=shown, name=path.name)
    return BackboneEmbedder(load_model(path)[0], device=device)
