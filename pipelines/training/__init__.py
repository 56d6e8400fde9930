"""Trainings of a run: each model is trained once, by one process or several.

- `sets.py`: which images and labels a model is trained on, and their digest
- `request.py`: one training as JSON values and named arrays, and its execution
- `trained.py`: trained models on disk, found again by their key
- `team.py`: the other processes of `torchrun`, which take part in each training
- `teacher.py`: a committee member's vectors of every training image
- `curves.py`: training curves for TensorBoard
"""
