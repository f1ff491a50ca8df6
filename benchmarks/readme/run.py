"""Put the committed figures into the README and the docs: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks import ROOT
from benchmarks.equivalence.ablation import markdown as ablation_table
from benchmarks.equivalence.expectation import markdown as expectation_table
from benchmarks.equivalence.report import markdown as equivalence_tables
from benchmarks.harness.comparison import SLOW
from benchmarks.harness.machine import RESULTS
from benchmarks.peak.run import markdown as peak_tables
from benchmarks.readme import calibration, scale, sharpness, warmup
from benchmarks.readme.markdown import origin, table
from benchmarks.readme.mix import mix

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
HOST_TIMES = ("SlimAdam", "AdamW (fused)")
SECTION = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def throughput(result: dict[str, Any]) -> str:
    """Return the time of a step and bytes of state, each against fused AdamW's."""
    rows = [
        [label, f"{row['ratio']:.2f}", f"{row['state_bytes_per_parameter']:.2f}",
         f"{row['share_of_copy_bandwidth']:.0%}"]
        for label, row in result["rows"].items()
    ]  # fmt: skip
    left_out = [f"- {label}: {reason}" for label, reason in result["left_out"].items()]
    return "\n".join(
        [
            "One step over the shapes of GPT-2 124M in float32 on a CPU, all optimizers in one run, "
            "SlimAdam's rows the medians of three: time against that "
            f"of a step of fused AdamW beside it ({result['rows']['AdamW (fused)']['milliseconds']:.0f} ms), bytes of "
            f"state for each parameter, and the bandwidth reached by the bytes that must move, against a copy's; "
            f"{result['machine']['threads']} threads, medians of {result['rounds']}{_of_slow(result)} "
            f"{origin(result['machine'])}, `python -m benchmarks.throughput --runs 3`:",
            "",
            table(["", "time", "state", "of copy"], rows),
            *(["", "Not measured:", "", *left_out] if left_out else []),
        ]
    )


def equivalence(result: dict[str, Any]) -> str:
    """Return held-out losses of all optimizers against AdamW's, each at its own best rate."""
    return f"Measured {origin(result['machine'])}.\n\n{equivalence_tables(result).strip()}"


def ablation(result: dict[str, Any]) -> str:
    """Return what each form costs by itself."""
    return (
        f"Mean differences to AdamW's held-out loss at its best rate, {result['seeds']} seeds each, in brackets bytes "
        f"of state for each parameter {origin(result['machine'])}, `python -m benchmarks.ablation`:\n\n"
        f"{ablation_table(result)}"
    )


def expectation(result: dict[str, Any]) -> str:
    """Return the line that ``plan.expectation`` follows, and its errors."""
    return f"`python -m benchmarks.expectation` {origin(result['machine'])}: {expectation_table(result)}"


def host_time(result: dict[str, Any]) -> str:
    """Return what a step on CUDA takes of the host, beside fused AdamW's."""
    found = result["microseconds"]
    rows = [
        [
            f"gradients {where}",
            *(f"{found[f'{label}, gradients {where}']:.0f} us" for label in HOST_TIMES),
            f"{ratio:.2f}",
        ]
        for where, ratio in result["ratios"].items()
    ]
    return (
        "The host's part of a step on CUDA with rules, over the 196 tensors of a GPT-2 that is 64 wide: "
        f"{found['launches']:.0f} launches, one more than at full width, since rows shorter than 256 take their own. "
        "Launches end where the GPU would begin; of torch's fused call only what raises versions is timed. Shortest of "
        f"1,000 steps, bar {result['bar']:g} {origin(result['machine'])}, `python -m benchmarks.host_time`:\n\n"
        f"{table(['', *HOST_TIMES, 'ratio'], rows)}"
    )


def _of_slow(result: dict[str, Any]) -> str:
    fewest = min(len(row["ratios"]) for label, row in result["rows"].items() if label != "AdamW (fused)")
    return f" ({fewest} of what takes over {SLOW} times as long)" if fewest < result["rounds"] else ""


