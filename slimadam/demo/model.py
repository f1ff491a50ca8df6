"""A small GPT on bytes: the model that the demo trains."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY = 256
_INIT_STD = 0.02


class ByteGPT(nn.Module):
    """A decoder-only transformer over bytes: pre-norm, learned positions, head not tied to the embedding.

    Query, key and value are separate layers, so that each gets its own rule. Initialised as GPT-2 (normal
    with standard deviation 0.02, divided by ``sqrt(2 * layers)`` where a block writes to the residual stream).

    Args:
        layers: Number of blocks.
        width: Size of the residual stream, a multiple of ``heads``.
        heads: Attention heads.
        context: Longest input, in bytes.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=_INIT_STD / (math.sqrt(2 * layers) if writes_to_residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits of the next byte, ``[batch, length, 256]``, from bytes ``[batch, length]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.final_norm(x))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of the next byte, in nats.

        Args:
            tokens: As for :meth:`forward`.
            targets: The byte after each of them.
        """
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Causal self-attention, then an MLP, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, width]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
