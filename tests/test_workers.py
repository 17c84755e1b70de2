"""How many cells go side by side, on machines that are not there."""

import gc
import weakref

import joblib
import pytest
import torch

import gnbench.build
from gnbench.check import compose
from gnbench.runs.runner import run
from gnbench.sweep import workers
from gnbench.train import devices, distributed
from tests import tiny

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Have a machine of so many cores, free bytes and GPUs."""

    def have(cores=4, free=1000 * GIB, gpus=0):
        monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
        monkeypatch.setattr(devices, "free_memory_bytes", lambda: free)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return have


def cells(count, *overrides):
    settings = [setting for setting in tiny.OVERRIDES if not setting.startswith("device=")]
    first = compose(*settings, "device=cpu")
    return [first.with_(seed=seed, device="auto") for seed in range(count)]


def test_as_many_as_cores_but_not_more_than_cells(machine):
    machine(cores=4)
    assert [workers.at_a_time(cells(count)) for count in (1, 3, 4, 50)] == [1, 3, 4, 4]
    machine(cores=1)
    assert workers.at_a_time(cells(9)) == 1
    machine(free=None)  # not known
    assert workers.at_a_time(cells(9)) == 4


def test_as_many_as_gpus_if_the_runs_are_there(machine):
    machine(cores=16, gpus=2)
    runs = cells(9)
    assert workers.at_a_time(runs) == 2
    assert workers.at_a_time([run.with_(device="cuda:1") for run in runs]) == 1
    assert workers.at_a_time([run.with_(device="cpu") for run in runs]) == 9
    machine(cores=16, gpus=1)
    assert workers.at_a_time(runs) == 1


def test_a_look_at_the_memory_keeps_no_network(monkeypatch):
    [config] = cells(1)
    seen, build = [], gnbench.build.build_model

    def build_model(config):
        model = build(config)
        seen.append(weakref.ref(next(model.parameters())))
        return model

    with monkeypatch.context() as patched:
        patched.setattr("gnbench.build.build_model", build_model)
        workers.needed_bytes(config)
    gc.collect()
    assert [one() for one in seen] == [None]


def test_as_many_as_fit_into_the_memory_and_that_is_said(machine, caplog):
    machine(cores=4)
    runs = cells(9)
    needed = workers.needed_bytes(runs[0])
    machine(cores=4, free=3 * needed + 1)
    assert workers.at_a_time(runs) == 3
    [line] = caplog.messages
    assert line.endswith("free: 3 at a time, not 4")
    machine(cores=4, free=needed // 2)
    assert workers.at_a_time(runs) == 1


def test_one_under_torchrun(machine, monkeypatch):
    machine()
    runs = cells(9)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert workers.at_a_time(runs) == 1


def test_what_a_run_takes_is_counted_and_not_too_low(tiny_config):
    """The weights, by hand, and activations beside what a real run says of itself."""
    config = tiny_config("norm=bn", "epochs=1", "model.channels=[4,4,4]", "model.hidden=4")
    more = config.with_(model=config.model.plain() | {"hidden": 1004})
    bigger = config.with_(batch_size=48)
    record = run(bigger)
    needed = [workers.needed_bytes(one) for one in (config, more, bigger)]
    weights, hidden = 1000 * (4 + 1 + 4), 8 * 1000  # of a batch of 8
    assert needed[1] - needed[0] == 16 * weights + 3 * 4 * hidden
    activations = record["activation_bytes"]
    assert needed[2] - needed[0] == pytest.approx(3 * activations * 40 / 48, rel=0.1)


def test_a_network_of_ones_own_that_does_not_work_without_storage(tiny_config, monkeypatch):
    config = tiny_config()

    def build(config):
        raise RuntimeError("meta tensors have no data")

    monkeypatch.setattr("gnbench.build.build_model", build)
    assert workers.needed_bytes(config) > workers.PROCESS_BYTES


def test_the_limit_of_a_control_group_counts_what_it_has_taken(tmp_path, monkeypatch):
    """4 GiB at most, 3 in use, of which 1 is of files and can be let go."""
    for name, text in {
        "memory.max": f"{4 * GIB}",
        "memory.current": f"{3 * GIB}",
        "memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
    }.items():
        (tmp_path / name).write_text(text)
    found = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file")
    monkeypatch.setattr(devices, "CONTROL_GROUPS", (found, ("none", "none", "none")))
    assert devices.free_memory_bytes() <= 2 * GIB
    (tmp_path / "memory.max").write_text("max")
    assert devices.free_memory_bytes() > 0


def test_on_a_gpu_only_what_is_in_this_machine_s_memory_counts(machine):
    run = cells(1)[0]
    large = run.with_(batch_size=48)
    assert workers.needed_bytes(large, on_gpu=True) == workers.needed_bytes(run, on_gpu=True)
    assert workers.needed_bytes(run, on_gpu=True) < workers.needed_bytes(run)
    assert workers.needed_bytes(run) < workers.needed_bytes(large)
