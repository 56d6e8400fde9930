"""Degradation of sharp faces to those of a distant camera: small, blurred, noisy, covered.

The contract:
- Input is uint8 (b, s, s, 3), output float32 (b, 3, size_px, size_px) in [-1, 1], as a backbone
  reads it, on the device of the images.
- A sample's result depends on its own pixels and its own seed alone, never on the batch around it:
  each random number is a hash (SplitMix64) of the seed and a counter. No generator, no state.
- Everything is linear algebra over the batch. Jitter, blur, down-sampling and up-sampling are
  separable, hence two small matrices a sample, whatever the kernels.
- Lengths of the face (blur, jitter, patches) are shares of its side, so that a preset means the
  same at any input size; `low_res_px` is in pixels because a camera's resolution is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError, DataError

Range = tuple[float, float]


@dataclass(frozen=True)
class Degradation:
    """The kinds of damage to a face: the probability of each (`_rate`) and a range of strength.

    The defaults leave a face as it is. Every strength is uniform on its range.
    """

    jitter_rate: float = 0.0
    """Inexact alignment: zoom and shift of the frame."""
    jitter_zoom: Range = (0.9, 1.1)
    """Side of the frame as a share of the face's side."""
    jitter_shift: float = 0.04
    """Largest shift of the frame, as a share of the side, either way on both axes."""
    crop_rate: float = 0.0
    """Keep a rectangle in its place and black out the rest (AdaFace's recipe)."""
    crop_area: Range = (0.2, 1.0)
    """Area of the rectangle as a share of the face; its aspect ratio is 3/4 to 4/3."""
    mask_rate: float = 0.0
    """A surgical mask over the lower face of the five-point template."""
    sunglasses_rate: float = 0.0
    """Dark glasses over its eyes."""
    patch_rate: float = 0.0
    """A rectangle of one colour anywhere."""
    patch_side: Range = (0.2, 0.5)
    """Its sides, as shares of the face's."""
    blur_rate: float = 0.0
    """Gaussian blur, before the low resolution."""
    blur_sigma: Range = (0.01, 0.05)
    """Standard deviation as a share of the side."""
    motion_rate: float = 0.0
    """Motion blur, along a straight line in any direction."""
    motion_length: Range = (0.05, 0.15)
    """Length of the line, as a share of the side."""
    low_res_rate: float = 0.0
    """Down to a smaller grid and up again, each with a kernel drawn at random."""
    low_res_px: Range | None = None
    """Side of that grid in pixels; used when given, and never above the input's side."""
    low_res_ratio: Range = (0.2, 1.0)
    """Side of that grid as a share of the input's side, used otherwise."""
    noise_rate: float = 0.0
    """Sensor noise on the small grid: a constant part, and one that grows with the light."""
    noise_sigma: Range = (0.01, 0.06)
    """Standard deviation of each part at full light, as a share of full scale."""
    jpeg_rate: float = 0.0
    """JPEG's block transform and rounding (4:4:4) on the small grid."""
    jpeg_quality: Range = (30.0, 90.0)
    """Quality as libjpeg defines it, 1..100."""
    photometric_rate: float = 0.0
    """Brightness, contrast and saturation, each with this probability."""
    photometric_together: bool = False
    """One coin decides for all three."""
    brightness: Range = (0.5, 1.5)
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    """Factors, as torchvision's ColorJitter defines them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_rate"):
                if not 0 <= value <= 1:
                    raise ConfigError(f"degradation {field.name}: 0..1 expected, got {value}")
            elif isinstance(value, tuple | list) and (
                len(value) != 2 or not 0 <= value[0] <= value[1]
            ):
                raise ConfigError(
                    f"degradation {field.name}: (low, high) with 0 <= low <= high expected, "
                    f"got {value}"
                )
        if self.mask_rate + self.sunglasses_rate + self.patch_rate > 1:
            raise ConfigError("degradation: the three occlusion rates must not exceed 1 together")


DEGRADATIONS: Mapping[str, Degradation] = {
    "none": Degradation(),
    "lowres": Degradation(low_res_rate=0.5, low_res_ratio=(0.4, 1.0)),
    "adaface": Degradation(
        crop_rate=0.2,
        low_res_rate=0.2,
        low_res_ratio=(0.2, 1.0),
        photometric_rate=0.2,
        photometric_together=True,
    ),
    "masked": Degradation(mask_rate=1.0),
    "surveillance": Degradation(
        jitter_rate=0.5,
        mask_rate=0.06,
        sunglasses_rate=0.06,
        patch_rate=0.1,
        blur_rate=0.3,
        motion_rate=0.2,
        low_res_rate=0.6,
        low_res_px=(8, 24),
        noise_rate=0.4,
        jpeg_rate=0.4,
        photometric_rate=0.4,
        brightness=(0.4, 1.4),
    ),
}
"""Presets. `adaface`: the published recipe (Kim et al. 2022, section 4: crop, low resolution and
photometric, .2 each; one coin for the three changes of colour, and a crop box that does not fit is
drawn again). It differs from the published code in the reductions: there each of the two resizings
takes one of five filters of OpenCV (nearest, linear, cubic, area, Lanczos), here area, triangle,
cubic or an aliased triangle down, and nearest, triangle or cubic up. Nor is the order of the colour
changes drawn: brightness, contrast, saturation. `masked`: all wear a surgical mask.
`surveillance`: ours, for probes of the kind of SurvFace and TinyFace."""


def get_degradation(name: str) -> Degradation:
    """A preset by name; `ConfigError` lists the names when there is none such."""
    if name not in DEGRADATIONS:
        raise ConfigError(f"unknown degradation {name!r}; choose one of: {', '.join(DEGRADATIONS)}")
    return DEGRADATIONS[name]


_DRAWS = (
    *("jitter", "zoom", "shift_x", "shift_y"),
    *("crop", "crop_area", "crop_aspect", "crop_x", "crop_y"),
    *("occlusion", "cover_a", "cover_b", "cover_c", "cover_x", "cover_y"),
    *("grey", "red", "green", "blue"),
    *("blur", "blur_sigma", "motion", "motion_length", "motion_angle"),
    *("low_res", "low_res_side", "down_kernel", "up_kernel"),
    *("noise", "noise_fixed", "noise_shot", "jpeg", "jpeg_quality"),
    *("bright", "brightness", "contrasted", "contrast", "saturated", "saturation"),
)
# The counter of a draw is its place above; the noise of pixels starts beyond all of them.
_FIRST_PIXEL_COUNTER = 1 << 20
_GOLDEN = -7046029254386353131  # SplitMix64's increment 0x9E3779B97F4A7C15, as a signed number
_EXPOSURES = 5
_CROP = 1 << 12
"""Stream of the crops that are drawn again, by the number of the attempt."""
_CROP_ATTEMPTS = 10


def _mix(seeds: Tensor, counters: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014): state seed + counter * golden, to 64 mixed bits.

    int64 in torch wraps around like the unsigned numbers of the original; its right shift keeps
    the sign, hence the masks.
    """
    z = seeds + (counters + 1) * _GOLDEN
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def draw_uniform(seeds: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """(b,) int64 seeds to (b, count) float32 in [0, 1): a hash, the same wherever it is computed.

    stream : int
        Numbers of another stream are independent; 0 is that of the degradation.
    """
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device) + (stream << 40)
    return ((_mix(seeds[:, None], counters) >> 40) & 0xFFFFFF).float() * (1.0 / (1 << 24))


