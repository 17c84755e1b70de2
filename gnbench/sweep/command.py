"""The cells of a command: all checked before the first one starts, all named at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gnbench import cli
from gnbench.config import ConfigError, one_line, run_id
from gnbench.runs import directory as runs
from gnbench.runs.lock import LockedError
from gnbench.sweep import state as grid
from gnbench.sweep.state import Cell
from gnbench.train import distributed

log = logging.getLogger(__name__)

Member = tuple[DictConfig, str]  # a run of a cell, and its directory

MOST_CELLS = 10_000

planned: list[Cell] = []  # the cells of the sweep that this process started
failed: dict[str, str] = {}  # by run id: what this process saw fail, though no record may say so
passed_over: list[Member] = []  # cells that others held, to come back to


class CheckBeforeStart(Callback):
    """Refuse a command whose cells cannot all be trained, before Hydra makes any folder.

    Hydra turns exceptions of a callback into warnings, so this one exits by itself.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the only cell, and make its folder before Hydra does, with a better message."""

        def check() -> None:
            _check([config])
            directory = config.hydra.run.dir
            if config.replicas > 1 and Path(directory).name != run_id(config):
                raise ConfigError(
                    f"hydra.run.dir={directory}: with replicas={config.replicas} every run has a "
                    "folder of its own; choose outputs=DIR study=NAME"
                )
            if distributed.rank() == 0:
                runs.make_folder(Path(directory))
            if config.replicas > 1:
                _note_plan(grid.members(config, directory))

        _or_exit(check)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check every cell, and note in the study what the sweep is to hold."""
        _or_exit(lambda: _plan(config))


def attempt(config: DictConfig, directory: str) -> float:
    """Carry out a cell, all its replicas, and return their mean test error.

    A run that another process is training is passed over. With ``wait`` and a launcher that works
    in this process, `return_to_passed_over` waits for it when nothing else is left to do.
    """
    comes_back = (
        config.wait
        and distributed.world_size() == 1
        and HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
    )
    members = grid.members(config, directory)
    for one, place in members:
        cell = Cell.of(one, place)
        if cell.run_id not in {c.run_id for c in planned}:  # of a sweeper that chooses as it goes
            planned.append(cell)
        one.wait = config.wait and not comes_back
    errors = []
    for member, outcome in _carry_out(members):
        if isinstance(outcome, LockedError):
            log.info("%s; passed over", str(outcome).partition(";")[0])
            if comes_back:
                passed_over.append(member)
        errors.append(_test_error(member, outcome))
    return fmean(errors)


def return_to_passed_over() -> None:
    """Wait for the cells that others held; carry out those that they left unfinished."""
    for config, directory in passed_over:
        config.wait = True
        for member, outcome in _carry_out([(config, directory)]):
            _test_error(member, outcome)


def test_error(record: Mapping[str, Any]) -> float:
    """Return the test error of a record in percent; NaN if it has none."""
    return float(record["result"]["test_error"]) if record["result"] else math.nan


def _carry_out(
    members: Sequence[Member],
) -> Iterator[tuple[Member, dict[str, Any] | Exception]]:
    """Carry out runs; yield each with its record, or the error that ended it, as it ends."""
    from gnbench.build import check_run
    from gnbench.runs.runner import run_all  # imports torch: not for --help

    left = dict(enumerate(members))
    try:
        check_run(members[0][0])  # a sweeper that chooses as it goes could not be checked before
        for number, outcome in run_all(members):
            yield left.pop(number), outcome
    except Exception as error:  # before any could begin
        for member in left.values():
            yield member, error


def _test_error(member: Member, outcome: dict[str, Any] | Exception) -> float:
    """Return the test error of a run; a failure is noted, and the others go on."""
    if not isinstance(outcome, Exception):
        return test_error(outcome)
    if isinstance(outcome, LockedError):
        return math.nan
    if distributed.world_size() > 1:  # the others cannot go on without this process
        raise SystemExit(cli.report(outcome)) from outcome
    name = run_id(member[0])
    failed[name] = one_line(outcome)
    trace = None if cli.is_explained(outcome) else outcome
    log.error("%s: %s", name, one_line(outcome), exc_info=trace)
    return math.nan


def account() -> tuple[str, int]:
    """Put every cell of the command into words; return the exit code that follows."""
    standings = []
    for cell in planned:
        found = grid.standing(cell.directory)
        if cell.run_id in failed and found.state != "failed" and not found.running:
            found = replace(found, state="failed", test_error=None, message=failed[cell.run_id])
        standings.append(found)
    return grid.table(standings), grid.exit_code(standings)


def _plan(config: DictConfig) -> None:
    from gnbench.sweep import launchers

    launchers.prepare(config.hydra.launcher._target_)
    sweeper = config.hydra.sweeper
    if sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return  # a sweeper that chooses its cells as it goes: each is checked as it starts
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    arguments = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    arguments += list(config.hydra.overrides.task)
    overrides = parser.parse_overrides(arguments)
    _count(overrides)
    [batch] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    configs = [loader.load_sweep_config(config, list(cell)) for cell in batch]
    _check(configs)
    if sum(c.replicas for c in configs) > MOST_CELLS:
        raise ConfigError(f"replicas: a sweep of more than {MOST_CELLS} runs; split it")
    _note_plan(
        member
        for c in configs
        for member in grid.members(c, str(Path(c.hydra.sweep.dir) / run_id(c)))
    )


def _note_plan(members: Iterable[Member]) -> None:
    """Keep in mind which runs the command is to carry out, and note them in their study."""
    planned[:] = dict.fromkeys(Cell.of(*member) for member in members)
    if distributed.rank() > 0:
        return
    for study in {Path(cell.directory).parent for cell in planned}:
        grid.write_plan(study, [cell for cell in planned if Path(cell.directory).parent == study])


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


def _check(configs: Sequence[DictConfig]) -> None:
    """Check every cell; raise one `ConfigError` with a line for each different fault."""
    from gnbench.build import check_run  # imports torch: not for --help

    faults: dict[str, None] = {}
    for config in configs:
        try:
            check_run(config)
        except ConfigError as error:
            faults[" ".join(str(error).splitlines())] = None
        except SystemExit as stop:
            raise ConfigError("a _target_ ends the program: name what builds the part") from stop
    if faults:
        raise ConfigError("\n".join(faults))


def _or_exit(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    cli.composed()
