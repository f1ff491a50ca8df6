"""Both float64 formulas, that of the benchmarks and that of the tests, written apart, say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness.formula import Hyperparameters, follow
from slimadam import Rule
from tests.reference import gradients, slim_adamw_float64

SHAPE = (4, 3, 5)
FORMS: dict[Any, Rule] = {
    (): Rule(),
    (1,): Rule((1,), "mean"),
    (0, 2): Rule((0, 2), "mean"),
    "factored": Rule(form="factored"),
}


@pytest.mark.parametrize("options", [{"amsgrad": True, "maximize": True}, {"variance_init": "gradient"}], ids=str)
@pytest.mark.parametrize("dims", FORMS, ids=str)
def test_both_formulas_say_the_same(dims: Any, options: dict[str, Any]) -> None:
    start, grads = torch.randn(SHAPE, dtype=torch.float64), gradients(SHAPE, 6)
    hyper: dict[str, Any] = {"lr": 3e-2, "betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.2, **options}
    theirs = slim_adamw_float64(start.numpy(), [grad.numpy() for grad in grads], dims, **hyper)
    ours = follow(start, grads, [FORMS[dims]], Hyperparameters(**hyper)).param
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=6 * np.finfo(np.float64).eps * np.abs(theirs).max())
