"""SlimAdam in the loops of Hugging Face Trainer, Accelerate and Lightning, and under wrapped models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

from accelerate import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks.correctness import interop
from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, calibrate
from slimadam.cli import cli
from slimadam.integrations.transformers import optimizer_cls_and_kwargs
from slimadam.plans.resolver import PlanArgument
from tests.command_line import CliRunner

# The runs that are resumed were saved after 3 of 6 steps: before and after the decision of an automatic plan.
PLANS: dict[str, PlanArgument] = {
    "rules": "rules",
    "factored": "factored",
    "auto, measuring": AutoPlan(calibration_steps=5, cutoff=0.5),
    "auto, decided": AutoPlan(calibration_steps=2, cutoff=0.5),
}

UNMODIFIED_SCRIPT = """
import sys
from benchmarks import interop

interop.new_trainer(interop.llama(), interop.trainer_arguments(sys.argv[1])).train()
"""

pytestmark = [
    # Lightning 2.6 asks torch's pytree in a way that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # A few tokens need no loader processes.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


@pytest.fixture(autouse=True)
def _restored_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    with interop.accelerate_settings_restored():
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> PlanArgument:
    return PLANS[request.param]


def _weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def _moved(model: nn.Module) -> nn.Module:
    """The model with other weights, so that only a checkpoint can bring the first ones back."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5)
    return model


def _with_a_typo(model: nn.Module) -> CompressionPlan:
    """The rules with one entry whose name the model does not have."""
    rules = dict(CompressionPlan.from_rules(model))
    rules["model.layers.0.self_attn.query.weight"] = rules.pop("model.layers.0.self_attn.q_proj.weight")
    return CompressionPlan(rules)


# -- every integration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", interop.MODELS)
@pytest.mark.parametrize("label", interop.INTEGRATIONS)
def test_compresses_and_trains_as_the_loop_by_hand(label: str, model: str) -> None:
    outcome = interop.check(label, interop.MODELS[model])
    parameters, saved = {"Llama": (21, 0.936), "GPT-2": (28, 0.896)}[model]  # by parts of the fused QKV
    assert (outcome.matched, outcome.parameters) == (parameters, parameters)
    assert outcome.saved == pytest.approx(saved, abs=1e-3)
    assert outcome.difference <= interop.BAR


@pytest.mark.parametrize("label", interop.INTEGRATIONS)
def test_entry_that_matches_nothing_is_an_error(label: str) -> None:
    integration, options = interop.INTEGRATIONS[label]
    model = interop.llama()
    before = _weights(model)
    with pytest.raises(PlanError, match=r"'model\.layers\.0\.self_attn\.query\.weight' matches no parameter"):
        integration(model, _with_a_typo(model), **options)
    _assert_same(_weights(model), before)


@pytest.mark.parametrize("label", ["Trainer, helper", "Accelerate", "Lightning"])
def test_factored_second_moments(label: str) -> None:
    integration, _ = interop.INTEGRATIONS[label]
    run = integration(interop.llama(), "factored")
    assert interop.second_moments(run)["model.layers.0.mlp.down_proj.weight"] == [(16, 1), (1, 32)]
    assert interop.largest_difference(run, interop.by_hand(interop.llama(), "factored")) <= interop.BAR


# -- names under wrappers ---------------------------------------------------------------------------------


def _named(wrapped: nn.Module) -> SlimAdam:
    return SlimAdam(wrapped.named_parameters(), plan=CompressionPlan.from_rules(interop.llama()))


def _unnamed(wrapped: nn.Module) -> SlimAdam:
    return SlimAdam(wrapped.parameters(), model=wrapped, plan=CompressionPlan.from_rules(interop.llama()))


