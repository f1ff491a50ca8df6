"""The Markdown page of a GPU run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Items = Mapping[str, Any]


def page(run: Mapping[str, Any], stages: Mapping[str, Items]) -> str:
    """Return a page with device, versions and date, every missed bar, and a section for each stage.

    Args:
        run: Machine, device, what was missed, and the stages that are still to come.
        stages: Items of each stage.
    """
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["accelerator"] if run["device"] != "cpu" else machine["processor"]
    verdict = [f"- FAIL {line}" for line in run["missed"]]
    verdict += [f"- still to come: {name}" for name in run["to_come"]]
    lines = [
        "# SlimAdam on " + str(where),
        "",
        f"{machine['date']}, Python {machine['python']}, {versions}, CUDA {machine['cuda']}, {run['seconds']} s in all."
        + (" A quick run with tiny sizes: its times mean nothing." if run["quick"] else ""),
        "",
        *(verdict or ["Everything passed."]),
    ]
    sections = {
        "checks": _checks,
        "throughput": _throughput,
        "clipping": _clipping,
        "memory": _memory,
        "short_training": _training,
        "training": _training,
        "sweep": _sweep,
    }
    for name, items in stages.items():
        done = {label: item for label, item in items.items() if "failed" not in item}
        failed = {label: item["failed"] for label, item in items.items() if "failed" in item}
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", *sections[name](done)]
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


def _training(every: Items) -> list[str]:
    waiting = [f"- {item['unfinished']}: {label}" for label, item in every.items() if "settings" not in item]
    items = {label: item for label, item in every.items() if "settings" in item}
    if not items:
        return waiting
    settings = next(iter(items.values()))["settings"]
    words = (
        f"{settings['layers']} layers of width {settings['width']}, vocabulary {settings['vocabulary']}, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['context']} bytes of Python's standard "
        "library, bfloat16 autocast, the same batches for each. Peaks are of all steps, and of the last ones."
    )
    rows = [
        [
            label,
            item.get("unfinished", ""),
            _optional(item["held_out"][-1][1] if item["held_out"] else None, ".4f"),
            _optional(item.get("tokens_per_second"), ",.0f"),
            f"{item['state_bytes'] / 1e6:,.1f} MB",
            _optional(item.get("peak_bytes", 0) / 1e9 or None, ".2f"),
            _optional(item.get("last_peak_bytes", 0) / 1e9 or None, ".2f"),
            _optional(item.get("second_moments_saved"), ".1%"),
        ]
        for label, item in items.items()
    ]
    heads = ["", "not finished", "held-out loss", "tokens/s", "state", "peak GB", "at the end", "second moments saved"]
    marks = max((item["held_out"] for item in items.values()), key=len)
    curves = [[label, *(f"{loss:.4f}" for _, loss in item["held_out"])] for label, item in items.items()]
    filled = [row + [""] * (1 + len(marks) - len(row)) for row in curves]
    return [
        words,
        "",
        *_table(heads, rows),
        "",
        *_table(["held-out loss at step", *(str(mark) for mark, _ in marks)], filled),
        "",
        *waiting,
    ]


def _sweep(items: Items) -> list[str]:
    rows = []
    for name, item in items.items():
        found = item.get("milliseconds", {})
        times = {label: value for label, value in found.items() if not isinstance(value, str)}
        best = min(times, key=times.__getitem__, default="")
        now = next(iter(found), "")
        ratio = times[best] / times[now] if now in times else None
        unusable = str(len(found) - len(times)) if found else f"not applicable: {item['not_applicable']}"
        rows.append([name, best, _optional(times.get(best), ".4f"), now, _optional(times.get(now), ".4f"),
                     _optional(ratio, ".3f"), unusable])  # fmt: skip
    heads = ["kernel and width", "fastest", "ms", "at present", "ms", "of present", "cannot be launched"]
    return ["Launch settings: lines x columns of a tile, and its warps.", "", *_table(heads, rows)]


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
