"""Damaged image bytes by the thousand: an image or a reason, and no codec ends the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent


def fuzz(count: int, seed: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "fuzzing", str(count), str(seed)],
        capture_output=True, text=True, errors="replace", timeout=600,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}, seed {seed}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


def check(found: dict) -> None:
    assert found["others"] == []
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == found["count"]
    # Damage that a format's signature does not survive shows little; most must get further.
    assert outcomes["images"] > found["count"] / 10
    assert outcomes["reason: corrupt image"] > found["count"] / 4


def test_damaged_images_give_an_image_or_a_reason() -> None:
    check(fuzz(2_000, 0))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 9))
def test_two_hundred_thousand_damaged_images(seed: int) -> None:
    found = fuzz(25_000, seed)
    print(json.dumps(found))
    check(found)
