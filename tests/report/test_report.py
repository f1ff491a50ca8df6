"""The HTML report: its numbers are the plan's, it stands alone, and no name in it becomes markup."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import slimadam
from slimadam import CompressionPlan, PlanError, Rule, SNRHistory
from slimadam.report import labels, write_report
from slimadam.report.page import WIDTH, draw, headline, layer_of, parameter_rows
from slimadam.report.plots import MAX_LINES, MAX_ROLES, role_plots
from slimadam.state.rule import Candidate, dimension_subsets
from slimadam.utils import formatting

VOID = {"meta", "wbr", "br", "link", "img"}
HOSTILE = "<script>alert(1)</script>.$\\frac{\"&'.\ud800weight"


class Page(HTMLParser):
    """What a browser makes of a report: tags, tables as lists of rows of texts, visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data

    @property
    def parameters(self) -> dict[str, list[str]]:
        """The rows of the last table by their first cell."""
        return {row[0]: row[1:] for row in self.tables[-1][1:]}

    @property
    def roles(self) -> dict[str, list[str]]:
        """The rows of the first table, below its headings, by their first cell."""
        headings = [row[0] for row in self.tables[0]].index("Role")
        return {row[0]: row[1:] for row in self.tables[0][headings + 1 :]}


def record(history: SNRHistory, name: str, shape: tuple[int, ...], values: dict[Candidate, float]) -> None:
    for step in (1, 100, 200):
        history.record(step, name, shape, values)


@pytest.fixture
def history() -> SNRHistory:
    history = SNRHistory()
    record(history, "embed_tokens.weight", (50, 8), {(0,): 0.02, (1,): 1.62, (0, 1): 0.01, "factored": 1.9})
    for layer in range(3):
        query: dict[Candidate, float] = {(0,): 0.5, (1,): 2.0 + layer, (0, 1): 0.25, "factored": 8.0}
        record(history, f"layers.{layer}.attn.q_proj.weight", (8, 8), query)
        record(history, f"layers.{layer}.norm.weight", (8,), {(0,): 0.4})
    record(history, "layers.2.mlp.down_proj.weight", (8, 32), {(0,): 3.5, (1,): 0.7, (0, 1): 0.6, "factored": 7.0})
    return history


def report(tmp_path: Path, plan: CompressionPlan, history: SNRHistory | None = None, **options: object) -> Page:
    path = tmp_path / "report.html"
    write_report(path, plan, history, **options)  # type: ignore[arg-type]
    return Page(path)


def test_headline_and_tables_give_the_numbers_of_the_plan(tmp_path: Path, history: SNRHistory) -> None:
    plan = CompressionPlan.from_snr(history)
    page = report(tmp_path, plan, history)
    kept, full = plan.second_moments
    assert (kept, full) == (50 + 3 * 8 + 3 * 8 + 32, 400 + 3 * 64 + 3 * 8 + 256)
    paragraphs = [attributes for tag, attributes in page.tags if tag == "p"]
    texts = zip(paragraphs, page.texts["p"], strict=True)
    big = [text for attributes, text in texts if attributes.get("class") == "big"]
    assert big == [f"{100 * plan.second_moments_saved:.2f}% saved", f"{50 * plan.second_moments_saved:.2f}% saved"]
    exact = [attributes["title"] for tag, attributes in page.tags if tag == "p" and "title" in attributes]
    assert exact == [f"{4 * full:,} → {4 * kept:,} bytes", f"{8 * full:,} → {4 * (full + kept):,} bytes"]

    assert list(page.parameters) == list(plan)
    assert page.parameters["layers.1.attn.q_proj.weight"] == [
        "query", "8 × 8", "0.50", "3.00", "0.25", "8.00", "mean over dim 1", "64", "8",
        plan["layers.1.attn.q_proj.weight"].reason,
    ]  # fmt: skip
    assert page.parameters["layers.0.norm.weight"][:8] == [
        "norm", "8", "0.40", "–", "–", "–", "full", "8",
    ]  # fmt: skip
    assert page.roles["query"] == [
        "3", "8 × 8", "0.50", "3.00", "0.25", "8.00", "mean over dim 1", "192", "24", "87.50%",
    ]  # fmt: skip
    assert list(page.roles) == ["token embedding", "query", "mlp down", "norm"]


