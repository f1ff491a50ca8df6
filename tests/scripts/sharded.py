"""Trains a small model, sharded by FSDP2 where torchrun has started several processes."""

import os
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

STEPS, BATCH = int(sys.argv[1]), 12

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, 7), nn.GELU(), nn.Linear(7, 5))
ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    for module in (model[2], model):
        fully_shard(module)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(1)
for _ in range(STEPS):
    tokens = torch.randint(11, (BATCH, 3), generator=generator).chunk(ranks)[rank]
    labels = tokens.sum(1) % 5
    loss = nn.functional.cross_entropy(model(tokens), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("trained", flush=True)
if ranks > 1:
    torch.distributed.destroy_process_group()
