"""Is every step right on this device? Plain functions, each against the formula in float64 on the CPU.

They need torch alone, so that ``python -m benchmarks.gpu`` can run them on a machine without a test runner.
Whatever implementation the optimizer picks is what is checked; the reports say which it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.exactness import Report, WrongStepError, compare, gradients, run, set_gradients, step_through
from benchmarks.harness.formula import Hyperparameters, follow
from benchmarks.workloads.shapes import ODD_MODEL
from benchmarks.workloads.skeleton import skeleton
from slimadam import CompressionPlan, Rule, SlimAdam, Split
from slimadam.state.rule import dimension_subsets

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (9,), (7, 5), (33, 1), (1, 40), (257, 130), (3, 5, 4), (2, 3, 4, 5))
FUSED: tuple[dict[str, Any], ...] = ({}, {"fused": True})


class NotOnThisDeviceError(Exception):
    """A check has nothing to run on this device; the message says why."""


def forms(device: str) -> Report:
    """Check every form of second moment on every shape, float32."""
    return _total(
        _run_one(shape, rule, device, torch.float32, options)
        for shape in SHAPES
        for rule, options in itertools.product(_rules(len(shape)), FUSED)
    )


def dtypes(device: str) -> Report:
    """Check every form in every precision of parameters."""
    precisions = (torch.float64, torch.bfloat16, torch.float16)
    return _total(
        _run_one(shape, rule, device, dtype, options)
        for dtype, shape in itertools.product(precisions, ((33, 70), (3, 5, 4)))
        for rule, options in itertools.product(_rules(len(shape)), FUSED)
    )


def momentum(device: str) -> Report:
    """Check every form with first moments in other precisions than the parameter's."""
    return _with_momenta(device, (torch.bfloat16, torch.float32))


def momentum_int8(device: str) -> Report:
    """Check every form with int8 first moments; blocks of 256 end in the middle of a row, and the last is not full."""
    return _with_momenta(device, ("int8",))


def amsgrad_and_maximize(device: str) -> Report:
    """Check both flags, alone and together, for every form that has a running maximum."""
    return _total(
        _run_one((33, 70), rule, device, torch.float32, options, Hyperparameters(amsgrad=amsgrad, maximize=maximize))
        for amsgrad, maximize in ((True, False), (False, True), (True, True))
        for rule, options in itertools.product(_rules(2), FUSED)
        if not (amsgrad and rule.form == "factored")
    )


def gradient_initialised(device: str) -> Report:
    """Check second moments that start at the first squared gradient, in every form."""
    hyper = Hyperparameters(variance_init="gradient")
    return _total(
        _run_one((33, 70), rule, device, torch.float32, options, hyper)
        for rule, options in itertools.product(_rules(2), FUSED)
    )


def whole_models(device: str) -> Report:
    """Check tables, matrices and vectors of odd sizes in one optimizer, as a model has them."""
    return _total(
        run(skeleton(ODD_MODEL, device, dtype), plan, options=options)
        for dtype in (torch.float32, torch.bfloat16)
        for plan, options in itertools.product((None, "rules", "factored"), FUSED)
    )


def fused_weights(device: str) -> Report:
    """Check a stored weight whose parts have rules of their own."""
    return _with_parts(device, (None, torch.bfloat16))


def fused_weights_int8(device: str) -> Report:
    """Check parts with first moments in int8, at multiples of 256 elements and not."""
    return _with_parts(device, ("int8",))


def layouts_in_memory(device: str) -> Report:
    """Check parameters that are not contiguous: transposed, channels last."""
    reports = []
    for shape, options in itertools.product(((33, 70), (6, 5, 4, 3)), FUSED):
        for rule in _rules(len(shape)):
            layer = _module(shape, device, torch.float32)
            strided = layer.w.detach().transpose(0, 1).contiguous().transpose(0, 1)
            layer.w = nn.Parameter(strided)
            reports.append(run(layer, CompressionPlan({"w": rule}), options=options))
    return _total(reports)


def empty_parameters(device: str) -> Report:
    """Check parameters without elements, beside one that has some."""
    model = skeleton({"a.weight": (0, 4), "b.weight": (7, 5), "c.weight": (3, 0)}, device)
    return _total(run(model, plan, options=options) for plan, options in itertools.product((None, "factored"), FUSED))


