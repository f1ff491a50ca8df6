"""Fused weights: the parts are found, each is updated by its own rule, and their state survives every way out."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimadam import (
    AutoPlan,
    CompressionPlan,
    PlanError,
    SlimAdam,
    SNRHistory,
    SNRRecorder,
    Split,
    convert_state_dict,
    every,
)
from slimadam.layers.splits import Part, check_parts, pieces_of
from slimadam.state.rule import Rule
from tests.reference import gradients, second_moments, slim_adamw_float64

WIDTH = 12


class Attention(nn.Module):
    """What ``fused_qkv`` is found in: the names and attributes of common implementations."""

    def __init__(self, out: int, fused: str = "qkv_proj", **attributes: int) -> None:
        super().__init__()
        self.add_module(fused, nn.Linear(WIDTH, out, bias=False))
        for name, value in attributes.items():
            setattr(self, name, value)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention


def _transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    if kind == "gpt2":
        return transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=32))
    if kind == "gpt_neox":
        return transformers.GPTNeoXModel(transformers.GPTNeoXConfig(intermediate_size=32, **sizes))
    if kind == "phi3":
        config = transformers.Phi3Config(intermediate_size=24, num_key_value_heads=2, pad_token_id=0, **sizes)
        return transformers.Phi3Model(config)
    config = transformers.MixtralConfig(intermediate_size=24, num_key_value_heads=2, num_local_experts=3, **sizes)
    return transformers.MixtralModel(config)


def _found(model: nn.Module, ending: str) -> list[tuple[str, tuple[int, ...], int, int, int]]:
    (parts,) = (found for name, found in pieces_of(model, {}).items() if name.endswith(ending))
    return [
        (piece.role.role, piece.shape, piece.part.dim, piece.part.start, piece.batch_dims)
        for piece in parts
        if piece.part
    ]


def test_torchs_attention_is_three_matrices() -> None:
    assert _found(nn.MultiheadAttention(WIDTH, 3), "in_proj_weight") == [
        ("query", (12, 12), 0, 0, 0),
        ("key", (12, 12), 0, 12, 0),
        ("value", (12, 12), 0, 24, 0),
    ]


def test_grouped_queries_are_unequal_parts() -> None:
    model = Block(Attention(12 + 2 * 6, num_heads=4, num_key_value_heads=2))
    assert _found(model, "qkv_proj.weight") == [
        ("query", (12, 12), 0, 0, 0),
        ("key", (6, 12), 0, 12, 0),
        ("value", (6, 12), 0, 18, 0),
    ]


@pytest.mark.parametrize(
    "attention",
    [
        Attention(25, num_heads=5),  # not three times anything
        Attention(24, num_heads=4, num_key_value_heads=2, head_dim=5),  # the module says another size
        Attention(36, num_heads=4, num_key_value_heads=3),
    ],
)
def test_a_fused_weight_that_does_not_say_how_stays_one_matrix(attention: nn.Module) -> None:
    (pieces,) = pieces_of(Block(attention), {}).values()
    assert [(piece.part, piece.role.role) for piece in pieces] == [(None, "fused_qkv")]


def test_transposed_storage_is_divided_along_its_outputs() -> None:
    assert _found(_transformers_model("gpt2"), "c_attn.weight") == [
        ("query", (16, 16), 1, 0, 0),
        ("key", (16, 16), 1, 16, 0),
        ("value", (16, 16), 1, 32, 0),
    ]
    pieces = pieces_of(_transformers_model("gpt2"), {})["h.0.attn.c_attn.weight"]
    assert (pieces[0].role.fan_in, pieces[0].role.fan_out) == ((0,), (1,))


def test_parts_interleaved_by_head() -> None:
    assert _found(_transformers_model("gpt_neox"), "query_key_value.weight") == [
        ("query", (4, 1, 4, 16), 1, 0, 2),
        ("key", (4, 1, 4, 16), 1, 1, 2),
        ("value", (4, 1, 4, 16), 1, 2, 2),
    ]


def test_interleaved_parts_are_those_that_the_model_computes_with() -> None:
    model = _transformers_model("gpt_neox")
    layer = model.layers[0].attention
    name = "layers.0.attention.query_key_value.weight"
    x = torch.randn(1, 5, 16)
    seen = {}
    layer.query_key_value.register_forward_hook(lambda module, args, out: seen.update(fused=out))
    layer.query_key_value.bias.data.zero_()
    layer.query_key_value(x)
    heads = seen["fused"].view(1, 5, 4, 3 * 4)  # the model's own reading: head first, then q, k, v in it
    for index, piece in enumerate(pieces_of(model, {})[name]):
        matrix = piece.part.take(layer.query_key_value.weight).reshape(16, 16)
        expected = heads[..., index * 4 : (index + 1) * 4].reshape(1, 5, 16)
        torch.testing.assert_close(x @ matrix.T, expected)


def test_gate_and_up_projections_and_stacked_experts() -> None:
    phi = _transformers_model("phi3")
    assert _found(phi, "gate_up_proj.weight") == [("mlp_gate", (24, 16), 0, 0, 0), ("mlp_up", (24, 16), 0, 24, 0)]
    assert _found(phi, "qkv_proj.weight") == [
        ("query", (16, 16), 0, 0, 0),
        ("key", (8, 16), 0, 16, 0),
        ("value", (8, 16), 0, 24, 0),
    ]
    mixtral = _transformers_model("mixtral")
    assert _found(mixtral, "gate_up_proj") == [("mlp_gate", (3, 24, 16), 1, 0, 1), ("mlp_up", (3, 24, 16), 1, 24, 1)]
    (down,) = (found for name, found in pieces_of(mixtral, {}).items() if name.endswith("experts.down_proj"))
    assert [(piece.role.role, piece.shape, piece.batch_dims) for piece in down] == [("mlp_down", (3, 16, 24), 1)]


CASES: dict[str, tuple[tuple[int, ...], Split, list[tuple[str, tuple[int, ...]]]]] = {
    "rows": ((9, 5), Split({"a": 2, "b": 3, "c": 4}), [("mean", (1,)), ("mean", (0,)), ("factored", ())]),
    "columns": ((6, 10), Split({"a": 4, "b": 6}, dim=1), [("mean", (0,)), ("full", ())]),
    "heads": ((12, 5), Split({"heads": 3}, view=(3, 4, 5), batch_dims=1), [("factored", ())]),
    "heads, averaged": ((12, 5), Split({"heads": 3}, view=(3, 4, 5), batch_dims=1), [("mean", (1, 2))]),
    "interleaved": ((24, 5), Split({"q": 1, "k": 1}, 1, (3, 2, 4, 5), 2), [("factored", ()), ("mean", (0, 2))]),
    "experts": ((3, 8, 5), Split({"gate": 4, "up": 4}, 1, None, 1), [("factored", ()), ("mean", (0, 1))]),
}  # fmt: skip


def _plan(shape: tuple[int, ...], parts: Split, forms: list[tuple[str, tuple[int, ...]]]) -> CompressionPlan:
    rules = [
        Rule(dims, form, part.shape, part=part, batch_dims=parts.batch_dims)  # type: ignore[arg-type]
        for part, (form, dims) in zip(parts.divide("w", shape), forms, strict=True)
    ]
    return CompressionPlan.of_parameters({"w": rules})


def _expected(shape: tuple[int, ...], plan: CompressionPlan, start: Any, grads: list[Any], **options: Any) -> Any:
    """Each part of each separate matrix stepped on its own by the float64 formula."""
    whole = torch.empty(shape, dtype=torch.float64)
    for rule in plan.values():
        target, first, taken = rule.take(whole), rule.take(start), [rule.take(grad) for grad in grads]
        if rule.form == "factored":
            for index in np.ndindex(*target.shape[: rule.batch_dims]):
                one = slim_adamw_float64(first[index].numpy(), [g[index].numpy() for g in taken], "factored", **options)
                target[index] = torch.from_numpy(one)
        else:
            stepped = slim_adamw_float64(first.numpy(), [grad.numpy() for grad in taken], rule.dims, **options)
            target.copy_(torch.from_numpy(stepped))
    return whole


OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fused", [None, False])
def test_each_part_steps_as_if_it_were_alone(case: str, dtype: torch.dtype, fused: bool | None) -> None:
    shape, parts, forms = CASES[case]
    plan = _plan(shape, parts, forms)
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, STEPS)
    start, grads = start.to(dtype).double(), [grad.to(dtype).double() for grad in grads]
    param = start.to(dtype).clone().requires_grad_()
    optimizer = SlimAdam([("w", param)], plan=plan, fused=fused, **OPTIONS)  # type: ignore[arg-type]
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    # A few roundings a step, on values up to lr * steps + |p|.
    tolerance = 8 * STEPS * torch.finfo(dtype).eps * (start.abs().max().item() + OPTIONS["lr"] * STEPS)
    expected = _expected(shape, plan, start, grads, **OPTIONS)
    assert (param.detach().double() - expected).abs().max().item() <= tolerance
    assert optimizer.memory().second_moments_saved == plan.second_moments_saved > 0
    assert sum(moment.numel() for moment in second_moments(optimizer.state[param])) == plan.second_moments[0]


@pytest.mark.parametrize("case", CASES)
def test_the_direction_of_a_part_is_that_of_its_step(case: str) -> None:
    shape, parts, forms = CASES[case]
    param = torch.randn(shape, dtype=torch.float64).requires_grad_()
    optimizer = SlimAdam([("w", param)], plan=_plan(shape, parts, forms), **OPTIONS)  # type: ignore[arg-type]
    for grad in gradients(shape, 3):
        param.grad = grad
        before = param.detach().clone()
        ((_, direction),) = optimizer.update_direction()
        optimizer.step()
        torch.testing.assert_close(param.detach(), before - OPTIONS["lr"] * direction, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make_grad", [lambda grad: grad, lambda grad: grad.mT.contiguous().mT])
def test_strides_of_the_gradient_do_not_matter(case: str, make_grad: Callable[[Any], Any]) -> None:
    shape, parts, forms = CASES[case]
    results = []
    for change in (lambda grad: grad, make_grad):
        param = torch.ones(shape, dtype=torch.float64).requires_grad_()
        optimizer = SlimAdam([("w", param)], plan=_plan(shape, parts, forms))
        for grad in gradients(shape, 3):
            param.grad = change(grad)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_parts(case: str) -> None:
    shape, parts, forms = CASES[case]
    plan = _plan(shape, parts, forms)
    grads = gradients(shape, 6)

    def run(optimizer: torch.optim.Optimizer, param: torch.Tensor, chosen: list[Any]) -> None:
        for grad in chosen:
            param.grad = grad
            optimizer.step()

    param = torch.ones(shape, dtype=torch.float64).requires_grad_()
    optimizer = SlimAdam([("w", param)], plan=plan)
    run(optimizer, param, grads[:3])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copy = param.detach().clone().requires_grad_()
    resumed = SlimAdam([("w", copy)], plan=plan)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(optimizer, param, grads[3:])
    run(resumed, copy, grads[3:])
    assert torch.equal(param, copy)

    # To AdamW and back: what is spread out evenly averages to itself.
    adamw = torch.optim.AdamW([copy])
    adamw.load_state_dict(resumed.adamw_state_dict())
    assert adamw.state[copy]["exp_avg_sq"].shape == shape
    again = SlimAdam([("w", copy)], plan=plan)
    again.load_state_dict(adamw.state_dict())
    assert list(resumed.state[copy]) == list(again.state[copy])
    held = [second_moments(owner.state[copy]) for owner in (resumed, again)]
    for first, second in zip(*held, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)

    full = convert_state_dict(resumed.state_dict(), None)
    assert full["state"][0]["exp_avg_sq"].shape == shape
    SlimAdam([("w", copy)], plan=plan).load_state_dict(convert_state_dict(full, plan))


def test_auto_measures_each_part_and_decides_for_each() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, 3, bias=False)
    weight = model.in_proj_weight
    optimizer = SlimAdam(model.parameters(), plan=AutoPlan(calibration_steps=10, forms="mean"))
    # Queries differ from row to row, keys from column to column, values everywhere.
    rows, columns = torch.logspace(-2, 2, WIDTH)[:, None], torch.logspace(-2, 2, WIDTH)[None, :]
    scale = torch.cat([rows.expand(12, 12), columns.expand(12, 12), torch.rand(12, 12).pow(8)])
    for _ in range(10):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        weight.grad = torch.sign(torch.randn(36, 12)) * scale
        optimizer.step()
    name = next(name for name in optimizer.plan if name.endswith("[query]")).removesuffix("[query]")
    chosen = {label: optimizer.plan[f"{name}[{label}]"].dims for label in ("query", "key", "value")}
    assert chosen == {"query": (1,), "key": (0,), "value": ()}
    assert [tuple(part.shape) for part in second_moments(optimizer.state[weight])] == [(12, 1), (1, 12), (12, 12)]
    with pytest.raises(KeyError, match=r"the plan has its parts"):
        optimizer.plan[name]


@pytest.mark.parametrize("interrupted_at", [4, 10, 13])
def test_auto_with_parts_resumes_bitwise(interrupted_at: int) -> None:
    settings = AutoPlan(calibration_steps=10, measurements=3)

    def start() -> tuple[nn.Module, SlimAdam]:
        torch.manual_seed(0)
        model = nn.MultiheadAttention(WIDTH, 3)
        return model, SlimAdam(model, plan=settings)

    def run(model: nn.Module, optimizer: SlimAdam, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()

    model, optimizer = start()
    run(model, optimizer, range(20))
    other, stopped = start()
    run(other, stopped, range(interrupted_at))
    third, resumed = start()
    third.load_state_dict(other.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    run(third, resumed, range(interrupted_at, 20))
    assert resumed.plan == optimizer.plan
    for expected, found in zip(model.parameters(), third.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_declared_heads_are_measured_head_by_head() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    heads = Split({"heads": 4}, view=(4, 2, 6), batch_dims=1)
    recorder = SNRRecorder(optimizer, model, every(1), parts={"0.weight": heads})
    model[0].weight.grad = torch.arange(1.0, 5).repeat_interleave(2)[:, None] * torch.tensor([1.0, -1] * 3)
    optimizer.step()
    plan = CompressionPlan.from_snr(recorder.history)
    assert plan["0.weight[heads]"].dims == (1, 2)
    assert plan.second_moments == (4, 48)
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    SlimAdam(model, plan=plan).step()


def test_rules_of_the_paper_apply_to_each_part() -> None:
    model = nn.MultiheadAttention(WIDTH, 3)
    assert {
        key.partition("[")[2]: rule.dims for key, rule in CompressionPlan.from_rules(model).items() if rule.part
    } == {"query]": (1,), "key]": (1,), "value]": (0,)}


WRONG: dict[str, tuple[Split, str]] = {
    "too short": (Split({"a": 3, "b": 4}), "'w': its parts cover 7 of 8 along dimension 0"),
    "no such dimension": (Split({"a": 8}, dim=2), "dim=2 of its parts is out of range"),
    "merging view": (Split({"a": 48}, view=(48,)), r"view=\(48,\) must split dimensions of the parameter's shape"),
    "other size": (Split({"a": 8}, view=(8, 7)), r"view=\(8, 7\) must split"),
    "empty part": (Split({"a": 8, "b": 0}), "its part 'b' starts at 8 with size 0"),
    "nothing": (Split({}), "its parts cover 0 of 8"),
    "label": (Split({"a[0]": 8}), r"the label 'a\[0\]' of its parts must be a word without brackets"),
    "batch": (Split({"a": 8}, batch_dims=1), "batch_dims=1 of its parts must leave a matrix of the view"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    parts, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        SlimAdam([("w", torch.ones(8, 6, requires_grad=True))], plan=AutoPlan(parts={"w": parts}))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    plan = AutoPlan(parts={"v": Split({"a": 8})})
    with pytest.raises(PlanError, match="parts: the pattern 'v' matches no parameter"):
        SlimAdam([("w", torch.ones(8, 6, requires_grad=True))], plan=plan)
    with pytest.raises(PlanError, match="parts: the pattern 'v' matches no parameter"):
        SlimAdam(nn.Linear(6, 8), plan=plan)


def test_parts_of_a_plan_must_be_the_whole_parameter() -> None:
    plan = _plan(*CASES["rows"])
    missing = CompressionPlan({key: rule for key, rule in plan.items() if key != "w[b]"})
    with pytest.raises(PlanError, match="'w': its part 'c' starts at 5 with size 4, where 2 is next"):
        SlimAdam([("w", torch.ones(9, 5, requires_grad=True))], plan=missing)
    with pytest.raises(PlanError, match=r"'w': the plan's parts are of shape \(9, 5\), the parameter has \(9, 6\)"):
        SlimAdam([("w", torch.ones(9, 6, requires_grad=True))], plan=plan)
    twice = [Part("a", (4, 2), (4, 2), 0, 0, 2), Part("a", (4, 2), (4, 2), 0, 2, 2)]
    with pytest.raises(PlanError, match="two of its parts have the same label"):
        check_parts("w", twice, (4, 2))


def test_parts_of_transposed_memory_step_as_of_any_other() -> None:
    shape, parts, forms = CASES["heads"]
    results = []
    for memory in (lambda x: x, lambda x: x.T.contiguous().T):
        param = memory(torch.ones(shape, dtype=torch.float64)).requires_grad_()
        optimizer = SlimAdam([("w", param)], plan=_plan(shape, parts, forms))
        for grad in gradients(shape, 3):
            param.grad = memory(grad)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)


UNDIVIDED: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "complex": (torch.complex64, {}, "a torch.complex64 parameter cannot be stored in parts"),
    "differentiable": (torch.float32, {"differentiable": True}, "a group with differentiable=True cannot be stored"),
}


@pytest.mark.parametrize("case", UNDIVIDED)
@pytest.mark.parametrize("plan", ["auto", "factored", "rules"])
def test_what_cannot_be_divided_counts_as_one_matrix(case: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    dtype, options, message = UNDIVIDED[case]
    model = nn.MultiheadAttention(WIDTH, 3, dtype=dtype)
    optimizer = SlimAdam(model, plan=plan, **options)
    assert optimizer.plan["in_proj_weight"].part is None
    if case == "differentiable":
        assert message in caplog.text
    divided = CompressionPlan.from_rules(nn.MultiheadAttention(WIDTH, 3))
    with pytest.raises(PlanError, match=message):
        SlimAdam(model, plan=divided, **options)


def test_the_order_of_the_parts_in_a_file_does_not_matter() -> None:
    shape, parts, _ = CASES["rows"]
    plan = _plan(shape, parts, [("mean", (1,))] * 3)
    turned = CompressionPlan(dict(reversed(list(plan.items()))))
    results = []
    for chosen in (plan, turned):
        param = torch.ones(shape, dtype=torch.float64).requires_grad_()
        optimizer = SlimAdam([("w", param)], plan=plan)
        for step, grad in enumerate(gradients(shape, 6)):
            if step == 3:
                resumed = SlimAdam([("w", param)], plan=chosen)
                resumed.load_state_dict(convert_state_dict(optimizer.state_dict(), chosen))
                resumed.load_state_dict(optimizer.state_dict())
                optimizer = resumed
            param.grad = grad
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_keeping_a_weight_keeps_its_parts() -> None:
    history = _history_of(nn.MultiheadAttention(WIDTH, 3))
    every_part = {f"in_proj_weight[{label}]" for label in ("query", "key", "value")}
    for pattern, expected in {
        "in_proj_weight": every_part,
        "in_*weight": every_part,
        "in_proj_weight[key]": {"in_proj_weight[key]"},
        "value": {"in_proj_weight[value]"},
    }.items():
        plan = CompressionPlan.from_snr(history, 0.0, forms="best", keep=[pattern])
        kept = {key for key, rule in plan.items() if rule.reason.startswith("kept in full as asked")}
        assert kept == expected


def _history_of(model: nn.Module) -> SNRHistory:
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = SNRRecorder(optimizer, model, every(1))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return recorder.history


def test_histories_keep_parts_through_a_file(tmp_path: Path) -> None:
    model = _transformers_model("mixtral")
    history = _history_of(model)
    history.save_csv(tmp_path / "snr.csv")
    loaded = SNRHistory.load_csv(tmp_path / "snr.csv")
    plan, again = (CompressionPlan.from_snr(found, forms="best") for found in (history, loaded))
    assert {key: (rule.form, rule.dims, rule.part, rule.batch_dims) for key, rule in again.items()} == {
        key: (rule.form, rule.dims, rule.part, rule.batch_dims) for key, rule in plan.items()
    }
    assert any(rule.batch_dims for rule in again.values())
    assert [rule.role for rule in again.values() if rule.part] == [rule.role for rule in plan.values() if rule.part]


def test_a_wrapped_projection_is_divided_as_its_owner_says() -> None:
    model = Block(Attention(12 + 2 * 6, num_heads=4, num_key_value_heads=2))
    wrapper = nn.Module()
    wrapper._orig_mod = model.attn.qkv_proj  # as torch.compile wraps it
    model.attn.qkv_proj = wrapper
    ((name, pieces),) = pieces_of(model, {}).items()
    assert [piece.shape for piece in pieces] == [(12, 12), (6, 12), (6, 12)], name


def test_an_empty_fused_weight_is_one_piece() -> None:
    model = Block(Attention(36, num_heads=4))
    model.attn.qkv_proj.weight = nn.Parameter(torch.empty(0, WIDTH))
    (pieces,) = pieces_of(model, {}).values()
    assert [piece.part for piece in pieces] == [None]


class Unusual(nn.Module):
    """A module of others: its parameters are not where torch has them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 3)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((f"model.{name}", param) for name, param in self.inner.named_parameters())


