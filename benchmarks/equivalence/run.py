"""Compare optimizers with AdamW, each at its own best learning rate: ``python -m benchmarks.equivalence``.

On every workload each optimizer runs over a grid of peak learning rates, which grows until the best one has neighbours
on both sides. That rate, chosen on some seeds, is judged on others, in pairs with AdamW at its own best rate: same
initialisation, same batches, rates that rise and then fall to zero, held-out loss at the end. The same within 0.5% is
what two one-sided t-tests show. AdamW from a slightly perturbed initialisation and in another order of the data is the
control. Runs are kept in ``equivalence.jsonl``: those that are there are not done again, so that the command can be
stopped at any time, and several may run at once on other workloads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.equivalence.contenders import CONTENDERS, REFERENCE, known
from benchmarks.equivalence.report import draw, figures, markdown
from benchmarks.equivalence.runs import Protocol, Record, run_all
from benchmarks.equivalence.workloads import LENGTHS, SIZES, WORKLOADS, Task, present
from benchmarks.harness import machine

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, or report; 0 if there was time for all, or if all bars are met."""
    parser = machine.parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
                        help=f"of {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["short"])
    parser.add_argument("--selection", type=int, default=Protocol.selection, help="seeds on which rates are chosen")
    parser.add_argument("--seeds", type=int, help="seeds on which they are judged; by default 10 or more")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--report", action="store_true", help="run nothing: write the tables and the picture")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = Record(options.out / "equivalence.jsonl")
    complete = True
    if not options.report:
        names = present(options.workloads)
        tasks = [Task(name, size, length) for length in options.lengths for size in options.sizes for name in names]
        protocol = Protocol(options.selection, options.seeds, time.monotonic() + 60 * options.minutes)
        contenders = known(dict.fromkeys([REFERENCE, *options.contenders]))
        complete = run_all(tasks, contenders, record, protocol)
        print("all runs done" if complete else "out of time: run the command again to continue", flush=True)
    if not record.runs:
        print(f"no runs in {record.path}")
        return 1
    if options.report:
        return 0 if _report(record, options.out, options.docs) else 1
    return 0 if complete else 1


def _report(record: Record, out: Path, docs: Path) -> bool:
    result = figures(record.runs)
    table = markdown(result)
    print(table)
    print("written:", machine.write("equivalence", result, out))
    print("written:", draw(result, docs / "equivalence.png"))
    return machine.print_bars(result["bars"])


if __name__ == "__main__":
    raise SystemExit(main())
