"""Trains attention with fused projections and a stack of experts, without names."""

import sys

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self, experts, width):
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, width, width) * 0.1)

    def forward(self, x):
        gate, up = torch.einsum("eoi,bti->beto", self.gate_up_proj, x).chunk(2, dim=-1)
        return torch.einsum("eoi,beti->bto", self.down_proj, torch.relu(gate) * up)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention(16, 4)
        self.experts = Experts(3, 16)

    def forward(self, x):
        return self.experts(self.attn(x))


model = Block()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(int(sys.argv[1])):
    x = torch.randn(4, 8, 16)
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
