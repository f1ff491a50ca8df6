"""``slimadam plan`` and the command group, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from slimadam import CompressionPlan, Rule, Split, __version__
from slimadam.cli import cli
from tests.command_line import CliRunner

SHOWN = CompressionPlan(
    {
        "q.weight": Rule((1,), "mean", (8, 4), {(0,): 0.5, (1,): 4.25, "factored": float("inf")}, "why", "query"),
        "head[0].weight": Rule(form="factored", shape=(6, 5), reason="other"),
        "bias": Rule(shape=(4,), role="bias"),
    },
    cutoff=1.0,
)


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments], prog_name="slimadam")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SHOWN.save("a.json")


def test_show_prints_every_rule_and_the_totals() -> None:
    result = plan("show", "a.json")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        ["q.weight", "query", "8x4", "0: 0.5  1: 4.25  factored: inf", "mean over 1", "why"],
        ["head[0].weight", "", "6x5", "", "factored", "other"],
        ["bias", "bias", "4", "", "full", ""],
    ]
    # 8 of 32, 6 + 5 of 30, 4 of 4
    assert result.stdout.endswith("2 of 3 parameters compressed; 23 of 66 second moments kept, 65.2% saved\n")


def test_show_as_json_is_the_plan_with_totals() -> None:
    shown = json.loads(plan("show", "a.json", "--json").stdout)
    totals = shown.pop("totals")
    assert CompressionPlan.from_dict(shown) == SHOWN
    assert totals == {
        "second_moments": 66, "second_moments_kept": 23, "second_moments_saved": pytest.approx(43 / 66)
    }  # fmt: skip


def test_diff_tells_what_is_stored_differently() -> None:
    CompressionPlan({f"module.{name}": rule for name, rule in SHOWN.items()}).save("same.json")
    same = plan("diff", "a.json", "same.json")
    assert (same.exit_code, same.stdout) == (0, "")

    other = {
        "q.weight": Rule((0,), "mean", (8, 4)),
        "head[0].weight": Rule(form="factored", shape=(6, 7)),
        "new.weight": Rule(),
    }
    CompressionPlan(other).save("b.json")
    different = plan("diff", "a.json", "b.json")
    assert different.exit_code == 1
    assert different.stdout.splitlines() == [
        "q.weight: mean over 1 -> mean over 0",
        "head[0].weight: factored of shape (6, 5) -> factored of shape (6, 7)",
        "bias: only in a.json",
        "new.weight: only in b.json",
    ]
    as_json = plan("diff", "a.json", "b.json", "--json")
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)
    assert found["changed"]["q.weight"] == {
        "a": {"form": "mean", "dims": [1], "shape": [8, 4]},
        "b": {"form": "mean", "dims": [0], "shape": [8, 4]},
    }
    assert (found["only_in_a"], found["only_in_b"]) == (["bias"], ["new.weight"])


def test_trouble_is_one_line_and_exit_code_2() -> None:
    Path("broken.json").write_text("{", encoding="utf-8")
    result = plan("diff", "a.json", "broken.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("slimadam: broken.json: cannot be read as a JSON plan")
    assert result.stderr.count("\n") == 1
    assert plan("diff", "a.json", "missing.json").exit_code == 2


MODELS = """
from torch import nn

def fitting():
    model = nn.Module()
    model.q = nn.Linear(4, 8, bias=False)
    model.extra = nn.Linear(2, 2, bias=False)
    return model

def wider():
    model = nn.Module()
    model.q = nn.Linear(4, 16, bias=False)
    return model

def failing():
    raise KeyError("no config")

