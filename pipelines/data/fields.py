"""A field of a table that names a person, read as text: what is missing, and whole numbers.

The contract:
- An empty field, null, NaN, and exactly the words that pandas writes or reads for a missing value
  (`MISSING`) name nobody. "Nan" and "Na" are people.
- A whole number is one identity whether it is written 7 or 7.0: where a column of integers has a
  missing value, pandas makes floats of it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from cdp.errors import DataError

MISSING = frozenset({"nan", "NaN", "NA", "N/A", "<NA>", "None", "null", "NULL"})
DESCRIBED = "an empty field, NaN or null, or one of the words " + ", ".join(sorted(MISSING))
"""What names nobody, for messages."""
LARGEST_WHOLE = 1 << 53
"""Beyond this a float does not hold every whole number."""
_WHOLE = re.compile(r"([+-]?\d+)\.0+")


def read_field(value: Any) -> str | None:
    """The text of a field without blanks at its ends; None where it names nobody.

    DataError for a float that is too large to be an exact whole number.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            if abs(value) > LARGEST_WHOLE:
                raise DataError(
                    f"an identity as text or as an integer expected, got the float {value!r}, "
                    "which is not exact. Save the column as text"
                )
            return str(int(value))
    text = "" if value is None else str(value).strip()
    if text in MISSING or not text:
        return None
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text
