"""The layout of the project as tests: directions of imports, no circles, the tree, the words."""

import ast
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("cdp/**/*.py"), *ROOT.glob("pipelines/**/*.py")])

LAYERS = """
cdp.errors cdp.types cdp.progress cdp.numba_cache
cdp.onnx_session cdp.parameters
cdp.arrays
cdp.images cdp.metrics cdp.synthetic
cdp.models
cdp.knn cdp.label_check cdp.committee cdp.propagation cdp.training cdp.aggregation
cdp.embedding cdp.mediator cdp.review cdp.adaptation cdp.assignment
cdp.inputs
cdp.recognizer cdp.clusterer cdp.inspection cdp.restoration cdp.separation
cdp
pipelines
pipelines.files pipelines.yaml_files pipelines.engine pipelines.invocation pipelines.packaged
pipelines.tables pipelines.config
pipelines.store pipelines.decisions pipelines.data
pipelines.verdict pipelines.headlines pipelines.peak_memory pipelines.missed_pairs
pipelines.stage pipelines.results
pipelines.members pipelines.outdated
pipelines.copies pipelines.track_constraints
pipelines.graphs
pipelines.export
pipelines.training pipelines.pages pipelines.real_probes
pipelines.stages pipelines.choices
pipelines.check
pipelines.run pipelines.review pipelines.identify pipelines.align
pipelines.command pipelines.demo
"""
"""Rooms from the ground up: a room imports itself and the rooms of lower lines, lazily or not."""

LAYER_OF = {room: layer for layer, line in enumerate(LAYERS.split("\n")) for room in line.split()}
PLUMBING = {"pipelines", "dask", "distributed", "pyarrow", "argparse", "yaml"}


def name_module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_module(path): path for path in SOURCES}


def list_imports(path):
    """(module, name or None) of every import of a file, in functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, None) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((str(node.module), name.name) for name in node.names)


def list_imported_modules(path):
    """The modules of the house that a file imports: `from a.b import c` may name a module c."""
    for module, name in list_imports(path):
        inner = f"{module}.{name}"
        if inner in MODULES:
            yield inner
        elif module in MODULES:
            yield module


GRAPH = {name: set(list_imported_modules(path)) - {name} for name, path in MODULES.items()}


def find_room(module):
    while module not in LAYER_OF:
        module = module.rpartition(".")[0]
    return module


def find_circles(graph):
    """Strongly connected components of two modules or more (Tarjan)."""
    number, lowest, stack, circles = {}, {}, [], []

    def visit(node):
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == number[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for node in graph:
        if node not in number:
            visit(node)
    return circles


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    module = name_module(path)
    room = find_room(module)
    wrong = [
        other
        for other in sorted(GRAPH[module])
        if find_room(other) != room and LAYER_OF[find_room(other)] >= LAYER_OF[room]
    ]
    assert not wrong, f"{module} is in {room}, which may not import {', '.join(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_libraries_are_imported_where_they_belong(path):
    name = path.relative_to(ROOT).as_posix()
    roots = {module.partition(".")[0] for module, _ in list_imports(path)}
    if name.startswith("cdp/"):
        assert not roots & PLUMBING
    if name != "cdp/knn/libraries.py":
        assert not roots & {"faiss", "nmslib"}


def test_every_module_is_in_a_room_of_the_table():
    roots = {"cdp", "pipelines"}
    assert not [name for name in MODULES.keys() - roots if find_room(name) in roots]


def test_no_modules_import_each_other():
    assert not find_circles(GRAPH)


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert find_circles(graph) == [["b", "c"]]


def test_a_stage_imports_no_stage():
    stages = [name for name in MODULES if name.startswith("pipelines.stages.")]
    wrong = {name: GRAPH[name] & {*stages, "pipelines.stages"} for name in stages}
    assert not {name: others for name, others in wrong.items() if others}


def test_no_private_name_is_imported():
    wrong = [
        f"{name_module(path)} imports {module}.{name}"
        for path in SOURCES
        for module, name in list_imports(path)
        if module in MODULES and name is not None and re.match(r"_[^_]", name)
    ]
    assert not wrong


def test_open_run_is_the_only_name_of_cdp_that_lives_in_the_plumbing():
    import cdp

    elsewhere = {
        name: module for name, module in cdp._MODULE_OF.items() if not module.startswith("cdp.")
    }
    assert elsewhere == {"open_run": "pipelines.results"}


def test_no_code_unpickles_or_evaluates():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load"}, path
        assert not {"pickle", "joblib", "shelve"} & {module for module, _ in list_imports(path)}


def test_the_tree_in_the_docs_names_every_file():
    pages = [ROOT / "docs" / "architecture.md", ROOT / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.name != "__init__.py"
        and not re.search(rf"(?<![\w.]){re.escape(path.name)}\b", text)
    ]
    assert not missing


PRIVATE_WORDS = re.compile(
    r"\b(voices?|hear[sd]?|speak(s|ing)?|spoken?|lessons?|crowds?|amid|spar(e[sd]?|ing)|strangers?"
    r"|friends?|tell(s|ing)?|told|purity|hindsight|teach(es|ing)?|(un)?taught|honou?r(s|ed|ing)?"
    r"|lonel(y|ier|iness)|second readings?|even(ed|s|ing)? out(?! of)|nobody knows|without a word"
    r"|for good(?= ?[.,;:)]))\b"
)
"""Words of no identifier, sentence or message here: each has a standard term."""
ALLOWED = re.compile(
    r'b"spared"'  # enters the digests of trained models
    r"|\.tell\("  # the position in a stream
)


def split_words(text):
    """The text in lower case, identifiers split at underscores, digits and changes of case."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return re.sub(r"[\d_]+", " ", text).lower()