@pytest.mark.parametrize("make", [_named, _unnamed])
@pytest.mark.parametrize("wrap", ["compile", "compiled layers", "DDP", "DDP of compiled", "Accelerate, bf16"])
def test_plan_matches_through_wrappers(wrap: str, make: Any) -> None:
    model = interop.llama()
    with interop.one_process_group():
        wrapped: Any = {
            "compile": lambda: torch.compile(model, backend="eager"),
            "compiled layers": lambda: _compile_layers(model),
            "DDP": lambda: DistributedDataParallel(model),
            "DDP of compiled": lambda: DistributedDataParallel(torch.compile(model, backend="eager")),
            "Accelerate, bf16": lambda: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
        }[wrap]()
        optimizer = make(wrapped)
    expected = CompressionPlan.from_rules(interop.llama())
    assert {name: rule.dims for name, rule in optimizer.plan.items()} == {n: r.dims for n, r in expected.items()}
    assert optimizer.memory().second_moments_saved == pytest.approx(0.936, abs=1e-3)
    own_names = [name for name, _ in wrapped.named_parameters()]
    assert (own_names == list(expected)) == (wrap == "Accelerate, bf16")


def _compile_layers(model: Any) -> nn.Module:
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model  # type: ignore[no-any-return]


# -- Trainer ----------------------------------------------------------------------------------------------


def test_trainer_takes_a_calibrated_plan_file(tmp_path: Path) -> None:
    model, data = interop.llama(), iter([*interop.batches()] * 2)
    calibrated = calibrate(model, lambda: interop.loss_of(model, next(data)), steps=12, lr=1e-3, cutoff=0.7)
    calibrated.save(tmp_path / "plan.json")
    run = interop.trainer_with_helper(model, tmp_path / "plan.json")
    assert interop.second_moments(run) == {
        name: list(rule.state_shapes(rule.shape or ())) for name, rule in calibrated.items()
    }
    assert run.optimizer.memory().second_moments_saved == calibrated.second_moments_saved > 0.5
    assert interop.largest_difference(run, interop.by_hand(interop.llama(), calibrated)) <= interop.BAR


def test_trainer_resumes_where_it_was(tmp_path: Path, plan: PlanArgument) -> None:
    def trainer(model: nn.Module, folder: str) -> Any:
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
        args = interop.trainer_arguments(str(tmp_path / folder), train_sampling_strategy="random", **options)
        chosen = optimizer_cls_and_kwargs(model, args, plan=plan)
        return interop.new_trainer(model, args, optimizer_cls_and_kwargs=chosen)

    whole, resumed = trainer(interop.llama(), "whole"), trainer(_moved(interop.llama()), "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == interop.BATCHES
    assert resumed.optimizer.optimizer.memory().second_moments_saved > 0.7
    _assert_same(_weights(resumed.model), _weights(whole.model))


def test_trainer_goes_on_from_adamw_checkpoint(tmp_path: Path) -> None:
    args = interop.trainer_arguments(str(tmp_path), save_strategy="steps", save_steps=3)
    interop.new_trainer(interop.llama(), args).train()
    model = interop.llama()
    plan = CompressionPlan.from_rules(model)
    chosen = optimizer_cls_and_kwargs(model, args, plan=plan)
    trainer = interop.new_trainer(model, args, optimizer_cls_and_kwargs=chosen)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    state = trainer.optimizer.optimizer.state[weight]
    assert (state["step"].item(), tuple(state["exp_avg_sq"].shape)) == (interop.BATCHES, (1, 32))


def test_unmodified_trainer_script_on_the_command_line(tmp_path: Path) -> None:
    script, plan = tmp_path / "script.py", tmp_path / "plan.json"
    script.write_text(UNMODIFIED_SCRIPT)
    command = CliRunner()
    calibrated = command.invoke(
        cli, ["calibrate", "--every", "2", "--cutoff", "0.6", "--out", str(plan), str(script), str(tmp_path)]
    )
    assert calibrated.exit_code == 0, calibrated.output
    saved = CompressionPlan.load(plan).second_moments_saved
    assert saved > 0.7
    ran = command.invoke(cli, ["run", "--plan", str(plan), str(script), str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert f"{saved:.1%} saved" in ran.output


def test_helper_takes_what_the_arguments_say_and_keeps_the_groups(tmp_path: Path) -> None:
    model = interop.llama()
    args = interop.trainer_arguments(str(tmp_path))
    trainer = interop.new_trainer(
        model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args, plan="rules", eps=1e-5)
    )
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, SlimAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [interop.WEIGHT_DECAY, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [16, 5]
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (interop.LR, interop.BETAS, 1e-5)
    }


def test_trainer_without_the_helper_has_no_names(tmp_path: Path) -> None:
    model = interop.llama()
    chosen = (SlimAdam, {"plan": CompressionPlan.from_rules(model)})
    trainer = interop.new_trainer(model, interop.trainer_arguments(str(tmp_path)), optimizer_cls_and_kwargs=chosen)
    with pytest.raises(PlanError, match=r"goes by parameter names.*pass model=model"):
        trainer.train()


def test_frozen_parameters_may_be_in_the_plan(tmp_path: Path) -> None:
    model = interop.llama()
    plan = CompressionPlan.from_rules(model)
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    args = interop.trainer_arguments(str(tmp_path))
    trainer = interop.new_trainer(
        model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args, plan=plan)
    )
    assert "model.embed_tokens.weight" not in trainer.create_optimizer().plan


def test_helper_refuses_weight_decay_and_other_arguments(tmp_path: Path) -> None:
    model, args = interop.llama(), interop.trainer_arguments(str(tmp_path))
    with pytest.raises(ValueError, match=r"weight_decay=0\.1: .*TrainingArguments\(weight_decay=0\.1\)"):
        optimizer_cls_and_kwargs(model, args, plan="rules", weight_decay=0.1)
    with pytest.raises(TypeError, match=r"args=0\.001 must be transformers\.TrainingArguments"):
        optimizer_cls_and_kwargs(model, 1e-3, plan="rules")  # type: ignore[arg-type]


def test_without_transformers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "slimadam.integrations.transformers")
    with pytest.raises(ImportError, match=r"needs Hugging Face Transformers: pip install 'slimadam\[transformers\]'$"):
        importlib.import_module("slimadam.integrations.transformers")


