"""Face-like identities with known truth, drawn by code: the data set that is always at hand.

An identity is a vector of facial traits (head, jaw, skin, eyes, brows, nose, mouth, hair, beard,
mark); an image is that identity under nuisance: pose, expression, light, occlusion, blur,
resolution and noise. The faces are cartoons; what they share with photographs is the structure of
the problem: nuisance moves an image further than identity does, some people look alike, image
counts have a long tail, and some people have one image only.

The contract:
- Image `row` is a pure function of (settings, its identity, its index within the identity): it
  does not depend on the batch it is drawn in, on the order, on the process or on the thread.
- No random state is kept. Every number comes from a counter-based hash of
  (seed, identity, index, purpose), so nothing has to be drawn before anything else.
- The identities of the splits are disjoint: labelled, then unlabelled, then evaluation.
- With `nuisance=0` all images of an identity are the same picture.

Coordinates: u to the right, v down, both in [-1, 1] over the image before pose. Shapes are signed
fields turned to coverage over about one pixel, so edges are smooth at any size. All float32.

Array suffixes used below: b images of a block, s pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtri

from cdp.errors import ConfigError, DataError

SPLITS = ("labelled", "unlabelled", "evaluation")

_BLOCK = 16
"""Images painted at once: few enough for the cache, enough to amortise numpy's calls."""

_CHUNK = 1024
"""Images whose traits and nuisance are placed at once."""

_TRAITS: dict[str, tuple[float, float]] = {
    # name: (mean, standard deviation over people); lengths in half image sides
    "head_width": (0.62, 0.045),
    "head_top": (0.72, 0.035),
    "chin": (0.84, 0.05),
    "jaw_square": (0.45, 0.28),
    "jaw_taper": (0.20, 0.09),
    "ear_size": (0.11, 0.03),
    "skin_tone": (0.45, 0.30),
    "skin_red": (0.0, 0.045),
    "cheek_red": (0.05, 0.05),
    "cheekbone": (0.10, 0.06),
    "eye_spacing": (0.275, 0.028),
    "eye_height": (-0.06, 0.035),
    "eye_width": (0.130, 0.018),
    "eye_open": (0.058, 0.013),
    "eye_tilt": (0.0, 0.16),
    "eye_socket": (0.18, 0.09),
    "iris_tone": (0.35, 0.25),
    "iris_blue": (0.0, 0.5),
    "brow_gap": (0.17, 0.028),
    "brow_thickness": (0.036, 0.012),
    "brow_tilt": (0.0, 0.17),
    "brow_arch": (1.2, 1.1),
    "brow_length": (0.165, 0.022),
    "nose_length": (0.33, 0.045),
    "nose_width": (0.105, 0.022),
    "nose_bridge": (0.22, 0.10),
    "mouth_height": (0.51, 0.032),
    "mouth_width": (0.215, 0.034),
    "lip_upper": (0.036, 0.012),
    "lip_lower": (0.048, 0.014),
    "lip_red": (0.16, 0.09),
    "mouth_curve": (0.0, 0.35),
    "hair_tone": (0.35, 0.26),
    "hair_red": (0.01, 0.05),
    "hairline": (-0.46, 0.075),
    "hairline_curve": (0.25, 0.45),
    "hair_part": (0.0, 0.16),
    "hair_length": (0.10, 0.42),
    "hair_volume": (0.10, 0.045),
    "beard": (-0.35, 0.55),
    "mark_u": (0.0, 0.25),
    "mark_v": (0.15, 0.25),
    "mark": (-0.6, 0.8),
    "glasses": (-0.9, 1.0),
}
TRAIT_COUNT = len(_TRAITS)

