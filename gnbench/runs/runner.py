"""Runs from directory to record: lock, resume, train, save, close."""

from __future__ import annotations

import functools
import gc
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gnbench import build
from gnbench.check import check, check_machine
from gnbench.config import RunConfig, run_id
from gnbench.datasets import Dataset
from gnbench.errors import ConfigError, DamagedError, Interrupted, LockedError, WriteError
from gnbench.norms import imprecise_statistics
from gnbench.runs import directory as runs
from gnbench.runs import signals
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import Heartbeat
from gnbench.runs.progress import Progress, console, duration, run_log
from gnbench.train import devices, distributed
from gnbench.train.distributed import ProcessGroup
from gnbench.train.loop import Training
from gnbench.train.replicas import MOST_REPLICAS, ReplicaGroup
from gnbench.train.row import Row

log = logging.getLogger(__name__)

Record = dict[str, Any]  # what run.json says
Work = Generator[int, None, Record]  # yields the steps taken so far, returns the record

NOT_BEGUN = -1  # for a number of steps
CHECKPOINT_FORMAT = 1
CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints


@dataclass(frozen=True)
class Shared:
    """What the runs that are trained together share; ``replicas`` replays their steps."""

    device: torch.device
    load: Callable[[], Dataset]  # onto the device, once
    stop: signals.Stop
    replicas: ReplicaGroup | None


