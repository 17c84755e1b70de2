"""Hydra's launchers: are they there, what if a worker is killed, what if the command is stopped."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from gnbench.config import RunConfig
from gnbench.errors import ConfigError, DamagedError, one_line
from gnbench.identity import run_id
from gnbench.runs.directory import RunDirectory
from gnbench.runs.lock import LOCK
from gnbench.sweep.account import Reported, configs, failed, hear, objective, planned
from gnbench.sweep.estimate import Measure, Rate
from gnbench.sweep.plan import Cell
from gnbench.sweep.workers import at_a_time
from gnbench.train import distributed

log = logging.getLogger(__name__)

# launcher, overrides of each cell, initial_job_idx -> what each cell returned
Launch = Callable[..., Sequence[JobReturn]]

EXTRAS = {
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_ray_launcher": "ray",
}
ATTEMPTS = 3  # how often a cell may lose its worker; the last time it runs alone
STOPPING = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_SAVE = 60.0  # after a signal; a second signal does not wait

_stopped_by: int | None = None
_in_command = False  # False in the workers, which import this module anew


def prepare(launcher: DictConfig) -> None:
    """Have the launcher of a sweep survive what its workers meet.

    Raises:
        ConfigError: if its plugin is not installed, or under torchrun, whose processes are one run,
            it is told to have several workers.
    """
    if not hasattr(BasicLauncher.launch, "__wrapped__"):
        BasicLauncher.launch = _one_by_one(BasicLauncher.launch)  # type: ignore[method-assign]
    module, _, name = launcher._target_.rpartition(".")
    extra = next((e for package, e in EXTRAS.items() if module.startswith(package)), None)
    if extra is None:
        return
    if distributed.world_size() > 1 and launcher.get("n_jobs") != 0:  # which is joblib's default
        raise ConfigError(f"hydra/launcher: {extra} and torchrun do not go together; choose one")
    try:
        plugin = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f"hydra/launcher: the plugin for {extra} is not installed ({error}): "
            f"pip install 'gnbench[{extra}]'"
        ) from error
    if name == "SlurmLauncher" and not shutil.which("srun"):
        raise ConfigError("hydra/launcher: no cluster here (Slurm's srun is not on PATH)")
    wrap = {"joblib": _side_by_side, "ray": _interruptible, "slurm": _complete}[extra]
    if not hasattr(plugin.launch, "__wrapped__"):
        plugin.launch = _hearing_of_failures(wrap(plugin.launch))


def is_remote(launcher: DictConfig) -> bool:
    """Tell whether runs may land on other machines, which this one cannot speak for."""
    ray_cluster = launcher.get("ray") and launcher.ray.init.get("address")
    return launcher._target_.endswith(".SlurmLauncher") or bool(ray_cluster)


def is_command() -> bool:
    """Tell the process of the command from those of workers."""
    return _in_command


def enter(config: RunConfig) -> RunConfig:
    """In a worker, leave Ctrl-C, and a bar on the terminal, to the command; return the run.

    The terminal is for the line of the sweep: of what a run says, warnings go above it.
    """
    _leave_interrupts_to_the_command()
    if _in_command:
        return config
    from gnbench.runs.progress import shows_bars  # imports torch: not for --help

    if not shows_bars(config):
        return config
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
        if sys.stderr.isatty():
            handler.setFormatter(logging.Formatter("\r\x1b[K%(message)s"))  # erases that line
    return config.with_(progress="lines")


def _leave_interrupts_to_the_command() -> None:
    """Have a worker ignore Ctrl-C, which reaches it too, busy or idle."""
    if not _in_command and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def heeding_signals() -> Iterator[None]:
    """On SIGINT and SIGTERM have the workers save and end before the command does."""
    global _in_command
    _in_command = True
    heeded = [n for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heeded}
    try:
        yield
    except KeyboardInterrupt as stop:
        if _stopped_by is not None:
            stop.exit_code = 128 + _stopped_by  # type: ignore[attr-defined]
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped_by
    _stopped_by = number
    for again in STOPPING:
        signal.signal(again, signal.default_int_handler)
    # Who is at a run now is told to save it. Waited for is that these processes let go of these
    # runs, not that nobody is at work: an idle worker may take up another run meanwhile, and ends
    # with all the others when the KeyboardInterrupt reaches the launcher.
    at_work = _at_work()
    for pid in {pid for pid, _ in at_work}:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + SECONDS_TO_SAVE
    while at_work & _at_work() and time.monotonic() < until:
        time.sleep(0.05)
    raise KeyboardInterrupt


def _at_work() -> set[tuple[int, str]]:
    """Return the processes below this one that hold the lock of a run, as far as /proc tells.

    A launcher does not tell which worker is at which cell, nor which of its processes are workers.
    """
    locks = {str(cell.run_dir.resolve() / LOCK) for cell in planned}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    found = set()
    for pid in below - {os.getpid()}:
        with suppress(OSError):  # it has just ended
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # this file has just been closed
                    if (file := str(link.readlink())) in locks:
                        found.add((pid, file))
    return found


def _hearing_of_failures(launch: Launch) -> Launch:
    """Take over what workers have seen fail; this process knows but its own failures."""

    @functools.wraps(launch)
    def launch_all(*arguments: Any, **numbers: Any) -> Sequence[JobReturn]:
        returns = launch(*arguments, **numbers)
        for one in returns:
            if isinstance(one._return_value, Reported):
                hear(one._return_value)
        return returns

    return launch_all


@contextmanager
def _overseen(workers: int, measure: Measure | None) -> Iterator[None]:
    """Say what a sweep is going to cost, if that can be measured, and on the way how far it is.

    ``workers`` 0: it is not known how many there are.
    """
    if not configs or distributed.rank() > 0:
        yield
        return
    from gnbench.runs.progress import shows_bars
    from gnbench.sweep import progress

    alone = distributed.world_size() == 1
    timed = measure if alone and all(config.estimate for config in configs) else None
    seen: AbstractContextManager[None] = nullcontext()
    try:
        overview = progress.overview(configs, workers, timed)
        seen = progress.shown(overview, live=workers != 1 and shows_bars(configs[0]))
    except Exception as error:  # of a network of one's own: the sweep goes on unseen
        log.warning("how far the sweep is cannot be told: %s", one_line(error))
    with seen:
        yield


def _one_by_one(launch: Launch) -> Launch:
    """Carry out the cells one after another in this process."""

    @functools.wraps(launch)
    def launch_all(
        launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        with _overseen(1, None if initial_job_idx else lambda runs: list(map(_timed, runs))):
            return launch(launcher, job_overrides, initial_job_idx)

    return launch_all


def _timed(config: RunConfig) -> Rate:
    """Time steps of a run in this process, that of a worker or of the command."""
    _leave_interrupts_to_the_command()
    from gnbench.sweep import estimate

    return estimate.timed(config)


def _side_by_side(launch: Launch) -> Launch:
    """Carry out as many cells at a time as were chosen, or fit; a single one in this process."""
    surviving = _surviving(launch)

    @functools.wraps(launch)
    def launch_all(
        launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        import joblib

        # Data that a worker keeps for its next run look like a leak to joblib, which then starts
        # another one.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")
        chosen = launcher.joblib.get("n_jobs") or 0
        runs = configs or _chosen_as_it_goes(launcher, job_overrides)
        # As at the first launch of a sweep, if it has several: threads follow from it, and bits.
        workers = chosen or getattr(launcher, "workers", 0) or at_a_time(runs)
        launcher.workers = workers
        if workers < 0:  # joblib's -1: all cores, -2: all but one
            workers = max(1, joblib.cpu_count() + 1 + workers)
        if workers == 1:
            basic = BasicLauncher()
            basic.setup(
                hydra_context=launcher.hydra_context,
                task_function=launcher.task_function,
                config=launcher.config,
            )
            return basic.launch(job_overrides, initial_job_idx)

        def measure(runs: Sequence[RunConfig]) -> list[Rate]:
            from hydra_plugins.hydra_joblib_launcher import _core

            settings = {**launcher.joblib, "backend": "loky"}  # so that the sweep has these workers
            _core.process_joblib_cfg(settings)
            return list(joblib.Parallel(**settings)(joblib.delayed(_timed)(run) for run in runs))

        launcher.joblib["n_jobs"] = workers
        try:
            with _overseen(workers, None if initial_job_idx else measure):
                return surviving(launcher, job_overrides, initial_job_idx)
        finally:
            launcher.joblib["n_jobs"] = chosen  # a sweeper may launch again, more or fewer cells

    return launch_all


def _chosen_as_it_goes(launcher: Any, job_overrides: Sequence[Sequence[str]]) -> list[RunConfig]:
    """Return the cells of a sweeper that chooses them as it goes, of which the command then knows.

    One that is faulty is left out: it fails as a job, which the sweeper may take.
    """
    from gnbench.train.devices import choose_device

    runs = []
    for overrides in job_overrides:
        with suppress(Exception):
            run = _parsed(launcher, overrides)
            choose_device(run.device)
            runs.append(run)
    planned.extend(c for c in (Cell.of(r) for run in runs for r in run.runs()) if c not in planned)
    return runs


def _surviving(launch: Launch) -> Launch:
    """Launch again what a killed worker took with it: joblib then kills all the others, too.

    Who is to blame cannot be seen, so cells that were at work when it happened go last, and one
    that was so ``ATTEMPTS`` times, the last time alone, is given up.
    """

    @functools.wraps(launch)
    def launch_all(
        launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        returns: dict[int, JobReturn] = {}
        lost: Counter[int] = Counter()  # how often each cell has lost its worker
        while todo := [i for i in range(len(job_overrides)) if i not in returns]:
            least = min(lost[i] for i in todo)
            group = [i for i in todo if lost[i] == least]
            if least == ATTEMPTS - 1:
                group = group[:1]
            began = time.time_ns()
            try:
                results = launch(launcher, [job_overrides[i] for i in group], initial_job_idx)
                returns.update(zip(group, results, strict=True))
                continue
            except TerminatedWorkerError:
                pass  # what the others have returned is lost as well, but they have their records
            cells = {i: _parsed(launcher, job_overrides[i]) for i in group}
            records = {i: _record_since(began, cells[i]) for i in group}
            at_work = [i for i, r in records.items() if r and r["status"] == "running"]
            ended = [i for i, r in records.items() if r and r["status"] != "running"]
            returns.update((i, _return(records[i])) for i in ended)
            lost.update(at_work or [i for i in group if i not in ended])
            for i in (i for i in group if lost[i] == ATTEMPTS):
                record = records[i]  # of several replicas that of the one at work
                killer = run_id(record["config"]) if record else cells[i].run_id
                failed[killer] = f"its worker was killed {ATTEMPTS} times"
                returns[i] = _return(None)
            log.warning(
                "gnbench: a worker was killed (out of memory?) and joblib gave up those beside it; "
                "launching again what they were at: %s",
                ", ".join(cells[i].run_id for i in at_work) or "nothing yet",
            )
        return [returns[i] for i in sorted(returns)]

    return launch_all


def _interruptible(launch: Launch) -> Launch:
    """Take SIGTERM back, which Ray takes for itself; wait for all cells though one be lost."""

    @functools.wraps(launch)
    def launch_all(launcher: Any, *cells: Any, **numbers: Any) -> Sequence[JobReturn]:
        # Started here and not by the plugin, Ray has set its handlers before ours are set again.
        package = type(launcher).__module__.rpartition(".")[0]
        importlib.import_module(f"{package}._launcher_util").start_ray(launcher.ray_cfg.init)
        for number in STOPPING:
            signal.signal(number, _stop)
        ray: Any = importlib.import_module("ray")

        def get_or_nan(reference: Any) -> JobReturn:
            try:
                result: JobReturn = get(reference)
                return result
            except ray.exceptions.RayError as error:
                log.error("a run is lost (%s); the same command resumes it", type(error).__name__)
                return _return(None)

        # The plugin gets one result after the other and stops at the first that is lost.
        get, ray.get = ray.get, get_or_nan
        try:
            with _overseen(0, None):
                return launch(launcher, *cells, **numbers)
        finally:
            ray.get = get

    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    return launch_all


def _complete(launch: Launch) -> Launch:
    """Name a job that brought no result, and wait for the others: submitit raises at the first."""

    @functools.wraps(launch)
    def launch_all(launcher: Any, *cells: Any, **numbers: Any) -> Sequence[JobReturn]:
        from submitit.core import core, utils

        def results_or_nan(job: core.Job[JobReturn]) -> list[JobReturn]:
            try:
                return results(job)
            except utils.UncompletedJobError:
                log.error(
                    "job %s is lost (%s), see %s; the same command resumes it",
                    job.job_id,
                    job.state,
                    job.paths.stdout,
                )
                return [_return(None)]

        results = core.Job.results
        core.Job.results = results_or_nan  # type: ignore[method-assign, assignment]
        try:
            with _overseen(0, None):
                return launch(launcher, *cells, **numbers)
        finally:
            core.Job.results = results  # type: ignore[method-assign]

    return launch_all


def _parsed(launcher: Any, overrides: Sequence[str]) -> RunConfig:
    loader = launcher.hydra_context.config_loader
    return RunConfig.parse(loader.load_sweep_config(launcher.config, list(overrides)))


def _record_since(began: int, cell: RunConfig) -> dict[str, Any] | None:
    """Return the record of a cell if it was written since ``began``, in nanoseconds since 1970.

    Of several replicas that of the one under way, or of the last one, with the mean test error,
    when all have ended.
    """
    written = []
    for run in cell.runs():
        directory = RunDirectory(run.run_dir)
        with suppress(OSError, DamagedError):
            record = directory.record()
            if record and directory.record_path.stat().st_mtime_ns >= began:
                written.append(record)
    running = [record for record in written if record["status"] == "running"]
    if running or len(written) < cell.replicas:
        return running[0] if running else None
    return {**written[-1], "result": {"test_error": fmean(map(objective, written))}}


def _return(record: dict[str, Any] | None) -> JobReturn:
    value = objective(record) if record else math.nan
    return JobReturn(status=JobStatus.COMPLETED, _return_value=value)
