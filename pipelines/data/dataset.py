"""A data set: its images, splits, listed pairs and ready features, as a manifest describes them.

The contract:
- Three kinds: `images` (files below the data root), `synthetic` (drawn, no file) and `features`
  (ready embeddings, in the layout of the authors' release, `.npy` or Parquet).
- A split is labelled, unlabelled or evaluation. An identity of the labelled or evaluation split is
  in no other split, as far as identities are known.
- A path in a manifest stays inside the data root, links included. A link below a folder may point
  to a file inside the root. A link out of the root, a link to a folder, a pipe or a device is never
  opened: its entry has a `fault`. So has a file name that is not UTF-8.
- The size of ready features is checked against their list before any of them is read or memory is
  allocated.
- `Dataset.digest` identifies the content: manifest settings and file contents, no absolute path.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdp.errors import ConfigError, DataError
from pipelines.data.crops import read_crops
from pipelines.data.feature_rows import count_rows, list_rows, read_lines, read_names, require_order
from pipelines.data.features import (
    SUFFIXES,
    check_dimensions,
    find_bad_rows,
    open_features,
    read_dims,
)
from pipelines.data.folders import LEFT_OUT, find_fault, join_path, locate, walk_folder
from pipelines.data.layouts import find_archives, find_place, list_archive, read_place
from pipelines.data.layouts.flat import name_people
from pipelines.data.layouts.listed import ListFacts, inspect_list, list_listed
from pipelines.data.layouts.tracks import FOLDERS, name_tracks
from pipelines.data.manifest import (
    SPLITS,
    DataManifest,
    Entry,
    FolderSettings,
    PairsSettings,
    PeopleSettings,
)
from pipelines.data.names import fold_name, unify_names
from pipelines.data.pairs import ListedPair, parse_pairs
from pipelines.files import FileDigests, digest_json
from pipelines.yaml_files import read_yaml, validate_settings

_FRAME = re.compile(r".*?(\d{1,12})")
"""A file name without its suffix that ends in a number."""
if TYPE_CHECKING:
    from cdp.synthetic.identities import SyntheticFaces

LARGEST_FILE = 256 << 20
"""Most bytes of an image file."""
ENROLLED = {"labelled", "evaluation"}
PROBES_HINT = (
    ". Probes of labelled people are `evaluation: {gallery: <labelled folder>, probes: <folder>}`"
)
STRAY = "in no person's folder: <person>/<image> expected"


@dataclass(frozen=True)
class Dataset:
    """A manifest and its data root; small enough to be sent to workers.

    crops : the publication of the stage detect, whose crops are the images.
    """

    manifest: DataManifest
    root: Path | None
    models_root: Path | None = None
    crops: Path | None = None

    @classmethod
    def open(
        cls, manifest_path: Path, data_root: Path | None, models_root: Path | None = None
    ) -> Dataset:
        """Read a manifest and check that the data root and the folders in it exist.

        models_root : where model files are looked for before the data root.
        """
        if models_root is not None and not models_root.is_dir():
            raise DataError(f"--models-dir: {models_root} is not a directory")
        manifest = validate_settings(
            DataManifest, read_yaml(manifest_path), source=str(manifest_path)
        )
        if manifest.kind == "synthetic":
            return cls(manifest, None, models_root)
        if data_root is None:
            raise DataError(
                f"{manifest_path} describes files, and no data root was given. Pass --data-root "
                f"DIR or set CDP_DATA_ROOT. How to get the data: {manifest.source or 'not stated'}"
            )
        if not data_root.is_dir():
            raise DataError(
                f"the data root {data_root} is not a directory. Pass --data-root DIR or set "
                f"CDP_DATA_ROOT. How to get the data: {manifest.source or 'not stated'}"
            )
        dataset = cls(manifest, data_root.resolve(), models_root)
        for folder in dataset._folders.values():
            place = dataset.locate(folder.root)
            if place.is_file() and manifest.kind == "images":
                find_archives(folder.root, place)  # refuses a file of another kind
            elif not place.is_dir():
                raise DataError(
                    f"{manifest_path} names {folder.root!r}, which is not a directory below "
                    f"{data_root}. Check --data-root"
                )
        for setting in ("given", "restore") if manifest.align is not None else ():
            file = getattr(manifest.align, setting)
            if file is not None and not dataset.locate(file).is_file():
                raise DataError(
                    f"{manifest_path} names the file {file!r} in align.{setting}, and there is no "
                    f"such file below {data_root}"
                )
        if dataset._pairs is not None and not dataset.locate(dataset._pairs.file).is_file():
            raise DataError(
                f"{manifest_path} names the pairs {dataset._pairs.file!r}, and there is no such "
                f"file below {data_root}"
            )
        return dataset

    @property
    def _folders(self) -> dict[str, PeopleSettings | FolderSettings]:
        named = {split: getattr(self.manifest, split) for split in ("people", *SPLITS)}
        named["gallery"] = self.manifest.gallery_apart
        return {split: folder for split, folder in named.items() if folder is not None}

    def locate(self, path: str) -> Path:
        """An existing or future path below the data root; DataError when it would leave it."""
        if self.root is None:
            raise ConfigError(
                f"{path!r}: a synthetic data set has no files; use a backbone, or name the folder "
                "of the models with --models-dir"
            )
        return locate(self.root, path, links=self.manifest.allow_links)

    def locate_model(self, path: str) -> Path:
        """The file of a model: below the models' folder, links followed, or below the data root."""
        if self.models_root is not None:
            place = locate(Path(os.path.abspath(self.models_root)), path, links=True)
            if self.root is None or place.exists():
                return place
        return self.locate(path)

    # -- listing

    def list_entries(self) -> list[Entry]:
        """Every image with its split, ordered by split, then path. Reads no image.

        Ready features keep the order of their list, which is the order of their vectors.
        """
        if self.manifest.kind == "features":
            return unify_names(_list_features(self))
        if self.manifest.kind == "synthetic":
            entries = _list_synthetic(self)
        elif self.manifest.people is not None:
            entries = _split_people(self, self.manifest.people)
        else:
            entries = [
                entry
                for split in SPLITS
                if split in self._folders
                for entry in _list_folder(self, split, getattr(self.manifest, split))
            ]
            entries = _leave_out_listed(entries, self._folders)
        if self.manifest.gallery_apart is not None:
            entries += _list_folder(self, "evaluation", self.manifest.gallery_apart)
        entries = unify_names(entries)
        _check_splits(entries, self.manifest.name, enrolled=self.manifest.has_real_probes)
        order = {split: position for position, split in enumerate(SPLITS)}
        return sorted(entries, key=lambda entry: (order[entry.split], entry.path))

    def inspect_lists(self, entries: Sequence[Entry]) -> list[ListFacts]:
        """What the lists that the manifest names hold beside all these entries."""
        roots: dict[str, dict[str, str]] = {}
        for split, folder in self._folders.items():
            if self.kind == "images" and isinstance(folder, FolderSettings) and folder.list:
                roots.setdefault(folder.list, {})[split] = folder.root
        used = {entry.path for entry in entries}
        return [inspect_list(name, of, used, self.locate) for name, of in roots.items()]

    def digest(self, digests: FileDigests) -> str:
        """SHA-256 of the settings and the content of the files; the root is not part of it."""
        settings = self.manifest.model_dump(
            mode="json", exclude={"title", "licence", "source", "notes"}
        )
        files = ""
        if self.root is not None:
            found = [
                (path, fault)
                for split, folder in self._folders.items()
                for path, fault in _list_content(self, split, folder)
                if not fault.startswith(LEFT_OUT)
            ]
            paths = [path for path, fault in found if not fault]
            faults = sorted([path, fault] for path, fault in found if fault)
            if self._pairs is not None:
                paths.append(self._pairs.file)
            if self.kind == "features":
                named = {name for f in self._folders.values() for name in _name_dims_files(f.root)}
                paths += [name for name in named - set(paths) if self.locate(name).is_file()]
            if self.manifest.align is not None:
                named_files = (self.manifest.align.given, self.manifest.align.restore)
                paths += [path for path in named_files if path is not None]
            files = digests.digest_tree(self.root, paths)
            if faults:
                escaped = json.dumps(faults)  # ASCII: a name need not be UTF-8
                files = digest_json([files, escaped])
        return digest_json({"settings": settings, "files": files})

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def _pairs(self) -> PairsSettings | None:
        return self.manifest.people.pairs if self.manifest.people else None

    def find_fault(self, path: str) -> str:
        """Why a path below the root must not be opened, or an empty string."""
        assert self.root is not None
        return find_fault(self.root, path, links=self.manifest.allow_links)

    def _walk(self, folder: str, *, any_suffix: bool = False) -> list[tuple[str, str]]:
        assert self.root is not None
        links = self.manifest.allow_links
        return walk_folder(self.root, folder, any_suffix=any_suffix, links=links)

    # -- reading

    def read_pairs(self) -> list[ListedPair]:
        """The listed verification pairs, in order; empty when the manifest names no list."""
        if self._pairs is None or self.manifest.people is None:
            return []
        place = self.locate(self._pairs.file)
        return parse_pairs(read_lines(place), self.manifest.people.root, place)

    def lies_in_archive(self, path: str) -> bool:
        """Whether the image is part of a `.rec` or `.tar` file."""
        return find_place(path, self.locate) is not None

    def read_bytes(self, path: str) -> bytes:
        """The bytes of one image file; DataError when it cannot be read."""
        try:
            inside = find_place(path, self.locate)
            if inside is not None:
                return read_place(inside, self.locate)
            place = self.locate(path)
            fault = self.find_fault(path) or _find_excess(place)
            if fault:
                raise DataError(fault)
            return place.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error

    def read_faces(self, paths: Sequence[str]) -> np.ndarray:
        """Faces of ingested samples -> uint8 (n, s, s, 3) RGB with s = `size_px`."""
        from cdp.images.decode import decode_image, fit_square, pad_square

        size_px = self.manifest.size_px
        if self.crops is not None:
            return read_crops(self.crops, paths, size_px)
        if self.manifest.align is not None:
            raise DataError(
                f"data set {self.manifest.name} holds photos, whose faces only a run finds; align "
                "them first: cdp align --from DIR --to DIR"
            )
        if self.kind == "synthetic":
            faces, row_of = _open_synthetic(self)
            return faces.draw(np.array([row_of[path] for path in paths], np.int64))
        images = np.empty((len(paths), size_px, size_px, 3), np.uint8)
        for image, path in zip(images, paths, strict=True):
            try:
                # Images too small or too large for this run were rejected at ingest.
                picture = decode_image(self.read_bytes(path), min_px=1)
                whole = pad_square(picture) if self.manifest.square == "pad" else picture
                image[:] = fit_square(whole, size_px)
            except DataError as error:
                raise DataError(
                    f"{path}: {error}; it could be read at ingest. Run --stage ingest again"
                ) from error
        return images

    def read_features(self, split: str, model: str) -> np.ndarray:
        """Ready embeddings of one split: (n, d) floats in list order, mapped if possible."""
        folder = getattr(self.manifest, split).root
        count = count_rows(self.locate, folder)
        for suffix in SUFFIXES:
            path = self.locate(f"{folder}/features/{model}{suffix}")
            if path.is_file():
                dimension = self._find_dimension(folder, model)
                require_order(self.locate, folder, path)
                names = partial(read_names, self.locate, folder)
                return open_features(path, count, dimension, names)
        raise DataError(
            f"no features of {model!r} below {self.locate(folder) / 'features'}: expected "
            f"{model}.bin, {model}.npy, {model}.npz or {model}.parquet"
        )

    def _find_dimension(self, folder: str, model: str) -> int | None:
        """The dimension of a model's vectors, where the manifest or a `dims.txt` says it."""
        if model in self.manifest.dims:
            return self.manifest.dims[model]
        return read_dims(map(self.locate, _name_dims_files(folder))).get(model)

    def find_bad_rows(self, models: Sequence[str]) -> dict[tuple[str, int], str]:
        """(split, row of its list) -> reason, for vectors that cannot be used in some view.

        DataError where views do not fit their lists or each other; reads every vector.
        """
        bad: dict[tuple[str, int], str] = {}
        dims: list[tuple[str, str, int]] = []
        for split in self.list_feature_splits():
            views = {model: self.read_features(split, model) for model in models}
            dims += [(split, model, vectors.shape[1]) for model, vectors in views.items()]
            check_dimensions(dims)
            bad |= {(split, row): reason for row, reason in find_bad_rows(views).items()}
        return bad

    def list_feature_splits(self) -> list[str]:
        """The splits of which there are ready features."""
        return [split for split in ("labelled", "unlabelled") if split in self._folders]


