"""What a sweep is going to take, and how far it is."""

import json
import signal
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from gnbench.runs import lock
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import Beat
from gnbench.sweep import estimate, progress
from gnbench.sweep.estimate import Rate
from gnbench.sweep.plan import Cell
from tests import tiny
from tests.conftest import started


@pytest.fixture
def runs(tiny_config):
    """Compose four runs of 12 steps and two test passes over 20 images."""
    return [tiny_config(f"seed={seed}") for seed in range(4)]


def written(config, status, error=None):
    run = RunDirectory(config.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    result = None if error is None else {"test_error": error}
    record = {"status": status, "config": config.plain(), "result": result, "error": "it broke"}
    run.record_path.write_text(json.dumps(record))


def alive(config, step, total):
    """Have a process of another machine be at work."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    beat = Beat("node7", "another boot", 1, "2026-11-23T08:00:00+00:00", time.time(), step, total)
    (config.run_dir / lock.HEARTBEAT).write_text(json.dumps(asdict(beat)))


def over(config):
    (config.run_dir / lock.HEARTBEAT).unlink()


def test_a_worker_takes_the_next_cell_when_it_is_free():
    assert estimate.makespan([4, 1, 1, 1, 1], 2) == 4
    assert estimate.makespan([1, 1, 1, 1, 4], 2) == 6
    assert estimate.makespan([1, 2, 3], 1) == 6
    assert estimate.makespan([], 2) == 0


def test_runs_that_differ_in_seed_and_learning_rate_are_timed_once(tiny_config, runs):
    others = [tiny_config("optimizer.lr=0.01"), tiny_config("batch_size=24", "evaluate_every=7")]
    asked = []

    def measure(some):
        asked.extend(some)
        return [Rate(step=0.5 * config.batch_size, image=0.1) for config in some]

    costs = estimate.costs([*runs, *others], measure)
    assert [config.batch_size for config in asked] == [8, 24]
    assert costs == pytest.approx(5 * [12 * 4 + 2 * 20 * 0.1] + [4 * 12 + 2 * 20 * 0.1])


def test_what_is_not_timed_is_guessed_by_how_wrong_the_guess_was_of_the_others(
    tiny_config, monkeypatch
):
    monkeypatch.setattr(estimate, "MOST_TIMED", 2)
    configs = [tiny_config(f"batch_size={size}") for size in (2, 4, 8, 12, 24)]
    asked = []

    def measure(some):
        asked.extend(some)
        return [
            Rate(2 * estimate.guessed(one).step, 2 * estimate.guessed(one).image) for one in some
        ]

    timed = estimate.costs(configs, measure)
    assert len(asked) == 2
    assert timed == pytest.approx([2 * cost for cost in estimate.costs(configs)])
    assert estimate.costs(configs)[0] > estimate.costs(configs)[4]  # more steps


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
def test_steps_are_timed_without_touching_the_random_generator(tiny_config, norm, monkeypatch):
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    before = torch.get_rng_state()
    rate = estimate.timed(tiny_config(f"norm={norm}", "batch.accumulate=2"))
    assert rate.step > 0
    assert rate.image > 0
    assert torch.equal(torch.get_rng_state(), before)


def sweep(runs, cost=100.0, workers=2, timed=True, rerun=()):
    cells = [Cell.of(run) for run in runs]
    costs = dict.fromkeys((cell.run_id for cell in cells), cost)
    return progress.Sweep(cells, costs, workers, timed, frozenset(rerun))


def test_a_sweep_counts_its_cells_and_the_time_that_is_left(runs, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    written(runs[0], "completed", 7.0)
    written(runs[1], "failed")  # by an earlier sweep: it is trained again
    one = sweep(runs)
    assert str(one) == "1 of 4 cells done, 0 running, 0 failed, about 0:03:20 left"
    alive(runs[1], 0, 10)
    one.look()
    clock[0] = 150.0  # half as fast as was thought: 50 of 100 seconds of work
    alive(runs[1], 5, 10)
    one.look()
    # What was thought counts as much as 30 seconds: (150 + 30) / (50 + 30) times as long.
    left = (100 + 50) * 180 / 80
    assert one.seconds_left() == pytest.approx(left)
    assert one.share() == pytest.approx(0.375)
    clock[0] = 160.0
    one.look()
    assert one.seconds_left() == pytest.approx(left - 10)  # no news
    over(runs[1])
    time.sleep(0.01)  # a clock of the file system is coarse
    written(runs[1], "failed")
    written(runs[2], "diverged", 90.0)
    assert sorted(run.state for run in one.look()) == ["diverged", "failed"]
    assert str(one).startswith("2 of 4 cells done, 0 running, 1 failed, about")
    assert one.look() == []


def test_a_guess_alone_says_nothing_of_the_time(runs, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    one = sweep(runs, cost=3.0, timed=False)
    alive(runs[0], 0, 10)
    one.look()
    assert str(one) == "0 of 4 cells done, 1 running, 0 failed"
    clock[0] = 20.0
    alive(runs[0], 10, 10)
    one.look()
    assert one.seconds_left() == pytest.approx(40)  # 20 seconds each, two at a time


def test_what_is_trained_again_is_not_done_before_it_is(runs):
    written(runs[0], "completed", 7.0)
    one = sweep(runs, rerun=[runs[0].run_id])
    assert (len(one.ended), one.share()) == (0, 0.0)
    time.sleep(0.01)
    written(runs[0], "completed", 8.0)
    assert [run.test_error for run in one.look()] == [8.0]


@pytest.mark.parametrize("live", [True, False])
def test_a_sweep_is_shown_in_one_line_or_in_lines(runs, live, monkeypatch, capfd):
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with progress.shown(sweep(runs), live):
        written(runs[0], "completed", 7.5)
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert ("\r" in said) == live
    assert "1 of 4 cells done, 0 running, 0 failed, about" in said
    assert (f"{runs[0].run_id}: completed (test error 7.50 %)" in said) == live


def test_only_a_long_sweep_is_timed(runs, tiny_config, capsys):
    def fail(some):
        raise AssertionError

    assert progress.overview(runs, 2, fail).work_left() < 300
    long = [run.with_(epochs=100_000) for run in runs]
    assert progress.overview(long, 2, fail).work_left() > 300  # not timed: the guess stands
    assert capsys.readouterr().err == ""
    progress.overview(long, 2, lambda some: [Rate(0.006, 0.0)])  # 600,000 steps in an hour
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("gnbench: 4 cells, 2 at a time: about 2.0 hours (")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_sweep_says_first_what_it_takes(tmp_path, workers):
    """Then, where cells go side by side, has one line for all."""
    sweep = ("-m", *tiny.OVERRIDES, *tiny.SMALL, "norm=bn,gn", "epochs=100000", "progress=bar")
    process = started(tmp_path, "gnbench", *sweep, f"hydra.launcher.n_jobs={workers}")
    first = process.stderr.readline()
    until = time.monotonic() + 120
    while len(list(tmp_path.rglob(".alive"))) < workers and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    together = ", 2 at a time" if workers == 2 else ""
    assert first.startswith(f"gnbench: 2 cells{together}: about ")
    assert ("0 of 2 cells done, 2 running, 0 failed, about" in err) == (workers == 2)
    assert ("step/s" in err) == (workers == 1)  # the bar of a run
    assert "Traceback" not in err


def test_replicas_are_one_job_of_a_worker(runs):
    """Three cells of four seeds on two workers take as long as two cells: eight seeds."""
    cells = [runs[0].with_(seed=seed, replicas=4) for seed in (0, 4, 8)]
    overview = progress.overview(cells, 2)
    assert len(overview.cells) == 12
    assert len(overview._left()) == 3
    one = overview.work_left() / 12
    assert estimate.makespan(overview._left(), 2) == pytest.approx(8 * one)
