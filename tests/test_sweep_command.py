"""What the process of a command does for its cells, without any other process."""

import pickle
import signal
import subprocess
import sys

import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus

from gnbench.composition import composed
from gnbench.runs import runner
from gnbench.sweep import account, command, launchers
from gnbench.train import devices
from gnbench.train.engine import EagerEngine


@pytest.fixture(autouse=True)
def forgotten():
    """Leave to the next test a process that has carried out nothing."""
    yield
    for noted in (account.configs, account.planned, account.failed):
        noted.clear()


def test_of_a_cell_that_is_over_nothing_is_kept_but_what_it_returned():
    """Hydra holds what comes back of all cells to the end, with two configurations of each."""
    config = composed("norm=gn")
    over = JobReturn(cfg=config, hydra_cfg=config, status=JobStatus.COMPLETED)
    over.return_value = 1.5
    Callbacks(config).on_job_end(config=config, job_return=over)
    assert (over.cfg, over.hydra_cfg, over.return_value) == (None, None, 1.5)


def attempts(config, monkeypatch):
    """Carry out a cell, in vain, and again; return what a worker would send back of each."""

    def fail(*_):
        raise ValueError("a hiccup")

    with monkeypatch.context() as patched:
        patched.setattr(EagerEngine, "train_steps", fail)
        first = account.Reported.of(command.attempt(config), config.runs())
    return first, account.Reported.of(command.attempt(config), config.runs())


def test_a_cell_that_failed_and_then_came_to_its_end_did_not_fail(tiny_config, monkeypatch):
    first, second = attempts(tiny_config("epochs=1"), monkeypatch)
    assert command.account()[1] == 0
    account.failed.clear()
    account.hear(pickle.loads(pickle.dumps(first)))
    assert command.account()[1] == 1
    account.hear(pickle.loads(pickle.dumps(second)))
    assert command.account()[1] == 0


def test_a_worker_tells_of_its_cell_alone(tiny_config):
    here, elsewhere = tiny_config(), tiny_config("seed=1")
    account.failed[elsewhere.run_id] = "it failed here once; by now another worker has trained it"
    assert account.Reported.of(7.5, here.runs()).failed == {here.run_id: None}


def test_a_worker_that_has_just_ended_keeps_no_other_from_saving(monkeypatch):
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    busy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen = iter([{(over.pid, "a"), (busy.pid, "b")}, set(), set()])
    monkeypatch.setattr(launchers, "_at_work", lambda: next(seen))
    monkeypatch.setattr(launchers, "_stopped_by", None)
    before = {number: signal.getsignal(number) for number in launchers.STOPPING}
    try:
        with pytest.raises(KeyboardInterrupt):
            launchers._stop(signal.SIGINT, None)
        assert busy.wait(60) == -signal.SIGTERM
    finally:
        busy.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("checked", ["run", "cell"])
def test_denormal_numbers_are_flushed_before_a_check_can_start_threads(
    tiny_config, monkeypatch, checked
):
    """Those that have started stay as they are, and compute many times slower with such numbers."""
    config, done = tiny_config("epochs=1"), []
    monkeypatch.setattr(devices, "flush_denormals", lambda: done.append("flushed"))
    for module in ("gnbench.check", runner.__name__):
        monkeypatch.setattr(f"{module}.check_machine", lambda *_: done.append("checked"))
    if checked == "run":
        runner.run(config)
    else:
        command._check(config)
    assert done[:2] == ["flushed", "checked"]