def _normal(seeds: Tensor, count: int) -> Tensor:
    """(b,) seeds to (b, count) float32, mean 0 and variance 1: four 16-bit uniforms, added."""
    counters = torch.arange(count, dtype=torch.int64, device=seeds.device) + _FIRST_PIXEL_COUNTER
    bits = _mix(seeds[:, None], counters)
    total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF)
    total += (bits >> 48) & 0xFFFF
    return (total.float() - 2 * 65535) * (math.sqrt(3) / 65536)


def _between(draw: Tensor, bounds: Range) -> Tensor:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def degrade(
    images: Tensor | np.ndarray, seeds: Tensor | np.ndarray, degradation: Degradation, size_px: int
) -> Tensor:
    """Degrade a batch of faces.

    Parameters
    ----------
    images : (b, s, s, 3) uint8, RGB
        Aligned faces of any one size.
    seeds : (b,) int64
        One a sample, on the device of `images`; equal pixels with equal seeds give equal results.
    degradation : Degradation
    size_px : int
        Side of the result, in pixels.

    Returns
    -------
    degraded : (b, 3, size_px, size_px) float32 in [-1, 1]
        In channels-last memory. Between batches of different sizes a sample's result may differ in
        the last bits (matrix kernels), never more.

    Raises
    ------
    DataError
        Images of another shape or dtype.

    Notes
    -----
    Order: reduction to twice `size_px` where the face is larger; occlusion and crop; jitter, blur
    and motion in the optics; the small grid with its noise and JPEG; back up; brightness, contrast,
    saturation. Ours, after the degradation models of blind super-resolution (Wang et al. 2021,
    Real-ESRGAN), in one pass.
    """
    pixels = torch.as_tensor(images)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8:
        raise DataError(
            f"images (b, s, s, 3) uint8 expected, got {tuple(pixels.shape)} {pixels.dtype}"
        )
    if pixels.shape[1] != pixels.shape[2]:
        raise DataError(f"square images expected, got {pixels.shape[1]} x {pixels.shape[2]} px")
    key = torch.as_tensor(seeds).to(pixels.device)
    if key.shape != pixels.shape[:1] or key.dtype != torch.int64:
        raise DataError(
            f"one int64 seed an image expected, got {tuple(key.shape)} {key.dtype} for "
            f"{len(pixels)} images"
        )
    with torch.no_grad():
        return _degrade(pixels, key, degradation, size_px)


