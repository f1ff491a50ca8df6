"""SlimAdam inside other people's training loops: ``python -m benchmarks.interop``.

Each integration trains the same small random Llama and GPT-2 on the same tokens as a loop written by hand. Bars:
every second moment has the shape that the plan says, and no loss or weight differs from the loop's by more than 1e-6.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported; nothing here is downloaded

import contextlib
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import lightning
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.harness import machine
from slimadam import CompressionPlan, SlimAdam
from slimadam.integrations.transformers import optimizer_cls_and_kwargs
from slimadam.plans.resolver import PlanArgument
from slimadam.state.second_moment import state_shapes

Batch = dict[str, Tensor]

VOCABULARY, LENGTH, BATCH_SIZE, BATCHES = 61, 12, 4, 6
LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.8, 0.95), 1e-6, 0.1
BAR = 1e-6


def llama() -> nn.Module:
    """Return a Llama of 2 layers and width 16, the same at each call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))
    return model


def gpt2() -> nn.Module:
    """Return a GPT-2 of 2 layers, width 16, without dropout: transposed Conv1D weights, fused QKV, tied embeddings."""
    torch.manual_seed(0)
    sizes = {"n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **no_dropout))
    model.loss_type = "ForCausalLM"  # not told by this class's name, and without it the Trainer miscounts the tokens
    return model  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama": llama, "GPT-2": gpt2}


class Tokens(Dataset[Batch]):
    """Random token sequences for a causal language model, the same ones always."""

    def __init__(self, count: int = BATCH_SIZE * BATCHES) -> None:
        self._tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def batches() -> DataLoader[Batch]:
    """Yield all sequences in order."""
    return DataLoader(Tokens(), batch_size=BATCH_SIZE)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss, summed and divided in the order in which the Trainer does it.

    Args:
        model: Language model.
        batch: Tokens and labels.
    """
    loss: Tensor = model(**batch, num_items_in_batch=batch["labels"][:, 1:].numel()).loss
    return loss


def new_optimizer(model: nn.Module, plan: PlanArgument) -> SlimAdam:
    """Return SlimAdam over named parameters, with the usual two groups: weight decay for matrices alone.

    Args:
        model: Model whose parameters are trained.
        plan: Plan of the optimizer.
    """
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, param) for name, param in named if param.dim() > 1]},
        {"params": [(name, param) for name, param in named if param.dim() <= 1], "weight_decay": 0.0},
    ]
    return SlimAdam(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, plan=plan)


@dataclass
class Run:
    """A finished run: the loss of each batch, the weights, the optimizer."""

    model: nn.Module
    optimizer: SlimAdam
    losses: list[float]


Integration = Callable[[nn.Module, PlanArgument], Run]


def by_hand(model: nn.Module, plan: PlanArgument, *, bf16: bool = False, accumulate: int = 1) -> Run:
    """Train with the loop that every integration is compared with.

    Args:
        model: Language model.
        plan: Plan of the optimizer.
        bf16: Run the forward pass under bfloat16 autocast.
        accumulate: Batches whose gradients a step sums.
    """
    optimizer = new_optimizer(model, plan)
    losses = []
    for number, batch in enumerate(batches(), start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batch)
        losses.append(loss.item())
        torch.autograd.backward(loss / accumulate)
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return Run(model, optimizer, losses)


def trainer_arguments(folder: str, **options: Any) -> TrainingArguments:
    """Return arguments of a silent Trainer on the CPU with this module's hyperparameters."""
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": BATCHES,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def new_trainer(model: nn.Module, args: TrainingArguments, **options: Any) -> Trainer:
    """Return a Trainer on the tokens that prints nothing.

    Args:
        model: Language model.
        args: The Trainer's arguments.
        **options: Further arguments of :class:`transformers.Trainer`.
    """
    trainer = Trainer(model, args, train_dataset=Tokens(), **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_with_helper(model: nn.Module, plan: PlanArgument, **options: Any) -> Run:
    """Train with ``Trainer(optimizer_cls_and_kwargs=...)``.

    Args:
        model: Language model.
        plan: Plan of the optimizer.
        **options: Arguments of :func:`trainer_arguments`.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_arguments(folder, **options)
        chosen = optimizer_cls_and_kwargs(model, args, plan=plan)
        return _trained(new_trainer(model, args, optimizer_cls_and_kwargs=chosen))


def _trainer_with_optimizer(model: nn.Module, plan: PlanArgument) -> Run:
    """Train with ``Trainer(optimizers=(SlimAdam(...), None))``."""
    with tempfile.TemporaryDirectory() as folder:
        return _trained(new_trainer(model, trainer_arguments(folder), optimizers=(new_optimizer(model, plan), None)))


def _trainer_compiled(model: nn.Module, plan: PlanArgument) -> Run:
    """Train with the Trainer and torch.compile."""
    return trainer_with_helper(model, plan, torch_compile=True, torch_compile_backend="eager")


def _trained(trainer: Trainer) -> Run:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(trainer.model, trainer.optimizer.optimizer, losses)


def _accelerate(model: nn.Module, plan: PlanArgument, *, bf16: bool = False, accumulate: int = 1) -> Run:
    """Train with the loop that Accelerate's documentation recommends."""
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=accumulate
    )
    optimizer = new_optimizer(model, plan)
    prepared, wrapped, loader = accelerator.prepare(model, optimizer, batches())
    losses = []
    for batch in loader:
        with accelerator.accumulate(prepared):
            loss = loss_of(prepared, batch)
            losses.append(loss.item())
            accelerator.backward(loss)
            wrapped.step()
            wrapped.zero_grad()
    return Run(model, optimizer, losses)


class TokenModule(lightning.LightningModule):
    """A language model with SlimAdam from ``configure_optimizers``, as anyone would write it."""

    def __init__(self, model: nn.Module, plan: PlanArgument) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self._plan = plan

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            batch: Tokens and labels.
            batch_index: Number of the batch, unused.
        """
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> SlimAdam:
        """Return an optimizer of names without this module's prefix, as in a plan made for the inner model."""
        return new_optimizer(self.model, self._plan)


def lightning_trainer(**options: Any) -> lightning.Trainer:
    """Return a silent Lightning Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**defaults, **options})


def _with_lightning(model: nn.Module, plan: PlanArgument) -> Run:
    """Train with Lightning, which is given ``configure_optimizers`` alone."""
    module = TokenModule(model, plan)
    trainer = lightning_trainer()
    trainer.fit(module, batches())
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, SlimAdam)
    return Run(model, optimizer, module.losses)


def _compiled(model: nn.Module, plan: PlanArgument) -> Run:
    """Train with torch.compile around the model, whose names then begin with ``_orig_mod.``."""
    wrapped: Any = torch.compile(model, backend="eager")
    return Run(model, (run := by_hand(wrapped, plan)).optimizer, run.losses)


def _distributed_data_parallel(model: nn.Module, plan: PlanArgument) -> Run:
    """Train with DistributedDataParallel in a group of one process; names begin with ``module.``."""
    with one_process_group():
        run = by_hand(DistributedDataParallel(model), plan)
    return Run(model, run.optimizer, run.losses)


@contextlib.contextmanager
def accelerate_settings_restored() -> Iterator[None]:
    """Restore precision and compilation, which Accelerate and the Trainer keep in globals and the environment."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


_ended_group: deque[Any] = deque(maxlen=1)


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """Enter a gloo group of this process alone.

    It outlives what it ran, until the next group begins: where DistributedDataParallel's reducer holds a group last, it
    ends it with the interpreter's lock in hand, and waits for ever for a gloo thread that wants the lock.
    """
    store = distributed.HashStore()  # type: ignore[attr-defined]  # torch does not list it as exported
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        _ended_group.append(distributed.group.WORLD)
        distributed.destroy_process_group()


INTEGRATIONS: dict[str, tuple[Integration, dict[str, Any]]] = {
    "Trainer, helper": (trainer_with_helper, {}),
    "Trainer, optimizers=": (_trainer_with_optimizer, {}),
    "Trainer, torch.compile": (_trainer_compiled, {}),
    "Accelerate": (_accelerate, {}),
    "Accelerate, bf16, accumulation": (_accelerate, {"bf16": True, "accumulate": 2}),
    "Lightning": (_with_lightning, {}),
    "torch.compile": (_compiled, {}),
    "DistributedDataParallel": (_distributed_data_parallel, {}),
}


@dataclass(frozen=True)
class Outcome:
    """Comparison of an integration's run with the loop by hand.

    Attributes:
        matched: Parameters whose second moment has the shape that the plan says.
        parameters: All parameters.
        saved: Share of second moments saved, by the sizes of the state.
        difference: Largest difference of a loss or a weight to the loop by hand.
    """

    matched: int
    parameters: int
    saved: float
    difference: float


def second_moments(run: Run) -> dict[str, list[tuple[int, ...]]]:
    """Return shapes of the second moments in the state, by the model's own parameter names."""
    states = {name: run.optimizer.state[param] for name, param in run.model.named_parameters()}
    return {
        name: [tuple(value.shape) for key, value in state.items() if key.startswith("exp_avg_sq")]
        for name, state in states.items()
    }


def largest_difference(run: Run, reference: Run) -> float:
    """Return the largest difference between two runs' losses and weights.

    Args:
        run: One run.
        reference: The other run.
    """
    losses = [abs(ours - theirs) for ours, theirs in zip(run.losses, reference.losses, strict=True)]
    pairs = zip(run.model.parameters(), reference.model.parameters(), strict=True)
    return max(*losses, *((ours - theirs).abs().max().item() for ours, theirs in pairs))


def check(label: str, new_model: Callable[[], nn.Module]) -> Outcome:
    """Train with an integration under the paper's rules and compare with the loop by hand.

    Args:
        label: A key of :data:`INTEGRATIONS`.
        new_model: Builds the model.
    """
    integration, options = INTEGRATIONS[label]
    plan = CompressionPlan.from_rules(new_model())
    with accelerate_settings_restored():
        run = integration(new_model(), plan, **options)
    shapes = second_moments(run)
    full = sum(param.numel() for param in run.model.parameters())
    kept = sum(torch.Size(part).numel() for parts in shapes.values() for part in parts)
    return Outcome(
        matched=sum(
            tuple(shapes[name]) == state_shapes(rules, rules[0].owner_shape or ())
            for name, rules in plan.by_parameter().items()
        ),
        parameters=len(shapes),
        saved=1 - kept / full,
        difference=largest_difference(run, by_hand(new_model(), plan, **options)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every integration on every model, print a table, write ``results/interop.json``; exit 1 below a bar."""
    out = machine.results_folder(__doc__, arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    outcomes = {(label, model): check(label, make) for model, make in MODELS.items() for label in INTEGRATIONS}
    print(f"{'integration':32s} {'model':6s} {'names matched':>13s} {'saved':>7s} {'largest difference':>19s}")
    for (label, model), outcome in outcomes.items():
        matched = f"{outcome.matched} of {outcome.parameters}"
        print(f"{label:32s} {model:6s} {matched:>13s} {outcome.saved:7.1%} {outcome.difference:19.1e}")
    figures = [
        {"integration": label, "model": model, **asdict(outcome)} for (label, model), outcome in outcomes.items()
    ]
    versions = {name: metadata.version(name) for name in ("transformers", "accelerate", "lightning")}
    print("written:", machine.write("interop", {"bar": BAR, "libraries": versions, "runs": figures}, out))
    if any(outcome.difference > BAR or outcome.matched < outcome.parameters for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
