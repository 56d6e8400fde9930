"""The documents: their code runs; commands, links and settings exist; nothing is out of date."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipelines.export.__main__ import main as export_results
from pipelines.stages import STAGES
from tests.documents import (
    ARCHITECTURE,
    CONFIGURATION,
    DOCUMENTS,
    ROOT,
    compose_script,
    list_blocks,
    list_examples,
    list_expected,
    refresh_files,
    refresh_settings,
    replace_outputs,
    run_examples,
)

pytestmark = [pytest.mark.torch, pytest.mark.slow]

README = ROOT / "README.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def documented_runs(finished_run, tiny, tmp_path_factory):
    """A folder with the runs that the documents name, small; its `configs/default.yaml` made them.

    In `default` every candidate pair joins: whatever was trained, there is a cluster to look at.
    """
    from pipelines.run import main

    place = tmp_path_factory.mktemp("documents")
    passing = shutil.ignore_patterns("logs", ".*draft*")  # another test may be running there
    shutil.copytree(finished_run.parent, place / "runs", symlinks=True, ignore=passing)
    config = yaml.safe_load(tiny.read_text())
    config |= {"name": "default", "propagate": {"split": "raise_threshold", "threshold": 1e-6}}
    (place / "configs").mkdir()
    (place / "configs" / "default.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(tiny.parent.parent / "data.yaml", place)
    common = ["--runs-dir", str(place / "runs"), "--workers", "1"]
    assert main(["--config", str(place / "configs" / "default.yaml"), *common]) == 0
    assert main(["--config", str(tiny), "--until", "propagate", "name=strict", *common]) == 0
    return place


@pytest.fixture
def inside(documented_runs, tmp_path, monkeypatch):
    """The working directory of a script of the documents: a copy that it may change."""
    shutil.copytree(documented_runs, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")


# --------------------------------------------------------------------------------- code blocks

SCRIPTS = [path for path in DOCUMENTS if compose_script(path)]
SESSIONS = [path for path in DOCUMENTS if list_examples(path)]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_run_and_print_what_they_say(path, inside):
    if "export/recognizer" in path.read_text(encoding="utf-8"):
        pytest.importorskip("onnxscript")
        assert export_results(["recognizer", "--run", "runs/default"]) == 0
    script = compose_script(path)
    Path("script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, env=find_project()
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in printed if line in list_expected(script)] == list_expected(script)


@pytest.mark.parametrize("path", SESSIONS, ids=name_of)
def test_sessions_run_and_show_what_they_say(path, inside):
    """Numbers depend on what was trained, so the first lines are compared without them."""
    examples = list_examples(path)
    outputs = run_examples(examples)
    assert [mask(each.want) for each in examples] == [mask(output) for output in outputs]


def mask(output: str) -> str:
    """The first line of an output, its numbers masked and its spaces single."""
    first = output.strip().split("\n")[0]
    return " ".join(re.sub(r"[\d.,]*\d", "#", first).split())


def find_project() -> dict[str, str]:
    """An environment in which this project is imported, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_outputs_are_replaced_in_place(tmp_path):
    text = "before\n```python\n>>> 1 + 1\n3\n>>> x = [\n...     1]\n>>> x\n[2]\n```\nafter\n"
    (tmp_path / "page.md").write_text(text)
    examples = list_examples(tmp_path / "page.md")
    renewed = replace_outputs(text, examples, run_examples(examples))
    assert renewed == text.replace("\n3\n", "\n2\n").replace("[2]", "[1]")


@pytest.mark.long  # .ci/run runs each of them as a user would
@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_run(path, tmp_path, monkeypatch):
    """Each example checks itself against its known truth and prints at least a line."""
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")
    assert printed.getvalue().strip()


# ------------------------------------------------------------------------------------ commands


def list_commands() -> dict[str, list[str]]:
    """Every command line in the documents, each once: where it stands, and its words."""
    found: dict[str, list[str]] = {}
    for path in DOCUMENTS:
        for block in list_blocks(path):
            if block.language in ("", "bash"):
                lines = [line for line in block.text.splitlines() if STARTS.match(line)]
                found |= {f"{name_of(path)}: {line.partition('  ')[0]}": line for line in lines}
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        quoted = re.findall(r"`((?:cdp|make|python -m) [^`]+)`", text)
        found |= {f"{name_of(path)}: {line}": line for line in quoted}
    return {at: shlex.split(line, comments=True) for at, line in found.items()}


