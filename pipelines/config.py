"""Settings of a run: the strict models behind `configs/*.yaml`.

The contract:
- An unknown key, a wrong type or a value out of range is a ConfigError with the file, the key, the
  expected and the given value. NaN and infinite numbers are errors.
- A config is frozen. It holds no absolute path: `--data-root`, `--runs-dir`, workers and device are
  command-line options and never part of a fingerprint.
- YAML is loaded safely and within bounds; see `pipelines.yaml_files`.
- A name ends in its unit: `_px` pixels, `_rad` radians. Shares and probabilities lie in [0, 1].
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cdp.errors import ConfigError
from pipelines.yaml_files import parse_yaml, read_yaml, validate_settings

if TYPE_CHECKING:
    from cdp.images.preprocessing import Preprocessing
    from cdp.recognizer.fit import RecognizerSpec
    from cdp.training.plan import TrainingPlan

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,40}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


SHOWN = (
    "preset", "preprocessing", "mean", "scale", "channels", "layout", "output", "input_px",
)  # fmt: skip
"""Settings of a member that say what an ONNX model is shown."""


class Settings(BaseModel):
    """Base of all settings: strict types, frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MemberSettings(Settings):
    """One embedding model: one of backbone, onnx, checkpoint, recognizer, features is given.

    name : of the member, in tables and file names.
    backbone : architecture to train on the labelled set; see `cdp.models`.
    width : factor on the backbone's channel counts; 1 is its standard size.
    onnx : an ONNX model file, relative to --models-dir or to the data root.
    preset : the family an ONNX model comes from, which says what it is shown; see docs/models.md.
    preprocessing : "auto" shows an ONNX model the faces of a few labelled people in each usual way
        and takes the one that separates them best; null does so where nothing else is said and
        labelled people are at hand, and shows RGB in 0..255 where they are not.
    mean, scale : an ONNX model is shown (pixel - mean) / scale; a number, or one a channel.
    channels : order of an ONNX model's colours.
    layout : "nchw" is (n, 3, p, p), "nhwc" (n, p, p, 3); null follows the model.
    output : name of the output that is the embedding, where there are several.
    input_px : side of the faces for an ONNX model that leaves it free.
    checkpoint : a `.safetensors` file written by this project, relative to the data root.
    recognizer : name of a run under the same --runs-dir whose recognizer is used.
    features : name of a model of a data set of kind `features`.
    restore : a restorer (`cdp export restorer`), relative to the data root, through which this
        member sees the faces.
    """

    name: Name
    backbone: str | None = None
    width: float = Field(1.0, gt=0)
    onnx: str | None = None
    preset: Literal["insightface", "adaface", "edgeface", "facenet", "sface", "plain"] | None = None
    preprocessing: Literal["auto"] | None = None
    mean: float | tuple[float, float, float] | None = None
    scale: float | tuple[float, float, float] | None = None
    channels: Literal["rgb", "bgr"] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    output: str | None = None
    input_px: Annotated[int, Field(ge=1, le=1024)] | None = None
    checkpoint: str | None = None
    recognizer: Name | None = None
    features: str | None = None
    restore: str | None = None

    @model_validator(mode="after")
    def _pictures_are_restored(self) -> MemberSettings:
        if self.restore is not None and self.features is not None:
            raise ValueError("restore is for members that see pictures; leave it out with features")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> MemberSettings:
        origins = [self.backbone, self.onnx, self.checkpoint, self.recognizer, self.features]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of backbone, onnx, checkpoint, recognizer, features")
        return self

    @model_validator(mode="after")
    def _only_onnx_is_shown_otherwise(self) -> MemberSettings:
        given = [name for name in SHOWN if getattr(self, name) is not None]
        if given and self.onnx is None:
            raise ValueError(f"{', '.join(given)}: for a member with onnx only")
        pixels = [name for name in given if name in ("preset", "mean", "scale", "channels")]
        if pixels and self.preprocessing == "auto":
            raise ValueError(f"preprocessing: auto finds what {', '.join(pixels)} says; give one")
        try:
            self.describe_preprocessing()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def describe_preprocessing(self) -> Preprocessing:
        """What an ONNX model is shown, by the preset and what is named beside it."""
        from cdp.images.preprocessing import PRESETS

        over = {
            name: getattr(self, name) for name in SHOWN if name not in ("preset", "preprocessing")
        }
        named = {name: value for name, value in over.items() if value is not None}
        return replace(PRESETS[self.preset or "plain"], **named)

    @property
    def is_pixel_range_open(self) -> bool:
        """Whether nothing says which pixels an ONNX model expects."""
        return self.onnx is not None and not any(
            getattr(self, name) is not None for name in ("preset", "mean", "scale", "channels")
        )


