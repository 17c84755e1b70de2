"""How far a whole sweep is: one line that stays, on a terminal, elsewhere one a finished cell."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import MappingProxyType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gnbench.config import RunConfig
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import read_heartbeat
from gnbench.runs.progress import duration
from gnbench.sweep import estimate
from gnbench.sweep.estimate import Measure, makespan
from gnbench.sweep.plan import Cell
from gnbench.sweep.state import MISSING, RunState, run_state
from gnbench.train.devices import choose_device

log = logging.getLogger(__name__)

SECONDS = 1.0  # between two looks at the cells
SHARE = 0.02  # of the time may go into them
WORTH_TIMING = 300.0  # seconds that a worker is guessed to take for all
MEASURED = 10.0  # seconds of work by which a guess is corrected before it is shown
TRUST = 30.0  # seconds of work that a timed cost counts as much as
FAILURES = ("failed", "out_of_memory")


class Sweep:
    """The cells of a command and what became of them, told by their files.

    ``costs`` are in seconds of a worker, by run id: ``timed``, or guessed and of use only beside
    each other. A result that was there before does not count for the cells that ``rerun`` names.
    Cells of one of the ``jobs``, numbers by run id, go one after another in one worker.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        costs: Mapping[str, float],
        workers: int,
        timed: bool,
        rerun: frozenset[str] = frozenset(),
        jobs: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.cells = cells
        self._costs = costs
        self._workers = workers
        self._timed = timed
        self._rerun = rerun
        self._jobs = jobs
        self._records = {cell: _written(cell) for cell in cells}  # before the sweep
        self.ended: dict[Cell, RunState] = {}
        self._steps: dict[Cell, float] = {}  # of the cells that have not, the share they have taken
        self.running = self._most_running = 0
        self._busy = 0.0  # seconds of workers
        self._looked = time.monotonic()
        self.look()
        self._steps_before = dict(self._steps)
        self._last_left = (0.0, self._looked, -1.0)  # what was left, when, after how much work

    def look(self) -> list[RunState]:
        """Find out where the cells stand; return those that have ended since the last look."""
        now = time.monotonic()
        self._busy += self.running * (now - self._looked)
        self._looked = now
        news, running, shares = [], 0, {}
        for cell in self.cells:
            if cell in self.ended:
                continue
            run = run_state(cell.run_dir)
            new = _written(cell) != self._records[cell]
            counts = run.finished and (new or cell.run_id not in self._rerun)
            if counts or (run.state in FAILURES and new):
                self.ended[cell] = run
                news.append(run)
                continue
            running += run.running
            again = cell.run_id in self._rerun and not (new or run.running)
            shares[cell] = 0.0 if again else _share_of_steps(cell, run)
        self.running, self._steps = running, shares
        self._most_running = max(running, self._most_running)
        return news

    @property
    def failures(self) -> int:
        """How many cells have failed."""
        return sum(run.state in FAILURES for run in self.ended.values())

    def share(self) -> float:
        """Return the share of the work that is done, from 0 to 1."""
        whole = sum(self._costs[cell.run_id] for cell in self.cells)
        return 1 - self.work_left() / whole if whole else 1.0

    def seconds_left(self) -> float | None:
        """Return the seconds that the sweep is likely to take yet; None: it is too early to say."""
        done, busy = 0.0, self._busy
        for cell, before in self._steps_before.items():
            done += self._costs[cell.run_id] * (self._steps.get(cell, 1.0) - before)
        left, when, after = self._last_left
        if done != after:  # or there is no news: runs tell every few seconds how far they are
            work, busy = (done + TRUST, busy + TRUST) if self._timed else (done, busy)
            if work <= 0 or busy < MEASURED:
                return None
            left = makespan(self._left(), self._workers or self._most_running) * busy / work
            when = self._looked
            self._last_left = (left, when, done)
        return max(0.0, left - (self._looked - when))

    def work_left(self) -> float:
        """Return the seconds that a single worker would take yet."""
        return sum(self._left())

    def _left(self) -> list[float]:
        left: Counter[int | str] = Counter()
        for cell, share in self._steps.items():
            job = self._jobs.get(cell.run_id, cell.run_id)
            left[job] += self._costs[cell.run_id] * (1 - share)  # type: ignore[assignment]
        return [*map(float, left.values())]

    def __str__(self) -> str:
        failures = self.failures
        done = f"{len(self.ended) - failures} of {len(self.cells)} cells done"
        text = f"{done}, {self.running} running, {failures} failed"
        seconds = self.seconds_left()
        return text if seconds is None else f"{text}, about {duration(seconds)} left"


