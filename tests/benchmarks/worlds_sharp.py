"""Sharp labelled photos and a poor pile, of real faces: staff is enrolled, cameras see others.

    world = draw_sharp_world(data_root, views_root, photos=14, seed=0)

The faces are those of `lfw112` under `CDP_DATA_ROOT`, embedded by the networks of `onnx`. Labelled
people have fourteen photos or more, of which `photos` are used, sharp at 112 px. The pile shows
everybody else through one of `CAMERAS`.

A run with images also degrades the labelled photos until they look like the pile's, as
`pipelines.copies` does: `match_copies`.

The contract:
- Each kind of photo is embedded once and kept under `views_root`; a world is a choice of rows.
- No person is both labelled and in the pile. The same arguments give the same world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cdp.images.appearance import measure_appearance
from cdp.images.decode import decode_image, fit_square
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade_pixels
from cdp.images.matching import match_pile
from pipelines.copies import SAMPLE, count_copies, degrade_sharp, seed_copies

MOST_PHOTOS = 14
"""Photos of a labelled person, at most."""
LABELLED_PEOPLE = 45
PILE_PHOTOS = 30
"""Photos of one person in the pile, at most."""
PILE_PEOPLE, PILE_SINGLES = 500, 1200
"""People of 2 to 13 photos, and of one, in the pile."""
CAMERAS = {
    "surveillance": ("surveillance", 16),
    "mild": (
        Degradation(
            jitter_rate=0.3,
            mask_rate=0.03,
            sunglasses_rate=0.03,
            blur_rate=0.2,
            motion_rate=0.1,
            low_res_rate=1.0,
            low_res_px=(14, 40),
            noise_rate=0.4,
            noise_sigma=(0.01, 0.025),
            jpeg_rate=0.5,
            jpeg_quality=(40, 90),
            photometric_rate=0.3,
            brightness=(0.6, 1.3),
        ),
        64,
    ),
}
"""Of each, a degradation or the name of one, and the side of the faces in pixels."""
SIDE_PX = 112
"""Side of the faces of `lfw112`, to which a run brings all of them."""
COPIES_AT = 1 << 20
"""The seeds of degraded copies start here, those of the pile at 0."""
Views = list[np.ndarray]
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Faces (n, s, s, 3) and (n,) int64 seeds to changed faces."""


@dataclass(frozen=True)
class SharpWorld:
    """One draw.

    labelled : (l, d_v) float32 a network, of sharp photos. identity : (l,) int64.
    copies : the same photos degraded as the pile is. alike : the same photos as the pile shows
        them, what labels of the pile's own quality would be.
    pile : (n, d_v) float32 a network. truth : (n,) int64.
    """

    labelled: Views
    identity: np.ndarray
    copies: Views
    alike: Views
    pile: Views
    truth: np.ndarray
    rows: np.ndarray
    """Of the labelled photos among those of `choose_people`."""
    seen: Views
    """The other photos of the labelled people, as the pile shows them."""
    seen_truth: np.ndarray


def choose_photos(root: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """The photos of all worlds, the person of each, and which may be labelled."""
    random = np.random.default_rng(17)
    people = sorted(path for path in (root / "lfw112").iterdir() if path.is_dir())
    photos = [sorted(person.glob("*.jpg")) for person in people]
    count = np.array([len(each) for each in photos])
    many = np.flatnonzero(count >= MOST_PHOTOS)
    some = random.permutation(np.flatnonzero((count >= 2) & (count < MOST_PHOTOS)))[:PILE_PEOPLE]
    one = random.permutation(np.flatnonzero(count == 1))[:PILE_SINGLES]
    chosen = np.concatenate([many, some, one])
    paths = [path for person in chosen for path in photos[person][:PILE_PHOTOS]]
    identity = np.repeat(chosen, np.minimum(count[chosen], PILE_PHOTOS))
    rank = np.concatenate([np.arange(min(count[person], PILE_PHOTOS)) for person in chosen])
    return paths, identity, np.isin(identity, many) & (rank < MOST_PHOTOS)


def degrade_to_pile(faces: np.ndarray, seeds: np.ndarray, camera: str) -> np.ndarray:
    """Faces as one of the `CAMERAS` sees them."""
    degradation, side_px = CAMERAS[camera]
    if isinstance(degradation, str):
        degradation = DEGRADATIONS[degradation]
    return degrade_pixels(faces, seeds, degradation, side_px)


def embed_photos(
    root: Path, paths: Sequence[Path], kept: Path, change: Change | None, first_seed: int
) -> Views:
    """The photos in the view of each network, changed where asked; kept on disk as `kept`.npz."""
    file = kept.with_suffix(".npz")
    if file.exists():
        with np.load(file) as stored:
            return [stored[name] for name in sorted(stored.files)]
    from cdp.embedding import OnnxEmbedder

    models = [
        OnnxEmbedder(path.read_bytes(), threads=1, name=path.stem)
        for path in sorted((root / "onnx").glob("*.onnx"))
    ]
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for start in range(0, len(paths), 256):
        faces = read_faces(paths[start : start + 256])
        if change is not None:
            faces = change(faces, first_seed + np.arange(start, start + len(faces)))
        for model, found in zip(models, parts, strict=True):
            found.append(model.embed(faces)[0])
    views = [np.concatenate(found) for found in parts]
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{model.name: view for model, view in zip(models, views, strict=True)})
    return views


