"""A run under way: prepared, trained, saved; its record is true at every moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gnbench import build
from gnbench.config import RunConfig
from gnbench.datasets import Dataset
from gnbench.errors import DamagedError, Interrupted
from gnbench.norms import imprecise_statistics
from gnbench.runs import directory as runs
from gnbench.runs import signals
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import Heartbeat, taken_over
from gnbench.runs.progress import Progress, duration
from gnbench.trackers import Guard, TrackedRun
from gnbench.train import as_published, devices
from gnbench.train.distributed import ProcessGroup
from gnbench.train.loop import Training
from gnbench.train.replicas import ReplicaGroup
from gnbench.train.row import VALIDATION, Row

log = logging.getLogger(__name__)

Record = dict[str, Any]  # what run.json says

CHECKPOINT_FORMAT = 1
CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints


@dataclass(frozen=True)
class Shared:
    """What the runs that are trained together share; ``replicas`` replays their steps."""

    device: torch.device
    load: Callable[[], Dataset]  # onto the device, once
    stop: signals.Stop
    replicas: ReplicaGroup | None
    together: int = 1  # so many go side by side


class OpenRun:
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
        self._as_published: list[as_published.EpochRow] = []  # likewise, if they are measured
        self._seconds_before = 0.0  # spent on the run by earlier processes
        self._began = self._saved = time.monotonic()
        self._saving_seconds = 0.0  # of the last checkpoint
        self._balanced_error: float | None = None  # of the last epoch
        self._warned = False
        self._tracker: Guard | None = None
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
            "activation_bytes": None,
        }
        if facts := shared.load().facts:
            self.record["dataset"] = dict(facts)
        directory.write_record(self.record)

    def train(self, processes: ProcessGroup, said: logging.Logger) -> Iterator[int]:
        """Train to the end, from the checkpoint if there is one; ``said`` is the run's logger.

        Yield the steps taken so far before the first and after every engine call.

        Raises:
            Interrupted: after a signal, with a checkpoint saved.
            TakenOverError: if another process took the run over while this one was suspended.
            WriteError: if the directory cannot be written.
        """
        training = self._training = self._prepared(processes, said)
        self.record["engine"] = training.engine.name
        self.record["activation_bytes"] = training.activation_bytes()
        self._check_held()
        self._directory.write_record(self.record)
        _announce(self._config, training, said)
        self._tracker = self._tracked(training, said)
        self._saved = time.monotonic()
        stop = self._shared.stop
        self._gentle = 1
        stop.gentle += self._gentle
        self._heartbeat.total_steps = training.total_steps
        with Progress(self._config, training, said) as progress:
            yield training.position.step
            for row in stoppable(training, stop, self._wants_checkpoint, self._save_checkpoint):
                yield training.position.step
                if row is not None:
                    self._check_held()
                    self._rows.append(_measured(row, training))
                    self._directory.append(self._rows[-1])
                    if self._config.as_published:
                        self._measure_as_published(training, row.epoch)
                    self._warn_of_rounding(said)
                    self._tracker.log(self._rows[-1])
                self._heartbeat.step = training.position.step
                progress.show(row)
        correct = training.engine.correct(training.test).numpy()
        self._check_held()
        self._balanced_error = runs.balanced_error(correct, training.test.labels.cpu().numpy())
        self._directory.save_correct(correct)
        self._directory.save_model(training.engine.model.state_dict())

    def close(self, status: str, error: str | None = None) -> None:
        """Say in the record how the run has ended, and what it reports.

        Raises:
            TakenOverError: if it is another process's by now.
            WriteError: if it cannot be written.
        """
        self._check_held()
        if self._training is not None:
            self.record["engine"] = self._training.engine.name
        result = runs.result(self._directory.rows(), diverged=status == "diverged")
        if result and len(self._as_published) == result["epochs"]:
            kept = as_published.best(self._as_published)
            result |= {"printed_error": kept["printed_error"], "printed_epoch": kept["epoch"]}
        if result is not None and self._balanced_error is not None:
            result["balanced_test_error"] = self._balanced_error
        self.record.update(
            status=status,
            error=error,
            result=result,
            seconds=round(self._seconds(), 3),
            peak_memory_bytes=self._peak_memory_bytes(),
        )
        self._directory.write_record(self.record)

    def _peak_memory_bytes(self) -> int | None:
        """Return the most memory that the run had; None of runs side by side, who share it."""
        shared = self._shared
        return None if shared.together > 1 else devices.peak_memory_bytes(shared.device)

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
        if "printed_error" in self.record["result"]:
            said.info(
                "%s: the report's code would have printed %.2f %% (of epoch %d, its best)",
                self._config.run_id,
                self.record["result"]["printed_error"],
                self.record["result"]["printed_epoch"],
            )

    def _check_held(self) -> None:
        """Make sure that the run is still this process's own, before something is written.

        Raises:
            TakenOverError: if another process took it over, though it may have ended since.
        """
        if self._heartbeat.check():
            return
        try:
            record = self._directory.record()
        except (DamagedError, OSError):  # it says nothing of another process
            return
        if record and record.get("started") != self.record["started"]:
            raise taken_over(self._directory.path, "another process, which has ended")

    def let_go(self) -> None:
        """Free what the training holds, which the next run of a sweep needs; close the tracker."""
        self._shared.stop.gentle -= self._gentle
        if self._training is not None:
            self._training.engine.close()
            self._training = None
        if self._tracker is not None:
            self._tracker.close(self.record)

    def _tracked(self, training: Training, said: logging.Logger) -> Guard:
        """Tell a tracker of the run."""
        config = self._config
        run = TrackedRun(
            config.run_id,
            config.study,
            self._directory.path,
            config.plain(),
            [dict(row) for row in self._rows],
            resumes=training.position.step > 0,
        )
        return Guard(config.tracker, run, said)

    def _prepared(self, processes: ProcessGroup, said: logging.Logger) -> Training:
        """Build the training, where its checkpoint says it was."""
        self._shared.load()
        state = _checkpoint(self._config, self._directory, self._shared.device)
        processes.begin_training(state)
        training = restored(self._config, self._shared, state)
        if training is None:
            path = self._directory.checkpoint_path
            self._directory.set_aside(path, f"{path} does not fit the run")
            state, training = None, built(self._config, self._shared)
        if state:
            self._rows = list(state["rows"])
            self._as_published = list(state.get("as_published", []))
            self._seconds_before = state["seconds"]
            said.info("%s resumes after step %d", self._config.run_id, training.position.step)
        self._directory.restore_rows(self._rows)
        if self._config.as_published:
            self._directory.save_as_published(self._as_published)
            if len(self._as_published) < len(self._rows):
                said.warning(
                    "%s: as_published=true came after epochs that were not measured: there will be "
                    "no printed error; when the run is complete, rerun=true measures all",
                    self._config.run_id,
                )
        return training

    def _measure_as_published(self, training: Training, epoch: int) -> None:
        """Measure what the report's code would have printed of an epoch that has just ended."""
        config, rows, test = self._config, self._as_published, training.test
        wrong = as_published.measure(
            training.engine.model, test, config.precision, config.batch_size
        )
        rows.append(as_published.epoch_row(rows, epoch, wrong, len(test)))
        self._directory.save_as_published(rows)

    def _warn_of_rounding(self, said: logging.Logger) -> None:
        """Say once if a norm on the CPU has come to where float32 is too coarse."""
        assert self._training is not None
        if self._warned or self._shared.device.type != "cpu":
            return
        few, _ = self._training.test.chunk(0, 8)
        if found := imprecise_statistics(self._training.engine.model, few):
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
        self._check_held()
        self._directory.save_checkpoint(
            {
                "format": CHECKPOINT_FORMAT,
                "identity": self._config.digest,
                "versions": runs.versions(),
                "device": devices.describe_device(self._shared.device),
                "seconds": self._seconds(),
                "rows": self._rows,
                "as_published": self._as_published,
                **self._training.state_dict(),
            }
        )
        self._saved = time.monotonic()
        self._saving_seconds = self._saved - began if self._config.checkpoint_seconds else 0.0