_NUISANCES = [
    # one uniform number in (0, 1) each; `_place_nuisance` says what becomes of it
    *("severity", "yaw", "pitch", "roll", "shift_u", "shift_v", "scale"),
    *("smile", "mouth_open", "lid", "brow_raise", "tan", "lip", "hair"),
    *("light_angle", "light", "exposure", "contrast", "warm", "green"),
    *("back_r", "back_g", "back_b", "back_slope", "back_dr", "back_dg", "back_db"),
    *("cloth_r", "cloth_g", "cloth_b"),
    *("occlusion", "occlusion_u", "occlusion_v", "occlusion_size", "occlusion_tilt"),
    *("occlusion_r", "occlusion_g", "occlusion_b", "glasses"),
    *("blur", "resolution", "noise"),
]

_FULL_STRENGTH = 0.4
"""What `nuisance=1` means: tuned so that a committee can do what one model cannot."""

_FAMILIES = 128
"""How many families people come from: about six people of a family in a set of 800."""

_ZOOM, _RISE = np.float32(1.18), np.float32(0.08)
"""How tightly the head fills the image, and how far above its centre the eyes lie."""

_SKIN = np.array([[0.97, 0.83, 0.73], [0.85, 0.65, 0.50], [0.62, 0.43, 0.31], [0.36, 0.24, 0.18]])
_HAIR = np.array([[0.07, 0.06, 0.06], [0.27, 0.17, 0.11], [0.52, 0.36, 0.22], [0.84, 0.72, 0.50]])


