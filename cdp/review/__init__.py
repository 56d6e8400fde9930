"""Review: constraints from a reviewer's decisions, and what to ask first."""
