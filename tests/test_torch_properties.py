"""SlimAdam has the properties that PyTorch's own suite asks of AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import machine, torch_properties
from tests.torch_properties import CANNOT_APPLY, NOT_ON_A_CPU, PROPERTIES, VARIANTS, check

APPLICABLE = [(name, variant) for name in PROPERTIES for variant in VARIANTS if (name, variant) not in CANNOT_APPLY]


@pytest.mark.parametrize(("name", "variant"), APPLICABLE)
def test_property(name: str, variant: str) -> None:
    check(name, variant)


@pytest.mark.parametrize(("name", "variant"), CANNOT_APPLY)
def test_what_cannot_apply_really_fails(name: str, variant: str) -> None:
    with pytest.raises((NotImplementedError, AssertionError)):
        check(name, variant)


def test_no_property_is_excused_twice_or_unknown() -> None:
    assert not set(NOT_ON_A_CPU) & set(PROPERTIES)
    assert {name for name, _ in CANNOT_APPLY} <= set(PROPERTIES)
    assert {variant for _, variant in CANNOT_APPLY} <= set(VARIANTS)


def test_properties_notice_a_different_optimizer() -> None:
    passed = []
    for name in ("tensor_betas", "differentiable", "complex_parameters", "step_is_noop_for_zero_grads"):
        try:
            torch_properties.VARIANTS_BROKEN
        except AttributeError:
            passed.append(name)
    assert passed
