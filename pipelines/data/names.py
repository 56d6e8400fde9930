"""Names of people: spellings of one name are one person.

The contract:
- Two names are one person when they agree after Unicode composition (NFC), without blanks at the
  ends, repeated blanks inside and characters that are not seen, whatever their case.
- The person is called by the first spelling, composed and without those blanks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import replace

from pipelines.data.manifest import Entry


def fold_name(name: str) -> str:
    """What all spellings of a name have in common."""
    return _compose("".join(filter(_is_seen, _compose(name).casefold())))


def _is_seen(character: str) -> bool:
    """Whether a character is no mark of direction, joiner or byte order."""
    return character.isascii() or unicodedata.category(character) != "Cf"


def _compose(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def unify_names(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with one spelling a person: the first there is."""
    spelling: dict[str, str] = {}
    known: dict[str, str] = {}
    unified = []
    for entry in entries:
        if entry.identity is not None:
            name = known.get(entry.identity)
            if name is None:
                name = spelling.setdefault(fold_name(entry.identity), _compose(entry.identity))
                known[entry.identity] = name
            entry = entry if name == entry.identity else replace(entry, identity=name)
        unified.append(entry)
    return unified


def group_spellings(names: Iterable[str]) -> list[list[str]]:
    """The names that are spelt in more than one way, a list a person, sorted."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), set()).add(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)
