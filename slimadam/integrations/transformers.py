"""For the Hugging Face Trainer: its argument ``optimizer_cls_and_kwargs``, and a callback that measures sharpness."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from slimadam.curvature.probe.displacement import Memory
from slimadam.curvature.probe.line import Closure
from slimadam.integrations.step_sharpness import StepSharpness
from slimadam.optim.slimadam import Params, SlimAdam
from slimadam.plans.resolver import PlanArgument

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise ImportError(
        "slimadam.integrations.transformers needs Hugging Face Transformers: pip install 'slimadam[transformers]'"
    ) from error


def optimizer_cls_and_kwargs(
    model: nn.Module, args: TrainingArguments, *, plan: PlanArgument = "auto", **options: Any
) -> tuple[type[SlimAdam], dict[str, Any]]:
    """Return SlimAdam for a Trainer, with the hyperparameters that ``args`` would give its AdamW.

    The Trainer keeps its two parameter groups, with and without weight decay; names and roles come from ``model``.

    Example:
        >>> chosen = optimizer_cls_and_kwargs(model, args, plan="plan.json")  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=chosen)  # doctest: +SKIP

    Args:
        model: The model that the Trainer gets.
        args: The arguments that the Trainer gets: learning rate, betas and eps are taken from them.
        plan: As in :class:`~slimadam.SlimAdam`.
        options: Further options of SlimAdam; ``lr``, ``betas`` and ``eps`` go before those of ``args``.

    Raises:
        ValueError: ``weight_decay`` is among the options; the Trainer sets it for each group. Or the DeepSpeed config
            offloads the optimizer in a way that puts another one in its place.
        TypeError: ``args`` are not TrainingArguments.
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args={args!r} must be transformers.TrainingArguments, the ones that the Trainer gets")
    if "weight_decay" in options:
        decay = options["weight_decay"]
        raise ValueError(
            f"weight_decay={decay!r}: the Trainer sets it for each group; use TrainingArguments(weight_decay={decay!r})"
        )
    _check_offload(args)

    # Bound in a class: the Trainer takes a "model" among the keywords for the parameters themselves, which loses
    # its groups, and takes whatever is not a class for a factory.
    class SlimAdamOfModel(SlimAdam):
        def __init__(self, params: Params, **kwargs: Any) -> None:
            super().__init__(params, model=model, **kwargs)

    from_args = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return SlimAdamOfModel, {**from_args, "plan": plan, **options}


def _check_offload(args: TrainingArguments) -> None:
    """Check that Accelerate, at its ``prepare``, does not exchange the optimizer for DeepSpeed's own."""
    plugin = getattr(args, "deepspeed_plugin", None)
    config: Any = {} if plugin is None else plugin.deepspeed_config
    if plugin is None and args.deepspeed:
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(args.deepspeed).config
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"the DeepSpeed config offloads the optimizer (device {device!r}): Accelerate then silently trains with "
            "DeepSpeedCPUAdam, whose weight decay is not decoupled, in place of SlimAdam; set "
            '"zero_force_ds_cpu_optimizer": false in that config, and plan=None, which is what ZeRO can run'
        )


class SharpnessCallback(StepSharpness, TrainerCallback):  # type: ignore[misc]
    """Measures critical sharpness every ``every`` steps of a Trainer, and logs it as the Trainer logs.

    The loss is the one that the step is taken on: ``compute_loss`` of the Trainer, again with the same inputs,
    dropout masks and autocast, over all batches of a gradient accumulation; the gradient is the clipped one. What
    else ``compute_loss`` does, it does at each of the 5 or so evaluations too. Scalars ``sharpness/critical`` and so
    on go to ``trainer.log``, and so to ``state.log_history`` and wherever ``report_to`` says.

    Not measured, with one warning: under DeepSpeed, with fp16 and ``max_grad_norm=0`` (gradients are still scaled
    then), and where ``training_step`` does not call ``compute_loss``.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data)  # doctest: +SKIP
        >>> trainer.add_callback(SharpnessCallback(trainer, every=100))  # doctest: +SKIP

    Args:
        trainer: The Trainer, which the callback is then added to.
        every: Measure before steps 0, ``every``, ``2 every``, ...
        csv: A file that each row is added to, see :class:`~slimadam.SharpnessLogger`.
        tasks: Losses of other tasks to measure along the same update, by name.
        tol: See :class:`~slimadam.CriticalSharpness`.
        memory: See :class:`~slimadam.CriticalSharpness`.

    Attributes:
        logger: From the beginning of training on, the :class:`~slimadam.SharpnessLogger` with all rows.

    Raises:
        TypeError: ``trainer`` is no Trainer.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 100,
        *,
        csv: str | Path | None = None,
        tasks: Mapping[str, Closure] | None = None,
        tol: float = 1 / 16,
        memory: Memory = "copy",
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer={trainer!r} must be the transformers.Trainer that the callback is added to")
        super().__init__(every, csv=csv, tasks=tasks, tol=tol, memory=memory)
        self._trainer = trainer
        self._recording = ExitStack()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Set up the logger: the Trainer has its optimizer now."""
        if self._supports(_unsupported(self._trainer)):
            self._begin(self._trainer.optimizer, self._log)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to record the batches of a step in which a measurement is due."""
        self._recording.close()
        self._losses = []
        if self._unsupported is None:
            self.logger.steps = self._trainer.state.global_step
            if self.logger.is_due:
                recorded = partial(self._recorded_loss, self._trainer.compute_loss)
                self._recording.enter_context(patch.object(self._trainer, "compute_loss", recorded))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Measure, between clipping and the step."""
        if self._unsupported is not None or not self.logger.is_due:
            return
        self._recording.close()
        if self._losses:
            self._measure()
        else:
            self._supports("training_step of this Trainer does not call compute_loss")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the Trainer as it was."""
        self._recording.close()

    def _recorded_loss(self, compute_loss: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            # compute_loss may take labels out of the inputs.
            self._record(partial(self._loss, model, dict(inputs), *args, **kwargs), model)
        return compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        trainer = self._trainer
        with trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(model, dict(inputs), *args, **kwargs)
        loss = (loss[0] if isinstance(loss, tuple) else loss).mean()
        is_share = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        )
        return loss if is_share else loss / trainer.args.gradient_accumulation_steps  # type: ignore[no-any-return]

    def _log(self, scalars: dict[str, float], step: int) -> None:
        self._trainer.log(dict(scalars))


def _unsupported(trainer: Trainer) -> str | None:
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "under DeepSpeed the optimizer's update is not at hand"
    if getattr(trainer.accelerator, "scaler", None) is not None and not trainer.args.max_grad_norm:
        return "with fp16 and max_grad_norm=0 gradients are still scaled before the step; set max_grad_norm"
    return None