def tensor_learning_rate(device: str) -> Report:
    """Check the learning rate as a tensor on the device."""
    hyper = Hyperparameters()
    reports = []
    for capturable, rule, fused in itertools.product((False, True), _rules(2), FUSED):
        rate = torch.tensor(hyper.lr, device=device)
        options = {"lr": rate, "capturable": capturable, **fused}
        reports.append(_run_one((33, 70), rule, device, torch.float32, options))
    return _total(reports)


def capturable(device: str) -> Report:
    """Step counts on the device."""
    return _total(
        _run_one((33, 70), rule, device, dtype, {"capturable": True, **options})
        for dtype in (torch.float32, torch.bfloat16)
        for rule, options in itertools.product(_rules(2), FUSED)
    )


def cuda_graph(device: str) -> Report:
    """Check steps replayed from a captured graph."""
    if torch.device(device).type != "cuda":
        raise NotOnThisDeviceError("graphs are captured on CUDA alone")
    return _total(
        run(skeleton(ODD_MODEL, device), plan, options={"capturable": True, **options}, step_with=_replay)
        for plan in (None, "rules", "factored")
        for options in ({}, {"momentum_dtype": torch.bfloat16})
    )


def grad_scaler(device: str) -> Report:
    """Check that a loss scaler's infinite step changes nothing, and that finite ones are unscaled before they count."""
    return _total(
        run(skeleton(ODD_MODEL, device), plan, options=options, step_with=_scaled(device))
        for plan, options in itertools.product((None, "rules"), FUSED)
    )


def stochastic_rounding(device: str) -> Report:
    """Check bfloat16 parameters rounded at random: within one step of the grid each time, and without bias."""
    report = Report()
    hyper, steps = Hyperparameters(lr=3e-4, weight_decay=0.0), 8
    for rule, options in itertools.product(_rules(2), FUSED):
        layer = _module((512, 256), device, torch.bfloat16)
        with torch.no_grad():
            layer.w.fill_(1.0)
        start, grads = layer.w.detach().clone(), [grad.abs() for grad in gradients(layer.w, steps)]
        plan = CompressionPlan({"w": rule})
        optimizer = SlimAdam(layer, plan=plan, bf16_stochastic_round=True, **vars(hyper), **options)
        step_through(optimizer, {"w": grads})
        expected = follow(start, grads, [rule], hyper, torch.bfloat16)
        share = compare("w", start, layer.w, expected, steps, torch.bfloat16)
        bias = (layer.w.detach().cpu().double() - expected.param).mean().abs().item()
        # The grid below 1 has steps of eps / 2; rounding to one of two neighbours deviates by half of that at most.
        largest = 5 * (steps / start.numel()) ** 0.5 * torch.finfo(torch.bfloat16).eps / 2
        if bias > largest or expected.path.mean() < 4 * largest:
            raise WrongStepError(f"stochastic rounding is off by {bias:.1e} in the mean, not at most {largest:.1e}")
        report.add(Report(share))
        report.backends[optimizer.backend("w")] += 1
    return report


def as_adamw(device: str) -> Report:
    """Check that ``plan=None`` and torch's fused AdamW go the same way."""
    report, hyper = Report(), Hyperparameters()
    for dtype, options in itertools.product((torch.float32, torch.float64), FUSED):
        ours, theirs = (skeleton(ODD_MODEL, device, dtype) for _ in range(2))
        theirs.load_state_dict(ours.state_dict())
        starts = {name: param.detach().clone() for name, param in ours.named_parameters()}
        settings = {name: value for name, value in vars(hyper).items() if name != "variance_init"}
        optimizers = [
            SlimAdam(ours, plan=None, **settings, **options),
            torch.optim.AdamW(theirs.parameters(), fused=True, **settings),
        ]
        grads = {name: gradients(param, 8) for name, param in ours.named_parameters()}
        for values in zip(*grads.values(), strict=True):
            for optimizer in optimizers:
                set_gradients(optimizer, values)
                optimizer.step()
        for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            path = follow(starts[name], grads[name], [Rule()], hyper)
            expected = path._replace(param=other.detach().cpu().double())
            report.worst = max(report.worst, compare(name, starts[name], param, expected, 8, torch.float64))
            report.backends[optimizers[0].backend(param)] += 1  # type: ignore[attr-defined]
    return report


