"""The verdict on a run: how good it is, what to distrust and why, and what to do next.

The contract:
- Enters: the published stages of a run, whichever there are. Leaves: findings, results first.
- A finding rests on the tables and facts of the stages alone; nothing is computed that a stage
  measures. The truth about unlabelled images is never read.
- To add one, write a function `Evidence -> findings` and decorate it with `judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cdp.types import UNLABELLED
from pipelines.data.folders import LEFT_OUT
from pipelines.data.reasons import name_reason
from pipelines.invocation import format_command
from pipelines.store import Published

if TYPE_CHECKING:
    import pandas as pd

LARGE = 30
"""Images of a cluster from which on a mistake in it is worth a look of its own."""
DOUBTFUL = 0.5
"""Expected precision below which a cluster is more wrong than right."""
FEW_PEOPLE = 50
"""Labelled people below which a committee trained on them is poor; see docs/results.md."""
LOW_RECALL = 0.95
"""Recall of a k-NN graph below which neighbours are missing."""
HIGH_ERROR = 0.05
"""Calibration error from which on probabilities are off."""
MANY_UNLISTED = 0.03
"""Share of true pairs that no list names, from which on k is too small."""
MANY_REJECTED = 0.1
"""Share of the images that is worth a look when it is rejected."""
LEVELS = ("result", "doubt")


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict.

    level : "result" says how good the run is; "doubt" what to distrust.
    text : what was found, and why. advice : what to do next, naming settings; may be empty.
    """

    level: Literal["result", "doubt"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}. {self.advice}" if self.advice else self.text


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Evidence:
    """What a run has published, by stage.

    run : its directory, for the commands that are advised.
    """

    published: Mapping[str, Published]
    run: Path

    def has(self, *stages: str) -> bool:
        return all(stage in self.published for stage in stages)

    def facts(self, stage: str) -> Mapping[str, Any]:
        """The facts of a stage; none where it is not published."""
        return self.published[stage].facts if stage in self.published else {}

    def settings(self, stage: str, section: str) -> Mapping[str, Any]:
        """The settings of a section, as the stage read them."""
        found: Mapping[str, Any] = self.published[stage].manifest["ingredients"]["config"][section]
        return found

    @property
    def review(self) -> str:
        """The command that reviews this run."""
        return format_command("review", "--run", str(self.run))

    @cached_property
    def clusters(self) -> pd.DataFrame:
        return self.published["propagate"].read("clusters").to_pandas()


JUDGES: list[tuple[tuple[str, ...], Callable[[Evidence], Findings]]] = []
"""The stages a judge needs, and the judge, in the order of the verdict."""


def judge(
    *stages: str,
) -> Callable[[Callable[[Evidence], Findings]], Callable[[Evidence], Findings]]:
    """Decorate a function that finds something once these stages are published."""

    def register(function: Callable[[Evidence], Findings]) -> Callable[[Evidence], Findings]:
        JUDGES.append((stages, function))
        return function

    return register


def reach_verdict(published: Mapping[str, Published], run: Path) -> list[Finding]:
    """All findings about the stages of a run, results before doubts.

    run : the directory of the run; advice names it.
    """
    evidence = Evidence(published, run)
    found = [
        finding
        for stages, function in JUDGES
        if evidence.has(*stages)
        for finding in function(evidence)
    ]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def compose_verdict(findings: list[Finding]) -> list[str]:
    """The verdict as lines of text."""
    heads = {"doubt": "Distrust", "result": "Verdict"}
    return [f"{heads[finding.level]:10}{finding}" for finding in findings]


# ------------------------------------------------------------------------------------ how good


@judge("propagate", "mediate")
def judge_quality(evidence: Evidence) -> Findings:
    """The estimated quality of the labels, or why there is none."""
    facts, people = evidence.facts("propagate"), evidence.facts("mediate").get("people")
    if facts["estimated_f"] is not None:
        yield Finding(
            "result",
            f"estimated pairwise F {facts['estimated_f']:.2f} (precision "
            f"{facts['estimated_precision']:.2f}, recall {facts['estimated_recall']:.2f}), by "
            f"{people} labelled people held out",
        )
        return
    known = facts["estimated_precision"]
    shown = "" if known is None else f"; estimated precision {known:.2f}, recall unknown"
    advice = f"Judge the clusters by eye: {evidence.review}"
    if evidence.facts("mediate").get("self_trained"):
        advice = f"Label 24 people or more of the unlabelled images, all images of each. {advice}"
    yield Finding("doubt", f"no quality is stated: {'; '.join(facts['withheld'])}{shown}", advice)