class CommitteeSettings(Settings):
    """The embedding models: one base and N committee members; N may be 0.

    base : its k-NN graph proposes the candidate pairs, and its vectors measure distances.
    members : further models, whose graphs and cosines are features of each pair.
    """

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
    """How one model is trained; see `TrainingPlan` and `RecognizerSpec` for the other settings.

    input_px : side of the faces that the network reads.
    degradation : name of the degradation of training images; see `cdp.images.degradation`.
    neck : "own", the backbone's ending, or another one; see `cdp.models.necks`.
    head_options : parameters of the head, such as `margin`; see its class in `cdp.models.heads`.
    auxiliary : losses added to the head, name to `weight` and the loss's own parameters; see
        `cdp.models.auxiliary`.
    sampling : "image" trains on each image once an epoch, "identity" on each identity equally
        often, "reversed" on rare identities most often, "bilateral" on mixtures of both (BBN).
    images_per_identity : images of one identity in a row, with sampling by identity.
    sampled_classes : classes that a step's softmax is computed over, for sets of so many identities
        that all do not fit; null computes all.
    """

    input_px: Annotated[int, Field(ge=8)] = 24
    embedding_dim: Positive = 128
    neck: str = "own"
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
    sampling: Literal["image", "identity", "reversed", "bilateral"] = "image"
    images_per_identity: Positive = 1
    sampled_classes: Positive | None = None

    def make_plan(
        self, *, seed: int, distil_weight: float = 0.0, class_weight: float = 1.0
    ) -> TrainingPlan:
        """These settings as the plan of `train_recognizer`."""
        from cdp.images.degradation import get_degradation
        from cdp.training.plan import TrainingPlan

        return TrainingPlan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            margin_warmup_epochs=self.margin_warmup_epochs,
            gradient_clip=self.gradient_clip,
            ema_decay=self.ema_decay,
            distil_weight=distil_weight,
            class_weight=class_weight,
            degradation=get_degradation(self.degradation),
            sampling=self.sampling,
            images_per_identity=self.images_per_identity,
            seed=seed,
        )

    def make_spec(self, backbone: str, width: float) -> RecognizerSpec:
        """These settings as the spec of `train_recognizer`, with a backbone of that width."""
        from cdp.recognizer.fit import RecognizerSpec

        return RecognizerSpec(
            backbone=backbone,
            input_px=self.input_px,
            embedding_dim=self.embedding_dim,
            width=width,
            neck=self.neck,
            head=self.head,
            head_params=self.head_options,
            auxiliaries=self.auxiliary,
            sampled_classes=self.sampled_classes,
        )


class IngestSettings(Settings):
    """Which images are rejected.

    min_px : shortest side an image must have, in pixels.
    max_pixels : most pixels (width x height) an image may have.
    min_quality : smallest quality of a face, in [0, 1]: size, sharpness, pose and score in one
        number; of faces that came aligned size and sharpness, without `pose`.
    pose : find landmarks in faces that came aligned too, for their pose and the detector's score;
        needs the detector (`cdp[detect]`).
    """

    min_px: Positive = 8
    max_pixels: Annotated[int, Field(ge=1, le=100_000_000)] = 50_000_000
    min_quality: float = Field(0.0, ge=0, le=1)
    pose: bool = False


