"""The choices of a config, tried before a run: networks, heads, losses, degradations, votes.

The contract:
- Everything that is trained is built once, small and untrained, and thrown away; a name or a
  parameter that does not exist is a `ConfigError` at the head of a run.
- More votes than there are members are a `ConfigError` too, and so is a pretrained network of no
  member, or without a learning rate of its own.
- Only stages that will run are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cdp.errors import ConfigError
from pipelines.config import RetrainSettings, RunConfig, TrainingSettings


def check_choices(config: RunConfig, stages: Collection[str]) -> None:
    """Build what these stages train, look up their degradations, count the votes they ask for.

    Parameters
    ----------
    config : RunConfig
    stages : collection of str
        Names of stages that will run.

    Raises
    ------
    ConfigError
        The first name, parameter or size that cannot be built, after the settings it stands in.
    """
    for place, settings, backbone, width in list_trainings(config, stages):
        try:
            _check_pretrained(config, settings)
            _build(settings, backbone, width)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    members, votes = len(config.committee.members), config.mediate.vote.min_votes
    if "mediate" in stages and members and votes > members:
        raise ConfigError(
            f"mediate.vote.min_votes: expected 0 to {members}, the number of committee.members, "
            f"got {votes}: no pair can have so many votes"
        )
    if "evaluate" in stages:
        from cdp.images.degradation import get_degradation

        for name in config.evaluate.degradations:
            get_degradation(name)


def list_trainings(
    config: RunConfig, stages: Collection[str]
) -> Iterator[tuple[str, TrainingSettings, str, float]]:
    """What is trained: its place in the config, its settings, and a backbone with its width."""
    if "train" in stages:
        for member in config.committee.all:
            if member.backbone is not None:
                yield f"train, member {member.name}", config.train, member.backbone, member.width
    if "retrain" in stages:
        retrain = config.retrain
        yield "retrain", retrain, retrain.backbone, retrain.width
        if retrain.teacher is not None:
            student = retrain.describe_student()
            yield "retrain.student", student, student.backbone, student.width


def _check_pretrained(config: RunConfig, settings: TrainingSettings) -> None:
    """Whether the network that a training starts from is a member's, and may learn slowly."""
    name = settings.pretrained if isinstance(settings, RetrainSettings) else None
    if name is None:
        return
    members = {member.name: member for member in config.committee.all}
    if name not in members or members[name].features is not None:
        models = [each.name for each in config.committee.all if each.features is None]
        raise ConfigError(
            f"pretrained: a member of the committee with a model expected ({', '.join(models)}), "
            f"got {name!r}"
        )
    retrain = config.retrain
    given = retrain.model_fields_set if settings is retrain else {*retrain.student}
    if "pretrained" in given and "learning_rate" not in given:
        raise ConfigError(
            f"pretrained: {name} needs a learning_rate of its own, {settings.learning_rate:g} is "
            "for fresh weights; 0.0005 with optimizer: adamw is a start"
        )


def _build(settings: TrainingSettings, backbone: str, width: float) -> None:
    settings.make_plan(seed=0)
    spec = settings.make_spec(backbone, width)
    class_count = 1 + (settings.sampled_classes or 1)
    built = spec.make_backbone(seed=0)
    spec.make_head(class_count, seed=0, optimizer=settings.optimizer)
    spec.make_auxiliaries(class_count, seed=0, backbone=built)
