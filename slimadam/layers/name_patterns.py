"""Names of parameters as text, and the roles that they suggest where modules do not tell them.

Patterns are searched in a bare name (:func:`bare_name`); the first that matches counts, so narrow ones come first.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from slimadam.layers.splits import Part

UNKNOWN = "unknown"
NORM = "norm"
BIAS = "bias"

Patterns = tuple[tuple[re.Pattern[str], str], ...]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ADAPTER_HOLDERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.original([01]?)$")
_WEIGHT = re.compile(r"(\.weight(_v)?|_weight)$")
_ATTENTION = r"att(n|ention)\w*"
_FEED_FORWARD = r"(mlp|ffn?|feed_?forward|dense\w*dense)"


def _compiled(*patterns: tuple[str, str]) -> Patterns:
    return tuple((re.compile(pattern), role) for pattern, role in patterns)


def _last(words: str) -> str:
    """Make a pattern for the last component, or components, of a name."""
    return rf"(^|\.)({words})$"


def _projection(word: str) -> tuple[str, str]:
    """Make a pattern for query, key or value; alone at the top of a model the word means something else."""
    letter = word[0]
    named = _last(rf"(to_|w|linear_){letter}|({letter}|{word})_(b_)?(proj|lin|linear)")
    return rf"\.({letter}|{word})$|{named}", word


# Adapters as PEFT lays them out: the name of the adapter may follow.
ADAPTERS = _compiled(
    (_last(r"lora_embedding_a(\.\w+)?"), "lora_embedding_a"),
    (_last(r"lora_embedding_b(\.\w+)?"), "lora_embedding_b"),
    (_last(r"lora_a(\.\w+)?"), "lora_a"),
    (_last(r"lora_b(\.\w+)?"), "lora_b"),
    (_last(r"lora_magnitude_vector(\.\w+)?"), "layer_scale"),
)
_SCALES = _compiled((_last(r"(layer_?scale\w*|ls\d?)(\.\w+)?|gamma(_?\d)?|lambda_?\d"), "layer_scale"))
_RELATIVE_POSITION_BIASES = _compiled((_last(r"rel(ative)?_\w*bias(_table)?"), "relative_position_bias"))
_POSITIONS = r"(^|[._])(wpe|rel_emb\w*|pos(ition(s|al)?)?(_?e(mb|nc)\w*)?)(_[hw])?(\.(emb\w*|pe|table))?$"
_TOKENS = r"wte|(\w+_)?tok(en)?s?_emb\w*|embed_tokens|word_emb\w*|emb(ed(ding)?s?)?|embed_in|shared"
_PATCHES = r"\w*patch_?emb\w*(\.(proj\w*|conv\w*))?|conv_proj|x_embedder\.proj"
PATCH_EMBEDDINGS = _compiled((_last(_PATCHES), "patch_embedding"))
_LEARNED = r"(\w+_)?(cls|class|mask|dist\w*|reg|register|query)_tokens?|mask_emb\w*|class_embedding|latents"
_FREE_TOKENS = _compiled((_last(_LEARNED), "learned_token"))
TABLES = (
    *_RELATIVE_POSITION_BIASES,
    *_compiled((_POSITIONS, "position_embedding")),
    *PATCH_EMBEDDINGS,
    *_FREE_TOKENS,
    *_compiled((_last(r"(token_type|segment|type)_emb\w*"), "segment_embedding"), (_last(_TOKENS), "token_embedding")),
)
_OUTPUTS = _compiled(
    (_last(r"(classifier|\w*head|\w*predictions(\.transform)?)\.dense|vocab_transform"), "head_transform"),
    (_last(r"(router|gate|gating)\.(wg|layer|classifier|linear)|\w*router|\w*expert_gate"), "router"),
    (r"(^|(?<!experts)\.)gate$", "router"),
    (_last(r"lm_head(\.decoder)?|output_projection|unembed\w*|embed_out|to_logits"), "lm_head"),
    (_last(r"vocab_projector|predictions\.decoder"), "lm_head"),
    (r"^(model\.)?output$", "lm_head"),
    (_last(r"(classifier|classification_head)\.out_proj|\w*classifier|score|\w*heads?|head\.fc"), "classifier"),
    (_last(r"head_dist|qa_outputs|seq_relationship|dense_prediction"), "classifier"),
    (r"^(model\.)?fc$", "classifier"),
    (_last(r"pooler(\.\w+)?"), "pooler"),
)
_ATTENTION_OUTPUTS = r"(c_proj|w?o|o(ut)?_(proj|lin)|to_out|(linear_)?out|dense|output(\.dense)?|proj(ection)?)"
ATTENTION_PARTS = _compiled(
    (rf"{_ATTENTION}\.in_proj$", "fused_qkv"),
    (_last(r"c_attn|w?qkv(_proj)?|to_qkv|query_key_value|attn_qkv"), "fused_qkv"),
    (_last(r"to_kv|w?kv(_proj)?|key_value|kv_b_proj|wkv_b"), "fused_kv"),
    (_last(r"q_a_proj|wq_a"), "latent_query"),
    (_last(r"kv_a_proj\w*|wkv_a"), "latent_kv"),
    (_last(r"wq_b|q_attn"), "query"),
    _projection("query"),
    _projection("key"),
    _projection("value"),
    (rf"{_ATTENTION}\.{_ATTENTION_OUTPUTS}$", "attention_output"),
    (_last(r"o_proj|o_lin|to_out|attn_out(put)?|attention_out(put)?"), "attention_output"),
)
_FEED_FORWARD_PARTS = _compiled(
    (_last(r"gate_(and_)?up(_proj)?|w12|w13"), "fused_gate_up"),
    (rf"{_FEED_FORWARD}\.input_linear$", "fused_gate_up"),
    (rf"{_FEED_FORWARD}\.output_linear$", "mlp_down"),
    (_last(r"gate_proj|gate|w1|wi_0"), "mlp_gate"),
    (_last(r"up_proj|up|w3|c_fc|fc_?1|fc_in|lin(ear)?_?1|wi|wi_1"), "mlp_up"),
    (_last(r"dense_h_to_4h|intermediate\.dense|intermediate_dense|pwconv1"), "mlp_up"),
    (_last(r"down_proj|down|w2|fc_?2|lin(ear)?_?2|dense_4h_to_h|output_dense|pwconv2"), "mlp_down"),
    (rf"(^|\.){_FEED_FORWARD}\.(c_proj|wo|fc_out|proj|dense)$", "mlp_down"),
    (r"(^|\.)(layers?|blocks?|h)\.output\.dense$", "mlp_down"),
)
SQUEEZE_EXCITE = _compiled((r"(^|\.)(se|se_?(module|block|layer)|squeeze_?(and_?)?excit\w*)\.", "squeeze_excite"))
_CONVOLUTIONS = _compiled(
    (_last(r"dw_?conv\w*|conv_?dw\w*|\w*depthwise\w*"), "depthwise_convolution"),
    (r"conv|stem|downsample|shortcut|features", "convolution"),
)
_RECURRENT = _compiled(
    (_last(r"weight_ih(_l\d+)?(_reverse)?"), "recurrent_input"),
    (_last(r"weight_hh(_l\d+)?(_reverse)?"), "recurrent_hidden"),
    (_last(r"weight_hr(_l\d+)?(_reverse)?"), "recurrent_projection"),
)
_PROJECTIONS = _compiled(
    (_last(r"(\w+_)?(projection|projector)|project_(in|out)|reduction"), "projection"),
    (_last(r"embeddings_project|embedding_hidden_mapping_in|\w*projector\.\w+"), "projection"),
)
_NORMS = re.compile(r"(^|\.)(\w*norm(?!al(?!i[sz]))\w*|ln(_?[a-z0-9]+)*|(\w+_)?bn\d*)(\.(gamma|scale|g))?$")
_STACKS = ATTENTION_PARTS + _FEED_FORWARD_PARTS
LINEARS = SQUEEZE_EXCITE + PATCH_EMBEDDINGS + _OUTPUTS + _STACKS + _PROJECTIONS
MATRIX_ROLES = frozenset(role for _, role in LINEARS + TABLES)


def search(patterns: Patterns, bare: str) -> str:
    """Return the role of the first pattern that matches a bare name; an empty text without one.

    Args:
        patterns: Patterns with their roles.
        bare: Result of :func:`bare_name`.
    """
    return next((role for pattern, role in patterns if pattern.search(bare)), "")


def canonical_name(name: str) -> str:
    """Return ``name`` without the components that ``torch.compile``, FSDP, checkpointing and DDP add to it.

    Example:
        >>> canonical_name("_orig_mod.module.layers.0.weight")
        'layers.0.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def unwrapped_name(name: str) -> str:
    """Return :func:`canonical_name` without adapters' holders, parametrized tensors under their own names."""
    own = _PARAMETRIZED.sub(lambda found: f".{found[1]}{'_g' if found[2] == '0' else ''}", name)
    return _ADAPTER_HOLDERS.sub("", canonical_name(own))


