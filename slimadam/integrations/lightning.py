"""A Lightning callback that measures sharpness. The optimizer itself needs none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from slimadam.integrations.step_sharpness import StepSharpness

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError as error:
    raise ImportError("slimadam.integrations.lightning needs Lightning: pip install 'slimadam[lightning]'") from error


class SharpnessCallback(StepSharpness, Callback):
    """Measures critical sharpness every ``every`` steps of a Lightning Trainer, and logs it to its loggers.

    The loss is the one that the step is taken on: ``training_step`` again with the same batch, dropout masks and
    precision, over all batches of a gradient accumulation; the gradient is clipped as it will be for the step. In
    these evaluations ``self.log`` and ``self.log_dict`` do nothing; whatever else ``training_step`` does, it does
    again. Scalars ``sharpness/critical`` and so on go to every logger of the Trainer. Rows are kept in checkpoints.

    Not measured, with one warning: under DeepSpeed, with several optimizers or manual optimization, and where
    ``training_step`` takes the data loader's iterator.

    Example:
        >>> Trainer(callbacks=[SharpnessCallback(every=100)])  # doctest: +SKIP

    Args:
        every: Measure before steps 0, ``every``, ``2 every``, ...
        csv: A file that each row is added to, see :class:`~slimadam.SharpnessLogger`.
        tasks: Losses of other tasks to measure along the same update, by name.
        tol: See :class:`~slimadam.CriticalSharpness`.
        memory: See :class:`~slimadam.CriticalSharpness`.

    Attributes:
        logger: From the beginning of training on, the :class:`~slimadam.SharpnessLogger` with all rows.
    """

    _loaded: dict[str, Any] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._supports(_unsupported(trainer, pl_module)):
            self._begin(trainer.optimizers[0], partial(_log, trainer))
            if self._loaded:
                self.logger.load_state_dict(self._loaded)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._unsupported is None:
            self.logger.steps = trainer.global_step
            if self.logger.is_due:
                arguments = (batch, batch_idx) if _takes_index(pl_module) else (batch,)
                self._record(partial(_loss, trainer, arguments), pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._losses:
            silent = patch.multiple(pl_module, log=_ignore, log_dict=_ignore)
            with _clipped(trainer, pl_module, optimizer), silent:
                self._measure()

    def state_dict(self) -> dict[str, Any]:
        """Return the logger's state, for checkpoints."""
        return self.logger.state_dict() if self._unsupported is None else self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        self._loaded = state_dict


def _unsupported(trainer: Trainer, module: LightningModule) -> str | None:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return "under DeepSpeed the optimizer's update is not at hand"
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        return "it needs one optimizer and automatic optimization; call SharpnessLogger.step in training_step instead"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        return "training_step takes the data loader's iterator, and its batch cannot be had a second time"
    return None


def _takes_index(module: LightningModule) -> bool:
    parameters = inspect.signature(module.training_step).parameters.values()
    return len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _loss(trainer: Trainer, arguments: tuple[Any, ...]) -> Tensor:
    output: Any = trainer.strategy.training_step(*arguments)
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return loss / trainer.accumulate_grad_batches


@contextmanager
def _clipped(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> Iterator[None]:
    """Clip the gradients within the block; Lightning clips the real ones after its callbacks."""
    is_own = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    if not trainer.gradient_clip_val and not is_own:
        yield
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None if param.grad is None else param.grad.clone()
        module.configure_gradient_clipping(
            optimizer,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        )
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing: the losses are those of other parameters."""


def _log(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)
