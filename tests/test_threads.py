"""Threads: blocks cover all rows, and the BLAS limit ends with its last user."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cdp.arrays.threads import count_threads, limit_blas, list_blocks
from cdp.errors import ConfigError


def count_blas():
    np.ones((2, 2)) @ np.ones((2, 2))
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def test_the_limit_ends_with_its_last_user():
    """Users of one thread: threadpoolctl lets one thread of a process set a pool's size."""
    with threadpool_limits(2, user_api="blas"):
        before = count_blas()
        one, other = limit_blas(), limit_blas()
        one.__enter__()
        other.__enter__()
        assert count_blas() <= {1}
        one.__exit__(None, None, None)
        assert count_blas() <= {1}
        other.__exit__(None, None, None)
        assert count_blas() == before


def test_an_error_lifts_the_limit():
    with threadpool_limits(2, user_api="blas"):
        before = count_blas()
        with pytest.raises(ValueError, match="inside"), limit_blas():
            raise ValueError("inside")
        assert count_blas() == before


def test_blocks_and_counts():
    assert list_blocks(3, 10, 4) == [slice(3, 7), slice(7, 10)]
    assert list_blocks(5, 5) == []
    assert count_threads(7) == 7
    assert count_threads(None) >= 1
    with pytest.raises(ConfigError, match="at least 1"):
        count_threads(0)
