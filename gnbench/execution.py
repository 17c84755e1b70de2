"""One run from its directory to its record: lock, resume, train, show progress, heed signals."""

from __future__ import annotations

import logging
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gnbench import runs
from gnbench.config import run_id
from gnbench.engine import EagerEngine
from gnbench.experiment import (
    build_training,
    check_run,
    choose_device,
    load_dataset,
    must_drop_last,
)
from gnbench.training import Row, Training

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, which can be resumed. ``exit_code`` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run(config: DictConfig, directory: str | Path | None = None) -> dict[str, Any]:
    """Carry out the run that ``config`` describes and return its record (``run.json``).

    A complete run is returned as it is unless ``rerun``; an interrupted one resumes. ``directory``
    defaults to ``<outputs>/<study>/<run id>``.

    Raises:
        ConfigError: before anything is written.
        DataError: if the dataset is not to be had.
        LockedError: if another process is at work on the run.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    check_run(config)
    if directory is None:
        directory = Path(config.outputs) / config.study / run_id(config)
    place = runs.Run(directory)
    with place.locked():
        record = _existing_record(place)
        if record is not None and record["status"] in runs.FINISHED and not config.rerun:
            error = record["result"]["test_error"]
            log.info(
                "%s is %s (test error %.2f %%); rerun=true trains it again",
                run_id(config),
                record["status"],
                error,
            )
            return record
        if config.rerun and record is not None and record["status"] in runs.FINISHED:
            load_dataset(config)  # what would fail for want of data must not cost the old result
            place.clear()
        with _log_to(place), _signals() as stop:
            record = _carry_out(config, place, stop)
            if stop.number is not None:  # it came while the finished run was being written
                raise Interrupted(stop.number)
            return record


@contextmanager
def _log_to(place: runs.Run) -> Iterator[None]:
    """Write what gnbench says to the log of the run, too."""
    logger = logging.getLogger("gnbench")
    handler = logging.FileHandler(place.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _carry_out(config: DictConfig, place: runs.Run, stop: _Stop) -> dict[str, Any]:
    """Train under the lock, keeping ``run.json`` true at every moment."""
    device = choose_device(config.device)
    _reset_peak_memory(device)
    started = time.monotonic()
    record: dict[str, Any] = {
        "status": "running",
        "config": OmegaConf.to_container(config, resolve=True),
        "seed": config.seed,
        "error": None,
        "result": None,
        "versions": runs.versions(),
        "device": describe_device(device),
        "engine": EagerEngine.name,
        "started": runs.now(),
        "seconds": 0.0,
        "peak_memory_bytes": None,
    }
    place.write_record(record)

    def close(status: str, error: str | None = None, seconds_before: float = 0.0) -> dict[str, Any]:
        record.update(
            status=status,
            error=error,
            result=runs.result(place.rows(), diverged=status == "diverged"),
            seconds=round(seconds_before + time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory_bytes(device),
        )
        place.write_record(record)
        return record

    seconds_before = 0.0
    try:
        training = build_training(config, load_dataset(config))
        seconds_before = _resume(config, place, training)
        _announce(config, training)
        _train(config, place, training, stop, lambda: seconds_before + time.monotonic() - started)
        place.save_model(training.engine.model.state_dict())
    except torch.OutOfMemoryError as error:
        message = str(error).partition("\n")[0]
        log.error("%s: out of memory: %s", run_id(config), message)
        return close("out_of_memory", message, seconds_before)
    except KeyboardInterrupt:
        close("interrupted", None, seconds_before)
        log.warning("%s interrupted; the same command resumes it", run_id(config))
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        close("failed", message, seconds_before)
        log.error("%s failed: %s", run_id(config), message)
        raise
    record = close("diverged" if training.diverged else "completed", None, seconds_before)
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


def _train(
    config: DictConfig,
    place: runs.Run,
    training: Training,
    stop: _Stop,
    elapsed: Callable[[], float],
) -> None:
    """Drive the training: rows to the metrics, progress shown, checkpoints to the disk."""

    def save() -> None:
        place.save_checkpoint(
            {"run_id": run_id(config), "seconds": elapsed(), **training.state_dict()}
        )

    saved = time.monotonic()
    stop.gentle = True
    with _progress(config, training) as show:
        for row in training.run():
            if row is not None:
                place.append(asdict(row))
            show(row)
            if stop.number is not None or time.monotonic() - saved > config.checkpoint_seconds:
                save()
                saved = time.monotonic()
            if stop.number is not None:
                raise Interrupted(stop.number)


def _existing_record(place: runs.Run) -> dict[str, Any] | None:
    try:
        return place.record()
    except runs.DamagedError as error:
        aside = place.record_path.with_suffix(".json.damaged")
        place.record_path.replace(aside)
        log.warning("%s; set aside as %s", error, aside.name)
        return None


def _resume(config: DictConfig, place: runs.Run, training: Training) -> float:
    """Continue from the checkpoint if there is a whole one; return the seconds spent before it."""
    try:
        state = place.load_checkpoint()
        if state is not None and state.get("run_id") != run_id(config):
            raise runs.DamagedError(f"{place.checkpoint_path} belongs to another run")
        if state is not None and len(place.rows()) < state["position"]["epoch"]:
            raise runs.DamagedError(f"{place.metrics_path} has fewer epochs than the checkpoint")
    except runs.DamagedError as error:
        aside = place.checkpoint_path.with_suffix(".pt.damaged")
        place.checkpoint_path.replace(aside)
        log.warning("%s; set aside as %s", error, aside.name)
        state = None
    if state is None:
        place.keep_epochs(0)
        return 0.0
    training.load_state_dict(state)
    place.keep_epochs(training.position.epoch)
    log.info("%s resumes after step %d", run_id(config), training.position.step)
    return float(state["seconds"])


def _announce(config: DictConfig, training: Training) -> None:
    parameters = sum(p.numel() for p in training.engine.model.parameters())
    log.info(
        "%s: %s parameters, %s steps of %d images in %s epochs, engine %s on %s",
        run_id(config),
        f"{parameters:,}",
        f"{training.total_steps:,}",
        config.batch_size,
        f"{training.total_steps / training.steps_per_epoch:.4g}",
        training.engine.name,
        describe_device(training.engine.device),
    )
    remainder = len(training.train) % config.batch_size
    if must_drop_last(config):
        log.info(
            "the last batch of an epoch (%d images) is dropped: it would leave %s one value "
            "per channel",
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
            desc=f"{config.norm.name} bs{config.batch_size}",
            disable=not show_bar,
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar,
    ):

        def show(row: Row | None) -> None:
            step = training.position.step if row is None else row.step
            if bar.update(step - bar.n) and row is None:  # the bar was redrawn just now
                _, wrong = training.engine.totals()
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


@dataclass
class _Stop:
    """A signal that arrived, and whether to wait for the end of the step."""

    number: int | None = None
    gentle: bool = False


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into `Interrupted`: at once, or while ``gentle`` only noted.

    So a step is never cut in two; a second signal cuts it all the same.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if not stop.gentle or stop.number is not None:
            raise Interrupted(number)
        stop.number = number

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def describe_device(device: torch.device) -> str:
    """Name the device that did the work, for the record."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({_processor()}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since the run began: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        # Nothing before needed the device, and the statistics do not start it.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again
        except OSError:
            log.debug("peak memory is that of the whole process on this system")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