def throughput_narrow(result: dict[str, Any]) -> str:
    """Return the time of a step over tensors that stay in cache."""
    rows = [[label, f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}"] for label, row in result["rows"].items()]
    return "\n".join(
        [
            f"One step over the 196 tensors of a GPT-2 64 wide, {result['elements'] / 1e6:.1f} million parameters, in "
            "float32 on a CPU; relative to fused AdamW the median of steps side by side; "
            f"{result['machine']['threads']} threads, medians of {result['rounds']}{_of_slow(result)} "
            f"{origin(result['machine'])}, "
            "`python -m benchmarks.throughput --model gpt2-narrow --rounds 201 --runs 3 --peers "
            '--only "AdamW (default)" "SlimAdam*"`:',
            "",
            table(["", "ms", "of fused AdamW"], rows),
        ]
    )


def throughput_busy(result: dict[str, Any]) -> str:
    """Return the time of a step while other processes keep cores busy."""
    found = result["rows"]
    rows = [[label, f"{row['milliseconds']:.0f}", f"{row['ratio']:.2f}"] for label, row in found.items()]
    return "\n".join(
        [
            f"{result['model']} in float32 while {result['busy_processes']} other process keeps a core busy, as a data "
            f"loader does; {result['machine']['threads']} threads, medians of {result['rounds']} "
            f"{origin(result['machine'])}, `python -m benchmarks.throughput --busy {result['busy_processes']} --peers "
            '--only "AdamW (default)" "SlimAdam*"`:',
            "",
            table(["", "ms", "of fused AdamW"], rows),
        ]
    )


def throughput_of_model(result: dict[str, Any]) -> str:
    """Return the time of a step over another model's shapes, in short."""
    found = result["rows"]
    rows = [[label, f"{row['ratio']:.2f}", f"{row['state_bytes_per_parameter']:.2f}"] for label, row in found.items()]
    command = (
        f"python -m benchmarks.throughput --model {result['model']} --rounds {result['rounds']} --peers "
        '--only "AdamW (default)" "SlimAdam (rules*" "SlimAdam (factored*"'
    )
    return "\n".join(
        [
            f"{result['model']}, {result['elements'] / 1e6:.0f} million parameters, in float32 on a CPU, against "
            f"fused AdamW beside it ({found['AdamW (fused)']['milliseconds']:.0f} ms); {result['machine']['threads']} "
            f"threads, medians of {result['rounds']} {origin(result['machine'])}, `{command}`:",
            "",
            table(["", "time", "state"], rows),
        ]
    )


def throughput_in_short(result: dict[str, Any]) -> str:
    """Return the rows of the throughput that decide, for the README."""
    rows = {
        label: row for label, row in result["rows"].items()
        if label.startswith(("AdamW", "SlimAdam (rules", "SlimAdam (factored"))
    }  # fmt: skip
    return throughput({**result, "rows": rows, "left_out": {}})


def clipping(result: dict[str, Any]) -> str:
    """Return the time of a step and the clipping of its gradients, within it and before it."""
    rows = [[label, f"{row['ratio']:.2f}"] for label, row in result["rows"].items()]
    first = next(iter(result["rows"].values()))["milliseconds"]
    return "\n".join(
        [
            f"Clipping and step over the shapes of GPT-2 124M in float32 on a CPU, against the first row ({first:.0f} "
            f"ms); {result['machine']['threads']} threads, medians of {result['rounds']} in turn "
            f"{origin(result['machine'])}, "
            "`python -m benchmarks.clipping`:",
            "",
            table(["", "time"], rows),
        ]
    )


def memory(result: dict[str, Any]) -> str:
    """Return the bytes of training per parameter: kept between steps, and at most."""
    found = result["models"]["gpt2-small"]["rows"]
    cells = {(row["recipe"], row["optimizer"], row["in_backward"]): row for row in found}
    recipes = list(dict.fromkeys(row["recipe"] for row in found))
    rows = [
        [optimizer, *(_bytes(cells.get((recipe, optimizer, after))) for recipe in recipes for after in (False, True))]
        for optimizer in dict.fromkeys(row["optimizer"] for row in found)
    ]
    heads = [f"{recipe}{after}" for recipe in recipes for after in ("", ", in backward")]
    left_out = result["models"]["gpt2-small"]["left_out"].items()
    return "\n".join(
        [
            f"GPT-2 124M, bytes per parameter {origin(result['machine'])}, `python -m benchmarks.memory`; in brackets "
            "the peak, where it is higher than what is kept between steps:",
            "",
            table(["", *heads], rows),
            *(["", "Not measured:", "", *(f"- {label}: {reason}" for label, reason in left_out)] if left_out else []),
        ]
    )


def _bytes(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    held, peak = row["held"], row["peak"]
    return f"{held:.2f}" if peak < 1.005 * held else f"{held:.2f} ({peak:.2f})"


def peak_memory(result: dict[str, Any]) -> str:
    """Return the peaks of trainings, and of what is done with checkpoints."""
    return (
        f'GPT-2 124M in float32 on a CPU, one sequence of {result["tokens"]} tokens a step, `plan="auto"` deciding at '
        f"its second step {origin(result['machine'])}, `python -m benchmarks.peak_memory`: the peak of all tensors, "
        "activations included, and of the process's pages beyond those from before there was a model, in bytes per "
        "parameter; then what a step holds for a while beyond what was there and what is left, in MB:\n\n"
        f"{peak_tables(result)}"
    )


def kernels(result: dict[str, Any]) -> str:
    """Return the resources of the compiled Triton kernels: the largest of each kernel's variants."""
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for variant in result["variants"]:
        by_kernel.setdefault(variant["kernel"], []).append(variant)
    rows = []
    for name, found in by_kernel.items():
        registers = [one["registers"] for one in found]
        spilled, shared = sum(one["spilled_bytes"] for one in found), max(one["shared_bytes"] for one in found)
        rows.append([f"`{name}`", str(len(found)), f"{min(registers)} to {max(registers)}", str(spilled), str(shared),
                     *_plain_on_hopper(found)])  # fmt: skip
    header = ["kernel", "variants", "registers a thread", "bytes spilled", "shared memory, bytes",
              "bytes a parameter, fp32, bf16", "predicted share of bandwidth, fp32, bf16"]  # fmt: skip
    return "\n".join(
        [
            f"Compiled for sm_80 and sm_90 by Triton {result['triton']} without a GPU, `python -m benchmarks.kernels` "
            f"{origin(result['machine'])}:",
            "",
            table(header, rows),
            "",
            f"The last two columns are of sm_90 and plain steps. {result['model']}",
        ]
    )


def launches(result: dict[str, Any]) -> str:
    """Return launches and bytes of a step in Triton."""
    rows = [
        [row["model"], row["plan"], str(row["launches"]), f"{row['bytes_per_parameter']:.2f}"] for row in result["rows"]
    ]
    return "\n".join(
        [
            "Launches and bytes of a float32 step, counted from its list of work by `python -m benchmarks.launches` "
            f"{origin(result['machine'])}; a gradient counts twice where a slab is larger than 10 MB, as that of a "
            "large factored matrix is, which has to be summed as a whole:",
            "",
            table(["model", "plan", "launches", "bytes a parameter"], rows),
        ]
    )


def _plain_on_hopper(found: list[dict[str, Any]]) -> list[str]:
    """Return bytes a parameter and predicted shares of a kernel's variants on sm_90, in float32 and bfloat16."""
    moved, shares = [], []
    for precision in ("fp32", "bf16"):
        plain = [one for one in found if (one["architecture"], one["precision"]) == (90, precision) and one["is_plain"]]
        if plain:
            lowest, highest = (f"{choice(one['predicted_share'] for one in plain):.0%}" for choice in (min, max))
            moved.append(f"{plain[0]['bytes_per_parameter']:.0f}")
            shares.append(lowest if lowest == highest else f"{lowest} to {highest}")
    return [", ".join(moved) or "–", ", ".join(shares) or "–"]


def parity(result: dict[str, Any]) -> str:
    """Return how exact the step is."""
    ulps = " and ".join(f"{value:.1f} ulp ({dtype.removeprefix('torch.')})" for dtype, value in result["ulps"].items())
    return (
        f"Largest difference to AdamW over 25 steps and all options: {ulps}, of values of 0.01 and more. "
        "Largest difference of a compressed float32 parameter to float64 after 12 steps: "
        f"{result['float64_error']:.1e} {origin(result['machine'])}."
    )


def demo(result: dict[str, Any]) -> str:
    """Return the demo's table: one column a seed."""
    runs = result["runs"]
    figures: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("held-out loss, AdamW", lambda run: f"{run['adamw']['held_out_loss']:.4f}"),
        ("SlimAdam, averages", lambda run: f"{run['slimadam']['held_out_loss']:.4f} ({run['loss_gap']:+.2%})"),
        ("SlimAdam, best form", lambda run: f"{run['best']['held_out_loss']:.4f} ({run['best']['loss_gap']:+.2%})"),
        ("second moments saved, averages", lambda run: f"{_saved(run, 'slimadam', 'second_moment_bytes'):.1%}"),
        ("second moments saved, best form", lambda run: f"{_saved(run, 'best', 'second_moment_bytes'):.1%}"),
        ("whole optimizer state saved, best form", lambda run: f"{_saved(run, 'best', 'state_bytes'):.1%}"),
        ("time of a step against AdamW as it comes, averages", lambda run: _times(run, "slimadam")),
        ("time of a step against AdamW as it comes, best form", lambda run: _times(run, "best")),
    ]
    machine = {"processor": result["machine"]["cpu"], "cores": result["machine"]["cores"], "date": result["date"][:10]}
    versions = {"python": result["versions"]["python"], "versions": result["versions"]}
    rows = [[label, *map(show, runs)] for label, show in figures]
    return "\n".join(
        [
            f"What `slimadam demo` prints with `--seed` 0, 1 and 2 {origin({**machine, **versions})}:",
            "",
            table(["", *(f"seed {run['seed']}" for run in runs)], rows),
        ]
    )


def _times(run: dict[str, Any], plan: str) -> str:
    return f"{run[plan]['median_optimizer_ms'] / run['adamw']['median_optimizer_ms']:.1f} x"


def _saved(run: dict[str, Any], plan: str, what: str) -> float:
    share: float = 1 - run[plan][what] / run["adamw"][what]
    return share


def interop(result: dict[str, Any]) -> str:
    """Return the figures of each library's run."""
    rows = [
        [run["integration"], run["model"], f"{run['matched']} of {run['parameters']}", f"{run['saved']:.1%}",
         f"{run['difference']:.1g}"]
        for run in result["runs"]
    ]  # fmt: skip
    libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    header = ["", "model", "second moments as the plan says", "saved", "largest difference"]
    return f"{table(header, rows)}\n\nWith {libraries} {origin(result['machine'])}."


def mixed_precision(result: dict[str, Any]) -> str:
    """Return held-out losses of float32 and of both ways of rounding bfloat16."""
    labels = list(result["runs"][0]["held_out_loss"])
    rows = [
        [str(run["seed"]), *(f"{run['held_out_loss'][x]:.4f} ({run['gap'][x]:+.2%})" for x in labels)]
        for run in result["runs"]
    ]
    return "\n".join(
        [
            f"Held-out loss of the demo's model after {result['steps']} steps, gap to float32 "
            f"{origin(result['machine'])}, `python -m benchmarks.mixed_precision`:",
            "",
            table(["seed", *labels], rows),
        ]
    )


def momentum(result: dict[str, Any]) -> str:
    """Return the cost and size of each precision of the first moment."""
    labels = list(result["gaps"])
    sizes = [max(run["runs"][label]["bytes_per_parameter"] for run in result["runs"]) for label in labels]
    rows = [
        ["bytes of state per parameter", *(f"{size:.3f}" for size in sizes)],
        *(
            [f"held-out loss, seed {run['seed']}", *(f"{run['runs'][label]['held_out_loss']:.4f}" for label in labels)]
            for run in result["runs"]
        ),
        ["mean, against None", *(f"{result['gaps'][label]:+.2%}" for label in labels)],
    ]
    codes = ", ".join(f"{label} {error:.1%}" for label, error in result["codes"].items())
    return "\n".join(
        [
            f"The demo's model after {result['steps']} steps, its plan calibrated once for each seed "
            f"{origin(result['machine'])}, `python -m benchmarks.momentum`:",
            "",
            table(["", *labels], rows),
            "",
            f"Error of the update direction by code: {codes}.",
        ]
    )


def torch_properties(result: dict[str, Any]) -> str:
    """Return the share of PyTorch's checks that hold, and those that cannot apply."""
    rows = [[variant, f"{x['passed']} of {x['applicable']}"] for variant, x in result["shares"].items()]
    left_out = [f"- `{name}`: {reason}." for name, reason in result["not_on_a_cpu"].items()]
    return "\n".join(
        [
            f"Properties of PyTorch's suite that hold {origin(result['machine'])}:",
            "",
            table(["", "hold"], rows),
            "",
            "What cannot be checked on a CPU or for AdamW at all:",
            "",
            *left_out,
        ]
    )


STACK = ("torch", "triton", "numpy")


def supported(result: dict[str, Any]) -> str:
    """Return how many plans and first moments hold, by implementation and environment."""
    environments = list(result["environments"].values())
    heads, cells = [], []
    for environment in environments:
        versions = environment["machine"]["versions"]
        stack = ", ".join(f"{name} {(versions[name] or 'none').partition('+')[0]}" for name in STACK)
        heads.append(f"Python {environment['machine']['python']}, {stack}")
        cells.append(_held_by_implementation(environment["rows"]))
    labels = dict.fromkeys(label for cell in cells for label in cell)
    rows = [[label, *(cell.get(label, "not tried") for cell in cells)] for label in labels]
    first = environments[0]["machine"]
    return "\n".join(
        [
            f"Plans and first moments that end within rounding of float64 after {result['steps']} steps, each step "
            f"seen by autograd, of those tried ({first['processor']}, {first['cores']} cores, {first['date']}), "
            "`make versions`; Triton in its interpreter:",
            "",
            table(["", *heads], rows),
        ]
    )


def _held_by_implementation(rows: list[dict[str, Any]]) -> dict[str, str]:
    by_label: dict[str, list[bool]] = {}
    for row in rows:
        if not row["is_left_out"]:
            by_label.setdefault(row["name"].partition(",")[0], []).append(row["problem"] is None)
    return {label: f"{sum(held)} of {len(held)}" for label, held in by_label.items()}


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "clipping": clipping,
    "throughput": throughput,
    "throughput_in_short": throughput_in_short,
    "throughput_gpt2-narrow_cpu_float32": throughput_narrow,
    "throughput_gpt2-small_cpu_float32_busy1": throughput_busy,
    **{f"throughput_{model}_cpu_float32": throughput_of_model for model in ("mixtral-small", "resnet50", "vit-base")},
    "ablation": ablation,
    "equivalence": equivalence,
    "expectation": expectation,
    "host_time": host_time,
    "kernels": kernels,
    "launches": launches,
    "memory": memory,
    "peak_memory": peak_memory,
    "parity": parity,
    "supported": supported,
    "interop": interop,
    "mix": mix,
    "mixed_precision": mixed_precision,
    "momentum": momentum,
    "torch_properties": torch_properties,
    **calibration.SECTIONS,
    **scale.SECTIONS,
    **sharpness.SECTIONS,
    **warmup.SECTIONS,
}


def filled(text: str) -> str:
    """Return a document's text with each marked section made anew from its result file."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2].removesuffix('_in_short')}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{SECTIONS[match[2]](result)}\n\n{match[3]}"

    return SECTION.sub(section, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
