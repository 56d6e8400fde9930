"""What a synthetic face is made of: traits of an identity, nuisances of an image."""

from __future__ import annotations

import numpy as np

TRAITS: dict[str, tuple[float, float]] = {
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
TRAIT_COUNT = len(TRAITS)

NUISANCES = [
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

FULL_STRENGTH = 0.4
"""What `nuisance=1` means: tuned so that a committee can do what one model cannot."""

FAMILIES = 128
"""How many families people come from: about six people of a family in a set of 800."""


def draw_uniform(
    seed: int, identity: np.ndarray, index: np.ndarray | int, count: int
) -> np.ndarray:
    """(m, count) float64 in (0, 1), a pure function of (seed, identity, index, column).

    SplitMix64 (Steele et al. 2014) over a chained key.
    """
    key = mix_bits(np.uint64(seed % 2**64) + np.zeros(len(identity), np.uint64))
    key = mix_bits(key ^ np.asarray(identity, np.int64).astype(np.uint64))
    key = mix_bits(key ^ (np.asarray(index, np.int64).astype(np.uint64)))
    word = mix_bits(key[:, None] + np.arange(1, count + 1, dtype=np.uint64))
    return ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def mix_bits(word: np.ndarray) -> np.ndarray:
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


# --- drawing ------------------------------------------------------------------------------


Length = np.ndarray | np.floating


class Columns:
    """Named columns of a table as (b, 1, 1) float32 arrays, ready to meet pixel planes."""

    def __init__(self, column: dict[str, np.ndarray]) -> None:
        self._column = column

    def __getattr__(self, name: str) -> np.ndarray:
        return self._column[name]

    def take(self, rows: slice | np.ndarray) -> Columns:
        return Columns({name: column[rows] for name, column in self._column.items()})


def make_columns(names: list[str], value: np.ndarray) -> Columns:
    planes = np.ascontiguousarray(value.T, dtype=np.float32)[:, :, None, None]
    return Columns(dict(zip(names, planes, strict=True)))


def pick_trait(name: str) -> int:
    return list(TRAITS).index(name)


def scale_traits(traits: np.ndarray) -> np.ndarray:
    mean, spread = np.array(list(TRAITS.values())).T
    return mean + spread * np.asarray(traits, np.float64)
