"""The GPU run on a CPU with tiny sizes, and that what it relies on can tell right from wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import run as gpu
from benchmarks.gpu import stages as gpu_stages
from benchmarks.gpu import training
from benchmarks.gpu.checks import CHECKS, NotOnThisDeviceError
from benchmarks.gpu.page import page
from benchmarks.gpu.stages import LONGER, RULES, STAGES, NotApplicable, Settings, Stage, missing_rows, speed_bars
from benchmarks.harness import comparison, machine, stopwatch
from benchmarks.harness.contenders import FUSED, PEERS, Contender, ours, torch_own
from benchmarks.harness.exactness import WrongStepError
from benchmarks.harness.formula import Hyperparameters, follow
from benchmarks.speed import memory, throughput
from benchmarks.workloads.shapes import gpt2_small, tiny
from slimadam import Rule, SlimAdam

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings("cpu", quick=True)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """The models that are timed are too small to share out: on a busy machine threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python in a copy of the repository, beside all that is installed here but the package itself."""
    repository, others = (tmp_path_factory.mktemp(name) for name in ("repository", "others"))
    for folder in ("benchmarks", "slimadam", "kernels"):
        left_out = shutil.ignore_patterns("kernels", "results", "__pycache__")
        shutil.copytree(ROOT / folder, repository / folder, ignore=left_out)
    folders = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    for installed in {one.name: one for folder in reversed(folders) for one in folder.iterdir()}.values():
        if "slimadam" not in installed.name.lower():
            (others / installed.name).symlink_to(installed)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (repository, others)))}
    environment["OMP_NUM_THREADS"] = "1"  # models are tiny: on a busy machine threads would only wait for each other

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        # Without site, nothing that an editable installation has set up is there.
        command = [sys.executable, "-S", "-W", "error", *arguments]
        return subprocess.run(
            command, cwd=repository, env={**environment, **variables}, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.timeout(600)
def test_the_repository_alone_is_enough(bare: Run, tmp_path: Path) -> None:
    ran = bare("-m", "benchmarks.gpu", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["everything passed"]), ran.stdout + ran.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["versions"]["slimadam"] is None, "the package is installed there"
    stages = results["stages"]
    assert list(stages) == list(STAGES)
    for item in stages["throughput"].values():
        assert (set(item["rows"]), item["left_out"]) == ({"AdamW (fused)", RULES}, {})
    rows = stages["throughput"]["tiny, float32"]["rows"]
    assert rows["AdamW (fused)"]["moved_bytes_per_parameter"] == pytest.approx(28, abs=0.01)
    (item,) = stages["memory"].values()
    measured = [(row["optimizer"], row["in_backward"]) for row in item["rows"] if row["held"]]
    ways = ["rules", "rules, bfloat16 momentum", "rules, int8 momentum", "rules, int8 momentum, no monitor"]
    labels = ["AdamW", *(f"SlimAdam ({way})" for way in ways)]
    assert (measured, item["left_out"]) == ([(label, late) for label in labels for late in (False, True)], {})
    losses = {item["label"]: item["losses"] for item in stages["short_training"].values()}
    assert losses["SlimAdam (auto)"][:3] == pytest.approx(losses["AdamW (fused)"][:3], rel=1e-4)
    assert results["to_come"] == []
    page = (tmp_path / "results.md").read_text()
    assert "Everything passed." in page
    assert all(f"## {name}" in page for name in ("Checks", "Throughput", "Clipping", "Memory", "Short training"))


@pytest.mark.timeout(600)
def test_the_repository_alone_trains_in_several_calls(bare: Run, tmp_path: Path) -> None:
    command = ["-m", "benchmarks.gpu", "--stage", "training", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    short = bare(*command, "--seconds", "1", "--state", str(tmp_path / "state"))  # less than the start takes
    assert short.returncode == 3, short.stdout + short.stderr
    assert "- not begun: SlimAdam (factored), lr 0.0018" in (tmp_path / "training.md").read_text()
    ran = bare(*command, "--state", str(tmp_path / "state"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    items = json.loads((tmp_path / "training.json").read_text())["items"]
    assert [(item["label"], item["lr"]) for item in items.values()] == [
        (label, lr) for label in training.LONG.labels for lr in (6e-4, 1.8e-3)
    ]
    for item in items.values():
        assert [step for step, _ in item["held_out"]] == [4, 8, 12]
        assert len(item["losses"]) == 12
        assert 3 < item["held_out"][2][1] < item["held_out"][0][1] < 6
    assert "| held-out loss at step | 4 | 8 | 12 |" in (tmp_path / "training.md").read_text()


IDENTITY = """
import sys
from benchmarks.speed import launch_settings
import slimadam
from slimadam import kernels
from slimadam.optim.step import dispatch
from slimadam.kernels.triton import launch
import slimadam.kernels.triton.launch as imported
import slimadam.kernels.layout as layout

