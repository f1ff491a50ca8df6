"""The page itself: puts tables, drawing and plots into the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from slimadam.measurement.history import ParameterSNR
from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels, network, tables
from slimadam.report.plots import DEPTH_COLOURS, MAX_ROLES, RolePlot
from slimadam.utils import formatting


def basic_facts(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> dict[str, str]:
    """What the plan and the measurements themselves tell."""
    compressed = sum(rule.form != "full" for rule in plan.values())
    facts = {"Parameters": f"{len(plan):,} tensors, {compressed:,} of them compressed"}
    elements = plan.second_moments[1]
    if elements:
        facts["Elements"] = f"{elements:,}"
    if plan.cutoff is not None:
        facts["SNR cutoff"] = f"{plan.cutoff:g}"
    if plan.expectation is not None:
        facts["To expect"] = str(plan.expectation)
    steps = sorted({step for parameter in measured.values() for step in parameter.values})
    if steps:
        facts["Measured"] = f"at {len(steps):,} optimizer steps, {steps[0]:,} to {steps[-1]:,}"
    return facts


def render(
    plan: CompressionPlan,
    *,
    title: str,
    facts: Mapping[str, str],
    figures: Sequence[tuple[str, Markup]],
    plots: Sequence[RolePlot],
) -> str:
    """The report as HTML.

    Args:
        plan: A plan with at least one parameter.
        title: Heading.
        facts: Rows of the list of facts.
        figures: Captions and inline SVG from the caller.
        plots: What :func:`slimadam.report.plots.role_plots` drew.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=_breakable, bytes=formatting.format_bytes, percent=formatting.format_percent)
    rows = tables.parameter_rows(plan)
    kinds = {decision.kind for row in rows for decision in row.decisions}
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        figures=figures,
        headline=tables.headline(plan),
        unknown_shapes=sum(rule.shape is None for rule in plan.values()),
        count=len(plan),
        strip=network.draw(plan),
        legend={kind: label for kind, label in labels.LEGEND.items() if kind in kinds},
        columns=[labels.dims_label(column) for column in tables.snr_columns(plan)],
        has_others=any(row.others for row in rows),
        roles=tables.role_rows(plan),
        plots=plots,
        max_roles=MAX_ROLES,
        depth_colours=DEPTH_COLOURS,
        cutoff=plan.cutoff,
        parameters=rows,
    )


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after each dot."""
    return Markup(".<wbr>").join(name.split("."))
