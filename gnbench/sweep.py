"""The cells of a command: all checked before the first one starts, all named at the end."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gnbench import cli, runs
from gnbench.config import ConfigError, run_id

log = logging.getLogger(__name__)

PLAN_PREFIX = "sweep-"


@dataclass(frozen=True)
class Cell:
    """A run that a sweep will carry out."""

    run_id: str
    directory: str
    dataset: str
    model: str
    norm: str
    batch_size: int
    seed: int


planned: list[Cell] = []  # the cells of the sweep that this process started
failed: dict[str, str] = {}  # by run id: what this process saw fail, though no record may say so


class CheckBeforeStart(Callback):
    """Refuse a command whose cells cannot all be trained, before Hydra makes any folder.

    Hydra turns exceptions of a callback into warnings, so this one exits by itself.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the only cell."""
        _or_exit(lambda: _check([config]))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check every cell, and note in the study what the sweep is to hold."""
        _or_exit(lambda: _plan(config))


def note(config: DictConfig, directory: str) -> None:
    """Note a cell as it starts, for the table of a sweep whose cells were not known before."""
    cell = _cell(config, directory)
    if cell.run_id not in {c.run_id for c in planned}:
        planned.append(cell)


def read_plans(study: Path) -> list[Cell]:
    """Return the cells that the sweeps of a study set out to train, each once."""
    cells: dict[str, Cell] = {}
    for path in sorted(study.glob(f"{PLAN_PREFIX}*.json")):
        try:
            for cell in json.loads(path.read_bytes()):
                cells[cell["run_id"]] = Cell(**{**cell, "directory": str(study / cell["run_id"])})
        except (ValueError, TypeError, KeyError, OSError) as error:
            log.warning("%s is not the plan of a sweep (%s); ignored", path, error)
    return list(cells.values())


def table(cells: Sequence[Cell]) -> tuple[str, bool]:
    """Describe every cell by its directory as it is now; tell whether all have a result."""
    lines = [f"{'status':<14}{'test error':>11}  run directory"]
    done = True
    for cell in cells:
        try:
            record = runs.Run(cell.directory).record() or {"status": "missing"}
        except runs.DamagedError as error:
            record = {"status": "failed", "error": str(error)}
        if cell.run_id in failed and record["status"] != "failed":
            record = {"status": "failed", "error": failed[cell.run_id]}
        done = done and record["status"] in runs.FINISHED
        result = record.get("result")
        error_text = f"{result['test_error']:.2f} %" if result else "–"
        lines.append(f"{record['status']:<14}{error_text:>11}  {cell.directory}")
        if record.get("error"):
            lines.append(f"{'':<14}{'':>11}  {str(record['error']).partition(chr(10))[0]}")
    return "\n".join(lines), done


def _plan(config: DictConfig) -> None:
    sweeper = config.hydra.sweeper
    if sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return  # a sweeper that chooses its cells as it goes: each is checked as it starts
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    arguments = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    arguments += list(config.hydra.overrides.task)
    [batch] = BasicSweeper.split_arguments(parser.parse_overrides(arguments), max_batch_size=None)
    configs = [loader.load_sweep_config(config, list(overrides)) for overrides in batch]
    _check(configs)
    cells = [_cell(c, str(Path(c.hydra.sweep.dir) / run_id(c))) for c in configs]
    planned[:] = dict.fromkeys(cells)
    for study in {Path(cell.directory).parent for cell in cells}:
        _write_plan(study, [cell for cell in planned if Path(cell.directory).parent == study])


def _cell(config: DictConfig, directory: str) -> Cell:
    return Cell(
        run_id=run_id(config),
        directory=directory,
        dataset=config.dataset.name,
        model=config.model.name,
        norm=config.norm.name,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _check(configs: Sequence[DictConfig]) -> None:
    """Check every cell; raise one `ConfigError` with a line for each different fault."""
    from gnbench.experiment import check_run  # imports torch: not for --help

    faults: dict[str, None] = {}
    for config in configs:
        try:
            check_run(config)
        except ConfigError as error:
            faults[str(error)] = None
    if faults:
        raise ConfigError("\n".join(faults))


def _write_plan(study: Path, cells: Sequence[Cell]) -> None:
    """Note the cells under a name that follows from them, so that a repeated sweep adds nothing."""
    entries = [{k: v for k, v in vars(cell).items() if k != "directory"} for cell in cells]
    text = json.dumps(entries, indent=1) + "\n"
    name = f"{PLAN_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    study.mkdir(parents=True, exist_ok=True)
    partial = study / f".{name}.{os.getpid()}"
    partial.write_text(text)
    partial.replace(study / name)


def _or_exit(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    cli.composed()
