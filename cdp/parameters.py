"""Numbers that are given as parameters, checked: none is NaN, a bool or text.

The contract:
- A parameter that is no number of the kind that is expected, or out of its bounds, is a
  `ConfigError` that names it, what was expected and what came.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from cdp.errors import ConfigError


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


def check_number(name: str, value: Any, expected: str, *, whole: bool = False) -> None:
    """Raise a `ConfigError` where a parameter is no finite number, or no whole one."""
    if not is_number(value) or (whole and not isinstance(value, Integral)):
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


def check_level(name: str, value: Any, bounds: tuple[float, float] | None = None) -> None:
    """Raise a `ConfigError` where a parameter is neither "auto" nor a number, within bounds."""
    if isinstance(value, str) and value == "auto":
        return
    within = "" if bounds is None else f" in [{bounds[0]}, {bounds[1]}]"
    check_number(name, value, f"'auto' or a number{within}")
    if bounds is not None and not bounds[0] <= value <= bounds[1]:
        raise ConfigError(f"{name} must be 'auto' or a number{within}, got {value!r}")
