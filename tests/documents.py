"""The documents: their code blocks, and the parts that are made from the code.

    python -m tests.documents                  # docs/configuration.md and docs/architecture.md
    python -m tests.documents --runs runs      # the outputs of `>>>` blocks too, from finished runs

The contract:
- `docs/configuration.md` lists each setting of `pipelines.config` with its type and default, which
  are made here; what a setting does is written by hand and kept.
- `docs/architecture.md` lists each file with the first line of its docstring, and the layers that
  `tests/test_house.py` holds the imports to.
- `--runs` names a folder that holds the runs `default` and `strict`; without it no output changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import io
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
)
CONFIGURATION = ROOT / "docs" / "configuration.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


# ---------------------------------------------------------------------------------- code blocks


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" where none is named), its text, and where it starts."""

    path: Path
    line: int
    language: str
    text: str

    @property
    def is_session(self) -> bool:
        """Whether it is an interactive session, with outputs."""
        return self.text.lstrip().startswith(">>>")


def list_blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, top to bottom."""
    found, opened, lines = [], None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if opened is None and fence:
            opened, lines = (number + 1, fence[1]), []
        elif opened is not None and line.strip() == "```":
            found.append(Block(path, *opened, "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{path}: a fenced block is never closed"
    return found


def compose_script(path: Path) -> str:
    """The Python blocks of a document as one script, sessions left out; "" where there is none."""
    parts = [
        block.text for block in list_blocks(path)
        if block.language == "python" and not block.is_session
    ]  # fmt: skip
    return "\n".join(parts)


def list_expected(script: str) -> list[str]:
    """What the script says it prints: the comments behind its calls of print."""
    return re.findall(r"^print\(.*\)  # (.*)$", script, re.MULTILINE)


def list_examples(path: Path) -> list[doctest.Example]:
    """The steps of all sessions of a document."""
    parser = doctest.DocTestParser()
    return [
        example
        for block in list_blocks(path)
        if block.language == "python" and block.is_session
        for example in parser.get_examples(block.text, f"{path.name}:{block.line}")
    ]


def run_examples(examples: list[doctest.Example]) -> list[str]:
    """Run the steps one after the other in the working directory; what each one prints."""
    import pandas as pd

    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    pd.set_option("display.width", 120, "display.max_columns", 20)
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, "<document>", "single"), names)
        outputs.append(printed.getvalue())
    return outputs


def replace_outputs(text: str, examples: list[doctest.Example], outputs: list[str]) -> str:
    """The document with new outputs behind its steps."""
    at = 0
    for example, output in zip(examples, outputs, strict=True):
        lines = example.source.rstrip("\n").split("\n")
        prompt = "\n".join([f">>> {lines[0]}", *(f"... {line}".rstrip() for line in lines[1:])])
        begin = text.index(prompt, at) + len(prompt) + 1
        assert text.startswith(example.want, begin), f"cannot find the output of {prompt!r}"
        text = text[:begin] + output + text[begin + len(example.want) :]
        at = begin + len(output)
    return text


# ------------------------------------------------------------------------------------- settings


def describe_type(field: FieldInfo) -> str:
    """What a setting may be, in words: `whole number, 1 or more`."""
    parts = (_name_type(field.annotation), _bound(field.metadata))
    return ", ".join(part for part in parts if part)


def _name_type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        parts = (_name_type(arguments[0]), _bound(arguments[1:]))
        return ", ".join(part for part in parts if part)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _name_type(part) for part in arguments)
    if origin is tuple:
        return f"list of: {_name_type(arguments[0])}"
    if origin is dict or kind is dict:
        return "mapping"
    plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if kind in plain:
        return plain[kind]
    return f"see {kind.__name__.removesuffix('Settings').lower()}"


def _bound(metadata: Any) -> str:
    """The bounds in pydantic's metadata: `0 or more, below 1`."""
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}",
             "min_length": "{} or more of them"}  # fmt: skip
    found = []
    for each in metadata:
        rest = each.metadata if isinstance(each, FieldInfo) else [each]
        for one in rest:
            for name, text in words.items():
                value = getattr(one, name, None)
                if value is not None:
                    found.append(text.format(f"{value:,}" if isinstance(value, int) else value))
            if getattr(one, "pattern", None):
                found.append("lower case, digits and `_`")
    return ", ".join(found)


