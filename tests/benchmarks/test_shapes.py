"""The benchmarks' shapes are those of the models: published totals, names and shapes as transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.workloads.shapes import MODELS, elements
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam

# Sources: GPT-2's, Llama 3.1's and ViT's model cards, Meta's card of Llama 3.2 ("1.23B"), torchvision's table for
# ResNet-50.
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "vit-base": 86_567_656,
    "resnet50": 25_557_032,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_totals_are_the_published_ones(model: str) -> None:
    assert elements(MODELS[model]()) == PUBLISHED[model]


def _llama(t: Any, width: int, inner: int, layers: int, heads: int, tied: bool) -> nn.Module:
    config = t.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=tied,
    )
    return t.LlamaForCausalLM(config)


def _mixtral(t: Any) -> nn.Module:
    config = t.MixtralConfig(
        hidden_size=768,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        num_local_experts=8,
    )
    return t.MixtralForCausalLM(config)


BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "llama-1b": lambda t: _llama(t, 2048, 8192, 16, 32, True),
    "llama-8b": lambda t: _llama(t, 4096, 14336, 32, 32, False),
    "llama-70b": lambda t: _llama(t, 8192, 28672, 80, 64, False),
    "mixtral-small": _mixtral,
    "vit-base": lambda t: t.ViTForImageClassification(t.ViTConfig(num_labels=1000)),
    "resnet50": lambda t: t.ResNetForImageClassification(t.ResNetConfig(num_labels=1000)),
}


@pytest.mark.parametrize("model", BUILDERS)
def test_names_and_shapes_are_those_of_transformers(model: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        built = BUILDERS[model](transformers)
    assert MODELS[model]() == {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


# The paper has no rule for convolutions.
LEAST_SAVED = {**dict.fromkeys(MODELS, 0.95), "resnet50": 0.0}


@pytest.mark.parametrize("model", MODELS)
def test_rules_find_the_roles(model: str) -> None:
    optimizer = SlimAdam(skeleton(MODELS[model](), "meta"), plan="rules")
    assert [key for key, rule in optimizer.plan.items() if rule.role == "unknown"] == []
    assert optimizer.plan.second_moments_saved >= LEAST_SAVED[model]
