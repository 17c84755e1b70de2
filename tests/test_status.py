"""Who is at work, and where every cell stands: for another process, and for another machine."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gnbench.errors import AT_WORK, DONE, FAILED, LockedError
from gnbench.runs import lock
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import Beat, read_heartbeat
from gnbench.runs.runner import run
from gnbench.sweep.plan import known_cells, read_plans, write_plan
from gnbench.sweep.state import RunState, exit_code
from gnbench.train import devices
from tests import tiny
from tests.conftest import started


def beat(**changes):
    host = Beat("node7", "another boot", 4711, "2026-11-23T08:00:00+00:00", time.time(), 30, 120)
    return replace(host, **changes)


def leave(run_dir, left):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "left").write_text(json.dumps(asdict(left)))
    (run_dir / "left").replace(run_dir / lock.HEARTBEAT)


def test_a_run_has_a_heartbeat_and_none_when_it_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with RunDirectory(tmp_path / "run").locked() as heartbeat:
        first = read_heartbeat(tmp_path / "run")
        assert (first.pid, first.host) == (os.getpid(), socket.gethostname())
        assert first.is_fresh()
        heartbeat.step, heartbeat.total_steps = 5, 10
        until = time.monotonic() + 60
        while (latest := read_heartbeat(tmp_path / "run")).step != 5 and time.monotonic() < until:
            time.sleep(0.01)
        assert (latest.step, latest.total_steps) == (5, 10)
        assert latest.beat > first.beat
    assert read_heartbeat(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("changes", "fresh"),
    [
        ({}, True),  # of another machine, where a pid says nothing
        ({"beat": time.time() - 3600}, False),
        ({"machine": lock._machine(), "pid": os.getpid()}, True),
        ({"machine": lock._machine(), "pid": 2**22 + 1}, False),  # there is no such process
        ({"machine": lock._machine(), "pid": 1}, True),  # another user's, perhaps
    ],
)
def test_a_heartbeat_is_fresh_while_its_process_can_be_alive(changes, fresh):
    assert beat(**{"beat": time.time(), **changes}).is_fresh() is fresh


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this system")
def test_a_killed_process_that_nobody_has_waited_for_is_dead():
    with subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE) as child:
        child.stdout.read()
        until = time.monotonic() + 60
        left = beat(machine=lock._machine(), pid=child.pid)
        while left.is_fresh() and time.monotonic() < until:
            time.sleep(0.01)
        assert child.returncode is None  # the system still knows its pid
        assert not left.is_fresh()


@pytest.mark.parametrize("waits", [False, True])
def test_a_free_lock_is_not_taken_from_a_holder_on_another_machine(tmp_path, monkeypatch, waits):
    """As on a network file system that keeps locks to one machine."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    run_dir, over, ended = tmp_path / "run", threading.Event(), []
    leave(run_dir, beat())

    def live():
        for step in range(6 if waits else 10_000):
            if over.wait(0.1):
                return
            leave(run_dir, beat(step=step))
        ended.append(time.monotonic())
        (run_dir / lock.HEARTBEAT).unlink()

    other = threading.Thread(target=live)
    other.start()
    try:
        if waits:
            with RunDirectory(run_dir).locked(wait=True):
                assert time.monotonic() >= ended[0]
        else:
            said = "is being trained by process 4711 on node7 since"
            with pytest.raises(LockedError, match=said), RunDirectory(run_dir).locked():
                pass
    finally:
        over.set()
        other.join()
    with RunDirectory(run_dir).locked():  # it is silent now, and so taken for dead
        assert read_heartbeat(run_dir).pid == os.getpid()


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_that_was_taken_over_is_left_to_the_other(tmp_path, tiny_config, monkeypatch, ended):
    """As of a process that was suspended, where a lock is kept to one machine."""
    config = tiny_config("epochs=4", "checkpoint_seconds=0")
    append, other = RunDirectory.append, tiny_config("epochs=4", "study=other")
    run(other)
    theirs = RunDirectory(other.run_dir)
    theirs.write_record(theirs.record() | {"started": "2026-11-23T08:00:00+00:00"})

    def suspended(directory, row):
        append(directory, row)
        if row["epoch"] == 2:
            for name in ("run.json", "metrics.csv", "correct.npy", "model.pt"):
                shutil.copy(theirs.path / name, directory.path / name)
            leave(directory.path, beat(pid=4712))
            if ended:
                (directory.path / lock.HEARTBEAT).unlink()

    monkeypatch.setattr(RunDirectory, "append", suspended)
    who = "another process, which has ended" if ended else "process 4712 on node7 since"
    with pytest.raises(LockedError, match=f"was taken over by {who}"):
        run(config)
    for name in ("run.json", "metrics.csv", "correct.npy", "model.pt"):
        assert (config.run_dir / name).read_bytes() == (theirs.path / name).read_bytes()
    assert (config.run_dir / lock.HEARTBEAT).exists() is not ended


