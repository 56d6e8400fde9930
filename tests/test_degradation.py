"""degradation: oracles for each kind of damage, and a sample that never sees its batch."""

import math
from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import ConfigError, DataError
from cdp.images import degradation as module
from cdp.images.degradation import (
    DEGRADATIONS,
    Degradation,
    degrade,
    get_degradation,
    reduce_faces,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


def draw_faces(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    return np.stack([cv2.resize(c, (side, side), interpolation=cv2.INTER_CUBIC) for c in coarse])


def to_pixels(degraded: torch.Tensor) -> np.ndarray:
    """(b, 3, p, p) in [-1, 1] to (b, p, p, 3) in 0..255, float."""
    return (degraded.permute(0, 2, 3, 1).numpy() + 1) * 127.5


def run(images: np.ndarray, degradation: Degradation, size_px: int, seed: int = 0) -> np.ndarray:
    seeds = np.random.default_rng(seed).integers(0, 2**63 - 1, len(images))
    return to_pixels(degrade(images, seeds, degradation, size_px))


def test_splitmix_is_splitmix() -> None:
    """The published generator in unbounded integers; its first output for seed 0 is well known."""
    mask = 2**64 - 1

    def reference(seed: int, counter: int) -> int:
        z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert reference(0, 0) == 0xE220A8397B1DCDAF
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50)
    mixed = module._mix(torch.from_numpy(seeds)[:, None], torch.arange(40)).numpy()
    for i, seed in enumerate(seeds.tolist()):
        for j in range(40):
            assert int(mixed[i, j]) & mask == reference(seed & mask, j)


def test_random_numbers_have_the_moments_they_should() -> None:
    uniform = module.draw_uniform(torch.arange(2000), 40)
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(uniform.numpy().T) - np.eye(40)).max() < 0.1
    normal = module._normal(torch.arange(50), 2000)
    assert abs(normal.mean()) < 0.01
    assert abs(normal.var() - 1) < 0.01


@pytest.mark.parametrize("source", [24, 31, 48, 112])
def test_reduction_is_area_averaging(source: int) -> None:
    faces = draw_faces(5, source)
    expected = np.stack([cv2.resize(f, (24, 24), interpolation=cv2.INTER_AREA) for f in faces])
    reduced = reduce_faces(faces, 24, block=2)
    assert reduced.dtype == np.uint8
    assert np.abs(reduced.astype(int) - expected).max() <= 1
    plain = run(faces, DEGRADATIONS["none"], 24)
    np.testing.assert_allclose(plain, expected, atol=1.01)
    with pytest.raises(DataError, match="24 px or more"):
        reduce_faces(faces[:, :10, :10], 24)


def test_enlargement_is_linear() -> None:
    faces = draw_faces(3, 12)
    expected = np.stack(
        [cv2.resize(f.astype(np.float32), (24, 24), interpolation=cv2.INTER_LINEAR) for f in faces]
    )
    np.testing.assert_allclose(run(faces, DEGRADATIONS["none"], 24), expected, atol=0.01)


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
@pytest.mark.parametrize("source", [24, 40, 80])
def test_presets_keep_the_contract(name: str, source: int) -> None:
    faces = draw_faces(40, source)
    before = faces.copy()
    seeds = torch.arange(40) * 7919
    result = degrade(faces, seeds, DEGRADATIONS[name], 24)
    assert result.shape == (40, 3, 24, 24)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(result).all()
    assert result.min() >= -1.0001
    assert result.max() <= 1.0001
    np.testing.assert_array_equal(faces, before)
    assert torch.equal(result, degrade(faces, seeds, DEGRADATIONS[name], 24))
    if name != "none":
        assert not torch.equal(result, degrade(faces, seeds + 1, DEGRADATIONS[name], 24))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(DEGRADATIONS)), st.sets(st.integers(0, 23), min_size=1), st.data())