def _measured(row: Row, training: Training) -> dict[str, Any]:
    """Return the row of ``metrics.csv``: without a validation it has no columns for it."""
    values = asdict(row)
    if training.validation is None:
        values = {name: value for name, value in values.items() if name not in VALIDATION}
    return values


def stoppable(
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


def built(config: RunConfig, shared: Shared) -> Training:
    """Build the training of a run, at its start."""
    return build.build_training(config, shared.load(), shared.device, shared.replicas)


def restored(config: RunConfig, shared: Shared, state: Mapping[str, Any] | None) -> Training | None:
    """Build the training and continue from ``state``; return None if that does not fit."""
    training = built(config, shared)
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


def _checkpoint(
    config: RunConfig, directory: RunDirectory, device: torch.device
) -> dict[str, Any] | None:
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
        here, there = devices.describe_device(device), str(state.get("device") or "")
        if there and there.partition(" ")[2] != here.partition(" ")[2]:  # "cuda:0 (its name)"
            log.warning(
                "%s was written on %s, this is %s: it is used all the same, but the bits of the "
                "result are not those of one device",
                path,
                there,
                here,
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
    if build.drops_last(config):
        said.info(
            "the last batch of an epoch (%d images) is dropped: it would leave a process no image, "
            "or fewer passes than another, or %s one value per channel",
            len(training.train) % training.batch_size,
            config.norm.name,
        )