def _degrade(pixels: Tensor, seeds: Tensor, degradation: Degradation, size_px: int) -> Tensor:
    if degradation == DEGRADATIONS["none"]:
        return _finish(_resize(pixels, size_px) * (1 / 255))
    # Twice the result's side holds all that can be seen in it; more would only take time.
    faces = _resize(pixels, min(pixels.shape[1], 2 * size_px)) * (1 / 255)
    draw = _draw(seeds)
    _cover(faces, draw, degradation)
    _crop(faces, seeds, draw, degradation)
    small, side = _photograph(faces, draw, degradation, size_px)
    _add_noise(small, seeds, draw, degradation)
    _compress(small, draw, degradation)
    if degradation.low_res_rate > 0:
        up = _up_matrix(side, draw["up_kernel"], size_px)
        small = _apply(up, small, up)
    small.clamp_(0, 1)
    _relight(small, draw, degradation)
    return _finish(small)


VARIATIONS = ("small", "covered", "noisy")
"""What `find_variations` finds."""


def find_variations(seeds: Tensor, degradation: Degradation, size_px: int) -> Tensor:
    """Which images `degrade` makes small, covered or noisy: (b,) int64 seeds to (b, 3) bool."""
    draw = _draw(seeds)
    small = draw["low_res"] < degradation.low_res_rate
    small &= _draw_side(draw, degradation, size_px) < size_px
    rate = degradation.mask_rate + degradation.sunglasses_rate + degradation.patch_rate
    covered = (draw["occlusion"] < rate) | (draw["crop"] < degradation.crop_rate)
    return torch.stack([small, covered, draw["noise"] < degradation.noise_rate], 1)


def _draw(seeds: Tensor) -> dict[str, Tensor]:
    """Name of a draw -> (b,) float32 in [0, 1)."""
    return dict(zip(_DRAWS, draw_uniform(seeds, len(_DRAWS)).unbind(1), strict=True))


def _draw_side(draw: dict[str, Tensor], degradation: Degradation, size_px: int) -> Tensor:
    """The side of the small grid in pixels, (b,) float32 without fraction."""
    if degradation.low_res_px is not None:
        return _between(draw["low_res_side"], degradation.low_res_px).round()
    return (_between(draw["low_res_side"], degradation.low_res_ratio) * size_px).round()


def _finish(faces: Tensor) -> Tensor:
    return faces.mul(2).sub_(1).contiguous(memory_format=torch.channels_last)


def _chosen(draw: Tensor, rate: float) -> Tensor:
    """Rows to which something happens, (m,) int64."""
    return torch.nonzero(draw < rate).squeeze(1)