def test_the_page_needs_nothing_else(tmp_path: Path, history: SNRHistory) -> None:
    page = report(tmp_path, CompressionPlan.from_snr(history), history)
    links = [value for _, attributes in page.tags for key, value in attributes.items()
             if key in ("src", "href", "xlink:href", "srcset", "data", "action")]  # fmt: skip
    assert links
    assert all(value is not None and value.startswith("#") for value in links)
    assert {"script", "link", "iframe", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert "http" not in page.source
    assert "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#")


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, history: SNRHistory) -> None:
    plan = CompressionPlan.from_snr(history)
    first = report(tmp_path, plan, history).source
    assert report(tmp_path, plan, history).source == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    history = SNRHistory()
    record(history, HOSTILE, (4, 4), {(0,): 0.1, (1,): 2.0, (0, 1): 0.1, "factored": 3.0})
    rule = Rule((1,), "mean", (4, 4), {(1,): 2.0}, reason="<b>why</b>", role="<i>role</i>")
    page = report(
        tmp_path,
        CompressionPlan({HOSTILE: rule}),
        history,
        title="<u>title</u>",
        facts={"<em>fact</em>": "<s>value</s>"},
        figures=[("<h3>caption</h3>", "<svg><circle r='1'/></svg>")],
    )
    assert {"script", "b", "u", "em", "s", "h3"}.isdisjoint(tag for tag, _ in page.tags)
    shown = HOSTILE.replace("\ud800", "\ufffd")
    assert list(page.parameters) == [shown]
    assert page.parameters[shown][-1] == "<b>why</b>"
    assert list(page.roles) == ["<i>role</i>"]
    assert page.texts["h1"] == ["<u>title</u>"]
    assert "<em>fact</em>" in page.texts["dt"]
    assert "<s>value</s>" in page.texts["dd"]
    assert page.texts["figcaption"] == ["<h3>caption</h3>", "<i>role</i>"]
    # The layer's cell, and its line in each of the four panels, name it on hover.
    assert sum(text.startswith(shown) for text in page.texts["title"]) == 1 + 4


def test_infinite_nan_zero_and_huge_snr(tmp_path: Path) -> None:
    history = SNRHistory()
    record(history, "a.weight", (4, 4), {(0,): math.inf, (1,): math.nan, (0, 1): 0.0, "factored": 1e300})
    record(history, "b.weight", (4, 4), {(0,): math.nan})
    plan = CompressionPlan.from_snr(history)
    assert plan["a.weight"].dims == (0,)
    page = report(tmp_path, plan, history)
    assert page.parameters["a.weight"][2:5] == ["∞", "0.00", "1e+300"]
    assert page.parameters["b.weight"][2:5] == ["–", "–", "–"]
    plan = CompressionPlan({"c.weight": Rule(snr={(0,): math.nan, (1,): 2e-5}, shape=(4, 4))})
    assert report(tmp_path, plan).parameters["c.weight"][2:4] == ["n/a", "2e-05"]


def test_without_history_the_tables_remain_and_the_plots_go(tmp_path: Path, history: SNRHistory) -> None:
    plan = CompressionPlan.from_snr(history)
    page = report(tmp_path, plan)
    assert page.parameters["embed_tokens.weight"][2:6] == ["0.02", "1.62", "0.01", "1.90"]
    assert "figure" not in page.texts
    assert any("No measurements over training" in text for text in page.texts["p"])


def test_rules_in_the_authors_format_have_no_shapes(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"layers.0.attn.q_proj.weight": [1], "norm.weight": None}))
    page = report(tmp_path, CompressionPlan.load(path))
    assert page.parameters["layers.0.attn.q_proj.weight"] == [
        "query", "unknown", "mean over dim 1", "unknown", "unknown", "taken from a rules file",
    ]  # fmt: skip
    assert page.parameters["norm.weight"][0] == "norm"
    assert page.roles["query"][-1] == "–"
    assert any("The shapes of 2 of 2 parameters are unknown" in text for text in page.texts["p"])
    assert "%" not in "".join(page.texts["p"])


def test_history_fills_in_what_the_plan_lacks(tmp_path: Path, history: SNRHistory) -> None:
    plan = CompressionPlan({"_orig_mod.layers.0.attn.q_proj.weight": Rule((1,), "mean")})
    page = report(tmp_path, plan, history)
    row = page.parameters["_orig_mod.layers.0.attn.q_proj.weight"]
    assert row[1:] == ["8 × 8", "0.50", "2.00", "0.25", "8.00", "mean over dim 1", "64", "8", ""]
    assert page.texts["figcaption"] == ["query"]


