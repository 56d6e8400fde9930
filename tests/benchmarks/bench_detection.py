"""Detection and alignment on real photos: faces found, landmarks, embeddings, speed.

`python -m tests.benchmarks.bench_detection [--every 3] [--stage 1000] [--pictures DIR]`, with the
data root in CDP_DATA_ROOT: `photos/people/<person>/<photo>.jpg`, the ready crops
`lfw112/<person>/<photo>.jpg` of the same photos, `photos/groups/*`, and `onnx/edgeface_xs.onnx`.

Tables: the crops of the stage detect beside the ready ones; whose face is chosen, on these photos
and where somebody else stands small in the middle; photos reduced before detection, the sharp photo
aligned on these landmarks; the photos of groups; photos a second by size; with `--stage N` the
stage detect on N photos by two workers. Times are CPU times. The stage alone, as of 13,000 photos:
`python -m tests.benchmarks.bench_detection --tables --stage 13000`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import yaml
from PIL import Image, ImageDraw

from cdp.embedding import OnnxEmbedder
from cdp.images.align import align_face
from cdp.images.decode import decode_image
from cdp.images.detection import DetectionSettings, Detector
from pipelines.data.photos import AlignSettings, PhotoTask, choose_faces, find_faces

TASKS = ((1.0, 10), (1.0, 20), (1.0, 40), (0.3, 10), (0.3, 7), (0.2, 10), (0.2, 7), (0.15, 7))
"""Share of the photo's side, and `min_face_px`."""
SIDES = (150, 300, 640, 1280, 2560)
TABLES = ("crops", "choice", "reduced", "groups", "sides")
RULES = ("main", "largest", "central")


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every n-th photo")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument("--stage", type=int, metavar="N", help="also time the stage on N photos")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the groups, framed")
    options = parser.parse_args()
    root = Path(os.environ["CDP_DATA_ROOT"])
    paths = sorted((root / "photos/people").glob("*/*.jpg"))[:: options.every]
    if {"crops", "reduced"} & set(options.tables):
        compare_crops(root, paths, options.tables)
    if "choice" in options.tables:
        compare_rules([decode_image(path.read_bytes()) for path in paths])
    if "groups" in options.tables:
        find_groups(root / "photos/groups", options.pictures)
    if "sides" in options.tables:
        time_sides([decode_image(path.read_bytes()) for path in paths[:12]])
    if options.stage:
        time_stage(paths, options.stage)


def compare_crops(root: Path, paths: list[Path], tables: tuple[str, ...]) -> None:
    """Crops of the stage, and those on landmarks of reduced photos, beside the ready ones."""
    ready = [decode_image((root / "lfw112" / p.parent.name / p.name).read_bytes()) for p in paths]
    embedder = OnnxEmbedder((root / "onnx/edgeface_xs.onnx").read_bytes())
    wanted = embedder.embed(np.stack(ready))[0]
    people = np.array([path.parent.name for path in paths])
    rows = np.arange(len(paths))
    print(
        f"{len(paths)} photos; pairs of the ready crops: {verify(wanted, people, rows):.4f} right"
    )
    if "crops" in tables:
        for faces in RULES:
            compare_stage(paths, faces, embedder, wanted, people)
    if "reduced" not in tables:
        return
    print("size   min_face_px  found  landmarks off     cosine  least   right   ms")
    photos = [decode_image(path.read_bytes()) for path in paths]
    sharp: list[np.ndarray | None] = []
    for share, least_px in TASKS:
        landmarks, ms = find(photos, share, least_px)
        sharp = sharp or landmarks
        found = np.array([row for row in rows if landmarks[row] is not None])
        crops = np.stack([align_face(photos[row], landmarks[row]) for row in found])
        vectors = embedder.embed(crops)[0]
        cosine = (vectors * wanted[found]).sum(1)
        off = measure_error(landmarks, sharp)
        print(
            f"{share:4.0%}  {least_px:11}  {len(found):5}  {off.mean():6.2%} {off.max():6.2%}"
            f"  {cosine.mean():9.4f}  {cosine.min():.3f}  {verify(vectors, people, found):.4f}"
            f"  {ms:.1f}",
            flush=True,
        )


