"""Docstrings for the API pages: `name : what it is` becomes a description, not a type.

    mkdocs.yml names this file as an extension of griffe.

The contract:
- In sections of parameters and attributes the text behind the colon opens the description; the type
  comes from the signature.
- Lines `name : what it is` outside of any section become a list.
- A list that follows a line at once is set off from it, as Markdown demands.
- Nothing else changes.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Parameters", "Other Parameters", "Attributes")
ITEM = re.compile(r"^(\w+(?:, \w+)*) : (\S.*)$")


def describe_items(text: str) -> str:
    """A docstring in which every item has a description."""
    lines = text.split("\n")
    found, section = [], ""
    for number, line in enumerate(lines):
        underlined = number + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[number + 1])
        section = line if underlined else section
        item = ITEM.match(line)
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        is_sentence = following[:1].isupper() and not (item and item[2].endswith((".", ",")))
        end = "." if is_sentence else ""
        if item and section in SECTIONS:
            found += [item[1], f"    {item[2]}{end}"]
        elif item and not section:
            if found and found[-1] and not found[-1].startswith(("- ", "    ")):
                found.append("")
            found.append(f"- `{item[1]}`: {item[2]}{end}")
        elif line.startswith("- ") and found and found[-1] and found[-1][0] not in "- ":
            found += ["", line]
        else:
            found.append(line)
    return "\n".join(found)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = describe_items(obj.docstring.value)
