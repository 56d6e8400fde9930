"""Images of faces, before any network.

- `decode.py`: untrusted bytes to RGB pixels
- `align.py`: five landmarks to an upright face
- `degradation.py`: sharp faces to those of a distant camera
- `blending.py`: blends of two faces, for distillation
- `page.py`: rows of pictures on one page
"""
