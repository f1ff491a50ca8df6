"""The house: who may import whom, how many files a folder has, and how docstrings begin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"utils", "kernels"},
    {"layers"},
    {"state"},
    {"measurement", "distributed"},
    {"plans"},
    {"optim", "report"},
    {"curvature", "demo"},
    {"cli", "integrations", "lr_scheduler"},
    {"__init__", "__main__"},
]
"""From the ground up: a package imports packages of lower floors alone."""
MOST_FILES = 9
"""In one folder."""

TOPS = ["slimadam", "kernels", "benchmarks"]
NO_VERBS = {"What", "Whether", "Which", "Of", "Where"}

SOURCES = {
    path.relative_to(ROOT / folder): ast.parse(path.read_text(encoding="utf-8"))
    for folder in (".", "slimadam")
    for path in sorted((ROOT / folder / ("kernels" if folder == "." else "")).rglob("*.py"))
    if not (folder == "slimadam" and "kernels" in path.relative_to(ROOT / folder).parts)
}
"""Each file of the package as it is installed, parsed."""


def _package(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_packages(tree: ast.AST) -> set[str]:
    names = (name.split(".") for name in _imports(tree))
    return {parts[1] for parts in names if parts[0] == "slimadam" and len(parts) > 1}


def test_packages_import_lower_floors_alone() -> None:
    floor = {package: height for height, packages in enumerate(FLOORS) for package in packages}
    upwards = [
        f"{file} imports {imported}"
        for file, tree in SOURCES.items()
        for imported in _imported_packages(tree)
        if imported in floor and imported != _package(file) and floor[imported] >= floor[_package(file)]
    ]
    assert upwards == []
    assert {_package(file) for file in SOURCES} == set(floor)


def test_kernels_know_nothing_of_the_package() -> None:
    kernels = [tree for file, tree in SOURCES.items() if _package(file) == "kernels"]
    assert [name for tree in kernels for name in _imports(tree) if name.split(".")[0] == "slimadam"] == []
    assert len(kernels) >= 10


@pytest.mark.parametrize("top", TOPS)
def test_folders_have_few_files(top: str) -> None:
    folders = {path.parent for path in (ROOT / top).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


Defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _defined(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Defined, bool]]:
    """Yield each class and function with its qualified name, and whether a class holds it; none within functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Defined):
            name = f"{inside}{node.name}"
            yield name, node, isinstance(tree, ast.ClassDef)
            if isinstance(node, ast.ClassDef):
                yield from _defined(node, f"{name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _defined(node, inside)


def _count_of_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> int:
    """Count a function's arguments, ``self`` and ``cls`` left out."""
    given = function.args
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - (in_class and not static)


@pytest.mark.parametrize("top", TOPS)
def test_docstrings_begin_with_a_verb(top: str) -> None:
    offenders = []
    for path in sorted((ROOT / top).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in [("", tree), *((name, node) for name, node, _ in _defined(tree))]:
            text = ast.get_docstring(node)
            if text and text.split()[0].rstrip(",") in NO_VERBS:
                offenders.append(f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}")
    assert offenders == [], "\n".join(offenders)


@pytest.mark.parametrize("top", TOPS)
def test_public_functions_say_what_their_arguments_are(top: str) -> None:
    offenders = []
    for path in sorted((ROOT / top).rglob("*.py")):
        for name, node, in_class in _defined(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node)
            if isinstance(node, ast.ClassDef) or any(part.startswith("_") for part in name.split(".")):
                continue
            if text is not None and "Args:" not in text and _count_of_arguments(node, in_class) >= 2:
                offenders.append(f"{path.relative_to(ROOT)}: {name}")
    assert offenders == [], "\n".join(offenders)
