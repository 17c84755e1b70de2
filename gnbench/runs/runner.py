"""Runs from directory to record: lock, resume, train, save, close."""

from __future__ import annotations

import functools
import gc
import logging
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from gnbench import build
from gnbench.check import check, check_machine
from gnbench.config import RunConfig
from gnbench.errors import ConfigError, DamagedError, Interrupted, LockedError, TakenOverError
from gnbench.identity import run_id
from gnbench.runs import directory as runs
from gnbench.runs import signals
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import Heartbeat
from gnbench.runs.open_run import OpenRun, Record, Shared, built, restored, stoppable
from gnbench.runs.progress import console, run_log
from gnbench.train import devices, distributed
from gnbench.train.cuda_graphs import empty_cache
from gnbench.train.distributed import ProcessGroup
from gnbench.train.replicas import MOST_REPLICAS

log = logging.getLogger(__name__)

Work = Generator[int, None, Record]  # yields the steps taken so far, returns the record

NOT_BEGUN = -1  # for a number of steps


def run(config: RunConfig) -> Record:
    """Carry out the run that ``config`` describes and return its record (``run.json``).

    A complete run is returned as it is unless ``rerun``; an interrupted one resumes. The global
    generators of torch, numpy and Python are seeded by the run. Under torchrun every process calls
    this; the first one alone reads and writes the run directory.

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
    devices.flush_denormals()  # before torch starts threads, which a check may do
    first = configs[0]
    check(first)
    check_machine(first)
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
            group = replace(shared, together=len(numbers))
            yield from _in_step({n: _carried_out(configs[n], group, waits) for n in numbers})
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
    if config.as_published and "printed_error" not in record["result"]:
        log.warning("%s was trained without as_published; rerun=true measures it", config.run_id)
    return record


def _train(
    config: RunConfig,
    directory: RunDirectory,
    heartbeat: Heartbeat,
    shared: Shared,
    processes: ProcessGroup,
    said: logging.Logger,
) -> Work:
    """Open the record, train, close the record, however it ends."""
    run = OpenRun(config, directory, heartbeat, shared)
    try:
        yield from run.train(processes, said)
    except KeyboardInterrupt:
        with suppress(OSError):
            run.close("interrupted")
        said.warning("%s interrupted; the same command resumes it", config.run_id)
        raise
    except TakenOverError:  # the record is another process's
        distributed.abandon()
        raise
    except Exception as error:
        out_of_memory = devices.is_out_of_memory(error)
        status = "out_of_memory" if out_of_memory else "failed"
        message = str(error).partition("\n")[0] or type(error).__name__
        if not out_of_memory:
            message = f"{type(error).__name__}: {error}"
        # If this cannot be written either, the run stays "running" without a heartbeat.
        with suppress(OSError):
            run.close(status, message)
        said.error("%s: %s: %s", config.run_id, status.replace("_", " "), message)
        # Several processes do not survive the loss of one.
        if not out_of_memory or processes.size > 1:
            distributed.abandon()
            raise
    else:
        run.complete(said)
    finally:
        run.let_go()
        gc.collect()
        if shared.device.type == "cuda":
            with suppress(RuntimeError):  # of a device that an error has broken
                empty_cache()
    return run.record


def _follow(config: RunConfig, shared: Shared, processes: ProcessGroup) -> Record:
    """Train beside rank 0, which writes; return the record if it had one before."""
    train, given = processes.wait_to_begin()
    if not train:
        return given or {"status": "failed", "result": None}
    try:
        training = restored(config, shared, given) or built(config, shared)
        shared.stop.gentle += 1
        for _ in stoppable(training, shared.stop, lambda: False, training.state_dict):
            pass
        shared.stop.gentle -= 1
    except Exception:
        distributed.abandon()
        raise
    return {"status": "completed", "result": None}
