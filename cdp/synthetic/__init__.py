"""Synthetic faces with known identities."""

from cdp.synthetic.identities import SPLITS, SyntheticFaces, draw_contact_sheet

__all__ = ["SPLITS", "SyntheticFaces", "draw_contact_sheet"]
