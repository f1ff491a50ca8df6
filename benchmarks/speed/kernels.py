"""Compile the Triton kernels ahead, without a GPU: ``python -m benchmarks.kernels [--out FOLDER]``.

Every variant is compiled ahead for sm_80 and sm_90. Printed: registers a thread, bytes spilled to local memory, shared
memory of a program, programs that a multiprocessor holds at a time, 128-bit loads and stores in its code, the bytes it
must move for each parameter, and the share of the bandwidth that a model predicts. Exits with 1 if one spills, divides
inexactly, reads or writes aligned tensors in narrower pieces, or stores a second moment that several warps share with
no barrier after their loads.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import machine
from slimadam.kernels.triton import kernels
from slimadam.kernels.triton.launch import COMPILER_OPTIONS, SETTINGS, STEPS_AT_ONCE
from slimadam.kernels.triton.slabs import FINISHED_AT_ONCE, SUM_COLUMNS, SUM_LINES, TILES

ARCHITECTURES = (80, 90)
NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
TYPES = {
    **dict.fromkeys(("table", "addresses"), "*i64"),
    **dict.fromkeys(NUMBERS, "i64"),
    **dict.fromkeys(("programs", "counters"), "*i32"),
    "corrections": "*fp64",
    **dict.fromkeys(("count", "counter_count"), "i32"),
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
}


@dataclass(frozen=True)
class Memory:
    """A device in the model: multiprocessors, bytes a second of a copy, and seconds until a load has its value."""

    multiprocessors: int
    bandwidth: float
    latency: float


MEMORIES = {80: Memory(108, 1.8e12, 0.8e-6), 90: Memory(132, 4.3e12, 0.8e-6)}
"""An A100 and an H200, in round figures."""
MODEL = (
    "Predicted, not measured: the programs that a multiprocessor holds share its part of the memory's bandwidth and "
    "queue for it; each also waits, and moves nothing, for every load that another one needs first. Arithmetic, "
    "launches and the last programs cost nothing, and what is read twice is in the cache the second time. A load takes "
    "0.8 us; a copy reaches 1.8 TB/s on sm_80 (A100) and 4.3 TB/s on sm_90 (H200)."
)
REGISTERS, THREADS, PROGRAMS = 1 << 16, 2048, 32
"""Limits of a multiprocessor."""
PRECISIONS = {
    "fp32": (tl.float32, tl.float32, tl.float32),
    "bf16": (tl.bfloat16, tl.bfloat16, tl.bfloat16),
    "fp16": (tl.float16, tl.float16, tl.float16),
    "fp64": (tl.float64, tl.float64, tl.float64),
    "fp32, bf16 momentum": (tl.float32, tl.float32, tl.bfloat16),
    "fp32, int8 momentum": (tl.float32, tl.float32, tl.int8),
    "bf16, int8 momentum": (tl.bfloat16, tl.bfloat16, tl.int8),
}
"""Precisions of parameters, gradients and first moments."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        kernel: Its function.
        precision: A key of :data:`PRECISIONS`, or of the kernels that do not depend on it a description.
        flags: Further specialisation.
        constants: Compile-time arguments.
        num_warps: Warps of a program.
        wide_loads: 128-bit loads that its code must have at least,
        wide_stores: and stores.
        bytes_per_parameter: Bytes that it must move; None for the kernels that only touch averages.
        elements: Parameters of a program, where the model predicts its bandwidth.
        waits: Loads of a program that have to end before others can begin, and the last ones.
        is_plain: No flag is set, and tensors have the usual sizes.
    """

    kernel: Any
    precision: str
    flags: str
    constants: dict[str, Any]
    num_warps: int
    wide_loads: int = 0
    wide_stores: int = 0
    bytes_per_parameter: float | None = None
    elements: int = 0
    waits: float = 0
    is_plain: bool = False

    def is_ordered(self, ptx: str) -> bool:
        """Return whether warps wait for each other where one of them reads or announces what others store.

        Args:
            ptx: The variant's code.
        """
        if self.kernel is kernels.update_rows:
            return has_barrier_before_store(ptx)
        announces = self.kernel is kernels.update_spread and "counters" not in self.constants
        return not announces or (has_barrier_before_release(ptx) and "acquire" in ptx)


@dataclass(frozen=True)
class Compiled:
    """Resources and checks of a compiled variant."""

    kernel: str
    precision: str
    flags: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    bytes_per_parameter: float | None
    elements: int
    waits: float
    is_plain: bool
    programs_at_once: int
    predicted_share: float | None
    is_ordered: bool
    is_exact: bool
    is_good: bool


def variants() -> Iterator[Variant]:
    """Yield every kernel in every precision, and each flag once."""
    for precision in PRECISIONS:
        yield from _updates(precision, "")
    for flags in ("AMSGRAD", "MAXIMIZE", "unaligned", "pitched", "grad_scale and found_inf"):
        yield from _updates("fp32", flags)
    yield from _updates("bf16", "ROUNDS")
    yield from _updates("bf16, int8 momentum", "ROUNDS")
    for precision in PRECISIONS:
        yield _coded(precision, "")
    for flags in ("MAXIMIZE", "unaligned", "pitched", "grad_scale and found_inf"):
        yield _coded("fp32", flags)
    yield _coded("bf16", "ROUNDS")
    yield _coded("bf16, int8 momentum", "ROUNDS")
    yield Variant(kernels.advance_steps, "fp32", "", {"STEP_DTYPE": tl.float32, "BLOCK": STEPS_AT_ONCE}, 4)


def _updates(precision: str, flags: str) -> Iterator[Variant]:
    param, grad, exp_avg = PRECISIONS[precision]
    codes = exp_avg == tl.int8
    common = {
        "PARAM_DTYPE": param,
        "GRAD_DTYPE": grad,
        "MOMENT_DTYPE": exp_avg,
        "COMPUTE": tl.float64 if param == tl.float64 else tl.float32,
        "STEP_DTYPE": tl.float32,
        "AMSGRAD": flags == "AMSGRAD",
        "MAXIMIZE": flags == "MAXIMIZE",
        "ROUNDS": flags == "ROUNDS",
        "ALIGNED": 0
        if flags == "unaligned"
        else 16 * 8 // min(one.primitive_bitwidth for one in (param, grad, exp_avg)),
    }
    size = {dtype: dtype.primitive_bitwidth // 8 for dtype in (param, grad, exp_avg)}
    moved = 2 * size[param] + size[grad] + 2 * size[exp_avg] + (4 / 256 if codes else 0)
    wide = (0, 0) if flags in ("unaligned", "pitched") else ((2, 1) if codes else (3, 2))
    for (kind, columns), settings in SETTINGS.items():
        if (codes and columns < 256) or (flags == "pitched" and kind not in ("full", "spread")):
            continue
        constants: dict[str, Any] = {**common, "LINES": settings.lines_of(size[param])}
        tile = constants["LINES"] * columns
        # Its number, its row of the table, and its data.
        variant = Variant(getattr(kernels, f"update_{kind}"), precision, flags, constants,
                          settings.warps_of(size[param]), *wide, moved, tile, 3, not flags)  # fmt: skip
        if kind in ("full", "spread"):
            constants |= {"PITCHED": flags == "pitched", "WIDE": False}
        if kind == "full":
            constants["SECOND_DTYPE"] = constants["COMPUTE"]
            second = 8 * (2 if flags == "AMSGRAD" else 1)
            yield replace(variant, flags=f"full {flags}".strip(), bytes_per_parameter=moved + second)
        elif kind == "rows":
            yield from _rows(variant, columns)
        else:
            yield from _spread(variant)


def _coded(precision: str, flags: str) -> Variant:
    """Return the kernel for a second moment in codes."""
    full = next(variant for variant in _updates(precision, flags) if variant.kernel is kernels.update_full)
    moved = full.bytes_per_parameter
    assert moved is not None
    return replace(
        full,
        flags=full.flags.replace("full", "full, codes", 1),
        constants={**full.constants, "SECOND_DTYPE": tl.uint8},
        bytes_per_parameter=moved - 8 + 2,
        is_plain=False,
    )


def _rows(variant: Variant, columns: int) -> Iterator[Variant]:
    for whole in (True, False) if columns == 4096 else (True,):
        yield replace(
            variant,
            flags=f"rows {columns}{'' if whole else ' and longer'} {variant.flags}".strip(),
            constants={**variant.constants, "COLUMNS": columns, "WHOLE": whole},
            elements=variant.elements if whole else 2 * variant.elements,
            waits=variant.waits if whole else variant.waits + 3,  # two passes over two tiles
            is_plain=variant.is_plain and whole,
        )


def _spread(variant: Variant) -> Iterator[Variant]:
    """Yield the kernel that sums and updates, for lines within rows and for any, and that which updates alone."""
    sums = {"TILES": TILES, "SUM_LINES": SUM_LINES, "SUM_COLUMNS": SUM_COLUMNS, "BLOCK": FINISHED_AT_ONCE}
    constants = {
        **variant.constants,
        **sums,
        "SUMS_ALIGNED": variant.constants["ALIGNED"] and 16 * 8 // variant.constants["GRAD_DTYPE"].primitive_bitwidth,
    }
    for name, in_rows in (("spread in rows", True), ("spread", False)):
        lines = constants["LINES"] if in_rows else SETTINGS["spread", 256].lines
        updated = TILES * lines * 256
        sums_of_one = updated / (SUM_LINES * SUM_COLUMNS)
        yield replace(
            variant,
            flags=f"{name} {variant.flags}".strip(),
            constants={**constants, "IN_ROWS": in_rows, "LINES": lines},
            elements=updated,
            # Each takes its turn first, and those that update wait for sums, then for one tile after the other.
            waits=4 * sums_of_one + 4 + TILES,
            is_plain=variant.is_plain and in_rows,
        )
    yield replace(
        variant,
        flags=f"finished {variant.flags}".strip(),
        constants={**constants, "IN_ROWS": True, "counters": None},
        elements=TILES * variant.elements,
        waits=2 + TILES,
        is_plain=False,
    )


def _compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile for an architecture such as 90, and read what came out."""
    constants = dict(variant.constants)
    if "grad_scale and found_inf" not in variant.flags:
        constants |= {name: None for name in ("grad_scale", "found_inf") if name in variant.kernel.arg_names}
    source = _source(variant.kernel, constants)
    options = {"num_warps": variant.num_warps, **COMPILER_OPTIONS}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources = _resources(made.asm["cubin"])
    wide_loads, wide_stores = (_wide_accesses(what, made.asm["ptx"]) for what in ("ld", "st"))
    spilled = resources["STACK"] + resources["LOCAL"]
    wide = wide_loads >= variant.wide_loads and wide_stores >= variant.wide_stores
    # What codes stand for takes a quotient that may be off by two units in the last place.
    exact = "div.full" not in made.asm["ptx"] or constants.get("MOMENT_DTYPE") == tl.int8
    threads = 32 * variant.num_warps
    at_once = min(PROGRAMS, THREADS // threads, REGISTERS // (threads * -(-resources["REG"] // 8) * 8))
    ordered = variant.is_ordered(made.asm["ptx"])
    return Compiled(
        kernel=variant.kernel.__name__,
        precision=variant.precision,
        flags=variant.flags,
        architecture=architecture,
        registers=resources["REG"],
        spilled_bytes=spilled,
        shared_bytes=resources["SHARED"],
        wide_loads=wide_loads,
        wide_stores=wide_stores,
        bytes_per_parameter=variant.bytes_per_parameter,
        elements=variant.elements,
        waits=variant.waits,
        is_plain=variant.is_plain,
        programs_at_once=at_once,
        predicted_share=predicted_share(variant, at_once, MEMORIES[architecture]) if variant.elements else None,
        is_ordered=ordered,
        is_exact=exact,
        is_good=spilled == 0 and wide and ordered and exact,
    )


def predicted_share(variant: Variant, at_once: int, memory: Memory) -> float:
    """Return the share of the bandwidth that :data:`MODEL` predicts, by mean value analysis of a closed queue.

    Args:
        variant: What the programs run.
        at_once: Programs on a multiprocessor.
        memory: The device.
    """
    assert variant.bytes_per_parameter is not None
    service = variant.elements * variant.bytes_per_parameter / (memory.bandwidth / memory.multiprocessors)
    queued = rate = 0.0
    for programs in range(1, at_once + 1):
        response = service * (1 + queued)
        rate = programs / (variant.waits * memory.latency + response)
        queued = rate * response
    return rate * service


def _source(kernel: Any, constants: dict[str, Any]) -> Any:
    """Return a kernel for these compile-time arguments, all pointers aligned, as this release of Triton takes it."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    pointers = [index for index, name in enumerate(names) if signature[name][0] == "*"]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        by_index = {(names.index(name),): value for name, value in constants.items()}
        divisible = {(index,): [["tt.divisibility", 16]] for index in pointers}
        return ASTSource(fn=kernel, signature=signature, constexprs=by_index, attrs=divisible)
    from triton.backends.compiler import AttrsDescriptor  # only before 3.3

    attributes = AttrsDescriptor.from_dict({"arg_properties": {"tt.divisibility": pointers}, "cls": "AttrsDescriptor"})
    return ASTSource(fn=kernel, signature=signature, constants=constants, attrs=attributes)


def _wide_accesses(instruction: str, ptx: str) -> int:
    """Return how often 16 bytes are read or written at once."""
    return len(re.findall(rf"{instruction}\.global[\w.:]*\.v(?:4\.[bfu]32|2\.[bfu]64)\b", ptx))


def has_barrier_before_store(ptx: str) -> bool:
    """Return whether all warps wait for each other between the last load before the first store, and that store.

    Args:
        ptx: Code of ``update_rows``, whose first store is that of the second moment.
    """
    store = re.search(r"\bst\.[\w.]*global", ptx)
    before = ptx[: store.start()] if store else ""
    # On every way to the store: after the last load, and after the last place where ways part or meet.
    last = list(re.finditer(r"\bld\.[\w.]*global|\bbra\b|^\$\w+:", before, re.MULTILINE))
    between = before[last[-1].end() :] if last else ""
    return re.search(r"\b(bar|barrier\.cta)\.sync\s+0;", between) is not None


def has_barrier_before_release(ptx: str) -> bool:
    """Return whether all warps wait for each other between the last store and the count that announces it.

    Args:
        ptx: Code of ``update_spread``.
    """
    release = re.search(r"\b(red|atom)\.[\w.]*release", ptx)
    before = ptx[: release.start()] if release else ""
    last = list(re.finditer(r"\bst\.[\w.]*global|\bbra\b|^\$\w+:", before, re.MULTILINE))
    return bool(last) and re.search(r"\b(bar|barrier\.cta)\.sync\s+0;", before[last[-1].end() :]) is not None


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    """Compile everything, print a table, write ``results/kernels.json``; exit 1 if a variant is not as it should be."""
    parser = machine.parser(__doc__)
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    print(
        f"{'kernel':15s} {'precision':20s} {'variant':36s} sm  registers  spilled  shared  "
        "programs  wide ld/st  B/parameter  predicted"
    )
    made = []
    for variant in variants():
        for architecture in arguments.architecture:
            found = _compile_variant(variant, architecture)
            made.append(found)
            moved = "" if found.bytes_per_parameter is None else f"{found.bytes_per_parameter:.2f}"
            share = "" if found.predicted_share is None else f"{found.predicted_share:.0%}"
            print(
                f"{found.kernel:15s} {found.precision:20s} {found.flags:36s} {architecture} {found.registers:9d} "
                f"{found.spilled_bytes:8d} {found.shared_bytes:7d} {found.programs_at_once:9d} "
                f"{found.wide_loads:7d}/{found.wide_stores:<4d}{moved:>9s} {share:>10s}"
                f"{'' if found.is_ordered else '   no barrier'}{'' if found.is_exact else '   inexact'}"
                f"{'' if found.is_good else '   FAIL'}",
                flush=True,
            )
    print(MODEL)
    figures = {"triton": triton.__version__, "model": MODEL, "variants": [asdict(found) for found in made]}
    print("written:", machine.write("kernels", figures, arguments.out))
    if not all(found.is_good for found in made):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
