"""Hugging Face Trainer: what its ``optimizer_cls_and_kwargs`` takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimadam.optimizer import Params, SlimAdam
from slimadam.planning import PlanArgument

try:
    from transformers import TrainingArguments
except ImportError as error:
    raise ImportError(
        "slimadam.integrations.transformers needs Hugging Face Transformers: pip install 'slimadam[transformers]'"
    ) from error


def optimizer_cls_and_kwargs(
    model: nn.Module, args: TrainingArguments, *, plan: PlanArgument = "auto", **options: Any
) -> tuple[type[SlimAdam], dict[str, Any]]:
    """SlimAdam for a Trainer, with the hyperparameters that ``args`` would give its AdamW.

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
        ValueError: ``weight_decay`` is among the options; the Trainer sets it for each group.
        TypeError: ``args`` are not TrainingArguments.
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args={args!r} must be transformers.TrainingArguments, the ones that the Trainer gets")
    if "weight_decay" in options:
        decay = options["weight_decay"]
        raise ValueError(
            f"weight_decay={decay!r}: the Trainer sets it for each group; use TrainingArguments(weight_decay={decay!r})"
        )

    # Bound in a class: the Trainer takes a "model" among the keywords for the parameters themselves, which loses
    # its groups, and takes whatever is not a class for a factory.
    class SlimAdamOfModel(SlimAdam):
        def __init__(self, params: Params, **kwargs: Any) -> None:
            super().__init__(params, model=model, **kwargs)

    from_args = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return SlimAdamOfModel, {**from_args, "plan": plan, **options}