assert launch_settings.launch is launch is imported is dispatch._triton()
assert launch is sys.modules[launch_settings.TritonStep.__module__] is kernels.triton.launch
assert launch_settings.TritonStep is dispatch._triton().TritonStep
assert slimadam.kernels is kernels is sys.modules["slimadam.kernels"]
assert slimadam.kernels.reference is sys.modules["slimadam.kernels.reference"]
assert not [name for name in sys.modules if name.partition(".")[0] == "kernels"]
print(layout.__file__)
"""


def test_the_repository_alone_has_each_kernel_once(bare: Run) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    ran = bare("-c", IDENTITY)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert Path(ran.stdout.strip()).parent.name == "kernels"
    assert Path(ran.stdout.strip()).parent.parent.name.startswith("repository")


def test_launch_settings_say_that_they_need_a_gpu(
    bare: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = _launch_settings()
    ran = bare("-m", "benchmarks.launch_settings", CUDA_VISIBLE_DEVICES="")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "error: --device cuda: this needs a GPU, and torch" in ran.stderr
    assert "Traceback" not in ran.stderr
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        tuning.main(["--device", "cpu"])
    assert "error: --device cpu: launch settings are measured on a GPU" in capsys.readouterr().err


def _launch_settings() -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("benchmarks.speed.launch_settings")


def _cuda_row(**figures: float) -> dict[str, Any]:
    usual = {"milliseconds": 10.0, "ratio": 0.7, "gigabytes_per_second": 3000.0, "share_of_copy_bandwidth": 0.95}
    usual |= {"state_bytes_per_parameter": 4.0, "peak_bytes_per_parameter": 4.1}
    return {**usual, "host_milliseconds": 0.5, "launches": 4, **figures}


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({}, []),
        ({"ratio": 0.76}, ["time of AdamW fused: 0.760, bar <= 0.75"]),
        ({"launches": 5}, ["launches a step: 5, bar <= 4"]),
        ({"host_milliseconds": 1.5}, ["host milliseconds: 1.500, bar < 1.000, AdamW fused"]),
        ({"share_of_copy_bandwidth": 0.89}, ["copy bandwidth: 0.890, bar >= 0.9"]),
    ],
)
def test_figures_from_a_gpu_are_held_against_the_bars_and_shown(figures: dict[str, float], missed: list[str]) -> None:
    rows = {"AdamW (fused)": _cuda_row(ratio=1.0, host_milliseconds=1.0), RULES: _cuda_row(**figures)}
    item = {"rows": rows, "elements": 1_235_814_400, "left_out": {"optimi AdamW": "not installed"}}
    items = {"llama-1b, float32": {**item, "bars": speed_bars(rows, "llama-1b", "float32")}}
    lines = gpu.failures({"throughput": items})
    assert lines == [f"throughput: llama-1b, float32: {line}" for line in missed]
    run = {"machine": machine.describe(), "device": "cuda", "quick": False, "seconds": 400, "missed": lines}
    stages = {"throughput": items, "training": {"SlimAdam (auto)": {"failed": "RuntimeError: broken"}}}
    text = page({**run, "to_come": ["memory"]}, stages)
    assert "- still to come: memory" in text
    assert text.count("- FAIL: ") == len(missed)
    assert "- left out: optimi AdamW: not installed" in text
    assert "SlimAdam (auto) FAILED:" in text


def test_without_cuda_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "finds no CUDA device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["throughput", "memory"])
def test_a_run_without_rows_of_ours_fails(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Contender, "missing", lambda self: None if self.settings is None else "not to be had here")
    monkeypatch.setattr(gpu, "STAGES", {stage: STAGES[stage]})
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    missed = json.loads((tmp_path / "results.json").read_text())["missed"]
    items = {"throughput": ["tiny, float32", "tiny, bfloat16"], "memory": ["tiny, pure bfloat16"]}[stage]
    assert {f"{stage}: {item}: {RULES}: not to be had here, bar a row" for item in items} <= set(missed)
    assert [f"FAIL {line}" for line in missed] == capsys.readouterr().out.splitlines()[-len(missed) :]
    assert f"- FAIL: {RULES}: not to be had here (bar: a row)" in (tmp_path / "results.md").read_text()


def test_a_quick_run_fails_where_ours_are_not_even_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a list of contenders loses the row: nothing says that it is missing but the bar."""
    without = [one for one in torch_own() if one.label == FUSED]
    monkeypatch.setattr(gpu_stages, "ours", list)
    monkeypatch.setattr(gpu_stages, "ways", lambda recipe, peers: without)
    monkeypatch.setattr(memory, "ways", lambda recipe, peers: without)
    monkeypatch.setattr(gpu, "STAGES", {name: STAGES[name] for name in ("throughput", "memory")})
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    items = ["throughput: tiny, float32", "throughput: tiny, bfloat16", "memory: tiny, pure bfloat16"]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"FAIL {item}: {RULES}: not measured, bar a row" for item in items
    ]


