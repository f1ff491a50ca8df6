"""What a parameter is: read off the module graph first, off names second.

A role is a short name such as ``"query"`` or ``"mlp_down"``; ``"unknown"`` where nothing says what a matrix
does. With it comes the layout: which dimensions of the stored tensor are fan-in and which fan-out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

UNKNOWN = "unknown"
NORM = "norm"
BIAS = "bias"

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class ParameterRole(NamedTuple):
    """Role and layout of one parameter.

    Attributes:
        role: For instance ``"query"``, ``"token_embedding"``, ``"norm"`` or ``"unknown"``.
        fan_in: Dimensions that are summed over in the forward pass (for embeddings: the embedding one).
        fan_out: Dimensions that index outputs (for embeddings: the tokens or positions).
    """

    role: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()


# Last components of a module's path, in the order in which they are tried. Each pattern is matched against
# the path with its wrappers removed, lower-cased, digits (layer numbers) dropped.
_LINEAR_ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(lm_head|output_projection|unembed\w*|embed_out|to_logits)$", "lm_head"),
    (r"(^|\.)(classifier|score|classification_head|fc_out|heads?|head\.fc)$", "classifier"),
    (r"\.(c_attn|qkv|qkv_proj|query_key_value|wqkv|in_proj|attn_qkv)$", "fused_qkv"),
    (r"(^|\.)(q|q_proj|query|to_q|wq|query_proj)$", "query"),
    (r"(^|\.)(k|k_proj|key|to_k|wk|key_proj)$", "key"),
    (r"(^|\.)(v|v_proj|value|to_v|wv|value_proj)$", "value"),
    (r"attn\w*\.(c_proj|proj|o|o_proj|out_proj|out|wo|to_out|dense)$", "attention_output"),
    (r"attention\w*\.(o|o_proj|out_proj|output|output\.dense|dense|wo|out|proj|projection)$", "attention_output"),
    (r"(^|\.)(o_proj|out_proj|to_out|wo|attn_out|attention_output)$", "attention_output"),
    (r"(^|\.)(gate_up_proj|gate_up)$", "fused_gate_up"),
    (r"(^|\.)(gate_proj|gate|w1|wi_0)$", "mlp_gate"),
    (r"(^|\.)(router|mlp_gate)$", "router"),
    (r"(^|\.)(up_proj|up|c_fc|fc1|wi|wi_1|w3|linear1|dense_h_to_4h|intermediate\.dense|pwconv1)$", "mlp_up"),
    (r"(^|\.)(down_proj|down|fc2|w2|linear2|dense_4h_to_h|pwconv2|mlp\.c_proj)$", "mlp_down"),
    (r"(^|\.)(densereludense|mlp|ffn|feed_forward)\.wo$", "mlp_down"),
    (r"(^|\.)(layers?|layer)\.output\.dense$", "mlp_down"),
)

_NORM_TYPE = re.compile(r"norm", re.IGNORECASE)
_POSITION = re.compile(r"pos|wpe", re.IGNORECASE)


def canonical_name(name: str) -> str:
    """``name`` without what ``torch.compile``, FSDP, checkpointing and DDP add to it.

    Example:
        >>> canonical_name("_orig_mod.module.layers.0.weight")
        'layers.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def roles_of(model: nn.Module) -> dict[str, ParameterRole]:
    """Role and layout of each parameter of a model.

    Args:
        model: Any module, wrapped or not.

    Returns:
        For each name of ``model.named_parameters()``: its role.
    """
    vocabulary = {
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not _POSITION.search(path)
    }
    tied_inputs = {
        id(module.weight): _embedding_role(path)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    modules = dict(model.named_modules())
    found: dict[str, ParameterRole] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if id(parameter) in tied_inputs:
            found[name] = ParameterRole(tied_inputs[id(parameter)], (1,), (0,))
        else:
            found[name] = _role_of(modules[path], path, leaf, parameter.dim(), vocabulary)
    return found


def role_from_name(name: str, ndim: int) -> str:
    """The role that a parameter's name suggests, for when its module is not at hand.

    Args:
        name: Qualified parameter name.
        ndim: Number of dimensions of the parameter.
    """
    path, _, leaf = canonical_name(name).lower().rpartition(".")
    if leaf.startswith("bias"):
        return BIAS
    if ndim <= 1:
        return NORM if re.search(r"norm|(^|\.)ln|bn\d*$", path) else UNKNOWN
    if re.search(r"(wpe|pos\w*emb\w*|position_embeddings?|pos)$", path) or leaf.startswith("pos_emb"):
        return "position_embedding"
    if re.search(r"patch_embed\w*(\.proj\w*)?$", path):
        return "patch_embedding"
    if re.search(r"(wte|tok\w*emb\w*|embed_tokens|word_embeddings|embed|embedding|shared)$", path):
        return "token_embedding"
    return _linear_role(path)


def _role_of(module: nn.Module, path: str, leaf: str, ndim: int, vocabulary: set[int]) -> ParameterRole:
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return ParameterRole(BIAS)
    if _NORM_TYPE.search(type(module).__name__):
        return ParameterRole(NORM)
    if isinstance(module, nn.Linear):
        linear = _linear_role(path)
        if linear == UNKNOWN and module.out_features in vocabulary:
            linear = "lm_head"
        return ParameterRole(linear, (1,), (0,))
    if type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d) and ndim == 2:
        return ParameterRole(_linear_role(path), (0,), (1,))
    if isinstance(module, nn.modules.conv._ConvNd) and ndim > 1:
        return _convolution_role(module, path, ndim)
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        return ParameterRole("fused_qkv", (1,), (0,))
    if isinstance(module, nn.MultiheadAttention) and leaf[1:] == "_proj_weight":
        return ParameterRole({"q": "query", "k": "key", "v": "value"}[leaf[0]], (1,), (0,))
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and ndim == 2:
        kind = "recurrent_input" if leaf.startswith("weight_ih") else "recurrent_hidden"
        return ParameterRole(kind, (1,), (0,))
    if _POSITION.search(leaf) and ndim >= 2:
        return ParameterRole("position_embedding", (ndim - 1,), tuple(range(ndim - 1)))
    if ndim == 2:
        role = role_from_name(f"{path}.{leaf}", ndim)
        return ParameterRole(role, (1,), (0,))
    return ParameterRole(UNKNOWN)


