"""plan="rules" says once what it leaves in full, and why, where that is much of a model."""

from __future__ import annotations

import pytest
from torch import nn

from slimadam import SlimAdam


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "plan='rules' leaves" in record.getMessage()]


def test_matrices_without_a_rule_are_named_once_with_share_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(4)))
    groups = [{"params": list(layer.named_parameters(f"{index}"))} for index, layer in enumerate(model)]
    optimizer = SlimAdam(groups, plan="rules")
    (message,) = _messages(caplog)
    assert "second moments of these weights in full, 91% of all elements" in message
    assert (
        "without model=model nothing tells what these are: 4 weights (0.weight, 1.weight, 2.weight, ...); plan='auto'"
        in message
    )
    assert "plan='auto' measures them, plan='factored'" in message
    assert caplog.records[-1].levelname == "WARNING"
    optimizer.add_param_group({"params": [("more.weight", nn.Linear(10, 10).weight)]})
    assert len(_messages(caplog)) == 1


def test_convolutions_have_no_rule(caplog: pytest.LogCaptureFixture) -> None:
    SlimAdam(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), plan="rules")
    (message,) = _messages(caplog)
    assert "the paper has no rule for 2 weights (0.weight, 2.weight); plan='auto'" in message


def test_both_reasons_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    SlimAdam(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8)), plan="rules")
    (message,) = _messages(caplog)
    assert "the paper has no rule for 1 weight (0.weight); neither name nor model tells what these are: 2 w" in message


def test_positions_are_no_names(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    SlimAdam(model.parameters(), plan="rules")
    (message,) = _messages(caplog)
    assert (
        "without model=model nothing tells what these are: 1 weight (param_groups.0.params.0); plan='auto'" in message
    )


@pytest.mark.parametrize("plan", ["factored", "auto", None])
def test_other_plans_say_nothing(plan: str | None, caplog: pytest.LogCaptureFixture) -> None:
    SlimAdam(nn.Sequential(nn.Linear(10, 10)), plan=plan)
    assert not _messages(caplog)


def test_language_models_have_rules(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=64))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    for model in (gpt2, llama):
        SlimAdam(model, plan="rules")
        SlimAdam(model.named_parameters(), plan="rules")
    assert not _messages(caplog)