@judge("propagate")
def judge_target(evidence: Evidence) -> Findings:
    """A target precision that the labels miss."""
    target = evidence.settings("propagate", "propagate")["target_precision"]
    reached = evidence.facts("propagate")["estimated_precision"]
    if target is not None and reached is not None and reached < target:
        yield Finding(
            "doubt",
            f"the target precision {target} is missed: {reached:.3f} is estimated at the strictest "
            "threshold",
            f"Review the doubtful clusters ({evidence.review}), or label more people",
        )


# ------------------------------------------------------------------------------- what to distrust


@judge()
def judge_warnings(evidence: Evidence) -> Findings:
    """What the stages themselves warned of."""
    for stage in evidence.published:
        for text in evidence.facts(stage).get("warnings", []):
            yield Finding("doubt", text)


@judge("embed", "mediate", "propagate")
def judge_likeness(evidence: Evidence) -> Findings:
    """Where nothing or everything was found, or votes decided: are the embeddings all alike?"""
    from cdp.propagation.doubt import ALIKE, measure_likeness
    from pipelines.tables import read_vectors

    doubted = bool(evidence.facts("propagate").get("warnings"))
    if not doubted and evidence.facts("mediate")["method"] != "vote":
        return
    published = evidence.published["embed"]
    base = evidence.settings("embed", "committee")["base"]["name"]
    likeness = measure_likeness(
        read_vectors(published.path(f"embeddings/unlabelled/{base}"), "embedding")
    )
    seen = f"two random images have a median cosine of {likeness:.2f} in view {base}"
    if likeness >= ALIKE:
        yield Finding(
            "doubt",
            f"{seen}, where images of many people have about 0: they are of one person, or the "
            "model was shown the wrong pixels",
            "Look at some images; if they show many people, give the member a `preset` or "
            "`preprocessing: auto`",
        )
    elif doubted:
        yield Finding(
            "doubt",
            f"{seen}: the embeddings are not all alike, so the threshold or the people are the "
            "likelier cause",
        )


@judge("mediate")
def judge_votes(evidence: Evidence) -> Findings:
    """Votes in place of a mediator."""
    facts = evidence.facts("mediate")
    if facts["method"] == "vote":
        yield Finding(
            "doubt",
            f"the committee voted: pairs above the cosine {facts['cosine']:.2f} were joined, and "
            "people of many images may lie in pieces",
            "Label 20 people or more, all images of each, to train a mediator",
        )


@judge("ingest", "mediate")
def judge_people(evidence: Evidence) -> Findings:
    """A committee that was trained on few people."""
    people = evidence.facts("ingest")["labelled_people"]
    trained = evidence.facts("train").get("models", 0)
    if 0 < people < FEW_PEOPLE and trained:
        yield Finding(
            "doubt",
            f"{people} people are few to train {trained} models on",
            "Use ready embedders: give the members an `onnx` file, see docs/models.md",
        )


@judge("propagate", "mediate")
def judge_clusters(evidence: Evidence) -> Findings:
    """Large clusters that are more wrong than right."""
    clusters = evidence.clusters
    chosen = clusters[(clusters["size"] > LARGE) & (clusters.expected_precision < DOUBTFUL)]
    if len(chosen):
        one = len(chosen) == 1
        yield Finding(
            "doubt",
            f"{len(chosen):,} cluster{'' if one else 's'} above {LARGE} images with expected "
            f"precision below {DOUBTFUL}, the largest of {chosen['size'].max():,} images",
            f"Review {'it' if one else 'these'} first: {evidence.review}",
        )


@judge("propagate")
def judge_coverage(evidence: Evidence) -> Findings:
    """How many images got a label; few may be right, since most people may have one image."""
    facts = evidence.facts("propagate")
    total = facts["labelled"] + facts["unlabelled"]
    if facts["clusters"]:
        yield Finding(
            "result",
            f"{facts['clusters']:,} clusters hold {facts['labelled'] / max(total, 1):.0%} of "
            f"{total:,} images",
        )


