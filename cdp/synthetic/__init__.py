"""Synthetic faces with known identities, the data set that needs no download.

identities   SyntheticFaces: identity, split and pixels of each image
traits       what is drawn: traits of an identity, nuisances of an image
painter      how it is drawn
"""

from cdp.synthetic.identities import SPLITS, SyntheticFaces

__all__ = ["SPLITS", "SyntheticFaces"]