@dataclass(frozen=True)
class SyntheticFaces:
    """A seeded set of drawn faces: who is on each image, its split, and its pixels on demand.

    Parameters
    ----------
    seed : same settings and seed, same set on every machine (pixels to rounding).
    size_px : side of the square images, >= 16.
    labelled_identities, unlabelled_identities, evaluation_identities : people of each split.
    images_min, images_max : images of a person; counts have a long tail between them.
    one_image_share : share of the unlabelled people who have a single image.
    evaluation_images : images of each evaluation person.
    nuisance : strength of everything that is not identity; 0 none, 1 as tuned.
    resemblance : in [0, 1); how much people of one family (a random few) look alike.

    Raises
    ------
    ConfigError : a setting is outside its range.
    """

    seed: int = 0
    size_px: int = 48
    labelled_identities: int = 120
    unlabelled_identities: int = 360
    evaluation_identities: int = 150
    images_min: int = 6
    images_max: int = 40
    one_image_share: float = 0.15
    evaluation_images: int = 8
    nuisance: float = 1.0
    resemblance: float = 0.5

    def __post_init__(self) -> None:
        at_least = {
            "size_px": 16,
            "labelled_identities": 0,
            "unlabelled_identities": 0,
            "evaluation_identities": 0,
            "images_min": 1,
            "images_max": self.images_min,
            "evaluation_images": 1,
            "nuisance": 0,
            "one_image_share": 0,
            "resemblance": 0,
            "seed": 0,
        }
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ConfigError(
                    f"expected {name} >= {low}, got {getattr(self, name)!r} for synthetic faces"
                )
        for name, high in (("one_image_share", 1.0), ("resemblance", 0.99)):
            if getattr(self, name) > high:
                raise ConfigError(
                    f"expected {name} <= {high}, got {getattr(self, name)!r} for synthetic faces"
                )

    def __len__(self) -> int:
        return len(self.identity)

    @cached_property
    def _image_count(self) -> np.ndarray:
        """(people,) int64, the images of each person."""
        people = self.labelled_identities + self.unlabelled_identities + self.evaluation_identities
        uniform = _uniform(self.seed, np.arange(people), -1, 2)
        # A power law between the limits: density ~ count^-2.
        low, high = float(self.images_min), float(self.images_max) + 1.0
        count = (1.0 / (1.0 / low - uniform[:, 0] * (1.0 / low - 1.0 / high))).astype(np.int64)
        count = np.clip(count, self.images_min, self.images_max)
        unlabelled = self.person_split == "unlabelled"
        count[unlabelled & (uniform[:, 1] < self.one_image_share)] = 1
        count[self.person_split == "evaluation"] = self.evaluation_images
        return count

    @cached_property
    def person_split(self) -> np.ndarray:
        """(people,) str, the split of each identity."""
        return np.repeat(
            SPLITS,
            [self.labelled_identities, self.unlabelled_identities, self.evaluation_identities],
        )

    @cached_property
    def identity(self) -> np.ndarray:
        """(n,) int64, the person on each image, ascending from 0."""
        return np.repeat(np.arange(len(self._image_count)), self._image_count)

    @cached_property
    def index(self) -> np.ndarray:
        """(n,) int64, the number of each image within its person, from 0."""
        first = np.cumsum(self._image_count) - self._image_count
        return np.arange(len(self.identity)) - first[self.identity]

    @cached_property
    def split(self) -> np.ndarray:
        """(n,) str, one of `SPLITS` for each image."""
        return self.person_split[self.identity]

    def name(self, row: int) -> str:
        """A path-like name of an image, `id_0012/0003.png`: unique, sorted as the rows are."""
        return f"id_{self.identity[row]:06d}/{self.index[row]:04d}.png"

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Draw images.

        rows : (m,) integer rows, in any order, repeats allowed.
        Returns (m, s, s, 3) uint8 RGB. Raises DataError for a row outside the set.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise DataError(
                f"expected rows in 0 .. {len(self) - 1}, got {rows.min()} to {rows.max()}"
            )
        image = np.empty((len(rows), self.size_px, self.size_px, 3), np.uint8)
        for low in range(0, len(rows), _CHUNK):
            part = rows[low : low + _CHUNK]
            image[low : low + _CHUNK] = draw_faces(
                self.traits(self.identity[part]),
                _uniform(self.seed, self.identity[part], self.index[part], len(_NUISANCES)),
                size_px=self.size_px,
                nuisance=self.nuisance,
            )
        return image

    def traits(self, identity: np.ndarray) -> np.ndarray:
        """The trait vectors of people.

        identity : (m,) integer. Returns (m, TRAIT_COUNT) float64, standard normal, within 2.2.
        Every person belongs to a family, drawn among a fixed number of them, and shares a part
        of their vector with it: look-alikes, across the splits as well.
        """
        own = ndtri(_uniform(self.seed, identity, -2, TRAIT_COUNT + 2))
        family = (_uniform(self.seed, identity, -3, 1)[:, 0] * _FAMILIES).astype(np.int64)
        shared = ndtri(_uniform(self.seed, family, -4, TRAIT_COUNT + 2))
        mixed = np.sqrt(1.0 - self.resemblance) * own + np.sqrt(self.resemblance) * shared
        return np.clip(mixed[:, :TRAIT_COUNT], -2.2, 2.2)


def _uniform(seed: int, identity: np.ndarray, index: np.ndarray | int, count: int) -> np.ndarray:
    """(m, count) float64 in (0, 1), a pure function of (seed, identity, index, column).

    SplitMix64 (Steele et al. 2014) over a chained key.
    """
    key = _mix(np.uint64(seed % 2**64) + np.zeros(len(identity), np.uint64))
    key = _mix(key ^ np.asarray(identity, np.int64).astype(np.uint64))
    key = _mix(key ^ (np.asarray(index, np.int64).astype(np.uint64)))
    word = _mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64))
    return ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(word: np.ndarray) -> np.ndarray:
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


# --- drawing ------------------------------------------------------------------------------


Length = np.ndarray | np.floating


class _Columns:
    """Named columns of a table as (b, 1, 1) float32 arrays, ready to meet pixel planes."""

    def __init__(self, column: dict[str, np.ndarray]) -> None:
        self._column = column

    def __getattr__(self, name: str) -> np.ndarray:
        return self._column[name]

    def take(self, rows: slice | np.ndarray) -> _Columns:
        return _Columns({name: column[rows] for name, column in self._column.items()})