def _name_dims_files(folder: str) -> list[str]:
    """Where a `dims.txt` may lie: in the folder, beside its features, or in the folder above."""
    above = os.path.normpath(os.path.join(folder, os.pardir, "dims.txt"))
    inside = [join_path(folder, "dims.txt"), join_path(folder, "features/dims.txt")]
    return inside if above.startswith(os.pardir) else [*inside, above]


# ------------------------------------------------------------------------------------- listing


def _find_excess(place: Path) -> str:
    size = place.stat().st_size
    return f"too large: {size} bytes, at most {LARGEST_FILE}" if size > LARGEST_FILE else ""


def _leave_out_listed(
    entries: list[Entry], folders: Mapping[str, PeopleSettings | FolderSettings]
) -> list[Entry]:
    """Without the images of a folder that the list of another split names."""
    by_list = {
        split
        for split, folder in folders.items()
        if isinstance(folder, FolderSettings) and folder.list is not None
    }
    listed = {entry.path for entry in entries if entry.split in by_list}
    kept = [entry for entry in entries if entry.split in by_list or entry.path not in listed]
    for split in {entry.split for entry in entries} - {entry.split for entry in kept}:
        raise DataError(
            f"every image of the {split} folder is named by the list of another split: nothing is "
            "left in it. Name a folder with further images"
        )
    return kept


