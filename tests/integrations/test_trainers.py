"""What trainers do beyond the loop: groups they assign, their checkpoints, their settings as text, vectors of ZeRO."""

from __future__ import annotations

import copy
import gc
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam
from tests.distributed.test_ddp import LR, TOLERANCE, Network, batches, network, shares, train
from tests.ranks import on_ranks

SAVED, STEPS = 3, 6
MOMENTA = (None, torch.bfloat16, "int8")
MEAN = CompressionPlan({"up.weight": Rule((0,), "mean"), "down.weight": Rule((1,), "mean")})
PARTS = {
    "attention.in_proj_weight[query]": ((1,), "mean"),
    "attention.in_proj_weight[key]": ((0,), "mean"),
    "attention.in_proj_weight[value]": ((), "factored"),
    "down.weight": ((), "factored"),
}
PLANS: dict[str, Any] = {
    "None": None,
    "rules": "rules",
    "factored": "factored",
    "mean": MEAN,
    "auto, measuring": AutoPlan(calibration_steps=100),
    "auto, decides": AutoPlan(calibration_steps=5, cutoff=0.01),
    "auto, decided": AutoPlan(calibration_steps=2, cutoff=0.01),
}


@pytest.fixture(params=[*PLANS, "parts"])
def plan(request: pytest.FixtureRequest) -> Any:
    return parts() if request.param == "parts" else PLANS[request.param]


@pytest.fixture(params=MOMENTA, ids=str)
def momentum(request: pytest.FixtureRequest) -> Any:
    return request.param


def parts() -> CompressionPlan:
    """A rule of its own for the query, the key and the value of one weight."""
    by_role = SlimAdam(network(), plan="rules").plan
    return CompressionPlan({key: replace(by_role[key], dims=dims, form=form) for key, (dims, form) in PARTS.items()})


def moved(model: nn.Module) -> nn.Module:
    """The model with other weights, so that only a checkpoint can bring the first ones back."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5)
    return model


def assert_same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def tensors_of(optimizer: SlimAdam) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(optimizer.state_dict()["state"]) if isinstance(leaf, Tensor)]


# -- Lightning assigns the groups of a checkpoint -----------------------------------------------------------


EPOCHS, THAWED = 5, 2


def _fit(optimizer_of: Any, folder: Path, checkpoint: Path | None = None) -> Any:
    """A head that is trained from the beginning on a backbone that is not, up to the last epoch."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

    class Thawing(BackboneFinetuning):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch > self.unfreeze_backbone_at_epoch:  # Lightning leaves it frozen when it resumes
                self.make_trainable(module.backbone)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = nn.Linear(8, 16), nn.Linear(16, 1)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.head(torch.tanh(self.backbone(batch[0]))) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return optimizer_of(self, [param for param in self.parameters() if param.requires_grad])

    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    thawing = Thawing(THAWED, lambda epoch: 1.5, backbone_initial_lr=1e-3, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        callbacks=[thawing, saving],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = moved(Module()) if checkpoint else Module()
    trainer.fit(
        module, DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8), ckpt_path=checkpoint
    )
    return SimpleNamespace(weights=list(module.parameters()), optimizer=trainer.optimizers[0])