text = str
"""


def test_check_validates_the_file_and_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cli_check_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    saved = CompressionPlan.load("a.json").second_moments_saved
    expected = f"a.json: valid, 3 entries, {saved:.1%} of second moments saved\n"
    assert plan("check", "a.json").stdout == expected
    CompressionPlan({"module.q.weight": SHOWN["q.weight"]}).save("q.json")
    fits = plan("check", "q.json", "--model", "cli_check_models:fitting")
    assert fits.exit_code == 0
    assert fits.stdout.endswith("1 of the model's 2 parameters have a rule\n")

    for file, model, exit_code, message in [
        ("q.json", "cli_check_models:wider", 1, "slimadam: 'q.weight': the plan is for shape (8, 4)"),
        ("a.json", "cli_check_models:fitting", 1, "slimadam: 'head[0].weight': the model has no such parameter (2 of"),
        ("q.json", "cli_check_models:failing", 2, "KeyError: 'no config'"),
        ("q.json", "cli_check_models:absent", 2, "AttributeError"),
        ("q.json", "cli_check_models:text", 2, "returned str, not an nn.Module"),
        ("q.json", "cli_check_models", 2, "must read MODULE:CALLABLE"),
    ]:
        result = plan("check", file, "--model", model)
        assert (result.exit_code, message in result.stderr) == (exit_code, True), result.stderr


def test_check_of_an_invalid_file_exits_with_1() -> None:
    Path("bad.json").write_text('{"w": [9]}', encoding="utf-8")
    result = plan("check", "bad.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("slimadam: bad.json: 'w': dims=[9]")


def test_help_lists_every_command_without_loading_any() -> None:
    code = (
        "import sys; sys.argv = ['slimadam', '--help']\n"
        "from slimadam.__main__ import main\n"
        "try: main()\n"
        "finally: print([m for m in ('rich', 'matplotlib', 'slimadam.cli.calibrate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in ("calibrate", "demo", "plan", "run"):
        assert f"\n  {name} " in result.stdout
    assert result.stdout.endswith("[]\n")
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"slimadam, version {__version__}\n"
    assert CliRunner().invoke(cli, ["no-such-command"]).exit_code == 2


def test_check_refuses_parts_that_are_not_the_whole_parameter() -> None:
    divided = Split({"a": 4, "b": 4}).divide("w", (8, 6))
    rules = {f"w[{part.label}]": Rule((1,), "mean", part.shape, part=part) for part in divided}
    CompressionPlan(rules).save("whole.json")
    assert plan("check", "whole.json").exit_code == 0
    CompressionPlan({"w[b]": rules["w[b]"]}).save("half.json")
    overlapping = CompressionPlan(rules).to_dict()
    overlapping["parameters"]["w[b]"]["part"]["start"] = 3
    Path("overlap.json").write_text(json.dumps(overlapping))
    CompressionPlan({**rules, "w": Rule(shape=(8, 6))}).save("both.json")
    for file, message in (
        ("half.json", "'w': its part 'b' starts at 4"),
        ("overlap.json", "'w': its part 'b' starts at 3 with size 4, where 4 is next"),
        ("both.json", "'w': the plan has a rule for the whole parameter and one for its part"),
    ):
        result = plan("check", file)
        assert (result.exit_code, message in result.stderr) == (1, True)


def test_check_against_a_model_knows_both_names_of_a_tied_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tied_model.py").write_text(
        "from torch import nn\n"
        "def tied():\n"
        "    model = nn.ModuleDict({'a': nn.Embedding(6, 4), 'b': nn.Linear(4, 6, bias=False)})\n"
        "    model['b'].weight = model['a'].weight\n"
        "    return model\n"
    )
    for name in ("a.weight", "b.weight"):
        CompressionPlan({name: Rule((1,), "mean", (6, 4))}).save("tied.json")
        result = plan("check", "tied.json", "--model", "tied_model:tied")
        assert result.exit_code == 0
        assert "1 of the model's 1 parameters have a rule" in result.stdout


def test_diff_says_how_parts_and_stacks_differ() -> None:
    for file, sizes in (("ab.json", {"a": 4, "b": 4}), ("ba.json", {"b": 4, "a": 4})):
        rules = [Rule((1,), "mean", part.shape, part=part) for part in Split(sizes).divide("w", (8, 6))]
        CompressionPlan.of_parameters({"w": rules}).save(file)
    lines = plan("diff", "ab.json", "ba.json").stdout.splitlines()
    assert lines[0] == (
        "w[a]: mean over 1, from 0 along dimension 0 of (8, 6) -> mean over 1, from 4 along dimension 0 of (8, 6)"
    )
    told = json.loads(plan("diff", "ab.json", "ba.json", "--json").stdout)["changed"]["w[a]"]
    assert (told["a"]["part"]["start"], told["b"]["part"]["start"]) == (0, 4)
    for file, batch_dims in (("one.json", 1), ("none.json", 0)):
        CompressionPlan({"w": Rule((), "factored", (4, 6, 6), batch_dims=batch_dims)}).save(file)
    result = plan("diff", "one.json", "none.json")
    assert result.stdout == "w: factored with 1 batch dimensions -> factored with 0 batch dimensions\n"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_stops_early_is_no_error(arguments: list[str]) -> None:
    rule = Rule((1,), "mean", (64, 64), reason="as long a reason as it takes to fill a pipe")
    CompressionPlan({f"layers.{index}.weight": rule for index in range(2000)}).save("long.json")
    command = [sys.executable, "-m", "slimadam", "plan", "show", *arguments, "long.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
