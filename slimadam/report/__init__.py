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
        history: The measurements, for the plots; also fills in shapes and averaged SNRs that the plan lacks.
        title: Heading of the page.
        facts: Further rows for the list of facts, for instance the script and the learning rate.
        figures: Pairs of caption and SVG markup, shown at the top. The markup is trusted and not escaped.

    Raises:
        PlanError: The plan is empty, or contradicts the shapes in the history.
        ValueError: A figure is not SVG.
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    from slimadam.report.page import render  # needs jinja2 and matplotlib, which training itself does without

    if not plan:
        raise PlanError("plan has no parameters, so there is nothing to report; calibrate a model first")
    measured: dict[str, ParameterSNR] = {}
    rules = dict(plan)
    for key, found in ({} if history is None else history).items():
        name = plan.match(key)
        if name is not None:
            measured[name] = found
            rule = plan[name]
            rules[name] = replace(
                rule,
                shape=found.shape if rule.shape is None else rule.shape,
                snr=rule.snr or found.average(),
                role=rule.role or found.role,
            )
    write_whole(path, render(CompressionPlan(rules, cutoff=plan.cutoff), measured, title, facts or {}, figures))