@pytest.mark.parametrize("error", [None, errno.ESTALE])
def test_a_heartbeat_that_is_lost_or_cannot_be_read_ends_no_run(tiny_config, monkeypatch, error):
    read = Path.read_bytes

    def stale(path):
        if error and path.name == lock.HEARTBEAT:
            raise OSError(error, "Stale file handle")
        return read(path)

    def lost(directory, row):
        append(directory, row)
        (directory.path / lock.HEARTBEAT).unlink(missing_ok=True)

    append = RunDirectory.append
    monkeypatch.setattr(RunDirectory, "append", lost)
    monkeypatch.setattr(Path, "read_bytes", stale)
    assert run(tiny_config("epochs=4", "checkpoint_seconds=0"))["status"] == "completed"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"host": 1}', "\x00\xff"])
def test_a_damaged_heartbeat_is_none(tmp_path, text):
    (tmp_path / lock.HEARTBEAT).write_text(text)
    assert read_heartbeat(tmp_path) is None


@pytest.fixture
def study(tmp_path, tiny_config):
    """A study with a cell in every state."""
    config = tiny_config("epochs=1", "study=grid")
    record = run(config)
    for seed in range(1, 7):
        directory = RunDirectory(config.with_(seed=seed).run_dir)
        directory.path.mkdir()
        directory.write_record({**record, "config": {**record["config"], "seed": seed}})
    folder = tmp_path / "outputs" / "grid"
    cells = {cell.seed: cell for cell in known_cells(folder).values()}

    def change(seed, left=None, **values):
        directory = RunDirectory(cells[seed].run_dir)
        directory.write_record({**directory.record(), "result": None, **values})
        if left is not None:
            leave(directory.path, left)

    change(1, beat(), status="running")
    change(2, beat(beat=time.time() - 3600), status="running")
    change(3, status="failed", error="RuntimeError: the dog ate it\nTraceback")
    change(4, status="out_of_memory", error="16 GiB")
    change(5, status="interrupted")
    RunDirectory(cells[6].run_dir).record_path.write_text("{")
    absent = replace(cells[0], run_id="tiny-absent", run_dir=folder / "tiny-absent", seed=8)
    write_plan([*cells.values(), absent])
    return folder


def test_status_tells_where_every_cell_stands(study, cli):
    ascii = {"PYTHONIOENCODING": "ascii"}  # a console that has no –
    done = cli("study=grid", f"outputs={study.parent}", module="gnbench.status", env=ascii, check=3)
    assert done.stderr == ""
    head, _, title, sizes, row, _, *table = done.stdout.rstrip().splitlines()
    assert head.startswith("study grid: 8 cells: 1 completed, ")
    for state in ("running", "stale", "failed", "out_of_memory", "interrupted", "damaged"):
        assert f"1 {state}" in head
    assert "1 missing" in head
    assert title == "tiny, simplenetv2: runs done of those meant (> being trained, ! needs you)"
    assert sizes.split() == ["batch", "size", "8"]
    assert row.split() == ["gn", "1/8>!"]
    said = "\n".join(table)
    assert "step 30 of 120 (25%), process 4711 on node7 since 2026-11-23T08:00:00" in said
    assert "last heartbeat " in said
    assert "process 4711 on node7 since 2026-11-23T08:00:00+00:00 died; the same command" in said
    assert "RuntimeError: the dog ate it" in said
    assert "Traceback" not in said
    assert "completed" not in said
    states = [line.split()[0] for line in table[1:] if not line.startswith(" ")]
    assert sorted(states) == [
        "damaged", "failed", "interrupted", "missing", "out_of_memory", "running", "stale",
    ]  # fmt: skip


