"""Arrays: what every other package computes with."""