def _list_content(
    dataset: Dataset, split: str, folder: PeopleSettings | FolderSettings
) -> list[tuple[str, str]]:
    """(path below the data root, fault) of the files whose content a folder's images come from."""
    if isinstance(folder, FolderSettings) and folder.list is not None:
        listed = _list_folder(dataset, split, folder)
        return [(folder.list, ""), *((entry.path, entry.fault) for entry in listed)]
    any_suffix = dataset.kind == "features"
    archives = [] if any_suffix else find_archives(folder.root, dataset.locate(folder.root))
    indexes = [os.path.splitext(archive)[0] + ".idx" for archive in archives]
    content = [*archives, *(index for index in indexes if dataset.locate(index).is_file())]
    walked = [] if archives == [folder.root] else dataset._walk(folder.root, any_suffix=any_suffix)
    return [
        *((path, dataset.find_fault(path)) for path in content),
        *((join_path(folder.root, path), fault) for path, fault in walked),
    ]


def _list_archives(dataset: Dataset, split: str, root: str, layout: str, every: int) -> list[Entry]:
    """The images of the archives of a folder; without people where it is a pile."""
    entries = []
    for archive in find_archives(root, dataset.locate(root)):
        fault = dataset.find_fault(archive)
        if fault:
            entries.append(Entry(archive, split, None, fault))
            continue
        for member in list_archive(archive, dataset.locate(archive)):
            if member.frame is not None and member.frame % every:
                continue
            person = member.identity if layout == "people" else None
            fault = member.fault
            if layout == "people" and person is None and not fault:
                fault = "no person: neither a label nor a folder inside the archive"
            clip = None if member.frame is None else archive
            name = f"{archive}/{member.name}"
            entries.append(Entry(name, split, person, fault, clip, member.frame))
    return entries