def test_ours_that_were_not_even_chosen_are_missed() -> None:
    other = Contender("SlimAdam (x)", SlimAdam, settings={"plan": "x"})
    (bar,) = missing_rows(torch_own(), {"AdamW (fused)"}, {})
    assert (bar["name"], bar["value"], bar["passed"]) == (RULES, "not measured", False)
    assert missing_rows(torch_own(), {RULES}, {}) == []
    (bar,) = missing_rows([other], {RULES}, {"SlimAdam (x)": "the time budget was used up"})
    assert (bar["name"], bar["value"]) == ("SlimAdam (x)", "the time budget was used up")


def test_launch_settings_that_a_gpu_cannot_take_are_reported_and_what_is_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning, errors = _launch_settings(), importlib.import_module("triton.runtime.errors")
    most = tuning.SETTINGS["full", 256].lines

    class Step:
        def __init__(self, entries: Any, hyper: Any) -> None:
            if entries[0].param.dtype == torch.bfloat16:
                raise KeyboardInterrupt
            self.lines = tuning.SETTINGS["full", 256].lines

        def run(self, hyper: Any) -> None:
            if self.lines > most:
                raise errors.OutOfResources(1024, 512, "threads")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "TritonStep", Step)
    with pytest.raises(KeyboardInterrupt):
        tuning.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "launch_settings.json").read_text())
    del figures["machine"]
    assert list(figures) == [f"{kind} {columns}, torch.float32" for kind, columns in tuning.SETTINGS]
    why = "OutOfResources: out of resource: threads, Required: 1024, Hardware limit: 512."
    printed = capsys.readouterr().out
    for settings in tuning.candidates("full", 256, torch.float32):
        label = f"{settings.lines} x 256, {settings.num_warps} warps"
        value = figures["full 256, torch.float32"][label]
        assert str(value).startswith(why) if settings.lines > most else value > 0
        assert (f"\n  cannot be launched: {label}: {why}" in printed) == (settings.lines > most)


