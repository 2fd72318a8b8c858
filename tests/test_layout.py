"""The house: fifteen rooms at the root, imports that point down, no circle, at run time or for typing."""

import ast
import configparser
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxcl"
# From the bottom up: a room may import from those before it. `jaxcl/__init__.py` is the package's face: it holds the
# version and imports the rest when asked, so any room may import it.
ROOMS = (
    "errors",
    "runtime",
    "losses",
    "saliency",
    "adversarial",
    "augment",
    "models",
    "data",
    "method",
    "config",
    "evaluate",
    "report",
    "train",
    "commands",
    "main",
    "__main__",
)


def modules():
    """{"jaxcl.method.update": path, ...}"""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("jaxcl", *path.relative_to(PACKAGE).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


MODULES = modules()


def imports(path):
    """Modules of jaxcl that a file imports anywhere in it: in functions and for typing, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "jaxcl"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxcl":
            assert not node.level, path
            for a in node.names:
                name = f"{node.module}.{a.name}"
                found.add(name if name in MODULES else node.module)
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_the_root_shows_at_most_sixteen_names():
    shown = [p.name for p in PACKAGE.iterdir() if not p.name.startswith((".", "__"))]
    assert len(shown) <= 16, sorted(shown)
    assert {p.removesuffix(".py") for p in shown} - {"py.typed"} == set(ROOMS) - {"__main__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    if not room(module):
        return
    own = ROOMS.index(room(module))
    above = [name for name in imports(MODULES[module]) if room(name) and ROOMS.index(room(name)) > own]
    assert not above


def test_no_circle():
    graph = {m: imports(path) & set(MODULES) - {m} for m, path in MODULES.items() if m != "jaxcl"}
    # What a package's __init__ imports is loaded with any module in it; a child may import its siblings all the same.
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module in done or module not in graph:
            return
        path.append(module)
        for name in sorted(graph[module]):
            visit(name)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_pure_rooms_import_no_models_data_or_flags():
    allowed = {
        "losses": {"errors", "losses"},
        "saliency": {"errors", "saliency", "losses"},
        "adversarial": {"errors", "adversarial", "losses"},
        "augment": {"errors", "augment", "runtime"},
    }
    for module, path in MODULES.items():
        if room(module) in allowed:
            assert {room(name) for name in imports(path)} <= allowed[room(module)], module


@pytest.mark.parametrize("folder", sorted({p.parent for p in PACKAGE.rglob("*.py")}), ids=lambda p: p.name)
def test_each_folder_says_what_belongs_in_it(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert text and len(text) > 40


def test_no_reference_to_files_that_are_not_here():
    for path in MODULES.values():
        assert not re.search(r"papers/\w+\.md|shared/", path.read_text()), path


def test_every_requirement_has_a_lowest_version():
    """Cases D.3: .ci/lowest_versions installs these and runs tests with them, so none may be without a number."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.with_name("setup.cfg"))
    lines = setup["options"]["install_requires"].splitlines()
    for extra in ("tfds", "parquet", "pretrained", "test"):
        lines += setup["options.extras_require"][extra].splitlines()
    names = [line for line in map(str.strip, lines) if line and not line.startswith(("#", "jaxcl["))]
    assert len(names) > 20 and [line for line in names if not re.search(r"(>=|==)\d", line)] == []
