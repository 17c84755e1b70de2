"""Candidates at work, each run in a process of its own that takes steps when told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from gnbench import cli
from gnbench.bench.compare import DETERMINISTIC, PLAIN, Candidate, CandidateError
from gnbench.bench.plain_loop import PlainLoop
from gnbench.build import build_training, load_dataset, replicas_for
from gnbench.config import RunConfig
from gnbench.errors import one_line
from gnbench.train import devices
from gnbench.train.graph_engine import STEPS_A_GRAPH
from gnbench.train.loop import Position

SETTLING = 5  # steps before a turn is timed: more than data workers can have made ready
ENDS = 3  # of epochs: the first warms up, at the second graphs are recorded
COUNTED_STEPS = 128  # whose kernels are counted, one look at the loss among them


class Processes:
    """For each run of a candidate an executor with a single process, deaf to Ctrl-C. See `end`.

    Raises:
        CandidateError: here and in every method, if one of them fails.
    """

    def __init__(
        self, candidate: Candidate, config: RunConfig, threads: int, state: Path | None = None
    ) -> None:
        self.candidate = candidate
        context = multiprocessing.get_context("spawn")
        self.executors = [
            ProcessPoolExecutor(1, context, initializer=lead) for _ in range(candidate.runs)
        ]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for those begun now
        try:
            for executor in self.executors:
                executor.submit(os.getpid)  # which starts its process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.call(start, candidate, config, threads, state, time.time())

    def call(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """Have all call a function of this module at once; return what they answer."""
        try:
            futures = [one.submit(function, *arguments) for one in self.executors]
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise CandidateError(f"{self.candidate}: its process died") from None
        except Exception as error:
            explained = isinstance(error, CandidateError) or cli.is_explained(error)
            if not (explained or devices.is_out_of_memory(error)):
                traceback.print_exception(error)
            raise CandidateError(f"{self.candidate}: {one_line(error)}") from error

    def turn(self, seconds: float) -> float:
        """Train for about so many seconds; return the steps a second of all runs together."""
        return float(sum(self.call(turn, seconds)))


def end(team: Iterable[Processes]) -> None:
    """End the processes of all candidates: after the steps at hand, or without them."""
    # Each waits for its executor's thread, which else would close pipes while Python, about to
    # exit, writes into them.
    ending = [
        threading.Thread(target=executor.shutdown, kwargs={"cancel_futures": True})
        for processes in team
        for executor in processes.executors
    ]
    for one in ending:
        one.start()
    for child in multiprocessing.active_children():
        child.join(1)
        assert child.pid
        with suppress(ProcessLookupError):  # it does not lead a group yet, or all have ended
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        while child.is_alive():  # the executor's thread waits as well: one is told late
            child.join()
    for one in ending:
        one.join()


# What follows is done in such a process.

_loop: PlainLoop | EngineLoop
_startup_seconds: float


def lead() -> None:
    """Lead a process group, with which the data workers of this process can be ended.

    One that is forked as its parent dies would not notice, and wait for ever. So would this process
    if the command is killed, from now on, though it may have no work yet.
    """
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def start(
    candidate: Candidate, config: RunConfig, threads: int, state: Path | None, began: float
) -> None:
    """Build the loop of this process, which was started at the time ``began``, and take a step.

    Then continue with the weights and moments of ``state``, if any.
    """
    global _loop, _startup_seconds
    if candidate.engine != PLAIN:
        devices.flush_denormals()  # before torch starts threads
    torch.set_num_threads(threads)
    devices.reset_peak_memory(devices.choose_device(config.device))
    config = config.with_(precision=candidate.precision)
    if candidate.is_plain:
        _loop = PlainLoop(config, deterministic=candidate.engine == DETERMINISTIC)
    else:
        config = config.with_(engine=candidate.engine, compile=candidate.compiled)
        _loop = EngineLoop(config, candidate.replicas)
    _loop.take(1)
    _loop.wait()
    _startup_seconds = time.time() - began
    if state:
        _loop.load(state)


def warm_up(steps: int, state: Path) -> None:
    """Have a plain loop take so many steps and save its state."""
    assert isinstance(_loop, PlainLoop)
    _loop.take(steps)
    _loop.save(state)


def turn(seconds: float) -> float:
    """Take steps for about so many seconds; return the steps a second of all trainings."""
    _loop.take(SETTLING)
    _loop.wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += _loop.take(1)
    _loop.wait()
    return done / (time.perf_counter() - began)


def facts() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return columns of a row, of one process; then what is known of each kernel.

    ``startup_seconds`` are those to its first step.
    """
    kernels = _loop.kernels() if isinstance(_loop, EngineLoop) else []
    return {
        "threads": torch.get_num_threads(),
        "startup_seconds": _startup_seconds,
        "peak_memory_bytes": devices.peak_memory_bytes(_loop.device),  # without data workers
        "kernels_per_step": sum(kernel["per_step"] for kernel in kernels) or None,
    }, kernels


