"""``slimadam run``, through the command line."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.cli import cli
from slimadam.cli.script.substitution import Substitution
from tests.command_line import CliRunner

SCRIPTS = Path(__file__).parents[1] / "scripts"
MIXED = str(SCRIPTS / "mixed.py")
GAN = str(SCRIPTS / "gan.py")
PLAN = CompressionPlan(
    {
        "embedding.weight": Rule((1,), "mean", (11, 6)),
        "gru.weight_hh_l0": Rule((0,), "mean", (15, 5)),
        "conv.weight": Rule((1, 2), "mean", (4, 5, 3)),
        "head.weight": Rule(form="factored", shape=(11, 4)),
    }
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["run", *arguments], prog_name="slimadam")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train_by_hand(plan: CompressionPlan | None, steps: int = 6) -> dict[str, torch.Tensor]:
    """What ``mixed.py`` does, written with SlimAdam."""
    torch.manual_seed(0)
    model = runpy.run_path(MIXED)["Mixed"]()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = SlimAdam(groups, lr=1e-2, plan=plan)
    tokens = torch.randint(0, 11, (8, 9))
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("plan", [PLAN, None], ids=["plan", "none"])
def test_script_trains_as_with_slimadam_written_by_hand(plan: CompressionPlan | None) -> None:
    PLAN.save("plan.json")
    result = run("--plan", "none" if plan is None else "plan.json", MIXED, "--parameters", "ours.pt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("step 5 lr 0.01\ncleaned up\n")
    found, expected = torch.load("ours.pt"), train_by_hand(plan)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=0)


def test_plan_changes_training_and_saving_is_reported() -> None:
    PLAN.save("plan.json")
    result = run("--plan", "plan.json", MIXED, "--parameters", "ours.pt")
    # 380 second moments; kept: 11 of 66, 5 of 75, 4 of 60, 15 of 44, all of the other 135.
    assert "second moments of 1 optimizer(s) take 680 bytes instead of 1,520, 55.3% saved" in result.stderr
    assert "1 parameters are not in the plan and stay in full: gru.weight_ih_l0" in result.stderr
    assert not torch.equal(torch.load("ours.pt")["conv.weight"], train_by_hand(None)["conv.weight"])


def test_rules_go_by_the_role_of_each_layer() -> None:
    result = run("--plan", "rules", MIXED, "--steps", "1")
    assert result.exit_code == 0, result.stderr
    # The token embedding is averaged over its 6 columns, the head over its 4; nothing else here has a rule.
    assert f"take {4 * (380 - 66 + 11 - 44 + 11):,} bytes instead of 1,520" in result.stderr


def test_one_plan_covers_two_optimizers_in_whatever_order() -> None:
    calibrated = CliRunner().invoke(cli, ["calibrate", "--every", "1", "--cutoff", "0", "--forms", "best", GAN, "0"])
    assert calibrated.exit_code == 0, calibrated.stderr
    plan = CompressionPlan.load("plan.json")
    kept, full = plan.second_moments
    result = run("--plan", "plan.json", GAN, "0")
    assert result.exit_code == 0, result.stderr
    assert f"of 2 optimizer(s) take {4 * kept} bytes instead of {4 * full}" in result.stderr
    assert "matched no parameter" not in result.stderr
    Path("plan.json").unlink()


def test_unused_entries_are_reported() -> None:
    CompressionPlan({**PLAN, "decoder.weight": Rule((0,), "mean", (2, 2))}).save("plan.json")
    result = run("--plan", "plan.json", MIXED)
    assert result.exit_code == 0
    assert "1 entries of the plan matched no parameter: decoder.weight" in result.stderr


def test_a_plan_of_another_model_is_refused_before_the_first_step() -> None:
    CompressionPlan({"decoder.weight": Rule((0,), "mean", (2, 2))}).save("plan.json")
    result = run("--plan", "plan.json", MIXED)
    assert result.exit_code == 2
    assert result.stdout == "cleaned up\n"
    assert result.stderr == (
        "slimadam: the plan's 1 entries, 'decoder.weight' among them, match no parameter of the script's "
        "optimizers; calibrate this script\n"
    )


def test_a_plan_for_another_shape_is_refused() -> None:
    CompressionPlan({"head.weight": Rule((0,), "mean", (11, 5))}).save("plan.json")
    result = run("--plan", "plan.json", MIXED)
    assert result.exit_code == 2
    assert result.stderr.startswith("slimadam: 'head.weight': the plan is for shape (11, 5), the parameter has (11, 4)")
    assert result.stderr.count("\n") == 1


def test_l2_penalty_of_adam_is_refused() -> None:
    result = run("--plan", "none", GAN, "0.1")
    assert result.exit_code == 2
    assert result.stderr == (
        "slimadam: the script builds Adam with weight_decay=0.1, an L2 penalty, which SlimAdam does not have; "
        "use torch.optim.AdamW, or pass decoupled_weight_decay=True\n"
    )


def test_options_groups_and_isinstance_are_those_of_torch() -> None:
    original = torch.optim.Adam, torch.optim.AdamW
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    substitution = Substitution(CompressionPlan({"1.weight": Rule((1,), "mean", (2, 4))}))
    with substitution.active():
        from torch.optim.adamw import AdamW

        assert AdamW is torch.optim.AdamW
        assert issubclass(torch.optim.AdamW, torch.optim.Adam)
        optimizer = torch.optim.Adam(
            model[0].parameters(), 0.1, amsgrad=True, maximize=True, foreach=False, capturable=False, weight_decay=0.5,
            decoupled_weight_decay=True,
        )  # fmt: skip
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.2})
        with pytest.raises(TypeError, match="momentum"):
            torch.optim.AdamW(model.parameters(), momentum=0.9)
        with pytest.raises(ValueError, match="empty parameter list"):
            torch.optim.AdamW([])
    assert (torch.optim.Adam, torch.optim.AdamW) == original
    assert isinstance(optimizer, SlimAdam)
    first, second = optimizer.param_groups
    assert (first["lr"], first["amsgrad"], first["maximize"], first["foreach"]) == (0.1, True, True, False)
    assert (second["lr"], second["weight_decay"]) == (0.2, 0.5)
    assert optimizer.plan["1.weight"].dims == (1,)
    assert optimizer.plan["0.weight"].dims == ()
    assert substitution.memory[0].second_moments_saved == pytest.approx(6 / 26)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--plan", "none", str(SCRIPTS / "sgd.py")], 3, "built no torch.optim.Adam or AdamW"),
        (["--plan", "none", MIXED, "--exit-code", "5"], 1, "the script failed (exit code 5)"),
        (["--plan", "none", MIXED, "--end", "raise"], 1, "RuntimeError: no more data"),
        (
            ["--plan", "missing.json", MIXED],
            2,
            "slimadam: --plan 'missing.json' is neither a file nor one of auto, rules, factored, none",
        ),
        (["--plan", "none", "missing.py"], 2, "cannot run 'missing.py': no such file"),
        ([MIXED], 2, "Missing option '--plan'"),
    ],
)
def test_exit_codes(arguments: list[str], exit_code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert str(Path(sys.modules["slimadam.cli"].__file__ or "").parent) not in result.stderr


def test_a_script_that_asks_for_the_fused_adamw_runs(tmp_path: Path) -> None:
    script = tmp_path / "fused.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(6, 4)\n"
        "groups = [{'params': model.parameters(), 'fused': True}]\n"
        "optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)\n"
        "model(torch.ones(2, 6)).sum().backward()\n"
        "optimizer.step()\n"
    )
    CompressionPlan({"weight": Rule((1,), "mean")}).save("plan.json")
    result = run("--plan", "plan.json", str(script))
    assert result.exit_code == 0, result.output
    assert "71.4% saved" in result.output


def test_auto_measures_and_then_saves(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(20, 30)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)\n"
        "for step in range(502):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.randn(4, 20)).square().mean().backward()\n"
        "    optimizer.step()\n"
        "print([len(part) for key, part in optimizer.state[model.weight].items() if 'exp_avg_sq' in key])\n"
    )
    result = run("--plan", "auto", str(script))
    assert result.exit_code == 0, result.output
    (kept,) = re.findall(r"take ([\d,]+) bytes instead of 2,520", result.output)
    assert int(kept.replace(",", "")) < 400


def test_factored_stores_rows_and_columns(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(20, 30)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)\n"
        "model(torch.ones(4, 20)).square().mean().backward()\n"
        "optimizer.step()\n"
        "print([tuple(part.shape) for key, part in optimizer.state[model.weight].items() if 'exp_avg_sq' in key])\n"
    )
    result = run("--plan", "factored", str(script))
    assert result.exit_code == 0, result.output
    assert "[(30, 1), (1, 20)]" in result.output
    assert "take 320 bytes instead of 2,520" in result.output


def test_auto_that_had_no_time_to_decide_says_so() -> None:
    result = run("--plan", "auto", MIXED)
    assert result.exit_code == 0, result.output
    assert "1 optimizer(s) had not decided yet: plan 'auto' runs as AdamW for its first 200 steps" in result.output


def test_a_misspelt_plan_names_what_there_is() -> None:
    result = run("--plan", "factord", MIXED)
    assert result.exit_code == 2
    assert "neither a file nor one of auto, rules, factored, none; did you mean 'factored'?" in result.output


@pytest.mark.parametrize("options", [(), ("--forms", "mean")])
def test_a_plan_calibrated_with_fused_weights_fits_the_script(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = str(SCRIPTS / "fused.py")
    plan = tmp_path / "plan.json"
    arguments = ["calibrate", "--cutoff", "0", "--out", str(plan), *options, script, "3"]
    calibrated = CliRunner().invoke(cli, arguments)
    assert calibrated.exit_code == 0, calibrated.output
    loaded = CompressionPlan.load(plan)
    assert "attn.c_attn.weight[query]" in loaded
    assert loaded["experts.gate_up_proj[mlp_up]"].batch_dims == 1
    result = CliRunner().invoke(cli, ["run", "--plan", str(plan), script, "3"])
    assert result.exit_code == 0, result.output
    assert "matched no parameter" not in result.output
    assert f"{loaded.second_moments_saved:.1%} saved" in result.output
