"""Curvature and warmup tools on what they got wrong: to be moved into the files of their subjects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn

from slimadam import advise_mix, critical_lr, directional_sharpness, hessian_sharpness
from slimadam.cli import cli
from slimadam.curvature.records import COLUMNS, read_csv
from tests.command_line import CliRunner

HEADER = """
import copy
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
"""
TRAINING = """
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
inputs, labels = torch.randn(16, 8, dtype=next(model.parameters()).dtype), torch.arange(16) % 4
def closure():
    return F.cross_entropy(model(inputs), labels)
closure().backward()
optimizer.step()
"""
MODELS = {
    "converted": "model = nn.Linear(8, 4).double()",
    "16 bits": "model = nn.Linear(8, 4).bfloat16()",
    "copied": "model = copy.deepcopy(nn.Linear(8, 4))",
    "half of it copied": "first = nn.Linear(8, 8)\nmodel = nn.Sequential(first, copy.deepcopy(first), nn.Linear(8, 4))",
    "rescaled": "model = nn.Linear(8, 4)\nmodel.weight.data = model.weight.data * 0.5",
    "assigned": "model = nn.Linear(8, 4)\nstate = {key: value.clone() for key, value in model.state_dict().items()}\n"
    "model.load_state_dict(state, assign=True)",
    "encoder": "layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)\n"
    "model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 4))",
    "lstm": "class Last(nn.Module):\n"
    "    def forward(self, result):\n"
    "        return result[0]\n"
    "model = nn.Sequential(nn.LSTM(8, 8), Last(), nn.Linear(8, 4))",
}
TWO_LOSSES = """
first, second = nn.Linear(8, 1), nn.Linear(8, 1)
optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
inputs = torch.randn(64, 8)
def losses():
    return 30 * (first(inputs) - 1).square().mean(), (second(inputs) - 1).square().mean()
def closure():
    return sum(losses())
for loss in losses():
    loss.backward()
optimizer.step()
"""
CONJUGATED = """
weight = nn.Parameter(torch.randn(9, dtype=torch.complex64))
optimizer = torch.optim.SGD([weight], lr=0.1)
inputs = torch.randn(16, 9)
def closure():
    spectrum = torch.fft.fft(inputs) * weight.conj()
    return ((spectrum.conj() * spectrum).real - 1).square().mean() / 1000 + spectrum.mH.imag.square().mean()
closure().backward()
optimizer.step()
"""
MASKED = """
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs, labels = torch.randn(64, 8), torch.arange(64) % 4
losses = F.cross_entropy(model(inputs), labels, reduction="none")
losses[losses > 1.2].mean().backward()
optimizer.step()
"""
ROUTED = """
router, experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
optimizer = torch.optim.AdamW([*router.parameters(), *experts.parameters()], lr=0.01)
inputs = torch.randn(64, 8)
shares = router(inputs).softmax(-1)
outputs = torch.zeros_like(inputs)
for index, expert in enumerate(experts):
    chosen = (shares.argmax(-1) == index).nonzero().squeeze(-1)
    outputs = outputs.index_add(0, chosen, expert(inputs[chosen]) * shares[chosen, index : index + 1])
(outputs - 1).square().mean().backward()
optimizer.step()
"""
NOT_FINITE = """
param = torch.ones(3, requires_grad=True)
optimizer = torch.optim.SGD([param], lr=0.1)
(param * float("nan")).sum().backward()
optimizer.step()
"""
SWALLOWED = """
param = torch.ones(3, requires_grad=True)
optimizer = torch.optim.SGD([param], lr=0.1)
for scale in (1, 5, 9):
    optimizer.zero_grad()
    (scale * param.square().sum()).backward()
    try:
        optimizer.step()
    except:
        pass
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def find_lr(source: str) -> Result:
    Path("script.py").write_text(HEADER + source, encoding="utf-8")
    return CliRunner().invoke(cli, ["find-lr", "--json", "script.py"], prog_name="slimadam")


