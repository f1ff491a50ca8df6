"""Launches as Triton's own launch path makes them, with a driver that ends where the GPU would begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is only installed on Linux")

pytestmark = pytest.mark.timeout(300)

SETUP = """
import json, sys, warnings
import torch, triton
from benchmarks.harness.interpreter import MockDriver
TARGETS = {"cuda": ("cuda", 90), "hip": ("hip", "gfx942")}
torch.version.hip = "6.2" if sys.argv[1] == "hip" else None
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.kernels.triton.launch import TritonStep
driver = MockDriver(*TARGETS[sys.argv[1]])
triton.runtime.driver.set_active(driver)
warnings.simplefilter("error")

def entry(*dims):
    kept = [[1 if dim in each else 64 for dim in range(2)] for each in dims]
    param, grad, exp_avg = torch.randn(3, 64, 64)
    return Entry(param, grad, exp_avg, [torch.rand(sizes) for sizes in kept], (), torch.tensor(3.0), dims)

"""


def _on_driver(script: str, backend: str = "cuda") -> Any:
    """Return what a script prints, in a process whose kernels are not interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_DEFAULT_FP_FUSION"}
    finished = subprocess.run(
        [sys.executable, "-c", SETUP + script, backend],
        capture_output=True,
        text=True,
        env={**kept, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parents[3],
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


def test_every_launch_decides_on_fusion_itself_and_none_warns() -> None:
    """Triton 3.9 warns where nothing is said, and 3.10 fuses nothing there."""
    launched = _on_driver(
        "entries = [entry(()), entry((1,)), entry((0,)), entry((1,), (0,))]\n"
        "TritonStep(entries, Hyperparameters()).run(Hyperparameters())\n"
        "print(json.dumps([(one.name, one.enable_fp_fusion, one.maxnreg) for one in driver.launched]))"
    )
    names = {name for name, _, _ in launched}
    assert names == {"advance_steps", "update_full", "update_rows", "update_spread"}
    assert all(fuses is True and registers == 255 for _, fuses, registers in launched)


@pytest.mark.skipif(metadata.version("triton").startswith("3.2."), reason="Triton 3.2 asks for ROCm's linker first")
def test_rocm_is_not_asked_for_what_only_cuda_has() -> None:
    launched = _on_driver(
        "TritonStep([entry(())], Hyperparameters()).run(Hyperparameters())\n"
        "print(json.dumps([(one.name, one.enable_fp_fusion) for one in driver.launched]))",
        "hip",
    )
    assert launched == [["advance_steps", True], ["update_full", True]]


def test_zeros_and_numbers_of_tensors_compile_nothing_anew() -> None:
    """A rate that warms up from zero; Triton would specialize on 1, multiples of 16 and what fits in 32 bits."""
    variants = _on_driver(
        "for hyper in (Hyperparameters(lr=1e-3, weight_decay=0.1), Hyperparameters(lr=0.0, weight_decay=0.1),\n"
        "              Hyperparameters(lr=1e-3, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)):\n"
        "    for count in (1, 16, 17):\n"
        "        TritonStep([entry(()) for _ in range(count)], hyper).run(hyper)\n"
        "print(json.dumps(sorted({(one.name, one.hash) for one in driver.launched})))"
    )
    assert [name for name, _ in variants] == ["advance_steps", "update_full"]


LAUNCHES = """
from slimadam.kernels.triton import kernels
launches, asked = [], []
shown = lambda one: tuple(one.shape) if isinstance(one, torch.Tensor) else str(one)
driver.launcher_cls = lambda source, options: lambda *given: launches.append(
    [source.fn.__name__, given[:3], [shown(one) for one in given[9:]]])
run = triton.runtime.JITFunction.run
triton.runtime.JITFunction.run = lambda kernel, *given, **options: (asked.append(1), run(kernel, *given, **options))[1]
step = TritonStep([entry(()), entry((1,)), entry((0,)), entry((1,), (0,))], Hyperparameters())

def steps(*hypers, **scales):
    found = []
    for hyper in hypers:
        launches.clear()
        asked.clear()
        step.run(hyper, **scales)
        found.append([len(asked), list(launches)])
    return found

"""


def test_launches_like_those_before_do_not_ask_for_the_kernel_again() -> None:
    first, again, other = _on_driver(
        LAUNCHES + "print(json.dumps(steps(Hyperparameters(), Hyperparameters(), Hyperparameters(lr=0.0, eps=1e-7))))"
    )
    assert first[0] == len(first[1]) == 4
    assert again == [0, first[1]]
    assert other[0] == 0
    assert [(name, grid) for name, grid, _ in other[1]] == [(name, grid) for name, grid, _ in first[1]]
    assert [len(given) for _, _, given in other[1]] == [len(given) for _, _, given in first[1]]


def test_arguments_of_another_kind_ask_for_their_own_kernel() -> None:
    """Numbers that become tensors, tensors that are not aligned, scales that come and go, floats of few bits."""
    found = _on_driver(
        LAUNCHES + "numbers = torch.ones(8)\n"
        "kinds = [({'lr': 1e-3}, {}), ({'lr': numbers[0]}, {}), ({'lr': numbers[1]}, {}), ({'eps': 5e-324}, {}),\n"
        "         ({}, {'grad_scale': numbers[0]}), ({}, {'grad_scale': numbers[1]}),\n"
        "         ({}, {'found_inf': numbers[0]})]\n"
        "asked_for = lambda: [steps(Hyperparameters(**hyper), **scales)[0][0] for hyper, scales in kinds]\n"
        "print(json.dumps([asked_for(), asked_for()]))"
    )
    assert found == [[4] * 7, [0] * 7]