class TrainSettings(TrainingSettings):
    """Training of the base and the committee on the labelled set.

    mediator_share : share of the labelled identities that the committee is not trained on. The
        mediator is fitted on them, because the committee is no better on them than on the
        unlabelled set. Ignored when no member is trained here.
    """

    mediator_share: float = Field(0.3, ge=0, lt=1)


class EmbedSettings(Settings):
    """How images are embedded.

    reduce_px : side in pixels to which faces are reduced before every model, as the recognizer will
        see them; null leaves them as they are.
    flip : average the vectors of a face and its mirror image.
    degrade_labelled : train the mediator on copies of the labelled pictures, degraded until they
        look like the pile's: "auto" where the labelled pictures are clearly sharper, or "always",
        or "never".
    """

    reduce_px: int | None = Field(24, ge=4)
    flip: bool = False
    degrade_labelled: Literal["auto", "always", "never"] = "auto"


class KnnSettings(Settings):
    """The k-nearest-neighbour graphs, by cosine.

    k : neighbours per image.
    backend : "nmslib" or "faiss" approximate above their `exact_limit` of images, "exact" compares
        all pairs, "torch" does so on a GPU if there is one.
    options : parameters of the backend's index; see `cdp.knn`.
    recall_sample : images on which each graph is compared with exact search.
    joint : also derive graphs over labelled and unlabelled images together, on which the mediator
        is trained.
    near_equal : one image stands for near-equal ones, such as the frames of one track, and its
        pseudo-label goes to all; see `cdp.knn.near_equal`.
    label_check : leave labelled images with a doubtful name out of the mediator's training, join
        two identities of one person, find labelled people among the unlabelled images, and leave
        out labelled images unlike the unlabelled ones where only a part is.
    """

    k: Positive = 20
    backend: Literal["nmslib", "faiss", "exact", "torch"] = "nmslib"
    options: dict[str, int | str] = Field(default_factory=dict)
    recall_sample: Positive = 1000
    joint: bool = True
    near_equal: bool = True
    label_check: bool = True


class VoteSettings(Settings):
    """Voting without a mediator: which candidate pairs are kept.

    min_similarity : cosine in the base view that a pair must exceed; "auto" is the lowest at which
        no chain of pairs joins most of the images, found on their own neighbour graph.
    min_votes : committee members in whose graph the pair must be an edge; without members the
        cosine alone decides.
    """

    min_similarity: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] = "auto"
    min_votes: int = Field(1, ge=0)


class MediateSettings(Settings):
    """Which candidate pairs are scored, and how.

    method : features of a pair: "extended" (ours), "paper", or "released" (the authors' code);
        "vote" keeps or drops pairs by `vote` and needs no labelled image.
    candidates : edges of the "base" graph, or of "all" graphs (more than twice as many pairs); null
        is "all" for "extended" and "base" for the other methods.
    second_stage : with "extended", rescore each pair from the scores of neighbouring pairs.
    self_training : with "extended", where no mediator can be trained on the labelled images (they
        are too few, or differ from the unlabelled ones), train it on the clusters that the
        committee votes for, unless `vote.min_similarity` is a number; see
        `cdp.mediator.self_training`. Otherwise the votes are final.
    dropout : share of hidden units dropped while the mediator is trained.
    vote : thresholds of method "vote".
    """

    method: Literal["extended", "paper", "released", "vote"] = "extended"
    candidates: Literal["base", "all"] | None = None
    second_stage: bool = True
    self_training: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    vote: VoteSettings = VoteSettings()