def found(source: str) -> dict[str, Any]:
    result = find_lr(source)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def in_the_script(source: str) -> float:
    namespace: dict[str, Any] = {}
    exec(HEADER + source.removesuffix("optimizer.step()\n"), namespace)
    return critical_lr(namespace["optimizer"], namespace["closure"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_made_from_other_parameters_move(name: str) -> None:
    source = MODELS[name] + TRAINING
    assert found(source)["critical_lr"] == pytest.approx(in_the_script(source), rel=1e-5)


def test_losses_of_different_parameters_add_up() -> None:
    answer = found(TWO_LOSSES)
    assert answer["micro_batches"] == 2
    assert answer["critical_lr"] == pytest.approx(in_the_script(TWO_LOSSES), rel=1 / 16)


def test_complex_conjugates_are_computed_again() -> None:
    assert found(CONJUGATED)["critical_lr"] == pytest.approx(in_the_script(CONJUGATED), rel=1e-5)


@pytest.mark.parametrize("source", [MASKED, ROUTED], ids=["masked", "routed"])
def test_shapes_that_depend_on_the_parameters_are_not_measured(source: str) -> None:
    result = find_lr(source)
    assert result.exit_code == 3
    assert "shapes" in result.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_is_called_that() -> None:
    result = find_lr(NOT_FINITE)
    assert result.exit_code == 3
    assert "not finite" in result.stderr.splitlines()[-1]


def test_a_script_that_catches_everything_is_measured_once() -> None:
    assert found(SWALLOWED)["critical_lr"] == pytest.approx(1.0, rel=1 / 16)


def test_curvature_is_the_same_where_gradients_are_off() -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([param], lr=0.1)
    loss = (torch.tensor([3.0, 4.0]) * param * param).sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert hessian_sharpness([param], loss) == pytest.approx(8, rel=1e-6)
        # D = g = (6, 16), H = diag(6, 8)
        assert directional_sharpness(optimizer, loss) == pytest.approx((6 * 36 + 8 * 256) / (36 + 256), rel=1e-6)


def test_a_start_within_some_of_the_blocks_of_a_hessian() -> None:
    curvature = torch.cat([torch.linspace(0, 0.5, 200), torch.linspace(25, 50, 200)]).double()
    param = torch.ones(400, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(400, dtype=torch.float64)
    start[:100] = torch.linspace(1, 2, 100)
    found_value = hessian_sharpness([param], (curvature * param * param).sum() / 2, start=start)
    assert found_value == pytest.approx(50, rel=1e-5)


@pytest.mark.parametrize("tol", [1e-9, 1e-6, 1 / 16])
def test_a_mix_that_no_task_is_safe_under_is_not_advised_at_any_tolerance(tol: float) -> None:
    param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=0.1)

    def rising(batch: int) -> Tensor:
        return 1 - param.sum()

    def falling(batch: int) -> Tensor:
        return 1 + param.square().sum()

    advice = advise_mix(optimizer, {"a": falling, "b": rising}, ratios=[0.9, 1.0], batches=1, tol=tol)
    assert advice.curves[1].sharpness == [float("inf")] * 2


def test_a_cut_last_line_is_refused_when_read() -> None:
    path = Path("rows.csv")
    path.write_text(f"{','.join(COLUMNS)}\n0,2.0,1.0,0.9,1.1,5,0.5,0.1,20.0,found,pro", encoding="utf-8")
    with pytest.raises(ValueError, match="cut off"):
        read_csv(path)


BUILDER = """
import torch
def losses_of():
    param = torch.nn.Parameter(torch.ones(3))
    return torch.optim.SGD([param], lr=0.1), {"a": lambda batch: param.square().sum(), "b": FAILING}
"""


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("lambda batch: torch.ones(2) @ torch.ones(3)", ()),
        ("lambda batch: (param - 2).square().sum()", ("--plot", "curves.txt")),
        ("lambda batch: (param - 2).square().sum()", ("--max-grad-norm", "nan")),
    ],
    ids=["a loss raises", "an ending of no picture", "a norm of nan"],
)
def test_trouble_is_not_taken_for_no_advice(
    monkeypatch: pytest.MonkeyPatch, loss: str, options: tuple[str, ...]
) -> None:
    Path("mix_builder.py").write_text(BUILDER.replace("FAILING", loss), encoding="utf-8")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(__import__("sys").modules, "mix_builder", raising=False)
    result = CliRunner().invoke(cli, ["mix", "mix_builder:losses_of", "--batches", "1", *options])
    assert result.exit_code == 2, result.output