def run(config: RunConfig) -> Record:
    """Carry out the run that ``config`` describes and return its record (``run.json``).

    A complete run is returned as it is unless ``rerun``; an interrupted one resumes. Under torchrun
    every process calls this; the first one alone reads and writes the run directory.

    Raises:
        ConfigError: before anything is written.
        DataError: if the dataset is not to be had, likewise.
        LockedError: if another process is at work on the run, unless ``wait``.
        WriteError: if the directory cannot be written.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    if config.replicas > 1:
        raise ConfigError(
            f"replicas={config.replicas}: this is one run; carry out each of config.runs()"
        )
    [(_, outcome)] = run_all([config])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_all(configs: Sequence[RunConfig]) -> Iterator[tuple[int, Record | Exception]]:
    """Carry out runs that differ in their seeds alone; yield number and record as each ends.

    In place of a record, the error that ended a run, with those that `run` raises. Where steps are
    replayed as graphs up to `MOST_REPLICAS` go side by side, as long as none draws random numbers:
    torch has but one generator. One that has no room beside the others, or has to wait for another
    process, comes after them. Elsewhere one follows the other.

    Raises:
        ConfigError: if they cannot be trained, or not on this machine.
        Interrupted: after SIGINT or SIGTERM, with checkpoints saved.
    """
    first = configs[0]
    check(first)
    check_machine(first)
    devices.flush_denormals()  # before torch starts threads
    with (
        signals.heeded() as stop,
        devices.claimed(first.device) as device,
        console(first),
    ):
        replicas = build.replicas_for(first, device) if len(configs) > 1 else None
        if replicas and build.draws_random_numbers(first):
            log.info("replicas=%d: a step draws random numbers; one by one", len(configs))
            replicas = None
        load = functools.cache(lambda: build.load_dataset(first).to(device))
        shared = Shared(device, load, stop, replicas)

        def carried_out(numbers: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
            waits = len(numbers) == 1  # side by side the others would wait, too
            yield from _in_step({n: _carried_out(configs[n], shared, waits) for n in numbers})
            if stop.number is not None:
                raise Interrupted(stop.number)

        size = MOST_REPLICAS if replicas else 1
        for start in range(0, len(configs), size):
            group, later = range(len(configs))[start : start + size], []
            for number, outcome in carried_out(group):
                if len(group) > 1 and _comes_later(configs[number], outcome):
                    later.append(number)
                else:
                    yield number, outcome
            for number in later:
                log.info("%s: once more, alone", configs[number].run_id)
                yield from carried_out([number])


def _comes_later(config: RunConfig, outcome: Record | Exception) -> bool:
    """Tell whether a run beside others has ended for want of memory or of its lock."""
    if isinstance(outcome, Exception):
        return config.wait and isinstance(outcome, LockedError)
    return bool(outcome["status"] == "out_of_memory")


def _in_step(works: dict[int, Work]) -> Iterator[tuple[int, Record | Exception]]:
    """Have the run that is furthest behind go on, until all have come to their ends.

    So those that resume catch up, and then all take the same steps at the same time.
    """
    taken = dict.fromkeys(works, NOT_BEGUN)
    interruption = None
    with ExitStack() as stack:
        for work in works.values():
            stack.callback(work.close)
        while taken:
            number = min(taken, key=taken.__getitem__)
            outcome: Record | Exception | None = None
            try:
                steps = next(works[number])
                # In front: of those at the same step the last one goes on first. If another one
                # did, what the two ask of their group would be a call apart, from then on.
                taken = {number: steps} | {n: s for n, s in taken.items() if n != number}
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


def _carried_out(config: RunConfig, shared: Shared, waits: bool) -> Work:
    """Carry out a run under its lock, unless it is finished."""
    processes = distributed.process_group(shared.device)
    if not processes.leads:
        return _follow(config, shared, processes)
    record = None
    directory = RunDirectory(config.run_dir)
    try:
        if config.rerun or not directory.is_finished():
            shared.load()  # what is wrong with it is said before anything is written
        with directory.locked(config.wait and waits) as heartbeat:
            record = _finished(config, directory)
            if record is None:
                with run_log(config.run_id, directory.log_path) as said:
                    record = yield from _train(
                        config, directory, heartbeat, shared, processes, said
                    )
    finally:
        processes.skip_training(record)
    return record


def _finished(config: RunConfig, directory: RunDirectory) -> Record | None:
    """Return the record of the run if it need not be trained; clear what ``rerun`` replaces.

    Raises:
        ConfigError: if the directory holds a run with other settings.
    """
    try:
        record = directory.record()
        found = None if record is None else run_id(record["config"])
        if record is not None and record["status"] in runs.FINISHED:
            float(record["result"]["test_error"])
    except (DamagedError, LookupError, TypeError, ValueError, AttributeError) as error:
        directory.set_aside(directory.record_path, str(error))
        return None
    if record is None:
        return None
    if found != config.run_id:
        raise ConfigError(f"{directory.path} holds another run ({found}); choose another study")
    if record["status"] not in runs.FINISHED:
        return None
    if config.rerun:
        directory.clear()
        return None
    directory.remove_checkpoint()  # of a process that was killed before it could
    log.info(
        "%s is %s (test error %.2f %%); rerun=true trains it again",
        config.run_id,
        record["status"],
        record["result"]["test_error"],
    )
    return record


class _OpenRun:
    """A run under its lock, from the moment its record is opened until it is closed.

    ``run.json`` is true at every moment.
    """

    def __init__(
        self, config: RunConfig, directory: RunDirectory, heartbeat: Heartbeat, shared: Shared
    ) -> None:
        devices.reset_peak_memory(shared.device)
        self._config = config
        self._directory = directory
        self._heartbeat = heartbeat
        self._shared = shared
        self._training: Training | None = None
        self._gentle = 0  # 1: a signal waits for the step, or the file, at hand
        self._rows: list[dict[str, Any]] = []  # of the metrics so far
        self._seconds_before = 0.0  # spent on the run by earlier processes
        self._began = self._saved = time.monotonic()
        self._saving_seconds = 0.0  # of the last checkpoint
        self._warned = False
        self.record: Record = {
            "status": "running",
            "config": config.plain(),
            "seed": config.seed,
            "error": None,
            "result": None,
            "versions": runs.versions(),
            "device": devices.describe_device(shared.device),
            "engine": config.engine,
            "started": runs.now(),
            "seconds": 0.0,
            "peak_memory_bytes": None,
        }
        directory.write_record(self.record)

    def train(self, processes: ProcessGroup, said: logging.Logger) -> Iterator[int]:
        """Train to the end, from the checkpoint if there is one; ``said`` is the run's logger.

        Yield the steps taken so far before the first and after every engine call.

        Raises:
            Interrupted: after a signal, with a checkpoint saved.
            WriteError: if the directory cannot be written.
        """
        training = self._training = self._prepared(processes, said)
        self.record["engine"] = training.engine.name
        self._directory.write_record(self.record)
        _announce(self._config, training, said)
        self._saved = time.monotonic()
        stop = self._shared.stop
        self._gentle = 1
        stop.gentle += self._gentle
        self._heartbeat.total_steps = training.total_steps
        with Progress(self._config, training, said) as progress:
            yield training.position.step
            for row in _stoppable(training, stop, self._wants_checkpoint, self._save_checkpoint):
                yield training.position.step
                if row is not None:
                    self._rows.append(asdict(row))
                    self._directory.append(self._rows[-1])
                    self._warn_of_rounding(said)
                self._heartbeat.step = training.position.step
                progress.show(row)
        self._directory.save_model(training.engine.model.state_dict())

    def close(self, status: str, error: str | None = None) -> None:
        """Say in the record how the run has ended, and what it reports."""
        if self._training is not None:
            self.record["engine"] = self._training.engine.name
        self.record.update(
            status=status,
            error=error,
            result=runs.result(self._directory.rows(), diverged=status == "diverged"),
            seconds=round(self._seconds(), 3),
            peak_memory_bytes=devices.peak_memory_bytes(self._shared.device),
        )
        self._directory.write_record(self.record)

    def complete(self, said: logging.Logger) -> None:
        """Close a run that has come to its end."""
        assert self._training is not None
        self.close("diverged" if self._training.diverged else "completed")
        # After the record: one of the two says how far the run is.
        self._directory.remove_checkpoint()
        said.info(
            "%s %s in %s: test error %.2f %% (median of the last epochs; last epoch %.2f %%)",
            self._config.run_id,
            self.record["status"],
            duration(self.record["seconds"]),
            self.record["result"]["test_error"],
            self.record["result"]["test_error_final"],
        )

    def let_go(self) -> None:
        """Free what the training holds: the next run of a sweep needs the memory."""
        self._shared.stop.gentle -= self._gentle
        if self._training is not None:
            self._training.engine.close()
            self._training = None

    def _prepared(self, processes: ProcessGroup, said: logging.Logger) -> Training:
        """Build the training, where its checkpoint says it was."""
        self._shared.load()
        state = _checkpoint(self._config, self._directory)
        processes.begin_training(state)
        training = _restored(self._config, self._shared, state)
        if training is None:
            path = self._directory.checkpoint_path
            self._directory.set_aside(path, f"{path} does not fit the run")
            state, training = None, _built(self._config, self._shared)
        if state:
            self._rows = list(state["rows"])
            self._seconds_before = state["seconds"]
            said.info("%s resumes after step %d", self._config.run_id, training.position.step)
        self._directory.restore_rows(self._rows)
        return training

    def _warn_of_rounding(self, said: logging.Logger) -> None:
        """Say once if a batch norm on the CPU has come to where float32 is too coarse."""
        assert self._training is not None
        if self._warned or self._shared.device.type != "cpu":
            return
        if found := imprecise_statistics(self._training.engine.model):
            self._warned = True
            said.warning("%s: float32 loses more than 1e-3 of what is left of that", found)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _wants_checkpoint(self) -> bool:
        assert self._training is not None
        seconds = self._training.engine.companions * self._saving_seconds
        pause = max(self._config.checkpoint_seconds, seconds / CHECKPOINT_SHARE)
        return bool(time.monotonic() - self._saved > pause)

    def _save_checkpoint(self) -> None:
        assert self._training is not None
        began = time.monotonic()
        self._directory.save_checkpoint(
            {
                "format": CHECKPOINT_FORMAT,
                "identity": self._config.digest,
                "versions": runs.versions(),
                "seconds": self._seconds(),
                "rows": self._rows,
                **self._training.state_dict(),
            }
        )
        self._saved = time.monotonic()
        self._saving_seconds = self._saved - began if self._config.checkpoint_seconds else 0.0


def _train(
    config: RunConfig,
    directory: RunDirectory,
    heartbeat: Heartbeat,
    shared: Shared,
    processes: ProcessGroup,
    said: logging.Logger,
) -> Work:
    """Open the record, train, close the record, however it ends."""
    run = _OpenRun(config, directory, heartbeat, shared)
    try:
        yield from run.train(processes, said)
    except KeyboardInterrupt:
        with suppress(WriteError):
            run.close("interrupted")
        said.warning("%s interrupted; the same command resumes it", config.run_id)
        raise
    except Exception as error:
        out_of_memory = devices.is_out_of_memory(error)
        status = "out_of_memory" if out_of_memory else "failed"
        message = str(error).partition("\n")[0] or type(error).__name__
        if not out_of_memory:
            message = f"{type(error).__name__}: {error}"
        # If this cannot be written either, the run stays "running" without a heartbeat.
        with suppress(WriteError):
            run.close(status, message)
        said.error("%s: %s: %s", config.run_id, status.replace("_", " "), message)
        # Several processes do not survive the loss of one.
        if not out_of_memory or processes.size > 1:
            raise
    else:
        run.complete(said)
    finally:
        run.let_go()
    gc.collect()
    if shared.device.type == "cuda":
        torch.cuda.empty_cache()
    return run.record


def _follow(config: RunConfig, shared: Shared, processes: ProcessGroup) -> Record:
    """Train beside rank 0, which writes; return the record if it had one before."""
    train, given = processes.wait_to_begin()
    if not train:
        return given or {"status": "failed", "result": None}
    training = _restored(config, shared, given) or _built(config, shared)
    shared.stop.gentle += 1
    for _ in _stoppable(training, shared.stop, lambda: False, training.state_dict):
        pass
    shared.stop.gentle -= 1
    return {"status": "completed", "result": None}


def _stoppable(
    training: Training,
    stop: signals.Stop,
    wants_checkpoint: Callable[[], bool],
    save: Callable[[], object],
) -> Iterator[Row | None]:
    """Run the training step by step; save when it is time, and before a signal ends it."""
    for row in training.run():
        yield row
        number, due = training.engine.process_group.agree(stop.number, wants_checkpoint())
        if due or number is not None:
            save()
        if number is not None:
            raise Interrupted(number)


def _built(config: RunConfig, shared: Shared) -> Training:
    return build.build_training(config, shared.load(), shared.device, shared.replicas)


def _restored(
    config: RunConfig, shared: Shared, state: Mapping[str, Any] | None
) -> Training | None:
    """Build the training and continue from ``state``; return None if that does not fit."""
    training = _built(config, shared)
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


def _checkpoint(config: RunConfig, directory: RunDirectory) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, if there is one that can be used."""
    path = directory.checkpoint_path
    try:
        state = directory.load_checkpoint()
        if state is None:
            return None
        now, then = runs.versions(), state.get("versions")
        if state.get("format") != CHECKPOINT_FORMAT or not isinstance(then, dict):
            raise DamagedError(f"{path} is not a checkpoint of this form")
        if state.get("identity") != config.digest:
            raise DamagedError(f"{path} belongs to another run")
        for name in ("gnbench", "torch"):
            # Of gnbench the release counts: a commit seldom touches the training.
            if str(then.get(name)).partition("+")[0] != now[name].partition("+")[0]:
                raise DamagedError(
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
    except DamagedError as error:
        directory.set_aside(path, str(error))
        return None


def _announce(config: RunConfig, training: Training, said: logging.Logger) -> None:
    parameters = sum(p.numel() for p in training.engine.model.parameters())
    said.info(
        "%s: %s parameters, %s steps of %d images in %s epochs, engine %s on %s",
        config.run_id,
        f"{parameters:,}",
        f"{training.total_steps:,}",
        training.batch_size,
        f"{training.total_steps / training.steps_per_epoch:.4g}",
        training.engine.name,
        devices.describe_device(training.engine.device),
    )
    if build.trial(config).drops_last:
        said.info(
            "the last batch of an epoch (%d images) is dropped: it would leave a process no image, "
            "or %s one value per channel",
            len(training.train) % training.batch_size,
            config.norm.name,
        )
