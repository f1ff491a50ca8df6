"""Sharpness in the loops of Hugging Face Trainer and Lightning, against a loop written by hand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from benchmarks.correctness import interop
from slimadam import SharpnessLogger, SharpnessRow, SlimAdam
from slimadam.curvature.records import read_csv
from slimadam.integrations.lightning import SharpnessCallback as LightningSharpness
from slimadam.integrations.transformers import SharpnessCallback, optimizer_cls_and_kwargs

EVERY = 2

pytestmark = [
    # Lightning 2.6 asks torch's pytree in a way that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # A few tokens need no loader processes.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # CSVLogger writes more than once into a test's folder.
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists:UserWarning"),
]


@pytest.fixture(autouse=True)
def _restored_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    with interop.accelerate_settings_restored():
        yield
    torch.set_num_threads(threads)


def dropping() -> nn.Module:
    """The small GPT-2, with dropout."""
    model = interop.gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model.train()


def by_hand(
    model: nn.Module, *, bf16: bool = False, accumulate: int = 1, clip: float = 0.0
) -> tuple[list[SharpnessRow], list[Tensor]]:
    """Rows and weights; each evaluation has the dropout masks of its training step."""
    optimizer = interop.new_optimizer(model, "rules")
    logger = SharpnessLogger(optimizer, EVERY)
    data = list(interop.batches())

    def loss_of(batch: interop.Batch, tokens: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(**batch, num_items_in_batch=tokens).loss  # type: ignore[no-any-return]

    for start in range(0, len(data), accumulate):
        group = data[start : start + accumulate]
        tokens = sum(batch["labels"][:, 1:].numel() for batch in group)
        shares = [partial(loss_of, batch, tokens, start + index) for index, batch in enumerate(group)]
        for share in shares:
            torch.autograd.backward(share())
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        logger.step(lambda shares=shares: sum(share() for share in shares))  # type: ignore[misc]
        optimizer.step()
        optimizer.zero_grad()
    return logger.rows, [param.detach() for param in model.parameters()]


def _assert_same_rows(ours: list[SharpnessRow], theirs: list[SharpnessRow]) -> None:
    assert [row.step for row in ours] == [row.step for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.status, a.task, a.lr) == (b.status, b.task, b.lr)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.sharpness == pytest.approx(b.sharpness, rel=1e-3)


def _assert_same_weights(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# -- Trainer ------------------------------------------------------------------------------------------------


def _trainer(model: nn.Module, folder: Path, *, watch: Any = None, **options: Any) -> Any:
    args = interop.trainer_arguments(str(folder), **options)
    trainer = interop.new_trainer(
        model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args, plan="rules")
    )
    if watch is not None:
        trainer.add_callback(SharpnessCallback(trainer, EVERY, **watch))
    return trainer


def _callback(trainer: Any) -> SharpnessCallback:
    [found] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SharpnessCallback)]
    return found


@pytest.mark.parametrize(
    ("hand", "options"),
    [
        ({}, {}),
        ({"clip": 0.05}, {"max_grad_norm": 0.05}),
        ({"accumulate": 2}, {"gradient_accumulation_steps": 2, "max_steps": interop.BATCHES // 2}),
        ({"bf16": True}, {"bf16": True}),
    ],
    ids=["plain", "clipped", "accumulated", "bf16"],
)
def test_trainer_measures_as_the_loop_by_hand(tmp_path: Path, hand: dict[str, Any], options: dict[str, Any]) -> None:
    trainer = _trainer(interop.llama(), tmp_path, watch={"csv": tmp_path / "s.csv"}, **options)
    trainer.train()
    rows, weights = by_hand(interop.llama(), **hand)
    assert [row.status for row in rows] == ["found"] * len(rows)
    _assert_same_rows(_callback(trainer).logger.rows, rows)
    _assert_same_weights([param.detach() for param in trainer.model.parameters()], weights)
    assert read_csv(tmp_path / "s.csv") == _callback(trainer).logger.rows
    logged = [entry for entry in trainer.state.log_history if "sharpness/critical" in entry]
    assert [(entry["step"], entry["sharpness/critical"]) for entry in logged] == [
        (row.step, row.sharpness) for row in _callback(trainer).logger.rows
    ]


def test_trainer_evaluates_with_the_dropout_of_the_step(tmp_path: Path) -> None:
    trainer = _trainer(dropping(), tmp_path, watch={})
    trainer.train()
    for row in _callback(trainer).logger.rows:
        # The Trainer logs the loss of a step after it.
        [trained] = [e["loss"] for e in trainer.state.log_history if e["step"] == row.step + 1 and "loss" in e]
        assert row.loss == pytest.approx(trained, rel=1e-6)


def test_trainer_goes_the_same_way_unwatched(tmp_path: Path) -> None:
    watched, alone = _trainer(dropping(), tmp_path, watch={}), _trainer(dropping(), tmp_path)
    for trainer in (watched, alone):
        torch.manual_seed(0)
        trainer.train()
    _assert_same_weights(list(watched.model.parameters()), list(alone.model.parameters()))
    assert "compute_loss" not in vars(watched)


def test_trainer_with_its_own_loss_and_label_smoothing(tmp_path: Path) -> None:
    trainer = _trainer(interop.llama(), tmp_path, watch={}, label_smoothing_factor=0.2)
    calls = []
    original = trainer.compute_loss

    def doubled(model: nn.Module, inputs: Any, **kwargs: Any) -> Tensor:
        calls.append(sorted(inputs))
        return 2 * original(model, inputs, **kwargs)

    trainer.compute_loss = doubled
    trainer.train()
    assert trainer.compute_loss is doubled
    assert set(map(tuple, calls)) == {("input_ids", "labels")}
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    for row in _callback(trainer).logger.rows:
        assert row.loss == pytest.approx(losses[row.step + 1], rel=1e-6)


def test_trainer_measures_other_tasks_too(tmp_path: Path) -> None:
    model = interop.llama()
    batch = next(iter(interop.batches()))
    trainer = _trainer(model, tmp_path, watch={"tasks": {"code": lambda: interop.loss_of(model, batch)}})
    trainer.train()
    assert [(row.step, row.task) for row in _callback(trainer).logger.rows[:3]] == [(0, ""), (0, "code"), (2, "")]
    assert any("sharpness/code/loss" in entry for entry in trainer.state.log_history)


def test_trainer_resumes_at_its_step(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "watch": {"csv": tmp_path / "s.csv"}}
    whole = _trainer(interop.llama(), tmp_path, **options)
    whole.train()
    resumed = _trainer(interop.llama(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row.step for row in _callback(resumed).logger.rows] == [4]
    [row], first = _callback(resumed).logger.rows, _callback(whole).logger.rows
    assert row.loss == first[-1].loss
    assert [found.step for found in read_csv(tmp_path / "s.csv")] == [0, 2, 4]


def test_trainer_that_computes_no_loss_is_not_measured(tmp_path: Path) -> None:
    class Own(interop.Trainer):  # type: ignore[misc,name-defined]
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = Own(interop.llama(), interop.trainer_arguments(str(tmp_path)), train_dataset=interop.Tokens())
    callback = SharpnessCallback(trainer, EVERY)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="is not measured: training_step of this Trainer does not call compute_loss"):
        trainer.train()
    assert callback.logger.rows == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [("deepspeed", "under DeepSpeed"), ("fp16", r"with fp16 and max_grad_norm=0 .*; set max_grad_norm")],
)
def test_trainer_that_is_not_supported_trains_on(tmp_path: Path, broken: str, message: str) -> None:
    trainer = _trainer(interop.llama(), tmp_path, watch={})
    callback = _callback(trainer)
    if broken == "deepspeed":
        trainer.is_deepspeed_enabled = True
    else:
        trainer.accelerator.scaler = object()
    with pytest.warns(UserWarning, match=f"critical sharpness is not measured: {message}"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert "compute_loss" not in vars(trainer)


def test_callback_needs_the_trainer() -> None:
    with pytest.raises(TypeError, match=r"trainer=100 must be the transformers\.Trainer that the callback is added to"):
        SharpnessCallback(100)


# -- Lightning ----------------------------------------------------------------------------------------------


class Module(interop.TokenModule):
    """Logs its loss, for an epoch too."""

    def training_step(self, batch: interop.Batch, batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def _fit(module: Any, callback: LightningSharpness | None = None, epochs: int = 1, **options: Any) -> Any:
    callbacks = [*options.pop("callbacks", []), *([] if callback is None else [callback])]
    trainer = interop.lightning_trainer(callbacks=callbacks, max_epochs=epochs, log_every_n_steps=1, **options)
    trainer.fit(module, interop.batches())
    return trainer


@pytest.mark.parametrize(
    ("hand", "options"),
    [({}, {}), ({"clip": 0.05}, {"gradient_clip_val": 0.05}), ({"bf16": True}, {"precision": "bf16-mixed"})],
    ids=["plain", "clipped", "bf16"],
)
def test_lightning_measures_as_the_loop_by_hand(tmp_path: Path, hand: dict[str, Any], options: dict[str, Any]) -> None:
    module = Module(interop.llama(), "rules")
    callback = LightningSharpness(EVERY, csv=tmp_path / "s.csv")
    _fit(module, callback, logger=CSVLogger(tmp_path), **options)
    rows, _ = by_hand(interop.llama(), **hand)
    _assert_same_rows(callback.logger.rows, rows)
    alone = Module(interop.llama(), "rules")
    _fit(alone, logger=CSVLogger(tmp_path), **options)
    _assert_same_weights(list(module.parameters()), list(alone.parameters()))
    assert read_csv(tmp_path / "s.csv") == callback.logger.rows


def test_lightning_measures_all_batches_of_an_accumulation() -> None:
    module = Module(interop.llama(), "rules")
    callback = LightningSharpness(EVERY)
    _fit(module, callback, accumulate_grad_batches=2)
    rows, _ = by_hand(interop.llama(), accumulate=2)
    _assert_same_rows(callback.logger.rows, rows)


def test_lightning_logs_as_if_not_watched(tmp_path: Path) -> None:
    metrics = []
    for name, callback in (("watched", LightningSharpness(EVERY)), ("alone", None)):
        torch.manual_seed(0)
        trainer = _fit(Module(dropping(), "rules"), callback, logger=CSVLogger(tmp_path, name))
        metrics.append(trainer.callback_metrics)
    watched, alone = metrics
    assert watched == alone
    assert "loss_epoch" in watched
    assert "log" not in vars(trainer.lightning_module)


def test_lightning_sends_scalars_to_its_loggers() -> None:
    class Kept(CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            kept.append((dict(metrics), step))

        def save(self) -> None:
            pass

    kept: list[tuple[dict[str, Any], int | None]] = []
    callback = LightningSharpness(EVERY)
    _fit(Module(interop.llama(), "rules"), callback, logger=Kept("unused"))
    found = [(metrics["sharpness/critical"], step) for metrics, step in kept if "sharpness/critical" in metrics]
    assert found == [(row.sharpness, row.step) for row in callback.logger.rows]
    assert [step for _, step in found] == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning")
def test_lightning_resumes_with_its_rows(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> LightningSharpness:
        module, callback = Module(interop.llama(), "rules"), LightningSharpness(EVERY)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = interop.lightning_trainer(callbacks=[callback, saving], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, interop.batches(), **options)
        return callback

    whole = fit(2)
    resumed = fit(2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row.step for row in whole.logger.rows] == [0, 2, 4, 6, 8, 10]
    assert resumed.logger.rows == whole.logger.rows


class ByBatchAlone(lightning.LightningModule):
    """Its step takes no index and returns a dict; clips gradients in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = interop.llama()
        self.norms: list[float] = []

    def training_step(self, batch: interop.Batch) -> dict[str, Any]:
        return {"loss": interop.loss_of(self.model, batch)}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)))

    def configure_optimizers(self) -> SlimAdam:
        return interop.new_optimizer(self.model, "rules")