def test_launch_settings_in_the_table_that_cannot_be_launched_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = _launch_settings()

    def fails(entries: Any, hyper: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: out of resources")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "TritonStep", fails)
    assert tuning.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "full 256, torch.float32: none can be launched; FAIL the present " in capsys.readouterr().out
    found = json.loads((tmp_path / "launch_settings.json").read_text())["full 256, torch.bfloat16"]
    assert set(found.values()) == {"RuntimeError: Triton Error [CUDA]: out of resources"}


def test_each_launch_setting_is_used_by_the_kernel_and_tile_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = _launch_settings()
    seen = []

    class Step(tuning.TritonStep):  # type: ignore[misc,name-defined]
        def run(self, hyper: Any) -> None:
            used = [(launch.key, dict(launch.key.options)) for launch in self._launches]
            seen.append([(key.kind, key.columns, known["LINES"], known["num_warps"]) for key, known in used])

    monkeypatch.setattr(tuning, "TritonStep", Step)
    for kind, columns in tuning.SETTINGS:
        seen.clear()
        tuning.measure(kind, columns, torch.float32, "cpu", copies=1, rounds=1)
        tried = tuning.candidates(kind, columns, torch.float32)
        assert seen == 2 * [[(kind, columns, settings.lines, settings.num_warps)] for settings in tried]


def _broken() -> dict[str, Any]:
    raise ValueError("broken on purpose")


def _not_applicable() -> dict[str, Any]:
    raise NotApplicable("not on this device")


def test_what_fails_or_is_late_is_recorded_and_the_rest_kept(tmp_path: Path) -> None:
    bar = {"name": "speed", "value": 0.9, "limit": "<= 0.75", "passed": False}
    items = {"wrong": _broken, "absent": _not_applicable, "slow": lambda: {"bars": [bar]}}
    stage = Stage(60, lambda settings, deadline: items)
    found = gpu.run_stage("checks", stage, QUICK, tmp_path, 60)
    assert json.loads((tmp_path / "checks.json").read_text())["items"] == found
    assert found["absent"]["not_applicable"] == "not on this device"
    assert gpu.failures({"checks": found}) == [
        "checks: wrong: ValueError: broken on purpose",
        "checks: slow: speed: 0.900, bar <= 0.75",
    ]
    items["gpt2-small, float32, others"] = _broken
    late = gpu.run_stage("checks", stage, QUICK, tmp_path, -1)
    assert len(gpu.failures({"checks": late})) == 3
    assert "used up" in late["gpt2-small, float32, others"]["not_applicable"]


def test_a_stage_in_its_own_process_is_read_back_and_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "short_training"
    found = gpu.run_isolated(name, STAGES[name], QUICK, tmp_path, 300)
    assert [item["settings"]["steps"] for item in found.values()] == [12, 12, 12]
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    ended = gpu.run_isolated(name, STAGES[name], QUICK, tmp_path, 0.1)
    assert ended == {name: {"failed": "the stage wrote nothing; its process was ended after 0 s"}}


def test_stages_share_the_time_of_the_run_and_results_are_written_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    took = {"first": 10.0, "second": 200.0, "third": 0.0, "fourth": 0.0}
    given: dict[str, float] = {}
    known: dict[str, list[str]] = {}

    def run_stage(name: str, stage: Stage, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
        written = tmp_path / "results.json"
        known[name] = list(json.loads(written.read_text())["stages"]) if written.exists() else []
        given[name] = seconds
        clock[0] += took[name]
        return {name: {"failed": "ValueError: wrong"} if name == "first" else {}}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu, "page", lambda run, stages: "")
    weights = {"first": 100, "second": 200, "third": 60, "fourth": 40}
    monkeypatch.setattr(gpu, "STAGES", {name: Stage(weight, dict) for name, weight in weights.items()})
    missed = gpu.run_all(QUICK, tmp_path, 225.0)
    # 25 s are kept for the last process to end; the second takes 70 s more than its share, and leaves nothing.
    assert given == pytest.approx({"first": 200 * 100 / 400, "second": 190 * 200 / 300})
    assert known == {"first": [], "second": ["first"]}
    assert missed == [
        "first: first: ValueError: wrong",
        "third: third: the run's 225 s were used up",
        "fourth: fourth: the run's 225 s were used up",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (list(results["stages"]), results["to_come"], results["missed"]) == (list(weights), [], missed)


def test_a_run_that_is_killed_leaves_the_stages_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(settings: Settings, deadline: float) -> dict[str, Any]:
        raise KeyboardInterrupt

    stages = {"clipping": STAGES["clipping"], "memory": Stage(60, killed)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert (list(results["stages"]), results["to_come"], results["missed"]) == (["clipping"], ["memory"], [])
    assert results["stages"]["clipping"]["tiny, float32"]["rows"]
    text = (tmp_path / "results.md").read_text()
    assert "- still to come: memory" in text
    assert "Everything passed." not in text


def test_others_come_after_ours_and_what_compiles_comes_last() -> None:
    usual, others, compiled = gpu_stages.contenders(Settings("cuda"))
    assert {one.label for one in usual} >= {FUSED, *(one.label for one in ours())}
    assert not [one for one in usual if one.compiled or one in PEERS.values()]
    assert [one.label for one in others] == [FUSED, *(peer.label for peer in PEERS.values())]
    assert [one.label for one in compiled] == [FUSED, "AdamW (compiled)"]
    items = list(STAGES["throughput"].items(Settings("cuda"), time.monotonic() + 100))
    pairs = [f"{model}, {dtype}" for model in ("gpt2-small", "llama-1b") for dtype in ("float32", "bfloat16")]
    assert items == [*pairs, *(f"{pair}, others" for pair in pairs), "gpt2-small, float32, compiled"]


def test_others_that_are_missing_or_die_are_lines_and_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = {
        "absent": Contender("Absent", _broken_optimizer, "slimadam-no-such-package"),
        "broken": Contender("Broken", _broken_optimizer),
    }
    fused = [one for one in torch_own() if one.label == FUSED]
    monkeypatch.setattr(gpu_stages, "contenders", lambda settings: (gpu_stages_usual, [*fused, *peers.values()], []))
    gpu_stages_usual = [*fused, *(one for one in ours() if one.label == RULES)]
    found = gpu.run_stage("throughput", STAGES["throughput"], QUICK, tmp_path, 300)
    assert gpu.failures({"throughput": found}) == []
    item = found["tiny, float32, others"]
    assert list(item["rows"]) == [FUSED]
    assert item["left_out"] == {
        "Absent": "slimadam-no-such-package is not installed; pip install slimadam-no-such-package",
        "Broken": "OSError: libcudart.so.13: cannot open shared object file",
    }
    run = {"machine": machine.describe(), "device": "cpu", "quick": True, "seconds": 1, "missed": [], "to_come": []}
    assert "- left out: Broken: OSError: libcudart.so.13" in page(run, {"throughput": found})


def test_the_list_of_wheels_has_every_other_optimizer_in_the_version_that_is_compared() -> None:
    lines = (ROOT / "benchmarks" / "gpu" / "peers.txt").read_text().splitlines()
    listed = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert listed.keys() >= {peer.package for peer in PEERS.values()} - {"gefen"}
    declared = re.findall(r'"([\w-]+)==([\d.]+)', (ROOT / "pyproject.toml").read_text())
    pinned = {name: version for name, version in declared if name in listed}
    assert len(pinned) >= 5
    assert {name: listed[name] for name in pinned} == pinned


def _broken_optimizer(model: torch.nn.Module) -> Any:
    raise OSError("libcudart.so.13: cannot open shared object file")


@pytest.mark.parametrize("label", training.LONG.labels)
def test_a_training_in_several_calls_is_that_of_one(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = training.LONG.quick()
    whole = training.train(label, 6e-4, size, "cpu")
    checkpoint, kept = (tmp_path / f"{label}, lr 0.0006{suffix}" for suffix in (".pt", ".json"))
    advance = training._Training.advance
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])

    def advance_and_let_time_pass(run: Any) -> None:
        advance(run)
        clock[0] += 1

    monkeypatch.setattr(training._Training, "advance", advance_and_let_time_pass)
    for step in (5, 10):
        deadline = clock[0] + 4.5
        found = training.train(label, 6e-4, size, "cpu", tmp_path, deadline)
        assert found["unfinished"] == f"{step} of 12 steps"
        assert found["losses"] == whole["losses"][:step]
        assert checkpoint.exists()
    found = training.train(label, 6e-4, size, "cpu", tmp_path, clock[0] + 100)
    again = training.train(label, 6e-4, size, "cpu", tmp_path, 0.0)
    for result in (found, again):
        assert result["losses"] == whole["losses"]
        assert [loss for _, loss in result["held_out"]] == [loss for _, loss in whole["held_out"]]
        assert "unfinished" not in result
    assert (checkpoint.exists(), kept.exists()) == (False, True)
    other = training.train(label, 6e-4, replace(size, seed=1), "cpu", tmp_path, clock[0] + 100)
    assert other["losses"] != whole["losses"]


def test_what_is_not_finished_is_no_failure_and_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = replace(training.LONG, labels=(training.FUSED,), rates=(1e-3,))
    stage = Stage(1, gpu_stages._training(size, goes_on=True), goes_on=True)
    monkeypatch.setitem(gpu.LONGER, "training", stage)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    advance = training._Training.advance
    monkeypatch.setattr(training._Training, "advance", lambda run: (advance(run), time.sleep(0.8)))
    command = ["--stage", "training", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*command, "--seconds", "1.2"]) == 3
    assert "training: AdamW (fused), lr 0.001: not finished: " in capsys.readouterr().out
    monkeypatch.setattr(training._Training, "advance", advance)
    assert gpu.main(command) == 0
    (item,) = json.loads((tmp_path / "training.json").read_text())["items"].values()
    assert len(item["losses"]) == 12


def test_launch_settings_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = _launch_settings()

    def measure(kind: str, columns: int, dtype: torch.dtype, *_: Any) -> dict[str, Any]:
        usable = "OutOfResources: too many registers" if (kind, dtype) == ("full", torch.bfloat16) else 2.0
        return {"now": usable, "other": 1.5, "large": "OutOfResources: too large"}

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "measure", measure)
    assert gpu.main(["--stage", "sweep", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    items = json.loads((tmp_path / "sweep.json").read_text())["items"]
    assert list(items) == [f"{kind} {columns}, {dtype}" for dtype in ("float32", "bfloat16")
                           for kind, columns in tuning.SETTINGS]  # fmt: skip
    assert gpu.failures({"sweep": items}) == [
        "sweep: full 256, bfloat16: now, at present: OutOfResources: too many registers, bar can be launched"
    ]
    text = (tmp_path / "sweep.md").read_text()
    assert "| full 256, float32 | other | 1.5000 | now | 2.0000 | 0.750 | 1 |" in text
    assert "| full 256, bfloat16 | other | 1.5000 | now |  |  | 2 |" in text
    monkeypatch.delenv("TRITON_INTERPRET")
    found = gpu.run_stage("sweep", LONGER["sweep"], QUICK, tmp_path, 300)
    assert "launch settings are measured on a GPU" in found["launch settings"]["not_applicable"]


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - {"whole_models", "grad_scaler", "as_adamw"}))
def test_checks_pass_on_a_cpu(name: str) -> None:
    try:
        report = CHECKS[name]("cpu")
    except (NotOnThisDeviceError, NotImplementedError) as reason:
        pytest.skip(str(reason))
    assert 0 < report.worst <= 1


