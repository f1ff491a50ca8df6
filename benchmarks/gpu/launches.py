"""Count launches and bytes of a step in Triton, without a GPU: ``python -m benchmarks.launches [--out FOLDER]``.

Nothing is run: tensors without memory are given to the code that lays out launches. A gradient counts twice where it
is summed first and too large to be still in the cache when it is read again. Bars: at most 4 launches for every plan,
and 20 bytes a parameter for rules on Llama-1B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.workloads.shapes import Shapes, gpt2_small, llama_1b, llama_8b
from benchmarks.workloads.skeleton import skeleton
from slimadam import Rule, SlimAdam
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.kernels.triton import launch
from slimadam.kernels.triton.slabs import SLAB_BYTES, is_in_rows, slabs
from slimadam.kernels.triton.tiling import Tiling, tiling

MODELS: dict[str, Callable[[], Shapes]] = {"GPT-2 124M": gpt2_small, "Llama-1B": llama_1b, "Llama-8B": llama_8b}
PLANS = {"`plan=None`": None, "rules": "rules", "factored": "factored"}
MOST_LAUNCHES, MOST_BYTES = 4, 20.0


def measure(shapes: Shapes, plan: str | None) -> dict[str, Any]:
    """Return the launches of a step in float32 and the bytes that it moves for each parameter.

    Args:
        shapes: The model's.
        plan: Plan of SlimAdam.
    """
    model = skeleton(shapes, "meta")
    chosen = dict(SlimAdam(model, plan=plan, monitor=False).plan)
    keys, moved, elements = set(), 0, 0
    for name, param in model.named_parameters():
        rule = chosen.get(name, Rule())
        averaged = rule.averaged_dims(param.dim())
        second = [param.new_empty(shape) for shape in rule.state_shapes(tuple(param.shape))]
        step = torch.empty((), device="meta")
        entry = Entry(param, param, torch.empty_like(param), second, (), step, averaged)
        found = tiling(param, averaged)
        assert found is not None
        keys.add(launch._key(entry, found, Hyperparameters()))
        # Gradient, parameter and first moment; a second moment in full is as large as the parameter.
        moved += param.numel() * (20 + 4 * _is_read_again(found)) + 8 * sum(map(torch.Tensor.numel, second))
        elements += param.numel()
    return {"parameters": elements, "launches": 1 + len(keys), "bytes_per_parameter": moved / elements}


def _is_read_again(found: Tiling) -> bool:
    """Return whether a float32 gradient is summed in slabs that are larger than they should be."""
    if found.kind != "spread":
        return False
    parts = slabs(0, found, is_in_rows(found, codes=False), 4)
    return any(part.slices * found.slice_count // found.width * part.columns * 4 > SLAB_BYTES for part in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, write ``launches.json``; return 1 if a bar is missed."""
    options = machine.parser(__doc__).parse_args(arguments)
    rows = [
        {"model": model, "plan": label, **measure(shapes(), plan)}
        for model, shapes in MODELS.items()
        for label, plan in PLANS.items()
    ]
    print(f"{'model':12s} {'plan':11s} launches  bytes/parameter")
    for row in rows:
        print(f"{row['model']:12s} {row['plan']:11s} {row['launches']:8d}  {row['bytes_per_parameter']:15.2f}")
    (rules,) = [row for row in rows if (row["model"], row["plan"]) == ("Llama-1B", "rules")]
    print("written:", machine.write("launches", {"most_launches": MOST_LAUNCHES, "rows": rows}, options.out))
    too_many = [row for row in rows if row["launches"] > MOST_LAUNCHES]
    return 1 if too_many or rules["bytes_per_parameter"] > MOST_BYTES else 0


if __name__ == "__main__":
    raise SystemExit(main())
