"""Runs from directory to record: lock, resume, train, show progress, heed signals."""

from __future__ import annotations

import functools
import gc
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gnbench.build import (
    build_training,
    check_run,
    draws_random_numbers,
    load_dataset,
    must_drop_last,
    pack_for,
)
from gnbench.config import ConfigError, digest, run_id
from gnbench.datasets import Dataset
from gnbench.runs import directory as runs
from gnbench.runs import signals
from gnbench.runs.lock import LockedError, Presence
from gnbench.runs.signals import Interrupted
from gnbench.train import devices, distributed
from gnbench.train.cuda_graphs import MOST_BRANCHES, Pack
from gnbench.train.distributed import Crew
from gnbench.train.loop import Row, Training

log = logging.getLogger(__name__)

Record = dict[str, Any]  # what run.json says
Work = Generator[int, None, Record]

NOT_BEGUN = -1  # for a number of steps
CHECKPOINT_FORMAT = 1
CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints

_at_work: ContextVar[runs.Run | None] = ContextVar("_at_work", default=None)


def run(config: DictConfig, directory: str | Path | None = None) -> Record:
    """Carry out the run that ``config`` describes and return its record (``run.json``).

    A complete run is returned as it is unless ``rerun``; an interrupted one resumes. ``directory``
    defaults to ``<outputs>/<study>/<run id>``. Under torchrun every process calls this; the first
    one alone reads and writes the directory.

    Raises:
        ConfigError: before anything is written.
        DataError: if the dataset is not to be had.
        LockedError: if another process is at work on the run, unless ``wait``.
        WriteError: if the directory cannot be written.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    check_run(config)
    if config.replicas > 1:
        raise ConfigError(
            f"replicas={config.replicas}: this is one run; carry out each of gnbench.replicas(…)"
        )
    if directory is None:
        directory = Path(config.outputs) / config.study / run_id(config)
    [(_, outcome)] = run_all([(config, directory)])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_all(
    members: Sequence[tuple[DictConfig, str | Path]],
) -> Iterator[tuple[int, Record | Exception]]:
    """Carry out checked runs that differ in their seeds; yield number and record as each ends.

    In place of a record, the error that ended a run, with those that `run` raises. Where steps are
    replayed as graphs up to `MOST_BRANCHES` go side by side, as long as none draws random numbers:
    the generator of those is but one. One that has no room beside the others, or has to wait for
    another process, comes after them. Elsewhere one follows the other.

    Raises:
        ConfigError: if the machine has no such device.
        Interrupted: after SIGINT or SIGTERM, with checkpoints saved.
    """
    devices.flush_denormals()  # before torch starts threads
    config = members[0][0]
    with (
        signals.heeded() as stop,
        devices.claimed(config.device) as device,
        _talking(),
        _lines_above_the_bars() if _shows_bars(config) else nullcontext(),
    ):
        pack = pack_for(config, device) if len(members) > 1 else None
        if pack and draws_random_numbers(config):
            log.info("replicas=%d: a step draws random numbers; one by one", len(members))
            pack = None

        @functools.cache
        def dataset() -> Dataset:
            return load_dataset(config).to(device)

        def carried_out(numbers: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
            started = {}
            for number in numbers:
                one, directory = members[number]
                waits = one.wait and len(numbers) == 1
                place = runs.Run(directory)
                started[number] = _begun(one, place, waits, device, dataset, pack, stop)
            yield from _in_step(started)
            if stop.number is not None:
                raise Interrupted(stop.number)

        every = range(len(members))
        size = MOST_BRANCHES if pack else 1
        for start in every[::size]:
            group, later = every[start : start + size], []
            for number, outcome in carried_out(group):
                if len(group) > 1 and _comes_later(outcome, config):
                    later.append(number)
                else:
                    yield number, outcome
            for number in later:
                log.info("%s: once more, alone", run_id(members[number][0]))
                yield from carried_out([number])


def _comes_later(outcome: Record | Exception, config: DictConfig) -> bool:
    """Tell whether a run of a pack has failed to begin for want of memory or of its lock."""
    if isinstance(outcome, Exception):
        return config.wait and isinstance(outcome, LockedError)
    return bool(outcome["status"] == "out_of_memory")


def _in_step(started: dict[int, Work]) -> Iterator[tuple[int, Record | Exception]]:
    """Have the one furthest behind take the next steps, until all have come to their ends."""
    contexts = {number: copy_context() for number in started}
    taken = dict.fromkeys(started, NOT_BEGUN)
    interruption = None
    with ExitStack() as stack:
        for number, work in started.items():
            stack.callback(contexts[number].run, work.close)
        while taken:
            number = min(taken, key=taken.__getitem__)
            outcome: Record | Exception | None = None
            try:
                taken[number] = contexts[number].run(next, started[number])
                continue
            except StopIteration as end:
                outcome = end.value
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold the model and its moments
                outcome = error
            except KeyboardInterrupt as error:  # those under way have yet to save theirs
                interruption = error
                taken = {one: steps for one, steps in taken.items() if steps != NOT_BEGUN}
            taken.pop(number, None)
            if outcome is not None:
                yield number, outcome
    if interruption is not None:
        raise interruption


def _begun(
    config: DictConfig,
    place: runs.Run,
    wait: bool,
    device: torch.device,
    dataset: Callable[[], Dataset],
    pack: Pack | None,
    stop: signals.Stop,
) -> Work:
    """Carry out a run under its lock; yield the steps it has taken after every engine call."""
    crew = distributed.crew(device)
    if not crew.leads:
        return _follow(config, dataset, device, crew, stop)
    record = None
    try:
        with place.locked(wait) as presence:
            record = _finished(config, place)
            if record is None:
                with _log_to(place):
                    record = yield from _carry_out(
                        config, place, device, dataset, crew, pack, presence, stop
                    )
    finally:
        crew.dismiss(record)
    return record


def _finished(config: DictConfig, place: runs.Run) -> Record | None:
    """Return the record of the run if it need not be trained; clear what ``rerun`` replaces.

    Raises:
        ConfigError: if the directory holds a run with other settings.
    """
    try:
        record = place.record()
        found = None if record is None else run_id(record["config"])
        if record is not None and record["status"] in runs.FINISHED:
            float(record["result"]["test_error"])
    except (runs.DamagedError, LookupError, TypeError, ValueError, AttributeError) as error:
        place.set_aside(place.record_path, str(error))
        return None
    if record is None:
        return None
    if found != run_id(config):
        raise ConfigError(
            f"{place.directory} holds another run ({found}); choose another directory"
        )
    if record["status"] not in runs.FINISHED:
        return None
    if config.rerun:
        load_dataset(config)  # what would fail for want of data must not cost the old result
        place.clear()
        return None
    place.remove_checkpoint()  # of a process that was killed before it could
    log.info(
        "%s is %s (test error %.2f %%); rerun=true trains it again",
        run_id(config),
        record["status"],
        record["result"]["test_error"],
    )
    return record


@contextmanager
def _talking() -> Iterator[None]:
    """Have gnbench say what its runs do, whatever the caller's logging."""
    logger = logging.getLogger("gnbench")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)


