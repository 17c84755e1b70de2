"""Who is at work, and where every cell stands: for another process, and for another machine."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gnbench import cli
from gnbench.runs import lock as presence
from gnbench.runs.directory import Run
from gnbench.runs.lock import LockedError, Sign
from gnbench.runs.runner import run
from gnbench.sweep import state as grid
from gnbench.train import devices
from tests import faults, tiny


def sign(**changes):
    host = Sign("node7", "another boot", 4711, "2026-11-23T08:00:00+00:00", time.time(), 30, 120)
    return replace(host, **changes)


def leave(directory, left):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sign").write_text(json.dumps(asdict(left)))
    (directory / "sign").replace(directory / presence.SIGN)


def test_a_run_gives_signs_of_life_and_none_when_it_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.01)
    with Run(tmp_path / "run").locked() as held:
        first = presence.read_sign(tmp_path / "run")
        assert (first.pid, first.host) == (os.getpid(), socket.gethostname())
        assert first.is_fresh()
        held.step, held.total_steps = 5, 10
        until = time.monotonic() + 10
        while presence.read_sign(tmp_path / "run").step != 5 and time.monotonic() < until:
            time.sleep(0.01)
        latest = presence.read_sign(tmp_path / "run")
        assert (latest.step, latest.total_steps) == (5, 10)
        assert latest.beat > first.beat
    assert presence.read_sign(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("changes", "fresh"),
    [
        ({}, True),  # of another machine, where a pid says nothing
        ({"beat": time.time() - 3600}, False),
        ({"machine": presence._machine(), "pid": os.getpid()}, True),
        ({"machine": presence._machine(), "pid": 2**22 + 1}, False),  # there is no such process
        ({"machine": presence._machine(), "pid": 1}, True),  # another user's, perhaps
    ],
)
def test_a_sign_is_fresh_while_its_process_can_be_alive(changes, fresh):
    assert sign(**changes).is_fresh() is fresh


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this system")
def test_a_killed_process_that_nobody_has_waited_for_is_dead():
    with subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE) as child:
        child.stdout.read()
        until = time.monotonic() + 10
        left = sign(machine=presence._machine(), pid=child.pid)
        while left.is_fresh() and time.monotonic() < until:
            time.sleep(0.01)
        assert child.returncode is None  # the system still knows its pid
        assert not left.is_fresh()


def test_a_free_lock_is_not_taken_from_a_holder_on_another_machine(tmp_path, monkeypatch):
    """As on a network file system that keeps locks to one machine."""
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.1)
    directory = tmp_path / "run"
    leave(directory, sign())
    over = threading.Event()

    def live():
        while not over.wait(0.1):
            leave(directory, sign(beat=time.time(), step=31))

    other = threading.Thread(target=live)
    other.start()
    try:
        with (
            pytest.raises(LockedError, match="is being trained by process 4711 on node7 since"),
            Run(directory).locked(),
        ):
            pass
    finally:
        over.set()
        other.join()
    # It is silent now, and so taken for dead.
    with Run(directory).locked():
        assert presence.read_sign(directory).pid == os.getpid()


def test_waiting_for_a_holder_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.1)
    directory = tmp_path / "run"
    leave(directory, sign())
    seen = []

    def live():
        for step in range(6):
            time.sleep(0.1)
            leave(directory, sign(beat=time.time(), step=step))
        seen.append(time.monotonic())
        (directory / presence.SIGN).unlink()

    other = threading.Thread(target=live)
    other.start()
    with Run(directory).locked(wait=True):
        assert seen
        assert time.monotonic() >= seen[0]
    other.join()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"host": 1}', "\x00\xff"])
def test_a_damaged_sign_is_none(tmp_path, text):
    (tmp_path / presence.SIGN).write_text(text)
    assert presence.read_sign(tmp_path) is None


@pytest.fixture
def study(tmp_path, tiny_config):
    """A study with a cell in every state."""
    for seed in range(7):
        run(tiny_config("epochs=1", "study=grid", f"seed={seed}"))
    folder = tmp_path / "outputs" / "grid"
    cells = {cell.seed: cell for cell in grid.cells(folder).values()}

    def change(seed, left=None, **values):
        place = Run(cells[seed].directory)
        place.write_record({**place.record(), "result": None, **values})
        if left is not None:
            leave(place.directory, left)

    change(1, sign(), status="running")
    change(2, sign(beat=time.time() - 3600), status="running")
    change(3, status="failed", error="RuntimeError: the dog ate it\nTraceback")
    change(4, status="out_of_memory", error="16 GiB")
    change(5, status="interrupted")
    Run(cells[6].directory).record_path.write_text("{")
    absent = [replace(cells[0], run_id="tiny-absent", seed=8)]
    grid.write_plan(folder, [*cells.values(), *absent])
    return folder


def test_status_tells_where_every_cell_stands(study, cli):
    done = cli("study=grid", f"outputs={study.parent}", module="gnbench.status", check=3)
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
    assert "last sign of life 0 s ago" in said or "last sign of life 1 s ago" in said
    assert "process 4711 on node7 since 2026-11-23T08:00:00+00:00 died; the same command" in said
    assert "RuntimeError: the dog ate it" in said
    assert "Traceback" not in said
    assert "completed" not in said
    states = [line.split()[0] for line in table[1:] if not line.startswith(" ")]
    assert sorted(states) == [
        "damaged", "failed", "interrupted", "missing", "out_of_memory", "running", "stale",
    ]  # fmt: skip


def test_status_exit_codes(study, cli, tiny_config):
    def status():
        return cli(f"outputs={study.parent}", module="gnbench.status").returncode

    assert status() == 3  # somebody is at work
    for path in study.glob(f"*/{presence.SIGN}"):
        path.unlink()
    assert status() == 1  # nobody is, and some cells have no result
    for path in study.glob("sweep-*.json"):
        path.unlink()
    for seed in range(7):
        run(tiny_config("epochs=1", "study=grid", f"seed={seed}"))
    assert status() == 0
    assert cli("study=nope", f"outputs={study.parent}", module="gnbench.status").returncode == 2


def test_status_of_a_sweep_under_way(tmp_path, cli):
    """Seen from another process, then after a SIGKILL, then at the end."""
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "epochs=400", "dataset.augmentation=none")
    process = faults.start(sweep, tmp_path)
    end = time.monotonic() + 120
    while not list(tmp_path.rglob("metrics.csv")):
        assert time.monotonic() < end
        time.sleep(0.01)
    done = cli(module="gnbench.status", check=3)
    assert f"process {process.pid} on {socket.gethostname()}" in done.stdout
    assert done.stdout.startswith("study default: 2 cells: 1 running, 1 missing")
    process.kill()
    process.join()
    done = cli(module="gnbench.status", check=1)
    assert done.stdout.startswith("study default: 2 cells: 1 missing, 1 stale")
    assert f"process {process.pid} on {socket.gethostname()}" in done.stdout
    assert not list(tmp_path.rglob("figure.*"))  # it only looks


def test_status_imports_nothing_heavy(study):
    script = (
        "import sys\n"
        "from gnbench import status\n"
        f"sys.argv = ['status', 'outputs={study.parent}']\n"
        "try: status.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_exit_codes_follow_from_where_the_cells_stand():
    def code(*states):
        return grid.exit_code([grid.Standing("", state) for state in states])

    assert code("completed", "diverged") == cli.DONE
    assert code("completed", "running", "failed") == cli.AT_WORK
    for state in ("failed", "interrupted", "stale", "missing", "damaged", "out_of_memory"):
        assert code("completed", state) == cli.FAILED


def test_runs_spread_over_the_gpus_of_a_machine(monkeypatch, tmp_path):
    """Two GPUs, five runs: each run takes the GPU with the fewest, and gives its seat back."""
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
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
