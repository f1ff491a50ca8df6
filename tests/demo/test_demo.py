"""The demo: its text, its model, and a tiny run from the command line to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slimadam
from slimadam.cli import cli
from slimadam.demo.data import ByteData, DataError, is_held_out, load, read_standard_library, source_files
from slimadam.demo.model import ByteGPT
from slimadam.demo.summary import layer_rows
from slimadam.demo.training import DemoResult, DemoSettings, DivergedError, learning_rate, run_demo
from slimadam.layers.roles import roles_of
from tests.command_line import CliRunner

TINY = DemoSettings(
    steps=6, width=16, layers=2, heads=2, context=16, batch_size=4, measurements=3, evaluations=2, held_out_windows=6
)


def text(length: int) -> ByteData:
    content = torch.randint(97, 105, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return ByteData(content[: length - length // 10], content[length - length // 10 :], "made up")


def run_tiny(settings: DemoSettings = TINY) -> DemoResult:
    return run_demo(settings, text(4000), lambda phase, step, loss: None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> DemoResult:
    return run_tiny()


def stepped_state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of second moments and of everything, counted after a step with made-up gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sizes = [
        (key, tensor.numel() * tensor.element_size())
        for state in optimizer.state.values()
        for key, tensor in state.items()
    ]
    return sum(size for key, size in sizes if key.startswith("exp_avg_sq")), sum(size for _, size in sizes)


# -- text -------------------------------------------------------------------------------------------------


def test_the_standard_library_is_split_by_file_and_without_tests(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "json/c.py", "d.txt", "test/e.py", "site-packages/f.py", "json/tests/g.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert {file.relative_to(tmp_path).as_posix() for file in source_files(tmp_path)} == {"a.py", "b.py", "json/c.py"}


def test_no_file_of_the_split_is_on_both_sides(tmp_path: Path) -> None:
    names = [f"module{index}.py" for index in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"<{name}>")
    data = read_standard_library(tmp_path)
    train, held_out = (bytes(part.tolist()).decode() for part in (data.train, data.held_out))
    assert all((f"<{name}>" in held_out) is is_held_out(Path(name)) for name in names)
    assert all((f"<{name}>" in train) is not is_held_out(Path(name)) for name in names)
    assert 0 < held_out.count("<") < 20


def test_the_standard_library_is_read_the_same_way_each_time() -> None:
    first, second = load(None, 64), load(None, 64)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    assert len(first.train) > 1_000_000
    assert len(first.held_out) > 100_000


def test_the_last_tenth_of_a_file_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)))
    data = load(file, context=8)
    assert data.train.tolist() == list(range(180))
    assert data.held_out.tolist() == list(range(180, 200))


def test_targets_are_the_inputs_one_byte_on_and_batches_follow_the_seed() -> None:
    data = ByteData(torch.arange(100, dtype=torch.uint8), torch.arange(100, 135, dtype=torch.uint8), "counting")
    batches, again, other = (list(data.batches(3, 4, 8, seed)) for seed in (1, 1, 2))
    for (inputs, targets), (same_inputs, _) in zip(batches, again, strict=True):
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, same_inputs)
    assert not torch.equal(batches[0][0], other[0][0])
    inputs, targets = data.held_out_windows(2, 8)
    assert inputs[:, 0].tolist() == [100, 116]
    assert torch.equal(targets, inputs + 1)
    assert data.held_out_windows(99, 8)[0].shape == (4, 8)


def test_a_text_of_just_enough_bytes_serves_and_one_byte_less_does_not(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"x" * 90)
    assert len(load(file, context=8).held_out) == 9
    file.write_bytes(b"x" * 89)
    with pytest.raises(DataError, match=r"has 89 bytes, too few .* at least 90 bytes"):
        load(file, context=8)


# -- model ------------------------------------------------------------------------------------------------


def test_a_byte_changes_no_logits_before_it() -> None:
    torch.manual_seed(0)
    model = ByteGPT(layers=2, width=16, heads=2, context=12).double()
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 12, 256)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_every_layer_has_the_role_it_plays() -> None:
    model = ByteGPT(layers=1, width=16, heads=2, context=8)
    roles = {name.removesuffix(".weight"): found.role for name, found in roles_of(model).items()}
    assert roles == {
        "token_embedding": "token_embedding",
        "position_embedding": "position_embedding",
        "blocks.0.attention_norm": "norm",
        "blocks.0.attention.query": "query",
        "blocks.0.attention.key": "key",
        "blocks.0.attention.value": "value",
        "blocks.0.attention.out": "attention_output",
        "blocks.0.mlp_norm": "norm",
        "blocks.0.mlp.up": "mlp_up",
        "blocks.0.mlp.down": "mlp_down",
        "final_norm": "norm",
        "lm_head": "lm_head",
    }


# -- training ---------------------------------------------------------------------------------------------


def test_both_runs_start_from_the_same_model_and_batch(tiny: DemoResult) -> None:
    assert tiny.adamw.train_losses[0] == tiny.slimadam.train_losses[0]
    assert tiny.adamw.train_losses[1:] != tiny.slimadam.train_losses[1:]
    assert list(tiny.adamw.held_out_losses) == [3, 6]
    assert len(tiny.slimadam.train_losses) == len(tiny.slimadam.optimizer_ms) == 6
    assert tiny.history.steps == [1, 2, 4, 6]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tiny: DemoResult) -> None:
    again, other = run_tiny(), run_tiny(DemoSettings(**{**vars(TINY), "seed": 1}))
    for run in ("adamw", "slimadam", "best"):
        assert getattr(again, run).train_losses == getattr(tiny, run).train_losses
        assert getattr(again, run).held_out_losses == getattr(tiny, run).held_out_losses
        assert getattr(other, run).train_losses != getattr(tiny, run).train_losses
    assert again.plan == tiny.plan


def test_bytes_are_those_of_the_state_tensors(tiny: DemoResult) -> None:
    model = TINY.new_model()
    optimizer = slimadam.SlimAdam(model.named_parameters(), plan=tiny.plan)
    counted = stepped_state_bytes(optimizer)
    assert (tiny.slimadam.second_moment_bytes, tiny.slimadam.state_bytes) == counted
    assert (optimizer.memory().exp_avg_sq, optimizer.memory().total) == counted
    counted = stepped_state_bytes(torch.optim.AdamW(model.parameters()))
    assert (tiny.adamw.second_moment_bytes, tiny.adamw.state_bytes) == counted
    assert tiny.second_moments_saved == pytest.approx(tiny.plan.second_moments_saved)
    best = slimadam.SlimAdam(model.named_parameters(), plan=tiny.best_plan)
    assert (tiny.best.second_moment_bytes, tiny.best.state_bytes) == stepped_state_bytes(best)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = DemoSettings(steps=100, lr=0.5, warmup=0.1, final_lr=0.1)
    assert [learning_rate(settings, step) for step in (1, 5, 10)] == pytest.approx([0.05, 0.25, 0.5])
    assert [learning_rate(settings, step) for step in (55, 100)] == pytest.approx([0.275, 0.05])


def test_a_diverging_run_says_so() -> None:
    with pytest.raises(DivergedError, match=r"at step \d of AdamW .* smaller learning rate"):
        run_tiny(DemoSettings(**{**vars(TINY), "lr": 1e30, "calibration_lr_factor": 1e-33}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps=0 must be at least 1"),
        ("width", 30, "width=30 must be a multiple of the 4 attention heads"),
        ("lr", float("nan"), "lr=nan must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings(**{name: value})


# -- command line -----------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").write_bytes(bytes(text(4000).train.tolist()))
    options = ("--steps", 3, "--width", 16, "--layers", 1, "--data", folder / "text", "--out", folder / "new" / "out")
    outcome = invoke(*options)
    assert outcome.exit_code == 0, outcome.output
    phases = ("calibration", "AdamW", "SlimAdam", "SlimAdam, best form")
    assert [line for line in outcome.stderr.splitlines() if line.endswith(": 3 steps")] == [
        f"{phase}: 3 steps" for phase in phases
    ]
    return folder / "new" / "out", outcome.stdout


def test_the_command_writes_what_it_found(small_run: tuple[Path, str]) -> None:
    out, printed = small_run
    assert {file.name for file in out.iterdir()} == {
        "plan.json",
        "plan-best.json",
        "report.html",
        "loss.png",
        "result.json",
    }
    result = json.loads((out / "result.json").read_text())
    plan = slimadam.CompressionPlan.load(out / "plan.json")
    adamw, slim = result["adamw"], result["slimadam"]
    assert (slim["second_moment_bytes"], adamw["second_moment_bytes"]) == tuple(4 * n for n in plan.second_moments)
    assert adamw["second_moment_bytes"] == 4 * result["parameters"]
    assert result["second_moments_saved"] == pytest.approx(plan.second_moments_saved)
    assert result["state_saved"] == pytest.approx(1 - slim["state_bytes"] / adamw["state_bytes"])
    assert result["loss_gap"] == pytest.approx(slim["held_out_loss"] / adamw["held_out_loss"] - 1)
    assert slim["held_out_loss"] == slim["held_out_losses"]["3"]
    assert [row["role"] for row in result["layers"]] == [row["role"] for row in layer_rows(plan)]
    assert f"{adamw['held_out_loss']:.4f}" in printed
    assert f"{result['loss_gap']:+.2%}" in printed
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lm_head.weight" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.txt"], "--data: absent.txt cannot be read (No such file or directory)"),
        (["--data", "."], "--data: . is a folder; choose a single file"),
        (["--width", "30"], "--width=30 must be a multiple of the 4 attention heads"),
        (["--lr", "nan"], "not a finite number"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_options_are_usage_errors_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke(*options)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"too short")
    outcome = invoke("--data", tmp_path / "short", "--out", tmp_path / "out")
    assert outcome.exit_code == 2
    assert "has 9 bytes, too few" in outcome.output
    assert not (tmp_path / "out").exists()
