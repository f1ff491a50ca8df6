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


@pytest.mark.parametrize("top", ["slimadam", "kernels", "benchmarks"])
def test_folders_have_few_files(top: str) -> None:
    folders = {path.parent for path in (ROOT / top).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