def test_status_exit_codes(study, cli):
    def status(*more):
        return cli(f"outputs={study.parent}", *more, module="gnbench.status").returncode

    for path in study.glob(f"*/{lock.HEARTBEAT}"):
        path.unlink()
    assert status() == 1  # nobody is at work, and some cells have no result
    for path in (*study.glob("sweep-*.json"), *study.glob("*-seed[1-6]-*/run.json")):
        path.unlink()
    assert status() == 0
    assert status("study=nope") == 2


def test_a_run_whose_norm_has_no_proper_name_is_shown(tmp_path, tiny_config):
    """Trained before such names were refused: YAML takes on for true."""
    run(tiny_config("epochs=1"))
    [directory] = map(RunDirectory, tmp_path.glob("outputs/default/*"))
    record = directory.record()
    record["config"]["norm"]["name"] = True
    other = RunDirectory(directory.path.with_name("tiny-simplenetv2-True-bs8-seed0-12345678"))
    other.path.mkdir()
    other.write_record(record)
    cells = known_cells(directory.path.parent)
    assert [cell.norm for cell in cells.values()] == ["True", "gn"]
    write_plan(list(cells.values()))
    assert {cell.norm for cell in read_plans(directory.path.parent)} == {"True", "gn"}


@pytest.mark.slow
def test_status_of_a_sweep_under_way(tmp_path, cli):
    """Seen from another process, then after a SIGKILL, then at the end."""
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "epochs=4000", "dataset.augmentation=none")
    process = started(tmp_path, "gnbench", *sweep)
    try:
        end = time.monotonic() + 300
        while not list(tmp_path.rglob("metrics.csv")):
            assert time.monotonic() < end
            time.sleep(0.01)
        done = cli(module="gnbench.status", check=3)
        assert f"process {process.pid} on {socket.gethostname()}" in done.stdout
        assert done.stdout.startswith("study default: 2 cells: 1 running, 1 missing")
    finally:
        process.kill()
        process.communicate()
    done = cli(module="gnbench.status", check=1)
    assert done.stdout.startswith("study default: 2 cells: 1 missing, 1 stale")
    assert f"process {process.pid} on {socket.gethostname()}" in done.stdout
    assert not list(tmp_path.rglob("figure.*"))  # it only looks


def test_exit_codes_follow_from_where_the_cells_stand():
    def code(*states):
        return exit_code([RunState(Path(), state) for state in states])

    assert code("completed", "diverged") == DONE
    assert code("completed", "running", "failed") == AT_WORK
    for state in ("failed", "interrupted", "stale", "missing", "damaged", "out_of_memory"):
        assert code("completed", state) == FAILED


def test_runs_spread_over_the_gpus_of_a_machine(monkeypatch, tmp_path):
    """Two GPUs, five runs: each run takes the GPU with the fewest, and gives its seat back."""
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(devices, "_open", lambda device: None)
    with ExitStack() as stack:
        seats = [stack.enter_context(devices.claimed("auto")).index for _ in range(5)]
        assert seats == [0, 1, 0, 1, 0]
        with devices.claimed("cuda:1") as device:  # named: no seat is taken
            assert device.index == 1
    with devices.claimed("cuda") as device:
        assert device.index == 0
        # What is hidden does not count, and a GPU is the same one under another number.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        with devices.claimed("auto") as other:
            assert other.index == 0
