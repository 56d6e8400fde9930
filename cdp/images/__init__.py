"""Images of faces, before any network.

- `decode.py`: untrusted bytes to RGB pixels
- `detection.py`: a photo to the boxes and landmarks of its faces
- `align.py`: five landmarks to an upright face
- `quality.py`: size, sharpness, pose and one quality of a face
- `alignment_check.py`: whether images are aligned faces
- `degradation.py`: sharp faces to those of a distant camera
- `blending.py`: blends of two faces, for distillation
- `page.py`: rows of pictures on one page
"""
