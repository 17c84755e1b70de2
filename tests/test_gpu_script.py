"""The script for those who have a GPU (``.ci/gpu``), as far as it goes without one."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.conftest import ROOT, environment

SCRIPT = ROOT / ".ci" / "gpu"
DONE, FAILED, REFUSED, UNFINISHED = 0, 1, 2, 4
SMALL = (*tiny.OVERRIDES[1:7], *tiny.SMALL, "norm=bn,gn")


def called(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--outputs", tmp_path / "gpu"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=350,
    )


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("gpu_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_script", loader)
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = called(tmp_path, "check")
    assert done.returncode == REFUSED
    [line] = done.stderr.splitlines()
    assert "no CUDA device" in line
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GNBENCH_DATA", str(tmp_path / "nowhere"))
    done = called(tmp_path, "train", "--device", "cpu")
    assert done.returncode == REFUSED
    [line] = done.stderr.splitlines()
    assert str(tmp_path / "nowhere" / "cifar10.npz") in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("together", "ratio", "verdict"), [(900, "2.25", "stay"), (700, "1.75", "go")]
)
def test_replicas_stay_if_they_give_twice_what_processes_do(
    script, tmp_path, capsys, together, ratio, verdict
):
    lines = [
        "who,engine,replicas,runs,images_per_second,speedup,kernels_per_step",
        "plain fp32,plain,1,1,100,1.0,",
        "graph fp32 ×4,graph,1,4,400,4.0,",
        f"graph fp32 4 replicas,graph,4,1,{together},9.0,31.5",
    ]
    for name in ("bn-2-fp32", "gn-2-fp32"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.csv").write_text("\n".join(lines) + "\n")
    script.print_speeds(tmp_path, ["bn-2-fp32", "gn-2-fp32", "gn-64-fp32"])
    said = capsys.readouterr().out
    assert said.count(f"{ratio} ×") == 3
    assert said.splitlines()[-1].endswith(f"replicas {verdict}")
    assert "31.5" in said


def test_the_kernels_that_take_longest_are_named(script, tmp_path, capsys):
    lines = ["who,kernel,per_step,microseconds_per_step", "eager fp32,another,1.0,900.0"]
    lines += [f"graph fp32,kernel{number},2.0,{100.5 - number}" for number in range(9)]
    lines += ["graph fp32 4 replicas,of four,4.0,1000.0"]
    (tmp_path / "kernels.csv").write_text("\n".join(lines) + "\n")
    script.print_kernels(tmp_path / "nowhere.csv")
    script.print_kernels(tmp_path / "kernels.csv")
    whole, *busiest = capsys.readouterr().out.splitlines()
    assert whole == "  kernels of a step by graph: 868 µs"
    assert busiest[0] == "     100.5 µs    2.0 ×  kernel0"
    assert len(busiest) == script.BUSIEST
    assert "another" not in "".join(busiest)


@pytest.fixture
def service(script, tmp_path, monkeypatch):
    """A program that notes how it is called, in place of that of NVIDIA's service; its notes."""
    program, calls = tmp_path / script.MPS_PROGRAM, tmp_path / "calls"
    program.write_text(
        f'#!/bin/sh\n[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] || exit 3\n'
        f'if [ "$1" = -d ]; then echo start >> {calls}; sleep 60 & exit ${{REFUSES:-0}}; fi\n'
        f"cat >> {calls}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(script, "MPS_FOLDER", str(tmp_path / "none"))
    monkeypatch.setattr(script, "MPS_PROGRAM_FOLDER", str(tmp_path))
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_the_service_for_several_processes_ends_with_the_training(script, service):
    folders = []

    def train():
        with script.multi_process_service() as together:
            assert together
            assert service.read_text() == "start\n"
            folders.append(Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]))
            raise KeyError

    began = time.monotonic()
    with pytest.raises(KeyError):
        train()
    assert time.monotonic() - began < 30  # the daemon outlives the program that started it
    assert service.read_text() == "start\nquit\n"
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert not folders[0].exists()


def test_a_service_that_runs_already_is_left_as_it_is(script, service, monkeypatch, tmp_path):
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with script.multi_process_service() as together:
        assert together
    assert not service.exists()
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == str(tmp_path)


