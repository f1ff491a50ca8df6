"""The Markdown page of a GPU run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Items = Mapping[str, Any]


def page(run: Mapping[str, Any], stages: Mapping[str, Items]) -> str:
    """Return a page with device, versions and date, every missed bar, and a section for each stage.

    Args:
        run: Machine, device and summary of the run.
        stages: Items of each stage.
    """
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["accelerator"] if run["device"] != "cpu" else machine["processor"]
    lines = [
        "# SlimAdam on " + str(where),
        "",
        f"{machine['date']}, Python {machine['python']}, {versions}, CUDA {machine['cuda']}, {run['seconds']} s in all."
        + (" A quick run with tiny sizes: its times mean nothing." if run["quick"] else ""),
        "",
        *([f"- FAIL {line}" for line in run["missed"]] or ["Everything passed."]),
    ]
    sections = {
        "checks": _checks,
        "throughput": _throughput,
        "clipping": _clipping,
        "memory": _memory,
        "training": _training,
    }
    for name, items in stages.items():
        done = {label: item for label, item in items.items() if "failed" not in item}
        failed = {label: item["failed"] for label, item in items.items() if "failed" in item}
        lines += ["", f"## {name.capitalize()}", "", *sections[name](done)]
        lines += [f"\n{label} FAILED:\n\n```text\n{reason.strip()}\n```" for label, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _checks(items: Items) -> list[str]:
    """Return how far each check is from float64."""
    rows = []
    for name, item in items.items():
        backends = ", ".join(f"{backend} {count}" for backend, count in item.get("backends", {}).items())
        worst = (
            f"{item['worst_share_of_rounding']:.2f}"
            if "backends" in item
            else f"not applicable: {item['not_applicable']}"
        )
        rows.append([name.replace("_", " "), worst, backends, f"{item['seconds']:.1f} s"])
    intro = "Largest difference to the formula in float64, as a share of what rounding explains (1 is the limit)."
    return [intro, "", *_table(["check", "difference", "updated by", "time"], rows)]


def _throughput(items: Items) -> list[str]:
    lines: list[str] = []
    heads = ["", "ms", "of AdamW fused", "GB/s", "of copy", "state B/parameter", "peak", "launches", "host ms"]
    for name, item in items.items():
        rows = [
            [
                label,
                f"{row['milliseconds']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['gigabytes_per_second']:.0f}",
                f"{row['share_of_copy_bandwidth']:.0%}",
                f"{row['state_bytes_per_parameter']:.3f}",
                _optional(row.get("peak_bytes_per_parameter"), ".3f"),
                _optional(row.get("launches"), "d"),
                _optional(row.get("host_milliseconds"), ".3f"),
            ]
            for label, row in item["rows"].items()
        ]
        lines += [f"### {name}, {item['elements']:,} parameters", "", *_table(heads, rows), *_bars(item)]
        lines += ["", *(f"- left out: {label}: {reason}" for label, reason in item["left_out"].items()), ""]
    return lines


def _clipping(items: Items) -> list[str]:
    lines = ["Gradients clipped before the step, and within it (`max_grad_norm`); clipping is part of the time.", ""]
    for name, item in items.items():
        rows = [[label, f"{row['milliseconds']:.3f}", f"{row['ratio']:.3f}"] for label, row in item["rows"].items()]
        lines += [f"### {name}", "", *_table(["", "ms", "of the first"], rows), ""]
    return lines


def _memory(items: Items) -> list[str]:
    lines = [
        "Bytes per parameter: weights, gradients and state. In backward, gradients are freed as they are used.",
        "",
    ]
    for name, item in items.items():
        rows = [
            [row["optimizer"], "yes" if row["in_backward"] else "", *(_optional(row[key], ".3f") for key in _BYTES)]
            for row in item["rows"]
        ]
        heads = ["", "in backward", "between steps", "peak", "computed: between steps", "peak", "CUDA's peak"]
        lines += [f"### {name}", "", *_table(heads, rows), *_bars(item)]
        lines += ["", *(f"- left out: {label}: {reason}" for label, reason in item["left_out"].items()), ""]
    return lines


_BYTES = ("held", "peak", "computed_held", "computed", "cuda_peak")


def _training(items: Items) -> list[str]:
    if not items:
        return []
    settings = next(iter(items.values()))["settings"]
    words = (
        f"{settings['layers']} layers of width {settings['width']}, vocabulary {settings['vocabulary']}, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['context']} bytes of Python's standard "
        f"library, bfloat16 autocast, learning rate {settings['lr']:g}, the same batches for each."
    )
    rows = [
        [
            label,
            f"{item['held_out_loss']:.4f}",
            f"{item['tokens_per_second']:,.0f}",
            f"{item['state_bytes'] / 1e6:,.1f} MB",
            _optional(item.get("peak_bytes", 0) / 1e9 or None, ".2f"),
            _optional(item.get("second_moments_saved"), ".1%"),
        ]
        for label, item in items.items()
    ]
    heads = ["", "held-out loss", "tokens/s", "state", "peak GB", "second moments saved"]
    marks = [round(settings["steps"] * share / 10) - 1 for share in range(1, 11)]
    curves = [[label, *(f"{item['losses'][mark]:.3f}" for mark in marks)] for label, item in items.items()]
    return [words, "", *_table(heads, rows), "", *_table(["loss at step", *(str(mark + 1) for mark in marks)], curves)]


def _bars(item: Mapping[str, Any]) -> list[str]:
    return [""] + [
        f"- {'pass' if bar['passed'] else 'FAIL'}: {bar['name']}: {_value(bar['value'])} (bar: {bar['limit']})"
        for bar in item["bars"]
    ]


def _value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _optional(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