def compare_stage(
    paths: list[Path],
    faces: str,
    embedder: OnnxEmbedder,
    wanted: np.ndarray,
    people: np.ndarray,
) -> None:
    """One line: crops as the stage detect makes them, against the ready ones."""
    task = PhotoTask(AlignSettings(faces=faces), 112)
    names = [(str(path), True) for path in paths]
    found = find_faces(names, lambda path: Path(path).read_bytes(), task, {})
    chosen = np.array(found.rows["chosen"])
    place = {str(path): row for row, path in enumerate(paths)}
    rows = np.array([place[photo] for photo in np.array(found.rows["photo"])[chosen]])
    vectors = embedder.embed(found.crops)[0]
    cosine = (vectors * wanted[rows]).sum(1)
    print(
        f"stage, faces: {faces:8} {len(rows)} found, cosine mean {cosine.mean():.4f}, least "
        f"{cosine.min():.3f}, {int((cosine < 0.8).sum())} below .8; pairs "
        f"{verify(vectors, people, rows):.4f} right, of the same ready crops "
        f"{verify(wanted[rows], people, rows):.4f}",
        flush=True,
    )


def compare_rules(photos: list[np.ndarray]) -> None:
    """How often each rule chooses somebody else, where one stands aside and another behind.

    The person's photo, twice as large, is the left half of a picture; the next person's, half as
    large, is pasted over its middle.
    """
    detector = Detector()
    wrong = dict.fromkeys(RULES, 0)
    for photo, other in zip(photos, photos[1:] + photos[:1], strict=True):
        picture = np.full((300, 600, 3), 110, np.uint8)
        picture[:, :300] = cv2.resize(photo, (300, 300), interpolation=cv2.INTER_CUBIC)
        picture[100:175, 300:375] = cv2.resize(other, (75, 75), interpolation=cv2.INTER_AREA)
        faces = detector.detect(picture)
        centre = faces.box[:, ::2].mean(1)
        for rule in RULES:
            align = AlignSettings(faces=rule)
            chosen = choose_faces(faces, picture.shape, align, one=True)
            wrong[rule] += int((centre[chosen] > 300).any())
    print(f"somebody small in the middle of {len(photos)} pictures is taken for the person by "
          + ", ".join(f"{rule}: {count}" for rule, count in wrong.items()), flush=True)  # fmt: skip