def _apply(rows: Tensor, faces: Tensor, columns: Tensor) -> Tensor:
    """rows (b, p, s) @ faces (b, 3, s, s) @ columns^T (b, s, p), a sample at a time."""
    count, _, height, width = faces.shape
    wide = torch.bmm(faces.reshape(count, 3 * height, width), columns.transpose(1, 2))
    wide = wide.reshape(count, 3, height, columns.shape[1])
    return torch.matmul(rows[:, None], wide)


def _grid(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres as shares of the side: y (1, s, 1) and x (1, 1, s)."""
    side = faces.shape[-1]
    centres = (torch.arange(side, device=faces.device, dtype=torch.float32) + 0.5) / side
    return centres[None, :, None], centres[None, None, :]


def _cover(faces: Tensor, draw: dict[str, Tensor], degradation: Degradation) -> None:
    """Masks, sunglasses and patches, in place; the places are those of the five-point template."""
    bound_a = degradation.mask_rate
    bound_b = bound_a + degradation.sunglasses_rate
    bound_c = bound_b + degradation.patch_rate
    if bound_c == 0:
        return
    chosen = _chosen(draw["occlusion"], bound_c)
    part = {name: value[chosen, None, None] for name, value in draw.items()}
    y, x = _grid(faces)
    across = (x - 0.5 - 0.06 * (part["cover_x"] - 0.5)).abs()
    edge = 0.54 + 0.12 * part["cover_a"] + (0.1 + 0.5 * part["cover_b"]) * across**2
    mask = (y > edge) & (across < 0.36 + 0.1 * part["cover_c"])
    eye = (across - 0.155) / (0.11 + 0.06 * part["cover_a"])
    lens = (y - 0.44 - 0.06 * part["cover_y"]) / (0.08 + 0.05 * part["cover_b"])
    glasses = (eye**2 + lens**2 < 1) | ((lens.abs() < 0.25) & (across < 0.42))
    side_x = _between(part["cover_a"], degradation.patch_side) / 2
    side_y = _between(part["cover_b"], degradation.patch_side) / 2
    patch = ((x - part["cover_x"]).abs() < side_x) & ((y - part["cover_y"]).abs() < side_y)
    kind = part["occlusion"]
    covered = torch.where(kind < bound_a, mask, torch.where(kind < bound_b, glasses, patch))
    tint = torch.stack([draw[c][chosen] for c in ("red", "green", "blue")], 1) - 0.5
    grey = draw["grey"][chosen, None]
    is_glasses = ((kind >= bound_a) & (kind < bound_b))[:, :, 0]
    colour = torch.where(is_glasses, 0.2 * grey, (grey + 0.3 * tint).clamp(0, 1))
    faces[chosen] = torch.where(covered[:, None], colour[:, :, None, None], faces[chosen])


def _crop(faces: Tensor, seeds: Tensor, draw: dict[str, Tensor], degradation: Degradation) -> None:
    """Black out all but a rectangle, in place; one that does not fit is drawn again."""
    if degradation.crop_rate == 0:
        return
    chosen = _chosen(draw["crop"], degradation.crop_rate)
    part = {name: value[chosen, None, None] for name, value in draw.items()}
    height, width = _size_box(part["crop_area"], part["crop_aspect"], degradation)
    for attempt in range(1, _CROP_ATTEMPTS):
        outside = torch.maximum(height, width) > 1
        again = draw_uniform(seeds[chosen], 2, stream=_CROP + attempt)[:, :, None, None]
        other = _size_box(again[:, 0], again[:, 1], degradation)
        height = torch.where(outside, other[0], height)
        width = torch.where(outside, other[1], width)
    height, width = height.clamp(max=1), width.clamp(max=1)
    y, x = _grid(faces)
    top, left = part["crop_y"] * (1 - height), part["crop_x"] * (1 - width)
    kept = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    faces[chosen] = faces[chosen] * kept[:, None]


def _size_box(area: Tensor, aspect: Tensor, degradation: Degradation) -> tuple[Tensor, Tensor]:
    """Height and width of a crop, as shares of the side, from two uniform draws."""
    side = _between(area, degradation.crop_area).sqrt()
    stretch = torch.exp((aspect * 2 - 1) * math.log(4 / 3) / 2)
    return side / stretch, side * stretch


def _photograph(
    faces: Tensor, draw: dict[str, Tensor], degradation: Degradation, size_px: int
) -> tuple[Tensor, Tensor]:
    """Jitter, blur and the small grid.

    Returns the picture on a canvas of `size_px`, of which the top left `side` x `side` (per sample,
    (b,) float) is the small grid and the rest repeats its last row and column.
    """
    source_px = faces.shape[-1]
    one = torch.ones_like(draw["jitter"])
    side = one * size_px
    if degradation.low_res_rate > 0:
        low = _draw_side(draw, degradation, size_px).clamp(2, size_px)
        side = torch.where(draw["low_res"] < degradation.low_res_rate, low, side)
    jittered = draw["jitter"] < degradation.jitter_rate
    zoom = torch.where(jittered, _between(draw["zoom"], degradation.jitter_zoom), one)
    shift_x = jittered * (draw["shift_x"] * 2 - 1) * degradation.jitter_shift
    shift_y = jittered * (draw["shift_y"] * 2 - 1) * degradation.jitter_shift
    if degradation.blur_rate > 0:
        blurred = _chosen(draw["blur"], degradation.blur_rate)
        sigma = _between(draw["blur_sigma"], degradation.blur_sigma)[blurred] * source_px
        blur = _blur_matrix(sigma, source_px)
        faces[blurred] = _apply(blur, faces[blurred], blur)
    if source_px == size_px and (
        degradation.low_res_rate == degradation.jitter_rate == degradation.motion_rate == 0
    ):
        return faces, side
    kernel = torch.where(side < size_px, draw["down_kernel"], 0.0)

    def expose(which: Tensor | slice, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = (
            _down_matrix(side[which], zoom[which], shift, kernel[which], size_px, source_px)
            for shift in (y, x)
        )
        return _apply(rows, faces[which], columns)

    small = expose(slice(None), shift_x, shift_y)
    if degradation.motion_rate > 0:
        moved = _chosen(draw["motion"], degradation.motion_rate)
        length = _between(draw["motion_length"], degradation.motion_length)[moved]
        angle_rad = draw["motion_angle"][moved] * math.pi
        total = torch.zeros_like(small[moved])
        for exposure in range(_EXPOSURES):
            along = (exposure / (_EXPOSURES - 1) - 0.5) * length
            total += expose(
                moved,
                shift_x[moved] + along * torch.cos(angle_rad),
                shift_y[moved] + along * torch.sin(angle_rad),
            )
        small[moved] = total / _EXPOSURES
    return small, side


def _down_matrix(
    side: Tensor, zoom: Tensor, shift: Tensor, kernel: Tensor, canvas_px: int, source_px: int
) -> Tensor:
    """Resampling from the source to the small grid, (b, canvas_px, source_px), rows sum to 1.

    kernel : (b,) in [0, 1): area below .4, triangle below .6, cubic below .8, else a triangle of
    one pixel (aliased, as cheap cameras and codecs do it).
    """
    device = side.device
    cell = torch.arange(canvas_px, device=device, dtype=torch.float32)[None, :]
    cell = torch.minimum(cell, side[:, None] - 1)
    place = ((cell + 0.5) / side[:, None] - 0.5) * zoom[:, None] + 0.5 + shift[:, None]
    centre = (place * source_px).clamp(0.5, source_px - 0.5)
    pixel = torch.arange(source_px, device=device, dtype=torch.float32) + 0.5
    away = (pixel[None, None, :] - centre[:, :, None]).abs()
    reach = (zoom * source_px / side).clamp(min=1)[:, None, None]
    choice = kernel[:, None, None]
    area = (0.5 * reach + 0.5 - away).clamp(min=0).clamp(max=1)
    near = away / torch.where(choice < 0.8, reach, torch.ones_like(reach))
    weight = torch.where(choice < 0.4, area, (1 - near).clamp(min=0))
    # An enlargement by area would be a nearest neighbour: interpolate there instead.
    weight = torch.where((choice < 0.4) & (reach <= 1), (1 - away).clamp(min=0), weight)
    weight = torch.where((choice >= 0.6) & (choice < 0.8), _cubic(near), weight)
    return weight / weight.sum(2, keepdim=True)


def _up_matrix(side: Tensor, kernel: Tensor, size_px: int) -> Tensor:
    """Interpolation from the small grid back, (b, size_px, size_px), rows sum to 1.

    kernel : (b,) in [0, 1): nearest below .2, linear below .6, cubic above.
    """
    cell = torch.arange(size_px, device=side.device, dtype=torch.float32)
    centre = (cell[None, :] + 0.5) / size_px * side[:, None] - 0.5
    centre = torch.minimum(centre.clamp(min=0), side[:, None] - 1)
    choice = kernel[:, None]
    centre = torch.where(choice < 0.2, torch.floor(centre + 0.5), centre)
    away = (cell[None, None, :] - centre[:, :, None]).abs()
    weight = torch.where(choice[:, :, None] < 0.6, (1 - away).clamp(min=0), _cubic(away))
    weight = weight * (cell[None, None, :] < side[:, None, None])
    return weight / weight.sum(2, keepdim=True)


def _cubic(away: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -0.5 (1981, eq. 15)."""
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    return torch.where(away < 1, near, torch.where(away < 2, far, torch.zeros_like(away)))


def _blur_matrix(sigma_px: Tensor, side_px: int) -> Tensor:
    """Gaussian blur along one axis, (b, side_px, side_px), rows sum to 1."""
    pixel = torch.arange(side_px, device=sigma_px.device, dtype=torch.float32)
    away = pixel[None, :] - pixel[:, None]
    weight = torch.exp(-0.5 * (away[None] / sigma_px.clamp(min=0.05)[:, None, None]) ** 2)
    return weight / weight.sum(2, keepdim=True)


def _add_noise(
    small: Tensor, seeds: Tensor, draw: dict[str, Tensor], degradation: Degradation
) -> None:
    """Noise of variance fixed^2 + shot^2 * light, in place."""
    if degradation.noise_rate == 0:
        return
    chosen = _chosen(draw["noise"], degradation.noise_rate)
    light = small[chosen].clamp(0, 1)
    noise = _normal(seeds[chosen], light[0].numel() if len(light) else 0).reshape(light.shape)
    fixed = _between(draw["noise_fixed"], degradation.noise_sigma)[chosen, None, None, None]
    shot = _between(draw["noise_shot"], degradation.noise_sigma)[chosen, None, None, None]
    small[chosen] = light + noise * (fixed**2 + shot**2 * light).sqrt()


_LUMA_TABLE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 "
    "62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 "
    "98 112 100 103 99"
)
_CHROMA_TABLE = (
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 "
    "99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 "
    "99 99"
)
_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def _compress(small: Tensor, draw: dict[str, Tensor], degradation: Degradation) -> None:
    """JPEG without its entropy coding, which loses nothing, in place (ITU T.81, annex K tables)."""
    if degradation.jpeg_rate == 0:
        return
    chosen = _chosen(draw["jpeg"], degradation.jpeg_rate)
    if len(chosen) == 0:
        return
    device = small.device
    picture = small[chosen].clamp(0, 1)
    side = picture.shape[-1]
    padding = -side % 8
    picture = functional.pad(picture, (0, padding, 0, padding), mode="replicate")
    to_ycbcr = torch.tensor(_TO_YCBCR, device=device)
    colours = torch.einsum("dc,bcyx->bdyx", to_ycbcr, (picture * 255).round()).round()
    colours[:, 0] -= 128
    index = torch.arange(8, dtype=torch.float64)
    cosine = torch.cos((2 * index[None, :] + 1) * index[:, None] * math.pi / 16) / 2
    cosine[0] /= math.sqrt(2)
    cosine = cosine.float().to(device)
    count, _, height, width = colours.shape
    blocks = colours.reshape(count, 3, height // 8, 8, width // 8, 8).transpose(3, 4)
    quality = _between(draw["jpeg_quality"], degradation.jpeg_quality)[chosen].clamp(1, 100)
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    luma = [float(v) for v in _LUMA_TABLE.split()]
    chroma = [float(v) for v in _CHROMA_TABLE.split()]
    tables = torch.tensor([luma, chroma, chroma], device=device).reshape(1, 3, 1, 1, 8, 8)
    step = ((tables * percent[:, None, None, None, None, None] + 50) / 100).floor().clamp(1, 255)
    frequencies = cosine @ blocks @ cosine.T
    blocks = cosine.T @ ((frequencies / step).round() * step) @ cosine
    colours = blocks.transpose(3, 4).reshape(count, 3, height, width).round()
    colours[:, 0] += 128
    to_rgb = torch.linalg.inv(torch.tensor(_TO_YCBCR, dtype=torch.float64)).float().to(device)
    restored = torch.einsum("dc,bcyx->bdyx", to_rgb, colours).round() / 255
    small[chosen] = restored[:, :, :side, :side].clamp(0, 1)


def _relight(faces: Tensor, draw: dict[str, Tensor], degradation: Degradation) -> None:
    """Brightness, contrast, saturation, in this order, in place."""
    rate = degradation.photometric_rate
    if rate == 0:
        return
    one = torch.ones_like(draw["bright"])

    def factor(coin: str, strength: str, bounds: Range) -> Tensor:
        thrown = draw["bright" if degradation.photometric_together else coin]
        drawn = torch.where(thrown < rate, _between(draw[strength], bounds), one)
        return drawn[:, None, None, None]

    grey_of = torch.tensor([0.299, 0.587, 0.114], device=faces.device)[None, :, None, None]
    faces.mul_(factor("bright", "brightness", degradation.brightness)).clamp_(0, 1)
    mean = (faces * grey_of).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    strength = factor("contrasted", "contrast", degradation.contrast)
    faces.sub_(mean).mul_(strength).add_(mean).clamp_(0, 1)
    grey = (faces * grey_of).sum(1, keepdim=True)
    strength = factor("saturated", "saturation", degradation.saturation)
    faces.sub_(grey).mul_(strength).add_(grey).clamp_(0, 1)


def _resize(pixels: Tensor, size_px: int) -> Tensor:
    """(b, s, s, 3) uint8 to (b, 3, size_px, size_px) float32 in 0..255: area down, linear up."""
    count, source_px = pixels.shape[:2]
    faces = pixels.float()
    if source_px != size_px:
        one = torch.ones(1, device=pixels.device)
        matrix = _down_matrix(one * size_px, one, one * 0, one * 0, size_px, source_px)[0]
        faces = matrix @ faces.reshape(count, source_px, source_px * 3)
        faces = faces.reshape(count, size_px, source_px, 3)
        return torch.matmul(faces.permute(0, 3, 1, 2), matrix.T).contiguous()
    return faces.permute(0, 3, 1, 2).contiguous()


def reduce_faces(images: np.ndarray, size_px: int, *, block: int = 1024) -> np.ndarray:
    """Reduce faces to a smaller side, each new pixel the mean of the area it covers.

    Parameters
    ----------
    images : (n, s, s, 3) uint8, s >= size_px
    size_px : int
        Side of the result, in pixels.
    block : int
        Images worked on at a time.

    Returns
    -------
    reduced : (n, size_px, size_px, 3) uint8
        Rounded to nearest. Equal to `images` when they have that side already.

    Raises
    ------
    DataError
        The faces are smaller than `size_px`: an enlargement is no reduction.
    """
    side = images.shape[1]
    if side < size_px:
        raise DataError(f"faces of {size_px} px or more expected, got {side} px: nothing to reduce")
    reduced = np.empty((len(images), size_px, size_px, 3), dtype=np.uint8)
    for start in range(0, len(images), block):
        part = torch.from_numpy(np.array(images[start : start + block]))
        small = _resize(part, size_px).round().clamp(0, 255).to(torch.uint8)
        reduced[start : start + block] = small.permute(0, 2, 3, 1).numpy()
    return reduced


def degrade_pixels(
    images: np.ndarray, seeds: np.ndarray, degradation: Degradation, size_px: int
) -> np.ndarray:
    """`degrade`, back in pixels: (n, size_px, size_px, 3) uint8, rounded to nearest."""
    degraded = degrade(torch.from_numpy(images), torch.from_numpy(seeds), degradation, size_px)
    pixels = ((degraded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