STARTS = re.compile(r"(cdp|make|python|torchrun) (?! )")
COMMANDS = list_commands()


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_exist(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "cdp":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, _, function = project["scripts"]["cdp"].partition(":")
        usage = show_help(getattr(importlib.import_module(module), function))
        assert words[1] in re.findall(r"[\w-]+", usage)
        check_options(
            words[2:], {"run": "pipelines.run", "review": "pipelines.review"}.get(words[1])
        )
    elif words[:2] == ["python", "-m"]:
        if words[2] != "mkdocs":  # a tool of the extra `docs`, not of every environment
            assert importlib.util.find_spec(words[2]) is not None
        check_options(words[3:], words[2])


def show_help(main) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["--help"])
    return printed.getvalue()


def check_options(words: list[str], module: str | None) -> None:
    """Options, stages and settings of a command line of the pipeline exist."""
    if module == "pipelines.run":
        from pipelines.run import build_parser

        options = build_parser().parse_args([word for word in words if word != "..."])
        for override in options.overrides:
            assert find_setting(override.partition("=")[0]), override
    elif module == "pipelines.review":
        from pipelines.review.__main__ import build_parser as build_review

        build_review().parse_args(words)


def find_setting(name: str) -> bool:
    """Whether `section.field` is a setting of a run."""
    from pipelines.config import RunConfig

    model = RunConfig
    for part in name.split("."):
        if part not in getattr(model, "model_fields", {}):
            return False
        model = model.model_fields[part].annotation
    return True


def test_settings_named_in_text_exist():
    sections = "ingest|train|embed|knn|mediate|propagate|retrain|evaluate"
    for path in DOCUMENTS:
        if path.name == "CHANGELOG.md":
            continue
        text = path.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
            assert find_setting(name), f"{name_of(path)}: {name}"


# --------------------------------------------------------------------------- links and contents


def list_links(text: str) -> list[str]:
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", plain)


def list_anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for link in list_links(path.read_text(encoding="utf-8")):
        if link.startswith(("https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        place = path.parent / target if target else path
        assert place.exists(), f"{link}: no such file"
        assert not anchor or anchor in list_anchors(place), f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_named_in_text_exist(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("history names files that are gone")
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:cdp|pipelines|tests|configs|\.ci)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("**/*.md"):
        assert path.relative_to(ROOT / "docs").as_posix() in navigation, path


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250


def test_the_readme_names_every_stage():
    text = README.read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"| `{stage.name}` |" in text


def test_every_table_column_is_in_the_glossary():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for stage in STAGES:
        for table, schema in stage.outputs.items():
            for column in schema.names:
                assert f"`{column}`" in text, f"{stage.name}/{table}: {column}"


def test_every_setting_is_documented():
    """Names, values and defaults are those of the code, and each has its words."""
    from pipelines import config

    text = CONFIGURATION.read_text(encoding="utf-8")
    assert refresh_settings(text) == text, "run: python -m tests.documents"
    assert "TODO" not in text
    for name, model in vars(config).items():
        if isinstance(model, type) and issubclass(model, config.Settings):
            assert f"<!-- settings: {name} -->" in text or name == "Settings"


def test_every_file_is_in_the_architecture():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert refresh_files(text) == text, "run: python -m tests.documents"


def test_items_of_docstrings_become_descriptions():
    griffe = pytest.importorskip("griffe")
    assert griffe
    describe = runpy.run_path(str(ROOT / ".ci" / "docstrings.py"))["describe_items"]
    head = "What it is.\n\nParameters\n----------\n"
    described = describe(f"{head}k : how many.\nx : (n,) float\n    The values.")
    assert described == f"{head}k\n    how many.\nx\n    (n,) float.\n    The values."
    assert describe("One.\n\na : first.\nb : second.") == "One.\n\n- `a`: first.\n- `b`: second."
    assert describe("The contract:\n- One.") == "The contract:\n\n- One."
