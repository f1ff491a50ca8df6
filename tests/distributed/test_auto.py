"""``plan="auto"`` and SNR recorders on sharded parameters measure the whole tensors: the same plan on every rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, SlimAdam, SNRRecorder, every
from tests.distributed.test_step import full
from tests.ranks import on_ranks
from tests.versions import shards

MEASURED, AFTER = 4, 6


class Attending(nn.Module):
    """Query, key and value in one weight, which two ranks cut inside the key."""

    def __init__(self) -> None:
        super().__init__()
        # A bias of the key has no gradient but rounding, which Adam makes steps of.
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
        self.out = nn.Linear(6, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 13))


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 70, bias=False))


def _train(make: Any, forms: str, start: str = "full") -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.manual_seed(1)
    alone = make()
    torch.manual_seed(1)
    together = make()
    for layer in (*together.children(), together):
        fully_shard(layer)
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("slimadam").addHandler(handler)
    settings = AutoPlan(MEASURED, forms=forms, cutoff=0.01, start=start)  # type: ignore[arg-type]
    optimizers = [SlimAdam(model, lr=1e-2, plan=settings) for model in (alone, together)]
    recorder = SNRRecorder(optimizers[1], together, every(1))
    generator = torch.Generator().manual_seed(5)
    for _ in range(MEASURED + AFTER):
        batch = torch.randn(12, 3, 6, generator=generator)
        for model, optimizer, data in (
            (alone, optimizers[0], batch),
            (together, optimizers[1], batch.chunk(ranks)[rank]),
        ):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
        if len(recorder.history.steps) == MEASURED:
            recorder.detach()
    pairs = zip(alone.parameters(), together.parameters(), strict=True)
    return {
        "worst": max(float((full(one) - full(other)).abs().max()) for one, other in pairs),
        "plans": [optimizer.plan.to_dict()["parameters"] for optimizer in optimizers],
        "saved": [optimizer.plan.second_moments_saved for optimizer in optimizers],
        "warned": warned,
    }


def _train_mlp() -> list[dict[str, Any]]:
    return [_train(_mlp, forms) for forms in ("mean", "best")]


def _train_wide() -> list[dict[str, Any]]:
    return [_train(_wide, forms, "slim") for forms in ("closest", "best")]


def _train_attending() -> dict[str, Any]:
    return _train(Attending, "best")


def _resume_wide() -> list[list[str]]:
    """Return the forms decided without and with a checkpoint just before the decision."""
    from torch.distributed.fsdp import fully_shard

    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(90, 80, bias=False), nn.Linear(80, 70, bias=False)))
        for layer in (*models[-1].children(), models[-1]):
            fully_shard(layer)
    settings = AutoPlan(40, start="slim")
    optimizers = [SlimAdam(model, lr=1e-3, betas=(0.9, 0.99), plan=settings) for model in models]

    def train(which: int, steps: range) -> None:
        for step in steps:
            optimizers[which].zero_grad()
            batch = torch.randn(16, 90, generator=torch.Generator().manual_seed(step))
            models[which](batch).square().mean().backward()
            optimizers[which].step()

    train(0, range(39))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    train(0, range(39, 40))
    train(1, range(39, 79))
    return [[rule.form for rule in optimizer.plan.values()] for optimizer in optimizers]


@shards
def test_a_checkpoint_of_shards_just_before_the_decision_measures_anew(tmp_path: Path) -> None:
    for straight, resumed in on_ranks(2, tmp_path, _resume_wide):
        assert straight == resumed == ["factored", "factored"]


def _storage(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: (rule.get("form"), rule.get("dims")) for name, rule in plan.items()}


@shards
def test_decides_and_trains_as_one_process(tmp_path: Path) -> None:
    for ranks in (2, 3):
        (tmp_path / str(ranks)).mkdir()
        for of_rank in on_ranks(ranks, tmp_path / str(ranks), _train_mlp):
            for found in of_rank:
                assert found["worst"] <= 2e-5
                alone, together = map(_storage, found["plans"])
                assert alone == together
                assert found["saved"][0] == found["saved"][1] > 0.5
                assert not found["warned"]


def _ratios(plan: dict[str, Any]) -> dict[str, float]:
    """Return the SNR by parameter and candidate."""
    return {
        f"{name} {found['candidate']}": float(found["value"])
        for name, rule in plan.items()
        for found in rule.get("snr", ())
    }


@shards
def test_decides_from_grids_as_one_process(tmp_path: Path) -> None:
    for ranks in (2, 3):
        (tmp_path / str(ranks)).mkdir()
        for of_rank in on_ranks(ranks, tmp_path / str(ranks), _train_wide):
            for found in of_rank:
                assert found["worst"] <= 2e-5
                assert _storage(found["plans"][0]) == _storage(found["plans"][1])
                assert found["saved"][0] == found["saved"][1] > 0.5
                assert not found["warned"]
                alone, together = map(_ratios, found["plans"])
                assert alone == pytest.approx(together, rel=1e-2)
                assert len(alone) > 6


@shards
def test_parts_that_shards_cut_are_followed_or_said_to_stay_in_full(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, _train_attending):
        kept_whole = [message for message in found["warned"] if "keeps the second moment of" in message]
        followed = _storage(found["plans"][0]) == _storage(found["plans"][1])
        assert followed != bool(kept_whole)
        assert not followed or found["worst"] <= 2e-5
