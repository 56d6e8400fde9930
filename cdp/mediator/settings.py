"""Settings of the mediator, with presets: the paper's, the released code's and ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cdp.errors import ConfigError

VARIANTS = ("extended", "paper", "released", "context")


@dataclass(frozen=True)
class MediatorSettings:
    """How a mediator is built and trained.

    The defaults are ours; `MediatorSettings.named` gives the paper's and the released code's.

    variant : its input features: "extended" (ours, 10N + 10), "paper" (6N + 5) or "released"
        (3N + 2) of `cdp.committee.features`, or "context" of `cdp.mediator.neighbourhood`.
    hidden : widths of the two hidden layers; None for three times the number of inputs each.
    optimizer : "adam" or "sgd" (momentum .9).
    learning_rate, weight_decay, dropout : as usual; dropout acts on both hidden layers.
    anneal : let the learning rate fall to zero along half a cosine over all `epochs`.
    epochs : passes over the training pairs; at most this many when `patience` is set.
    patience : stop after this many checks (one an epoch, or one in `CHECK_STEPS` steps, whichever
        comes first) without a lower validation loss, and keep the best weights; None trains for
        `epochs` and keeps the last.
    batch_size : pairs a step; fewer where `anneal` is set and pairs are few.
    pair_budget : most pairs that the MLPs train on, a weighted sample of all
        (`cdp.mediator.pair_sample`); None: all.
    standardise : subtract each input's mean and divide by its deviation over the labelled pairs.
    ensemble_size : number of MLPs, whose logits are averaged; MLP i holds out fold i.
    folds : number of folds the identities are dealt into; at least `ensemble_size`.
    calibrate : scale and shift the logits to fit the held-out pairs (Platt 1999).
    correct_prior : rescale the probabilities of an unlabelled set to its own positive rate
        (`cdp.mediator.prior_shift`).
    """

    variant: str = "extended"
    hidden: tuple[int, int] | None = (50, 50)
    optimizer: str = "adam"
    learning_rate: float = 0.006
    weight_decay: float = 1e-4
    dropout: float = 0.0
    anneal: bool = True
    epochs: int = 8
    patience: int | None = 8
    batch_size: int = 1024
    pair_budget: int | None = 100_000
    standardise: bool = True
    ensemble_size: int = 5
    folds: int = 5
    calibrate: bool = True
    correct_prior: bool = True

    def __post_init__(self) -> None:
        def check(right: bool, name: str, expected: str) -> None:
            if not right:
                raise ConfigError(
                    f"mediator.{name}: expected {expected}, got {getattr(self, name)!r}; "
                    "change it in the configuration"
                )

        check(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}")
        check(
            self.hidden is None or (len(self.hidden) == 2 and min(self.hidden) > 0),
            "hidden",
            "two positive widths, or null for three times the inputs",
        )
        check(self.optimizer in ("adam", "sgd"), "optimizer", "adam or sgd")
        check(self.learning_rate > 0, "learning_rate", "a positive number")
        check(self.weight_decay >= 0, "weight_decay", "a number >= 0")
        check(0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        check(self.epochs > 0, "epochs", "a positive integer")
        check(self.patience is None or self.patience > 0, "patience", "a positive integer or null")
        check(self.batch_size > 0, "batch_size", "a positive integer")
        check(
            self.pair_budget is None or self.pair_budget > 0,
            "pair_budget",
            "a positive integer or null",
        )
        check(self.ensemble_size > 0, "ensemble_size", "a positive integer")
        least = max(2, self.ensemble_size)
        check(self.folds >= least, "folds", "at least 2, and at least `ensemble_size`")

    @classmethod
    def named(cls, variant: str) -> MediatorSettings:
        """The settings that go with a variant's name.

        "paper": Zhan et al. 2018, section 3.2 (2 x 50, rate .05, 4 epochs, raw inputs, one MLP).
        "released": the authors' code (2 x three times the inputs, rate .001, 2 epochs of 1024,
        momentum .9, decay 1e-4). "extended": ours, the defaults.
        The paper gives neither batch size nor optimizer; we take the released code's.
        """
        if variant == "extended":
            return cls()
        plain = cls(
            variant=variant,
            optimizer="sgd",
            anneal=False,
            patience=None,
            pair_budget=None,
            standardise=False,
            ensemble_size=1,
            calibrate=False,
            correct_prior=False,
        )
        if variant == "released":
            return replace(plain, hidden=None, learning_rate=0.001, epochs=2)
        return replace(plain, learning_rate=0.05, epochs=4)