def test_where_the_service_does_not_start_cells_follow_each_other(
    script, service, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("REFUSES", "1")
    with script.multi_process_service() as together:
        assert not together
    assert service.read_text() == "start\n"
    (tmp_path / script.MPS_PROGRAM).write_text("no program")
    with script.multi_process_service() as together:
        assert not together
    (tmp_path / script.MPS_PROGRAM).unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    with script.multi_process_service() as together:
        assert not together
    assert capsys.readouterr().out.count("one cell at a time") == 3
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


@pytest.mark.parametrize(
    ("overrides", "launcher", "queues"),
    [
        ([], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"], "16"),
        (["hydra/launcher=basic"], ["hydra/launcher=basic"], None),
    ],
)
def test_a_gpu_trains_several_cells_at_a_time(
    script, service, monkeypatch, tmp_path, overrides, launcher, queues
):
    calls = []

    def run(command, log, end):
        calls.append((command, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
        return script.REFUSED

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "last_lines", lambda log, count: "")
    given = SimpleNamespace(outputs=tmp_path, dataset="cifar10", device="cuda", together=4)
    given.overrides, given.end, given.seconds = overrides, time.monotonic() + 9, 9
    with pytest.raises(script.RefusedError):
        script.train(given)
    [(command, found)] = calls
    assert [part for part in command if part.startswith("hydra")] == launcher
    assert found == queues
    assert service.exists() is bool(queues)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["train", "check"])
def test_sigterm_ends_what_the_script_has_started(tmp_path, chosen):
    with subprocess.Popen(
        [
            *(sys.executable, SCRIPT, chosen, "--device", "cpu", "--outputs", tmp_path),
            *("--dataset", "fashion_mini", *SMALL, "epochs=2000"),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline()  # the versions, after which it begins
        time.sleep(5)
        process.terminate()
        assert process.wait(120) == 143
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    found = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.slow
def test_a_rehearsal_of_the_check_finds_every_engine(tmp_path):
    """Interrupted at once the first time."""
    again = ("check", "--device", "cpu", *SMALL, "epochs=1")
    assert called(tmp_path, *again, "--seconds", "0.1").returncode in (FAILED, UNFINISHED)
    done = called(tmp_path, *again)
    assert done.returncode == DONE, done.stderr + done.stdout
    assert "check: 4 of 4 runs by engine eager" in done.stdout
    if not torch.cuda.is_available():
        assert "check: 0 tests passed, 0 failed" in done.stdout
    tests = json.loads((tmp_path / "gpu" / "check.json").read_text())["tests"]
    assert any("test_on_cuda_each_replica" in name for name in tests)


@pytest.mark.slow
def test_a_rehearsal_of_the_benchmark_goes_on_with_the_case_that_is_left(tmp_path):
    quick = ("rounds=1", "seconds=0.05", "warmup_steps=2", "runs=[1]")
    chosen = ("bench", "--device", "cpu", "--case", "bn-2-", *quick)
    done = called(tmp_path, *chosen)
    assert done.returncode == DONE, done.stderr + done.stdout
    assert "eager fp32" in done.stdout
    table = tmp_path / "gpu" / "bench" / "fashion_mini" / "bn-2-fp32" / "bench.csv"
    written = table.stat().st_mtime_ns
    assert called(tmp_path, *chosen).returncode == DONE
    assert table.stat().st_mtime_ns == written
    finished = table.with_name("done.json")
    asked = finished.read_text()
    finished.write_text(asked.replace('"device": "', '"device": "another '))
    assert called(tmp_path, *chosen).returncode == DONE
    assert table.stat().st_mtime_ns > written  # what another device took says nothing of this one
    assert finished.read_text() == asked


@pytest.mark.slow
def test_a_rehearsal_of_the_training_goes_on_and_packs_its_records(tmp_path):
    chosen = ("train", "--device", "cpu", "--dataset", "fashion_mini", *SMALL, "replicas=2")
    chosen += ("batch_size=8,4",)
    first = called(tmp_path, *chosen, "--seconds", "0.1")
    assert first.returncode == UNFINISHED, first.stderr + first.stdout
    assert "call again" in first.stdout
    done = called(tmp_path, *chosen)
    assert done.returncode == DONE, done.stderr + done.stdout
    assert "train: 8 runs completed" in done.stdout
    with zipfile.ZipFile(tmp_path / "gpu" / "figure3.zip") as packed:
        assert sum(name.endswith("run.json") for name in packed.namelist()) == 8
