"""Painter: traits and nuisances -> pixels of cartoon faces.

The contract:
- An image depends on its own row of traits and nuisances alone, not on the batch it is drawn in.
- Coordinates: u to the right, v down, both in [-1, 1] over the image before pose. Shapes are signed
  fields turned to coverage over about one pixel, so edges are smooth at any size. All float32.

Array suffixes used below: b images of a block, s pixels a side.
"""

from __future__ import annotations

import numpy as np

from cdp.synthetic.traits import (
    TRAITS,
    Columns,
    make_columns,
    mix_bits,
    pick_trait,
    place_nuisance,
    scale_traits,
)

Length = np.ndarray | np.floating

_BLOCK = 16
"""Images painted at once: few enough for the cache, enough to amortise numpy's calls."""

_ZOOM, _RISE = np.float32(1.18), np.float32(0.08)
"""How tightly the head fills the image, and how far above its centre the eyes lie."""

_SKIN = np.array([[0.97, 0.83, 0.73], [0.85, 0.65, 0.50], [0.62, 0.43, 0.31], [0.36, 0.24, 0.18]])
_HAIR = np.array([[0.07, 0.06, 0.06], [0.27, 0.17, 0.11], [0.52, 0.36, 0.22], [0.84, 0.72, 0.50]])


class _Canvas:
    """Planes (3, b, s, s) that coverage is painted on."""

    def __init__(self, images: int, size_px: int) -> None:
        self.plane = np.empty((3, images, size_px, size_px), np.float32)
        self.sharp = np.float32(size_px / 2)  # pixels a unit
        self.scratch = np.empty_like(self.plane)

    def cover(self, field: np.ndarray, softness_px: float = 1.0) -> np.ndarray:
        """Coverage in [0, 1] of {field > 0}; field in units of length near its zero. In place."""
        field *= self.sharp / np.float32(softness_px)
        field += np.float32(0.5)
        return np.clip(field, 0.0, 1.0, out=field)

    def paint(self, colour: np.ndarray, alpha: np.ndarray, rows: slice = slice(None)) -> None:
        """Lay a colour (b, 3) or (1, 3) over the rows of the canvas that alpha describes."""
        plane, scratch = self.plane[:, :, rows], self.scratch[:, :, rows]
        np.subtract(colour.T[:, :, None, None], plane, out=scratch)
        scratch *= alpha
        plane += scratch

    def shade(self, factor: np.ndarray, rows: slice = slice(None)) -> None:
        self.plane[:, :, rows] *= factor


def _ellipse(du: np.ndarray, dv: np.ndarray, a: Length, b: Length) -> np.ndarray:
    """A field, positive inside, with slope about one at the border."""
    radius = np.float32(0.5) * np.minimum(a, b)
    return radius - radius * ((du / a) ** 2 + (dv / b) ** 2)