def test_a_sample_does_not_see_its_batch(name: str, rows: set[int], data: st.DataObject) -> None:
    faces = draw_faces(24, 32)
    seeds = torch.arange(24) * 104729 + 5
    order = data.draw(st.permutations(sorted(rows)))
    whole = degrade(faces, seeds, DEGRADATIONS[name], 24)
    part = degrade(faces[order], seeds[order], DEGRADATIONS[name], 24)
    # A last bit may tip one coefficient of a JPEG block over; nothing else may differ.
    close = (part - whole[order]).abs() < 1e-4
    assert close.float().mean() > 0.995


def test_empty_batch() -> None:
    none = np.zeros((0, 30, 30, 3), np.uint8)
    for degradation in DEGRADATIONS.values():
        assert degrade(none, np.zeros(0, np.int64), degradation, 24).shape == (0, 3, 24, 24)


def test_rates_are_rates() -> None:
    faces = draw_faces(1, 24).repeat(2000, axis=0)
    clean = run(faces[:1], DEGRADATIONS["none"], 24)
    noisy = run(faces, Degradation(noise_rate=0.3), 24)
    assert abs((np.abs(noisy - clean).max((1, 2, 3)) > 1).mean() - 0.3) < 0.04
    covered = run(faces, Degradation(mask_rate=0.1, sunglasses_rate=0.2, patch_rate=0.3), 24)
    assert abs((np.abs(covered - clean).max((1, 2, 3)) > 1).mean() - 0.6) < 0.04


def test_gaussian_blur_is_opencvs() -> None:
    faces = draw_faces(4, 48)
    sigma = 0.04
    result = run(faces, Degradation(blur_rate=1.0, blur_sigma=(sigma, sigma)), 48)
    for face, blurred in zip(faces, result, strict=True):
        expected = cv2.GaussianBlur(face.astype(np.float32), (0, 0), sigma * 48)
        np.testing.assert_allclose(blurred[8:-8, 8:-8], expected[8:-8, 8:-8], atol=0.6)


def test_motion_blur_spreads_a_point_along_a_line() -> None:
    point = np.zeros((200, 48, 48, 3), np.uint8)
    point[:, 24, 24] = 255
    result = run(point, Degradation(motion_rate=1.0, motion_length=(0.3, 0.3)), 48)[:, :, :, 0]
    y, x = np.mgrid[:48, :48]
    for picture in result:
        mass = picture / picture.sum()
        centre = np.array([(mass * y).sum(), (mass * x).sum()])
        np.testing.assert_allclose(centre, [24, 24], atol=0.05)
        offsets = np.stack([(y - centre[0]).ravel(), (x - centre[1]).ravel()])
        short, long = np.linalg.eigvalsh((offsets * mass.ravel()) @ offsets.T)
        # Five exposures over 0.3 * 48 px: variance L^2 / 8; bilinear sampling adds up to 1/4.
        assert abs(long - (0.3 * 48) ** 2 / 8) < 0.6
        assert short < 0.6


@pytest.mark.parametrize("side", [8, 12, 24])
def test_low_resolution_keeps_no_more_than_its_grid(side: int) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (50, 48, 48, 3)).astype(np.uint8)
    recipe = Degradation(low_res_rate=1.0, low_res_px=(side, side))
    result = run(faces, recipe, 48)
    # A picture that came through a grid of `side` has rank `side`, but for clipping at the ends.
    singular = np.linalg.svd(result[:, :, :, 0], compute_uv=False)
    rest = singular[:, side:].sum(1) / singular.sum(1)
    assert np.median(rest) < 1e-5
    assert rest.max() < 0.05


def test_low_resolution_never_enlarges() -> None:
    faces = draw_faces(6, 16)
    recipe = Degradation(low_res_rate=1.0, low_res_px=(200, 300))
    np.testing.assert_allclose(
        run(faces, recipe, 16), run(faces, DEGRADATIONS["none"], 16), atol=1e-3
    )


