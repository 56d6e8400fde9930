"""Exports of a finished run: labels, recognizer, degradations."""