def find_private_words(text):
    """(line number, word or phrase) of every private word in a text."""
    return [
        (number, match[0])
        for number, line in enumerate(text.splitlines(), 1)
        for match in PRIVATE_WORDS.finditer(split_words(ALLOWED.sub("", line)))
    ]


def list_texts():
    """Every file whose words a reader or a user sees, but for this one, which lists the words."""
    for folder, endings in {
        "cdp": ("py",),
        "pipelines": ("py", "js", "html", "css"),
        "tests": ("py",),
        "docs": ("md",),
        "examples": ("py",),
        "configs": ("yaml",),
        "data_manifests": ("yaml",),
    }.items():
        for ending in endings:
            yield from sorted(ROOT.glob(f"{folder}/**/*.{ending}"))
    yield ROOT / "README.md"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def _tell_duration(seconds):", ["tell"]),
        ("class SparedClasses: PURITY = 3", ["spared", "purity"]),
        ("secondReading = even_out(x)", ["second reading", "even out"]),
        ("What differs is evened out for good.", ["evened out", "for good"]),
        ("spread evenly; even out of order; good; a teacher; alone; intel; retold", []),
        ('digest(b"spared"); stream.tell()', []),
    ],
)
def test_private_words_are_found(text, expected):
    assert [word for _, word in find_private_words(text)] == expected


def test_no_private_words():
    offenders = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {word}"
        for path in list_texts()
        if path != Path(__file__)
        for number, word in find_private_words(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(offenders))
    assert not offenders


def test_importing_cdp_is_cheap():
    code = "import sys, cdp; print([m for m in ('torch', 'numba', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SUBMODULES = {module.name for module in pkgutil.iter_modules([str(ROOT / "cdp")])}


@pytest.mark.torch
def test_cdp_lists_its_public_names_and_every_submodule():
    import cdp

    assert sorted(cdp.__all__) == sorted({*cdp._MODULE_OF, *SUBMODULES, "__version__"})
    assert dir(cdp) == sorted(cdp.__all__)
    assert (ROOT / "cdp" / "py.typed").is_file()


@pytest.mark.torch
def test_every_public_name_of_cdp_is_imported_on_first_use():
    import cdp

    for name in cdp._MODULE_OF:
        assert getattr(cdp, name).__name__ == name
    for name in SUBMODULES:
        assert getattr(cdp, name).__name__ == f"cdp.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cdp.nothing


def test_type_checkers_see_what_is_imported():
    """The imports under TYPE_CHECKING and the lazy table name the same modules."""
    tree = ast.parse((ROOT / "cdp" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in guarded.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    import cdp

    table = {name: module for name, module in cdp._MODULE_OF.items() if module.startswith("cdp.")}
    assert seen == {**table, **{name: f"cdp.{name}" for name in SUBMODULES}}


def test_the_version_is_that_of_the_installed_package():
    import cdp

    assert cdp.__version__ == metadata.version("cdp")