CHECKS: dict[str, Callable[[str], Report]] = {
    check.__name__: check
    for check in (
        whole_models,
        forms,
        dtypes,
        momentum,
        momentum_int8,
        amsgrad_and_maximize,
        gradient_initialised,
        fused_weights,
        fused_weights_int8,
        layouts_in_memory,
        empty_parameters,
        tensor_learning_rate,
        capturable,
        cuda_graph,
        grad_scaler,
        stochastic_rounding,
        as_adamw,
    )
}


def _rules(ndim: int) -> list[Rule]:
    """Return every form that a parameter of so many dimensions can have."""
    averages = [Rule(dims, "mean") for dims in dimension_subsets(ndim) if dims]
    return [Rule(), *averages, *([Rule(form="factored")] if ndim > 1 else [])]


def _module(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(len(shape))
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
    return module


def _run_one(
    shape: tuple[int, ...],
    rule: Rule,
    device: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    hyper: Hyperparameters | None = None,
) -> Report:
    try:
        return run(_module(shape, device, dtype), CompressionPlan({"w": rule}), hyper, options)
    except WrongStepError as error:
        raise WrongStepError(f"{error}; form {rule.form} {rule.dims}, {dict(options)}") from error


def _with_momenta(device: str, momenta: tuple[torch.dtype | str, ...]) -> Report:
    return _total(
        _run_one((33, 70), rule, device, dtype, {**options, "momentum_dtype": stored})
        for dtype, stored in itertools.product((torch.float32, torch.bfloat16), momenta)
        for rule, options in itertools.product(_rules(2), FUSED)
    )


def _with_parts(device: str, momenta: tuple[torch.dtype | str | None, ...]) -> Report:
    rules = [Rule((1,), "mean"), Rule((0,), "mean"), Rule(form="factored")]
    reports = []
    for rows, columns, stored in itertools.product((16, 5), (64, 33), momenta):
        shape = (3 * rows, columns)
        pieces = Split({"query": rows, "key": rows, "value": rows}).divide("w", shape)
        plan = CompressionPlan(
            {
                f"w[{piece.label}]": Rule(rule.dims, rule.form, piece.shape, part=piece)
                for rule, piece in zip(rules, pieces, strict=True)
            }
        )
        reports += [
            run(_module(shape, device, torch.float32), plan, options={"momentum_dtype": stored, **options})
            for options in FUSED
        ]
    return _total(reports)


def _total(reports: Iterator[Report] | list[Report]) -> Report:
    total = Report()
    for report in reports:
        total.add(report)
    return total


def _replay(optimizer: SlimAdam, grads: Mapping[str, list[Tensor]]) -> None:
    """Take three steps on a side stream to warm up, capture one (without running it), and replay all others."""
    steps = list(zip(*grads.values(), strict=True))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for values in steps[:3]:
            set_gradients(optimizer, values)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for values in steps[3:]:
        for param, value in zip(params, values, strict=True):
            param.grad.copy_(value)
        graph.replay()
    torch.cuda.synchronize()


def _scaled(device: str) -> Callable[[SlimAdam, Mapping[str, list[Tensor]]], None]:
    def step_with(optimizer: SlimAdam, grads: Mapping[str, list[Tensor]]) -> None:
        scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=1024.0)
        for index, values in enumerate(zip(*grads.values(), strict=True)):
            if index == 1:
                _infinite_step(scaler, optimizer, values)
            scaler.scale(torch.zeros((), device=device))
            set_gradients(optimizer, [value * scaler.get_scale() for value in values])
            scaler.step(optimizer)
            scaler.update()

    return step_with


def _infinite_step(scaler: torch.amp.GradScaler, optimizer: SlimAdam, values: tuple[Tensor, ...]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    set_gradients(optimizer, [torch.full_like(value, torch.inf) for value in values])
    scaler.step(optimizer)
    scaler.update()
    if not all(torch.equal(old, new) for old, new in zip(before, params, strict=True)):
        raise WrongStepError("a step with infinite gradients changed parameters under a GradScaler")
