"""Plan files, authors' rules and measurement tables come from anywhere: each is read, or refused by ``PlanError``."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, PlanError, Rule, SlimAdam, SNRHistory
from slimadam.layers.splits import Part
from slimadam.state.rule import Candidate, dimension_subsets

FILES = 250
SECONDS = 2.0
MEGABYTES = 4
BYTES_PER_BYTE = 100
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 8, 2**62, 2**63, 10**400, -(10**4000), 1.5, -0.0, 1e308, 5e-324),
    *("", "full", "mean", "factored", "infinity", "NaN", "x" * 5000, "attn" * 300, "\ud800", "\x00", "é\u202e"),
    *([], [0], [0, 0], [-1], [1.0], [True], ["0"], [0, 1], [2**62], [0] * 9, [2**62] * 64, [1] * 65, [*range(3000)]),
    *({}, {"form": "full"}, {"form": "mean", "dims": [1]}, {"": None}),
    *([{"candidate": [0], "value": -1}], [{"candidate": {}, "value": 1}], [{"candidate": [-1], "value": 10**300}]),
]  # fmt: skip
TOKENS = [
    *("NaN", "-Infinity", "Infinity", "1e999", "-1", "9" * 50, "9" * 5000, "0x10", "1_000", "", '"', "'", "\\"),
    *("\\ud800", "\x00", "\ufeff", "\r", "\n", ",", "]", "}", "[[[[", "null", "x" * 200_000, "٣", "(0,)", "factored"),
    *("()", "(-1,)", "(4611686018427387904,)", "(0, 0)", "(9, 9, 9, 9, 9, 9, 9, 9)"),
]  # fmt: skip


FUSED = {name: Part(name, (6, 4), (6, 4), 0, start, size) for name, start, size in (("query", 0, 4), ("key", 4, 2))}


def _parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"plain.weight": (4, 6), "bias": (6,), "experts": (2, 4, 6), "fused": (6, 4)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def _measured(shape: tuple[int, ...]) -> dict[Candidate, float]:
    """A different ratio for each candidate, infinity among them."""
    found: dict[Candidate, float] = {dims: 0.4 * 3**index for index, dims in enumerate(dimension_subsets(len(shape)))}
    return {**found, (0, 1): math.inf, "factored": 1e-3} if len(shape) > 1 else found


def _history() -> SNRHistory:
    history = SNRHistory()
    for step in (1, 100):
        for name, parameter in _parameters().items():
            history.record(step, name, parameter.shape, _measured(parameter.shape))
    return history


def _plan() -> dict[str, Any]:
    """A plan with each form, parts of a fused weight, and experts as separate matrices."""
    shapes = {name: tuple(parameter.shape) for name, parameter in _parameters().items() if name != "fused"}
    rules = {name: Rule(shape=shape, snr=_measured(shape), reason="why", role="bias") for name, shape in shapes.items()}
    rules["plain.weight"] = replace(rules["plain.weight"], form="mean", dims=(0, 1))
    rules["experts"] = replace(rules["experts"], form="factored", batch_dims=1)
    parts = {f"fused[{name}]": Rule((1,), "mean", part.shape, part=part) for name, part in FUSED.items()}
    return CompressionPlan({**rules, **parts}, cutoff=1.0).to_dict()


AUTHORS = {"plain.weight": [1], "bias": [0], "experts": [1, 2], "fused": None}


def _flip_bytes(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _repeat_a_slice(rng: random.Random, data: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:end] + data[start:end] * rng.choice([1, 2, 50]) + data[end:]


def _shuffle_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    lines[rng.randrange(len(lines))] = lines[rng.randrange(len(lines))] * rng.randrange(3)
    return b"".join(lines)


def _insert_token(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(TOKENS).encode() + data[at + rng.randrange(3) :]


def _replace_number(rng: random.Random, data: bytes) -> bytes:
    found = rng.choice(list(re.finditer(rb"\d+", data)))
    return data[: found.start()] + rng.choice(TOKENS).encode() + data[found.end() :]


def _encode_otherwise(rng: random.Random, data: bytes) -> bytes:
    text = data.decode()
    encoded = [b"", b"\xef\xbb\xbf" + data, gzip.compress(data, mtime=0), text.encode("utf-16"), data + b"\xff\xfe\xc3"]
    return rng.choice([*encoded, b"\x00" * 1000, data.replace(b"\n", b"\r"), data + data])


BYTE_MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    *(_flip_bytes, _truncate, _repeat_a_slice, _shuffle_lines, _insert_token, _replace_number, _encode_otherwise),
]


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from _places(data[key])


def _nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = [value]
    return value


def _mutated_json(rng: random.Random, original: dict[str, Any]) -> bytes:
    data = copy.deepcopy(original)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(_places(data)))
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[str(rng.choice(VALUES))] = container.pop(key)
        elif kind == 2:
            other, other_key = rng.choice(list(_places(original)))
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        if not data:
            break
    text = json.dumps(data)
    if rng.random() < 0.2:
        depth, (opening, closing) = (
            rng.choice([3, 300, 960, 975, 990, 100_000]),
            rng.choice([("[", "]"), ('{"a":', "}")]),
        )
        text = text.replace(rng.choice(["null", "[", '"', "1"]), opening * depth + "1" + closing * depth, 1)
    elif rng.random() < 0.1:
        text = text.replace("{", '{"form": "mean", "form": "full",', 1)
    return text.encode()


@contextmanager
def _bounded(size: int) -> Iterator[None]:
    """Fails where the block takes too long, or memory out of proportion to a file's size."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < SECONDS
    assert peak < MEGABYTES * 2**20 + BYTES_PER_BYTE * size


