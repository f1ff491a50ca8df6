"""The commands on scripts that compile their steps, ask for signatures, start processes or have several modules."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn

from slimadam import CompressionPlan, PlanError, Rule, SlimAdam, SNRRecorder, every
from slimadam.cli import cli
from slimadam.cli.script.substitution import Substitution
from tests.command_line import CliRunner


def slimadam(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="slimadam")


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slimadam", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


COMPILED = """
import sys, torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)

def train(x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()

step = {"eager": train, "train": torch.compile(train, backend="eager")}.get(sys.argv[1])
compiled = torch.compile(optimizer.step, backend="eager")
for _ in range(12):
    x = torch.randn(16, 8)
    if step:
        step(x)
    else:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        compiled()
graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
print("graphs", graphs)
"""


compiles = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile


@pytest.fixture
def compiled_script() -> str:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    Path("compiled.py").write_text(COMPILED)
    return "compiled.py"


@compiles
@pytest.mark.parametrize("kind", ["step", "train"])
def test_calibrate_measures_a_compiled_step_as_the_eager_one(compiled_script: str, kind: str) -> None:
    arguments = ["calibrate", "--every", "4", "--cutoff", "0", "--out"]
    eager = slimadam(*arguments, "eager.json", compiled_script, "eager")
    compiled = slimadam(*arguments, "compiled.json", compiled_script, kind)
    assert eager.exit_code == compiled.exit_code == 0, compiled.output
    graphs = int(compiled.stdout.split()[-1])
    assert graphs <= {"step": 1, "train": 2}[kind]
    assert "12 steps, 4 of them measured" in compiled.stderr
    expected, found = CompressionPlan.load("eager.json"), CompressionPlan.load("compiled.json")
    assert {name: (rule.form, rule.dims) for name, rule in found.items()} == {
        name: (rule.form, rule.dims) for name, rule in expected.items()
    }
    assert found["0.weight"].snr == pytest.approx(expected["0.weight"].snr, rel=1e-4)


@compiles
def test_find_lr_measures_at_a_compiled_step(compiled_script: str) -> None:
    found = slimadam("find-lr", "--step", "3", compiled_script, "step")
    assert found.exit_code == 0, found.output
    assert "at step 3 of AdamW" in found.stderr


@compiles
def test_a_recorder_is_not_traced() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    recorder = SNRRecorder(optimizer, model, every(2))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(12):
        model(torch.randn(5, 4)).square().sum().backward()
        step()
    assert recorder.history.steps == [1, 2, 4, 6, 8, 10, 12]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1  # torch 2.6 skips what once raised


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_substitutes_show_the_parameters_of_torch(name: str) -> None:
    original = getattr(torch.optim, name)
    config = {"lr": 0.1, "maximize": True, "amsgrad": True, "foreach": False, "capturable": False, "batch_size": 32}
    with Substitution("none").active():
        substitute = getattr(torch.optim, name)
        assert inspect.signature(substitute) == inspect.signature(original)
        assert inspect.getfullargspec(substitute.__init__) == inspect.getfullargspec(original.__init__)
        taken = {key: value for key, value in config.items() if key in inspect.signature(substitute).parameters}
        parameter = nn.Parameter(torch.zeros(3))
        optimizer = substitute([parameter], **taken)
        parameter.grad = torch.ones(3)
        optimizer.step()

        class Own(substitute):  # type: ignore[misc, valid-type]
            def __init__(self, params: Any, rate: float) -> None:
                super().__init__(params, lr=rate)

        assert list(inspect.signature(Own).parameters) == ["params", "rate"]
    assert parameter.tolist() == pytest.approx([0.1] * 3)
    assert {key: optimizer.param_groups[0][key] for key in taken} == taken


STARTS = """
import multiprocessing, sys

def work():
    pass

if __name__ == "__main__":
    for _ in range(2):
        print("starts", file=sys.stderr)
        child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
        child.start()
        child.join()
"""
TRAINS = """
import multiprocessing, sys
import torch
from torch.utils.data import DataLoader

def work():
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    print("SlimAdam" in str(type(optimizer).__mro__), flush=True)

if __name__ == "__main__":
    if sys.argv[1] == "here":
        list(DataLoader(range(2), num_workers=1, multiprocessing_context="fork"))
        if len(sys.argv) > 2:
            list(DataLoader(range(2), num_workers=1, multiprocessing_context="spawn"))
        work()
    else:
        torch.multiprocessing.start_processes(lambda index: work(), nprocs=2, start_method=sys.argv[1])
"""
RUN = ("run", "--plan", "none")
CALIBRATE = ("calibrate", "--every", "1")


@pytest.mark.parametrize(
    ("command", "how", "remedy", "end"),
    [
        (RUN, "spawn", "torchrun -m slimadam run ...", "nothing was replaced in this process"),
        (RUN, "forkserver", "torchrun -m slimadam run ...", "nothing was replaced in this process"),
        (CALIBRATE, "spawn", "torchrun -m slimadam calibrate ...", "stepped in this process; those that the script"),
        (CALIBRATE, "fork", "torchrun -m slimadam calibrate ...", "stepped in this process; those that the script"),
        (("find-lr",), "fork", "slimadam.critical_lr", "stepped in this process; those that the script"),
    ],
)
def test_processes_that_are_not_followed_are_told_of_as_the_first_starts(
    command: tuple[str, ...], how: str, remedy: str, end: str
) -> None:
    Path("starts.py").write_text(STARTS)
    result = slimadam(*command, "starts.py", how)
    assert result.exit_code == 3, result.output
    before, said, again, last = result.stderr.splitlines()
    assert (before, again) == ("starts", "starts")
    assert said.startswith("slimadam: the script starts processes of its own")
    assert remedy in said
    assert end in last
    assert "the script built no" not in last


def test_forked_processes_have_the_substitutes() -> None:
    Path("trains.py").write_text(TRAINS)
    result = in_a_process(*RUN, "trains.py", "fork")
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("\n", "") == "TrueTrue"  # two processes write, one between the other's words
    assert result.stderr.startswith("slimadam: Adam and AdamW were replaced in processes that the script forked")


@pytest.mark.parametrize("arguments", [(*RUN, "trains.py", "here"), (*CALIBRATE, "trains.py", "here", "and spawned")])
def test_workers_of_data_loaders_are_no_matter(arguments: tuple[str, ...]) -> None:
    Path("trains.py").write_text(TRAINS)
    result = slimadam(*arguments)
    assert result.exit_code == 0, result.output
    assert "processes" not in result.stderr


class Actor(nn.Module):
    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, outputs))


class Critic(Actor):
    """Larger than the actor, so that what owns most parameters is not what comes first."""

    def __init__(self) -> None:
        super().__init__(1)
        self.more = nn.Linear(2, 2)


Way = Any
WAYS: dict[str, Way] = {
    "unnamed": lambda actor, critic: [*actor.parameters(), *critic.parameters()],
    "named": lambda actor, critic: [*actor.named_parameters(), *critic.named_parameters()],
    "class in front": lambda actor, critic: [
        (f"{type(module).__name__}.{name}", parameter)
        for module in (actor, critic)
        for name, parameter in module.named_parameters()
    ],
    "own words in front": lambda actor, critic: [
        (f"{label}.{name}", parameter)
        for label, module in (("policy", actor), ("value", critic))
        for name, parameter in module.named_parameters()
    ],
    "named groups": lambda actor, critic: [
        {"params": actor.named_parameters()},
        {"params": critic.named_parameters(), "lr": 0.1},
    ],
}
TWO = CompressionPlan(
    {
        "net.0.weight": Rule((0,), "mean", (16, 8)),
        "net.2.weight": Rule((1,), "mean", (4, 16)),
        "Critic.net.0.weight": Rule((1,), "mean", (16, 8)),
        "more.weight": Rule((0, 1), "mean", (2, 2)),
    }
)


def stored(optimizer: torch.optim.Optimizer, *modules: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the second moments of the first layer of each module."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [tuple(optimizer.state[module.net[0].weight]["exp_avg_sq"].shape) for module in modules]


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_two_modules_is_taken(way: str) -> None:
    actor, critic = Actor(), Critic()
    optimizer = SlimAdam(WAYS[way](actor, critic), plan=TWO)
    assert stored(optimizer, actor, critic) == [(1, 8), (16, 1)]
    if way not in ("class in front", "own words in front"):  # a name that the script gives is its own
        substitution = Substitution(TWO)
        with substitution.active():
            optimizer = torch.optim.AdamW(WAYS[way](actor, critic))
        assert stored(optimizer, actor, critic) == [(1, 8), (16, 1)]
        assert substitution.unused == []


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_calibrate_calls_two_modules_as_the_optimizer_orders_them(way: str) -> None:
    actor, critic = Actor(), Critic()
    optimizer = torch.optim.AdamW(WAYS[way](actor, critic))
    weights = {name: shape.shape for name, shape in SNRRecorder(optimizer).history.items() if "weight" in name}
    assert weights == {
        "net.0.weight": (16, 8), "net.2.weight": (4, 16), "Critic.net.0.weight": (16, 8),
        "Critic.net.2.weight": (1, 16), "more.weight": (2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("front", ["", "Critic."])
def test_two_modules_of_one_class_are_told_apart(front: str) -> None:
    first, second = Critic(), Critic()
    plan = CompressionPlan(
        {
            "net.0.weight": Rule((0,), "mean", (16, 8)),
            "Critic.net.0.weight": Rule((1,), "mean", (16, 8)),
        }
    )
    named = [(front + name, parameter) for module in (first, second) for name, parameter in module.named_parameters()]
    assert stored(SlimAdam(named, plan=plan), first, second) == [(1, 8), (16, 1)]


def test_what_no_module_owns_is_refused_in_one_line() -> None:
    raw = [torch.ones(16, 8, requires_grad=True), torch.ones(16, 8, requires_grad=True)]
    with pytest.raises(PlanError, match=r"pass model=model, or params=model\.named_parameters") as refused:
        SlimAdam(raw, plan=TWO)
    assert "\n" not in str(refused.value)
    with pytest.raises(PlanError, match="also those of several modules, one after the other or in groups"):
        SlimAdam([{"params": Actor().parameters()}, {"params": Critic().parameters()}], plan=TWO)
    with pytest.raises(PlanError, match=r"the plan's entry 'more.weight' matches no parameter"):
        SlimAdam(Actor().named_parameters(), plan=CompressionPlan({"more.weight": TWO["more.weight"]}))