# -- Accelerate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_where_it_was(tmp_path: Path, plan: PlanArgument, precision: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    data = list(interop.batches())

    def prepared(model: nn.Module) -> tuple[nn.Module, Any]:
        return accelerator.prepare(model, interop.new_optimizer(model, plan))  # type: ignore[no-any-return]

    def train(model: nn.Module, optimizer: Any, batches: list[interop.Batch]) -> None:
        for batch in batches:
            accelerator.backward(interop.loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = prepared(interop.llama())
    train(whole, optimizer, data[:3])
    accelerator.save_state(str(tmp_path))
    train(whole, optimizer, data[3:])
    accelerator.free_memory()
    resumed, optimizer = prepared(_moved(interop.llama()))
    accelerator.load_state(str(tmp_path))
    train(resumed, optimizer, data[3:])
    assert optimizer.optimizer.memory().second_moments_saved > 0.7
    _assert_same(_weights(resumed), _weights(whole))


# -- Lightning --------------------------------------------------------------------------------------------


# The resumed run goes on in the folder of the first.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning")
def test_lightning_resumes_where_it_was(tmp_path: Path, plan: PlanArgument) -> None:
    def fit(model: nn.Module, **options: Any) -> interop.TokenModule:
        module = interop.TokenModule(model, plan)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = interop.lightning_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saving])
        half = DataLoader(interop.Tokens(interop.BATCHES // 2 * interop.BATCH_SIZE), batch_size=interop.BATCH_SIZE)
        trainer.fit(module, half, **options)
        return module

    whole = fit(interop.llama())
    resumed = fit(_moved(interop.llama()), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.optimizers().memory().second_moments_saved > 0.7
    assert resumed.losses == whole.losses[interop.BATCHES // 2 :]
    _assert_same(_weights(resumed), _weights(whole))


def test_lightning_module_itself_gives_its_own_names() -> None:
    module = interop.TokenModule(interop.llama(), None)
    optimizer = SlimAdam(module, plan="rules")
    assert optimizer.plan["model.model.layers.0.mlp.down_proj.weight"] == Rule(
        (0,), "mean", (16, 32), reason="the paper's rule for mlp_down", role="mlp_down", fan_in=(1,)
    )
    with pytest.raises(PlanError, match=r"'model\.embed_tokens\.weight' matches no parameter"):
        SlimAdam(module, plan=CompressionPlan.from_rules(interop.llama()))
