from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness.interpreter import mend_interpreter
from slimadam.optim.step import dispatch
from tests.versions import TORCH, triton_device

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are first imported
if triton_device() == "cpu":
    mend_interpreter()
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matrix products raise

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore Ctrl-C


def pytest_configure(config: pytest.Config) -> None:
    """Let torch warn of what is its own or Python's.

    SequentialLR of torch 2.6 steps its schedules as it warns not to; Python 3.13.0 slows Dynamo down.
    """
    config.addinivalue_line("filterwarnings", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
    if TORCH < (2, 7):
        config.addinivalue_line("filterwarnings", "ignore:The epoch parameter in .scheduler.step:UserWarning")


def pytest_collection_finish() -> None:
    """Take what imports have made (some 500,000 objects) out of the collector's sight.

    An optimizer without names looks through everything alive for the modules that own its parameters: 0.1 s each time
    here, where thousands of optimizers are made.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else native libraries tell of leaks when the interpreter ends


@pytest.fixture
def device() -> str:
    """The device that Triton's kernels run on."""
    return triton_device()


@pytest.fixture
def on_triton(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which the optimizer takes Triton's kernels; on a CPU their interpreter runs them."""
    pytest.importorskip("triton", reason="Triton is only installed on Linux")
    if device == "cpu":
        monkeypatch.setattr(dispatch, "runs_triton", lambda device: True)
    return device


@pytest.fixture(autouse=True)
def _same_surroundings() -> Iterator[None]:
    """Each test starts from the same seed; uninitialised memory is NaN, so that reading it shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
