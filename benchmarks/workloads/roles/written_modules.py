"""Small modules as people write them, and the roles of their parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.workloads.roles.expected_roles import Architecture, Expected, rows

VOCABULARY, WIDTH, HIDDEN, EXPERTS, RANK = 50, 16, 24, 4, 3


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(inputs, outputs, bias=False) for name, (inputs, outputs) in sizes.items()}


def _module(*children: Mapping[str, nn.Module], **more: nn.Module | nn.Parameter) -> nn.Module:
    """Return a module with the given children and tensors."""
    module = nn.Module()
    for name, child in {**{name: child for group in children for name, child in group.items()}, **more}.items():
        setattr(module, name, child)
    return module


def nano_gpt() -> nn.Module:
    """Build fused query, key, value in a Linear; the head is tied and comes first."""
    block = _module(
        ln_1=nn.LayerNorm(WIDTH),
        attn=_module(_linears(c_attn=(WIDTH, 3 * WIDTH), c_proj=(WIDTH, WIDTH))),
        ln_2=nn.LayerNorm(WIDTH),
        mlp=_module(_linears(c_fc=(WIDTH, 4 * WIDTH), c_proj=(4 * WIDTH, WIDTH))),
    )
    embeddings = {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(20, WIDTH)}
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = embeddings["wte"].weight
    return _module(lm_head=head, transformer=_module(embeddings, h=nn.ModuleList([block])))


def meta_llama() -> nn.Module:
    """Build a model with wq, wk, wv, wo and w1, w2, w3; the head is called output."""
    mlp = _module(_linears(w1=(WIDTH, HIDDEN), w2=(HIDDEN, WIDTH), w3=(WIDTH, HIDDEN)))
    attention = _module(_linears(wq=(WIDTH, WIDTH), wk=(WIDTH, 8), wv=(WIDTH, 8), wo=(WIDTH, WIDTH)))
    layer = _module(attention=attention, feed_forward=mlp, attention_norm=nn.RMSNorm(WIDTH))
    return _module(
        {
            "tok_embeddings": nn.Embedding(VOCABULARY, WIDTH),
            "layers": nn.ModuleList([layer]),
            "norm": nn.RMSNorm(WIDTH),
        },
        _linears(output=(WIDTH, VOCABULARY)),
    )


class Experts(nn.Module):
    """Experts in stacks."""

    def __init__(self, **stacks: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        for name, shape in stacks.items():
            setattr(self, name, _empty(*shape))


def mixture(**stacks: tuple[int, ...]) -> nn.Module:
    """Build a router and stacked experts of the given shapes."""
    return _module(_linears(gate=(WIDTH, EXPERTS)), experts=Experts(**stacks))


def routed() -> nn.Module:
    """Build experts beside a router with a name of its own."""
    block = Experts(w1=(EXPERTS, HIDDEN, WIDTH), w2=(EXPERTS, WIDTH, HIDDEN))
    block.choose = nn.Linear(WIDTH, EXPERTS, bias=False)
    return _module(moe=block)


def mixture_of_linears() -> nn.Module:
    """Build Mixtral as transformers 4 had it: a list of experts, each of three Linears, and a gate that routes."""
    experts = (_module(_linears(w1=(WIDTH, HIDDEN), w2=(HIDDEN, WIDTH), w3=(WIDTH, HIDDEN))) for _ in range(EXPERTS))
    return _module(block_sparse_moe=_module(_linears(gate=(WIDTH, EXPERTS)), experts=nn.ModuleList(experts)))


def sequential_vision_transformer() -> nn.Module:
    """Build layers known by their position in a Sequential, patches embedded by a Linear."""
    attention = _module(
        _linears(to_qkv=(WIDTH, 3 * WIDTH)), to_out=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout())
    )
    mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    return _module(
        to_patch_embedding=nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, WIDTH)),
        pos_embedding=_empty(1, 5, WIDTH),
        cls_token=_empty(1, 1, WIDTH),
        layers=nn.ModuleList([nn.ModuleList([attention, mlp])]),
        mlp_head=nn.Linear(WIDTH, 5),
    )


def timm_vision_transformer() -> nn.Module:
    """Build fused qkv and proj, layer scales, a Conv2d that embeds patches."""
    block = _module(
        attn=_module(_linears(qkv=(WIDTH, 3 * WIDTH), proj=(WIDTH, WIDTH))),
        ls1=_module(gamma=_empty(WIDTH)),
        mlp=_module(_linears(fc1=(WIDTH, HIDDEN), fc2=(HIDDEN, WIDTH))),
    )
    return _module(
        patch_embed=_module(proj=nn.Conv2d(3, WIDTH, 4, 4)),
        pos_embed=_empty(1, 5, WIDTH),
        cls_token=_empty(1, 1, WIDTH),
        blocks=nn.ModuleList([block]),
        head=nn.Linear(WIDTH, 5),
    )


def gated_mlps() -> nn.Module:
    """Build gates that are gates, a fused pair of gate and up, and a fused pair that only sizes give away."""
    return _module(
        plain=_module(_linears(gate=(WIDTH, HIDDEN), up=(WIDTH, HIDDEN), down=(HIDDEN, WIDTH))),
        swiglu=_module(_linears(w12=(WIDTH, 2 * HIDDEN), w3=(HIDDEN, WIDTH))),
        two=_module(_linears(w1=(WIDTH, HIDDEN), w2=(HIDDEN, WIDTH))),
        sized=nn.Sequential(nn.Linear(WIDTH, 2 * HIDDEN), nn.GLU(), nn.Linear(HIDDEN, WIDTH)),
    )


def attention_in_other_words() -> nn.Module:
    """Build an output that only its siblings give away, and a pair of matrices that begins and ends nowhere near."""
    return _module(
        mixing=_module(_linears(query=(WIDTH, 8), key=(WIDTH, 8), value=(WIDTH, 8), merge=(8, WIDTH))),
        multihead=_module(
            _linears(linear_q=(WIDTH, 8), linear_k=(WIDTH, 8), linear_v=(WIDTH, 8), linear_out=(8, WIDTH))
        ),
        squeeze=_module(_linears(narrow=(WIDTH, 4), wide=(4, WIDTH))),
    )


def convolutional_network() -> nn.Module:
    """Build the first network of every tutorial: fc1, fc2 and fc3 are no transformer's MLP."""
    return _module(
        {"conv1": nn.Conv2d(1, 6, 5), "bn1": nn.BatchNorm2d(6)},
        _linears(fc1=(96, 40), fc2=(40, 30), fc3=(30, 10)),
    )


