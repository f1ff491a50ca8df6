"""The page itself: puts tables, drawing and plots into the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from slimadam.measurement.history import ParameterSNR
from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels, network, plots, tables
from slimadam.utils.formatting import format_bytes


def render(
    plan: CompressionPlan,
    measured: Mapping[str, ParameterSNR],
    title: str,
    facts: Mapping[str, str],
    figures: Sequence[tuple[str, str]],
) -> str:
    """Return the report as HTML.

    Args:
        plan: A plan with at least one parameter.
        measured: Measurements by the plan's parameter names.
        title: Heading.
        facts: Further rows of the list of facts.
        figures: Captions and SVG markup from the caller.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breakable=lambda name: Markup(".<wbr>").join(name.split(".")), bytes=format_bytes, percent="{:.2%}".format
    )
    rows = tables.parameter_rows(plan)
    kinds = set(map(labels.decision_kind, plan.values()))
    return environment.get_template("report.html.j2").render(
        title=title,
        facts={**_basic_facts(plan, measured), **facts},
        figures=[(caption, plots.inline_svg(svg)) for caption, svg in figures],
        headline=tables.headline(plan),
        plan=plan,
        layers=network.draw(plan),
        width=network.WIDTH,
        legend={kind: label for kind, label in labels.LEGEND.items() if kind in kinds},
        columns=[labels.dims_label(column) for column in tables.snr_columns(plan)],
        has_others=any(row.others for row in rows),
        roles=tables.role_rows(plan),
        plots=plots.role_plots(plan, measured),
        max_roles=plots.MAX_ROLES,
        depth_colours=plots.DEPTH_COLOURS,
        parameters=rows,
    )


def _basic_facts(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> dict[str, str]:
    compressed = sum(rule.form != "full" for rule in plan.values())
    facts = {"Parameters": f"{len(plan):,} tensors, {compressed:,} of them compressed"}
    if elements := plan.second_moments[1]:
        facts["Elements"] = f"{elements:,}"
    if plan.cutoff is not None:
        facts["SNR cutoff"] = f"{plan.cutoff:g}"
    if plan.expectation is not None:
        facts["To expect"] = str(plan.expectation)
    steps = sorted({step for parameter in measured.values() for step in parameter.values})
    if steps:
        facts["Measured"] = f"at {len(steps):,} optimizer steps, {steps[0]:,} to {steps[-1]:,}"
    return facts
