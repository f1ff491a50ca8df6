"""``slimadam find-lr``, through the command line: the same rate as ``critical_lr`` in the script itself."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from slimadam.cli import cli
from tests.command_line import CliRunner

HEADER = """
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
"""

# Each script trains; `closure` is the loss of the batch of its last step, as its author would write it.
PLAIN = """
model = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
def closure():
    return F.cross_entropy(model(tokens), tokens.amax(1))
for step in range(3):
    tokens = torch.randint(16, (8, 4))
    optimizer.zero_grad()
    F.cross_entropy(model(tokens), tokens.amax(1)).backward()
    optimizer.step()
"""
ACCUMULATED = """
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
def closure():
    return sum(F.mse_loss(model(batch), batch.mean((2, 3)).repeat(1, 2)) / 3 for batch in batches)
for step in range(3):
    optimizer.zero_grad(set_to_none=step == 1)
    batches = [torch.randn(5, 1, 8, 8) for _ in range(3)]
    for batch in batches:
        (F.mse_loss(model(batch), batch.mean((2, 3)).repeat(1, 2)) / 3).backward()
    optimizer.step()
"""
DROPOUT = """
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
def closure():
    torch.set_rng_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (model(inputs).float() + 0.1 * torch.randn(32, 1)).square().mean()
