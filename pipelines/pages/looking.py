"""Where the recognizers look, as a picture for a page: occlusion maps, heat maps and filters."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from markupsafe import Markup

SHOWN_FACES = 8


def draw_looking(models: Mapping[str, Path], faces: np.ndarray) -> Markup:
    """A row of faces and the rows of each model, as one `<img>` element.

    models : name -> file of a recognizer of ours (.safetensors) or of an ONNX model.
    faces : (n, s, s, 3) uint8 RGB, at the side the recognizers are used at. The first
        `SHOWN_FACES` are shown; the filters' mean responses are over all.
    """
    from PIL import Image

    from cdp.images.page import compose_page
    from pipelines.export.heatmaps import draw_model

    rows = {"faces": faces[:SHOWN_FACES]}
    for name, path in models.items():
        for title, pictures in draw_model(path, faces, SHOWN_FACES).items():
            rows[title.replace(path.stem, name.replace("_", " "))] = pictures
    stream = BytesIO()
    page = compose_page(rows, cell_px=72)
    Image.fromarray(page).save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return Markup(
        '<img alt="Rows of faces coloured by where each model looks: {}" width="{}" '
        'style="display: block; max-width: 100%" src="data:image/png;base64,{}">'
    ).format(", ".join(name.replace("_", " ") for name in models), page.shape[1], data)
