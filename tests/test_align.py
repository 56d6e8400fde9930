"""align: a similarity is found exactly, and the face lands on the template."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import DataError
from cdp.images.align import TEMPLATE_112, align_face, estimate_similarity


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-3.1, 3.1),
    st.floats(0.05, 20),
    st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
    st.integers(0, 10_000),
)
def test_a_similarity_is_recovered(
    angle_rad: float, scale: float, shift: tuple[float, float], seed: int
) -> None:
    source = np.random.default_rng(seed).normal(size=(5, 2)) * 30
    rotation = np.array(
        [[np.cos(angle_rad), -np.sin(angle_rad)], [np.sin(angle_rad), np.cos(angle_rad)]]
    )
    target = scale * source @ rotation.T + shift
    transform = estimate_similarity(source, target)
    np.testing.assert_allclose(transform[:, :2], scale * rotation, atol=1e-6 * scale)
    np.testing.assert_allclose(transform[:, 2], shift, atol=1e-5 * (1 + scale))


def test_the_fit_is_least_squares_and_never_mirrors() -> None:
    rng = np.random.default_rng(3)
    source, target = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    # A similarity is linear in (a, b, tx, ty): solve the same problem as ordinary least squares.
    rows = np.zeros((10, 4))
    rows[0::2] = np.stack([source[:, 0], -source[:, 1], np.ones(5), np.zeros(5)], 1)
    rows[1::2] = np.stack([source[:, 1], source[:, 0], np.zeros(5), np.ones(5)], 1)
    a, b, tx, ty = np.linalg.lstsq(rows, target.ravel(), rcond=None)[0]
    np.testing.assert_allclose(
        estimate_similarity(source, target), [[a, -b, tx], [b, a, ty]], atol=1e-10
    )
    mirrored = estimate_similarity(source, source * (-1, 1))
    assert np.linalg.det(mirrored[:, :2]) >= 0


@pytest.mark.parametrize("size_px", [56, 112])
@pytest.mark.parametrize("scale", [0.5, 1.0, 6.0])
def test_landmarks_land_on_the_template(size_px: int, scale: float) -> None:
    angle_rad = 0.4
    rotation = np.array(
        [[np.cos(angle_rad), -np.sin(angle_rad)], [np.sin(angle_rad), np.cos(angle_rad)]]
    )
    side = int(200 * max(scale, 1))
    centre = np.array([side / 2, side / 2])
    landmarks = (TEMPLATE_112 - 56) @ rotation.T * scale + centre
    y, x = np.mgrid[:side, :side]
    wanted = (TEMPLATE_112 + 0.5) * (size_px / 112) - 0.5
    for point, target in zip(landmarks, wanted, strict=True):
        bump = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * (4 * scale) ** 2))
        image = np.repeat((bump * 255).astype(np.uint8)[:, :, None], 3, axis=2)
        face = align_face(image, landmarks, size_px)[:, :, 0].astype(float)
        assert face.shape == (size_px, size_px)
        fy, fx = np.mgrid[:size_px, :size_px]
        found = np.array([(face * fx).sum(), (face * fy).sum()]) / face.sum()
        np.testing.assert_allclose(found, target, atol=0.35)


def test_an_aligned_face_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3)).astype(np.uint8)
    np.testing.assert_array_equal(align_face(image, TEMPLATE_112), image)


def test_bad_landmarks() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    with pytest.raises(DataError, match=r"\(5, 2\) expected"):
        align_face(image, np.zeros((4, 2)))
    with pytest.raises(DataError, match="coincide"):
        align_face(image, np.ones((5, 2)))
    with pytest.raises(DataError, match="finite"):
        align_face(image, TEMPLATE_112 * np.nan)