def _embedding_role(path: str) -> str:
    return "position_embedding" if _POSITION.search(path) else "token_embedding"


def _convolution_role(module: nn.modules.conv._ConvNd, path: str, ndim: int) -> ParameterRole:
    first, second = (1, 0) if module.transposed else (0, 1)
    role = "patch_embedding" if re.search(r"patch_?embed", path.lower()) else "convolution"
    return ParameterRole(role, (second, *range(2, ndim)), (first,))


def _linear_role(path: str) -> str:
    bare = ".".join(part for part in canonical_name(path).lower().split(".") if not part.isdigit())
    for pattern, role in _LINEAR_ROLES:
        if re.search(pattern, bare):
            return role
    return UNKNOWN


_RULES: Mapping[str, str] = {
    "token_embedding": "fan_in",
    "position_embedding": "fan_in",
    "patch_embedding": "fan_in",
    "lm_head": "fan_in",
    "query": "fan_in",
    "key": "fan_in",
    "value": "fan_out",
    "attention_output": "fan_out",
    "mlp_up": "fan_out",
    "mlp_gate": "fan_out",
    "mlp_down": "fan_out",
}


def recommended_dims(role: ParameterRole) -> tuple[int, ...]:
    """The dimensions that the paper recommends averaging over for a role (arXiv 2503.01843, section on rules).

    Args:
        role: Role and layout of the parameter.

    Returns:
        Dimensions to average over; empty where the paper gives no rule.
    """
    side = _RULES.get(role.role)
    if side is None:
        return ()
    return role.fan_in if side == "fan_in" else role.fan_out