def vgg() -> nn.Module:
    """Build a head of several layers: the last one classifies."""
    layers = (nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
    return _module(features=nn.Sequential(nn.Conv2d(3, 8, 3)), classifier=nn.Sequential(*layers))


def actor_critic() -> nn.Module:
    """Build a value that no query or key accompanies."""
    return _module(_linears(body=(8, WIDTH), policy=(WIDTH, 3), value=(WIDTH, 1), q=(WIDTH, 3)))


def byte_model() -> nn.Module:
    """Build a model with as many tokens as channels: a square matrix inside a layer is not the head."""
    layer = _module(_linears(mix=(64, 64)))
    embedding = nn.Embedding(64, 64)
    return _module({"embed": embedding, "layers": nn.ModuleList([layer])}, _linears(head=(64, 64)))


def convolutions() -> nn.Module:
    """Build every way in which torch stores filters."""
    return _module(
        plain=nn.Conv2d(4, 6, 3),
        one_dimension=nn.Conv1d(4, 6, 3),
        grouped=nn.Conv2d(4, 6, 3, groups=2),
        depthwise=nn.Conv2d(4, 8, 3, groups=4),
        transposed=nn.ConvTranspose2d(4, 6, 3),
        grouped_transposed=nn.ConvTranspose2d(4, 6, 3, groups=2),
        depthwise_transposed=nn.ConvTranspose2d(4, 4, 3, groups=4),
    )


class SELayer(nn.Module):
    """Squeeze-and-excitation known by its class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())


def squeeze_and_excitation() -> nn.Module:
    """Build squeeze-and-excitation by name with convolutions, by class with Linears."""
    return _module(se=_module(fc1=nn.Conv2d(16, 4, 1), fc2=nn.Conv2d(4, 16, 1)), recalibrate=SELayer())


class LoraLayer(nn.Module):
    """A layer with adapters, laid out as PEFT does."""

    def __init__(self, base: nn.Module, **adapters: nn.Module | Tensor) -> None:
        super().__init__()
        self.base_layer = base
        for name, adapter in adapters.items():
            holder = nn.ModuleDict() if isinstance(adapter, nn.Module) else nn.ParameterDict()
            holder["default"] = adapter  # type: ignore[assignment]
            setattr(self, name, holder)


def adapted() -> nn.Module:
    """Build LoRA on an embedding, a query and a convolution, beside layers without."""
    query = LoraLayer(
        nn.Linear(WIDTH, WIDTH), lora_A=nn.Linear(WIDTH, RANK, bias=False), lora_B=nn.Linear(RANK, WIDTH, bias=False)
    )
    attention = _module({"q_proj": query}, _linears(k_proj=(WIDTH, 8), v_proj=(WIDTH, 8), o_proj=(WIDTH, WIDTH)))
    table = LoraLayer(
        nn.Embedding(VOCABULARY, WIDTH),
        lora_embedding_A=_empty(RANK, VOCABULARY),
        lora_embedding_B=_empty(WIDTH, RANK),
    )
    convolution = LoraLayer(
        nn.Conv2d(3, 8, 3), lora_A=nn.Conv2d(3, RANK, 3, bias=False), lora_B=nn.Conv2d(RANK, 8, 1, bias=False)
    )
    layer = _module(self_attn=attention, mlp=_module(w1=LoraLayer(nn.Linear(WIDTH, HIDDEN)), **_mlp_rest()))
    inner = _module(embed_tokens=table, conv=convolution, layers=nn.ModuleList([layer]), score=_trained_in_full())
    return _module(base_model=_module(model=inner))


def _mlp_rest() -> dict[str, nn.Module]:
    return {"w2": LoraLayer(nn.Linear(HIDDEN, WIDTH)), "w3": LoraLayer(nn.Linear(WIDTH, HIDDEN))}


def _trained_in_full() -> nn.Module:
    saved = nn.ModuleDict({"default": nn.Linear(WIDTH, 3, bias=False)})
    return _module(original_module=nn.Linear(WIDTH, 3, bias=False), modules_to_save=saved)


def parametrized() -> nn.Module:
    """Build weights that are computed from what is trained."""
    norm = nn.utils.parametrizations
    return _module(
        conv=norm.weight_norm(nn.Conv1d(4, 6, 3)),
        attn=_module(q_proj=norm.spectral_norm(nn.Linear(WIDTH, WIDTH)), k_proj=nn.Linear(WIDTH, WIDTH)),
    )


_IN_PROJ = {"in_proj_weight": "fused_qkv", "out_proj.weight": "attention_output"}
_CROSS = {
    "q_proj_weight": "query",
    "k_proj_weight": "key",
    "v_proj_weight": "value",
    "out_proj.weight": "attention_output",
}
_GATED = {"w1": "mlp_gate", "w2": "mlp_down", "w3": "mlp_up"}
_ROUTER = {"gate.weight": Expected("router")}
_META_LLAMA = {
    **rows("{}.weight", tok_embeddings="token_embedding", output="lm_head"),
    **rows("layers.*.attention.{}.weight", wq="query", wk="key", wv="value", wo="attention_output"),
}

MODULES = {
    "nanoGPT": Architecture(
        nano_gpt,
        {
            "lm_head.weight": Expected("token_embedding"),
            "transformer.wpe.weight": Expected("position_embedding"),
            **rows("transformer.h.*.attn.{}.weight", c_attn="fused_qkv", c_proj="attention_output"),
            **rows("transformer.h.*.mlp.{}.weight", c_fc="mlp_up", c_proj="mlp_down"),
        },
    ),
    "Meta's Llama": Architecture(
        meta_llama, {**_META_LLAMA, **rows("layers.*.feed_forward.{}.weight", **_GATED)}
    ),
    "nn.Transformer": Architecture(
        lambda: nn.Transformer(WIDTH, 2, 1, 1, HIDDEN, batch_first=True),
        {
            **rows("encoder.layers.*.self_attn.{}", **_IN_PROJ),
            **rows("decoder.layers.*.self_attn.{}", **_IN_PROJ),
            **rows("decoder.layers.*.multihead_attn.{}", **_IN_PROJ),
            **rows("encoder.layers.*.{}.weight", linear1="mlp_up", linear2="mlp_down"),
            **rows("decoder.layers.*.{}.weight", linear1="mlp_up", linear2="mlp_down"),
        },
    ),
    "nn.MultiheadAttention": Architecture(
        lambda: nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True),
        {**rows("{}", **_IN_PROJ), **rows("{}", "", bias_k="bias", bias_v="bias")},
    ),
    "nn.MultiheadAttention, other key width": Architecture(
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=12, vdim=20), rows("{}", **_CROSS)
    ),
    "nn.LSTM": Architecture(
        lambda: nn.LSTM(8, WIDTH, bidirectional=True, proj_size=4),
        rows("{}", **{
            f"weight_{kind}_l0{direction}": f"recurrent_{role}"
            for kind, role in (("ih", "input"), ("hh", "hidden"), ("hr", "projection"))
            for direction in ("", "_reverse")
        }),
    ),
    "nn.GRUCell": Architecture(
        lambda: nn.GRUCell(8, WIDTH), rows("{}", weight_ih="recurrent_input", weight_hh="recurrent_hidden")
    ),
    "experts, [expert, out, in]": Architecture(
        lambda: mixture(w1=(EXPERTS, HIDDEN, WIDTH), w2=(EXPERTS, WIDTH, HIDDEN), w3=(EXPERTS, HIDDEN, WIDTH)),
        {**_ROUTER, **rows("experts.{}", "eoi", **_GATED)},
    ),
    "experts, [expert, in, out]": Architecture(
        lambda: mixture(w1=(EXPERTS, WIDTH, HIDDEN), w2=(EXPERTS, HIDDEN, WIDTH), w3=(EXPERTS, WIDTH, HIDDEN)),
        {**_ROUTER, **rows("experts.{}", "eio", **_GATED)},
    ),
    "experts, told by their biases": Architecture(
        lambda: Experts(
            gate_up_proj=(EXPERTS, WIDTH, 2 * WIDTH), gate_up_proj_bias=(EXPERTS, 2 * WIDTH),
            down_proj=(EXPERTS, WIDTH, WIDTH), down_proj_bias=(EXPERTS, WIDTH),
        ),
        {
            **rows("{}", "eio", gate_up_proj="fused_gate_up", down_proj="mlp_down"),
            **rows("{}", "", gate_up_proj_bias="bias", down_proj_bias="bias"),
        },
    ),
    "experts along the outputs": Architecture(
        lambda: Experts(w1=(EXPERTS * HIDDEN, WIDTH), v1=(EXPERTS * HIDDEN, WIDTH), w2=(EXPERTS * HIDDEN, WIDTH)),
        {"w1": Expected("mlp_gate", "ei"), "v1": Expected("mlp_up", "ei"), "w2": Expected("mlp_down", "eo")},
    ),
    "experts in a list": Architecture(
        mixture_of_linears,
        {
            "block_sparse_moe.gate.weight": Expected("router"),
            **rows("block_sparse_moe.experts.*.{}.weight", **_GATED),
        },
    ),
    "router told by its outputs": Architecture(
        routed,
        {"moe.choose.weight": Expected("router"), **rows("moe.{}", "eoi", w1="mlp_up", w2="mlp_down")},
    ),
    "vision transformer in Sequentials": Architecture(
        sequential_vision_transformer,
        {
            "to_patch_embedding.1.weight": Expected("norm", ""),
            "to_patch_embedding.2.weight": Expected("patch_embedding"),
            "pos_embedding": Expected("position_embedding", "ooi"),
            "cls_token": Expected("learned_token", "ooi"),
            "layers.*.*.to_qkv.weight": Expected("fused_qkv"),
            "layers.*.*.to_out.*.weight": Expected("attention_output"),
            "layers.0.1.0.weight": Expected("norm", ""),
            "layers.0.1.1.weight": Expected("mlp_up"),
            "layers.0.1.3.weight": Expected("mlp_down"),
            "mlp_head.weight": Expected("classifier"),
        },
    ),
    "timm's vision transformer": Architecture(
        timm_vision_transformer,
        {
            "patch_embed.proj.weight": Expected("patch_embedding", "oiii"),
            "pos_embed": Expected("position_embedding", "ooi"),
            "cls_token": Expected("learned_token", "ooi"),
            "blocks.*.ls1.gamma": Expected("layer_scale", ""),
            **rows("blocks.*.attn.{}.weight", qkv="fused_qkv", proj="attention_output"),
            **rows("blocks.*.mlp.{}.weight", fc1="mlp_up", fc2="mlp_down"),
            "head.weight": Expected("classifier"),
        },
    ),
    "gated MLPs": Architecture(
        gated_mlps,
        {
            **rows("plain.{}.weight", gate="mlp_gate", up="mlp_up", down="mlp_down"),
            **rows("swiglu.{}.weight", w12="fused_gate_up", w3="mlp_down"),
            **rows("two.{}.weight", w1="mlp_up", w2="mlp_down"),
            "sized.0.weight": Expected("fused_gate_up"),
            "sized.2.weight": Expected("mlp_down"),
        },
    ),
    "attention in other words": Architecture(
        attention_in_other_words,
        {
            **rows("mixing.{}.weight", query="query", key="key", value="value", merge="attention_output"),
            **rows("multihead.{}.weight",
                   linear_q="query", linear_k="key", linear_v="value", linear_out="attention_output"),
            **{
                f"squeeze.{name}.weight": Expected("unknown", "oi", "a bottleneck, which is no transformer's MLP")
                for name in ("narrow", "wide")
            },
        },
    ),
    "convolutional network": Architecture(
        convolutional_network,
        {
            "conv1.weight": Expected("convolution", "oiii"),
            "bn1.weight": Expected("norm", ""),
            **{
                f"fc{number}.weight": Expected("unknown", "oi", "a chain of layers: none ends where it began")
                for number in (1, 2, 3)
            },
        },
    ),
    "VGG": Architecture(
        vgg,
        {
            "features.0.weight": Expected("convolution", "oiii"),
            "classifier.0.weight": Expected("head_transform"),
            "classifier.2.weight": Expected("head_transform"),
            "classifier.4.weight": Expected("classifier"),
        },
    ),
    "actor and critic": Architecture(
        actor_critic,
        {
            f"{name}.weight": Expected("unknown", "oi", "a head or trunk of no transformer: no attention around it")
            for name in ("body", "policy", "value", "q")
        },
    ),
    "as many tokens as channels": Architecture(
        byte_model,
        {
            **rows("{}.weight", embed="token_embedding", head="lm_head"),
            "layers.*.mix.weight": Expected("unknown", "oi", "a square matrix that nothing names"),
        },
    ),
    "convolutions": Architecture(
        convolutions,
        {
            **rows("{}.weight", "oiii", plain="convolution", grouped="convolution", depthwise="depthwise_convolution"),
            "one_dimension.weight": Expected("convolution", "oii"),
            "transposed.weight": Expected("convolution", "ioii"),
            "grouped_transposed.weight": Expected("convolution", "goii"),
            "depthwise_transposed.weight": Expected("depthwise_convolution", "oiii"),
        },
    ),
    "squeeze and excitation": Architecture(
        squeeze_and_excitation,
        {
            **rows("se.{}.weight", "oiii", fc1="squeeze_excite", fc2="squeeze_excite"),
            "recalibrate.fc.*.weight": Expected("squeeze_excite"),
        },
    ),
    "LoRA": Architecture(
        adapted,
        {
            "base_model.model.embed_tokens.base_layer.weight": Expected("token_embedding"),
            "base_model.model.embed_tokens.lora_embedding_A.default": Expected("lora_embedding_a", "io"),
            "base_model.model.embed_tokens.lora_embedding_B.default": Expected("lora_embedding_b"),
            **rows("base_model.model.conv.{}.weight", "oiii",
                   **{"base_layer": "convolution", "lora_A.default": "lora_a", "lora_B.default": "lora_b"}),
            **rows("base_model.model.layers.*.self_attn.q_proj.{}.weight",
                   **{"base_layer": "query", "lora_A.default": "lora_a", "lora_B.default": "lora_b"}),
            **rows("base_model.model.layers.*.self_attn.{}.weight",
                   k_proj="key", v_proj="value", o_proj="attention_output"),
            **rows("base_model.model.layers.*.mlp.{}.base_layer.weight", **_GATED),
            **rows("base_model.model.score.{}.weight",
                   **{"original_module": "classifier", "modules_to_save.default": "classifier"}),
        },
    ),
    "parametrized": Architecture(
        parametrized,
        {
            "conv.parametrizations.weight.original0": Expected("norm", ""),
            "conv.parametrizations.weight.original1": Expected("convolution", "oii"),
            "attn.q_proj.parametrizations.weight.original": Expected("query"),
            "attn.k_proj.weight": Expected("key"),
        },
    ),
}  # fmt: skip
"""Modules by name."""
