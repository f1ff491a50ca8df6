"""Roles of parameters: read off the module graph first, off names second.

A role is a short name such as ``"query"`` or ``"mlp_down"``; ``"unknown"`` where nothing says what a tensor
does. With it comes the layout: the dimensions of the stored tensor that are fan-in and fan-out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from slimadam.layers import name_patterns
from slimadam.layers.name_patterns import BIAS as BIAS
from slimadam.layers.name_patterns import NORM as NORM
from slimadam.layers.name_patterns import UNKNOWN as UNKNOWN
from slimadam.layers.name_patterns import bare_name, search, unwrapped_name
from slimadam.layers.name_patterns import canonical_name as canonical_name
from slimadam.layers.name_patterns import names_of as names_of
from slimadam.layers.name_patterns import role_from_name as role_from_name
from slimadam.utils import torch_private


class ParameterRole(NamedTuple):
    """Role and layout of one parameter.

    A dimension that is neither an input nor an output, such as the experts of a stack, is in neither fan.

    Attributes:
        role: For instance ``"query"``, ``"token_embedding"``, ``"norm"`` or ``"unknown"``.
        fan_in: Dimensions that are summed over in the forward pass (for embeddings: the embedding one).
        fan_out: Dimensions that index outputs (for embeddings: the tokens or positions).
    """

    role: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()


# Roles of names that mean something only beside others.
_AMONG_SIBLINGS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("w1 w2 w3", {"w1": "mlp_gate", "w2": "mlp_down", "w3": "mlp_up"}),
    ("w1 w2 v1", {"w1": "mlp_gate", "w2": "mlp_down", "v1": "mlp_up"}),
    ("w12 w3", {"w12": "fused_gate_up", "w3": "mlp_down"}),
    ("w1 w2", {"w1": "mlp_up", "w2": "mlp_down"}),
    ("wi wo", {"wi": "mlp_up", "wo": "mlp_down"}),
    ("wi_0 wi_1 wo", {"wi_0": "mlp_gate", "wi_1": "mlp_up", "wo": "mlp_down"}),
    ("q_attn c_attn", {"q_attn": "query", "c_attn": "fused_kv"}),
    ("c_fc c_proj", {"c_proj": "mlp_down"}),
    ("gate experts", {"gate": "router"}),
    ("gate up down", {"gate": "mlp_gate"}),
    ("gate up_proj down_proj", {"gate": "mlp_gate"}),
)

_EXPERT_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NORM_TYPE = re.compile(r"norm|grn", re.IGNORECASE)
_ATTENTION_TYPE = re.compile(r"att(n|ention)", re.IGNORECASE)
_SQUEEZE_TYPE = re.compile(r"(^|[a-z0-9])SE(Layer|Block|Module)?$|Squeeze(And)?Excit")
_NUMBERED = re.compile(r"(^|_|[a-z])\d$|^\d+$|^fc_(in|out)$")
_AMBIGUOUS_ALONE = frozenset({"q", "k", "v", "query", "key", "value"})
_INNER_ATTENTION = frozenset({"query", "key", "value", "fused_qkv", "fused_kv"})
_FEED_FORWARD = frozenset({"fused_gate_up", "mlp_gate", "mlp_up", "mlp_down"})
_AVERAGED_OVER_FAN_IN = {"token_embedding", "position_embedding", "patch_embedding", "lm_head", "query", "key"}
_AVERAGED_OVER_FAN_OUT = {"value", "attention_output", "mlp_up", "mlp_gate", "mlp_down"}


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, without the ``FSDP`` that ``fully_shard`` puts in front."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, fsdp.FSDPModule))
    return type(module).__name__


def roles_of(model: nn.Module) -> dict[str, ParameterRole]:
    """Return role and layout for each name of ``model.named_parameters()``, wrapped or not."""
    graph = _Graph(model)
    return {name: graph.role_of(name, parameter) for name, parameter in model.named_parameters()}


class _Linear(NamedTuple):
    """A module that multiplies by a stored matrix."""

    inputs: int
    outputs: int
    transposed: bool


class _Graph:
    """A model's modules by their paths without wrappers, with their children, tables and vocabulary sizes."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._children: dict[str, dict[str, nn.Module | None]] = {}
        self._tables: dict[int, str] = {}
        self._vocabulary: set[int] = set()
        for path, module in model.named_modules(remove_duplicate=False):
            path, _ = _split(unwrapped_name(_joined(path, "weight")))
            self._modules[path] = module
            self._add_child(path, module)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self._add_table(path, module)
        for name, _ in model.named_parameters(remove_duplicate=False):
            self._add_child(unwrapped_name(name), None)

    def role_of(self, name: str, parameter: Tensor) -> ParameterRole:
        path, leaf = _split(unwrapped_name(name))
        module, shape = self._modules[path], tuple(parameter.shape)
        if table := self._tables.get(id(parameter)) or self._tables.get(id(module)):
            return _matrix(table)
        by_name = role_from_name(name, len(shape))
        if by_name == BIAS:
            return ParameterRole(BIAS)
        is_vector = sum(size > 1 for size in shape) <= 1
        if leaf == "weight_g" or (is_vector and _NORM_TYPE.search(class_name(module))):
            return ParameterRole(NORM)
        adapter = search(name_patterns.ADAPTERS, bare_name(name))
        if isinstance(module, nn.modules.conv._ConvNd):
            return _convolution(module, adapter or self._convolution_role(path, module))
        if adapter:
            return _matrix(adapter, adapter == "lora_embedding_a") if len(shape) == 2 else ParameterRole(adapter)
        linear = _as_linear(module)
        if linear is not None and leaf.startswith("weight"):
            return _matrix(self._linear_role(path, linear), linear.transposed)
        if isinstance(module, nn.MultiheadAttention) and leaf.endswith("_proj_weight"):
            return _matrix({"in": "fused_qkv", "q": "query", "k": "key", "v": "value"}[leaf.split("_")[0]])
        return self._free_tensor(path, leaf, shape, by_name)

    def _add_child(self, path: str, module: nn.Module | None) -> None:
        parent, own = _split(path)
        self._children.setdefault(parent, {})[own] = module

    def _add_table(self, path: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
        by_class = "position_embedding" if "position" in class_name(module).lower() else "token_embedding"
        role = search(name_patterns.TABLES, bare_name(path)) or by_class
        if role == "token_embedding":
            self._vocabulary.add(module.num_embeddings)
        # Heads share their weight with the table; a parametrized one keeps it elsewhere.
        self._tables[id(torch_private.parameters(module).get("weight", module))] = role

    def _linear_role(self, path: str, linear: _Linear) -> str:
        parent, own = _split(path)
        if role := "squeeze_excite" if self._in_squeeze_excite(path) else self._role_among_siblings(parent, own):
            return role
        role = search(name_patterns.LINEARS, bare_name(path))
        if self._in_attention(parent):
            role = role or search(name_patterns.ATTENTION_PARTS, f"attention.{own.lower()}")
        elif own.lower() in _AMBIGUOUS_ALONE:
            role = ""
        if not role or (role in ("mlp_up", "mlp_down") and _NUMBERED.search(own)):
            role = self._role_by_sizes(path, linear, named=bool(role))
        return self._head_role(path, linear, role) if role in (UNKNOWN, "classifier") else role

    def _role_among_siblings(self, parent: str, own: str) -> str:
        siblings = self._children.get(parent, {}).keys()
        fitting = (roles[own] for names, roles in _AMONG_SIBLINGS if own in roles and siblings >= {*names.split()})
        return next(fitting, "")

    def _role_by_sizes(self, path: str, linear: _Linear, *, named: bool) -> str:
        """Tell the role of a matrix from its sizes and those of its siblings."""
        parent, own = _split(path)
        if linear.outputs > 1 and linear.outputs == _expert_count(self._modules[parent]):
            return "router"
        linears = self._linears(parent)
        roles = {sibling: search(name_patterns.LINEARS, bare_name(_joined(parent, sibling))) for sibling in linears}
        pair = [sibling for sibling, role in roles.items() if role in ("", "mlp_up", "mlp_down")]
        if not named and self._in_attention(parent):
            only_one_left = len(pair) == 1 and not _INNER_ATTENTION.isdisjoint(roles.values())
            return "attention_output" if only_one_left else UNKNOWN
        if len(pair) != 2:
            return UNKNOWN
        first, second = (linears[sibling] for sibling in pair)
        fused = first.outputs == 2 * second.inputs
        plain = first.outputs == second.inputs and (named or first.outputs > first.inputs)
        if first.inputs != second.outputs or not (fused or plain):
            return UNKNOWN  # it does not end where it began, as a residual branch must
        if own != pair[0]:
            return "mlp_down"
        return "fused_gate_up" if fused else "mlp_up"

    def _head_role(self, path: str, linear: _Linear, role: str) -> str:
        parent, own = _split(path)
        repeated = any(part.isdigit() for part in parent.split("."))
        if linear.outputs in self._vocabulary and not repeated:
            return "lm_head"
        in_sequence = isinstance(self._modules[parent], nn.Sequential)
        hidden = role == "classifier" and in_sequence and own != [*self._linears(parent)][-1]
        return "head_transform" if hidden else role

    def _linears(self, parent: str) -> dict[str, _Linear]:
        """Return the children that multiply by a matrix, in their order."""
        children = self._children.get(parent, {})
        found = {own: _as_linear(module) for own, module in children.items() if module is not None}
        return {own: linear for own, linear in found.items() if linear is not None}

    def _in_attention(self, path: str) -> bool:
        parts = {search(name_patterns.ATTENTION_PARTS, f".{own.lower()}") for own in self._children.get(path, {})}
        named = f"{path}.{class_name(self._modules[path])}"
        together = "fused_qkv" in parts or {"query", "key"} <= parts
        return together or _ATTENTION_TYPE.search(named) is not None

    def _in_squeeze_excite(self, path: str) -> bool:
        parent, _ = _split(path)
        types = (class_name(self._modules[above]) for above in (parent, _split(parent)[0]))
        named = search(name_patterns.SQUEEZE_EXCITE, bare_name(path))
        return bool(named) or any(_SQUEEZE_TYPE.search(name) for name in types)

    def _convolution_role(self, path: str, module: nn.modules.conv._ConvNd) -> str:
        if self._in_squeeze_excite(path):
            return "squeeze_excite"
        by_groups = "depthwise_convolution" if 1 < module.groups == module.in_channels else "convolution"
        return search(name_patterns.PATCH_EMBEDDINGS, bare_name(path)) or by_groups

    def _free_tensor(self, path: str, leaf: str, shape: tuple[int, ...], by_name: str) -> ParameterRole:
        module, ndim = self._modules[path], len(shape)
        experts = _expert_count(module)
        if ndim == 2 and (experts == shape[0] or self._role_among_siblings(*_split(path)) == "router"):
            return _matrix("router")
        role = self._role_among_siblings(path, leaf) or by_name
        if ndim == 3 and (experts == shape[0] or "expert" in f"{path}.{class_name(module)}".lower()):
            inputs, outputs = (2, 1) if self._inputs_last(path, shape[0]) else (1, 2)
            return ParameterRole(role, (inputs,), (outputs,))
        if ndim == 2 and experts is not None and role in _FEED_FORWARD:
            # The first dimension holds the experts too, beside the hidden units: it is in neither fan.
            return ParameterRole(role, (), (1,)) if role == "mlp_down" else ParameterRole(role, (1,), ())
        if role in ("position_embedding", "learned_token"):
            return ParameterRole(role, (ndim - 1,), tuple(range(ndim - 1)))
        return _matrix(role) if ndim == 2 and role != UNKNOWN else ParameterRole(role)

    def _inputs_last(self, path: str, experts: int) -> bool:
        """Return whether stacks of a module are stored ``[experts, out, in]`` rather than ``[experts, in, out]``."""
        module = self._modules[path]
        declared = getattr(module, "is_transposed", None)
        if isinstance(declared, bool):
            return not declared
        tensors = dict(module.named_parameters(recurse=False))
        width = self._router_width(_split(path)[0], experts)
        for leaf, stack in tensors.items():
            if stack.dim() != 3 or stack.shape[1] == stack.shape[2]:
                continue
            bias = tensors.get(f"{leaf.removesuffix('_weight')}_bias")
            if bias is not None:
                return stack.shape[1] == bias.shape[-1]
            role = self._role_among_siblings(path, leaf) or role_from_name(_joined(path, leaf), 3)
            if width in stack.shape[1:] and role in _FEED_FORWARD:
                return (stack.shape[2] == width) != (role == "mlp_down")
        return True

    def _router_width(self, parent: str, experts: int) -> int | None:
        """Return the input width of a block of experts, from its router, which has one output for each of them."""
        for path, module in self._modules.items():
            weight = torch_private.parameters(module).get("weight")
            inside = not parent or f"{path}.".startswith(f"{parent}.")
            if inside and weight is not None and weight.dim() == 2 and weight.shape[0] == experts:
                return weight.shape[1]
        return None


def _as_linear(module: nn.Module) -> _Linear | None:
    if isinstance(module, nn.Linear):
        return _Linear(module.in_features, module.out_features, transposed=False)
    weight = torch_private.parameters(module).get("weight")
    if weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    if class_name(module) == "Conv1D":
        return _Linear(rows, columns, transposed=True)
    declared = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return _Linear(columns, rows, transposed=False) if declared == (columns, rows) else None


def _matrix(role: str, transposed: bool = False) -> ParameterRole:
    return ParameterRole(role, (0,), (1,)) if transposed else ParameterRole(role, (1,), (0,))


def _convolution(module: nn.modules.conv._ConvNd, role: str) -> ParameterRole:
    kernel = tuple(range(2, 2 + len(module.kernel_size)))
    if not module.transposed or module.groups == module.in_channels == module.out_channels:
        return ParameterRole(role, (1, *kernel), (0,))
    # With several groups the first dimension counts groups, which are outputs, as well as inputs.
    return ParameterRole(role, kernel if module.groups > 1 else (0, *kernel), (1,))


def _expert_count(module: nn.Module) -> int | None:
    counts = (getattr(module, name, None) for name in _EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _split(path: str) -> tuple[str, str]:
    parent, _, own = path.rpartition(".")
    return parent, own


def _joined(parent: str, own: str) -> str:
    return f"{parent}.{own}" if parent else own


def recommended_dims(role: ParameterRole) -> tuple[int, ...]:
    """Return the dimensions that the paper recommends averaging over; none where it gives no rule.

    Source: arXiv 2503.01843, section on rules.
    """
    if role.role in _AVERAGED_OVER_FAN_IN:
        return role.fan_in
    return role.fan_out if role.role in _AVERAGED_OVER_FAN_OUT else ()