class SoftLabelSettings(Settings):
    """Diffusion of pseudo-labels along the consensus graph; see `cdp.propagation.soft_labels`.

    depth : edges a label may travel. decay : factor per edge.
    min_weight : smaller weights are dropped.
    """

    depth: Annotated[int, Field(ge=0)] = 5
    decay: float = Field(0.6, ge=0, le=1)
    min_weight: float = Field(0.01, ge=0, lt=1)


class PropagateSettings(Settings):
    """How scored pairs become pseudo-labels.

    threshold : probability at which images are joined; "auto" is the best one on held-out labelled
        identities, or, for votes, the cosine that kept pairs exceed; a number below that counts as
        that.
    split : "consensus" (average linkage over the scored pairs) or "raise_threshold" (connected
        components, split by a rising threshold, as in the paper).
    max_size : images in the largest cluster; null is no limit for "consensus" and the default of
        `cdp.propagation.propagate_labels` for "raise_threshold".
    step : how far "raise_threshold" moves the threshold towards 1 in each round, as a share of the
        remaining distance.
    target_precision : with threshold "auto", the loosest threshold whose pairwise precision, both
        on held-out identities and as estimated, reaches this value, at the cost of recall; null
        balances precision and recall.
    tracks : in videos, keep the faces of a track together and those of one frame apart; see
        `cdp.review.tracks`.
    soft_labels : weighted labels, for `retrain.targets: soft`.
    """

    threshold: float | Literal["auto"] = "auto"
    split: Literal["consensus", "raise_threshold"] = "consensus"
    max_size: Positive | None = None
    step: float = Field(0.1, gt=0, lt=1)
    target_precision: float | None = Field(None, gt=0, lt=1)
    tracks: bool = True
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

    pretrained : committee member whose network and weights the recognizer starts from, in place of
        a `backbone` with fresh weights; `embedding_dim` is the length of its vectors, and
        `learning_rate` must be given.
    min_cluster_size : smallest cluster that is a class.
    leftovers : images without a pseudo-label or of too small a cluster are left out ("drop"), or
        each is a class ("alone"). The same holds for identities with too few images where the truth
        is used.
    mask_negatives_above : where two images of different pseudo-classes match with more than this
        probability, each image's softmax leaves the other's class out of its negatives; 1 turns
        this off.
    weigh_by_confidence : weight the loss of a pseudo-labelled image by its confidence.
    targets : "hard" trains on one pseudo-label an image, "soft" on the weighted ones of
        `propagate.soft_labels`.
    pseudo_share : part of each batch and of the loss that the pseudo-labelled set has; null is its
        part of the images. With two numbers the loss's part moves from the first to the second with
        the square of the epochs done, and the batch has the mean of them.
    same_person : a cluster that matches a labelled identity stays a class ("apart"), or its images
        join that identity ("merge").
    merge_far : share of the labelled identities that may match another one: sets the threshold of
        "merge".
    teacher : committee member to distil from, in a further recognizer `distilled`; null trains
        none.
    teacher_px : side the teacher's faces are reduced to; null keeps their full resolution.
    distil_weight, class_weight : weights of the distance to the teacher's vectors and of the class
        losses, for `distilled`.
    student : training settings, backbone, width and pretrained of `distilled`, where they differ
        from these.
    blends : number of faces blended from two or three images, used for distillation only.
    adapt : fit the last recognizer to the unlabelled images, as a further subject `adapted`:
        "moments" renews the batch normalisations' moments, "adda" trains against a discriminator;
        see `cdp.adaptation`. null does not.
    """

    backbone: str = "residual"
    width: float = Field(1.0, gt=0)
    pretrained: Name | None = None
    min_cluster_size: Positive = 2
    leftovers: Literal["drop", "alone"] = "drop"
    mask_negatives_above: float = Field(0.02, ge=0, le=1)
    weigh_by_confidence: bool = False
    targets: Literal["hard", "soft"] = "hard"
    pseudo_share: Rate | tuple[Rate, Rate] | None = None
    same_person: Literal["apart", "merge"] = "apart"
    merge_far: float = Field(0.01, ge=0, lt=1)
    teacher: Name | None = None
    teacher_px: int | None = Field(None, ge=4)
    distil_weight: float = Field(3.0, ge=0)
    class_weight: float = Field(1.0, ge=0)
    student: dict[str, Any] = Field(default_factory=dict)
    blends: int = Field(0, ge=0)
    adapt: Literal["moments", "adda"] | None = None

    @model_validator(mode="after")
    def _something_counts(self) -> RetrainSettings:
        if self.distil_weight == self.class_weight == 0:
            raise ValueError("distil_weight and class_weight are both 0: nothing to train on")
        return self

    @model_validator(mode="after")
    def _student_can_be_trained(self) -> RetrainSettings:
        known = {*TrainingSettings.model_fields, "backbone", "width", "pretrained"}
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
        """The settings of the student: these, with `student` over them."""
        own = {**self.model_dump(mode="json"), **self.student, "student": {}}
        return RetrainSettings.model_validate_json(json.dumps(own))


class EvaluateSettings(Settings):
    """The protocols on held-out identities; sizes in pixels, rates as shares.

    probe_px, degradations : every degradation at every size is a kind of probe.
    gallery : "sharp" enrols faces at full resolution, "probe" in the size and quality of the
        probes.
    folds, pairs_per_fold : of the verification accuracy.
    far : false accept rates of TAR@FAR.
    pair_images : images an identity, at most, that TAR@FAR compares with all others.
    ranks : k of rank-k identification.
    enrolled : share of the identities with two images that the open-set gallery holds; the others
        are its impostors, and the distractors of the closed set.
    fpir, fpir_rank : false positive identification rates and rank of TPIR@FPIR.
    set_sizes : pictures of one person, at most, that a probe of the protocol `sets` has.
    set_weights : what weighs them: the "norm" of their vectors, or the "quality" of the pictures,
        by which probes are then rejected too.
    rejected : shares of the probes that the protocol `rejecting` leaves out.
    draws : bootstrap resamples of the identities behind `low` and `high`.
    supervised : train the upper bound on the true identities, where they are known.
    embedders : judge the committee's ONNX models beside the recognizers.
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
    set_sizes: tuple[Positive, ...] = (1, 2, 4, 8)
    set_weights: Literal["norm", "quality"] = "norm"
    rejected: tuple[Rate, ...] = (0.1, 0.2, 0.3, 0.5)
    draws: Positive = 200
    supervised: bool = True
    embedders: bool = True


