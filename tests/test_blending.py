"""blending: each blend is a mixture of its two faces and a function of them and its seed."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.images.blending import blend_faces

COUNT, SIDE = 400, 20


def draw(value: tuple[int, int, int], count: int = COUNT) -> np.ndarray:
    faces = np.empty((count, SIDE, SIDE, 3), np.uint8)
    faces[:] = value
    return faces


def test_every_pixel_is_a_mixture_of_the_two() -> None:
    blends = blend_faces(draw((200, 0, 0)), draw((0, 200, 0)), np.arange(COUNT)).astype(int)
    np.testing.assert_allclose(blends.sum(3), 200, atol=1)
    assert not blends[..., 2].any()
    share = blends[..., 0] / 200
    flat = share.max((1, 2)) - share.min((1, 2)) < 0.02
    assert 0.4 < flat.mean() < 0.6  # morphs; the others have a seam
    level = share[flat].mean((1, 2))
    assert level.min() > 0.29
    assert level.max() < 0.71
    assert level.std() > 0.1
    seamed = share[~flat]
    assert (seamed.max((1, 2)) > 0.9).all()
    assert (seamed.min((1, 2)) < 0.1).all()
    upper, lower = seamed[:, : SIDE // 2].mean((1, 2)), seamed[:, SIDE // 2 :].mean((1, 2))
    assert (upper > lower).mean() > 0.8  # mostly the first above, the second below


def test_half_of_the_blends_are_stretched() -> None:
    face = draw((0, 0, 0), 1)
    face[:, 5:15, 5:15] = 255
    blends = blend_faces(np.repeat(face, COUNT, 0), np.repeat(face, COUNT, 0), np.arange(COUNT))
    same = (blends == face).all((1, 2, 3))
    assert 0.4 < same.mean() < 0.6
    area = blends[..., 0].sum((1, 2)) / face[..., 0].sum()
    assert area.min() > 0.93**2 - 0.02
    assert area.max() < 1.07**2 + 0.02
    assert area[~same].std() > 0.03


def test_a_blend_does_not_see_its_batch() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 6, SIDE, SIDE, 3)).astype(np.uint8)
    seeds = np.array([5, 9, 2**62, 0, 1, 5])
    whole = blend_faces(first, second, seeds)
    for row in (0, 3, 5):
        one = slice(row, row + 1)
        alone = blend_faces(first[one], second[one], seeds[one])
        np.testing.assert_array_equal(alone, whole[one])
    assert blend_faces(first[:0], second[:0], seeds[:0]).shape == (0, SIDE, SIDE, 3)


def test_faces_are_mirrored_half_of_the_time() -> None:
    first = draw((0, 0, 0))
    first[:, :, : SIDE // 2] = 255
    blends = blend_faces(first, draw((0, 0, 0)), np.arange(COUNT)).astype(int)
    left, right = (blends[:, :, half].sum((1, 2, 3)) for half in (slice(0, 4), slice(-4, None)))
    assert (left != right).all()
    assert 0.4 < (left > right).mean() < 0.6


def test_arrays_that_do_not_match_are_errors() -> None:
    with pytest.raises(DataError, match="two arrays of faces"):
        blend_faces(draw((0, 0, 0), 2), draw((0, 0, 0), 3), np.arange(2))
    with pytest.raises(DataError, match="n seeds"):
        blend_faces(draw((0, 0, 0), 2), draw((0, 0, 0), 2), np.arange(3))
