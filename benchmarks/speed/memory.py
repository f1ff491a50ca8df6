"""Compute bytes of training per parameter, weights, gradients and state: ``python -m benchmarks.memory``.

Computed from shapes, and checked against what is really allocated: on a CPU by walking every tensor that model and
optimizer hold, on CUDA by the allocator's peak too. "In backward": each parameter has its own optimizer, which steps as
soon as the gradient is there and frees it, so that only one gradient exists at a time.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness import machine, stopwatch
from benchmarks.harness.contenders import PEERS, Contender, slimadam
from benchmarks.workloads.shapes import MODELS, Shapes, elements
from benchmarks.workloads.skeleton import register, skeleton
from slimadam import SlimAdam

RECIPES = {"float32": torch.float32, "pure bfloat16": torch.bfloat16}
LARGEST_DIFFERENCE = 0.001
"""Largest relative difference between the bytes computed and those held: an implementation keeps small tables."""

LARGEST_CUDA_DIFFERENCE = 0.01
"""Largest relative difference between the bytes computed and the peak on CUDA, whose allocator rounds up."""


@dataclass
class Row:
    """Bytes per parameter of one way to train.

    Attributes:
        recipe: Precision of the weights.
        optimizer: Its label.
        in_backward: Gradients are freed as soon as they have been used.
        held: Between steps: weights, state, and gradients unless they are freed.
        peak: During a step; with ``in_backward`` the largest gradient comes on top.
        computed_held: Bytes held, computed from shapes, where a formula is known.
        computed: The peak, likewise.
        cuda_peak: The peak that CUDA's allocator saw.
    """

    recipe: str
    optimizer: str
    in_backward: bool
    held: float | None = None
    peak: float | None = None
    computed_held: float | None = None
    computed: float | None = None
    cuda_peak: float | None = None

    def wrong(self) -> str | None:
        """Return a phrase where the allocated bytes are not those computed, or None."""
        for held, computed in ((self.held, self.computed_held), (self.peak, self.computed)):
            if held and computed and abs(held / computed - 1) > LARGEST_DIFFERENCE:
                return f"{held:.4f} bytes per parameter are held, not {computed:.4f}"
        if self.cuda_peak and self.computed and abs(self.cuda_peak / self.computed - 1) > LARGEST_CUDA_DIFFERENCE:
            return f"CUDA's peak is {self.cuda_peak:.4f} bytes per parameter, not {self.computed:.4f}"
        return None


def ways(recipe: str, peers: Sequence[str]) -> list[Contender]:
    """Return AdamW, SlimAdam with each first moment, and others' optimizers.

    Args:
        recipe: A key of :data:`RECIPES`.
        peers: Keys of ``PEERS``.
    """
    rounding = {"bf16_stochastic_round": True} if recipe == "pure bfloat16" else {}
    momenta: dict[str, dict[str, Any]] = {
        "rules": {},
        "rules, bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
        "rules, int8 momentum": {"momentum_dtype": "int8"},
        "rules, int8 momentum, no monitor": {"momentum_dtype": "int8", "monitor": False},
    }
    adamw = Contender("AdamW", lambda model: torch.optim.AdamW(model.parameters(), fused=True))
    found = [slimadam(label, {"plan": "rules", **rounding, **settings}) for label, settings in momenta.items()]
    return [adamw, *found, *(PEERS[name] for name in peers)]


def _measure(
    shapes: Shapes, recipe: str, contender: Contender, in_backward: bool, device: str, allocate: bool = True
) -> Row:
    """Measure the bytes of one way to train.

    Raises:
        Exception: Whatever an optimizer raises that cannot run here.
    """
    dtype, count = RECIPES[recipe], elements(shapes)
    row = Row(recipe, contender.label, in_backward)
    state = _computed_state(shapes, contender, dtype, device if allocate else "meta")
    if state is not None:
        gradients = max(map(math.prod, shapes.values())) if in_backward else count
        row.computed = (state + dtype.itemsize * (count + gradients)) / count
        row.computed_held = (state + dtype.itemsize * count * (1 if in_backward else 2)) / count
    if allocate:
        if stopwatch.is_cuda(device):
            gc.collect()  # what an earlier row holds and frees later would be missing from the peak
        before = _cuda(torch.cuda.memory_allocated, device)
        model = skeleton(shapes, device, dtype)
        held, peak = (_train_in_backward if in_backward else _train)(model, contender, device)
        row.held, row.peak = held / count, peak / count
        if stopwatch.is_cuda(device):
            row.cuda_peak = (_cuda(torch.cuda.max_memory_allocated, device) - before) / count
    return row


def rows_of(
    model: str, device: str, peers: Sequence[str], left_out: dict[str, str], recipes: Sequence[str] = tuple(RECIPES)
) -> Iterator[Row]:
    """Yield every way to train a model; what memory cannot hold is only computed.

    Args:
        model: Name of the model.
        device: ``"cpu"`` or ``"cuda"``.
        peers: Keys of ``PEERS``.
        left_out: Gets the reason for each contender without a row.
        recipes: Keys of :data:`RECIPES`.
    """
    shapes = MODELS[model]()
    allocate = stopwatch.free_bytes(device) > 20 * elements(shapes)
    for recipe in recipes:
        for contender in ways(recipe, peers):
            reason = contender.missing()
            try:
                for in_backward in (False, True) if reason is None else ():
                    yield _measure(shapes, recipe, contender, in_backward, device, allocate)
            except Exception as error:  # what another project's optimizer raises here is why it has no row
                if contender.settings is not None and not isinstance(error, NotImplementedError):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if reason is not None:
                left_out[f"{recipe}, {contender.label}"] = reason


def _computed_state(shapes: Shapes, contender: Contender, dtype: torch.dtype, device: str) -> int | None:
    """Return the bytes beside weights and gradients; on the device ``"meta"`` without what a GPU's kernels keep."""
    if contender.label == "AdamW":
        return 2 * dtype.itemsize * elements(shapes) + 4 * len(shapes)
    if contender.settings is None:
        return None
    memory = SlimAdam(skeleton(shapes, device, dtype), **contender.settings).memory()
    return memory.total + memory.monitor + memory.workspace


