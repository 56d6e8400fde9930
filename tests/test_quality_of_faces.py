"""Face quality: sharpness, pose and misfit by hand, and one number that falls with each."""

import cv2
import numpy as np
import pytest

from cdp.images.align import TEMPLATE_112
from cdp.images.quality import estimate_pose, measure_misfit, measure_sharpness, rate_quality


def test_sharpness_by_hand() -> None:
    blank = np.full((1, 16, 16, 3), 90, np.uint8)
    assert measure_sharpness(blank).tolist() == [0]
    # One bright pixel: -4 there, 1 at its four neighbours, times 100; mean 0.
    dot = np.zeros((1, 10, 10, 3), np.uint8)
    dot[0, 5, 5] = 100
    np.testing.assert_allclose(measure_sharpness(dot), (16 + 4) * 100**2 / 100, rtol=1e-6)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 112, 112, 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise[0], (0, 0), 2)[None]
    assert measure_sharpness(blurred)[0] < measure_sharpness(noise)[0] / 10
    assert measure_sharpness(np.empty((0, 8, 8, 3), np.uint8)).shape == (0,)


@pytest.mark.parametrize("roll_deg", [-100.0, -20.0, 0.0, 35.0])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_pose_is_that_of_the_template_turned(roll_deg: float, scale: float) -> None:
    angle = np.radians(roll_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE_112 @ turn.T * scale + 50)[None]
    yaw, pitch, roll = estimate_pose(points)[0]
    assert abs(yaw) < 3
    assert abs(pitch) < 3
    assert abs(roll - roll_deg) < 1
    np.testing.assert_allclose(measure_misfit(points), 0, atol=1e-3)


def test_the_nose_shows_where_a_face_looks() -> None:
    for shift, axis, sign in (((8, 0), 0, 1), ((-8, 0), 0, -1), ((0, -8), 1, 1), ((0, 8), 1, -1)):
        points = TEMPLATE_112.copy()
        points[2] += shift
        pose = estimate_pose(points[None])[0]
        # 8 px aside at a depth of half the 35.2 px between the eyes: 24 degrees.
        assert abs(sign * pose[axis] - np.degrees(np.arctan(8 / 17.6))) < 4
        assert abs(pose[1 - axis]) < 3
        assert measure_misfit(points[None])[0] > 2
    mirrored = TEMPLATE_112 * (-1, 1)
    assert np.isfinite(estimate_pose(mirrored[None])).all()


def test_quality_falls_with_each_measure() -> None:
    best = rate_quality(np.array([200]), np.array([400]), np.zeros((1, 3)), np.ones(1))
    assert best.tolist() == [1]
    # A quarter of the size, a quarter of the sharpness, 60 degrees aside, half the score.
    half = [
        rate_quality(np.array([28]), np.array([400]), np.zeros((1, 3)), np.ones(1)),
        rate_quality(np.array([200]), np.array([25]), np.zeros((1, 3)), np.ones(1)),
        rate_quality(np.array([200]), np.array([400]), np.array([[60.0, 0, 0]]), np.ones(1)),
        rate_quality(np.array([200]), np.array([400]), np.zeros((1, 3)), np.full(1, 0.5)),
    ]
    np.testing.assert_allclose(np.concatenate(half), 0.5, atol=1e-6)
    rolled = rate_quality(np.array([200]), np.array([400]), np.array([[0, 0, 90.0]]), np.ones(1))
    assert rolled.tolist() == [1]
