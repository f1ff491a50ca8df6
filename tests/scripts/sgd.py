"""Never builds an Adam."""

import sys

import torch

weight = torch.nn.Parameter(torch.ones(3, 2))
optimizer = torch.optim.SGD([weight], lr=0.1)
weight.square().sum().backward()
for _ in range(1000):
    optimizer.step()
print("done", *sys.argv[1:])