def test_history_of_another_shape_than_the_rule_is_refused(tmp_path: Path, history: SNRHistory) -> None:
    plan = CompressionPlan({"layers.0.norm.weight": Rule((1,), "mean")})
    with pytest.raises(PlanError, match=r"'layers.0.norm.weight': dims=\(1,\) is out of range for shape \(8,\)"):
        report(tmp_path, plan, history)


def test_an_empty_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan has no parameters.*calibrate"):
        report(tmp_path, CompressionPlan({}), SNRHistory())
    assert list(tmp_path.iterdir()) == []


def test_figures_of_the_caller_are_embedded_without_prolog_and_metadata(tmp_path: Path) -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" class="mine">'
        '<metadata><a xlink:href="http://x"/></metadata><use xlink:href="#m"/></svg>\n'
    )
    plan = CompressionPlan({"a.weight": Rule(shape=(2, 2))})
    page = report(tmp_path, plan, figures=[("Loss.", svg)])
    assert '<svg class="mine"><use href="#m"/></svg>' in page.source
    assert "http" not in page.source
    with pytest.raises(ValueError, match=r"figures: 'loss.png' is not SVG"):
        report(tmp_path, plan, figures=[("Loss.", "loss.png")])


def test_larger_tensors_show_three_candidates_and_the_chosen(tmp_path: Path) -> None:
    values: dict[Candidate, float] = {dims: 1.5 + index / 10 for index, dims in enumerate(dimension_subsets(4))} | {
        "factored": 0.1
    }
    rule = Rule((0,), "mean", (4, 4, 3, 3), values, role="convolution")
    page = report(tmp_path, CompressionPlan({"conv.weight": rule}, cutoff=1.0))
    assert page.tables[-1][0][3:8] == ["dim 0", "dim 1", "dims 0, 1", "factored", "Other dims"]
    shown = "dims 0, 2, 3: 2.70dims 1, 2, 3: 2.80dims 0, 1, 2, 3: 2.90"
    assert page.parameters["conv.weight"][2:7] == ["1.50", "–", "–", "–", shown]


def test_decisions_of_a_role_are_counted(tmp_path: Path) -> None:
    rules = {f"layers.{layer}.attn.k_proj.weight": Rule((int(layer == 0),), "mean", (4, 4)) for layer in range(3)}
    rules["layers.3.attn.k_proj.weight"] = Rule(form="factored", shape=(4, 4))
    page = report(tmp_path, CompressionPlan(rules))
    assert page.roles["key"] == [
        "4", "4 × 4", "2 × mean over dim 01 × mean over dim 11 × factored", "64", "20", "68.75%",
    ]  # fmt: skip


def test_page_and_plots_stay_modest_for_hundreds_of_parameters(tmp_path: Path) -> None:
    history = SNRHistory()
    for layer in range(50):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for step in range(1, 1000, 10):
                values: dict[Candidate, float] = {(0,): 0.5, (1,): step + layer / 7, (0, 1): 0.1, "factored": step / 3}
                history.record(step, f"layers.{layer}.attn.{leaf}.weight", (64, 64), values)
    plan = CompressionPlan.from_snr(history)
    page = report(tmp_path, plan, history)
    assert len(page.parameters) == 200
    assert len(page.source.encode()) < 1_000_000
    assert page.texts["figcaption"][0] == f"query {MAX_LINES} of 50 drawn"


