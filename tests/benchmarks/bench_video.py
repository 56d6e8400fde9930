"""Pseudo-labels of a drawn video with and without tracks: what following a face is worth.

    python -m tests.benchmarks.bench_video --seeds 3

Clips of two drawn faces each, which move over a background while the light changes; some people are
in two clips. The whole pipeline runs on the files: decode, detect, track, embed, propagate. The
committee are two fixed projections of the pixels, weaker than any trained model, and it votes.
Needs `cdp[video]` and `cdp[detect]`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

import cdp
from cdp.metrics.clustering import score_bcubed, score_pairwise
from cdp.synthetic.identities import SyntheticFaces
from pipelines.run import main as run_pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))

from known_clusters import build_projection

CAST = ((0, 1), (2, 3), (4, 5), (0, 3))
"""Of each clip the person at the left and at the right."""
FRAMES, EVERY, STEP_PX, SHAPE = 48, 4, 2, (260, 520, 3)


def main() -> None:
    """Print one line a seed and setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--light", type=float, default=0.4, help="change of the light, as a share")
    options = parser.parse_args()
    print("seed  tracks  faces  clusters  pairwise P / R / F      BCubed F")
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as place:
            write_data(Path(place), seed, options.light)
            for tracks in ("true", "false"):
                print(f"{seed:4}  {tracks:6}  {measure(Path(place), tracks)}", flush=True)


def write_data(place: Path, seed: int, light: float) -> None:
    """Clips, committee, manifest and config."""
    faces = SyntheticFaces(
        size_px=112, seed=seed, labelled_identities=2, unlabelled_identities=6,
        evaluation_identities=2, images_min=2, images_max=2, evaluation_images=2,
    )  # fmt: skip
    pile = np.flatnonzero(faces.split == "unlabelled")
    drawn = faces.draw(pile[np.unique(faces.identity[pile], return_index=True)[1]])
    (place / "cameras").mkdir()
    for number, people in enumerate(CAST):
        frames = draw_clip(drawn[list(people)], light, seed + number)
        write_video(place / "cameras" / f"clip{number}.mkv", frames)
    for name, width, number in (("m", 64, 0), ("n", 48, 1)):
        (place / f"{name}.onnx").write_bytes(build_projection(width, number))
    manifest = {"name": "video", "kind": "images", "size_px": 48, "align": {"faces": "all"},
                "unlabelled": {"root": "cameras", "every": EVERY}}  # fmt: skip
    committee = {"base": {"name": "m", "onnx": "m.onnx"},
                 "members": [{"name": "n", "onnx": "n.onnx"}]}  # fmt: skip
    config = {"data": "data.yaml", "committee": committee, "embed": {"reduce_px": None},
              "knn": {"k": 8, "near_equal": False},
              "mediate": {"method": "vote", "vote": {"min_similarity": 0.97}}}  # fmt: skip
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    (place / "video.yaml").write_text(yaml.safe_dump(config))


def draw_clip(people: np.ndarray, light: float, seed: int) -> list[np.ndarray]:
    """Frames of two faces (2, 112, 112, 3) that move over a background in changing light."""
    blocks = np.random.default_rng(seed).integers(90, 140, (13, 26, 1))
    back = np.kron(blocks, np.ones((20, 20, 3)))
    frames = []
    for number in range(FRAMES):
        canvas = back.copy()
        bright = 1 + light * np.sin(np.pi * number / FRAMES)
        for place, face in enumerate(people):
            left, top = 10 + 250 * place + STEP_PX * number, 20 + 60 * place + number // 2
            canvas[top : top + 112, left : left + 112] = face * bright
        frames.append(np.clip(canvas, 0, 255).astype(np.uint8))
    return frames


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """An MPEG-4 video of 25 frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = SHAPE[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 8_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def measure(place: Path, tracks: str) -> str:
    """Run up to propagate; how many faces and clusters, and how good the pseudo-labels are."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = run_pipeline(
            ["--config", str(place / "video.yaml"), "--data-root", str(place), "--workers", "1",
             "--runs-dir", str(place / "runs"), "--until", "propagate", f"name=t{tracks}",
             f"propagate.tracks={tracks}"]
        )  # fmt: skip
    if code:
        raise SystemExit(written.getvalue())
    run = cdp.open_run(place / "runs" / f"t{tracks}")
    truth, label = find_truth(run.read("detect", "faces")), run.labels.set_index("path")
    found = label.pseudo_label[truth.index].to_numpy()
    person = truth.to_numpy(np.int64)
    precision, recall, f = score_pairwise(person, found)
    return (f"{len(truth):5}  {len(set(found.tolist()) - {-1}):8}  {precision:.3f} / {recall:.3f} "
            f"/ {f:.3f}  {score_bcubed(person, found)[2]:8.3f}")  # fmt: skip


def find_truth(faces: pd.DataFrame) -> pd.Series:
    """Path of a face -> its person, by the clip and the place at which it was found.

    A find that is no drawn face is left out.
    """
    chosen = faces[faces.chosen].set_index("path")
    clip = chosen.photo.str.extract(r"clip(\d+)\.mkv/(\d+)").astype(int)
    middle = (chosen.left + chosen.right) / 2 - STEP_PX * clip[1].to_numpy()
    side = (middle > SHAPE[1] / 2).astype(int)
    cast = np.array(CAST)[clip[0].to_numpy(), side.to_numpy()]
    near = (middle - (66 + 250 * side)).abs() < 40
    return pd.Series(cast, chosen.index)[near]


if __name__ == "__main__":
    main()
