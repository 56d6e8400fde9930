"""The page of found faces: photos with their faces framed, the doubtful ones first.

The contract:
- `faces.html` is one file without scripts that needs no network and no other file.
- Each group shows at most `SHOWN` photos; which ones depends on the table and the seed alone.
- Pictures are at most `SIDE_PX` a side. A photo that can no longer be read is left out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from cdp.errors import DataError
from pipelines.pages import read_page, render

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 24
SIDE_PX = 320
USED, OTHER = (40, 190, 90), (255, 140, 0)
"""Colours of the frames."""


def render_found_faces(
    name: str,
    faces: pd.DataFrame,
    rejected: pd.DataFrame,
    photos: int,
    read_photo: Callable[[str], np.ndarray],
    *,
    seed: int,
) -> str:
    """The page as HTML.

    faces, rejected : the tables of the stage detect.
    photos : their number.
    read_photo : path -> (h, w, 3) uint8, DataError where it cannot be read.
    """
    chosen = faces[faces.chosen]
    unsure = faces[~faces.chosen & ~faces.photo.isin(chosen.photo)]
    several = chosen[chosen.photo.duplicated(keep=False)]
    turned = faces[faces.angle != 0]
    without = rejected[~rejected.photo.isin(faces.photo)]
    rng = np.random.default_rng(seed)
    groups = (
        ("unsure", "Least sure", "The used faces with the smallest scores.",
         chosen.sort_values("score", kind="stable").photo),
        ("small", "Smallest", "The smallest of the used faces.",
         chosen.sort_values("side_px", kind="stable").photo),
        ("odd", "Least like a face", "Landmarks far from those of a frontal face: profiles, and "
         "what is no face.", chosen.sort_values("misfit_px", ascending=False, kind="stable").photo),
        ("turned", "Turned", "Photos that were turned to find their faces.", turned.photo),
        ("several", "Several faces", "Photos of which several faces are used.", several.photo),
        ("listed", "Not sure enough", "Photos whose faces all score less than `align.min_score`.",
         unsure.photo),
        ("none", "No face", "Photos in which no face was found, and photos that cannot be read.",
         without.photo),
        ("random", "At random", "Any photos with a used face.",
         chosen.photo.sample(frac=1, random_state=int(rng.integers(2**31)))),
    )  # fmt: skip
    reason_of = dict(zip(rejected.photo, rejected.reason, strict=True))
    rows_of = dict(iter(faces.groupby("photo", sort=False)))
    galleries = [
        (id, title, text, _draw_photos(wanted, rows_of, reason_of, read_photo))
        for id, title, text, wanted in groups
    ]
    tiles = [
        ("photos", photos),
        ("faces used", len(chosen)),
        ("other faces", len(faces) - len(chosen)),
        ("photos without a used face", photos - chosen.photo.nunique()),
        ("photos turned", turned.photo.nunique()),
    ]
    return render(
        "found_faces.html",
        name=name,
        tiles=tiles,
        galleries=galleries,
        figures=_draw_figures(chosen),
        style=Markup(read_page("page.css")),
    )


def _draw_figures(chosen: pd.DataFrame) -> list[tuple[str, Markup]]:
    from pipelines.pages.figures import draw_measure

    if not len(chosen):
        return []
    return [
        (title, draw_measure(chosen[column].to_numpy(), name, most))
        for column, title, name, most in (
            ("quality", "Quality", "quality", 1.0),
            ("side_px", "Size", "side of the face in the photo, px", None),
            ("sharpness", "Sharpness", "variance of the Laplacian", None),
            ("yaw", "Pose", "yaw, degrees", None),
        )
    ]


def _draw_photos(
    wanted: pd.Series[str],
    rows_of: dict[str, pd.DataFrame],
    reason_of: dict[str, str],
    read_photo: Callable[[str], np.ndarray],
) -> list[dict[str, Any]]:
    pictures = []
    for photo in wanted.drop_duplicates()[:SHOWN]:
        rows = rows_of.get(photo)
        try:
            picture = _frame_faces(read_photo(photo), rows)
        except DataError:
            continue
        stream = BytesIO()
        picture.save(stream, "WEBP", quality=70)
        caption = reason_of.get(photo) or _describe(rows)
        pictures.append(
            {
                "photo": photo,
                "alt": f"{photo}: {0 if rows is None else len(rows)} faces",
                "caption": caption,
                "data": base64.b64encode(stream.getvalue()).decode(),
                "width": picture.width,
                "height": picture.height,
            }
        )
    return pictures


def _describe(rows: pd.DataFrame | None) -> str:
    if rows is None:
        return "no face"
    used = rows[rows.chosen]
    if len(used) != 1:
        return f"{len(used)} faces used of {len(rows)}"
    face = used.iloc[0]
    turned = f", turned by {face.angle}°" if face.angle else ""
    return (
        f"score {face.score:.3f}, {face.side_px:.0f} px, sharpness {face.sharpness:.0f}, "
        f"yaw {face.yaw:.0f}°, quality {face.quality:.2f}{turned}"
    )


def _frame_faces(image: np.ndarray, rows: pd.DataFrame | None) -> Image.Image:
    """The photo reduced to `SIDE_PX`, its faces framed."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE_PX, SIDE_PX))
    scale = picture.width / image.shape[1]
    pen = ImageDraw.Draw(picture)
    for face in () if rows is None else rows.itertuples():
        corners = [scale * side for side in (face.left, face.top, face.right, face.bottom)]
        if not face.chosen:
            _draw_dashes(pen, corners)
            continue
        pen.rectangle(corners, outline=USED, width=2)
        for x, y in (np.reshape(face.landmarks, (5, 2)) + 0.5) * scale:
            pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=USED)
    return picture


def _draw_dashes(pen: ImageDraw.ImageDraw, corners: list[float], *, dash_px: int = 6) -> None:
    left, top, right, bottom = corners
    for x in np.arange(left, right, 2 * dash_px):
        for y in (top, bottom):
            pen.line((x, y, min(x + dash_px, right), y), fill=OTHER, width=2)
    for y in np.arange(top, bottom, 2 * dash_px):
        for x in (left, right):
            pen.line((x, y, x, min(y + dash_px, bottom)), fill=OTHER, width=2)
