"""The parts of the stage knn: views are searched, checked and joined.

- `view.py`: one member's view of one split on disk: its vectors, its index and its graph
- `search.py`: the neighbours of a view, in parts
- `near_equal.py`: which images stand for others, in both splits
- `label_check.py`: which labelled images to train on, and which unlabelled ones show their people
- `joint.py`: graphs over both splits
"""