class RunConfig(Settings):
    """One run: `configs/<name>.yaml` plus the overrides of the command line.

    name : of the run and its directory; the default is the name of the config file.
    rounds : 2 makes a run `<name>_round1` first; its recognizer is then one more committee member.
    seed : of all random choices.
    data : the data manifest, e.g. `data_manifests/synthetic.yaml`.
    committee, ingest, ... : settings of the stages.
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
        """The runs to make, in order; the last one has the name of this config."""
        if self.rounds == 1:
            return (self,)
        first = self.model_copy(update={"name": f"{self.name}_round1", "rounds": 1})
        student = MemberSettings(name="round1", recognizer=first.name)
        members = (*self.committee.members, student)
        committee = self.committee.model_copy(update={"members": members})
        return first, self.model_copy(update={"committee": committee, "rounds": 1})

    def pick(self, fields: tuple[str, ...]) -> dict[str, Any]:
        """The named top-level fields as plain JSON values, for a fingerprint."""
        whole = self.model_dump(mode="json")
        return {field: whole[field] for field in fields}


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a config and apply dotted overrides (`propagate.max_size=300`)."""
    value = read_yaml(path)
    value.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(value, override)
    given = f" with {' '.join(overrides)}"[:200] if overrides else ""
    return validate_settings(RunConfig, value, source=f"{path}{given}")


def _apply_override(value: dict[str, Any], override: str) -> None:
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
