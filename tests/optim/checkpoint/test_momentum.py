"""First moments in 8 bits and in bfloat16: saved, copied, loaded and converted."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from slimadam import SlimAdam, convert_state_dict
from slimadam.state import int8
from tests.state.test_int8 import encoded, twelve_decades
from tests.state.test_momentum import MODELS, NARROW, OPTIONS, decoded, run, same_state, with_plan


def _saved(optimizer: SlimAdam) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", ["auto", "factored, reference", "foreach"])
@pytest.mark.parametrize("stopped_at", [0, 2, 4])
def test_resumed_training_is_bitwise_the_same(option: str, kind: str, momentum_dtype: Any, stopped_at: int) -> None:
    model = MODELS[kind]()
    options = with_plan(model, kind, OPTIONS[option])
    optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **options)
    run(model, optimizer, range(stopped_at))
    resumed, saved = copy.deepcopy(model), _saved(optimizer)
    other = SlimAdam(resumed, momentum_dtype=momentum_dtype, **options)
    other.load_state_dict(saved)
    run(model, optimizer, range(stopped_at, 7))
    run(resumed, other, range(stopped_at, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert same_state(optimizer, other)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_train_on_as_the_original(copied: Any, momentum_dtype: Any) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan="factored", momentum_dtype=momentum_dtype)
    run(model, optimizer, range(2))
    other, its_optimizer = copied((model, optimizer))
    run(model, optimizer, range(2, 5))
    run(other, its_optimizer, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer, its_optimizer)


@pytest.mark.parametrize("before", [None, *NARROW], ids=str)
@pytest.mark.parametrize("after", [None, *NARROW], ids=str)
def test_checkpoints_load_whatever_their_momentum_was_stored_in(before: Any, after: Any) -> None:
    model = MODELS["matrix"]()
    source = SlimAdam(model, plan="factored", momentum_dtype=before)
    run(model, source, range(3))
    target = SlimAdam(model, plan="factored", momentum_dtype=after)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["momentum_dtype"] == after
    for param in model.parameters():
        kept, loaded = decoded(source.state[param]), target.state[param]
        if after == "int8" and before != "int8":
            assert torch.equal(loaded["exp_avg_codes"], encoded(kept.float(), kept.float())[0])
        elif after != "int8":
            assert not {"exp_avg_codes", "exp_avg_scale"} & set(loaded)
            assert torch.equal(loaded["exp_avg"], kept.to(after or torch.float32))
        else:
            assert torch.equal(decoded(loaded), kept)
    assert target.memory().total == sum(tensor.nbytes for state in target.state.values() for tensor in state.values())
    run(model, target, range(3, 4))


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_to_adamw_and_back(dtype: torch.dtype, momentum_dtype: Any) -> None:
    params = [torch.randn(7, 50, dtype=dtype).requires_grad_()]
    optimizer = SlimAdam(params, plan=None, momentum_dtype=momentum_dtype)
    for _ in range(3):
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()
    adamw = torch.optim.AdamW(params)
    adamw.load_state_dict(optimizer.adamw_state_dict())
    adamw.step()
    adamw_state = adamw.state[params[0]]
    assert adamw_state["exp_avg"].dtype == dtype
    assert not {"exp_avg_codes", "exp_avg_scale"} & set(adamw_state)
    optimizer.load_state_dict(adamw.state_dict())
    real = torch.view_as_real if dtype.is_complex else torch.Tensor.detach
    exact, loaded = real(adamw_state["exp_avg"]), decoded(optimizer.state[params[0]])
    if momentum_dtype == "int8":
        expected = int8.decode(*encoded(exact.float(), exact.float()))
        assert torch.equal(loaded, expected)
    else:
        assert torch.equal(real(loaded), exact.to(real(loaded).dtype))
    optimizer.step()


def test_codes_in_another_layout_are_put_in_order() -> None:
    value = torch.randn(8, 16, 3, 3)
    source = [value.clone().requires_grad_()]
    optimizer = SlimAdam(source, plan=None, momentum_dtype="int8")
    source[0].grad = twelve_decades(value.numel()).view_as(value)
    optimizer.step()
    target = [value.to(memory_format=torch.channels_last).requires_grad_()]
    other = SlimAdam(target, plan=None, momentum_dtype="int8")
    other.load_state_dict(optimizer.state_dict())
    kept = decoded(optimizer.state[source[0]])
    state = other.state[target[0]]
    assert state["exp_avg_codes"].stride() == target[0].stride()
    expected = encoded(kept.to(memory_format=torch.channels_last), kept)
    assert torch.equal(state["exp_avg_codes"], expected[0])
    assert torch.equal(state["exp_avg_scale"], expected[1])


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
def test_convert_state_dict_keeps_the_first_moment(momentum_dtype: Any) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan="factored", momentum_dtype=momentum_dtype)
    run(model, optimizer, range(3))
    other = SlimAdam(model, plan=None, momentum_dtype=momentum_dtype)
    other.load_state_dict(convert_state_dict(optimizer.state_dict(), None))
    for param in model.parameters():
        assert torch.equal(decoded(optimizer.state[param]), decoded(other.state[param]))


WRONG_STATES: dict[str, Any] = {
    "exp_avg_scale is torch.uint8 of shape \\(1,\\), 561 codes need torch.uint8 of shape \\(3,\\)": lambda state: {
        "exp_avg_scale": state["exp_avg_scale"][:1]
    },
    "exp_avg_scale is torch.float32 of shape \\(3,\\)": lambda state: {"exp_avg_scale": state["exp_avg_scale"].float()},
    "has an exp_avg_scale, but its exp_avg is torch.float32": lambda state: {
        "exp_avg_codes": state["exp_avg_codes"].float()
    },
    "exp_avg has shape \\(561,\\), the parameter \\(17, 33\\)": lambda state: {
        "exp_avg_codes": state["exp_avg_codes"].flatten()
    },
    "exp_avg_scale holds NoneType, not a dense": lambda state: {"exp_avg_scale": None},
}


@pytest.mark.parametrize("message", WRONG_STATES)
def test_wrong_codes_are_refused_and_nothing_is_changed(message: str) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan=None, momentum_dtype="int8")
    run(model, optimizer, range(2))
    before, wrong = copy.deepcopy(optimizer), _saved(optimizer)
    wrong["state"][0] |= WRONG_STATES[message](wrong["state"][0])
    with pytest.raises(ValueError, match=f"'weight'.*{message}"):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer, before)


@pytest.mark.parametrize("version", [1, 2])
def test_codes_saved_under_exp_avg_still_load(version: int) -> None:
    """As before state dicts told codes from first moments."""
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan=None, momentum_dtype="int8")
    run(model, optimizer, range(3))
    saved = _saved(optimizer)
    saved["slimadam"]["format_version"] = version
    for state in saved["state"].values():
        state["exp_avg"] = state.pop("exp_avg_codes")
    other = SlimAdam(model, plan=None, momentum_dtype="int8")
    other.load_state_dict(saved)
    assert same_state(optimizer, other)
    wide = SlimAdam(model, plan=None)
    wide.load_state_dict(saved)
    for param in model.parameters():
        assert torch.equal(wide.state[param]["exp_avg"], decoded(optimizer.state[param]))


def test_codes_without_scales_are_refused() -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan=None, momentum_dtype="int8")
    run(model, optimizer, range(2))
    wrong = _saved(optimizer)
    del wrong["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="'weight': the state dict's exp_avg_codes holds int8 codes, but it has no"):
        optimizer.load_state_dict(wrong)
