"""The calibration report: one self-contained HTML page about a compression plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slimadam.measurement.history import ParameterSNR, SNRHistory
from slimadam.plans.plan import CompressionPlan
from slimadam.utils.atomic_write import write_whole
from slimadam.utils.errors import PlanError

__all__ = ["write_report"]


def write_report(
    path: str | Path,
    plan: CompressionPlan,
    history: SNRHistory | None = None,
    *,
    title: str = "Calibration report",
    facts: Mapping[str, str] | None = None,
    figures: Sequence[tuple[str, str]] = (),
) -> None:
    """Write what a plan saves, what was measured and why each parameter was decided as it was.

    The page needs no other file and no network. The same arguments give the same bytes. An existing file is
    replaced in one move. Needs jinja2 and matplotlib (``pip install slimadam[cli]``).

    Args:
        path: The HTML file to write.
        plan: The plan to report on, with at least one parameter. Bytes are counted at 4 per element.
        history: The measurements behind it, for the plots; also fills in shapes and averaged SNRs that the plan
            lacks.
        title: Heading of the page.
        facts: Further rows for the list of facts, for instance the script and the learning rate.
        figures: Pairs of caption and SVG markup, shown at the top. The markup is trusted and not escaped.

    Raises:
        PlanError: The plan is empty, or contradicts the shapes in the history.
        ValueError: A figure is not SVG.
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    # These need jinja2 and matplotlib, which training itself does without.
    from slimadam.report import page, plots

    if not plan:
        raise PlanError("plan has no parameters, so there is nothing to report; calibrate a model first")
    measured = _by_plan_name(plan, history) if history is not None else {}
    completed = _completed(plan, measured)
    html = page.render(
        completed,
        title=title,
        facts={**page.basic_facts(completed, measured), **(facts or {})},
        figures=[(caption, plots.inline_svg(svg)) for caption, svg in figures],
        plots=plots.role_plots(completed, measured),
    )
    write_whole(path, html)


def _by_plan_name(plan: CompressionPlan, history: SNRHistory) -> dict[str, ParameterSNR]:
    matched = ((plan.match(name), measured) for name, measured in history.items())
    return {name: measured for name, measured in matched if name is not None}


def _completed(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> CompressionPlan:
    """The plan with shapes, averaged SNRs and roles from the measurements where it has none itself."""
    rules = dict(plan)
    for name, found in measured.items():
        rule = plan[name]
        rules[name] = replace(
            rule,
            shape=found.shape if rule.shape is None else rule.shape,
            snr=rule.snr or found.average(),
            role=rule.role or found.role,
        )
    return CompressionPlan(rules, cutoff=plan.cutoff)
