"""The cells of a study: the runs that its sweeps set out to train, and those that were begun."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnbench import files, zipped
from gnbench.config import RunConfig
from gnbench.errors import ConfigError, DamagedError
from gnbench.identity import run_id
from gnbench.runs.directory import read_record
from gnbench.runs.lock import LOCK

log = logging.getLogger(__name__)

PLANS = "sweep-*.json"
IN_PLAN = ("run_id", "dataset", "model", "norm", "batch_size", "seed")


@dataclass(frozen=True)
class Cell:
    """A run that a sweep is to carry out."""

    run_id: str
    run_dir: Path
    dataset: str
    model: str
    norm: str
    batch_size: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Cell:
        """Return the cell of a run."""
        names = (config.dataset.name, config.model.name, config.norm.name)
        return cls(config.run_id, config.run_dir, *names, config.batch_size, config.seed)

    @classmethod
    def recorded(cls, run_dir: Path, config: Mapping[str, Any]) -> Cell:
        """Return the cell of a run by the ``config`` of its ``run.json``."""
        dataset, model, norm = (str(config[key]["name"]) for key in IN_PLAN[1:4])
        size, seed = (int(config[key]) for key in IN_PLAN[4:])
        return cls(run_id(config), run_dir, dataset, model, norm, size, seed)


def write_plan(cells: Sequence[Cell]) -> None:
    """Note the cells of a sweep in the folder of their study, in that of each if there are several.

    The name of the file follows from them, so that a repeated sweep adds nothing.

    Raises:
        WriteError: if a study cannot be written.
    """
    for study in {cell.run_dir.parent for cell in cells}:
        name, data = plan_of([cell for cell in cells if cell.run_dir.parent == study])
        files.make_folder(study)
        files.replace(study / name, data)


def plan_of(cells: Sequence[Cell]) -> tuple[str, bytes]:
    """Return the name and the contents of the plan of ``cells``."""
    entries = [{key: getattr(cell, key) for key in IN_PLAN} for cell in cells]
    data = (json.dumps(entries, indent=1) + "\n").encode()
    return PLANS.replace("*", hashlib.sha256(data).hexdigest()[:8]), data


def read_plans(study: Path) -> list[Cell]:
    """Return the cells that the sweeps of a study set out to train, each once."""
    cells: dict[str, Cell] = {}
    for path in sorted(zipped.glob(study, PLANS)):
        try:
            for entry in json.loads(zipped.read_bytes(path)):
                name, dataset, model, norm = (str(entry[key]) for key in IN_PLAN[:4])
                size, seed = (int(entry[key]) for key in IN_PLAN[4:])
                cells[name] = Cell(name, study / name, dataset, model, norm, size, seed)
        except (ValueError, TypeError, KeyError, OSError) as error:
            log.warning("%s is not the plan of a sweep (%s); ignored", path, error)
    return list(cells.values())


def find_studies(
    outputs: str | Path, study: str | None = None, archives: bool = False
) -> list[Path]:
    """Return the folder of ``study``, or of every study under ``outputs``.

    With ``archives`` that may be an archive of `gnbench.archive`, whose studies are read in place.

    Raises:
        ConfigError: if there is none.
    """
    root = Path(outputs)
    if not archives and zipped.archive_of(root):
        raise ConfigError(f"outputs={outputs}: is an archive, this needs a folder of studies")
    found = [folder for folder in sorted(zipped.glob(root, "*/")) if is_study(folder)]
    chosen = [folder for folder in found if study in (None, folder.name)]
    if not found and zipped.archive_of(root):
        raise ConfigError(
            f"outputs={outputs}: holds no study; take one that python -m gnbench.archive wrote"
        )
    if not found:
        raise ConfigError(f"outputs={outputs}: no runs there yet; begin with: python -m gnbench")
    if not chosen:
        names = ", ".join(folder.name for folder in found)
        raise ConfigError(f"study={study}: no runs in {root / str(study)}; choose one of {names}")
    return chosen


def is_study(folder: Path) -> bool:
    """Tell whether a folder, which may lie in an archive, has runs or the plan of some."""
    marks = ("*/run.json", f"*/{LOCK}", PLANS)
    return any(next(zipped.glob(folder, mark), None) is not None for mark in marks)


def known_cells(study: Path) -> dict[Path, Cell | None]:
    """Return the cells of a study by their run directories: those planned and those begun.

    None: one that was begun without a plan and has no record to tell what it is.
    """
    found: dict[Path, Cell | None] = {cell.run_dir: cell for cell in read_plans(study)}
    begun = {path.parent for mark in ("run.json", LOCK) for path in study.glob(f"*/{mark}")}
    for run_dir in begun - set(found):
        try:
            found[run_dir] = Cell.recorded(run_dir, read_record(run_dir / "run.json")["config"])
        except (DamagedError, OSError, LookupError, TypeError, ValueError, AttributeError):
            found[run_dir] = None
    return dict(sorted(found.items(), key=_order))


def _order(entry: tuple[Path, Cell | None]) -> tuple[Any, ...]:
    run_dir, cell = entry
    if cell is None:
        return (1, run_dir)
    return (0, cell.dataset, cell.model, cell.norm, -cell.batch_size, cell.seed, run_dir)