def test_resampling_keeps_flat_pictures_flat() -> None:
    flat = np.full((60, 40, 40, 3), 93, np.uint8)
    recipe = Degradation(
        jitter_rate=0.7,
        blur_rate=0.7,
        motion_rate=0.7,
        low_res_rate=0.8,
        low_res_px=(5, 24),
    )
    np.testing.assert_allclose(run(flat, recipe, 24), 93, atol=1e-2)


def test_jitter_moves_the_frame_and_no_further() -> None:
    ramp = np.tile(np.arange(48, dtype=np.uint8)[None, None, :, None] * 5, (300, 48, 1, 3))
    recipe = Degradation(jitter_rate=1.0, jitter_zoom=(1, 1), jitter_shift=0.1)
    middle = run(ramp, recipe, 48)[:, 24, 24, 0] / 5
    assert 24 + 4.2 < middle.max() <= 24 + 4.8
    assert 24 - 4.8 <= middle.min() < 24 - 4.2


def test_noise_has_its_strength() -> None:
    for light in (0, 128, 255):
        flat = np.full((100, 24, 24, 3), light, np.uint8)
        recipe = Degradation(noise_rate=1.0, noise_sigma=(0.05, 0.05))
        seeds = torch.arange(100)
        small = torch.full((100, 3, 24, 24), light / 255)
        draw = dict(
            zip(
                module._DRAWS, module.draw_uniform(seeds, len(module._DRAWS)).unbind(1), strict=True
            )
        )
        module._add_noise(small, seeds, draw, recipe)
        expected = 0.05 * math.sqrt(1 + light / 255)
        assert small.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(small.mean().item() - light / 255) < 0.002
        assert np.abs(run(flat, recipe, 24) - light).max() < 255 * 0.05 * math.sqrt(2) * 4


@pytest.mark.parametrize("quality", [20, 50, 85])
def test_jpeg_is_libjpegs(quality: int) -> None:
    faces = draw_faces(6, 24, seed=quality)
    result = run(faces, Degradation(jpeg_rate=1.0, jpeg_quality=(quality, quality)), 24)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR]
    options.append(cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    for face, compressed in zip(faces, result, strict=True):
        data = cv2.imencode(".jpg", face[:, :, ::-1], options)[1]
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1].astype(float)
        difference = np.abs(compressed - expected)
        # libjpeg computes in fixed point, so a coefficient on the edge may round the other way.
        assert np.median(difference) < 1e-3
        assert difference.mean() < 0.15 * np.abs(face - expected).mean()


def test_crop_blacks_out_and_keeps_in_place() -> None:
    faces = np.clip(draw_faces(400, 32), 30, 255)
    clean = run(faces, DEGRADATIONS["none"], 32)
    cropped = run(faces, Degradation(crop_rate=1.0, crop_area=(0.2, 1.0)), 32)
    black = (cropped < 1).all(3)
    np.testing.assert_allclose(cropped[~black], clean[~black], atol=1e-3)
    kept = 1 - black.mean((1, 2))
    assert 0.15 < kept.min() < 0.3
    assert kept.max() > 0.9
    assert 0.5 < kept.mean() < 0.7
    for mask in ~black[:50]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_a_crop_that_does_not_fit_is_drawn_again() -> None:
    recipe = Degradation(crop_rate=1.0, crop_area=(0.9, 0.95))
    draw = dict(
        zip(
            module._DRAWS,
            module.draw_uniform(torch.arange(300), len(module._DRAWS)).unbind(1),
            strict=True,
        )
    )
    faces = torch.ones(300, 3, 64, 64)
    module._crop(faces, torch.arange(300), draw, recipe)
    height, width = faces[:, 0].amax(2).mean(1), faces[:, 0].amax(1).mean(1)
    # with an area of .9 a box fits only if its sides differ by little; clamped ones would be 1
    assert ((height * width) > 0.83).all()  # the grid of 64 rounds
    assert (height * width).mean() == pytest.approx(0.925, abs=0.02)
    assert (height == 1).float().mean() < 0.3