def test_lightning_module_with_its_own_clipping() -> None:
    module, callback = ByBatchAlone(), LightningSharpness(EVERY)
    _fit(module, callback)
    rows, weights = by_hand(interop.llama(), clip=0.05)
    _assert_same_rows(callback.logger.rows, rows)
    _assert_same_weights([param.detach() for param in module.parameters()], weights)
    # Clipped for the measurement on a copy, then for the step: the same norm twice.
    assert module.norms[0] == module.norms[1] > 0.05


class Manual(Module):
    """Steps by itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: interop.Batch, batch_index: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = interop.loss_of(self.model, batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())
        return loss


class ByIterator(interop.TokenModule):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "it needs one optimizer and automatic optimization"),
        (ByIterator, "training_step takes the data loader"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter:UserWarning")
def test_lightning_that_is_not_supported_trains_on(module: Any, message: str) -> None:
    built, callback = module(interop.llama(), "rules"), LightningSharpness(EVERY)
    with pytest.warns(UserWarning, match=f"critical sharpness is not measured: {message}"):
        _fit(built, callback)
    assert len(built.losses) == interop.BATCHES
    assert callback.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("transformers", "transformers", "Hugging Face Transformers"), ("lightning", "lightning.pytorch", "Lightning")],
)
def test_without_the_library_the_message_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"slimadam.integrations.{name}")
    with pytest.raises(ImportError, match=rf"needs {extra}: pip install 'slimadam\[{name}\]'$"):
        importlib.import_module(f"slimadam.integrations.{name}")
