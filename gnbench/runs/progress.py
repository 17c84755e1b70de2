"""What a run says while it trains: a bar or lines on the console, and its own log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gnbench.config import RunConfig
from gnbench.files import explained
from gnbench.train.loop import Training
from gnbench.train.row import Row

RUN_LOGGERS = "gnbench.run."  # followed by the id of a run


class _LogFile(logging.FileHandler):
    """A log file; a disk that is full must not end the training over it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


@contextmanager
def run_log(run_id: str, path: Path) -> Iterator[logging.Logger]:
    """Yield the logger of a run, whose messages go to its file at ``path`` and to the console.

    What gnbench says meanwhile without naming a run goes to the file as well, but not what it says
    of others that are trained side by side.
    """
    logger = logging.getLogger(RUN_LOGGERS + run_id)
    with explained(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.addFilter(lambda r: r.name == logger.name or not r.name.startswith(RUN_LOGGERS))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    everything = logging.getLogger("gnbench")
    everything.addHandler(handler)
    try:
        yield logger
    finally:
        everything.removeHandler(handler)
        with suppress(OSError):
            handler.close()


@contextmanager
def console(config: RunConfig) -> Iterator[None]:
    """Have gnbench say what its runs do, whatever the caller's logging; lines go above the bars."""
    logger = logging.getLogger("gnbench")
    level = logger.level
    logger.setLevel(logging.INFO)
    above: AbstractContextManager[None] = nullcontext()
    if shows_bars(config):
        from tqdm.contrib.logging import logging_redirect_tqdm  # warns in some notebooks

        above = logging_redirect_tqdm()
    try:
        with above:
            yield
    finally:
        logger.setLevel(level)


class Progress:
    """How far a training is: a bar with error and time left on a terminal, elsewhere lines."""

    def __init__(self, config: RunConfig, training: Training, log: logging.Logger) -> None:
        self._training = training
        self._log = log
        self._name = f"{config.norm.name} bs{config.batch_size} seed{config.seed}"
        self._epochs = math.ceil(training.total_steps / training.steps_per_epoch)
        self._began, self._first_step = time.monotonic(), training.position.step
        self._bar: tqdm[Any] = tqdm(
            total=training.total_steps,
            initial=self._first_step,
            unit="step",
            desc=self._name,
            disable=not shows_bars(config),
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, row: Row | None) -> None:
        """Show where the training is; ``row`` is that of an epoch which has just ended."""
        step = self._training.position.step if row is None else row.step
        if self._bar.update(step - self._bar.n) and row is None:  # the bar was redrawn just now
            engine = self._training.engine
            # Of this process's share: to ask the others would stop them.
            wrong = engine.own_totals()[1] * engine.process_group.size
            error = 100 * wrong / self._training.position.seen
            self._bar.set_postfix_str(f"train error {error:.1f} %", refresh=False)
        if row is not None:
            tested = ""
            if row.test_loss is not None:
                self._bar.set_postfix_str(f"test error {row.test_error:.2f} %", refresh=False)
                tested = f"test loss {row.test_loss:.4f} error {row.test_error:.2f} %  "
            if row.val_error is not None:
                tested += f"validation error {row.val_error:.2f} %  "
            self._log.info(
                "%s  epoch %d/%d  step %d  lr %.2e  train loss %.4f error %.2f %%  "
                "%s%.0f images/s  eta %s",
                self._name,
                row.epoch,
                self._epochs,
                row.step,
                row.lr,
                row.train_loss,
                row.train_error,
                tested,
                row.images_per_second,
                duration(self._seconds_a_step(row) * (self._training.total_steps - row.step)),
            )

    def _seconds_a_step(self, row: Row) -> float:
        taken = row.step - self._first_step
        if taken:
            return (time.monotonic() - self._began) / taken
        return row.seconds / self._training.steps_per_epoch  # only its evaluation was left


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def shows_bars(config: RunConfig) -> bool:
    """Tell whether a run shows a bar: on a terminal, unless it is told otherwise."""
    return config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())