class _RunLog(logging.FileHandler):
    """The log of a run; a disk that is full must not end the training over it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


@contextmanager
def _log_to(place: runs.Run) -> Iterator[None]:
    """Write what gnbench says to the log of the run, too, but not what it says of others."""
    logger = logging.getLogger("gnbench")
    with runs.explained(place.log_path):
        handler = _RunLog(place.log_path, encoding="utf-8")
    _at_work.set(place)
    handler.addFilter(lambda _: _at_work.get() is place)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def _carry_out(
    config: DictConfig,
    place: runs.Run,
    device: torch.device,
    load: Callable[[], Dataset],
    crew: Crew,
    pack: Pack | None,
    presence: Presence,
    stop: signals.Stop,
) -> Work:
    """Train under the lock, keeping ``run.json`` true at every moment."""
    devices.reset_peak_memory(device)
    started = time.monotonic()
    record: Record = {
        "status": "running",
        "config": OmegaConf.to_container(config, resolve=True),
        "seed": config.seed,
        "error": None,
        "result": None,
        "versions": runs.versions(),
        "device": devices.describe_device(device),
        "engine": config.engine,
        "started": runs.now(),
        "seconds": 0.0,
        "peak_memory_bytes": None,
    }
    place.write_record(record)
    training: Training | None = None
    seconds_before = 0.0
    gentle = 0

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def close(status: str, error: str | None = None) -> Record:
        record.update(
            status=status,
            error=error,
            engine=training.engine.name if training else record["engine"],
            result=runs.result(place.rows(), diverged=status == "diverged"),
            seconds=round(elapsed(), 3),
            peak_memory_bytes=devices.peak_memory_bytes(device),
        )
        place.write_record(record)
        return record

    try:
        dataset = load()
        state = _checkpoint(config, place)
        crew.begin(state)
        training = _restored(config, dataset, device, pack, state)
        if training is None:
            place.set_aside(place.checkpoint_path, f"{place.checkpoint_path} does not fit the run")
            state, training = None, build_training(config, dataset, device, pack)
        record["engine"] = training.engine.name
        place.write_record(record)
        rows = list(state["rows"]) if state else []
        place.restore_rows(rows)
        if state:
            seconds_before = state["seconds"]
            log.info("%s resumes after step %d", run_id(config), training.position.step)
        _announce(config, training)
        gentle = 1
        stop.gentle += gentle
        yield from drive(config, place, training, rows, presence, stop, elapsed)
        place.save_model(training.engine.model.state_dict())
    except KeyboardInterrupt:
        with suppress(runs.WriteError):
            close("interrupted")
        log.warning("%s interrupted; the same command resumes it", run_id(config))
        raise
    except Exception as error:
        out_of_memory = devices.is_out_of_memory(error)
        message = str(error).partition("\n")[0] or type(error).__name__
        if not out_of_memory:
            message = f"{type(error).__name__}: {error}"
        # If this cannot be written either, the run stays "running" without a sign of life.
        with suppress(runs.WriteError):
            close("out_of_memory" if out_of_memory else "failed", message)
        if not out_of_memory or crew.size > 1:  # a crew does not survive the loss of one
            log.error("%s failed: %s", run_id(config), message)
            raise
        log.error("%s: out of memory: %s", run_id(config), message)
    else:
        close("diverged" if training.diverged else "completed")
        place.remove_checkpoint()  # not before the record: one of the two says how far the run is
        log.info(
            "%s %s in %s: test error %.2f %% (median of the last epochs; last epoch %.2f %%)",
            run_id(config),
            record["status"],
            _duration(record["seconds"]),
            record["result"]["test_error"],
            record["result"]["test_error_final"],
        )
        return record
    finally:
        stop.gentle -= gentle
        if training is not None:
            training.engine.close()
    training = state = None  # the next run of a sweep needs the memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def _follow(
    config: DictConfig,
    load: Callable[[], Dataset],
    device: torch.device,
    crew: Crew,
    stop: signals.Stop,
) -> Record:
    """Train beside rank 0, which writes; return the record if it had one before."""
    train, given = crew.orders()
    if not train:
        return given or {"status": "failed", "result": None}
    dataset = load()
    training = _restored(config, dataset, device, None, given)
    training = training or build_training(config, dataset, device)
    stop.gentle += 1
    for _ in _stoppable(training, stop, wants_checkpoint=lambda: False, save=training.state_dict):
        pass
    stop.gentle -= 1
    return {"status": "completed", "result": None}


def _restored(
    config: DictConfig,
    dataset: Dataset,
    device: torch.device,
    pack: Pack | None,
    state: Mapping[str, Any] | None,
) -> Training | None:
    """Build the training and continue from ``state``; return None if that does not fit."""
    training = build_training(config, dataset, device, pack)
    if state is None:
        return training
    try:
        training.load_state_dict(dict(state))
        return training
    except BaseException as error:
        training.engine.close()
        misfits = (LookupError, TypeError, ValueError, RuntimeError, AttributeError)
        if not isinstance(error, misfits) or devices.is_out_of_memory(error):
            raise
        log.debug("%s", error)
        return None


def _stoppable(
    training: Training,
    stop: signals.Stop,
    wants_checkpoint: Callable[[], bool],
    save: Callable[[], object],
) -> Iterator[Row | None]:
    """Run the training step by step; save when it is time, and before a signal ends it."""
    for row in training.run():
        yield row
        number, due = training.engine.crew.agree(stop.number, wants_checkpoint())
        if due or number is not None:
            save()
        if number is not None:
            raise Interrupted(number)


def drive(
    config: DictConfig,
    place: runs.Run,
    training: Training,
    rows: list[dict[str, Any]],
    presence: Presence,
    stop: signals.Stop,
    elapsed: Callable[[], float],
) -> Iterator[int]:
    """Train to the end: rows to the metrics, progress shown, checkpoints to the disk.

    Yield the steps taken so far before the first and after every engine call. ``rows`` are those
    of the epochs before; ``elapsed`` tells the seconds spent on the run so far.

    Raises:
        Interrupted: after a signal, with a checkpoint saved.
        WriteError: if the directory cannot be written.
    """
    saved, cost = time.monotonic(), 0.0
    presence.total_steps = training.total_steps

    def wants_checkpoint() -> bool:
        costs = training.engine.companions * cost
        pause = max(config.checkpoint_seconds, costs / CHECKPOINT_SHARE)
        return bool(time.monotonic() - saved > pause)

    def save() -> None:
        nonlocal saved, cost
        began = time.monotonic()
        place.save_checkpoint(
            {
                "format": CHECKPOINT_FORMAT,
                "identity": digest(config),
                "versions": runs.versions(),
                "seconds": elapsed(),
                "rows": rows,
                **training.state_dict(),
            }
        )
        saved = time.monotonic()
        cost = saved - began if config.checkpoint_seconds else 0.0

    with _progress(config, training) as show:
        yield training.position.step
        for row in _stoppable(training, stop, wants_checkpoint, save):
            yield training.position.step
            if row is not None:
                rows.append(asdict(row))
                place.append(rows[-1])
            presence.step = training.position.step
            show(row)


def _checkpoint(config: DictConfig, place: runs.Run) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, if there is one that can be used."""
    path = place.checkpoint_path
    try:
        state = place.load_checkpoint()
        if state is None:
            return None
        now, then = runs.versions(), state.get("versions")
        if state.get("format") != CHECKPOINT_FORMAT or not isinstance(then, dict):
            raise runs.DamagedError(f"{path} is not a checkpoint of this form")
        if state.get("identity") != digest(config):
            raise runs.DamagedError(f"{path} belongs to another run")
        for name in ("gnbench", "torch"):
            # Of gnbench the release counts: a commit seldom touches the training.
            if str(then.get(name)).partition("+")[0] != now[name].partition("+")[0]:
                raise runs.DamagedError(
                    f"{path} was written with {name} {then.get(name)}, this is {now[name]}"
                )
        if then["gnbench"] != now["gnbench"]:
            log.warning(
                "%s was written by gnbench %s, this is %s; it is used all the same",
                path,
                then["gnbench"],
                now["gnbench"],
            )
        return state
    except runs.DamagedError as error:
        place.set_aside(path, str(error))
        return None