def _end_with_parent() -> None:
    """End this process if the command was killed: an executor would wait for work forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.killpg(0, signal.SIGKILL)


class EngineLoop:
    """Trainings of gnbench as runs do them, without their directories and test images.

    ``replicas`` of them, in step with each other.
    """

    def __init__(self, config: RunConfig, replicas: int = 1) -> None:
        self.device = devices.choose_device(config.device)
        dataset = load_dataset(config)
        dataset = replace(
            dataset, test_images=dataset.test_images[:1], test_labels=dataset.test_labels[:1]
        ).to(self.device)
        self._group = replicas_for(config, self.device) if replicas > 1 else None
        self.trainings = [
            build_training(config.with_(seed=seed), dataset, self.device, self._group)
            for seed in range(config.seed, config.seed + replicas)
        ]
        self._name = self.trainings[0].engine.name
        self._calls = [training.run() for training in self.trainings]

    def take(self, count: int) -> int:
        """Take at least ``count`` steps in each; return how many in all, perhaps under way yet."""
        before = [training.position.step for training in self.trainings]
        while self.trainings[0].position.step < before[0] + count:
            for calls in self._calls:
                if next(calls, self) is self:
                    raise CandidateError("the training came to its end (it diverged)")
        return sum(training.position.step for training in self.trainings) - sum(before)

    def wait(self) -> None:
        """Wait until the device has done all steps.

        Raises:
            CandidateError: if an engine has become another one than was to be timed.
        """
        for training in self.trainings:
            training.engine.own_totals()
            if training.engine.name != self._name:
                raise CandidateError(f"fell back to {training.engine.name}")
        if self._group and self._group.divided:
            raise CandidateError("fell back to graphs one by one")

    def load(self, path: Path) -> None:
        """Continue with weights and moments that a plain loop saved."""
        saved = torch.load(path, weights_only=True)
        state = {"model": saved["model"], "optimizer": {"state": saved["moments"]}}
        for training in self.trainings:
            training.engine.load_state_dict(state)
        if self.device.type == "cuda":
            self.pass_epoch_ends()

    def pass_epoch_ends(self) -> None:
        """Have the graphs of an epoch's end recorded before the clock runs."""
        for _ in range(ENDS):
            steps = self.trainings[0].steps_per_epoch
            late = max(0, steps - 2 * STEPS_A_GRAPH)
            for training in self.trainings:
                epoch = training.position.epoch
                training.position = Position(epoch=epoch, step=late, epoch_step=late)
            self._calls = [training.run() for training in self.trainings]
            self.take(steps - late + 1)
        self.wait()

    def kernels(self) -> list[dict[str, Any]]:
        """Return the kernels and copies that a step is on a GPU, the one that takes longest first.

        Their ``kernel`` (a name), how often ``per_step``, and ``microseconds_per_step``, with all
        that goes with a step. Side by side their times overlap. Empty on a CPU, and where the
        profiler, which comes after graphs were captured, cannot count.
        """
        if self.device.type != "cuda":
            return []
        try:
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
                steps = self.take(COUNTED_STEPS // len(self.trainings))
                self.wait()
            times = defaultdict(list)
            for event in profile.events():
                if event.device_type.name == "CUDA":
                    times[event.name].append(event.time_range.elapsed_us())
        except CandidateError:
            raise
        except Exception as error:
            print(f"gnbench: no kernels counted: {one_line(error)}", file=sys.stderr)
            return []
        found = [
            {"kernel": name, "per_step": len(t) / steps, "microseconds_per_step": sum(t) / steps}
            for name, t in times.items()
        ]
        return sorted(found, key=lambda kernel: -kernel["microseconds_per_step"])