def describe_default(field: FieldInfo) -> str:
    """The default as YAML would have it; "required" where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(str(part) for part in value)}]"
    return str(value)


def list_settings(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The plain settings of a model, in order; those of its sections and base class left out."""
    base = model.__mro__[1].model_fields
    for name, field in model.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        own = name not in base or describe_default(field) != describe_default(base[name])
        if own and not is_section:
            yield name, field


def render_settings(model: type[BaseModel], prose: Mapping[str, str]) -> str:
    """The table of one model's settings; prose says what each does."""
    rows = ["| setting | values | default | what it does |", "|---|---|---|---|"]
    for name, field in list_settings(model):
        rows.append(
            f"| `{name}` | {describe_type(field)} | `{describe_default(field)}` | "
            f"{prose.get(name, 'TODO')} |"
        )
    return "\n".join(rows) + "\n"


TABLE = re.compile(r"<!-- settings: (\w+) -->\n\n((?:\|.*\n)*)")


def refresh_settings(text: str) -> str:
    """The document with the names, values and defaults of today; the prose is kept."""
    from pipelines import config
    from pipelines.data import manifest

    def replace(match: re.Match[str]) -> str:
        rows = [line.split(" | ") for line in match[2].splitlines()]
        prose = {row[0].strip("|` "): row[-1].removesuffix(" |") for row in rows if len(row) == 4}
        model = getattr(config, match[1], None) or getattr(manifest, match[1])
        return f"<!-- settings: {match[1]} -->\n\n{render_settings(model, prose)}"

    return TABLE.sub(replace, text)


# --------------------------------------------------------------------------------- architecture

LAYER_BLOCK = re.compile(r"<!-- layers -->\n\n```\n(?:.*\n)*?```\n")
FILES = re.compile(r"<!-- files: ([\w/]+) -->\n\n```\n(?:.*\n)*?```\n")


def list_files(folder: Path) -> list[str]:
    """One line a Python file: its place below the folder, and the first line of its docstring."""
    lines = []
    for path in sorted(folder.glob("**/*.py"), key=lambda path: (path.parent, path.name)):
        depth = len(path.relative_to(folder).parts) - 1
        name = f"{path.parent.name}/" if path.name == "__init__.py" else path.name
        indent = depth - 1 if path.name == "__init__.py" else depth
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        purpose = doc.split("\n\n")[0].replace("\n", " ")
        if path.parent != folder or path.name != "__init__.py":
            lines.append(f"{'  ' * indent}{name}".ljust(32) + purpose)
    return [line.rstrip() for line in lines]


def refresh_files(text: str) -> str:
    """The document with the files and the layers of today."""
    from tests.test_house import LAYERS

    def replace(match: re.Match[str]) -> str:
        listed = "\n".join(list_files(ROOT / match[1]))
        return f"<!-- files: {match[1]} -->\n\n```\n{listed}\n```\n"

    text = LAYER_BLOCK.sub(f"<!-- layers -->\n\n```\n{LAYERS.strip()}\n```\n", text)
    return FILES.sub(replace, text)


def main() -> None:
    """Bring the documents up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="a folder with finished runs `default`, `strict`")
    options = parser.parse_args()
    for path, refresh in ((CONFIGURATION, refresh_settings), (ARCHITECTURE, refresh_files)):
        path.write_text(refresh(path.read_text(encoding="utf-8")), encoding="utf-8")
    if options.runs:
        runs = options.runs.resolve()
        assert runs.name == "runs", f"a folder called runs expected, got {runs}"
        os.chdir(runs.parent)
        for path in DOCUMENTS:
            if examples := list_examples(path):
                text = path.read_text(encoding="utf-8")
                path.write_text(
                    replace_outputs(text, examples, run_examples(examples)), encoding="utf-8"
                )


if __name__ == "__main__":
    main()
