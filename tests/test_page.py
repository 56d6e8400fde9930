"""page: every picture in its place, every pixel as it was."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.images.page import compose_page


def test_pictures_are_magnified_and_in_order() -> None:
    rng = np.random.default_rng(0)
    rows = {
        "sharp": rng.integers(0, 256, (3, 24, 24, 3)).astype(np.uint8),
        "far": rng.integers(0, 256, (2, 7, 7, 3)).astype(np.uint8),
    }
    page = compose_page(rows, cell_px=48)
    assert page.shape == (2 * 52 + 4, 150 + 3 * 52, 3)
    np.testing.assert_array_equal(page[4:52:2, 150:198:2], rows["sharp"][0])
    np.testing.assert_array_equal(page[4:52:2, 254:302:2], rows["sharp"][2])
    np.testing.assert_array_equal(page[56 : 56 + 42 : 6, 202 : 202 + 42 : 6], rows["far"][1])
    assert (page[:, 4:146].min(2) < 128).any()  # the names
    assert (page[56:104, 254:] == 250).all()  # no third picture


def test_errors() -> None:
    with pytest.raises(DataError, match="a row of pictures"):
        compose_page({})
    with pytest.raises(DataError, match="row 'x'"):
        compose_page({"x": np.zeros((2, 4, 4, 3))})
