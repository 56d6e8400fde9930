"""The export `recognizer`: a trained recognizer as ONNX and safetensors, with a model card.

The contract:
- The directory has `recognizer.onnx`, `recognizer.safetensors` (for `cdp.Recognizer.load`) and the
  model card `README.md`: input, output, training data, results.
- It appears only after onnxruntime reproduced the recognizer's vectors; nothing is overwritten.
- Every number in the card is from the run's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdp.errors import ConfigError, DataError, StageError
from pipelines.headlines import describe_loss
from pipelines.invocation import format_command
from pipelines.store import Published

if TYPE_CHECKING:
    from cdp.recognizer.recognizer import Recognizer

DEFAULTS = ("distilled", "labelled_pseudo", "labelled_only")
"""Without --subject, the first of these that the run trained is exported."""

ON_HELD_OUT = (
    "On people held out of all training. `threshold@far` is the cosine above which a pair is one "
    "person at that false accept rate."
)
ON_PROBES = (
    "Real probes, as they came and by their size, against enrolled people. `threshold@far` is the "
    "cosine above which a probe is taken for an enrolled person at that false accept rate, "
    "`threshold@fpir` that above which it is nobody's in all but that share of unknown people; "
    "`cdp.Gallery(threshold=...)` takes either."
)


def add_parser(subparsers: Any) -> None:
    """The options of `recognizer`."""
    parser = subparsers.add_parser("recognizer", help="a trained recognizer as ONNX, with its card")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a finished run, e.g. runs/default")
    add(
        "--subject", metavar="NAME", help=f"which one (default: the first of {', '.join(DEFAULTS)})"
    )
    add("--out", type=Path, metavar="DIR", help="the output (default: <run>/export)")
    parser.set_defaults(export=export_recognizer, rests_on="retrain")


def export_recognizer(options: argparse.Namespace) -> str:
    """Write the directory; return a summary line."""
    from cdp.recognizer.onnx_export import export_onnx, measure_difference
    from cdp.recognizer.recognizer import Recognizer

    retrain = _open(options.run, "retrain")
    subjects = [str(name) for name in retrain.facts["subjects"]]
    subject = options.subject or next(name for name in DEFAULTS if name in subjects)
    if subject not in subjects:
        raise ConfigError(f"the run has no recognizer {subject!r}; it has: {', '.join(subjects)}")
    out = options.out or options.run / "export"
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")
    recognizer = Recognizer.load(retrain.directory / f"{subject}.safetensors", device="cpu")
    notes = {"cdp.subject": subject, "cdp.run": retrain.fingerprint}
    metrics = _read_metrics(options.run)
    notes |= _list_thresholds(metrics, subject)
    loss = describe_loss(metrics, subject) if metrics is not None else ""
    model = export_onnx(recognizer, notes=notes)
    difference = measure_difference(recognizer, model)
    recognizer.meta = {**recognizer.meta, "subject": subject, "run": retrain.fingerprint}
    card = compose_card(options.run, retrain, recognizer, subject, difference)
    draft = out.with_name(f".{out.name}.draft-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        (draft / "recognizer.onnx").write_bytes(model)
        recognizer.save(draft / "recognizer.safetensors")
        (draft / "README.md").write_text(card, encoding="utf-8")
        draft.rename(out)
    except OSError as error:
        place = error.filename or out
        raise StageError(f"cannot write {place}: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return (
        f"{out}: {subject}, {recognizer.input_px} px to {recognizer.embedding_dim} numbers, "
        f"{len(model) / 2**20:.1f} MiB; onnxruntime agrees to {difference:.0e}"
        + (f"\nwarning: {loss}" if loss else "")
    )


def _read_metrics(run: Path) -> Any:
    """Table `evaluate/metrics`; None where the run has none."""
    evaluate = Published.open("evaluate", run / "evaluate")
    return None if evaluate is None else evaluate.read("metrics").to_pandas()


def _list_thresholds(metrics: Any, subject: str) -> dict[str, str]:
    """The cosine of each false accept rate, by kind of probe, for the metadata of the model."""
    if metrics is None:
        return {}
    chosen = metrics[(metrics.subject == subject) & metrics.metric.str.startswith("threshold@")]
    return {f"cdp.{row.metric} {row.protocol}": f"{row.value:.4f}" for row in chosen.itertuples()}


def _open(run: Path, stage: str) -> Published:
    published = Published.open(stage, run / stage)
    if published is None:
        raise DataError(
            f"{run} has not published {stage}. Choose a finished run, or run "
            f"{format_command('run', '--stage', 'all')} first"
        )
    damage = published.find_damage()
    if damage:
        raise StageError(f"{damage}. Repair it with --stage {stage} --force")
    return published


def compose_card(
    run: Path, retrain: Published, recognizer: Recognizer, subject: str, difference: float
) -> str:
    """The model card as Markdown."""
    px, dim = recognizer.input_px, recognizer.embedding_dim
    spec = recognizer.backbone.spec
    settings = dict(retrain.manifest["ingredients"]["config"]["retrain"])
    own = settings.pop("student", {})
    settings |= own if subject == "distilled" else {}
    parameters = sum(p.numel() for p in recognizer.backbone.parameters())
    sections = [
        f"# Low-resolution face recognizer `{subject}`",
        f"Embeds an aligned face of {px} x {px} pixels as {dim} numbers of unit length. The dot "
        "product of two embeddings is their cosine similarity.",
        "## Use",
        f"| | |\n|---|---|\n| input | `image` (n, 3, {px}, {px}) float32, RGB in 0..255 |\n"
        f"| output | `embedding` (n, {dim}) float32, unit length |\n"
        f"| network | {spec.name}, width {spec.width:g}, {parameters:,} parameters |\n"
        f"| files | `recognizer.onnx`; `recognizer.safetensors`, equal to {difference:.0e} |",
        "Preprocessing: find five landmarks (eyes, nose, corners of the mouth), bring the face "
        "upright into the standard 112 x 112 frame (`cdp.images.align.align_face`), reduce it to "
        f"{px} x {px} by area averages. Scaling of pixels, the mirror image and the unit length "
        "are inside the model.",
        "```python\nimport numpy as np, onnxruntime\n"
        'session = onnxruntime.InferenceSession("recognizer.onnx")\n'
        f"faces = np.zeros((1, 3, {px}, {px}), np.float32)  # RGB, 0..255\n"
        'vectors = session.run(["embedding"], {"image": faces})[0]\n\n'
        "import cdp  # the same, from aligned faces of any side\n"
        'recognizer = cdp.Recognizer.load("recognizer.safetensors")\n'
        "vectors = recognizer.embed(np.zeros((1, 112, 112, 3), np.uint8))\n"
        "```",
        "From a photo and five landmarks in it, with cv2 and numpy alone:",
        _format_alignment(px),
        "## Data",
        _format_data(run, retrain),
        "## Training",
        "| setting | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in settings.items()),
        "## Results",
        _format_results(run, subject),
        "## Limits",
        "The results above hold for the named data; other cameras and other people give other "
        "results, and thresholds do not transfer. Measure on your own faces before relying on "
        "it. Pseudo-labels are not verified: people whom the committee confuses, this recognizer "
        "was trained to confuse. It has not been tested for differences between groups of people, "
        "and a match is no proof of identity.",
    ]
    return "\n\n".join(sections) + "\n"


def _format_alignment(px: int) -> str:
    """Code that aligns a face and embeds it as `align_face` and `Recognizer.embed` do."""
    from cdp.images.align import TEMPLATE_112

    template = ", ".join(f"[{x:.4f}, {y:.4f}]" for x, y in TEMPLATE_112)
    return (
        "```python\nimport cv2, numpy as np, onnxruntime\n"
        "# Left eye, right eye, nose, corners of the mouth in a face of 112 x 112 pixels.\n"
        f"template = np.array([{template}])\n"
        'photo = cv2.imread("photo.jpg")[:, :, ::-1]  # RGB\n'
        'points = np.loadtxt("landmarks.txt")  # (5, 2), pixels x y in the photo, in that order\n'
        "source, target = points @ [1, 1j], template @ [1, 1j]  # a similarity is a + b z\n"
        "(b, a), *_ = np.linalg.lstsq(np.c_[source, np.ones(5)], target, rcond=None)\n"
        "move = np.array([[b.real, -b.imag, a.real], [b.imag, b.real, a.imag]])\n"
        "face = cv2.warpAffine(np.ascontiguousarray(photo), move, (112, 112))\n"
        f"small = cv2.resize(face, ({px}, {px}), interpolation=cv2.INTER_AREA)\n"
        "image = small.transpose(2, 0, 1)[None].astype(np.float32)\n"
        'session = onnxruntime.InferenceSession("recognizer.onnx")\n'
        'vector = session.run(["embedding"], {"image": image})[0]\n```\n\n'
        "Where the face in the photo is more than twice 112 pixels wide, reduce the photo first by "
        "`cv2.INTER_AREA`, as `align_face` does."
    )


def _format_data(run: Path, retrain: Published) -> str:
    facts = retrain.facts
    lines = [
        f"{facts['labelled']:,} labelled images; {facts['pseudo_labelled']:,} images with one of "
        f"{facts['pseudo_identities']:,} pseudo-labels, and {facts.get('leftovers', 0):,} images "
        "as classes of their own (not used by `labelled_only`)."
    ]
    record = run / "run.json"
    if record.is_file():
        data = json.loads(record.read_text(encoding="utf-8"))["data"]
        for key in ("title", "licence", "source", "notes"):
            if data.get(key):
                lines.append(f"- {key}: {data[key]}")
    ingest = Published.open("ingest", run / "ingest")
    if ingest is not None:
        names = ingest.read("samples", ["dataset"])["dataset"].unique().to_pylist()
        lines.append(f"- data set: {', '.join(names)}")
    return "\n".join(lines)


def _format_results(run: Path, subject: str) -> str:
    evaluate = Published.open("evaluate", run / "evaluate")
    if evaluate is None:
        return "Not evaluated: the run has not published evaluate."
    metrics = evaluate.read("metrics").to_pandas()
    loss = describe_loss(metrics, subject)
    is_cosine = metrics.metric.str.startswith("threshold@")
    chosen = metrics[(metrics.subject == subject) & (metrics.low.notna() | is_cosine)]
    if not len(chosen):
        return "Not evaluated: the data set has no people held out for it."
    rows = [
        f"| {row.protocol} | {row.metric} | {row.value:.3f} | {_format_interval(row)} | "
        f"{row.decisions:,} |"
        for row in chosen.rename(columns={"count": "decisions"}).itertuples()
    ]
    return (
        (f"**{loss}.**\n\n" if loss else "")
        + (ON_PROBES if chosen.protocol.str.startswith("probes ").any() else ON_HELD_OUT)
        + " The metadata of `recognizer.onnx` has them as `cdp.threshold@far=... <protocol>`. "
        "95 % intervals by bootstrap over people.\n\n"
        "| protocol | metric | value | interval | count |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _format_interval(row: Any) -> str:
    return "" if row.low != row.low else f"{row.low:.3f} .. {row.high:.3f}"