def _announce(config: DictConfig, training: Training) -> None:
    parameters = sum(p.numel() for p in training.engine.model.parameters())
    log.info(
        "%s: %s parameters, %s steps of %d images in %s epochs, engine %s on %s",
        run_id(config),
        f"{parameters:,}",
        f"{training.total_steps:,}",
        training.batch_size,
        f"{training.total_steps / training.steps_per_epoch:.4g}",
        training.engine.name,
        devices.describe_device(training.engine.device),
    )
    remainder = len(training.train) % training.batch_size
    if must_drop_last(config):
        log.info(
            "the last batch of an epoch (%d images) is dropped: it would leave a process no image, "
            "or %s one value per channel",
            remainder,
            config.norm.name,
        )


@contextmanager
def _progress(config: DictConfig, training: Training) -> Iterator[Callable[[Row | None], None]]:
    """Show a bar with ETA and error on a terminal, a line an epoch elsewhere."""
    began, first_step = time.monotonic(), training.position.step
    epochs = math.ceil(training.total_steps / training.steps_per_epoch)
    name = f"{config.norm.name} bs{config.batch_size} seed{config.seed}"
    with tqdm(
        total=training.total_steps,
        initial=first_step,
        unit="step",
        desc=name,
        disable=not _shows_bars(config),
        dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:

        def show(row: Row | None) -> None:
            step = training.position.step if row is None else row.step
            if bar.update(step - bar.n) and row is None:  # the bar was redrawn just now
                # Of this process's share: to ask the others would stop them.
                wrong = training.engine.own_totals()[1] * training.engine.crew.size
                bar.set_postfix_str(
                    f"train error {100 * wrong / training.position.seen:.1f} %", refresh=False
                )
            if row is not None:
                bar.set_postfix_str(f"test error {row.test_error:.2f} %", refresh=False)
                taken = row.step - first_step  # none if only the epoch's evaluation was left
                seconds = (
                    (time.monotonic() - began) / taken
                    if taken
                    else row.seconds / training.steps_per_epoch
                )
                log.info(
                    "%s  epoch %d/%d  step %d  lr %.2e  train loss %.4f error %.2f %%  "
                    "test loss %.4f error %.2f %%  %.0f images/s  eta %s",
                    name,
                    row.epoch,
                    epochs,
                    row.step,
                    row.lr,
                    row.train_loss,
                    row.train_error,
                    row.test_loss,
                    row.test_error,
                    row.images_per_second,
                    _duration(seconds * (training.total_steps - row.step)),
                )

        yield show


def _shows_bars(config: DictConfig) -> bool:
    return config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())


def _lines_above_the_bars() -> AbstractContextManager[None]:
    from tqdm.contrib.logging import logging_redirect_tqdm  # warns in a notebook without widgets

    return logging_redirect_tqdm()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
