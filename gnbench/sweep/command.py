"""The cells of a command: all checked before the first one starts, all named at the end."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from gnbench import cli
from gnbench.config import RunConfig
from gnbench.errors import FAILED, ConfigError, LockedError, TakenOverError, one_line
from gnbench.sweep import launchers
from gnbench.sweep.account import configs, failed, objective, planned
from gnbench.sweep.overrides import explained
from gnbench.sweep.plan import Cell, write_plan
from gnbench.sweep.state import exit_code, run_state, table
from gnbench.train import distributed

log = logging.getLogger(__name__)

Outcome = Mapping[str, Any] | Exception  # the record of a run, or what ended it

MOST_CELLS = 10_000

passed_over: list[RunConfig] = []  # runs that others held, to come back to


class CheckBeforeStart(Callback):
    """Refuse a command whose cells cannot all be trained, before Hydra makes any folder.

    Hydra turns exceptions of a callback into warnings, so this one exits by itself.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Keep Hydra from making folders; the run is checked where it starts."""
        _or_exit(lambda: _check_folders(config))

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        """Keep of a cell what it returned, not its configuration twice, which nobody reads."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check every cell, and note in the study what the sweep is to hold."""
        _or_exit(lambda: _plan(config))
        cli.composed()


def carry_out(config: DictConfig) -> float:
    """Check and carry out what is no sweep: a run, or several replicas; return its test error.

    Raises:
        ConfigError: before anything is written.
        Exception: what ended the run.
    """
    run = RunConfig.parse(config)
    _check(run)
    cli.composed()
    if run.replicas > 1:
        _note_plan([run])
        return attempt(run)
    from gnbench.runs import runner  # imports torch: not for --help

    record = runner.run(run)
    if record["status"] == "out_of_memory":
        raise SystemExit(FAILED)
    return objective(record)


def attempt(config: RunConfig) -> float:
    """Carry out a cell, all its replicas, and return their mean error, as `objective`.

    A failure is recorded, and the others go on. A run that another process is training is passed
    over. With ``wait``, and cells one after another in this process, `return_to_passed_over` waits
    for it when nothing else is left to do.
    """
    comes_back = config.wait and distributed.world_size() == 1 and launchers.is_command()
    for run in config.runs():
        if Cell.of(run) not in planned:  # of a sweeper that chooses its cells as it goes
            planned.append(Cell.of(run))
    errors = []
    for run, outcome in _outcomes(config.with_(wait=config.wait and not comes_back)):
        if isinstance(outcome, LockedError):
            log.info("%s; passed over", str(outcome).partition(";")[0])
            if comes_back:
                passed_over.append(run)
        errors.append(_noted(run, outcome))
    return fmean(errors)


def return_to_passed_over() -> None:
    """Wait for the runs that others held; carry out those that they left unfinished."""
    for config in passed_over:
        for run, outcome in _outcomes(config.with_(wait=True)):
            _noted(run, outcome)


def account() -> tuple[str, int]:
    """Put every cell of the command into words; return the exit code that follows."""
    states = []
    for cell in planned:
        run = run_state(cell.run_dir)
        if cell.run_id in failed and run.state != "failed" and not run.running:
            run = replace(run, state="failed", test_error=None, message=failed[cell.run_id])
        states.append(run)
    return table(states), exit_code(states)


def _outcomes(config: RunConfig) -> Iterator[tuple[RunConfig, Outcome]]:
    """Carry out the runs of a cell; yield each with its outcome as it ends."""
    from gnbench.runs.runner import run_all  # imports torch: not for --help

    runs = config.runs()
    left = dict(enumerate(runs))
    try:
        for number, outcome in run_all(runs):
            yield left.pop(number), outcome
    except Exception as error:  # before any could begin
        for run in left.values():
            yield run, error


def _noted(run: RunConfig, outcome: Outcome) -> float:
    """Return the test error of a run; note a failure."""
    if not isinstance(outcome, Exception):
        failed.pop(run.run_id, None)
        return objective(outcome)
    # The others of several processes pass over a held run as well, but stand in the midst of one
    # that was taken over, or that failed, and cannot go on without this process.
    alone = distributed.world_size() == 1
    if isinstance(outcome, LockedError) and (alone or not isinstance(outcome, TakenOverError)):
        return math.nan
    if not alone:
        distributed.abandon()
        raise SystemExit(cli.report(outcome)) from outcome
    failed[run.run_id] = one_line(outcome)
    trace = None if cli.is_explained(outcome) else outcome
    log.error("%s: %s", run.run_id, one_line(outcome), exc_info=trace)
    return math.nan


def _plan(config: DictConfig) -> None:
    """Check every cell of a sweep and note which there are.

    Raises:
        ConfigError: with a line for each different fault.
    """
    _check_folders(config)
    launchers.prepare(config.hydra.launcher)
    sweeper = config.hydra.sweeper
    if sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return  # a sweeper that chooses its cells as it goes: each is checked as it starts
    loader = GlobalHydra.instance().config_loader()
    arguments = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    arguments += list(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    _count(overrides)
    [batch] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    compose = functools.partial(loader.load_sweep_config, config)
    remote = launchers.is_remote(config.hydra.launcher)
    runs, faults = [], dict[str, None]()
    for cell in map(list, batch):
        try:
            runs.append(RunConfig.parse(compose(cell)))
            _check(runs[-1], remote)
        except Exception as error:
            if not cli.is_config_fault(error):
                raise
            fault = explained(error, cell, True, compose)
            faults |= dict.fromkeys(one_line(fault).splitlines())
    if faults:
        raise ConfigError("\n".join(faults))
    _note_plan(runs)


def _check(config: RunConfig, remote: bool = False) -> None:
    """Refuse a run that cannot be trained, or not on this machine unless it is ``remote``."""
    from gnbench.check import check, check_machine  # imports torch: not for --help
    from gnbench.train.devices import flush_denormals

    flush_denormals()  # before torch starts threads, which a check may do
    try:
        check(config)
    except SystemExit as stop:
        raise ConfigError("a _target_ ends the program: name what builds the part") from stop
    check_machine(config, remote)


def _note_plan(runs: Sequence[RunConfig]) -> None:
    """Keep in mind which runs the command is to carry out, and note them in their study."""
    if sum(config.replicas for config in runs) > MOST_CELLS:
        raise ConfigError(f"replicas: a sweep of more than {MOST_CELLS} runs; split it")
    configs[:] = runs
    planned[:] = dict.fromkeys(Cell.of(run) for config in runs for run in config.runs())
    if distributed.rank() == 0:
        write_plan(planned)


def _count(overrides: Sequence[Override]) -> None:
    """Refuse a sweep of more cells than can be checked, before Hydra lists them all."""
    cells = 1
    for override in overrides:
        if override.is_sweep_override():
            cells *= sum(1 for _ in islice(override.sweep_string_iterator(), MOST_CELLS + 1))
            if cells > MOST_CELLS:
                raise ConfigError(
                    f"{override.input_line}: a sweep of more than {MOST_CELLS} cells; split it"
                )


def _check_folders(config: DictConfig) -> None:
    """Refuse other folders of Hydra's: what they are for, gnbench does by itself."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra)  # as they were typed
    for override in overrides:
        if override.lstrip("+~").startswith(("hydra.run.", "hydra.sweep.", "hydra.job.chdir")):
            raise ConfigError(
                f"{override}: gnbench names the folders of runs; choose outputs=DIR study=NAME"
            )


def _or_exit(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