class Broken(nn.Module):
    def parameters(self, recurse: bool = True) -> Any:
        raise RuntimeError("not now")


def test_unusual_modules_do_not_get_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    unusual, broken = Unusual(), Broken()
    optimizer = SlimAdam(unusual, plan="factored")
    assert "the layers of Unusual cannot be told from its modules" in caplog.text
    assert optimizer.plan["model.in_proj_weight"].form == "factored"
    assert broken is not None


def test_declared_parts_of_one_of_two_groups_and_of_a_submodule() -> None:
    first, second = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
    plan = AutoPlan(parts={"a.weight": Split({"x": 4, "y": 4})})
    groups = [{"params": [("a.weight", first.weight)]}, {"params": [("b.weight", second.weight)]}]
    assert list(SlimAdam(groups, plan=plan)._registry.measured["a.weight"]) != []
    model = Block(Attention(25, num_heads=5))
    plan = AutoPlan(parts={"qkv_proj.weight": Split({"x": 5, "y": 20})})
    optimizer = SlimAdam(model.attn.named_parameters(), plan=plan)
    assert [rule.part.label for rule in optimizer._registry.measured["qkv_proj.weight"]] == ["x", "y"]


def test_a_wrapped_model_has_the_same_parts(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.MultiheadAttention(WIDTH, 3)
    plan = CompressionPlan.from_rules(model)
    wrapped = nn.Module()
    wrapped.module = model
    with caplog.at_level(logging.WARNING):
        optimizer = SlimAdam(wrapped, plan=plan)
    assert not caplog.records
    assert {key: rule.dims for key, rule in optimizer.plan.items()} == {key: rule.dims for key, rule in plan.items()}