def bare_name(name: str) -> str:
    """Return :func:`unwrapped_name` in lower case, without layer numbers and without ``weight`` at its end."""
    parts = (part for part in unwrapped_name(name).lower().split(".") if not part.isdigit())
    return _WEIGHT.sub("", ".".join(parts))


def names_of(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return all names of each parameter, without wrapper prefixes: several where it is tied, in module order."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(canonical_name(name))
    return names


def key_of(name: str, part: Part | None) -> str:
    """Return the key of a parameter, or of one part of it, in plans and histories.

    Args:
        name: The parameter's name.
        part: The part; None for all of it.
    """
    return name if part is None else f"{name}[{part.label}]"


def owner_of(key: str, part: Part | None) -> str:
    """Return the parameter's name from :func:`key_of`.

    Args:
        key: The key of a parameter or part.
        part: The part; None for all of it.
    """
    return key if part is None else key.removesuffix(f"[{part.label}]")


def role_from_name(name: str, ndim: int) -> str:
    """Return the role that a parameter's name suggests, or ``"unknown"``.

    Args:
        name: Qualified parameter name.
        ndim: Number of dimensions of the parameter.
    """
    bare = bare_name(name)
    if ndim > 1 and (found := search(_RELATIVE_POSITION_BIASES, bare)):
        return found
    leaf = bare.rpartition(".")[2]
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return BIAS
    if found := search(ADAPTERS, bare):
        return found
    if _NORMS.search(bare) or unwrapped_name(name).endswith("weight_g"):
        return NORM
    if ndim <= 1:
        patterns = _SCALES + _FREE_TOKENS
    elif ndim == 2:
        patterns = TABLES + LINEARS + _RECURRENT
    else:
        patterns = SQUEEZE_EXCITE + TABLES + _CONVOLUTIONS + (_STACKS if ndim == 3 else ())
    return search(patterns, bare) or ("convolution" if ndim > 3 else UNKNOWN)
