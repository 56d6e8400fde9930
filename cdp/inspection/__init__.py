"""Inspection: where on a face a filter, or a whole network, looks.

- `filters.py`: where each filter of the last map responds, over many faces
- `heat.py`: cells that carry the match of two vectors, by gradients
- `occlusion.py`: cells whose cover costs the match, for any embedder
- `overlay.py`: such maps over their faces
"""

from cdp.inspection.filters import FilterPlaces, locate_filters
from cdp.inspection.heat import map_attention
from cdp.inspection.occlusion import map_occlusion
from cdp.inspection.overlay import overlay_maps

__all__ = ["FilterPlaces", "locate_filters", "map_attention", "map_occlusion", "overlay_maps"]
