"""``slimadam calibrate``, through the command line."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from slimadam import CompressionPlan, SlimAdam, SNRHistory
from slimadam.cli import cli
from slimadam.cli.script.observer import LearningRateScale, Observer
from slimadam.cli.script.runner import run_script
from tests.command_line import CliRunner

SCRIPTS = Path(__file__).parents[1] / "scripts"
MIXED = str(SCRIPTS / "mixed.py")
NAMES = {
    "embedding.weight", "gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0", "gru.bias_hh_l0",
    "conv.weight", "conv.bias", "head.weight", "head.bias",
}  # fmt: skip


def calibrate(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *arguments], prog_name="slimadam")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def snr_by_numpy(v: np.ndarray, dims: tuple[int, ...]) -> float:
    v = v.astype(np.float64)
    return float(np.mean(v.mean(dims) ** 2 / v.var(dims)))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_failing_script_with_unnamed_groups_is_measured_exactly() -> None:
    script = [MIXED, "--steps", "4", "--end", "raise", "--second-moments", "v.npz"]
    plain = python(*script)
    ours = python("-m", "slimadam", "calibrate", "--every", "2", "--history", "snr.csv", *script)

    assert plain.returncode == ours.returncode == 1
    assert ours.stdout == plain.stdout
    assert plain.stderr.endswith("RuntimeError: no more data\n")
    assert ours.stderr.startswith(plain.stderr)
    assert "--lr-scale 0.1" in ours.stderr
    plan, history = CompressionPlan.load("plan.json"), SNRHistory.load_csv("snr.csv")
    assert set(plan) == set(history) == NAMES
    assert history.steps == [1, 2, 4]
    second_moments = np.load("v.npz")
    assert set(second_moments.files) == NAMES
    for name, v in second_moments.items():
        assert plan[name].shape == v.shape
        for size in range(1, v.ndim + 1):
            for dims in itertools.combinations(range(v.ndim), size):
                assert history[name].values[4][dims] == pytest.approx(snr_by_numpy(v, dims), rel=1e-9)


def test_report_and_json_of_a_script_that_exits_with_3() -> None:
    result = calibrate("--report", "report.html", "--json", MIXED, "--steps", "2", "--exit-code", "3")
    assert result.exit_code == 1
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["script_exit"] == 3
    files = {"plan": str(Path("plan.json").absolute()), "report": str(Path("report.html").absolute())}
    assert found["files"] == files
    assert "gru.weight_hh_l0" in Path("report.html").read_text(encoding="utf-8")


def test_only_rank_zero_writes_and_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    other = calibrate("--json", MIXED, "--steps", "1")
    assert (other.exit_code, other.stdout, other.stderr) == (0, "step 0 lr 0.01\ncleaned up\n", "to stderr\n")
    assert not Path("plan.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert calibrate("--json", MIXED, "--steps", "1").exit_code == 0
    assert Path("plan.json").exists()


def test_sigterm_still_writes_the_plan() -> None:
    ours = python("-m", "slimadam", "calibrate", "--json", MIXED, "--steps", "2", "--end", "sigterm")
    assert ours.returncode == 1
    assert "not reached" not in ours.stdout
    assert "cleaned up" in ours.stdout
    assert json.loads(ours.stdout.splitlines()[-1])["script_exit"] == 128 + signal.SIGTERM
    assert set(CompressionPlan.load("plan.json")) == NAMES


def test_keyboard_interrupt_still_writes_the_plan() -> None:
    result = calibrate("--json", MIXED, "--end", "interrupt")
    assert result.exit_code == 1
    assert "KeyboardInterrupt" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["script_exit"] == 130
    assert set(CompressionPlan.load("plan.json")) == NAMES


def test_steps_end_a_script_that_swallows_exceptions() -> None:
    # The second --steps belongs to the script.
    result = calibrate("--steps", "3", "--json", MIXED, "--steps", "1000", "--stubborn")
    assert result.exit_code == 0
    *output, last = result.stdout.splitlines()
    assert output == ["step 0 lr 0.01", "step 1 lr 0.01", "cleaned up"]
    assert json.loads(last) == {
        "steps": 3,
        "optimizers": 1,
        "parameters": 9,
        "compressed": sum(rule.form != "full" for rule in CompressionPlan.load("plan.json").values()),
        "second_moments_saved": CompressionPlan.load("plan.json").second_moments_saved,
        "averaged_away": CompressionPlan.load("plan.json").expectation.averaged_away,
        "files": {"plan": str(Path("plan.json").absolute())},
        "script_exit": 0,
    }
    assert "only one step was measured" in result.stderr


@pytest.mark.parametrize("options", [["--steps", "2"], ["--steps=2", "--", "--json"], ["-m", "--out", "x"]])
def test_options_after_the_script_are_the_scripts(options: list[str]) -> None:
    script = str(SCRIPTS / "sgd.py")
    result = calibrate(script, *options)
    assert result.stdout == f"done {' '.join(options)}\n"
    assert result.exit_code == 3
    assert "nothing to calibrate" in result.stderr
    assert list(Path().iterdir()) == []


def test_module_runs_as_python_m_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "package", raising=False)
    ours = calibrate("--out", str(tmp_path / "plan.json"), "-m", "package", "--steps", "7")
    assert ours.exit_code == 0, ours.stderr
    assert ours.stdout == "package __main__ package.__main__ ['--steps', '7']\n"
    assert set(CompressionPlan.load(tmp_path / "plan.json")) == {"weight", "bias"}


def test_script_sees_itself_as_main() -> None:
    script = str(SCRIPTS / "identity.py")
    before = (sys.modules["__main__"], list(sys.argv), list(sys.path))
    ours = calibrate(script, "a", "--b")
    assert ours.stdout == python(script, "a", "--b").stdout
    assert (sys.modules["__main__"], sys.argv, sys.path) == before


@pytest.mark.parametrize("tensor_lr", [[], ["--tensor-lr"]])
def test_lr_scale_equals_a_run_at_the_scaled_rate(tensor_lr: list[str]) -> None:
    scaled = calibrate("--lr-scale", "0.25", MIXED, "--lr", "0.01", "--parameters", "scaled.pt", *tensor_lr)
    direct = calibrate(MIXED, "--lr", "0.0025", "--parameters", "direct.pt", *tensor_lr)
    assert scaled.exit_code == direct.exit_code == 0
    assert "step 5 lr 0.01\n" in scaled.stdout
    assert "--lr-scale" not in scaled.stderr
    found, expected = torch.load("scaled.pt"), torch.load("direct.pt")
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert not torch.equal(found["head.weight"], torch.zeros_like(found["head.weight"]))


def test_lr_scale_survives_a_step_that_raises() -> None:
    rate = torch.tensor(0.5)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=rate)
    scale = LearningRateScale(0.125)
    scale.apply(optimizer)  # and its step raises
    assert optimizer.param_groups[0]["lr"] == 0.0625
    scale.apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.0625
    scale.restore()
    assert optimizer.param_groups[0]["lr"] is rate


def test_lr_scale_leaves_a_rate_alone_that_was_set_during_the_step() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    scale = LearningRateScale(0.125)
    scale.apply(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    scale.restore(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_lr_scale_reaches_every_step_where_all_second_moments_are_factored() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = SlimAdam([weight], lr=0.5, plan="factored")
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    with Observer(lambda step: True, lr_scale=0.125).watching():
        for _ in range(3):
            weight.grad = torch.ones(3, 2)
            optimizer.step()
    assert rates == [0.0625] * 3
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_two_optimizers_merge_into_one_plan() -> None:
    result = calibrate("--every", "1", "--json", str(SCRIPTS / "gan.py"), "0")
    assert result.exit_code == 0, result.stderr
    plan = CompressionPlan.load("plan.json")
    assert {name: rule.shape for name, rule in plan.items()} == {
        "Sequential.0.weight": (7, 5),
        "Sequential.0.bias": (7,),
        "Sequential.1.weight": (1, 7),
        "Sequential.1.bias": (1,),
        "Sequential#2.0.weight": (8, 3),
        "Sequential#2.0.bias": (8,),
        "Sequential#2.1.weight": (5, 8),
        "Sequential#2.1.bias": (5,),
    }
    assert json.loads(result.stdout)["optimizers"] == 2


def test_a_model_that_moves_on_to_another_optimizer_keeps_its_names() -> None:
    model = torch.nn.Linear(3, 2)
    observer = Observer(lambda step: True)
    with observer.watching():
        for _ in range(2):
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(3):
                model(torch.ones(4, 3)).square().sum().backward()
                optimizer.step()
    history = observer.history()
    assert set(history) == {"weight", "bias"}
    assert history.steps == [1, 2, 3, 4, 5, 6]
    assert observer.optimizers == 2


def test_trouble_while_measuring_is_not_the_scripts() -> None:
    def broken(step: int) -> bool:
        raise RuntimeError(f"cannot tell at {step}")

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    observer = Observer(broken)
    with observer.watching():
        for _ in range(2):
            weight.square().sum().backward()
            optimizer.step()
    assert observer.problems == ["stopped measuring Adam: cannot tell at 1"]
    assert optimizer.state[weight]["step"] == 2


def test_choices_reach_the_plan() -> None:
    options = ["--cutoff", "0", "--forms", "best", "--keep", "gru.*", "--keep", "nothing", "--every", "1"]
    result = calibrate(*options, MIXED, "--steps", "2")
    assert result.exit_code == 0
    plan = CompressionPlan.load("plan.json")
    assert plan.cutoff == 0
    assert {name for name, rule in plan.items() if rule.form != "full"} == {
        "embedding.weight", "conv.weight", "head.weight",
    }  # fmt: skip
    assert "--keep nothing: no parameter has such a name or role" in result.stderr
    assert "--keep gru" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "missing/plan.json", MIXED], "does not exist; create it"),
        (["--report", ".", MIXED], "is a folder; name a file"),
        (["--cutoff", "nan", MIXED], "nan is not a finite number"),
        (["--lr-scale", "0", MIXED], "0.0 is not in the range x>0"),
        (["--steps", "0", MIXED], "0 is not in the range x>=1"),
        (["missing.py"], "cannot run 'missing.py': no such file"),
        (["-m", "no_such_module"], "cannot run module 'no_such_module'"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_usage_errors_come_before_the_script_runs(arguments: list[str], message: str) -> None:
    result = calibrate(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_other_ranks_need_no_folder_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = calibrate("--out", "missing/plan.json", "--report", ".", "--steps", "1", MIXED)
    assert (result.exit_code, result.stderr) == (0, "")
    assert not Path("missing").exists()


def test_syntax_error_is_the_scripts_failure() -> None:
    Path("broken.py").write_text("print('never')\ndef (:\n", encoding="utf-8")
    result = calibrate("broken.py")
    assert result.exit_code == 1
    assert "SyntaxError" in result.stderr
    assert "slimadam/cli" not in result.stderr


@pytest.mark.parametrize(
    ("source", "exit_code"),
    [("exit()", 0), ("import sys; sys.exit('bad news')", 1), ("import sys; sys.exit(7)", 7), ("pass", 0)],
)
def test_exit_codes_of_scripts(source: str, exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text(source, encoding="utf-8")
    outcome = run_script("script.py")
    outcome.show_error()
    assert outcome.exit_code == exit_code
    assert capsys.readouterr().err == ("bad news\n" if "bad news" in source else "")


def test_a_forked_child_that_ends_normally_writes_nothing(tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(
        "import os, torch\n"
        "model = torch.nn.Linear(3, 2)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "model(torch.ones(1, 3)).sum().backward()\n"
        "optimizer.step()\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "    optimizer.step()\n"
        "    print('parent')\n"
    )
    command = [sys.executable, "-m", "slimadam", "calibrate", "--out", str(tmp_path / "plan.json"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "parent\n"
    assert done.stderr.count("plan written") == 1
    assert "2 steps" in done.stderr


def test_budget_goes_from_the_command_line_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20))\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "for _ in range(2):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.randn(4, 20)).square().sum().backward()\n"
        "    optimizer.step()\n"
    )
    result = CliRunner().invoke(cli, ["calibrate", "--budget", "0.3", str(script)])
    assert result.exit_code == 0, result.output
    assert 0.3 <= CompressionPlan.load("plan.json").second_moments_saved < 0.96
    result = CliRunner().invoke(cli, ["calibrate", "--budget", "1.0", str(script)])
    assert result.exit_code == 0
    assert "can be saved; ask for less; the plan is by the cutoff 1 instead" in result.output
    result = CliRunner().invoke(cli, ["calibrate", "--budget", "0.3", "--cutoff", "1", str(script)])
    assert result.exit_code == 2
    assert "exclude each other" in result.output
    result = CliRunner().invoke(cli, ["calibrate", "--out", "same", "--history", "same", str(script)])
    assert result.exit_code == 2
    assert "name the same file" in result.output


def test_groups_added_later_to_two_optimizers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "later.py"
    script.write_text(
        "import torch\n"
        "optimizers = [torch.optim.AdamW([torch.ones(2, 2, requires_grad=True)]) for _ in range(2)]\n"
        "def step():\n"
        "    for optimizer in optimizers:\n"
        "        for group in optimizer.param_groups:\n"
        "            for param in group['params']:\n"
        "                param.grad = torch.randn_like(param)\n"
        "        optimizer.step()\n"
        "step()\n"
        "for size, optimizer in zip((3, 5), optimizers):\n"
        "    optimizer.add_param_group({'params': [torch.ones(size, size, requires_grad=True)]})\n"
        "step()\n"
    )
    result = CliRunner().invoke(cli, ["calibrate", "--every", "1", str(script)])
    assert result.exit_code == 0, result.output
    assert sorted(rule.shape for rule in CompressionPlan.load("plan.json").values()) == [(2, 2), (2, 2), (3, 3), (5, 5)]
