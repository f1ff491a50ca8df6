"""Two nameless models, two optimizers, one of them shared by name and shape with nothing."""

import sys

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
# The discriminator's optimizer is built second and steps first.
generator = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5))
discriminator = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
adam = torch.optim.Adam(generator.parameters(), lr=1e-2, weight_decay=float(sys.argv[1]))
adamw = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
assert isinstance(adam, torch.optim.Adam)
assert type(adamw).__name__ == "AdamW"
for _ in range(4):
    fake = generator(torch.randn(16, 3))
    adamw.zero_grad()
    (discriminator(fake.detach()).exp().mean() - discriminator(torch.randn(16, 5)).mean()).backward()
    adamw.step()
    adam.zero_grad()
    (-discriminator(generator(torch.randn(16, 3))).mean()).backward()
    adam.step()
