"""Formats of the first moment: in floating point, or in int8. A new format is a new class here."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from typing_extensions import override

from slimadam.state import int8
from slimadam.utils.dtensor import full_tensor, is_dtensor, laid_out_as, local, place

logger = logging.getLogger("slimadam")

INT8: Final = "int8"
MOMENTUM_DTYPES: Final = (None, torch.float32, torch.bfloat16, INT8)
"""Values of the option ``momentum_dtype``."""
FIRST_MOMENTS: Final = ("exp_avg", "exp_avg_codes", "exp_avg_scale")
"""Keys of all formats in a parameter's state."""
STORED: Final = ("exp_avg", "exp_avg_codes")
"""Keys of those that hold a first moment or its codes: one for each format."""

LOAD_BOTH: Final = "load both from one state dict with load_state_dict"


class Momentum(ABC):
    """A format in which a parameter's state holds its first moment.

    Attributes:
        key: The entry of the state that has the parameter's shape.
        dtype: Precision in which updates see the first moment.
    """

    key: ClassVar[str]
    dtype: torch.dtype

    @abstractmethod
    def init(self, param: Tensor) -> dict[str, Tensor]:
        """Return the entries of a state whose first moment is zero."""

    @abstractmethod
    def read(self, param: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Return the first moment itself.

        Args:
            param: The parameter.
            state: Its state.
        """

    @abstractmethod
    def write(self, param: Tensor, value: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
        """Store a first moment in the entries of a state.

        Args:
            param: The parameter.
            value: The first moment.
            grad: The gradient that was just added to it, or ``value`` itself.
            state: The state; written.
        """

    @abstractmethod
    def nbytes(self, param: Tensor) -> int:
        """Return the bytes that this rank holds for a parameter."""

    @abstractmethod
    def zero(self, state: Mapping[str, Any], index: Tensor, dim: int) -> None:
        """Set the first moment to zero at some positions along a dimension.

        Args:
            state: The state; written.
            index: The positions.
            dim: The dimension.
        """

    @abstractmethod
    def check(self, name: str, param: Tensor, state: Mapping[str, Any]) -> None:
        """Check that a state has the entries that belong to the parameter.

        Args:
            name: The parameter's name.
            param: The parameter.
            state: Its state.

        Raises:
            RuntimeError: Names the parameter and the entry.
        """

    @abstractmethod
    def check_saved(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Check that a saved state has the entries that belong to the parameter; arguments as in :meth:`check`.

        Args:
            name: The parameter's name.
            param: The parameter.
            saved: Its entry in a state dict.

        Raises:
            ValueError: Names the parameter and the entry.
        """

    def load(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the entries of a state from a saved one in any format. Collective for a DTensor.

        Args:
            param: The parameter.
            saved: Its entry in a state dict.
        """
        made = self.init(param)
        if is_dtensor(param):
            value = torch.zeros_like(param, dtype=self.dtype)
            place(value, _saved_value(param, saved))
        else:
            value = _gathered_value(param, saved).to(self.dtype)
        self.write(param, value, value, made)
        return made


class Float(Momentum):
    """The first moment itself, in a precision of its own.

    Args:
        dtype: The precision.
    """

    key = "exp_avg"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @override
    def init(self, param: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(param, dtype=self.dtype, memory_format=torch.preserve_format)}

    @override
    def read(self, param: Tensor, state: Mapping[str, Any]) -> Tensor:
        exp_avg: Tensor = state["exp_avg"]
        return exp_avg

    @override
    def write(self, param: Tensor, value: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
        state["exp_avg"].copy_(value)

    @override
    def nbytes(self, param: Tensor) -> int:
        return local(param).numel() * self.dtype.itemsize

    @override
    def zero(self, state: Mapping[str, Any], index: Tensor, dim: int) -> None:
        state["exp_avg"].index_fill_(dim, index, 0)

    @override
    def check(self, name: str, param: Tensor, state: Mapping[str, Any]) -> None:
        _check_shape(name, "exp_avg", state["exp_avg"], tuple(param.shape), param)

    @override
    def check_saved(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        exp_avg = saved["exp_avg"]
        if saved.get("exp_avg_scale") is not None:
            raise ValueError(f"{name!r}: the state dict has an exp_avg_scale, but its exp_avg is {exp_avg.dtype}")
        _check_saved_shape(name, exp_avg, tuple(param.shape))

    @override
    def load(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        if is_dtensor(param):
            return super().load(param, saved)
        return {"exp_avg": _gathered_value(param, saved).to(self.dtype, copy=True)}


class Int8(Momentum):
    """Codes of one byte, with a scale for each block of 256; see :mod:`slimadam.state.int8`.

    Args:
        is_complex: Whether parameters are complex: real and imaginary parts have codes of their own.
    """

    key = "exp_avg_codes"

    def __init__(self, is_complex: bool = False) -> None:
        self.dtype = torch.complex64 if is_complex else torch.float32

    @override
    def init(self, param: Tensor) -> dict[str, Tensor]:
        codes = int8.new_codes(param)
        return {"exp_avg_codes": codes, "exp_avg_scale": int8.new_scales(codes)}

    @override
    def read(self, param: Tensor, state: Mapping[str, Any]) -> Tensor:
        codes = state["exp_avg_codes"]
        value = int8.decode(local(codes), local(state["exp_avg_scale"]).view(-1))
        if is_dtensor(codes):
            value = laid_out_as(codes, value, codes.shape)
        return torch.view_as_complex(value) if param.is_complex() else value

    @override
    def write(self, param: Tensor, value: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
        if param.is_complex():
            value, grad = torch.view_as_real(value), torch.view_as_real(grad)
        int8.encode(local(value), local(grad), local(state["exp_avg_codes"]), local(state["exp_avg_scale"]).view(-1))

    @override
    def nbytes(self, param: Tensor) -> int:
        elements = local(param).numel() * (2 if param.is_complex() else 1)
        return elements + int8.scale_count(elements)

    @override
    def zero(self, state: Mapping[str, Any], index: Tensor, dim: int) -> None:
        int8.reset(state["exp_avg_codes"], state["exp_avg_scale"], index, dim)

    @override
    def check(self, name: str, param: Tensor, state: Mapping[str, Any]) -> None:
        codes, scales = state["exp_avg_codes"], state.get("exp_avg_scale")
        if scales is None or tuple(scales.shape) != int8.scales_shape(codes):
            found = "is missing" if scales is None else f"has shape {tuple(scales.shape)}"
            raise RuntimeError(
                f"{name!r}: its exp_avg_scale {found}, its exp_avg needs {int8.scales_shape(codes)}; {LOAD_BOTH}"
            )
        _check_shape(name, "exp_avg", codes, (*param.shape, 2) if param.is_complex() else tuple(param.shape), param)

    @override
    def check_saved(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        codes, scales = saved["exp_avg_codes"], saved.get("exp_avg_scale")
        if scales is None:
            raise ValueError(
                f"{name!r}: the state dict's exp_avg_codes holds {str(codes.dtype).removeprefix('torch.')} codes, but "
                "it has no exp_avg_scale for them"
            )
        if codes.dtype != torch.int8:
            raise ValueError(f"{name!r}: the state dict has an exp_avg_scale, but its exp_avg is {codes.dtype}")
        count = int8.scale_count(codes.numel())
        if scales.numel() != count or scales.dtype != torch.uint8:
            raise ValueError(
                f"{name!r}: the state dict's exp_avg_scale is {scales.dtype} of shape {tuple(scales.shape)}, "
                f"{codes.numel()} codes need torch.uint8 of shape {(count,)}"
            )
        _check_saved_shape(name, codes, (*param.shape, 2) if param.is_complex() else tuple(param.shape))

    @override
    def load(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        codes, scales = saved.get("exp_avg_codes"), saved.get("exp_avg_scale")
        if codes is None or scales is None:
            return super().load(param, saved)
        made = self.init(param)
        if is_dtensor(param):
            if not codes.is_contiguous():
                return super().load(param, saved)
            shape = made["exp_avg_scale"].shape
            place(made["exp_avg_codes"], codes)
            place(made["exp_avg_scale"], scales if scales.shape == shape else full_tensor(scales).reshape(shape))
            return made
        codes = full_tensor(codes)
        if codes.stride() != made["exp_avg_codes"].stride():
            return super().load(param, saved)
        copies = codes, full_tensor(scales).flatten()
        return dict(zip(made, (one.to(param.device, copy=True) for one in copies), strict=True))


def momentum_of(param: Tensor, group: Mapping[str, Any]) -> Momentum:
    """Return the format in which a group stores a parameter's first moment.

    Args:
        param: The parameter.
        group: Its group.
    """
    chosen = group["momentum_dtype"]
    if chosen == INT8 and int8.can_follow(param):
        return Int8(param.is_complex())
    if chosen is None or chosen == INT8 or param.is_complex():  # there is no complex bfloat16
        return Float(param.dtype)
    return Float(chosen)


def momentum_in(state: Mapping[str, Any]) -> Momentum:
    """Return the format in which a state, live or saved, holds its first moment."""
    return Int8() if "exp_avg_codes" in state else Float(state["exp_avg"].dtype)


def decoded(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that holds the first moment itself, under ``exp_avg``.

    Args:
        param: The parameter.
        state: Its state.
    """
    own = {key: value for key, value in state.items() if key not in FIRST_MOMENTS}
    if any(key in state for key in FIRST_MOMENTS):
        own["exp_avg"] = momentum_in(state).read(param, state)
    return own


def stored_first_moment(state: Mapping[str, Any]) -> Tensor:
    """Return the tensor of a state that holds a first moment, or its codes."""
    stored: Tensor = state[momentum_in(state).key]
    return stored


def with_own_keys(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state with its first moment once, under the keys of its format."""
    exp_avg, scales = saved.get("exp_avg"), saved.get("exp_avg_scale")
    if "exp_avg_codes" not in saved:
        is_coded = isinstance(exp_avg, Tensor) and exp_avg.dtype == torch.int8
        return {"exp_avg_codes" if key == "exp_avg" and is_coded else key: value for key, value in saved.items()}
    # torch leaves blank codes of the optimizer that loads beside a first moment that was saved without.
    blank = exp_avg is not None and isinstance(scales, Tensor) and not local(scales).any()
    left_out = ("exp_avg_codes", "exp_avg_scale") if blank else ("exp_avg",)
    return {key: value for key, value in saved.items() if key not in left_out}


def warn_of_other_formats(group: Mapping[str, Any], params: Collection[Tensor]) -> None:
    """Warn of matrices whose first moments are not stored in int8 as asked, and of how much they are.

    Args:
        group: The group.
        params: Its new parameters.
    """
    without = [param for param in params if group["momentum_dtype"] == INT8 and not int8.can_follow(param)]
    if any(param.dim() > 1 for param in without):
        logger.warning(
            "momentum_dtype='int8': the first moments of %d of %d parameters, %.1f%% of their elements, stay in the "
            "parameters' precision: their shards need not consist of whole blocks of 256 elements; shard along "
            "a dimension followed by a multiple of 256 elements, such as the first of a matrix of so many columns",
            len(without),
            len(params),
            100 * sum(param.numel() for param in without) / max(1, sum(param.numel() for param in params)),
        )


def _gathered_value(param: Tensor, saved: Mapping[str, Any]) -> Tensor:
    """Return a saved first moment on the parameter's device, full on every rank."""
    full = {key: full_tensor(saved[key]).to(param.device) for key in FIRST_MOMENTS if key in saved}
    return momentum_in(full).read(param, full)


def _saved_value(param: Tensor, saved: Mapping[str, Any]) -> Tensor:
    """Return a saved first moment, gathered if its scales do not lie as its codes do."""
    stored = {key: saved[key] for key in FIRST_MOMENTS if key in saved}
    codes, scales = stored.get("exp_avg_codes"), stored.get("exp_avg_scale")
    if codes is not None and scales is not None and is_dtensor(codes):
        alike = is_dtensor(scales) and (scales.device_mesh, scales.placements) == (codes.device_mesh, codes.placements)
        if not alike or tuple(scales.shape) != int8.scales_shape(codes):
            stored = {key: full_tensor(value) for key, value in stored.items()}
    return momentum_in(stored).read(param, stored)


def _check_shape(name: str, key: str, stored: Tensor, wanted: tuple[int, ...], param: Tensor) -> None:
    if tuple(stored.shape) != wanted:
        raise RuntimeError(
            f"{name!r}: its {key} has shape {tuple(stored.shape)}, the parameter {tuple(param.shape)}; exchange a "
            "parameter for one of another size by optimizer.replace_param(old, new, keep=..., added=...)"
        )


def _check_saved_shape(name: str, stored: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(stored.shape) != wanted:
        raise ValueError(
            f"{name!r}: the state dict's exp_avg has shape {tuple(stored.shape)}, the parameter {wanted}; load the "
            "state of the same model, or drop the parameter's entry from state_dict['state']: the rest loads"
        )