def test_only_the_largest_roles_are_plotted(history: SNRHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = CompressionPlan.from_snr(history)
    assert [plot.role for plot in role_plots(plan, history)] == ["token embedding", "query", "mlp down", "norm"]
    assert MAX_ROLES >= 20
    monkeypatch.setattr("slimadam.report.plots.MAX_ROLES", 2)
    assert [plot.role for plot in role_plots(plan, history)] == ["token embedding", "mlp down"]


def test_each_measured_parameter_is_one_line_per_panel(history: SNRHistory) -> None:
    plots = {plot.role: plot for plot in role_plots(CompressionPlan.from_snr(history), history)}
    query = plots["query"]
    assert (query.drawn, query.count) == (3, 3)
    assert query.svg.count("<title>layers.1.attn.q_proj.weight</title>") == 4
    assert "dim 1 · chosen for 3 of 3" in query.svg
    assert {f"var(--depth-{depth})" in query.svg for depth in (0, 4, 7)} == {True}
    assert query.svg.count("stroke: var(--cutoff)") == 4
    assert plots["norm"].svg.count("<title>layers.1.norm.weight</title>") == 1
    assert plots["norm"].width < query.width


def test_strip_has_a_row_per_layer_and_cells_that_fit() -> None:
    plan = CompressionPlan(
        {
            "embed.weight": Rule((1,), "mean", (1000, 16)),
            "blocks.0.norm.weight": Rule(shape=(16,)),
            "blocks.0.mlp.up.weight": Rule((0,), "mean", (64, 16)),
            "blocks.1.mlp.up.weight": Rule((0, 1), "mean", (64, 16)),
            "blocks.1.extra": Rule(form="factored", shape=(16, 16)),
            "head.weight": Rule(),
        }
    )
    drawing = draw(plan)
    assert [row.name for row in drawing] == ["embed", "blocks.0", "blocks.1", "head"]
    kinds = [[cell.kind for cell in row.cells] for row in drawing]
    assert kinds == [["dim1"], ["full", "dim0"], ["other", "factored"], ["full"]]
    assert drawing[1].cells[1].label == "up"
    assert drawing[1].cells[1].hover == "blocks.0.mlp.up.weight\n64 × 16: mean over dim 0"
    ends = [row.cells[-1].x + row.cells[-1].width for row in drawing]
    assert max(ends) == pytest.approx(WIDTH, abs=4)
    assert drawing[1].cells[1].width == pytest.approx(drawing[2].cells[0].width)


@pytest.mark.parametrize("count", [1, 3000])
def test_strip_of_one_layer_stays_inside_the_drawing(count: int) -> None:
    plan = CompressionPlan({f"params.{index}": Rule(shape=(8, 8)) for index in range(count)})
    (row,) = draw(plan)
    assert all(cell.width > 0 for cell in row.cells)
    assert row.cells[-1].x + row.cells[-1].width <= WIDTH


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11"),
        ("model.norm.weight", "model.norm"),
        ("param_groups.0.params.7", "param_groups.0"),
        ("0.weight", "0"),
        ("scale", "scale"),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (80_360, "80.4 kB"), (999_600, "1 MB"), (4_976_000_000, "4.98 GB"),
     (2 * 10**15, "2,000 TB")],
)  # fmt: skip
def test_format_bytes(count: int, text: str) -> None:
    assert formatting.format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.0042, "0.004"), (0.25, "0.25"), (4.284, "4.28"), (17.26, "17.3"), (1234.4, "1,234"),
     (3e-4, "3e-04"), (2e6, "2e+06"), (math.inf, "∞"), (math.nan, "n/a")],
)  # fmt: skip
def test_format_snr(value: float, text: str) -> None:
    assert labels.format_snr(value) == text


def test_averages_over_layers_leave_out_what_is_not_a_number() -> None:
    average = labels.average_over_layers([{(0,): 1.0, (1,): math.inf}, {(0,): math.nan}, {(0,): 4.0, (1,): math.inf}])
    assert average == {(0,): 2.5, (1,): math.inf}
    assert math.isnan(labels.average_over_layers([{(0,): math.nan}])[0,])


def test_unknown_roles_are_grouped_by_name_without_layer_numbers() -> None:
    plan = CompressionPlan({f"net.{layer}.w7": Rule(shape=(2, 2)) for layer in range(3)})
    assert labels.names_by_role(plan) == {"net.*.w7": list(plan)}
    assert parameter_rows(plan)[0].role == ""


def test_optimizer_state_counts_a_full_momentum() -> None:
    plan = CompressionPlan({"a.weight": Rule((1,), "mean", (10, 20)), "b": Rule(shape=(5,))})
    moments, state = headline(plan)
    assert (moments.before, moments.after) == (4 * 205, 4 * 15)
    assert (state.before, state.after) == (8 * 205, 4 * 205 + 4 * 15)
    assert moments.saved == pytest.approx(plan.second_moments_saved)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_libraries_matter_only_to_write_report(tmp_path: Path, missing: str) -> None:
    plan_path = tmp_path / "plan.json"
    CompressionPlan({"a.weight": Rule(shape=(2, 2))}).save(plan_path)
    script = f"""
import sys
sys.modules[{missing!r}] = None
import slimadam
from slimadam.report import write_report
plan = slimadam.CompressionPlan.load(sys.argv[1])
try:
    write_report(sys.argv[2], plan)
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, plan_path, tmp_path / "report.html"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(slimadam.__file__).parents[1],
    )
    assert done.stdout.strip() == missing
    assert not (tmp_path / "report.html").exists()