def _make_columns(names: list[str], value: np.ndarray) -> _Columns:
    planes = np.ascontiguousarray(value.T, dtype=np.float32)[:, :, None, None]
    return _Columns(dict(zip(names, planes, strict=True)))


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
    chance : (b, len(_NUISANCES)) float in (0, 1).
    Returns (b, s, s, 3) uint8 RGB; each image depends on its own row alone.
    """
    every_t = _make_columns(list(_TRAITS), _scale_traits(traits))
    every_n = _place_nuisance(chance, np.asarray(traits)[:, _trait("glasses")], nuisance)
    band = _Bands(size_px, nuisance)
    image = np.empty((len(traits), size_px, size_px, 3), np.uint8)
    for low in range(0, len(traits), _BLOCK):
        part = slice(low, low + _BLOCK)
        grain = np.ascontiguousarray(chance[part, -1]).view(np.uint64)
        image[part] = _draw_block(every_t.take(part), every_n.take(part), grain, band)
    return image


def _draw_block(t: _Columns, n: _Columns, grain: np.ndarray, band: _Bands) -> np.ndarray:
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


def _trait(name: str) -> int:
    return list(_TRAITS).index(name)


def _scale_traits(traits: np.ndarray) -> np.ndarray:
    mean, spread = np.array(list(_TRAITS.values())).T
    return mean + spread * np.asarray(traits, np.float64)


def _place_nuisance(chance: np.ndarray, glasses: np.ndarray, nuisance: float) -> _Columns:
    """Turn uniform numbers into the named quantities of one image each.

    `severity` makes some images of a person easy and some hard. `nuisance` multiplies every
    departure from the neutral picture, and the probability of every event.
    """
    raw = dict(zip(_NUISANCES, np.asarray(chance, np.float64).T, strict=True))
    nuisance = _FULL_STRENGTH * nuisance
    amount = nuisance * (0.35 + 0.95 * raw["severity"])

    def around(name: str, spread: float, centre: float = 0.0) -> np.ndarray:
        """Uniform around a centre, `spread` to each side at full strength."""
        return centre + spread * amount * (2.0 * raw[name] - 1.0)

    def above(name: str, most: float) -> np.ndarray:
        """From 0 upward, small values likelier."""
        return most * amount * raw[name] ** 2

    def happens(name: str, probability: np.ndarray | float) -> np.ndarray:
        return (raw[name] < np.minimum(1.0, nuisance * np.asarray(probability))).astype(np.float64)

    side = np.where(raw["yaw"] < 0.5, -1.0, 1.0)
    value = {
        "yaw": side * 0.34 * amount * np.abs(2.0 * raw["yaw"] - 1.0),
        "pitch": around("pitch", 0.13),
        "roll": around("roll", 0.16),
        "shift_u": around("shift_u", 0.07),
        "shift_v": around("shift_v", 0.07),
        "scale": np.exp(around("scale", 0.09)),
        "smile": around("smile", 0.5),
        "mouth_open": above("mouth_open", 0.10),
        "lid": np.minimum(0.85, above("lid", 0.6)),
        "brow_raise": around("brow_raise", 0.04),
        "light_u": amount * 0.45 * raw["light"] * np.cos(2 * np.pi * raw["light_angle"]),
        "light_v": amount * 0.30 * raw["light"] * np.sin(2 * np.pi * raw["light_angle"]),
        "exposure": np.exp(around("exposure", 0.32)),
        "contrast": np.exp(around("contrast", 0.28)),
        "warm": around("warm", 0.09),
        "green": around("green", 0.04),
        "tan": around("tan", 0.10),
        "lip": around("lip", 0.10),
        "hair": around("hair", 0.05),
        "back_slope": around("back_slope", 1.0),
        "sunglasses": happens("occlusion", 0.05),
        "mask": happens("occlusion", 0.09) - happens("occlusion", 0.05),
        "patch": happens("occlusion", 0.22) - happens("occlusion", 0.09),
        "patch_u": around("occlusion_u", 0.7),
        "patch_v": around("occlusion_v", 0.6, 0.15),
        "patch_size": 0.16 + 0.16 * raw["occlusion_size"],
        "patch_tilt": np.pi * raw["occlusion_tilt"],
        # People who own glasses wear them often, the others seldom.
        "glasses": happens("glasses", np.where(glasses > 0.9, 0.8, 0.04)),
        "blur_px": above("blur", 1.1),
        "shrink": 1.0 + above("resolution", 2.2),
        "noise": above("noise", 0.04),
    }
    for name in ("back", "cloth", "occlusion"):
        grey = around(f"{name}_g", 0.36, 0.48)
        for channel, spread in (("r", 0.16), ("g", 0.0), ("b", 0.16)):
            value[f"{name}_{channel}"] = np.clip(grey + around(f"{name}_{channel}", spread), 0, 1)
    grey = around("back_dg", 0.25)
    for channel, spread in (("r", 0.1), ("g", 0.0), ("b", 0.1)):
        value[f"back_d{channel}"] = grey + around(f"back_d{channel}", spread)
    return _make_columns(list(value), np.stack(list(value.values()), axis=1))


class _Bands:
    """The pixel rows where a feature can be, whatever the pose: the rest need not be computed."""

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

    def __init__(self, t: _Columns, n: _Columns) -> None:
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


def _triple(n: _Columns, name: str) -> np.ndarray:
    return np.concatenate([getattr(n, f"{name}_{channel}")[:, 0] for channel in "rgb"], axis=1)


def _head_field(t: _Columns, U: np.ndarray, V: np.ndarray) -> np.ndarray:
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
    t: _Columns,
    n: _Columns,
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
    t: _Columns,
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
    t: _Columns,
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
    t: _Columns,
    n: _Columns,
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
    t: _Columns,
    n: _Columns,
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
    t: _Columns,
    n: _Columns,
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
    t: _Columns,
    n: _Columns,
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
    canvas: _Canvas, t: _Columns, colour: _Colours, u: np.ndarray, v: np.ndarray
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
    t: _Columns,
    n: _Columns,
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


def _light(canvas: _Canvas, n: _Columns, head_u: np.ndarray, head_v: np.ndarray) -> None:
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
    t: _Columns,
    n: _Columns,
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


def _photograph(canvas: _Canvas, n: _Columns, grain: np.ndarray) -> np.ndarray:
    """Blur, lose resolution, add noise, and round to uint8 (b, s, s, 3)."""
    _, images, size_px, _ = canvas.plane.shape
    soft = _soften(n.blur_px, n.shrink, size_px)
    plane = soft @ canvas.plane @ soft.transpose(0, 2, 1)
    word = _mix(
        grain[:, None] + np.arange(1, (3 * size_px * size_px + 1) // 2 + 1, dtype=np.uint64)
    )
    half = word.view(np.uint16).reshape(images, -1, 2)[:, : 3 * size_px * size_px]
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


def draw_contact_sheet(
    faces: SyntheticFaces, *, people: int = 8, columns: int = 10, split: str = "labelled"
) -> np.ndarray:
    """A picture of some people: one row a person, one column an image (gaps stay white).

    Returns (people * s, columns * s, 3) uint8. The people are the first of the split that have
    the most images up to `columns`.
    """
    size = faces.size_px
    member = np.flatnonzero(faces.person_split == split)
    order = member[np.argsort(-np.minimum(faces._image_count[member], columns), kind="stable")]
    sheet = np.full((people * size, columns * size, 3), 255, np.uint8)
    for place, person in enumerate(order[:people]):
        rows = np.flatnonzero(faces.identity == person)[:columns]
        strip = faces.draw(rows).transpose(1, 0, 2, 3).reshape(size, len(rows) * size, 3)
        sheet[place * size : (place + 1) * size, : strip.shape[1]] = strip
    return sheet
