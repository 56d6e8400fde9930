"""Traits of an identity and nuisances of an image: the named quantities a face is drawn from.

The contract:
- Traits are standard normal numbers, scaled by the means and deviations of `TRAITS`.
- Nuisances are uniform numbers in (0, 1), turned into quantities by `place_nuisance`; at strength 0
  every quantity is neutral.
- Every random number is a hash of (seed, identity, index, column): no state, no order of draws.
"""

from __future__ import annotations

import numpy as np

TRAITS: dict[str, tuple[float, float]] = {
    # name: (mean, standard deviation over identities); lengths in half image sides
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
    # one uniform number in (0, 1) each; `place_nuisance` turns it into a quantity
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
"""Strength at `nuisance=1`: pairs that one model cannot decide and a committee can."""

FAMILIES = 128
"""Number of families of look-alikes: about six identities of each in a set of 800."""


def draw_uniform(
    seed: int, identity: np.ndarray, index: np.ndarray | int, count: int
) -> np.ndarray:
    """(m, count) float64 in (0, 1), a pure function of (seed, identity, index, column).

    SplitMix64 (Steele et al. 2014) over a chained key.
    """
    key = mix_bits(np.uint64(seed % 2**64) + np.zeros(len(identity), np.uint64))
    key = mix_bits(key ^ np.asarray(identity, np.int64).astype(np.uint64))
    key = mix_bits(key ^ (np.asarray(index, np.int64).astype(np.uint64)))
    bits = mix_bits(key[:, None] + np.arange(1, count + 1, dtype=np.uint64))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def mix_bits(bits: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 on uint64 numbers."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Columns:
    """Named columns of a table as (b, 1, 1) float32 arrays, which broadcast over pixel planes."""

    def __init__(self, column: dict[str, np.ndarray]) -> None:
        self._column = column

    def __getattr__(self, name: str) -> np.ndarray:
        return self._column[name]

    def take(self, rows: slice | np.ndarray) -> Columns:
        return Columns({name: column[rows] for name, column in self._column.items()})


def make_columns(names: list[str], value: np.ndarray) -> Columns:
    """Columns of a (b, len(names)) table."""
    planes = np.ascontiguousarray(value.T, dtype=np.float32)[:, :, None, None]
    return Columns(dict(zip(names, planes, strict=True)))


def pick_trait(name: str) -> int:
    """The column of a trait."""
    return list(TRAITS).index(name)


def scale_traits(traits: np.ndarray) -> np.ndarray:
    """(b, TRAIT_COUNT) standard normal traits in their own units."""
    mean, spread = np.array(list(TRAITS.values())).T
    return mean + spread * np.asarray(traits, np.float64)


def place_nuisance(chance: np.ndarray, glasses: np.ndarray, nuisance: float) -> Columns:
    """Turn uniform numbers into the named quantities of each image.

    chance : (b, len(NUISANCES)) float in (0, 1). glasses : (b,) the identity's glasses trait.
    nuisance : multiplies every departure from the neutral picture, and the probability of every
        event. `severity` makes some images of an identity easy and some hard.
    """
    raw = dict(zip(NUISANCES, np.asarray(chance, np.float64).T, strict=True))
    nuisance = FULL_STRENGTH * nuisance
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
        # Identities with glasses wear them on most images, the others on few.
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
    return make_columns(list(value), np.stack(list(value.values()), axis=1))