def find(
    photos: list[np.ndarray], share: float, least_px: float
) -> tuple[list[np.ndarray | None], float]:
    """Landmarks of the most central face, in pixels of the whole photo, and ms of CPU a photo."""
    detector = Detector(DetectionSettings(min_face_px=least_px))
    landmarks: list[np.ndarray | None] = []
    spent = 0.0
    for photo in photos:
        small = photo
        if share != 1:
            small = cv2.resize(photo, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        started = time.process_time()
        faces = detector.detect(small)
        spent += time.process_time() - started
        if not len(faces):
            landmarks.append(None)
            continue
        centre = (faces.box[:, :2] + faces.box[:, 2:]) / 2
        away = np.linalg.norm(centre - np.array(small.shape[1::-1]) / 2, axis=1)
        ratio = np.array(small.shape[1::-1]) / photo.shape[1::-1]
        best = faces.landmarks[int(np.argmax(faces.side_px - 2 * away))]
        landmarks.append((best + 0.5) / ratio - 0.5)
    return landmarks, 1000 * spent / len(photos)


def measure_error(found: list[np.ndarray | None], sharp: list[np.ndarray | None]) -> np.ndarray:
    """(n,) mean distance of five landmarks from those of the whole photo, in eye distances."""
    both = [(a, b) for a, b in zip(found, sharp, strict=True) if a is not None and b is not None]
    return np.array([
        np.linalg.norm(a - b, axis=1).mean() / np.linalg.norm(b[1] - b[0]) for a, b in both
    ])  # fmt: skip


def verify(vectors: np.ndarray, people: np.ndarray, rows: np.ndarray) -> float:
    """Accuracy at the best threshold over all genuine pairs and as many impostor pairs."""
    at = {row: place for place, row in enumerate(rows)}
    same = [
        (at[a], at[b])
        for person in np.unique(people[rows])
        for a, b in combinations(rows[people[rows] == person], 2)
    ]
    rng = np.random.default_rng(0)
    other = rng.integers(0, len(rows), (4 * len(same), 2))
    other = other[people[rows][other[:, 0]] != people[rows][other[:, 1]]][: len(same)]
    genuine, impostor = (
        np.einsum("pd,pd->p", vectors[pairs[:, 0]], vectors[pairs[:, 1]])
        for pairs in (np.array(same), other)
    )
    cuts = np.sort(np.concatenate([genuine, impostor]))
    accepted = 1 - np.searchsorted(np.sort(genuine), cuts) / len(genuine)
    refused = np.searchsorted(np.sort(impostor), cuts) / len(impostor)
    return float((accepted + refused).max() / 2)


def find_groups(folder: Path, pictures: Path | None) -> None:
    """A line a photo of groups and odd cases; with `pictures` the photos, their faces framed."""
    detector = Detector()
    for path in sorted(folder.iterdir()):
        image = decode_image(path.read_bytes())
        started = time.process_time()
        faces = detector.detect(image)
        spent = time.process_time() - started
        score = " ".join(f"{each:.3f}" for each in faces.score)
        print(f"{path.name:16} {image.shape[1]:4} x {image.shape[0]:4} px  {len(faces):2} faces, "
              f"turned {faces.turn:3}, {spent:.1f} s; scores {score}", flush=True)  # fmt: skip
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image)
            pen = ImageDraw.Draw(picture)
            for box, points in zip(faces.box, faces.landmarks, strict=True):
                pen.rectangle(box.tolist(), outline=(40, 230, 90), width=3)
                for x, y in points.tolist():
                    pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 60, 0))
            picture.save(pictures / f"{path.stem}.png")


def time_sides(photos: list[np.ndarray]) -> None:
    """Photos a second of one core by the side of the photo, all enlarged to have a large face."""
    for least_px in (10, 40):
        detector = Detector(DetectionSettings(min_face_px=least_px))
        for side in SIDES:
            started = time.process_time()
            for photo in photos:
                detector.detect(cv2.resize(photo, (side, side), interpolation=cv2.INTER_CUBIC))
            spent = time.process_time() - started
            print(f"{side:4} px, min_face_px {least_px}: {len(photos) / spent:.1f} photos a second "
                  "of one core", flush=True)  # fmt: skip


def time_stage(paths: list[Path], count: int) -> None:
    """The stage detect on `count` copies of the photos, by two workers, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number in range(count):
            target = root / f"pile/{number // 1000:03}/{number:06}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[number % len(paths)], target)
        unlabelled = {"root": "pile", "layout": "pile"}
        (root / "data.yaml").write_text(yaml.safe_dump(
            {"name": "pile", "kind": "images", "unlabelled": unlabelled, "align": {}}
        ))  # fmt: skip
        base = {"base": {"name": "base", "backbone": "plain"}}
        (root / "run.yaml").write_text(yaml.safe_dump({"data": "data.yaml", "committee": base}))
        before, started = measure_children(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pipelines.run", "--config", str(root / "run.yaml"),
             "--data-root", place, "--runs-dir", str(root / "runs"), "--workers", "2",
             "--until", "detect"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        spent, wall = measure_children() - before, time.perf_counter() - started
    print(f"stage detect on {count} photos by two workers: {wall:.0f} s, {spent:.0f} s of CPU, "
          f"{1000 * spent / count:.1f} ms of CPU a photo, start included")  # fmt: skip


def measure_children() -> float:
    """Seconds of CPU of all processes this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
