"""YAML files: parsed safely and within bounds, validated against strict models.

The contract:
- At most `YAML_BYTES`, `YAML_VALUES` values with aliases written out, `YAML_DEPTH` levels; a key
  given twice is an error.
- Any fault is a ConfigError with the file, the key, the expected and the given value.
"""

from __future__ import annotations

import json
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cdp.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

YAML_BYTES = 1 << 20
YAML_VALUES = 10_000
"""Values of one file; values repeated by an alias are counted each time."""
YAML_DEPTH = 50
_HINTS = {
    "'\\t'": ". It is a tab; YAML is indented by spaces",
    "mapping values": ". Is a space behind each colon, and text with a colon in quotes?",
    "escape character": ". In double quotes a backslash begins an escape; write single quotes",
}
"""Words of the YAML reader's messages, and what to do."""


class _OneOfEachKey(yaml.SafeLoader):
    """The safe loader, with an error for a key given twice; YAML would drop the first silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in given.items() if count > 1 and key != "<<"]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text of any origin, loaded safely; ConfigError where that fails."""
    try:
        _check_bounds(text)
        return _OneOfEachKey(text).get_single_data()
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        problem += next((hint for words, hint in _HINTS.items() if words in problem), "")
        raise ConfigError(f"{source}{where}: {problem}") from error
    except Exception as error:  # an invalid date, number or tag may raise any exception
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ConfigError(f"{source}: not YAML that can be read: {reason}") from error


def _check_bounds(text: str) -> None:
    """YAMLError for a text whose value is too large or too deep once aliases are written out."""
    size: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # (anchor, count before) of each
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                raise yaml.MarkedYAMLError(None, None, "holds itself", event.start_mark)
            count += size.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                size[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                size[anchor] = count - before
        if count > YAML_VALUES or len(opened) > YAML_DEPTH:
            limits = f"at most {YAML_VALUES} values, nested {YAML_DEPTH} deep, are expected"
            raise yaml.MarkedYAMLError(None, None, f"too much: {limits}", event.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, loaded safely; ConfigError for anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(YAML_BYTES + 1)
        if len(data) > YAML_BYTES:
            raise ConfigError(f"{path}: at most {YAML_BYTES} bytes of settings are expected")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ConfigError(f"no such file: {path}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: {error}. Save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(value).__name__}")
    return value


def validate_settings(kind: type[Model], value: Any, *, source: str) -> Model:
    """Validate strictly; one ConfigError lists every fault."""
    try:
        # JSON mode is strict about types yet takes lists for tuples, which is what YAML offers.
        return kind.model_validate_json(json.dumps(value))
    except (TypeError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise ConfigError(_explain(error, kind, source)) from error
        raise ConfigError(f"{source}: {error}") from error


def _explain(error: ValidationError, kind: type[BaseModel], source: str) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or kind.__name__
        if fault["type"] == "extra_forbidden":
            known = _find_fields(kind, fault["loc"][:-1])
            meant = _guess(kind, str(fault["loc"][-1]), known)
            lines.append(f"{where}: no such setting; {meant}known here: {', '.join(known)}")
        elif fault["type"] == "string_pattern_mismatch" and where.split(".")[-1] == "name":
            given = repr(fault["input"])[:60]
            lines.append(f"{where}: up to 41 of a-z, 0-9 and _ expected, got {given}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            # The message of a fault of the whole includes the value; the whole would be too long.
            got = repr(fault["input"])
            got = got if len(got) <= 200 else f"{got[:200]}..."
            lines.append(f"{where}: {message}, got {got}" if fault["loc"] else message)
    return f"{source}: " + "; ".join(lines)


def _guess(kind: type[BaseModel], given: str, known: list[str]) -> str:
    """The setting that was meant, if one is spelt alike here or alike in another section."""
    near = get_close_matches(given, known, 1)
    if near:
        return f"did you mean {near[0]}? "
    own = list(kind.model_fields)
    fields = {name: _find_fields(kind, (name,)) for name in own}
    inside = [name for name in own if given in fields[name] and fields[name] != own]
    return f"there is {inside[0]}.{given}; " if inside else ""


def _find_fields(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in kind.model_fields:
            inner = kind.model_fields[part].annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                kind = inner
            else:
                kind = next(
                    (
                        a
                        for a in getattr(inner, "__args__", ())
                        if isinstance(a, type) and issubclass(a, BaseModel)
                    ),
                    kind,
                )
    return list(kind.model_fields)