def _list_folder(dataset: Dataset, split: str, folder: FolderSettings) -> list[Entry]:
    layout = folder.layout or ("pile" if split == "unlabelled" else "people")
    if folder.list is not None:
        return list_listed(
            split,
            folder.root,
            folder.list,
            dataset.locate,
            dataset.find_fault,
            people=layout == "people" and split != "unlabelled",
        )
    if layout == "tracks":
        pile = FolderSettings(root=folder.root, layout="pile")
        faces = _list_folder(dataset, split, pile)
        return name_tracks(faces, folder.root, folder.pattern or FOLDERS, folder.step)
    if folder.pattern is not None:
        pile = FolderSettings(root=folder.root, layout="pile")
        return name_people(_list_folder(dataset, split, pile), folder.pattern)
    inside = _list_archives(dataset, split, folder.root, layout, folder.step)
    files = _walk_files(dataset, folder.root)
    if inside and all(fault.startswith(LEFT_OUT) for _, fault in files):
        return inside
    listed = _list_files(files, split, folder.root, layout)
    return [*inside, *(number_frames(listed, folder.step) if layout == "frames" else listed)]


def number_frames(entries: list[Entry], every: int) -> list[Entry]:
    """The entries of folders of frames with their clip and frame, every so many of them.

    A file without a number at the end of its name is an image of its own.
    """
    found = []
    for entry in entries:
        clip, name = os.path.split(entry.path)
        number = _FRAME.fullmatch(os.path.splitext(name)[0])
        if number is None or entry.fault:
            found.append(entry)
        elif int(number[1]) % every == 0:
            found.append(replace(entry, clip=clip or ".", frame=int(number[1])))
    return found