def _train(model: nn.Module, contender: Contender, device: str) -> tuple[int, int]:
    """Return the bytes held by a model, its gradients and its optimizer; between steps and at most."""
    optimizer = _quietly(contender, model)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    for _ in range(_steps(device)):
        _cuda(torch.cuda.reset_peak_memory_stats, device)
        optimizer.step()
    held = stopwatch.tensor_bytes([*_values(model.parameters()), vars(optimizer)])
    return held, held


def _train_in_backward(model: nn.Module, contender: Contender, device: str) -> tuple[int, int]:
    """Return the same with one optimizer a parameter, each gradient freed by the hook that uses it."""
    largest = 0

    def use(param: nn.Parameter) -> None:
        nonlocal largest
        alive = [one.grad for one in model.parameters() if one.grad is not None]
        largest = max(largest, stopwatch.tensor_bytes(alive))
        own[param].step()
        param.grad = None

    own: dict[nn.Parameter, Optimizer] = {}
    hooks = []
    for name, param in model.named_parameters():
        holder = nn.Module()
        register(holder, name, param)
        own[param] = _quietly(contender, holder)
        hooks.append(param.register_post_accumulate_grad_hook(use))  # type: ignore[no-untyped-call]
    for _ in range(_steps(device)):
        _cuda(torch.cuda.reset_peak_memory_stats, device)
        torch.stack([param.sum() for param in model.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
    for hook in hooks:  # they keep the model alive
        hook.remove()
    held = stopwatch.tensor_bytes([*_values(model.parameters()), *map(vars, own.values())])
    return held, held + largest


def _steps(device: str) -> int:
    """Take a step that makes the state, and on CUDA read the peak of another one."""
    return 2 if stopwatch.is_cuda(device) else 1


def _quietly(contender: Contender, model: nn.Module) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):
        return contender.make(model)


def _values(params: Iterator[nn.Parameter]) -> Iterator[Tensor]:
    for param in params:
        yield param
        if param.grad is not None:
            yield param.grad


def _cuda(read: Any, device: str) -> int:
    return int(read(device) or 0) if stopwatch.is_cuda(device) else 0


HEADS = " " * 73 + "".join(f"{head:>11s}" for head in ("held", "peak", "computed:", "peak", "CUDA peak"))


def line(row: Row) -> str:
    """Return a row of the printed table."""
    figures = (row.held, row.peak, row.computed_held, row.computed, row.cuda_peak)
    cells = "".join(f"{'' if figure is None else format(figure, '.3f'):>11s}" for figure in figures)
    return f"{row.recipe:15s}{row.optimizer:46s}{'in backward' if row.in_backward else '':12s}{cells}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, allocate, compare, print, write ``results/memory.json``; 1 if bytes are not what was computed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-small", "llama-1b"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="other projects' optimizers")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"device": options.device, "models": {}}
    wrong = []
    for model in options.models:
        left_out: dict[str, str] = {}
        print(f"{model}, {elements(MODELS[model]()):,} parameters, {options.device}, bytes per parameter\n{HEADS}")
        rows = []
        for row in rows_of(model, options.device, options.peers, left_out):
            rows.append(row)
            print(line(row), flush=True)
        print("".join(f"left out: {label}: {reason}\n" for label, reason in left_out.items()), end="")
        wrong += [f"FAIL {model}, {row.recipe}, {row.optimizer}: {row.wrong()}" for row in rows if row.wrong()]
        figures["models"][model] = {"rows": list(map(asdict, rows)), "left_out": left_out}
    print("\n".join([*wrong, f"written: {machine.write('memory', figures, options.out)}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