def _ramp(stops: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(b, 3) colour at `place` (b,) in [0, 1] along evenly spaced stops."""
    at = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(place, at, stops[:, c]) for c in range(3)], axis=1)


def draw_faces(
    traits: np.ndarray, chance: np.ndarray, *, size_px: int, nuisance: float
) -> np.ndarray:
    """Draw faces from traits and nuisance numbers.

    traits : (b, TRAIT_COUNT) float, standard normal units.
    chance : (b, len(NUISANCES)) float in (0, 1).
    Returns (b, s, s, 3) uint8 RGB; each image depends on its own row alone.
    """
    every_t = make_columns(list(TRAITS), scale_traits(traits))
    every_n = place_nuisance(chance, np.asarray(traits)[:, pick_trait("glasses")], nuisance)
    band = _Bands(size_px, nuisance)
    image = np.empty((len(traits), size_px, size_px, 3), np.uint8)
    for low in range(0, len(traits), _BLOCK):
        part = slice(low, low + _BLOCK)
        grain = np.ascontiguousarray(chance[part, -1]).view(np.uint64)
        image[part] = _draw_block(every_t.take(part), every_n.take(part), grain, band)
    return image


def _draw_block(t: Columns, n: Columns, grain: np.ndarray, band: _Bands) -> np.ndarray:
    """Paint one block from back to front; `grain` (b,) uint64 seeds the noise."""
    size_px = band.size_px
    canvas = _Canvas(len(grain), size_px)

    # Pose: from pixels to head coordinates (U, V), then around the head's curvature (u, v).
    axis = ((np.arange(size_px, dtype=np.float32) + np.float32(0.5)) / size_px * 2 - 1)[None]
    x, y = axis[:, None, :] - n.shift_u, axis[:, :, None] - n.shift_v
    zoom = n.scale * _ZOOM
    cos, sin = np.cos(n.roll) / zoom, np.sin(n.roll) / zoom
    U, V = x * cos + y * sin, y * cos - x * sin + _RISE
    head_u, head_v = U / t.head_width, V / np.where(V < 0, t.head_top, t.chin)
    depth = np.sqrt(np.maximum(np.float32(0.0), 1 - head_u**2 - head_v**2))
    u, v = U - n.yaw * depth, V - n.pitch * depth

    colour = _Colours(t, n)
    _paint_scene(canvas, band, t, n, colour, U, V)
    head = _head_field(t, U, V)
    inside = canvas.cover(head)
    rows = band(-0.3, 0.45)
    side, height = np.abs(U[:, rows]) - t.head_width, V[:, rows] - np.float32(0.06)
    ears = canvas.cover(_ellipse(side, height, t.ear_size, t.ear_size * np.float32(1.6)))
    canvas.paint(colour.skin * np.float32(0.9), ears, rows)
    canvas.paint(colour.skin, inside)
    _paint_cheeks(canvas, band, t, colour, u, v, inside)
    _paint_beard(canvas, band, t, colour, u, v, inside)
    _paint_eyes(canvas, band, t, n, colour, u, v)
    _paint_brows(canvas, band, t, n, colour, u, v)
    _paint_nose(canvas, band, t, n, colour, u, v)
    _paint_mouth(canvas, band, t, n, colour, u, v)
    _paint_mark(canvas, t, colour, u, v)
    _paint_hair(canvas, band, t, n, colour, u, v, U, V)
    _light(canvas, n, head_u, head_v)
    _occlude(canvas, t, n, u, v, U, V)
    return _photograph(canvas, n, grain)


class _Bands:
    """The pixel rows where a feature can be, whatever the pose; other rows need not be computed."""

    def __init__(self, size_px: int, nuisance: float) -> None:
        self.size_px = size_px
        self.margin = 0.09 + 0.14 * nuisance

    def __call__(self, low: float, high: float) -> slice:
        """Rows that hold head heights low .. high; at least one row."""
        top = (low - float(_RISE)) * float(_ZOOM) - self.margin
        bottom = (high - float(_RISE)) * float(_ZOOM) + self.margin
        first = min(max(0, int((top + 1) / 2 * self.size_px)), self.size_px - 1)
        return slice(
            first, max(first + 1, min(self.size_px, int((bottom + 1) / 2 * self.size_px) + 1))
        )


class _Colours:
    """The inks of each image, (b, 3) float32."""

    def __init__(self, t: Columns, n: Columns) -> None:
        tone = np.clip((t.skin_tone + n.tan).ravel(), 0.0, 1.0)
        red = t.skin_red.ravel()[:, None]
        skin = _ramp(_SKIN, tone) * (1.0 + red * np.array([1.0, 0.0, -1.2]))
        hair = _ramp(_HAIR, np.clip(t.hair_tone.ravel(), 0.0, 1.0))
        hair = hair + t.hair_red.ravel()[:, None] * np.array([1.2, 0.0, -0.8])
        iris_tone = np.clip(t.iris_tone.ravel(), 0.02, 0.8)[:, None]
        blue = t.iris_blue.ravel()[:, None]
        lips = skin * (1.0 - np.clip((t.lip_red + n.lip).ravel(), 0.0, 0.6)[:, None] * _LIP_LOSS)
        self.skin = np.clip(skin, 0.0, 1.0).astype(np.float32)
        self.hair = np.clip(hair, 0.0, 1.0).astype(np.float32)
        self.iris = np.clip(iris_tone * (1.0 + blue * np.array([-0.5, 0.1, 0.9])), 0.0, 1.0).astype(
            np.float32
        )
        self.lips = np.clip(lips, 0.0, 1.0).astype(np.float32)
        self.back = _triple(n, "back")
        self.cloth = _triple(n, "cloth")
        self.occlusion = _triple(n, "occlusion")
        self.dark = (self.skin * np.float32(0.25)).astype(np.float32)


_LIP_LOSS = np.array([0.5, 1.6, 1.3])
_WHITE = np.array([[0.93, 0.92, 0.90]], np.float32)
_BLACK = np.array([[0.05, 0.05, 0.06]], np.float32)


def _triple(n: Columns, name: str) -> np.ndarray:
    return np.concatenate([getattr(n, f"{name}_{channel}")[:, 0] for channel in "rgb"], axis=1)


def _head_field(t: Columns, U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """An ellipse above the eye line; below it narrowing to a chin, round or square."""
    below = np.maximum(V, 0) / t.chin
    width = t.head_width * (1 - t.jaw_taper * np.minimum(below, 1))
    square = below * below
    fall = (1 - t.jaw_square) * square + t.jaw_square * square * square
    level = (U / width) ** 2 + (np.minimum(V, 0) / t.head_top) ** 2 + fall
    return np.float32(0.3) * (1 - level)


def _paint_scene(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    U: np.ndarray,
    V: np.ndarray,
) -> None:
    """Background, long hair behind the head, neck and clothes."""
    ramp = U + n.back_slope * V
    for channel, name in enumerate("rgb"):
        canvas.plane[channel] = getattr(n, f"back_{name}") + getattr(n, f"back_d{name}") * ramp
    volume = t.head_width + t.hair_volume * np.float32(0.8)
    behind = np.float32(0.3) * (
        1 - (U / volume) ** 2 - (np.minimum(V, 0) / (t.head_top + t.hair_volume)) ** 2
    )
    behind = np.minimum(behind, t.hair_length + n.hair - V)
    canvas.paint(colour.hair * np.float32(0.8), canvas.cover(behind))
    rows = band(0.25, 2.0)
    U, V = U[:, rows], V[:, rows]
    neck = np.minimum(t.head_width * np.float32(0.62) - np.abs(U), V - np.float32(0.3))
    canvas.paint(colour.skin * np.float32(0.78), canvas.cover(neck), rows)
    shoulders = V - np.float32(0.84) - np.float32(0.25) * U * U
    canvas.paint(colour.cloth, canvas.cover(shoulders, 2.0), rows)


def _paint_cheeks(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
    inside: np.ndarray,
) -> None:
    rows = band(-0.25, 0.95)
    side, v, inside = np.abs(u[:, rows]), v[:, rows], inside[:, rows]
    blush = (side - np.float32(0.36)) ** 2 + (v - np.float32(0.22)) ** 2
    blush = np.maximum(0, 1 - blush * np.float32(22)) * inside
    canvas.plane[1, :, rows] *= 1 - t.cheek_red * blush * np.float32(2)
    canvas.plane[2, :, rows] *= 1 - t.cheek_red * blush * np.float32(2)
    hollow = (side - np.float32(0.47)) ** 2 * 12 + (v - np.float32(0.38) - t.cheekbone) ** 2 * 16
    canvas.shade(1 - t.cheekbone * np.maximum(0, 1 - hollow) * inside * 2, rows)


def _paint_beard(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
    inside: np.ndarray,
) -> None:
    some = np.flatnonzero(t.beard.ravel() > 0)
    if some.size:
        rows = band(-0.1, 2.0)
        u, v = u[some, rows], v[some, rows]
        line = v - np.float32(0.40) + np.float32(0.35) * (u / t.head_width[some]) ** 2
        chin = canvas.cover(line * np.float32(0.5), 2.0) * inside[some, rows]
        strength = np.minimum(t.beard[some], np.float32(0.9))
        _lay(canvas, some, colour.hair[some], chin * strength, rows)


def _paint_eyes(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
) -> None:
    rows = band(-0.4, 0.25)
    du = np.abs(u[:, rows]) - t.eye_spacing
    dv = v[:, rows] - t.eye_height + t.eye_tilt * du
    socket = np.maximum(0, 1 - du * du * 22 - (dv + np.float32(0.03)) ** 2 * 50)
    canvas.shade(1 - t.eye_socket * socket, rows)
    half = t.eye_open * (1 - n.lid)
    white = canvas.cover(_ellipse(du, dv, t.eye_width, half))
    canvas.paint(_WHITE, white, rows)
    size = np.float32(0.062)
    iris = canvas.cover(_ellipse(du, dv, size, size))
    iris *= white
    canvas.paint(colour.iris, iris, rows)
    pupil = canvas.cover(_ellipse(du, dv, size * np.float32(0.5), size * np.float32(0.5)))
    pupil *= white
    canvas.paint(_BLACK, pupil, rows)
    arc = half * (1 - (du / t.eye_width) ** 2)
    lash = np.minimum(np.float32(0.018) - np.abs(dv + arc), t.eye_width - np.abs(du))
    canvas.paint(colour.dark, canvas.cover(lash) * np.float32(0.8), rows)


def _paint_brows(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
) -> None:
    rows = band(-0.65, 0.15)
    du = np.abs(u[:, rows]) - t.eye_spacing
    dv = v[:, rows] - t.eye_height + t.brow_gap + n.brow_raise
    dv = dv + t.brow_tilt * du + t.brow_arch * du * du
    stroke = np.minimum(t.brow_thickness - np.abs(dv), t.brow_length - np.abs(du))
    canvas.paint(colour.hair * np.float32(0.7), canvas.cover(stroke) * np.float32(0.85), rows)


def _paint_nose(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
) -> None:
    rows = band(-0.25, 0.6)
    du = u[:, rows] - n.yaw * np.float32(0.25)
    tip = t.eye_height + t.nose_length
    along = (v[:, rows] - t.eye_height) / t.nose_length  # 0 between the eyes, 1 at the tip
    width = t.nose_width * (np.float32(0.35) + np.float32(0.65) * np.clip(along, 0, 1))
    ridge = np.clip(np.minimum(along, np.float32(1.08) - along) * 6, 0, 1)
    flank = np.maximum(0, 1 - np.abs(np.abs(du) - width) / np.float32(0.05)) * ridge
    canvas.shade(1 - t.nose_bridge * flank, rows)
    bright = np.maximum(0, 1 - np.abs(du) / width) * ridge
    canvas.shade(1 + np.float32(0.5) * t.nose_bridge * bright, rows)
    dv = v[:, rows] - tip
    under = canvas.cover(_ellipse(du, dv, t.nose_width, np.float32(0.032)), 2.0)
    canvas.paint(colour.dark, under * np.float32(0.4), rows)
    hole = np.float32(0.028)
    nostril = _ellipse(np.abs(du) - t.nose_width * np.float32(0.55), dv, hole, hole)
    canvas.paint(colour.dark, canvas.cover(nostril), rows)


def _paint_mouth(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
) -> None:
    rows = band(0.2, 0.95)
    width = t.mouth_width * (1 + np.float32(0.25) * n.smile)
    du = u[:, rows] - n.yaw * np.float32(0.08)
    bend = (t.mouth_curve + n.smile) * (du * du / width - width * np.float32(0.4))
    dv = v[:, rows] - t.mouth_height + bend
    gap = n.mouth_open * np.float32(0.5)
    upper = _ellipse(du, dv + gap + t.lip_upper * np.float32(0.6), width, t.lip_upper)
    lower = _ellipse(du, dv - gap - t.lip_lower * np.float32(0.6), width * 0.88, t.lip_lower)
    # So flat an ellipse has a long soft end: it must stop at the corners of the mouth.
    corner = width - np.abs(du)
    canvas.paint(colour.lips * np.float32(0.9), canvas.cover(np.minimum(upper, corner)), rows)
    canvas.paint(colour.lips, canvas.cover(np.minimum(lower, corner)), rows)
    between = _ellipse(du, dv, width * np.float32(0.92), gap + np.float32(0.014))
    canvas.paint(colour.dark, canvas.cover(np.minimum(between, corner)), rows)
    teeth = _ellipse(du, dv + gap * np.float32(0.4), width * np.float32(0.7), gap * 0.5 + 1e-3)
    shown = np.clip(n.mouth_open * 20 - np.float32(0.6), 0, 1)
    canvas.paint(_WHITE, canvas.cover(teeth) * shown, rows)


def _paint_mark(
    canvas: _Canvas, t: Columns, colour: _Colours, u: np.ndarray, v: np.ndarray
) -> None:
    some = np.flatnonzero(t.mark.ravel() > 0)
    if some.size:
        radius = np.float32(0.045)
        spot = _ellipse(u[some] - t.mark_u[some], v[some] - t.mark_v[some], radius, radius)
        strength = np.minimum(t.mark[some], np.float32(0.8))
        _lay(canvas, some, colour.dark[some], canvas.cover(spot) * strength)


def _paint_hair(
    canvas: _Canvas,
    band: _Bands,
    t: Columns,
    n: Columns,
    colour: _Colours,
    u: np.ndarray,
    v: np.ndarray,
    U: np.ndarray,
    V: np.ndarray,
) -> None:
    """The hair in front: what lies above the hairline, within the head and its volume."""
    rows = band(-2.0, 0.6)
    u, v, U, V = u[:, rows], v[:, rows], U[:, rows], V[:, rows]
    volume = t.head_width + t.hair_volume * np.float32(0.45)
    cap = np.float32(0.3) * (
        1 - (U / volume) ** 2 - (np.minimum(V, 0) / (t.head_top + t.hair_volume)) ** 2
    )
    line = t.hairline + t.hair_part * u + t.hairline_curve * u * u + n.hair
    cap = np.minimum(cap, line - v)
    cap = np.minimum(cap, np.float32(0.12) - v + t.hair_length * np.float32(0.3))
    canvas.paint(colour.hair, canvas.cover(cap, 1.5), rows)


def _light(canvas: _Canvas, n: Columns, head_u: np.ndarray, head_v: np.ndarray) -> None:
    """Directed light over the head's curvature, its colour, exposure and contrast."""
    slope = n.light_u * np.clip(head_u, -1.2, 1.2) + n.light_v * np.clip(head_v, -1.2, 1.2)
    slope += 1
    slope *= n.exposure
    for channel, tint in enumerate((1 + n.warm, 1 + n.green, 1 - n.warm)):
        plane = canvas.plane[channel]
        plane *= slope
        plane -= np.float32(0.5)
        plane *= tint * n.contrast
        plane += np.float32(0.5) * tint


def _occlude(
    canvas: _Canvas,
    t: Columns,
    n: Columns,
    u: np.ndarray,
    v: np.ndarray,
    U: np.ndarray,
    V: np.ndarray,
) -> None:
    """Glasses, sunglasses, a mask over the lower face, or something held before it."""
    worn = np.flatnonzero((n.glasses + n.sunglasses).ravel())
    if worn.size:
        du = np.abs(u[worn]) - t.eye_spacing[worn]
        dv = v[worn] - t.eye_height[worn]
        lens = _ellipse(du, dv, np.float32(0.21), np.float32(0.16))
        frame = np.float32(0.022) - np.abs(lens)
        bridge = np.minimum(
            np.float32(0.02) - np.abs(dv + np.float32(0.02)),
            t.eye_spacing[worn] - np.float32(0.18) - np.abs(u[worn]),
        )
        frame = np.maximum(frame, bridge)
        dark = n.sunglasses[worn]
        _lay(canvas, worn, _BLACK, canvas.cover(frame) * np.float32(0.8))
        _lay(canvas, worn, _BLACK, canvas.cover(lens) * dark)
    ink = _triple(n, "occlusion")
    masked = np.flatnonzero(n.mask.ravel())
    if masked.size:
        top = v[masked] - np.float32(0.22) - np.float32(0.25) * u[masked] ** 2
        face = np.minimum(_head_field(t.take(masked), U[masked], V[masked]) + np.float32(0.02), top)
        _lay(canvas, masked, ink[masked], canvas.cover(face))
    covered = np.flatnonzero(n.patch.ravel())
    if covered.size:
        du, dv = U[covered] - n.patch_u[covered], V[covered] - n.patch_v[covered]
        cos, sin = np.cos(n.patch_tilt[covered]), np.sin(n.patch_tilt[covered])
        size = n.patch_size[covered]
        patch = _ellipse(du * cos + dv * sin, dv * cos - du * sin, size * 2, size)
        _lay(canvas, covered, ink[covered], canvas.cover(patch))


def _lay(
    canvas: _Canvas,
    chosen: np.ndarray,
    ink: np.ndarray,
    alpha: np.ndarray,
    rows: slice = slice(None),
) -> None:
    """Paint on some of the images only; ink and alpha are theirs."""
    for channel in range(3):
        plane = canvas.plane[channel, chosen, rows]
        canvas.plane[channel, chosen, rows] = plane + alpha * (ink[:, channel, None, None] - plane)


def _photograph(canvas: _Canvas, n: Columns, grain: np.ndarray) -> np.ndarray:
    """Blur, lose resolution, add noise, and round to uint8 (b, s, s, 3)."""
    _, images, size_px, _ = canvas.plane.shape
    soft = _soften(n.blur_px, n.shrink, size_px)
    plane = soft @ canvas.plane @ soft.transpose(0, 2, 1)
    bits = mix_bits(
        grain[:, None] + np.arange(1, (3 * size_px * size_px + 1) // 2 + 1, dtype=np.uint64)
    )
    half = bits.view(np.uint16).reshape(images, -1, 2)[:, : 3 * size_px * size_px]
    speck = (half[..., 0].astype(np.float32) - half[..., 1]) * np.float32(2.0**-16 * 6**0.5)
    plane += speck.reshape(images, 3, size_px, size_px).transpose(1, 0, 2, 3) * n.noise
    plane *= 255
    plane += np.float32(0.5)
    np.clip(plane, 0, 255, out=plane)
    return np.ascontiguousarray(plane.transpose(1, 2, 3, 0)).astype(np.uint8)


def _soften(blur_px: np.ndarray, shrink: np.ndarray, size_px: int) -> np.ndarray:
    """(b, s, s) float32 operator of a blur along one axis; rows sum to one.

    Losing resolution by a factor is a blur of about half that factor; both are one Gaussian.
    """
    sigma2 = blur_px**2 + np.float32(0.2) * (shrink**2 - 1) + np.float32(1e-3)
    place = np.arange(size_px, dtype=np.float32)
    weight = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma2))
    return weight / weight.sum(axis=2, keepdims=True)
