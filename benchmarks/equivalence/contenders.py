"""The optimizers that are compared, each built at a learning rate with the workload's betas and weight decay."""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

import slimadam
from benchmarks import ROOT
from benchmarks.equivalence.workloads import Task
from benchmarks.harness.contenders import missing
from slimadam import AutoPlan, SlimAdam
from slimadam.layers.roles import roles_of

REFERENCE = "AdamW"
_OURS = ("optim", "plans", "state", "measurement", "layers", "utils")
_OF_NO_RUN = "expectation.py"
"""It says what these runs have found, and changes none."""
_NOT_HIDDEN = ("embedding", "head", "classifier")
"""Parts of the roles of matrices that Muon's authors leave to AdamW."""
_PERTURBATION = 1e-6
OTHER_ORDER = 1_000_000
"""Added to the seed of the batches where the data come in another order."""


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison.

    Attributes:
        make: Builds it for a model at a task's settings.
        package: The distribution that it comes from.
        shift: Grid steps from AdamW's learning rates to where its search begins.
        perturbation: Relative size of random changes to the initialisation.
        other_order: The batches come in another order.
    """

    make: Callable[[nn.Module, Task], Optimizer]
    package: str = "torch"
    shift: int = 0
    perturbation: float = 0.0
    other_order: bool = False

    @property
    def is_control(self) -> bool:
        """Return whether it is the reference itself under another chance, at the reference's learning rate."""
        return self.other_order or self.perturbation > 0

    def missing(self) -> str | None:
        """Return why it cannot be built here, or None."""
        return None if self.package == "slimadam" else missing(self.package)

    def version(self) -> str:
        """Return the version of its code: a hash of the package's statements for ours, the package's for others."""
        if self.package == "slimadam":
            return _hash_of_package()
        return f"{self.package} {metadata.version(self.package)}"


class UnsuitableError(ValueError):
    """An optimizer has nothing to do in a model."""


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` for the matrices of the hidden layers, AdamW for all other parameters.

    Muon's updates are scaled to the size of AdamW's (``match_rms_adamw``), so that both share a learning rate.

    Args:
        model: The model.
        task: Betas and weight decay.

    Raises:
        UnsuitableError: No hidden layer has a matrix.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        roles = roles_of(model)
        named = dict(model.named_parameters())
        hidden = [
            name
            for name, parameter in named.items()
            if parameter.dim() == 2 and not any(part in roles[name].role for part in _NOT_HIDDEN)
        ]
        if not hidden:
            raise UnsuitableError("no hidden layer has a weight of two dimensions")
        rest = [parameter for name, parameter in named.items() if name not in hidden]
        self._parts: list[Optimizer] = [
            torch.optim.Muon(
                [named[name] for name in hidden], weight_decay=task.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, betas=task.workload.betas, weight_decay=task.weight_decay),
        ]
        super().__init__(named.values(), {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both, and show their states as one."""
        for part in self._parts:
            part.step(closure)
            self.state.update(part.state)


def _adamw(model: nn.Module, task: Task) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=task.workload.betas, weight_decay=task.weight_decay)


def _slimadam(**settings: Any) -> Contender:
    def make(model: nn.Module, task: Task) -> Optimizer:
        return SlimAdam(model, betas=task.workload.betas, weight_decay=task.weight_decay, **settings)

    return Contender(make, "slimadam")


def _adam_mini(model: nn.Module, task: Task) -> Optimizer:
    """Return Adam-mini, told which weights are embeddings and attention outputs: it goes by names."""
    heads: dict[str, int] = {}
    if task.heads:
        query = next(p for name, p in model.named_parameters() if name.endswith(("query.weight", "q_proj.weight")))
        heads = {"dim": query.shape[1], "n_heads": task.heads}
    named = [  # "mlp" in the name of a norm would make it a matrix
        (name if parameter.dim() > 1 or "bias" in name else "norm", parameter)
        for name, parameter in model.named_parameters()
    ]
    made: Any = _class("adam_mini", "Adam_mini")(
        named,
        betas=task.workload.betas,
        weight_decay=task.weight_decay,
        verbose=False,
        **heads,
    )
    made.embd_names = {
        f"{name}.weight".lower() for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    made.attn_proj_names.add("attention.out")
    return cast(Optimizer, made)


def _adafactor(model: nn.Module, task: Task) -> Optimizer:
    return torch.optim.Adafactor(model.parameters(), weight_decay=task.weight_decay)


def _torchao(model: nn.Module, task: Task) -> Optimizer:
    made: Optimizer = _class("torchao.optim", "AdamW8bit")(
        list(model.parameters()), betas=task.workload.betas, weight_decay=task.weight_decay
    )
    return made


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender(_adamw),
    "auto": _slimadam(plan="auto"),
    "factored": _slimadam(plan="factored"),
    "AdamW perturbed": Contender(_adamw, perturbation=_PERTURBATION),
    "AdamW reordered": Contender(_adamw, other_order=True),
    "rules": _slimadam(plan="rules"),
    "averages": _slimadam(plan=AutoPlan(forms="mean")),
    "slim start": _slimadam(plan=AutoPlan(start="slim")),
    "auto int8": _slimadam(plan="auto", momentum_dtype="int8"),
    "Adam-mini": Contender(_adam_mini, "adam-mini"),
    "Adafactor (torch)": Contender(_adafactor, shift=8),
    "torchao AdamW8bit": Contender(_torchao, "torchao"),
    "Muon and AdamW": Contender(MuonWithAdamW),
}
ROUNDS = (
    (REFERENCE, "auto", "slim start", "factored", "AdamW perturbed", "AdamW reordered"),
    ("rules", "averages", "auto int8"),
    ("Adam-mini", "Adafactor (torch)", "torchao AdamW8bit", "Muon and AdamW"),
)
"""Contenders in the order of work: an early stop leaves complete rows of the first."""


@cache
def _hash_of_package() -> str:
    package = Path(slimadam.__file__).parent
    files = [file for folder in _OURS for file in sorted((package / folder).rglob("*.py")) if file.name != _OF_NO_RUN]
    files += sorted((ROOT / "kernels").glob("*.py")) + sorted((ROOT / "kernels" / "cpp").glob("*.[ch]*"))
    return hashlib.sha256(b"".join(map(_statements, files))).hexdigest()[:12]


def _statements(file: Path) -> bytes:
    """Return a file's statements without docstrings, comments and log lines, which change no run; C++ as it stands."""
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [one for one in body if not _is_log_line(one)]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def _is_log_line(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("logger.")


def known(names: Iterable[str]) -> list[str]:
    """Return the names of contenders that can be built here, and say in a line each why others cannot.

    Args:
        names: Keys of :data:`CONTENDERS`.
    """
    found = []
    for name in names:
        reason = CONTENDERS[name].missing()
        if reason is None:
            found.append(name)
        else:
            print(f"left out: {name}: {reason}", flush=True)
    return found