LIGHTNING_PLANS: dict[str, Any] = {
    "None": None,
    "auto, decided": AutoPlan(calibration_steps=5, cutoff=0.01),
    "auto, decides": AutoPlan(calibration_steps=11, cutoff=0.01),
    "factored": "factored",
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("has_names", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("name", LIGHTNING_PLANS)
def test_lightning_finetuning_resumes_where_it_was(tmp_path: Path, name: str, has_names: bool) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def slim(module: nn.Module, params: list[nn.Parameter]) -> SlimAdam:
        return SlimAdam(params, lr=1e-2, plan=LIGHTNING_PLANS[name], model=module if has_names else None)

    whole = _fit(slim, tmp_path / "whole")
    for epoch in (0, THAWED - 1, THAWED, EPOCHS - 2):
        resumed = _fit(slim, tmp_path / str(epoch), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(resumed.weights, whole.weights)
        assert_same(tensors_of(resumed.optimizer), tensors_of(whole.optimizer))
        assert dict(resumed.optimizer.plan) == dict(whole.optimizer.plan)
    assert ("backbone.weight" in whole.optimizer.plan) == has_names


def test_groups_assigned_with_the_models_parameters_have_its_names() -> None:
    model = network()
    optimizer = SlimAdam(model.up.parameters(), plan="rules", model=model)
    optimizer.param_groups[0]["params"] = [*model.down.parameters()]  # as many, but not in place of the others
    assert list(optimizer.plan) == ["down.weight", "down.bias"]
    optimizer.param_groups = [{"params": [*model.up.parameters()]}, {"params": [*model.attention.parameters()]}]
    assert {key.partition("[")[0] for key in optimizer.plan} == {
        "up.weight", "up.bias", "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip


# -- torchtitan saves one flat dict of several optimizers ----------------------------------------------------


class Container:
    """As torchtitan's OptimizersContainer: an optimizer for each stage of a pipeline, fused by default."""

    def __init__(self, model: Network, plans: list[Any], **options: Any) -> None:
        self.stages = [
            nn.ModuleDict({"attention": model.attention, "up": model.up}),
            nn.ModuleDict({"down": model.down}),
        ]
        self.optimizers = [
            SlimAdam(stage.parameters(), lr=LR, plan=plan, model=model, fused=True, foreach=False, **options)
            for stage, plan in zip(self.stages, plans, strict=True)
        ]

    _options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        for stage, optimizer in zip(self.stages, self.optimizers, strict=True):
            saved |= get_optimizer_state_dict(stage, optimizer, options=self._options)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for stage, optimizer in zip(self.stages, self.optimizers, strict=True):
            set_optimizer_state_dict(stage, optimizer, state_dict, options=self._options)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to (save|load) in a single process:UserWarning")
@pytest.mark.parametrize("name", [*(name for name in PLANS if name != "auto, decides"), "parts"])
def test_torchtitans_checkpoints_resume_where_they_were(tmp_path: Path, name: str, momentum: Any) -> None:
    plan = PLANS.get(name) or (parts() if name == "parts" else None)
    model = network()
    whole = Container(model, [plan, plan], momentum_dtype=momentum)
    train(model, whole, batches(0, SAVED))
    dcp.save({"model": model.state_dict(), "optimizer": whole.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    beside = [plan, plan]
    if name == "auto, decided":  # DCP keeps nothing of what was measured, and no plan
        beside = [tmp_path / f"plan{index}.json" for index in range(2)]
        for optimizer, file in zip(whole.optimizers, beside, strict=True):
            optimizer.plan.save(file)
    train(model, whole, batches(SAVED, STEPS))

    fresh = moved(network())
    resumed = Container(fresh, beside, momentum_dtype=momentum)  # type: ignore[arg-type]
    saved = {"model": fresh.state_dict(), "optimizer": resumed.state_dict()}
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, batches(SAVED, STEPS))
    assert_same(fresh.parameters(), model.parameters())
    for ours, theirs in zip(resumed.optimizers, whole.optimizers, strict=True):
        assert_same(tensors_of(ours), tensors_of(theirs))


# -- Accelerate ----------------------------------------------------------------------------------------------


@pytest.fixture
def _accelerate() -> Iterator[None]:
    state = pytest.importorskip("accelerate.state")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate")
def test_accelerate_resumes_where_it_was(tmp_path: Path, plan: Any, momentum: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def prepared(model: nn.Module) -> Any:
        named = [*model.named_parameters()]
        groups: list[dict[str, Any]] = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.0}]
        return accelerator.prepare(model, SlimAdam(groups, lr=LR, plan=plan, momentum_dtype=momentum))

    model, optimizer = prepared(network())
    train(model, optimizer, batches(0, SAVED))
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, batches(SAVED, STEPS))
    accelerator.free_memory()
    resumed, again = prepared(moved(network()))
    accelerator.load_state(str(tmp_path))
    train(resumed, again, batches(SAVED, STEPS))
    assert_same(resumed.parameters(), model.parameters())
    assert_same(tensors_of(again.optimizer), tensors_of(optimizer.optimizer))


FSDP2_CASES: dict[str, tuple[Any, Any]] = {
    "None": (None, None),
    "rules": ("rules", None),
    "factored, bfloat16": ("factored", torch.bfloat16),
    "mean": (MEAN, None),
    "auto": (AutoPlan(calibration_steps=2, cutoff=0.01), None),
}


def _accelerate_fsdp2(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50, cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs Accelerate takes every job for plain data parallelism.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def losses(model: nn.Module, optimizer: Any, first: int, end: int) -> list[float]:
        found = []
        for batch in shares(batches(first, end)):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            found.append(accelerator.reduce(loss.detach(), "mean").item())
        return found

    gc.freeze()  # Accelerate collects garbage often, and imports have made a lot to look through
    found = {}
    for name, (plan, momentum) in FSDP2_CASES.items():
        alone = network()
        slim = SlimAdam(alone, lr=LR, plan=plan, momentum_dtype=momentum)
        expected = []
        for batch in batches(0, STEPS):
            expected.append(alone(batch).square().mean().item())
            train(alone, slim, [batch])
        model = network()
        optimizer = SlimAdam(model, lr=LR, plan=plan, momentum_dtype=momentum)
        unsharded = [weakref.ref(param) for param in model.parameters()]
        model, prepared = accelerator.prepare(model, optimizer)
        gc.collect()
        kept = sum(ref() is not None for ref in unsharded)
        seen = losses(model, prepared, 0, SAVED)
        accelerator.save_state(str(folder / name))
        decided = optimizer.plan if isinstance(plan, AutoPlan) else plan
        seen += losses(model, prepared, SAVED, STEPS)
        whole = [param.full_tensor() for param in model.parameters()]
        accelerator.free_memory()
        again = moved(network())
        resumed = SlimAdam(again, lr=LR, plan=decided, momentum_dtype=momentum)
        again, prepared = accelerator.prepare(again, resumed)
        accelerator.load_state(str(folder / name))
        resumed_losses = losses(again, prepared, SAVED, STEPS)
        accelerator.free_memory()
        found[name] = {
            "kept": kept,
            "losses": max(abs(a - b) for a, b in zip(seen, expected, strict=True)),
            "weights": max(float((a - b).abs().max()) for a, b in zip(whole, alone.parameters(), strict=True)),
            "resumed": resumed_losses == seen[SAVED:]
            and all(torch.equal(a.full_tensor(), b) for a, b in zip(again.parameters(), whole, strict=True)),
            "sharded": all(hasattr(param, "placements") for param in resumed.state),
            "plan": {key: (rule.form, rule.dims) for key, rule in optimizer.plan.items()}
            == {key: (rule.form, rule.dims) for key, rule in slim.plan.items()},
        }
    return found


def test_accelerate_with_fsdp2_trains_as_one_process_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for of_rank in on_ranks(2, tmp_path, _accelerate_fsdp2, tmp_path):
        assert list(of_rank) == list(FSDP2_CASES)
        for name, found in of_rank.items():
            assert found["losses"] <= TOLERANCE, name
            assert found["weights"] <= TOLERANCE, name
            assert (found["resumed"], found["sharded"], found["plan"]) == (True, True, True), name
            assert found["kept"] == 0, name  # Accelerate frees the unsharded model as it shards


# -- Accelerate puts another optimizer in place under DeepSpeed's offload -------------------------------------


OFFLOAD: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
DEEPSPEED_KEEPS: dict[str, dict[str, Any]] = {
    "told to keep it": {**OFFLOAD, "zero_force_ds_cpu_optimizer": False},
    "no offload": {"zero_optimization": {"stage": 2}},
    "offload to none": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
    "parameters alone": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    "no ZeRO": {"train_batch_size": "auto"},
}


def _arguments(folder: Path, how: str, config: dict[str, Any]) -> Any:
    """TrainingArguments as they are with DeepSpeed, which need not be installed."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    if how == "plugin":  # from args.deepspeed, or `accelerate launch`
        args.deepspeed_plugin = SimpleNamespace(deepspeed_config=copy.deepcopy(config))
    elif how == "dict":
        args.deepspeed = config
    else:
        import json

        args.deepspeed = str(folder / "deepspeed.json")
        Path(args.deepspeed).write_text(json.dumps(config))
    return args


@pytest.mark.parametrize("how", ["plugin", "dict", "path"])
@pytest.mark.usefixtures("_accelerate")
def test_the_helper_refuses_an_offload_that_would_exchange_the_optimizer(tmp_path: Path, how: str) -> None:
    args = _arguments(tmp_path, how, OFFLOAD)
    from slimadam.integrations.transformers import optimizer_cls_and_kwargs

    with pytest.raises(ValueError, match=r'DeepSpeedCPUAdam.*set "zero_force_ds_cpu_optimizer": false in that config'):
        optimizer_cls_and_kwargs(network(), args, plan=None)
    to_disk = copy.deepcopy(OFFLOAD)
    to_disk["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    with pytest.raises(ValueError, match="device 'nvme'"):
        optimizer_cls_and_kwargs(network(), _arguments(tmp_path, how, to_disk))
    for config in DEEPSPEED_KEEPS.values():
        chosen, options = optimizer_cls_and_kwargs(network(), _arguments(tmp_path, how, config), plan=None)
        assert issubclass(chosen, SlimAdam)
        assert options["plan"] is None


# -- settings as YAML and Hydra hand them over ---------------------------------------------------------------


class _Sequence(MutableSequence[Any]):
    """What stands for OmegaConf's ListConfig where that is not installed: neither a list nor a tuple."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = list(items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._items[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def insert(self, index: int, value: Any) -> None:
        self._items.insert(index, value)


def _list_config(items: list[Any]) -> Any:
    try:
        from omegaconf import OmegaConf
    except ImportError:
        return _Sequence(items)
    return OmegaConf.create(items)


AS_TEXT: dict[str, tuple[str, Any, Any]] = {
    "lr": ("lr", "1e-3", 1e-3),
    "eps": ("eps", "1e-8", 1e-8),
    "weight_decay": ("weight_decay", "0.1", 0.1),
    "betas": ("betas", _list_config([0.8, 0.95]), (0.8, 0.95)),
    "betas of text": ("betas", _list_config(["0.8", "95e-2"]), (0.8, 0.95)),
    "list of betas": ("betas", [0.8, 0.95], (0.8, 0.95)),
    "tuple of text": ("betas", ("0.8", "0.95"), (0.8, 0.95)),
    "bfloat16": ("momentum_dtype", "bfloat16", torch.bfloat16),
    "torch.bfloat16": ("momentum_dtype", "torch.bfloat16", torch.bfloat16),
    "float32": ("momentum_dtype", "float32", torch.float32),
    "int8": ("momentum_dtype", "int8", "int8"),
    "no dtype": ("momentum_dtype", "none", None),
    "no plan": ("plan", "none", None),
}


@pytest.mark.parametrize("as_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize("case", AS_TEXT)
def test_text_means_what_the_typed_option_means(case: str, as_group: bool) -> None:
    option, text, typed = AS_TEXT[case]
    trained = []
    for value in (text, typed):
        model = network()
        if as_group:
            optimizer = SlimAdam([{"params": model.named_parameters(), option: value}], lr=LR, plan="factored")
        else:
            optimizer = SlimAdam(model, **{"lr": LR, "plan": "factored", option: value})
        train(model, optimizer, batches(0, 2))
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        trained.append((groups, optimizer.defaults if not as_group else None, dict(optimizer.plan), model, optimizer))
    assert trained[0][:3] == trained[1][:3]
    assert type(trained[0][0][0]["betas"]) is tuple
    assert_same(trained[0][3].parameters(), trained[1][3].parameters())
    assert_same(tensors_of(trained[0][4]), tensors_of(trained[1][4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr='fast' must be a number"),
        ({"lr": "-1e-3"}, "Invalid learning rate: -0.001"),
        ({"lr": "nan"}, "Invalid learning rate: nan"),
        ({"eps": "tiny"}, "Invalid epsilon value: tiny"),
        ({"weight_decay": "some"}, "weight_decay='some' must be a number"),
        ({"betas": _list_config(["0.9", "high"])}, r"betas\[1\]='high' must be a number"),
        ({"betas": _list_config([0.9])}, r"betas=\(0.9,\) must be a pair"),
        ({"betas": "0.9, 0.95"}, "betas='0.9, 0.95' must be a pair"),
        (
            {"momentum_dtype": "float16"},
            "momentum_dtype='float16' must be None, torch.float32, torch.bfloat16 or 'int8'",
        ),
        ({"plan": "nothing"}, "plan='nothing' is neither a file nor one of"),
    ],
)
def test_text_that_means_nothing_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, PlanError), match=message):
        SlimAdam(network(), **options)
    if "plan" not in options:
        with pytest.raises((TypeError, ValueError), match=message):
            SlimAdam([{"params": network().parameters(), **options}])


# -- ZeRO puts one vector in the place of a group's parameters ------------------------------------------------


@pytest.mark.parametrize("size", [24, 12, 32], ids=["all", "a partition", "padded"])
@pytest.mark.parametrize("stepped", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize(
    "plan",
    ["factored", CompressionPlan({"weight": Rule((0,), "mean")}), AutoPlan(calibration_steps=9)],
    ids=["factored", "mean", "auto"],
)
def test_a_vector_in_the_place_of_a_groups_one_parameter_is_refused(plan: Any, stepped: bool, size: int) -> None:
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = SlimAdam([("weight", param)], plan=plan)
    if stepped:
        param.grad = torch.ones_like(param)
        optimizer.step()
    flat = nn.Parameter(torch.zeros(size))
    flat.grad = torch.ones(size)
    optimizer.param_groups[0]["params"] = [flat]
    for act in (optimizer.step, optimizer.state_dict, optimizer.memory):
        with pytest.raises(
            RuntimeError, match=r"'weight': a parameter of shape .* the work of a library such as DeepSpeed"
        ):
            act()
    assert not flat.any()
    assert "SlimAdam" in repr(optimizer)
    optimizer.param_groups[0]["params"] = [param]
    optimizer.step()


@pytest.mark.parametrize("stepped", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("parameters", [1, 3])
def test_with_plan_none_zeros_vectors_train_as_with_adamw(parameters: int, stepped: bool) -> None:
    def trained(make: Any) -> nn.Parameter:
        params = [nn.Parameter(torch.full((4, 6), 0.5)) for _ in range(parameters)]
        optimizer = make([{"params": params}])
        if stepped:
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        flat = nn.Parameter(torch.cat([param.detach().flatten() for param in params])[: 12 * parameters])
        optimizer.param_groups[0]["params"] = [flat]
        for step in range(3):
            flat.grad = torch.linspace(-1, 1, len(flat)) + step
            optimizer.step()
        return flat

    ours, theirs = (
        trained(lambda groups: SlimAdam(groups, lr=LR, plan=None)),
        trained(lambda g: torch.optim.AdamW(g, lr=LR)),
    )
    torch.testing.assert_close(ours, theirs)
