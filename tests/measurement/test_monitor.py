from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimadam import snr
from slimadam.measurement.monitor import Monitor, place
from slimadam.measurement.sampling import filling, next_look, thinning
from slimadam.measurement.slices import counts_of, take
from slimadam.state import second_moment
from slimadam.state.rule import Rule


def _mean(*dims: int) -> Rule:
    return Rule(dims, "mean")


FACTORED = Rule(form="factored")
PER_MATRIX = Rule(form="factored", batch_dims=1)
CASES = [
    (_mean(1), (300, 200), (2, 200)),
    (_mean(0), (300, 200), (300, 1)),
    (_mean(0, 1), (300, 200), None),
    (_mean(0), (20_000,), None),
    (_mean(1, 2, 3), (256, 64, 3, 3), (2, 64, 3, 3)),
    (_mean(1), (64, 256, 3, 3), (1, 256, 3, 1)),
    (_mean(2), (12, 64, 768), (7, 1, 768)),
    (_mean(2), (4, 1000, 100), (4, 9, 100)),
    (FACTORED, (300, 200), (2, 200)),
    (FACTORED, (256, 64, 3, 3), (2, 64, 3, 3)),
    (PER_MATRIX, (4, 500, 100), (4, 4, 100)),
]


@pytest.mark.parametrize(("rule", "shape", "sample"), CASES)
def test_sample_is_a_small_view_of_whole_slices(
    rule: Rule, shape: tuple[int, ...], sample: tuple[int, ...] | None
) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    index = place(rule, shape)
    assert index is not None
    taken = take(tensor, index)
    assert taken.numel() <= 0.01 * (tensor.numel() - rule.stored_elements(shape))
    assert taken.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert tuple(taken.shape) == counts_of(index)
    assert taken.unique().numel() == taken.numel()
    if sample is not None:
        assert counts_of(index) == sample
    else:
        assert taken.numel() > 0.009 * tensor.numel()
        for dim, size in enumerate(shape):
            met = (taken // math.prod(shape[dim + 1 :]) % size).unique().numel()
            assert met >= min(size, taken.numel()) * 0.9


@pytest.mark.parametrize(
    ("rule", "shape"), [(_mean(1), (90, 500)), (_mean(0, 1), (50, 60)), (FACTORED, (40, 60)), (_mean(1), (500, 1))]
)
def test_what_saves_too_little_is_said_to_be_too_small(rule: Rule, shape: tuple[int, ...]) -> None:
    monitor = Monitor()
    monitor.add("w", torch.zeros(shape), [rule], torch.ones(shape))
    assert monitor.memory_of(["w"]) == 0
    check = monitor.check()["w"]
    assert (check.ready, check.sampled, check.reason) == (False, 0, "too small to monitor")
    assert (check.form, check.dims) == (rule.form, rule.dims)


def _step(
    monitor: Monitor,
    grads: Mapping[str, Tensor | None],
    beta2: float,
    stored: Mapping[str, Sequence[Tensor]] | None = None,
    **other: Any,
) -> None:
    """One step of an optimizer whose parameters have these gradients and stored averages."""
    params = {name: torch.empty_like(torch.zeros(300, 200) if grad is None else grad) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name]
    rules = {name: [monitor._samples[name].rule if name in monitor._samples else Rule()] for name in params}
    states = {params[name]: second_moment.by_key(averages, rules[name]) for name, averages in (stored or {}).items()}
    group = {"params": list(params.values()), "betas": (0.9, beta2), "capturable": False, **other}
    monitor.after_step([(list(params), group)], rules, states)


def _run(
    monitor: Monitor, grads: Sequence[dict[str, Tensor]], beta2: float, **averaged: Any
) -> dict[str, list[Tensor]]:
    """Steps the monitor; returns the stored averages it was shown, kept in float64."""
    stored = {
        name: [torch.zeros_like(grads[0][name].double().mean(dims, keepdim=True)) for dims in parts]
        for name, parts in averaged.items()
    }
    for step in grads:
        for name, parts in averaged.items():
            for part, dims in zip(stored[name], parts, strict=True):
                part.lerp_(step[name].double().square().mean(dims, keepdim=True), 1 - beta2)
        _step(monitor, step, beta2, {name: parts for name, parts in stored.items() if parts})
    return stored


def _second_moment(grads: Sequence[Tensor], beta2: float) -> Tensor:
    """The full second moment in float64, as AdamW's without its bias correction."""
    v = torch.zeros_like(grads[0], dtype=torch.float64)
    for grad in grads:
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
    return v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rule", "shape"), [case[:2] for case in CASES if math.prod(case[1]) < 100_000])
def test_measures_the_snr_of_the_sampled_second_moments(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = torch.rand(shape).exp()
    grads = [(scale * torch.randn(shape)).to(dtype) for _ in range(20)]
    monitor = Monitor(shortest_interval=20)
    monitor.add("w", grads[0], [rule])
    parts = rule.averaged_dims(len(shape)) if rule.form == "factored" else ()
    stored = _run(monitor, [{"w": grad} for grad in grads], 0.85, w=parts)
    index = place(rule, shape)
    assert index is not None
    v = _second_moment(grads, 0.85)
    sample = take(v, index).numpy()
    if rule.form == "factored":
        rows, columns = (part.numpy() for part in stored["w"])
        f = sample / (rows / rows.mean(0))[index[0]] / columns
        expected = f.mean() ** 2 / f.var()
    else:
        dims = rule.dims if sample.ndim == len(shape) > 1 else 0
        expected = (sample.mean(axis=dims) ** 2 / sample.var(axis=dims)).mean()
    check = monitor.check()["w"]
    assert check.snr == pytest.approx(float(expected), rel=2e-5)
    assert (check.ready, check.sampled) == (True, sample.size)
    assert check.reason == "averaging holds"
    assert monitor.memory_of(["w"]) == sample.size * (8 if dtype == torch.float64 else 4)


def test_separate_matrices_are_judged_apart() -> None:
    shape = (3, 400, 50)
    grads = [torch.randn(shape) * torch.tensor([1.0, 100.0, 1e-4])[:, None, None] for _ in range(20)]
    monitor = Monitor(shortest_interval=20)
    monitor.add("experts", grads[0], [PER_MATRIX])
    rows, columns = _run(monitor, [{"experts": grad} for grad in grads], 0.85, experts=((2,), (1,)))["experts"]
    index = place(PER_MATRIX, shape)
    assert index is not None
    sample = take(_second_moment(grads, 0.85), index).numpy()
    ratios = []
    for matrix in range(3):
        r, c = rows[matrix].numpy(), columns[matrix].numpy()
        f = sample[matrix] / ((r / r.mean())[index[1]] * c)
        ratios.append(f.mean() ** 2 / f.var())
    assert monitor.check()["experts"].snr == pytest.approx(np.mean(ratios), rel=1e-5)


def test_whole_matrix_measured_from_its_true_second_moment_stands_for_it() -> None:
    v = torch.rand(400, 300) ** 3 * torch.logspace(-3, 0, 400)[:, None]
    for rule, candidate in ((_mean(1), 1), (_mean(0), 0), (_mean(0, 1), (0, 1)), (FACTORED, "factored")):
        monitor = Monitor()
        monitor.add("w", v, [rule], v)
        check = monitor.check()["w"]
        assert check.ready
        assert check.snr == pytest.approx(snr(v, candidate), rel=0.2)


def test_sample_that_nothing_reaches_is_said_to_tell_nothing() -> None:
    monitor = Monitor(shortest_interval=20)
    monitor.add("w", torch.zeros(300, 200), [_mean(1)])
    _run(monitor, [{"w": torch.zeros(300, 200)}] * 20, 0.85)
    check = monitor.check()["w"]
    assert check.snr == math.inf
    assert "no gradient" in check.reason
    _run(monitor, [{"w": torch.full((300, 200), math.inf)}] * 20, 0.85)
    assert "not finite" in monitor.check()["w"].reason


@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.95, 0.98, 0.999])
def test_not_ready_before_the_start_at_zero_is_forgotten(beta2: float) -> None:
    monitor = Monitor()
    monitor.add("w", torch.zeros(300, 200), [_mean(1)])
    grad = {"w": torch.randn(300, 200)}
    ready_at = next(
        step for step in range(1, 9000) if _run(monitor, [grad], beta2) is not None and monitor.check()["w"].ready
    )
    assert monitor.interval == max(200, round(1 / (1 - beta2)))
    assert ready_at == -(-filling(beta2) // monitor.interval) * monitor.interval


@pytest.mark.parametrize(("beta2", "steps", "looks"), [(0.95, 1000, 5 * 60), (0.98, 1000, 5 * 150), (0.999, 6000, 200)])
def test_samples_follow_gradients_only_when_they_must(beta2: float, steps: int, looks: int) -> None:
    class Groups(list[Any]):
        touched = 0

        def __iter__(self) -> Any:
            self.touched += 1
            return super().__iter__()

    monitor, param = Monitor(), torch.randn(300, 200)
    param.grad = torch.randn(300, 200)
    monitor.add("w", param, [_mean(1)])
    groups = Groups([(["w"], {"params": [param], "betas": (0.9, beta2), "capturable": False})])
    seen, touched = [], []
    for step in range(steps):
        before = groups.touched
        monitor.after_step(groups, {"w": [_mean(1)]}, {})
        unfilled = monitor.state_dict()["samples"]["w"]["unfilled"]
        seen += [] if seen and unfilled == seen[-1] else [unfilled]
        touched += [step] if groups.touched > before else []
    assert len(seen) - (beta2 < 0.99) == looks
    assert set(touched) == {
        0,
        *_looks(beta2, monitor.interval, steps),
        *range(monitor.interval - 1, steps, monitor.interval),
    }


def test_what_was_seen_before_a_rest_is_forgotten_as_if_there_had_been_none() -> None:
    """Gradients shrink by 30 and change: the true second moment has forgotten the old ones, so must the sample."""
    before, after = 30 * torch.rand(300, 200) ** 4, torch.rand(300, 200)
    monitor = Monitor()
    monitor.add("w", before, [_mean(1)])
    _run(monitor, [{"w": before}] * 200 + [{"w": after}] * 200, 0.95)
    index = place(_mean(1), (300, 200))
    assert index is not None
    true = take(_second_moment([before] * 200 + [after] * 200, 0.95), index)
    assert monitor.check()["w"].snr == pytest.approx(snr(true, 1), rel=0.01)
    assert monitor.check()["w"].snr > 2 * snr(take(before.square(), index), 1)


def test_goes_on_from_the_true_second_moment() -> None:
    before, after = torch.rand(300, 200) ** 4, torch.rand(300, 200)
    monitor = Monitor()
    monitor.add("w", before, [_mean(1)], before)
    first = monitor.state_dict()["samples"]["w"]["phase"] * 150 // 16
    _run(monitor, [{"w": after}] * 201, 0.99)
    seen = 3 * len(_looks(0.99, 200, 200))
    assert 197 < seen < 203
    true = 0.99**seen * before + (1 - 0.99**seen) * after**2
    assert monitor.check()["w"].snr == pytest.approx(snr(true[first::150], 1), rel=1e-4)


@pytest.mark.parametrize("spread", [0.4, 1.0, 2.0])
def test_thinned_snr_is_that_of_every_step(spread: float) -> None:
    """Within 1.4 for SNRs up to 10, within 1.1 near 1: what the docstring derives, and the noise of 4,000 elements."""
    beta2, every, elements = 0.99, 3, 40_000
    assert thinning(beta2) == every
    scale = torch.exp(spread * torch.randn(elements)).clamp(0.05, 20).sqrt()
    true, thinned = torch.zeros(elements), torch.zeros(elements)
    for step in range(600):
        square = (scale * torch.randn(elements)) ** 2
        true.lerp_(square, 1 - beta2)
        if step % every == 0:
            thinned.lerp_(square, 1 - beta2**every)
    full, sampled = snr(true, 0), snr(thinned, 0)
    n = (1 + beta2) / (1 - beta2)
    assert full / sampled == pytest.approx(1 + 2 * (every - 1) * (full + 1) / n, rel=0.05)
    assert 1 < full / sampled < (1.1 if full < 1.5 else 1.4)


@pytest.mark.parametrize(("beta2", "expected"), [(0.0, 1), (0.9, 1), (0.95, 1), (0.97, 1), (0.99, 3), (0.999, 30)])
def test_thinning(beta2: float, expected: int) -> None:
    assert thinning(beta2) == expected


def _noisy_run(monitor: Monitor, level: float, measurements: int, seed: int = 0) -> None:
    """Steps whose second moment has about the given SNR along dimension 1, one of some noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(measurements):
        noise = torch.randn(300, 200, generator=generator).exp() ** math.sqrt(math.log1p(1 / level))
        _run(monitor, [{"w": noise.sqrt()}] * monitor.interval, 0.5)


def _watched() -> Monitor:
    monitor = Monitor(shortest_interval=6)
    monitor.add("w", torch.zeros(300, 200), [_mean(1)])
    return monitor


def test_a_decline_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = _watched()
    _noisy_run(monitor, 3.0, 5)
    before = monitor.check()["w"]
    assert before.snr > 1.5
    _noisy_run(monitor, 0.3, 2, seed=1)
    assert not caplog.records
    assert "not for long" in monitor.check()["w"].reason
    _noisy_run(monitor, 0.3, 6, seed=2)
    assert [(record.name, record.levelno) for record in caplog.records] == [("slimadam", logging.WARNING)]
    message = caplog.records[0].getMessage()
    for part in ("'w' (SNR ", " -> 0.", "of 1 monitored parameters 1 are", "cutoff 1", "opt.expand(name)"):
        assert part in message
    assert "no longer holds" in monitor.check()["w"].reason
    resumed = _watched()
    resumed.load_state_dict(monitor.state_dict())
    _noisy_run(resumed, 0.3, 1, seed=3)
    assert len(caplog.records) == 1


def test_many_names_are_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(shortest_interval=6)
    flat, spread = torch.rand(300, 200) + 1, torch.rand(300, 200) ** 9
    names = [f"w{index}" for index in range(8)]
    for name in names:
        monitor.add(name, flat, [_mean(1)])
    for grad in (flat, spread):
        _run(monitor, [dict.fromkeys(names, grad)] * 18, 0.5)
    assert "of 8 monitored parameters 8 are" in caplog.text
    assert "'w4'" in caplog.text
    assert "and 3 more" in caplog.text
    assert "'w5'" not in caplog.text


@pytest.mark.parametrize("level", [1.1, 0.6, 0.2])
def test_no_warning_where_nothing_changes(level: float, caplog: pytest.LogCaptureFixture) -> None:
    monitor = _watched()
    values = []
    for seed in range(100):
        _noisy_run(monitor, level, 1, seed)
        values.append(monitor.check()["w"].snr)
    assert min(values) < 1
    assert max(values) > 1.3 * min(values)
    assert not caplog.records


def _occasional(kind: str, runs: int, generator: torch.Generator) -> Tensor:
    """Samples of the second moments of heavy-tailed gradients at beta2 = 0.95, one for each of many runs."""
    moment = torch.zeros(runs, 2, 200)
    for _ in range(60 if kind == "student" else 160):
        square = torch.randn(runs, 2, 200, generator=generator) ** 2
        if kind == "student":
            square /= torch.randn(3, runs, 2, 200, generator=generator).square().mean(0)
        else:
            square *= torch.where(torch.rand(runs, 1, 1, generator=generator) < 0.01, 900, 1)
        moment.lerp_(square, 0.05)
    return moment


@pytest.mark.parametrize("kind", ["student", "bursts"])
def test_rare_large_gradients_are_no_decline(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    monitors = [_watched() for _ in range(40)]
    low = 0
    for _ in range(30):
        for monitor, moment in zip(monitors, _occasional(kind, len(monitors), generator), strict=True):
            grad = torch.zeros(300, 200)
            grad[75::150] = moment.sqrt()
            _run(monitor, [{"w": grad}] * monitor.interval, 0.5)
            low += monitor.check()["w"].snr < 1
    assert 40 * 30 * 0.1 < low < 40 * 30 * 0.9
    assert not caplog.records


def test_factored_parameter_without_averages_is_passed_over() -> None:
    monitor = Monitor(shortest_interval=6)
    monitor.add("w", torch.zeros(300, 200), [FACTORED])
    _run(monitor, [{"w": torch.randn(300, 200)}] * 6, 0.5)
    assert not monitor.check()["w"].ready
    _run(monitor, [{"w": torch.randn(300, 200)}] * 6, 0.5, w=((1,), (0,)))
    assert monitor.check()["w"].ready


@pytest.mark.parametrize(("beta2", "period", "at"), [(0.999, 2, 0), (0.999, 2, 1), (0.999, 10, 3), (0.95, 2, 1)])
def test_periodic_gradients_are_followed(beta2: float, period: int, at: int) -> None:
    """The sample sees its share of them, and forgets what came before as the true second moment does."""
    before, after = torch.rand(300, 200) ** 4, torch.rand(300, 200)
    monitor, steps = Monitor(), round(3 / (1 - beta2)) * period
    steps += -steps % monitor.interval + (200 if beta2 < 0.99 else 0)
    monitor.add("w", before, [_mean(1)])
    for step in range(2 * steps):
        grad = (before if step < steps else after) if step % period == at else None
        _step(monitor, {"w": grad}, beta2)
    index = place(_mean(1), (300, 200))
    assert index is not None
    kept = beta2 ** (steps / period)
    true = kept * take(before**2, index) + (1 - kept) * take(after**2, index)
    assert monitor.check()["w"].snr == pytest.approx(snr(true, 1), rel=0.02)


def _looks(beta2: float, interval: int, steps: int) -> list[int]:
    return [step for step in range(steps) if next_look(step, beta2, interval) == step]


def test_looks_are_one_in_every_so_many_steps_and_meet_each_remainder() -> None:
    for every in (1, 2, 3, 30):
        looks = _looks(1 - 0.03 / every, 1, 600 * every)
        assert len(looks) == 600
        for period in (2, 3, 7, 10):
            for remainder in range(period):
                met = sum(look % period == remainder for look in looks)
                assert met == pytest.approx(600 / period, rel=0.15)


def test_a_decline_that_stays_above_the_cutoff_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    monitor = _watched()
    _noisy_run(monitor, 20.0, 4)
    _noisy_run(monitor, 3.0, 6)
    assert 1 < monitor.check()["w"].snr < 8
    assert not caplog.records


def test_resumes_to_the_last_bit(caplog: pytest.LogCaptureFixture) -> None:
    def fresh(start: Tensor | None = None) -> Monitor:
        monitor = Monitor(shortest_interval=20)
        monitor.add("w", torch.zeros(300, 200), [_mean(1)], start)
        monitor.add("f", torch.zeros(300, 200), [FACTORED])
        monitor.add("small", torch.zeros(3, 2), [_mean(1)])
        return monitor

    factored = FACTORED.averaged_dims(2)
    grads = [{name: torch.randn(300, 200) * (1 + step) for name in ("w", "f")} for step in range(37)]
    monitor = fresh(torch.rand(300, 200))
    _run(monitor, grads, 0.8, f=factored)
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for running in (monitor, resumed):
        _run(running, grads, 0.8, f=factored)
    assert repr(resumed.check()) == repr(monitor.check())  # NaN equals nothing
    assert all(check.ready for name, check in resumed.check().items() if name != "small")
    theirs, ours = resumed.state_dict(), monitor.state_dict()
    for name in ("w", "f"):
        assert torch.equal(theirs["samples"][name].pop("moment"), ours["samples"][name].pop("moment"))
    assert theirs == ours
    assert not caplog.records


def test_a_sample_that_an_earlier_release_placed_elsewhere_goes_on_there() -> None:
    before, after = torch.rand(300, 200) ** 4, torch.rand(300, 200)
    monitor = _watched()
    saved = {"moment": before[3 * 150 // 16 :: 150].clone(), "phase": 3, "window": 0, "measured": 1, "unfilled": 0.0}
    saved |= {"arrived": 1.0, "latest": 2.0, "lowest": 2.0, "usual": (2.0,), "recent": ()}
    monitor.load_state_dict({"steps": 6, "longest_memory": 2.0, "warned": False, "samples": {"w": saved}})
    _run(monitor, [{"w": after}] * 6, 0.5)
    true = 0.5**6 * before + (1 - 0.5**6) * after**2
    assert monitor.check()["w"].snr == pytest.approx(snr(true[3 * 150 // 16 :: 150], 1), rel=1e-4)
    assert monitor.state_dict()["samples"]["w"]["phase"] == 3


def test_loading_copies() -> None:
    monitor, other = _watched(), _watched()
    _run(monitor, [{"w": torch.randn(300, 200)}] * 6, 0.5)
    other.load_state_dict(monitor.state_dict())
    before = monitor.state_dict()["samples"]["w"]["moment"].clone()
    _run(other, [{"w": torch.randn(300, 200)}] * 60, 0.5)
    assert torch.equal(monitor.state_dict()["samples"]["w"]["moment"], before)
    assert monitor.check()["w"] != other.check()["w"]


def test_damaged_state_is_refused_and_changes_nothing() -> None:
    monitor, other = _watched(), Monitor(shortest_interval=6)
    other.add("w", torch.zeros(300, 200), [_mean(0)])
    for running in (monitor, other):
        _run(running, [{"w": torch.randn(300, 200)}] * 6, 0.5)
    before = monitor.check()
    with pytest.raises(
        ValueError, match=r"'w': the saved sample is of shape \(300, 1\), this plan's has shape \(2, 200\)"
    ):
        monitor.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the saved monitor is damaged"):
        monitor.load_state_dict(None)  # type: ignore[arg-type]
    assert monitor.check() == before


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", (-5, "x", math.nan, True)),
        ("longest_memory", ("x", math.nan, math.inf, -1.0)),
        ("warned", ("x", 1)),
        ("samples", ([], 5, None)),
        ("phase", (16, -3, "x", 2.5)),
        ("window", (-2, "x")),
        ("measured", (None, 0.5, -2)),
        ("unfilled", ("x", None, 1.5, math.nan)),
        ("arrived", ("x", -0.5)),
        ("latest", ("x", None, -1.0)),
        ("lowest", ("x", -1.0)),
        ("usual", (["x"], None, [math.nan], [1.0] * 9)),
        ("recent", ([None], "abc", [math.inf])),
        ("moment", (5, torch.zeros(2, 200, dtype=torch.complex64))),
    ],
)
def test_each_damaged_field_is_named(field: str, values: Sequence[Any]) -> None:
    monitor = _watched()
    _run(monitor, [{"w": torch.randn(300, 200)}] * 6, 0.5)
    before = monitor.check()
    for value in [*values, ...]:
        state = monitor.state_dict()
        holder = state if field in state else state["samples"]["w"]
        holder.pop(field) if value is ... else holder.update({field: value})
        with pytest.raises(ValueError, match=rf"the saved monitor is damaged \(.*{field}.*=.*; pass what state_dict"):
            monitor.load_state_dict(state)
    assert monitor.check() == before


def test_parameters_come_and_go() -> None:
    monitor = Monitor(shortest_interval=6)
    monitor.add("full", torch.zeros(300, 200), [Rule()])
    monitor.add("complex", torch.zeros(300, 200, dtype=torch.complex64), [_mean(1)])
    for name in ("w", "frozen"):
        monitor.add(name, torch.zeros(300, 200), [_mean(1)])
    grads = {"w": torch.randn(300, 200), "frozen": None, "unknown": torch.randn(3)}
    for _ in range(6):
        _step(monitor, grads, 0.5)
    check = monitor.check()
    assert list(check) == ["w", "frozen", "complex"]
    assert (check["w"].ready, check["frozen"].ready) == (True, False)
    assert check["complex"].reason == "complex parameters are not monitored"
    assert check["frozen"].reason.startswith("not ready")
    for name in list(check):
        monitor.drop(name)
    assert monitor.check() == {}
    assert monitor.memory_of(["w", "frozen"]) == 0


@pytest.mark.parametrize("interval", [0, -1, 2.5])
def test_wrong_interval_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match="shortest_interval="):
        Monitor(shortest_interval=interval)
