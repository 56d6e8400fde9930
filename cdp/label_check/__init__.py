"""Which labels to believe, and which labelled people are among the unlabelled images."""

from cdp.label_check.check import LabelCheck, check_labels, list_issues
from cdp.label_check.people import LabelledPeople

__all__ = ["LabelCheck", "LabelledPeople", "check_labels", "list_issues"]
