"""One run from its directory to its record: lock, resume, train, show progress, heed signals."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gnbench import devices, distributed, runs, signals
from gnbench.config import ConfigError, digest, run_id
from gnbench.datasets import Dataset
from gnbench.distributed import Crew
from gnbench.engine import EagerEngine
from gnbench.experiment import build_training, check_run, load_dataset, must_drop_last
from gnbench.presence import Presence
from gnbench.signals import Interrupted
from gnbench.training import Row, Training

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints


def run(config: DictConfig, directory: str | Path | None = None) -> dict[str, Any]:
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
    devices.flush_denormals()  # before torch starts threads
    check_run(config)
    if config.replicas > 1:
        raise ConfigError(
            f"replicas={config.replicas}: this is one run; carry out each of gnbench.replicas(…)"
        )
    if directory is None:
        directory = Path(config.outputs) / config.study / run_id(config)
    place = runs.Run(directory)
    with signals.heeded() as stop, devices.claimed(config.device) as device:
        crew = distributed.crew(device)
        if not crew.leads:
            return _follow(config, device, crew, stop)
        record = None
        try:
            with place.locked(config.wait) as presence:
                record = _finished(config, place)
                if record is None:
                    with _log_to(place):
                        record = _carry_out(config, place, device, crew, presence, stop)
        finally:
            crew.dismiss(record)
        if stop.number is not None:  # it came while the finished run was being written
            raise Interrupted(stop.number)
        return record


def _finished(config: DictConfig, place: runs.Run) -> dict[str, Any] | None:
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


class _RunLog(logging.FileHandler):
    """The log of a run; a disk that is full must not end the training over it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


@contextmanager
def _log_to(place: runs.Run) -> Iterator[None]:
    """Write what gnbench says to the log of the run, too."""
    logger = logging.getLogger("gnbench")
    with runs.explained(place.log_path):
        handler = _RunLog(place.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def _carry_out(
    config: DictConfig,
    place: runs.Run,
    device: torch.device,
    crew: Crew,
    presence: Presence,
    stop: signals.Stop,
) -> dict[str, Any]:
    """Train under the lock, keeping ``run.json`` true at every moment."""
    devices.reset_peak_memory(device)
    started = time.monotonic()
    record: dict[str, Any] = {
        "status": "running",
        "config": OmegaConf.to_container(config, resolve=True),
        "seed": config.seed,
        "error": None,
        "result": None,
        "versions": runs.versions(),
        "device": devices.describe_device(device),
        "engine": EagerEngine.kind if config.engine == "auto" else config.engine,
        "started": runs.now(),
        "seconds": 0.0,
        "peak_memory_bytes": None,
    }
    place.write_record(record)
    training: Training | None = None
    seconds_before = 0.0

    def elapsed() -> float:
        return seconds_before + time.monotonic() - started

    def close(status: str, error: str | None = None) -> dict[str, Any]:
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
        dataset = load_dataset(config)
        state = _checkpoint(config, place)
        crew.begin(state)
        training = _restored(config, dataset, device, state)
        if training is None:
            place.set_aside(place.checkpoint_path, f"{place.checkpoint_path} does not fit the run")
            state, training = None, build_training(config, dataset, device)
        rows = list(state["rows"]) if state else []
        place.restore_rows(rows)
        if state:
            seconds_before = state["seconds"]
            log.info("%s resumes after step %d", run_id(config), training.position.step)
        _announce(config, training)
        drive(config, place, training, rows, presence, stop, elapsed)
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
        if training is not None:
            training.engine.close()
    training = state = None  # the next run of a sweep needs the memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def _follow(
    config: DictConfig, device: torch.device, crew: Crew, stop: signals.Stop
) -> dict[str, Any]:
    """Train beside rank 0, which writes; return the record if it had one before."""
    train, given = crew.orders()
    if not train:
        return given or {"status": "failed", "result": None}
    dataset = load_dataset(config)
    training = _restored(config, dataset, device, given)
    training = training or build_training(config, dataset, device)
    for _ in _stoppable(training, stop, wants_checkpoint=lambda: False, save=training.state_dict):
        pass
    return {"status": "completed", "result": None}


def _restored(
    config: DictConfig,
    dataset: Dataset,
    device: torch.device,
    state: Mapping[str, Any] | None,
) -> Training | None:
    """Build the training and continue from ``state``; return None if that does not fit."""
    training = build_training(config, dataset, device)
    if state is not None:
        try:
            training.load_state_dict(dict(state))
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if devices.is_out_of_memory(error):
                raise
            log.debug("%s", error)
            return None
    return training


def _stoppable(
    training: Training,
    stop: signals.Stop,
    wants_checkpoint: Callable[[], bool],
    save: Callable[[], object],
) -> Iterator[Row | None]:
    """Run the training step by step; save when it is time, and before a signal ends it."""
    stop.gentle = True
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
) -> None:
    """Train to the end: rows to the metrics, progress shown, checkpoints to the disk.

    ``rows`` are those of the epochs before; ``elapsed`` tells the seconds spent on the run so far.

    Raises:
        Interrupted: after a signal, with a checkpoint saved.
        WriteError: if the directory cannot be written.
    """
    saved, cost = time.monotonic(), 0.0
    presence.total_steps = training.total_steps

    def wants_checkpoint() -> bool:
        pause = max(config.checkpoint_seconds, cost / CHECKPOINT_SHARE)
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
        for row in _stoppable(training, stop, wants_checkpoint, save):
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
    show_bar = config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())
    began, first_step = time.monotonic(), training.position.step
    epochs = math.ceil(training.total_steps / training.steps_per_epoch)
    with (
        _lines_above_the_bar() if show_bar else nullcontext(),
        tqdm(
            total=training.total_steps,
            initial=first_step,
            unit="step",
            desc=f"{config.norm.name} bs{config.batch_size} seed{config.seed}",
            disable=not show_bar,
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar,
    ):

        def show(row: Row | None) -> None:
            step = training.position.step if row is None else row.step
            if bar.update(step - bar.n) and row is None:  # the bar was redrawn just now
                # Of this process's share: to ask the others would stop them.
                wrong = training.engine.wrong.item() * training.engine.crew.size
                bar.set_postfix_str(
                    f"train error {100 * wrong / training.position.seen:.1f} %", refresh=False
                )
            if row is not None:
                bar.set_postfix_str(f"test error {row.test_error:.2f} %", refresh=False)
                rate = (time.monotonic() - began) / (row.step - first_step)
                log.info(
                    "epoch %d/%d  step %d  lr %.2e  train loss %.4f error %.2f %%  "
                    "test loss %.4f error %.2f %%  %.0f images/s  eta %s",
                    row.epoch,
                    epochs,
                    row.step,
                    row.lr,
                    row.train_loss,
                    row.train_error,
                    row.test_loss,
                    row.test_error,
                    row.images_per_second,
                    _duration(rate * (training.total_steps - row.step)),
                )

        yield show


def _lines_above_the_bar() -> AbstractContextManager[None]:
    from tqdm.contrib.logging import logging_redirect_tqdm  # warns in a notebook without widgets

    return logging_redirect_tqdm()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