WRONG = {"betas": (0.8, 0.96), "weight_decay": 0.11, "eps": 2e-3, "lr": 3.002e-3, "maximize": True}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlimAdam.__init__

    def wrong(self: SlimAdam, *args: Any, **options: Any) -> None:
        right(self, *args, **{**options, name: WRONG[name]})

    monkeypatch.setattr(SlimAdam, "__init__", wrong)
    with pytest.raises(WrongStepError, match="times what rounding explains"):
        CHECKS["forms"]("cpu")


def test_int8_first_moments_round_to_the_nearest_code_or_down_without_gradient() -> None:
    # With beta1 = 0.5 the second step's first moment is half of what was stored plus half of the gradient, here 0.
    hyper = Hyperparameters(lr=1.0, betas=(0.5, 0.0), eps=1.0, weight_decay=0.0)
    grads = [torch.tensor([2.0, 0.3, 0.0]), torch.zeros(3)]
    exact = [1.0, 0.15, 0.0]
    # Codes of 1, 0.15 and 0 with scale 1: 127, round(127 sqrt(0.15)) = 49, 0.
    stored = [1.0, (49 / 127) ** 2, 0.0]
    first = [-2 * moment / (grad + 1) for moment, grad in zip(exact, [2.0, 0.3, 0.0], strict=True)]
    expected = [update - moment * 0.5 / 0.75 for update, moment in zip(first, stored, strict=True)]
    followed = follow(torch.zeros(3), grads, [Rule()], hyper, "int8").param
    torch.testing.assert_close(followed, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    # Without gradient codes are rounded down: 127 sqrt(1/2) = 89.8 becomes 89 relative to a scale of 1.
    decaying = [torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), torch.zeros(2)]
    followed = follow(torch.zeros(2), decaying, [Rule()], hyper, "int8").param[1]
    updates = [2.0 / 3.0, 0.5 / 0.75, (89 / 127) ** 2 * 0.5 / 0.875]
    assert followed.item() == pytest.approx(-sum(updates), rel=1e-7)