def overview(configs: Sequence[RunConfig], workers: int, measure: Measure | None = None) -> Sweep:
    """Return the sweep that these cells are; say how long it will take if that can be measured.

    It is if it is long, and on a CPU; else ``measure`` is not called.
    """
    cells = {Cell.of(run): config for config in configs for run in config.runs()}
    rerun = frozenset(cell.run_id for cell, config in cells.items() if config.rerun)

    # Replicas are one job: on a CPU one seed after another.
    jobs = {cell.run_id: id(config) for cell, config in cells.items()}

    def sweep(costs: Sequence[float], timed: bool) -> Sweep:
        by_config = dict(zip(map(id, configs), costs, strict=True))
        by_cell = {cell.run_id: by_config[id(config)] for cell, config in cells.items()}
        return Sweep(list(cells), by_cell, workers, timed, rerun, jobs)

    guess = sweep(estimate.costs(configs), timed=False)
    if measure is None or guess.work_left() < WORTH_TIMING:
        return guess
    if any(choose_device(name).type != "cpu" for name in {config.device for config in configs}):
        return guess
    try:
        timed = sweep(estimate.costs(configs, measure), timed=True)
    except Exception as error:  # a cell that fails so will say so itself
        log.debug("nothing could be timed: %s", error)
        return guess
    done = len(timed.ended)
    others = f", of which {done} are done; the others" if done else ""
    together = f", {workers} at a time" if workers > 1 else ""
    print(
        f"gnbench: {len(cells)} cells{others}{together}: about {hours(timed.seconds_left() or 0)} "
        "(by a few steps of each network and batch size)",
        file=sys.stderr,
    )
    return timed


def hours(seconds: float) -> str:
    """Write a time that is not known well."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 36000 else f"{seconds / 3600:.0f} hours"


@contextmanager
def shown(sweep: Sweep, live: bool) -> Iterator[None]:
    """Say how far a sweep is while it goes on: ``live`` in a line that stays, else now and then."""
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(sweep, live, over), daemon=True)
    thread.start()
    try:
        with logging_redirect_tqdm() if live else nullcontext():  # messages go above the line
            yield
    finally:
        over.set()
        thread.join()


def _show(sweep: Sweep, live: bool, over: threading.Event) -> None:
    bar: tqdm[Any] = tqdm(
        total=1.0,
        bar_format="{desc} |{bar}|{percentage:3.0f} %",
        disable=not live,
        dynamic_ncols=True,
        leave=False,
    )
    pause = SECONDS
    ended = False
    while not ended:
        ended = over.wait(pause)
        began = time.monotonic()
        news = sweep.look()
        if live:
            for run in news:
                error = "" if run.test_error is None else f" (test error {run.test_error:.2f} %)"
                bar.write(f"{run.run_dir.name}: {run.state}{error}", file=sys.stderr)
            bar.set_description_str(str(sweep), refresh=False)
            bar.n = sweep.share()
            bar.refresh()
        elif news and len(sweep.ended) < len(sweep.cells):
            tqdm.write(f"gnbench: {sweep}", file=sys.stderr)  # above the bar of a run
        pause = max(SECONDS, (time.monotonic() - began) / SHARE)
    bar.close()


def _share_of_steps(cell: Cell, run: RunState) -> float:
    """Return the share of its steps that a run has taken, as far as its files tell."""
    if run.state == MISSING:
        return 0.0
    if beat := read_heartbeat(cell.run_dir):
        return beat.step / beat.total_steps if beat.total_steps else 0.0
    directory = RunDirectory(cell.run_dir)
    with suppress(Exception):  # damaged: it is not known
        record = directory.record()
        rows = directory.rows()
        if record and rows:
            return min(1.0, len(rows) / int(record["config"]["epochs"]))
    return 0.0


def _written(cell: Cell) -> int | None:
    """Return when the record of a cell was written, in nanoseconds since 1970."""
    try:
        return RunDirectory(cell.run_dir).record_path.stat().st_mtime_ns
    except OSError:
        return None