def read_faces(paths: Sequence[Path]) -> np.ndarray:
    return np.stack([decode_image(path.read_bytes()) for path in paths])


def match_copies(
    root: Path, kept: Path, world: SharpWorld, seed: int, camera: str
) -> tuple[Views, np.ndarray]:
    """Copies of the labelled photos that look like the pile's, made as a run with images does.

    Returns
    -------
    views : (c, d_v) float32 a network. photo : (c,) int64, the labelled row each is a copy of.
    """
    photos = len(world.identity) // LABELLED_PEOPLE
    copies = count_copies(world.identity)
    photo = np.tile(np.arange(len(world.identity)), copies)
    file = kept / f"matched_{camera}_{photos}_{seed}"
    if file.with_suffix(".npz").exists():
        return embed_photos(root, (), file, None, 0), photo
    paths, identity, may_be = choose_photos(root)
    rest = np.flatnonzero(~np.isin(identity, world.identity))
    random = np.random.default_rng(seed)
    sample = np.sort(random.permutation(rest)[:SAMPLE])
    poor = degrade_to_pile(read_faces([paths[row] for row in sample]), sample, camera)
    appearance = measure_appearance(np.stack([fit_square(face, SIDE_PX) for face in poor]))
    enrolled = np.flatnonzero(may_be)[world.rows]
    listed = [paths[row] for row in enrolled[photo]]
    seeds = np.concatenate([seed_copies(enrolled, copy, seed) for copy in range(1, copies + 1)])

    def match(faces: np.ndarray, number: np.ndarray) -> np.ndarray:
        copies, first = np.empty_like(faces), number < len(world.identity)
        for part, change in (
            (first, partial(degrade_sharp, shown=faces[first])),
            (~first, match_pile),
        ):
            if part.any():
                copies[part] = change(faces[part], appearance=appearance, seeds=seeds[number[part]])
        return copies

    return embed_photos(root, listed, file, match, 0), photo


def draw_sharp_world(
    root: Path, kept: Path, photos: int, seed: int, camera: str = "surveillance"
) -> SharpWorld:
    """A world with `photos` sharp photos of each labelled person.

    root : the data root. kept : the folder of the embedded photos. camera : a key of `CAMERAS`.
    """
    paths, identity, may_be = choose_photos(root)
    enrolled = np.flatnonzero(may_be)
    listed = [paths[row] for row in enrolled]
    degrade = partial(degrade_to_pile, camera=camera)
    pile = embed_photos(root, paths, kept / f"pile_{camera}", degrade, 0)
    sharp = embed_photos(root, listed, kept / "sharp", None, 0)
    copies = embed_photos(root, listed, kept / f"copies_{camera}", degrade, COPIES_AT)
    random = np.random.default_rng(seed)
    people = random.permutation(np.unique(identity[enrolled]))[:LABELLED_PEOPLE]
    turn = random.random(len(enrolled))
    order = np.lexsort((turn, identity[enrolled]))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) % MOST_PHOTOS
    rows = np.flatnonzero(np.isin(identity[enrolled], people) & (rank < photos))
    labelled = np.isin(identity, people)
    rest = np.flatnonzero(~labelled)
    seen = np.setdiff1d(np.flatnonzero(labelled), enrolled[rows])
    return SharpWorld(
        labelled=[view[rows] for view in sharp],
        identity=identity[enrolled[rows]],
        copies=[view[rows] for view in copies],
        alike=[view[enrolled[rows]] for view in pile],
        pile=[view[rest] for view in pile],
        truth=identity[rest],
        rows=rows,
        seen=[view[seen] for view in pile],
        seen_truth=identity[seen],
    )
