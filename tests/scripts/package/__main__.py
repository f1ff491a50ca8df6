"""Run by ``-m package``."""

import sys

import torch
from torch import nn

from package import __name__ as package_name

print(package_name, __name__, __spec__.name, sys.argv[1:])
model = nn.Linear(4, 3)
optimizer = torch.optim.Adam(model.parameters())
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
