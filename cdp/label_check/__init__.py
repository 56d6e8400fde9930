"""Which labels to believe, and which labelled people are among the unlabelled images."""

from cdp.label_check.check import LabelCheck, LabelledPeople, check_labels

__all__ = ["LabelCheck", "LabelledPeople", "check_labels"]
