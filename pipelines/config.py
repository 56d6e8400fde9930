"""What a run is made of: the strict models behind `configs/*.yaml`.

The contract:
- An unknown key, a wrong type or a value out of range is a ConfigError naming the key, what was
  expected, what came, and the file it stands in.
- A config is frozen once read. It holds no path of this machine: `--data-root`, `--runs-dir`,
  workers and device come from the command line and are never part of a fingerprint.
- YAML is loaded safely and within bounds: a mebibyte, and so many values once every alias is
  written out; a key given twice is an error, and so is a number that is NaN or infinite.
- Names with a unit end in it: `_px` pixels, `_rad` radians.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cdp.errors import ConfigError
from pipelines.yaml_files import parse_yaml, read_yaml, validate_settings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,40}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Strict, frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MemberSettings(Settings):
    """One view: a backbone trained here, an ONNX file, a checkpoint of ours, the recognizer of
    another run, or ready features.

    ONNX files and checkpoints are named relative to the data root; `recognizer` names a run under
    the same --runs-dir; `features` names a model of a data set of kind `features`.
    """

    name: Name
    backbone: str | None = None
    width: float = Field(1.0, gt=0)
    onnx: str | None = None
    checkpoint: str | None = None
    recognizer: Name | None = None
    features: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> MemberSettings:
        origins = [self.backbone, self.onnx, self.checkpoint, self.recognizer, self.features]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of backbone, onnx, checkpoint, recognizer, features")
        return self


class CommitteeSettings(Settings):
    """The base view and the N views that judge its edges; N may be 0."""

    base: MemberSettings
    members: tuple[MemberSettings, ...] = ()

    @property
    def all(self) -> tuple[MemberSettings, ...]:
        """Base first, then the members in the order given."""
        return (self.base, *self.members)

    @model_validator(mode="after")
    def _names_differ(self) -> CommitteeSettings:
        names = [member.name for member in self.all]
        if len(set(names)) != len(names):
            raise ValueError(f"two members share a name: {', '.join(names)}")
        return self


class TrainingSettings(Settings):
    """How one model is trained; see `cdp.training.TrainingPlan` for what each does.

    auxiliary : losses added to the head, name to `weight` and the loss's own parameters; see
        `cdp.models.auxiliary`.
    sampling : "image" shows each image once a pass, "identity" each person equally often.
    sampled_classes : identities a step looks at, where there are more than fit; null looks at all.
    """

    input_px: Annotated[int, Field(ge=8)] = 24
    embedding_dim: Positive = 128
    head: str = "adaface"
    head_options: dict[str, float] = Field(default_factory=dict)
    degradation: str = "adaface"
    epochs: Positive = 12
    batch_size: Annotated[int, Field(ge=2)] = 32
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.1, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    margin_warmup_epochs: float = Field(2.0, ge=0)
    gradient_clip: float | None = Field(5.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    auxiliary: dict[str, dict[str, float]] = Field(default_factory=dict)
    sampling: Literal["image", "identity"] = "image"
    images_per_identity: Positive = 1
    sampled_classes: Positive | None = None


class IngestSettings(Settings):
    """Which images are set aside."""

    min_px: Positive = 8
    max_pixels: Annotated[int, Field(ge=1, le=100_000_000)] = 50_000_000


class TrainSettings(TrainingSettings):
    """Training of the base and the committee on the labelled set.

    mediator_share : share of the labelled people the committee is not trained on, so that the
        mediator learns from pairs as strange to the committee as the unlabelled ones are. Does
        not apply when no member is trained here.
    """

    mediator_share: float = Field(0.3, ge=0, lt=1)


class EmbedSettings(Settings):
    """How images become views."""

    reduce_px: int | None = Field(24, ge=4)
    flip: bool = False


class KnnSettings(Settings):
    """The neighbour graphs.

    joint : search labelled and unlabelled images together too, so that the mediator learns amid the
        unlabelled ones; false where many of them show labelled people.
    """

    k: Positive = 20
    backend: Literal["nmslib", "faiss", "exact"] = "nmslib"
    options: dict[str, int] = Field(default_factory=dict)
    recall_sample: Positive = 1000
    joint: bool = True


class VoteSettings(Settings):
    """Keep a pair when its base cosine exceeds one number and enough members hold the edge."""

    min_similarity: float = Field(0.5, ge=-1, le=1)
    min_votes: int = Field(1, ge=0)


class MediateSettings(Settings):
    """Which pairs are judged, and how.

    candidates : pairs are the edges of the "base" graph, or of "all" graphs, which are more than
        twice as many; null is all with "extended" and the base, as published, with the others.
    second_stage : with "extended", judge each pair again by what is known of the pairs around it.
    """

    method: Literal["extended", "paper", "released", "vote"] = "extended"
    candidates: Literal["base", "all"] | None = None
    second_stage: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    vote: VoteSettings = VoteSettings()


class SoftLabelSettings(Settings):
    """How far labels spread along the consensus graph; see `cdp.propagation.soft_labels`."""

    depth: Annotated[int, Field(ge=0)] = 5
    decay: float = Field(0.6, ge=0, le=1)
    min_weight: float = Field(0.01, ge=0, lt=1)


class PropagateSettings(Settings):
    """How judged pairs become pseudo-labels.

    max_size : largest cluster; null leaves the consensus split without a limit and the rising
        threshold with its own.
    target_precision : with the threshold `auto`, the loosest cut for which held-out people and the
        estimate promise this share of true pairs, at the price of recall; null serves both.
    """

    threshold: float | Literal["auto"] = "auto"
    split: Literal["consensus", "raise_threshold"] = "consensus"
    max_size: Positive | None = None
    step: float = Field(0.1, gt=0, lt=1)
    target_precision: float | None = Field(None, gt=0, lt=1)
    soft_labels: SoftLabelSettings = SoftLabelSettings()

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> PropagateSettings:
        if self.target_precision is not None and self.threshold != "auto":
            raise ValueError("give a threshold or a target_precision, not both")
        return self

    @model_validator(mode="after")
    def _threshold_is_a_probability(self) -> PropagateSettings:
        if isinstance(self.threshold, float) and not 0 <= self.threshold < 1:
            raise ValueError("threshold must be 'auto' or lie in [0, 1)")
        return self


class RetrainSettings(TrainingSettings):
    """Training of the low-resolution recognizer.

    leftovers : an image without a pseudo-label, or of too small a cluster, is left out ("drop") or
        is a class of its own ("alone"); people with too few images alike, where the truth is used.
    mask_negatives_above : where two images of different classes match with more than this
        probability, each leaves the other's class out of its negatives; 1 masks none.
    weigh_by_confidence : an image counts by how sure its pseudo-label is.
    targets : "hard" is one pseudo-label an image, "soft" the weighted ones of `soft_labels`.
    pseudo_share : part of batch and loss that the pseudo-labelled set has; null is its part of the
        images.
    same_person : a pseudo-cluster that looks like a labelled person is left "apart", or its images
        are taken for that person's ("merge").
    merge_far : share of labelled people that may look so much like another one.
    teacher : a committee member whose vectors every image is also trained to follow, as a further
        subject `distilled`; null trains none.
    student : settings of training, backbone and width in which `distilled` differs from the others.
    blends : faces blended of two or three, for `distilled`: only the teacher can tell of them.
    teacher_px : side the teacher's faces are reduced to; null shows them as they came.
    distil_weight, class_weight : how much the teacher counts for `distilled`, and the classes.
    """

    backbone: str = "residual"
    width: float = Field(1.0, gt=0)
    min_cluster_size: Positive = 2
    leftovers: Literal["drop", "alone"] = "drop"
    mask_negatives_above: float = Field(0.02, ge=0, le=1)
    weigh_by_confidence: bool = False
    targets: Literal["hard", "soft"] = "hard"
    pseudo_share: float | None = Field(None, gt=0, lt=1)
    same_person: Literal["apart", "merge"] = "apart"
    merge_far: float = Field(0.01, ge=0, lt=1)
    teacher: Name | None = None
    teacher_px: int | None = Field(None, ge=4)
    distil_weight: float = Field(3.0, ge=0)
    class_weight: float = Field(1.0, ge=0)
    student: dict[str, Any] = Field(default_factory=dict)
    blends: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_counts(self) -> RetrainSettings:
        if self.distil_weight == self.class_weight == 0:
            raise ValueError("distil_weight and class_weight are both 0: nothing would be learned")
        return self

    @model_validator(mode="after")
    def _student_can_be_trained(self) -> RetrainSettings:
        known = {*TrainingSettings.model_fields, "backbone", "width"}
        unknown = sorted(set(self.student) - known)
        if unknown:
            raise ValueError(
                f"student: no such setting {', '.join(unknown)}; known here: "
                f"{', '.join(sorted(known))}"
            )
        if self.student:
            self.describe_student()
        return self

    def describe_student(self) -> RetrainSettings:
        """These settings as the student is trained by them."""
        own = {**self.model_dump(mode="json"), **self.student, "student": {}}
        return RetrainSettings.model_validate_json(json.dumps(own))


class EvaluateSettings(Settings):
    """The protocols; sizes in pixels, rates as shares; every degradation at every size.

    gallery : "sharp" enrols faces as they came, "probe" as small and poor as the probes.
    pair_images : images a person, at most, that TAR@FAR compares with all others.
    enrolled : share of the people with two images that the open-set gallery knows; the others are
        its strangers, and the distractors of the closed set.
    draws : bootstrap resamples of the people behind `low` and `high`.
    """

    probe_px: tuple[Positive, ...] = (32, 24, 16, 12)
    degradations: tuple[str, ...] = ("none", "surveillance")
    gallery: Literal["sharp", "probe"] = "sharp"
    folds: Annotated[int, Field(ge=2)] = 10
    pairs_per_fold: Positive = 300
    far: tuple[Rate, ...] = Field((0.1, 0.01, 0.001, 0.0001), min_length=1)
    pair_images: Annotated[int, Field(ge=2)] = 10
    ranks: tuple[Positive, ...] = (1, 5, 20)
    enrolled: float = Field(0.5, gt=0, lt=1)
    fpir: tuple[Rate, ...] = (0.3, 0.2, 0.1, 0.01)
    fpir_rank: Positive = 20
    draws: Positive = 200
    supervised: bool = True


class RunConfig(Settings):
    """One run: `configs/<kind>.yaml` plus the overrides of the command line.

    rounds : 2 makes a run `<name>_round1` first, up to its recognizer, which then is one more
        member of the committee.
    """

    name: Name
    rounds: Literal[1, 2] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: str
    committee: CommitteeSettings
    ingest: IngestSettings = IngestSettings()
    train: TrainSettings = TrainSettings()
    embed: EmbedSettings = EmbedSettings()
    knn: KnnSettings = KnnSettings()
    mediate: MediateSettings = MediateSettings()
    propagate: PropagateSettings = PropagateSettings()
    retrain: RetrainSettings = RetrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _teacher_is_a_member(self) -> RunConfig:
        names = [member.name for member in self.committee.all]
        if self.retrain.teacher is not None and self.retrain.teacher not in names:
            raise ValueError(
                f"retrain.teacher: a member of the committee expected ({', '.join(names)}), got "
                f"{self.retrain.teacher!r}"
            )
        return self

    def list_rounds(self) -> tuple[RunConfig, ...]:
        """The runs to make, one after the other; the last has this one's name."""
        if self.rounds == 1:
            return (self,)
        first = self.model_copy(update={"name": f"{self.name}_round1", "rounds": 1})
        student = MemberSettings(name="round1", recognizer=first.name)
        members = (*self.committee.members, student)
        committee = self.committee.model_copy(update={"members": members})
        return first, self.model_copy(update={"committee": committee, "rounds": 1})

    def pick(self, fields: tuple[str, ...]) -> dict[str, Any]:
        """The named top-level fields as plain JSON values: what a stage reads."""
        whole = self.model_dump(mode="json")
        return {field: whole[field] for field in fields}


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a config and lay dotted overrides (`propagate.max_size=300`) over it."""
    value = read_yaml(path)
    value.setdefault("name", path.stem)
    for override in overrides:
        _lay_over(value, override)
    return validate_settings(RunConfig, value, source=str(path))


def _lay_over(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {override!r}: expected section.field=value, e.g. propagate.max_size=300"
        )
    *sections, field = key.split(".")
    place = value
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
        place = inner
    place[field] = parse_yaml(text, f"override {override!r}")
