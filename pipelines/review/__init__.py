"""The review of a run: its clusters are judged and corrected on a page in a browser.

`__main__` is the command, which serves the page; `session` holds the open questions and the labels
as corrected so far; `people`, `neighbours` and `left_out` find what it shows beside the clusters.
"""