def test_one_coin_changes_the_light_of_the_published_recipe() -> None:
    recipe = DEGRADATIONS["adaface"]
    assert recipe.photometric_together
    faces, seeds = draw_faces(400, 16), np.arange(400)
    alone = replace(recipe, crop_rate=0.0, low_res_rate=0.0)
    clean = to_pixels(degrade(faces, seeds, DEGRADATIONS["none"], 16))
    changed = np.abs(to_pixels(degrade(faces, seeds, alone, 16)) - clean).max((1, 2, 3)) > 0.01
    assert changed.mean() == pytest.approx(0.2, abs=0.06)


def test_occlusions_cover_what_they_are_named_for() -> None:
    faces = np.full((300, 112, 112, 3), 255, np.uint8)
    eyes = [(51, 38), (51, 73)]  # rows and columns of the five-point template
    mouth = [(92, 41), (92, 70)]

    def dark(recipe: Degradation) -> np.ndarray:
        return (run(faces, recipe, 112) < 250).any(3)

    glasses = dark(Degradation(sunglasses_rate=1.0))
    assert all(glasses[:, y, x].all() for y, x in eyes)
    assert not any(glasses[:, y, x].any() for y, x in mouth)
    mask = dark(Degradation(mask_rate=1.0))
    assert all(mask[:, y, x].mean() > 0.85 for y, x in mouth)  # some masks are white
    assert not any(mask[:, y, x].any() for y, x in eyes)
    patch = dark(Degradation(patch_rate=1.0, patch_side=(0.3, 0.3)))
    assert 0.02 < patch.mean((1, 2)).max() <= 0.32**2


def test_light_is_torchvisions_arithmetic() -> None:
    faces = draw_faces(8, 24).astype(np.float64)
    seeds = np.arange(8)
    recipe = Degradation(photometric_rate=1.0)
    result = to_pixels(degrade(faces.astype(np.uint8), seeds, recipe, 24))
    uniform = module.draw_uniform(torch.from_numpy(seeds), len(module._DRAWS)).numpy()
    draw = dict(zip(module._DRAWS, uniform.T.astype(float), strict=True))
    luma = np.array([0.299, 0.587, 0.114])
    for i, face in enumerate(faces / 255):
        face = np.clip(face * (0.5 + draw["brightness"][i]), 0, 1)
        mean, factor = (face @ luma).mean(), 0.5 + draw["contrast"][i]
        face = np.clip(mean + (face - mean) * factor, 0, 1)
        grey, factor = (face @ luma)[:, :, None], 0.5 + draw["saturation"][i]
        face = np.clip(grey + (face - grey) * factor, 0, 1)
        np.testing.assert_allclose(result[i], face * 255, atol=0.01)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"unknown degradation 'foggy'.*none, lowres"):
        get_degradation("foggy")
    for field in fields(Degradation):
        if field.name.endswith("_rate"):
            with pytest.raises(ConfigError, match=field.name):
                Degradation(**{field.name: 1.5})
    with pytest.raises(ConfigError, match="low <= high"):
        Degradation(blur_sigma=(0.3, 0.1))
    with pytest.raises(ConfigError, match="together"):
        Degradation(mask_rate=0.6, patch_rate=0.6)
    faces = draw_faces(2, 24)
    with pytest.raises(DataError, match="uint8 expected"):
        degrade(faces.astype(np.float32), np.zeros(2, np.int64), DEGRADATIONS["none"], 24)
    with pytest.raises(DataError, match="one int64 seed an image"):
        degrade(faces, np.zeros(3, np.int64), DEGRADATIONS["none"], 24)
    with pytest.raises(DataError, match="square"):
        degrade(faces[:, :20], np.zeros(2, np.int64), DEGRADATIONS["none"], 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_the_gpu_agrees(name: str) -> None:
    faces = draw_faces(64, 48)
    seeds = np.arange(64)
    cpu = degrade(faces, seeds, DEGRADATIONS[name], 24)
    gpu = degrade(torch.from_numpy(faces).cuda(), seeds, DEGRADATIONS[name], 24).cpu()
    assert ((cpu - gpu).abs() < 1e-3).float().mean() > 0.98
