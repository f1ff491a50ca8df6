"""Parameter shapes of real models, by name."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def gpt2_small() -> Shapes:
    """GPT-2 124M, query, key and value as separate layers; the head is tied to the token embedding."""
    width, layers = 768, 12
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for layer in range(layers):
        block = f"h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= {f"{block}attn.{name}.weight": (width, width), f"{block}attn.{name}.bias": (width,)}
        shapes |= {f"{block}mlp.up_proj.weight": (4 * width, width), f"{block}mlp.up_proj.bias": (4 * width,)}
        shapes |= {f"{block}mlp.down_proj.weight": (width, 4 * width), f"{block}mlp.down_proj.bias": (width,)}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


MODELS = {"gpt2-small": gpt2_small}