for step in range(3):
    inputs = torch.randn(32, 8)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (model(inputs).float() + 0.1 * torch.randn(32, 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.randn(3)
    optimizer.step()
"""
BY_HAND = """
import slimadam
weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
rates = [{"params": [weight], "lr": 1e-2}, {"params": [bias], "lr": 1e-3}]
optimizer = slimadam.SlimAdam(rates, plan="factored")
total = torch.zeros(2, dtype=torch.float64)
def closure():
    return ((inputs @ weight + bias).tanh() - inputs[:, :3]).square().mean() + weight.abs().sum() / 100
for step in range(3):
    inputs = torch.randn(20, 6, dtype=torch.float64)
    outputs = inputs @ weight
    outputs += bias
    outputs.tanh_()
    total.zero_()
    total = total.detach()
    total[0] = (outputs - inputs[:, :3]).square().mean()
    total[1:].add_(weight.abs().sum() / 100)
    optimizer.zero_grad()
    total.sum().backward()
    optimizer.step()
"""
RECOMPUTED = """
from torch.utils.checkpoint import checkpoint
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3
    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad
first, second = nn.Linear(4, 16), nn.Linear(16, 1)
optimizer = torch.optim.RMSprop([*first.parameters(), *second.parameters()], lr=1e-3)
def closure():
    return second(first(inputs) ** 3).square().mean()
for step in range(3):
    inputs = torch.randn(16, 4)
    optimizer.zero_grad()
    second(Cube.apply(checkpoint(first, inputs, use_reentrant=False))).square().mean().backward()
    optimizer.step()
"""
WITH_CLOSURE = """
model = nn.Linear(5, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
def closure():
    return model(inputs).square().mean()
def train():
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    return loss
for step in range(3):
    inputs = torch.randn(9, 5)
    optimizer.step(train)
"""
SCALED = """
model = nn.Linear(5, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
def closure():
    return model(inputs).square().mean()
for step in range(3):
    inputs = torch.randn(9, 5)
    optimizer.zero_grad()
    scaler.scale(model(inputs).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
"""
TRANSFORMER = """
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
    bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
def closure():
    return model(input_ids=tokens, labels=tokens).loss
for step in range(3):
    tokens = torch.randint(50, (4, 16))
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
SCRIPTS = {
    "plain": (PLAIN, "optimizer.step()"),
    "accumulated": (ACCUMULATED, "optimizer.step()"),
    "dropout": (DROPOUT, "optimizer.step()"),
    "by hand": (BY_HAND, "optimizer.step()"),
    "recomputed": (RECOMPUTED, "optimizer.step()"),
    "with closure": (WITH_CLOSURE, "optimizer.step(train)"),
    "scaled": (SCALED, "scaler.step(optimizer)"),
    "transformer": (TRANSFORMER, "optimizer.step()"),
}
REMADE = {  # parameters that come from other parameters before training
    "in another precision": "model = model.double()",
    "deep copies": "import copy; model = copy.deepcopy(model)",
    "other data": "for param in model.parameters(): param.data = param.data * 1.5",
    "new parameters": "model[2].weight = nn.Parameter(model[2].weight.detach().clone() * 1.5)",
    "parametrized": "torch.nn.utils.parametrizations.weight_norm(model[2])",
}
SCRIPTS |= {
    name: (PLAIN.replace("optimizer =", f"{line}\noptimizer =", 1), "optimizer.step()") for name, line in REMADE.items()
}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def find_lr(source: str, *options: str) -> Result:
    Path("script.py").write_text(HEADER + source, encoding="utf-8")
    return CliRunner().invoke(cli, ["find-lr", *options, "script.py"], prog_name="slimadam")


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def in_the_script(source: str, stepping: str, step: int) -> float:
    """``critical_lr`` of the script's own closure, where it would step."""
    gradient = "train(); " if stepping.endswith("(train)") else ""
    unscale = "scaler.unscale_(optimizer); " if "scaler" in stepping else ""
    measuring = f"if step == {step - 1}: {gradient}{unscale}found = critical_lr(optimizer, closure); break"
    edited = source.replace(stepping, f"{measuring}\n    {stepping}")
    assert edited != source
    namespace: dict[str, Any] = {}
    exec(f"from slimadam import critical_lr\n{HEADER}{edited}", namespace)
    rate: float = namespace["found"]
    return rate


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_finds_what_the_scripts_own_closure_gives(name: str, step: int) -> None:
    if name == "transformer":
        pytest.importorskip("transformers")
    source, stepping = SCRIPTS[name]
    expected = in_the_script(source, stepping, step)
    result = found(find_lr(source, "--json", "--step", str(step)))
    # The scaled loss and the sum of losses are rounded differently, which may move the bracket's last guess.
    assert result["critical_lr"] == pytest.approx(expected, rel=1 / 16 if name in ("scaled", "accumulated") else 1e-5)
    lower, upper = result["bracket"]
    assert lower < result["critical_lr"] < upper <= lower / (1 - 1 / 16)
    assert (result["status"], result["step"]) == ("found", step)
    assert result["micro_batches"] == (3 if name == "accumulated" else 1)
    assert result["forward_passes"] >= 5


def test_no_increase_up_to_the_largest_rate_needs_no_warmup() -> None:
    result = find_lr(PLAIN, "--max-lr", "0.004")
    assert result.exit_code == 0
    assert "no increase of the loss up to 0.004" in result.stderr
    assert "the script's own learning rate 0.003 needs no warmup" in result.stderr


def test_says_where_to_start_in_a_line_to_paste() -> None:
    result = find_lr(PLAIN.replace("lr=3e-3", "lr=3.0"), "--warmup-steps", "500", "--json")
    rate = found(result)["critical_lr"]
    assert found(result)["script_lr"] == 3.0
    *_, saved, line = result.stderr.splitlines()
    assert line == f"scheduler = slimadam.CatapultWarmup(optimizer, warmup_steps=500, critical_lr={rate:.3g})"
    assert f"{int(500 * rate / 3)} of 500 steps" in saved
    assert "needs no warmup" in find_lr(PLAIN.replace("lr=3e-3", "lr=1e-6")).stderr


def test_a_warmup_from_zero_counts_by_its_target() -> None:
    assert found(find_lr(SCALED, "--json"))["script_lr"] == 0.01


def test_the_largest_rate_to_try() -> None:
    result = find_lr(PLAIN, "--max-lr", "1e-4", "--json")
    assert found(result) | {"loss": 0} == {
        "critical_lr": None, "bracket": [1e-4, None], "forward_passes": found(result)["forward_passes"], "loss": 0,
        "status": "no increase", "step": 1, "micro_batches": 1, "optimizer": "AdamW", "script_lr": 3e-3,
    }  # fmt: skip
    assert "no increase of the loss up to 0.0001" in result.stderr
    linear = find_lr("param = torch.ones(3, requires_grad=True)\noptimizer = torch.optim.SGD([param], lr=0.1)\n"
                     "param.sum().backward()\noptimizer.step()")  # fmt: skip
    assert linear.exit_code == 0
    assert "no increase of the loss up to 1e+09" in linear.stderr


def test_the_script_ends_before_the_step_and_sees_its_arguments() -> None:
    Path("script.py").write_text(
        textwrap.dedent(HEADER + PLAIN) + "    print('stepped', step)\nprint('never')\n", encoding="utf-8"
    )
    result = CliRunner().invoke(cli, ["find-lr", "--step", "2", "script.py", "--json"])
    assert (result.exit_code, result.stdout) == (0, "stepped 0\n")


GRADIENT = """
param = torch.ones(3, requires_grad=True)
optimizer = torch.optim.SGD([param], lr=0.1)
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('no training here')", "no optimizer of torch stepped"),
        (PLAIN, "no optimizer reached step 9"),
        (GRADIENT + "param.grad = torch.ones(3)\noptimizer.step()", "no backward() of a loss"),
        (GRADIENT + "param.square().backward(torch.ones(3))\noptimizer.step()", "on more than one number"),
        (
            GRADIENT + "class Through(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, p):\n"
            "        return torch.from_numpy(p.detach().numpy() ** 2).sum()\n"
            "    @staticmethod\n"
            "    def backward(ctx, grad):\n"
            "        return grad * 2 * param.detach()\n"
            "Through.apply(param).backward()\noptimizer.step()",
            "was not computed by operations of torch",
        ),
        (
            GRADIENT + "noise = torch.randn(3)\n(param * noise).sum().backward()\nnoise.normal_()\noptimizer.step()",
            "computed again on the same batch the loss is",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(source: str, message: str) -> None:
    result = find_lr(source, "--step", "9" if "step 9" in message else "1", "--json")
    assert result.exit_code == 3
    assert message in result.stderr.splitlines()[-1]


def test_a_script_that_fails() -> None:
    result = find_lr("raise ValueError('no data')")
    assert result.exit_code == 1
    assert "ValueError: no data" in result.stderr
    assert CliRunner().invoke(cli, ["find-lr", "missing.py"]).exit_code == 2
    assert find_lr(PLAIN, "--max-lr", "nan").exit_code == 2
