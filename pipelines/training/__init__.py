"""Trainings of a run: what on, each once, by one process or several."""
