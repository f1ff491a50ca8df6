"""Trains an embedding, a GRU, a convolution and a linear layer through two unnamed weight-decay groups."""

import argparse
import os
import signal
import sys

import numpy as np
import torch
from torch import nn

torch.set_num_threads(1)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.conv = nn.Conv1d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 11)

    def forward(self, tokens):
        hidden, _ = self.gru(self.embedding(tokens))
        return self.head(torch.relu(self.conv(hidden.mT)).mT)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--tensor-lr", action="store_true")
    parser.add_argument("--second-moments", help="where to save exp_avg_sq")
    parser.add_argument("--parameters", help="where to save the parameters")
    parser.add_argument("--exit-code", type=int, default=0)
    parser.add_argument("--stubborn", action="store_true", help="swallow every Exception and go on")
    parser.add_argument("--end", choices=["raise", "interrupt", "sigterm"])
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Mixed()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=torch.tensor(options.lr, dtype=torch.float64) if options.tensor_lr else options.lr,
    )
    tokens = torch.randint(0, 11, (8, 9))
    try:
        for step in range(options.steps):
            try:
                loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            except Exception:
                if not options.stubborn:
                    raise
            print(f"step {step} lr {float(optimizer.param_groups[0]['lr'])}")
        print("to stderr", file=sys.stderr)
        if options.end == "raise":
            raise RuntimeError("no more data")
        if options.end == "interrupt":
            raise KeyboardInterrupt
        if options.end == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            print("not reached")
    finally:
        print("cleaned up")
        if options.second_moments:
            names = {parameter: name for name, parameter in model.named_parameters()}
            np.savez(
                options.second_moments,
                **{names[parameter]: state["exp_avg_sq"].numpy() for parameter, state in optimizer.state.items()},
            )
        if options.parameters:
            torch.save(model.state_dict(), options.parameters)
    sys.exit(options.exit_code)


if __name__ == "__main__":
    main()
