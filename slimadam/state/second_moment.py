"""The state: its format in memory and in state dicts, and what stored second moments stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.reference import reconstruct
from slimadam.state.first_moment import FIRST_MOMENTS
from slimadam.state.rule import Rule

SECOND_MOMENTS: Final = ("exp_avg_sq", "max_exp_avg_sq")


def step_dtype() -> torch.dtype:
    """Return the precision in which torch counts steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def is_of_no_step(state: Mapping[str, Any]) -> bool:
    """Return whether a step of zero has made a parameter's state."""
    return "step" in state and not state["step"] > 0


def is_made(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter has state beside entries that a user has put there before the first step."""
    return "step" in state


def keys_of(rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[str]:
    """Return the keys in a parameter's state of the tensors that its second moment is stored in.

    One ``exp_avg_sq`` in full or averaged, ``exp_avg_sq_row`` and ``exp_avg_sq_col`` if factored; each part of a fused
    weight has its own, such as ``exp_avg_sq[query]``.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    found = []
    for rule in rules:
        part = "" if rule.part is None else f"[{rule.part.label}]"
        found += [f"{kind}{form}{part}" for form in (("_row", "_col") if rule.form == "factored" else ("",))]
    return found


def moments_of(state: Mapping[str, Any], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[Tensor]:
    """Return the tensors that a parameter's second moment is stored in; none where the state lacks one.

    Args:
        state: The parameter's state.
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    keys = keys_of(rules, kind)
    return [state[key] for key in keys] if all(key in state for key in keys) else []


def by_key(moments: Sequence[Tensor], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> dict[str, Tensor]:
    """Return the entries of a state that hold a second moment; the opposite of :func:`moments_of`.

    Args:
        moments: The tensors of a second moment.
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    return dict(zip(keys_of(rules, kind), moments, strict=True))


def exchange(
    state: MutableMapping[str, Any], before: Sequence[Rule], after: Sequence[Rule], moments: Sequence[Tensor], kind: str
) -> None:
    """Replace a second moment in a state by one that is stored by other rules.

    Args:
        state: The state; written.
        before: The rules that it is stored by.
        after: The other rules.
        moments: Its tensors by these.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    for key in keys_of(before, kind):
        del state[key]
    state.update(by_key(moments, after, kind))


def saved_moments(saved: Mapping[str, Any], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[Tensor]:
    """Return the tensors of a saved second moment, in whatever format and under whatever rules it was saved.

    Args:
        saved: A parameter's entry in a state dict.
        rules: The rules whose order and keys are looked for first.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    keys = keys_of(rules, kind)
    if all(isinstance(saved.get(key), Tensor) for key in keys):
        return [saved[key] for key in keys]
    whole = saved.get(kind)
    if isinstance(whole, Tensor):
        return [whole]
    if isinstance(whole, Mapping):
        return [whole[str(index)] for index in range(len(whole))]
    if isinstance(whole, (list, tuple)):
        return list(whole)
    return [value for key, value in saved.items() if is_key_of(key, kind)]


def is_own(key: object) -> bool:
    """Return whether an entry of a state is the optimizer's, and not one that a user has put beside it."""
    return key == "step" or key in FIRST_MOMENTS or any(is_key_of(key, kind) for kind in SECOND_MOMENTS)


def written(param: Tensor, state: Mapping[str, Any], amsgrad: bool) -> list[Tensor]:
    """Return a parameter and the tensors of its state that a step changes.

    Args:
        param: The parameter.
        state: Its state; a user's own entries are left out.
        amsgrad: Whether the step uses running maxima.
    """
    own = (key for key in state if is_own(key) and (amsgrad or not is_key_of(key, "max_exp_avg_sq")))
    return [param, *(state[key] for key in own)]


def is_key_of(key: object, kind: str) -> bool:
    """Return whether an entry of a state holds a second moment, or some of it.

    Args:
        key: The key of the entry.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    return isinstance(key, str) and re.fullmatch(rf"{kind}(_row|_col)?(\[.*\])?", key) is not None


def by_rule(rules: Sequence[Rule], moments: Sequence[Tensor], ndim: int) -> list[tuple[Rule, Sequence[Tensor]]]:
    """Return the stored tensors of a parameter, rule by rule.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        moments: The tensors of its second moment.
        ndim: The number of dimensions of the parameter.
    """
    found, start = [], 0
    for rule in rules:
        end = start + len(rule.averaged_dims(ndim))
        found.append((rule, moments[start:end]))
        start = end
    return found


def state_shapes(rules: Sequence[Rule], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all tensors that a second moment is stored in.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        shape: The shape of the parameter.
    """
    return tuple(kept for rule in rules for kept in rule.state_shapes(shape if rule.part is None else rule.part.shape))


def average(full: Tensor, rules: Sequence[Rule]) -> list[Tensor]:
    """Average a full second moment to the tensors that the rules of a parameter store.

    Args:
        full: Second moment of the parameter's shape; complex ones average real and imaginary parts apart.
        rules: The parameter's rule, or one for each of its parts.
    """
    stored = []
    for rule in rules:
        piece = rule.take(full)
        stored += [
            piece.mean(dims, keepdim=True) if dims else piece.clone() for dims in rule.averaged_dims(piece.dim())
        ]
    return stored


def expand(moments: Sequence[Tensor], rules: Sequence[Rule], shape: tuple[int, ...]) -> Tensor:
    """Return the full second moment, of the parameter's shape, from the stored tensors.

    Args:
        moments: The stored tensors.
        rules: The parameter's rule, or one for each of its parts.
        shape: The shape of the parameter.
    """
    whole = torch.empty(shape, dtype=moments[0].dtype, device=moments[0].device)
    for rule, stored in by_rule(rules, moments, len(shape)):
        piece = rule.take(whole)
        dims = rule.averaged_dims(piece.dim())
        if whole.is_complex():
            real = reconstruct([torch.view_as_real(part) for part in stored], dims)
            piece.copy_(torch.view_as_complex(real.contiguous()))
        else:
            piece.copy_(reconstruct(stored, dims))
    return whole
