"""Data sets: `manifest` has the models of the YAML files, `dataset` lists and reads the images."""