def _walk_files(dataset: Dataset, root: str) -> list[tuple[str, str]]:
    """The files below a folder, its archives and their indexes left aside."""
    place = dataset.locate(root)
    if place.is_file():
        return []
    archives = {os.path.relpath(path, root) for path in find_archives(root, place)}
    archives |= {os.path.splitext(path)[0] + ".idx" for path in archives}
    return [found for found in dataset._walk(root) if found[0] not in archives]


def _list_files(found: list[tuple[str, str]], split: str, root: str, layout: str) -> list[Entry]:
    if all(fault.startswith(LEFT_OUT) for _, fault in found):
        raise DataError(f"the {split} folder {root!r} holds no image")
    entries = []
    for path, fault in found:
        # The first folder is the person, whatever lies below: sessions, cameras, years.
        person = path.partition(os.sep)[0] if layout == "people" and os.sep in path else None
        if layout == "people" and person is None and not fault:
            fault = STRAY
        entries.append(Entry(join_path(root, path), split, person, fault))
    stray = [entry for entry in entries if entry.fault == STRAY]
    if stray and not any(entry.identity and not entry.fault for entry in entries):
        raise DataError(
            f"{stray[0].path}: layout people expects <person>/<image>; use layout pile "
            "for images without identities"
        )
    return entries


