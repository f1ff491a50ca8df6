"""Draw ``docs/architecture.png``, the packages and their imports as they are: ``python -m benchmarks.architecture``.

A package stands one floor above the highest package that it imports. Arrows point from a package to the packages that
it imports; one that other arrows lead to as well is left out.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks import ROOT
from slimadam.utils.plot_style import COLOURS, REFERENCE_COLOUR, WITHOUT_GRID

PICTURE = ROOT / "docs" / "architecture.png"
PACKAGES = {
    "__main__": (0.6, "the command line"),
    "__init__": (2.0, "the public names"),
    "cli": (0.6, "calibrate, run, plan,\nfind-lr, mix, demo"),
    "lr_scheduler": (2.0, "warmup from the\ncritical learning rate"),
    "integrations": (3.0, "Trainer, Lightning"),
    "demo": (1.1, "a small model,\ntrained both ways"),
    "curvature": (2.0, "critical and Hessian\nsharpness, data mixing"),
    "report": (0.0, "a page about a plan"),
    "optim": (1.6, "SlimAdam: step,\ncheckpoint, memory"),
    "plans": (0.6, "choose, save and\nresolve a plan"),
    "measurement": (0.6, "the SNR of\nsecond moments"),
    "distributed": (2.2, "second moments of\nsharded parameters"),
    "state": (1.4, "rules, and the tensors\nthat they prescribe"),
    "layers": (0.6, "names, roles and splits\nof parameters"),
    "utils": (0.6, "errors, files, DTensors,\ntorch's private names"),
    "kernels": (2.2, "reference, lists,\nC++, Triton"),
}
"""Place of each package from left to right, and its subject."""
LABELS = {"__init__": "import slimadam", "__main__": "python -m slimadam"}
WIDTH, HEIGHT = 0.84, 0.62
Graph = dict[str, set[str]]


def imports() -> Graph:
    """Return the other packages that each package of slimadam imports."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _files()}
    graph: Graph = {_package(path): set() for path in trees}
    for path, tree in trees.items():
        found = {name.split(".")[1] for name in _imported(tree) if name.startswith("slimadam.")}
        graph[_package(path)] |= (found & graph.keys()) - {_package(path)}
    return graph


def _files() -> Iterator[Path]:
    """Yield the package's files; an installation puts the kernels into ``slimadam/``."""
    yield from (path for path in (ROOT / "slimadam").rglob("*.py") if path.parts[len(ROOT.parts) + 1] != "kernels")
    yield from (ROOT / "kernels").rglob("*.py")


def _package(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each package, from 0; packages that import each other end in a RecursionError."""
    found: dict[str, int] = {}

    def floor(package: str) -> int:
        if package not in found:
            found[package] = 1 + max(map(floor, graph[package]), default=-1)
        return found[package]

    return {package: floor(package) for package in graph}


def reduced(graph: Mapping[str, set[str]]) -> Graph:
    """Return the graph without the imports that lead where others lead as well."""

    def below(package: str) -> set[str]:
        return graph[package].union(*map(below, graph[package]))

    return {package: found - set[str]().union(*map(below, found)) for package, found in graph.items()}


def description() -> str:
    """Return the drawn graph as text, which the picture carries, so that a test can tell an old picture."""
    return json.dumps({package: sorted(found) for package, found in sorted(reduced(imports()).items())})


def draw(path: Path = PICTURE) -> None:
    """Draw the packages on their floors."""
    graph = imports()
    height = floors(graph)
    with matplotlib.rc_context(WITHOUT_GRID):
        figure = Figure(figsize=(9, 7.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.axis("off")
        for package, found in reduced(graph).items():
            (x, subject), y = PACKAGES[package], height[package]
            _draw_package(axes, LABELS.get(package, package), subject, x, y)
            for other in found:
                end = (PACKAGES[other][0], height[other] + HEIGHT / 2)
                arrow = {"arrowstyle": "-|>", "color": REFERENCE_COLOUR}
                axes.annotate("", xy=end, xytext=(x, y - HEIGHT / 2), arrowprops=arrow)
        axes.set_xlim(-0.5, 3.5)
        axes.set_ylim(-0.5, max(height.values()) + 0.5)
        figure.savefig(path, dpi=100, metadata={"Description": description(), "Software": None})


def _draw_package(axes: Axes, label: str, subject: str, x: float, y: float) -> None:
    box = FancyBboxPatch(
        (x - WIDTH / 2, y - HEIGHT / 2),
        WIDTH,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="#eef3f8",
        edgecolor=COLOURS[0],
    )
    axes.add_patch(box)
    axes.text(x, y + 0.17, label, ha="center", va="center", weight="bold", size=10)
    axes.text(x, y - 0.11, subject, ha="center", va="center", size=8, linespacing=1.2)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw()
    print("written:", PICTURE)
