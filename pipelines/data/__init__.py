"""Data sets: manifests and what they name."""
