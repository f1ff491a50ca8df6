"""Parameter shapes of real models, by name, in the order in which the models register them."""

from __future__ import annotations

import math

Shapes = dict[str, tuple[int, ...]]


def gpt2_small() -> Shapes:
    """Return GPT-2 124M, query, key and value as separate layers; the head is tied to the token embedding."""
    return gpt2(width=768, layers=12, vocabulary=50257, context=1024)


def gpt2(width: int, layers: int, vocabulary: int, context: int) -> Shapes:
    """Return shapes laid out as :func:`gpt2_small`, of any size.

    Args:
        width: Width of the residual stream.
        layers: Number of blocks.
        vocabulary: Number of tokens.
        context: Number of positions.
    """
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for layer in range(layers):
        block = f"h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _linear(f"{block}attn.{name}", width, width)
        shapes |= _linear(f"{block}mlp.up_proj", 4 * width, width)
        shapes |= _linear(f"{block}mlp.down_proj", width, 4 * width)
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def llama_1b() -> Shapes:
    """Return Llama 3.2 1B: grouped-query attention (32 heads of queries, 8 of keys), tied embeddings."""
    return _llama(width=2048, keys=512, inner=8192, layers=16)


def llama_8b() -> Shapes:
    """Return Llama 3.1 8B: grouped-query attention (32 heads of queries, 8 of keys), the head not tied."""
    return _llama(width=4096, keys=1024, inner=14336, layers=32) | {"lm_head.weight": (128256, 4096)}


def llama_70b() -> Shapes:
    """Return Llama 3.1 70B: grouped-query attention (64 heads of queries, 8 of keys), the head not tied."""
    return _llama(width=8192, keys=1024, inner=28672, layers=80) | {"lm_head.weight": (128256, 8192)}


def _llama(width: int, keys: int, inner: int, layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (128256, width)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= _grouped_query_attention(block, width, keys)
        shapes |= {f"{block}mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{block}mlp.down_proj.weight": (width, inner)} | _decoder_norms(block, width)
    return shapes | {"model.norm.weight": (width,)}


def mixtral_small() -> Shapes:
    """Return shapes laid out as Mixtral, 229M parameters: 8 experts in 3-D weights, the head not tied."""
    width, keys, inner, experts, vocabulary = 768, 256, 1536, 8, 32000
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(6):
        block = f"model.layers.{layer}."
        shapes |= _grouped_query_attention(block, width, keys)
        shapes |= {
            f"{block}mlp.gate.weight": (experts, width),
            f"{block}mlp.experts.gate_up_proj": (experts, 2 * inner, width),
            f"{block}mlp.experts.down_proj": (experts, width, inner),
        }
        shapes |= _decoder_norms(block, width)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def vit_base() -> Shapes:
    """Return ViT-B/16 for 224 x 224 pixels and 1,000 classes."""
    width = 768
    shapes: Shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, 197, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, 16, 16),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
    }
    for layer in range(12):
        block = f"vit.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _linear(f"{block}attention.{name}", width, width)
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        shapes |= _linear(f"{block}mlp.fc1", 4 * width, width) | _linear(f"{block}mlp.fc2", width, 4 * width)
    return (
        shapes | {"vit.layernorm.weight": (width,), "vit.layernorm.bias": (width,)} | _linear("classifier", 1000, 768)
    )


def resnet50() -> Shapes:
    """Return ResNet-50 for 1,000 classes."""
    shapes = _convolution("resnet.embedder.embedder", 64, 3, 7)
    inputs = 64
    for stage, (depth, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for layer in range(depth):
            block = f"resnet.encoder.stages.{stage}.layers.{layer}."
            if layer == 0:
                shapes |= _convolution(f"{block}shortcut", 4 * inner, inputs, 1)
            shapes |= _convolution(f"{block}layer.0", inner, inputs, 1)
            shapes |= _convolution(f"{block}layer.1", inner, inner, 3)
            shapes |= _convolution(f"{block}layer.2", 4 * inner, inner, 1)
            inputs = 4 * inner
    return shapes | _linear("classifier.1", 1000, inputs)


def gpt2_narrow() -> Shapes:
    """Return as many tensors as :func:`gpt2_small` has, of 0.6 million parameters, whose step is bound by overhead."""
    return gpt2(width=64, layers=12, vocabulary=384, context=64)


def tiny() -> Shapes:
    """Return a decoder of 28 thousand parameters, laid out as :func:`gpt2_small`, to try the benchmarks with."""
    return gpt2(width=32, layers=1, vocabulary=384, context=64)


def elements(shapes: Shapes) -> int:
    """Return the number of parameters."""
    return sum(map(math.prod, shapes.values()))


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _convolution(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    """Return a convolution without bias and the batch norm after it."""
    norm = f"{name}.normalization"
    weight = {f"{name}.convolution.weight": (outputs, inputs, kernel, kernel)}
    return weight | {f"{norm}.weight": (outputs,), f"{norm}.bias": (outputs,)}


def _grouped_query_attention(block: str, width: int, keys: int) -> Shapes:
    outputs = {"q_proj": width, "k_proj": keys, "v_proj": keys, "o_proj": width}
    return {f"{block}self_attn.{name}.weight": (size, width) for name, size in outputs.items()}


def _decoder_norms(block: str, width: int) -> Shapes:
    return {f"{block}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}


MODELS = {
    "gpt2-small": gpt2_small,
    "gpt2-narrow": gpt2_narrow,
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
    "llama-70b": llama_70b,
    "vit-base": vit_base,
    "resnet50": resnet50,
    "mixtral-small": mixtral_small,
    "tiny": tiny,
}


ODD_MODEL: Shapes = gpt2(width=36, layers=1, vocabulary=389, context=65)