def _split_people(dataset: Dataset, people: PeopleSettings) -> list[Entry]:
    folder = FolderSettings(root=people.root, layout="people", pattern=people.pattern)
    entries = unify_names(_list_folder(dataset, "unlabelled", folder))
    held_out = _list_held_out(dataset, people)
    counts = Counter(
        entry.identity
        for entry in entries
        if entry.identity and not entry.fault and fold_name(entry.identity) not in held_out
    )
    names = sorted(str(name) for name, count in counts.items() if count >= people.min_images)
    order = np.random.default_rng(people.seed).permutation(len(names))
    labelled = math.floor(people.labelled * len(names))
    evaluation = math.floor(people.evaluation * len(names))
    if labelled + evaluation > len(names):
        raise ConfigError("people: the labelled and evaluation shares add up to more than 1")
    split_of = {names[i]: "labelled" for i in order[:labelled]}
    split_of |= {names[i]: "evaluation" for i in order[labelled : labelled + evaluation]}

    def find_split(entry: Entry) -> str:
        name = str(entry.identity)
        return "evaluation" if fold_name(name) in held_out else split_of.get(name, "unlabelled")

    return [replace(entry, split=find_split(entry)) for entry in entries]


def _list_held_out(dataset: Dataset, people: PeopleSettings) -> set[str]:
    """The people of the held-out folds, each name folded."""
    if people.pairs is None or not people.pairs.held_out_folds:
        return set()
    listed = dataset.read_pairs()
    folds = 1 + max(pair.fold for pair in listed)
    beyond = [fold for fold in people.pairs.held_out_folds if fold > folds]
    if beyond:
        raise ConfigError(f"people.pairs.held_out_folds: 1..{folds} expected, got {beyond[0]}")
    return {
        fold_name(person)
        for pair in listed
        if pair.fold + 1 in people.pairs.held_out_folds
        for person in pair.people
    }


def _check_splits(entries: list[Entry], name: str, *, enrolled: bool) -> None:
    """Refuse a person or a path of two splits.

    enrolled : labelled people may have probes, which are judged by their own photos.
    """
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.identity is None:
            continue
        other = first.setdefault(entry.identity, entry)
        both = {other.split, entry.split}
        if len(both) > 1 and not (enrolled and both <= ENROLLED):
            raise DataError(
                f"data set {name}: {entry.identity!r} is in the {other.split} and in the "
                f"{entry.split} split ({other.path}; {entry.path}); a person, however spelt, may "
                "be in one only. Move or rename one of the two" + PROBES_HINT * (both <= ENROLLED)
            )
    paths = Counter(entry.path for entry in entries)
    twice = [path for path, count in paths.items() if count > 1]
    if twice:
        splits = sorted({entry.split for entry in entries if entry.path == twice[0]})
        raise DataError(
            f"data set {name}: {twice[0]!r} is listed {paths[twice[0]]} times, in "
            f"{' and '.join(splits)}; the splits overlap. Give each split a folder that lies in no "
            "other split's folder"
        )


# ----------------------------------------------------------------------------------- synthetic


@lru_cache(maxsize=2)
def _open_synthetic_cached(settings: str, size_px: int) -> tuple[SyntheticFaces, dict[str, int]]:
    from cdp.synthetic.identities import SyntheticFaces

    try:
        faces = SyntheticFaces(size_px=size_px, **json.loads(settings))
    except TypeError as error:
        raise ConfigError(f"synthetic: {error}") from error
    return faces, {faces.name(row): row for row in range(len(faces.identity))}


def _open_synthetic(dataset: Dataset) -> tuple[SyntheticFaces, dict[str, int]]:
    manifest = dataset.manifest
    return _open_synthetic_cached(json.dumps(manifest.synthetic, sort_keys=True), manifest.size_px)


def _list_synthetic(dataset: Dataset) -> list[Entry]:
    faces, row_of = _open_synthetic(dataset)
    return [
        Entry(name, str(faces.split[row]), f"id_{int(faces.identity[row]):05d}")
        for name, row in row_of.items()
    ]


# ------------------------------------------------------------------------------------ features


def _list_features(dataset: Dataset) -> list[Entry]:
    entries = []
    for split in dataset.list_feature_splits():
        folder = getattr(dataset.manifest, split)
        rows = list_rows(dataset.locate, folder.root, people=split == "labelled")
        # The two splits number their identities independently.
        entries += [
            Entry(name, split, f"{split}/{person}" if person else None) for name, person in rows
        ]
    return entries