@judge("knn")
def judge_labels(evidence: Evidence) -> Findings:
    """Labelled images whose name the others contradict."""
    facts = evidence.facts("knn")
    wrong, second = facts.get("wrong_names", 0), facts.get("second_labels", 0)
    if wrong:
        yield Finding(
            "doubt",
            f"{wrong:,} labelled image{' seems' if wrong == 1 else 's seem'} to have a wrong name; "
            f"the mediator was not trained on {'it' if wrong == 1 else 'them'}",
            "Table knn/label_issues lists each, with the name it seems to have",
        )
    if second:
        yield Finding(
            "doubt",
            f"{second:,} labelled identit{'y seems' if second == 1 else 'ies seem'} to be the "
            "person of another one; the mediator was trained on both as one",
            "Table knn/label_issues lists them: join their folders",
        )


@judge("propagate")
def judge_assignments(evidence: Evidence) -> Findings:
    """Labelled people among the unlabelled images."""
    assigned = evidence.facts("propagate").get("assigned", 0)
    if assigned:
        yield Finding(
            "result",
            f"{assigned:,} unlabelled image{' shows' if assigned == 1 else 's show'} labelled "
            "people; table propagate/assignments names them",
        )


@judge("propagate")
def judge_corrections(evidence: Evidence) -> Findings:
    """Decisions of a review on images that are gone."""
    gone = evidence.facts("propagate").get("corrected_images_gone", 0)
    if gone:
        yield Finding(
            "doubt",
            f"decisions of the review name {gone:,} image{'' if gone == 1 else 's'} that "
            f"{'is' if gone == 1 else 'are'} no longer among the unlabelled ones: for "
            f"{'it' if gone == 1 else 'them'} they do nothing",
            "An image is known by its bytes: put the file back as it was, or undo these decisions "
            f"({evidence.review})",
        )


@judge("knn")
def judge_recall(evidence: Evidence) -> Findings:
    """Approximate lists that miss neighbours."""
    recall = evidence.facts("knn")["lowest_recall"]
    if recall < LOW_RECALL:
        yield Finding(
            "doubt",
            f"the neighbour lists hold {recall:.0%} of the true neighbours only",
            "Set knn.backend=exact, or give the backend more candidates in knn.options",
        )


@judge("mediate", "knn")
def judge_lists(evidence: Evidence) -> Findings:
    """Pairs of held-out people that no list names."""
    share = evidence.facts("mediate").get("unlisted_share", 0)
    if share > MANY_UNLISTED:
        yield Finding(
            "doubt",
            f"{share:.0%} of the true pairs of held-out people are in no neighbour list",
            f"Raise knn.k above {evidence.facts('knn')['k']}",
        )


@judge("mediate")
def judge_calibration(evidence: Evidence) -> Findings:
    """Probabilities that are off on held-out people."""
    error = evidence.facts("mediate").get("calibration_error", 0)
    if error > HIGH_ERROR:
        yield Finding(
            "doubt",
            f"pair probabilities are off by {error:.2f} on average on held-out people, and so are "
            "expected precision and confidence",
            "Label more people",
        )


@judge("ingest")
def judge_rejected(evidence: Evidence) -> Findings:
    """Many rejected images."""
    facts = evidence.facts("ingest")
    if facts["rejected"] <= MANY_REJECTED * max(facts["images"], 1):
        return
    reasons = evidence.published["ingest"].read("rejected").to_pandas().reason
    reasons = reasons[~reasons.str.startswith(LEFT_OUT)]  # which are no images, and not counted
    kinds = reasons.map(name_reason)
    kind = kinds.value_counts().index[0]
    own = reasons[kinds == kind].unique()
    yield Finding(
        "doubt",
        f"{facts['rejected']:,} of {facts['images']:,} images were rejected, "
        f"{int((kinds == kind).sum()):,} of them because: {own[0] if len(own) == 1 else kind}",
        "Table ingest/rejected lists them all",
    )


@judge("propagate", "retrain")
def judge_training(evidence: Evidence) -> Findings:
    """A recognizer that could learn from no pseudo-label."""
    if not evidence.facts("retrain")["pseudo_identities"]:
        labels = evidence.published["propagate"].read("labels", ["pseudo_label"])
        count = int((labels["pseudo_label"].to_numpy() != UNLABELLED).sum())
        yield Finding(
            "doubt",
            f"no recognizer was trained on pseudo-labels: {count:,} images have one, in too few or "
            "too small clusters",
            "Lower retrain.min_cluster_size or propagate.threshold",
        )