def _use(plan: CompressionPlan, path: Path) -> bool:
    """Save and reload a plan, and take a step by it. Whether it fits the model."""
    plan.save(path)
    assert CompressionPlan.load(path) == plan
    assert 0 <= plan.second_moments_saved <= 1
    parameters = _parameters()
    try:
        optimizer = SlimAdam(parameters.items(), plan=plan)
    except PlanError:
        return False
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return True


def _read(load: Callable[[Path], Any], path: Path, data: bytes) -> Any:
    """What is in the file, or the message of the error; within bounds."""
    path.write_bytes(data)
    with _bounded(len(data)):
        try:
            return load(path)
        except PlanError as error:
            return str(error)


@pytest.mark.parametrize("original", [_plan(), AUTHORS], ids=["plan", "authors"])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_plans(tmp_path: Path, original: dict[str, Any], structured: bool, seed: int) -> None:
    rng = random.Random(seed)
    path, text = tmp_path / "plan.json", json.dumps(original, indent=1).encode()
    read, fitting = 0, 0
    for _ in range(FILES):
        data = _mutated_json(rng, original) if structured else rng.choice(BYTE_MUTATIONS)(rng, text)
        found = _read(CompressionPlan.load, path, data)
        if isinstance(found, str):
            assert len(found) < 3000
        else:
            read += 1
            fitting += _use(found, tmp_path / "again.json")
    assert 0 < fitting <= read < FILES


def _mutated_csv(rng: random.Random, text: bytes) -> bytes:
    lines = text.decode().splitlines()
    row = rng.randrange(len(lines))
    cells = lines[row].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(TOKENS)
    lines[row] = ",".join(rng.sample(cells, rng.randint(1, len(cells))) if rng.random() < 0.2 else cells)
    return "\n".join(lines).encode()


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_tables(tmp_path: Path, structured: bool, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "snr.csv"
    _history().save_csv(path)
    text = path.read_bytes()
    read, refused = 0, 0
    for _ in range(FILES):
        data = _mutated_csv(rng, text) if structured else rng.choice(BYTE_MUTATIONS)(rng, text)
        history = _read(SNRHistory.load_csv, path, data)
        if isinstance(history, str):
            continue
        read += 1
        budget = rng.choice([None, 0.0, 0.5, 0.9, 1.0])
        with _bounded(len(data)):
            plan = _chosen(history, budget, rng.choice(["mean", "best"]))
        if plan is None:
            refused += 1
        else:
            _use(plan, tmp_path / "plan.json")
    assert 0 < refused < read < FILES


def _chosen(history: SNRHistory, budget: float | None, forms: Any) -> CompressionPlan | None:
    """A plan from the history, or None where it is empty or the budget cannot be met."""
    try:
        return CompressionPlan.from_snr(history, budget=budget, forms=forms)
    except ValueError as error:
        if str(error).startswith("the SNR history is empty" if budget is None else ("budget=", "the SNR history is")):
            return None
        raise


def test_a_million_rows(tmp_path: Path) -> None:
    _history().save_csv(tmp_path / "snr.csv")
    header, *rows = (tmp_path / "snr.csv").read_bytes().splitlines(keepends=True)
    data = header + b"".join(rows) * (10**6 // len(rows))
    (tmp_path / "snr.csv").write_bytes(data)
    start = time.process_time()
    history = SNRHistory.load_csv(tmp_path / "snr.csv")
    assert time.process_time() - start < 30
    assert dict(history) == dict(_history())


def test_many_keys_one_of_them_twice(tmp_path: Path) -> None:
    data = "{" + ",".join(f'"{key}":null' for key in [*range(100_000), 99_999]) + "}"
    assert "'99999' appears twice" in _read(CompressionPlan.load, tmp_path / "plan.json", data.encode())


@pytest.mark.parametrize("name", ["attn" * 100_000, "module." * 100_000])
def test_names_without_end(tmp_path: Path, name: str) -> None:
    for plan in ({name: [0]}, {**_plan(), "parameters": {name: {"form": "full"}}}):
        message = _read(CompressionPlan.load, tmp_path / "plan.json", json.dumps(plan).encode())
        assert "longer than 1000 characters" in message
        assert len(message) < 500