class _Simulated:
    """A host and a GPU with clocks in milliseconds: launches queue up, and an event notes when the queue reaches it."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def spend(self, milliseconds: float) -> None:
        self.host += milliseconds

    def launch(self, milliseconds: float) -> None:
        self.device = max(self.device, self.host) + milliseconds

    def wait(self, *_: Any) -> None:
        self.host = max(self.host, self.device)

    def event(self, **_: Any) -> Any:
        found = SimpleNamespace(synchronize=self.wait)
        found.record = lambda: setattr(found, "at", max(self.device, self.host))
        found.elapsed_time = lambda end: end.at - found.at
        return found

    def replaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.host / 1e3)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 1.98e6))


def test_a_gpu_is_timed_without_the_host_and_the_host_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = _Simulated()
    simulated.replaces(monkeypatch)

    def step() -> None:
        simulated.spend(5.0)  # before the first launch, as an optimizer looks through its parameters
        simulated.launch(0.5)
        simulated.spend(0.25)
        simulated.launch(0.75)

    for _ in range(3):
        lap = stopwatch.lap(step, "cuda")
        assert (lap.total, lap.host) == pytest.approx((1.25, 5.25))


def test_what_measures_bandwidth_copies_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "COPIED_BYTES", 1 << 12)
    copy, moved = stopwatch.copier("cpu")
    assert len(copy().unique()) > 1000
    assert moved == 3 << 12


def test_bytes_of_shared_and_nested_tensors_count_once() -> None:
    weight = torch.zeros(10)
    nested = {"a": [weight, weight[:5]], "b": (torch.zeros(3, dtype=torch.int8), None), "c": {"d": "text", "e": 1}}
    assert stopwatch.tensor_bytes(nested) == 43


def test_the_trained_model_has_the_shapes_of_gpt2() -> None:
    with torch.device("meta"):
        model = training.GPT2(training.LONG)
    assert {name: tuple(param.shape) for name, param in model.named_parameters()} == gpt2_small()


def test_throughput_lists_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--rounds", "1", "--only", "AdamW (default)", "SlimAdam (rules)", "*Flash*"]
    assert throughput.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "left out: FlashOptim FlashAdamW: " in printed
    figures = json.loads((tmp_path / "throughput_tiny_cpu_float32.json").read_text())
    assert set(figures["ratios"]) == {"AdamW (default)", "AdamW (fused)", "SlimAdam (rules)"}
    assert figures["ratios"]["AdamW (default)"] == 1
    assert (tmp_path / "throughput_tiny_cpu_float32.png").stat().st_size > 0


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("room_for", "sets", "left_out"), [(9, 1, 0), (1, 3, 0), (0, 3, 3)])
def test_where_memory_is_short_contenders_are_timed_in_several_sets(
    room_for: int, sets: int, left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [one for one in torch_own() if not one.compiled]
    in_set = 0
    timed = comparison._time

    def fits(*_: Any) -> bool:
        nonlocal in_set
        in_set += 1
        return in_set <= room_for

    def time_and_begin_anew(*arguments: Any) -> None:
        nonlocal in_set
        in_set = 0
        timed(*arguments)

    monkeypatch.setattr(comparison._Bench, "fits", fits)
    monkeypatch.setattr(comparison, "_time", time_and_begin_anew)
    found = comparison.compare(tiny(), chosen, rounds=2)
    assert (found.batches, len(found.left_out)) == (sets, left_out)
    assert len(found.rows) == len(chosen) - left_out
    others = [row for label, row in found.rows.items() if label != "AdamW (fused)"]
    assert all(len(row["laps"]) == len(row["ratios"]) == 2 for row in others)
    assert all(row["ratio"] == pytest.approx(sum(row["ratios"]) / 2, rel=1e-3) for row in others)


class _Scripted(torch.optim.AdamW):
    """AdamW that sleeps, or dies, in one of its steps."""

    def __init__(self, model: torch.nn.Module, at: int, dies: bool) -> None:
        super().__init__(model.parameters(), fused=True)
        self._left, self._dies = at, dies

    def step(self, closure: Any = None) -> Any:
        self._left -= 1
        if self._left == 0 and self._dies:
            raise RuntimeError("died")
        time.sleep(0.2 if self._left == 0 else 0)
        return super().step(closure)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("at", [4, 7], ids=["while warming up", "while timed"])
def test_one_stall_makes_no_contender_slow(at: int) -> None:
    stalls = Contender("stalls", lambda model: _Scripted(model, at, dies=False))
    chosen = [*(one for one in torch_own() if one.label == "AdamW (fused)"), stalls]
    found = comparison.compare(tiny(), chosen, rounds=6)
    assert len(found.rows["stalls"]["ratios"]) == len(found.rows["AdamW (fused)"]["laps"]) == 6
    assert max(found.rows["stalls"]["ratios"]) > 4 * found.rows["stalls"]["ratio"] or at == 4


@pytest.mark.usefixtures("_one_thread")
def test_what_fails_while_it_is_timed_is_left_out_alone() -> None:
    dies = Contender("dies", lambda model: _Scripted(model, 5, dies=True))
    others = [one for one in torch_own() if one.label in ("AdamW (fused)", "AdamW (default)")]
    found = comparison.compare(tiny(), [dies, *others], rounds=4)
    assert found.left_out == {"dies": "RuntimeError: died"}
    assert len(found.rows["AdamW (default)"]["ratios"]) == 4


def test_a_wrong_optimizer_gets_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rules,) = (one for one in ours() if one.label == "SlimAdam (rules)")
    right = SlimAdam.__init__

    def wrong(self: SlimAdam, *args: Any, **options: Any) -> None:
        right(self, *args, **{**options, "weight_decay": 0.2})

    monkeypatch.setattr(SlimAdam, "__init__", wrong)
    assert throughput.main(["--model", "tiny", "--rounds", "1", "--only", rules.label, "--out", str(tmp_path)]) == 1
    figures = json.loads((tmp_path / "throughput_tiny_cpu_float32.json").read_text())
    assert list(figures["rows"]) == ["AdamW (fused)"]
    assert "times what rounding explains" in figures["refused"][rules.label]


def test_memory_is_what_shapes_say(tmp_path: Path) -> None:
    assert memory.main(["--models", "tiny", "--peers", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "memory.json").read_text())["models"]["tiny"]["rows"]
    by_label = {(row["recipe"], row["optimizer"], row["in_backward"]): row for row in rows}
    adamw = by_label["float32", "AdamW", False]
    assert adamw["held"] == adamw["computed"] == pytest.approx(16, abs=0.01)
    # The table of 384 tokens is the largest of 27,104 parameters: its gradient is what is alive at once.
    largest = 4 * 384 * 32 / 27104
    freed = by_label["float32", "AdamW", True]
    assert freed["peak"] - freed["held"] == pytest.approx(largest)
    assert freed["held"] == pytest.approx(adamw["held"] - 4)
    assert by_label["pure bfloat16", "SlimAdam (rules)", False]["held"] < 6.3
