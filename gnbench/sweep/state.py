"""The cells of a study: which were planned, and where each of them stands."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gnbench import cli
from gnbench.config import ConfigError, check_study, replicas, run_id
from gnbench.runs import directory as runs
from gnbench.runs import lock as presence

log = logging.getLogger(__name__)

PLAN_PREFIX = "sweep-"
# What `standing` says beside the statuses of a record.
MISSING, STALE, DAMAGED = "missing", "stale", "damaged"
STATES = (*runs.STATUSES, MISSING, STALE, DAMAGED)


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

    @classmethod
    def of(cls, config: Mapping[str, Any] | DictConfig, directory: str) -> Cell:
        """Return the cell that a configuration describes."""
        return cls(
            run_id=run_id(config),
            directory=directory,
            dataset=config["dataset"]["name"],
            model=config["model"]["name"],
            norm=config["norm"]["name"],
            batch_size=config["batch_size"],
            seed=config["seed"],
        )


def members(config: DictConfig, directory: str) -> list[tuple[DictConfig, str]]:
    """Return the runs that a configuration stands for, each with its directory.

    ``directory`` is that of the first one; the others' stand beside it.
    """
    first, *others = replicas(config)
    beside = Path(directory).parent
    return [(first, directory), *((other, str(beside / run_id(other))) for other in others)]


@dataclass(frozen=True)
class Standing:
    """Where a cell stands: ``state`` is a status, ``missing``, ``stale`` or ``damaged``.

    ``stale`` is a run whose process died without a word. ``test_error`` in percent.
    """

    directory: str
    state: str
    test_error: float | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether the cell has its result."""
        return self.state in runs.FINISHED

    @property
    def needs_attention(self) -> bool:
        """Whether somebody should look: it was begun, has no result, and nobody is at work."""
        return not (self.finished or self.running or self.state == MISSING)

    @property
    def running(self) -> bool:
        """Whether a process is at work on it."""
        return self.state == "running"


def find_studies(outputs: str | Path, study: str | None = None) -> list[Path]:
    """Return the folder of ``study``, or of every study under ``outputs``.

    Raises:
        ConfigError: if there is none.
    """
    if study is not None:
        check_study(study)
    root = Path(outputs)
    marks = ("*/run.json", f"*/{presence.LOCK}", f"{PLAN_PREFIX}*.json")
    found = [
        folder
        for folder in sorted(root.glob("*/"))
        if any(next(folder.glob(mark), None) is not None for mark in marks)
    ]
    chosen = [folder for folder in found if study in (None, folder.name)]
    if not chosen:
        raise ConfigError(
            f"outputs={outputs}: no runs there yet; begin with: python -m gnbench"
            if not found
            else f"study={study}: no runs in {root / str(study)}; choose one of "
            + ", ".join(folder.name for folder in found)
        )
    return chosen


def cells(study: Path) -> dict[str, Cell | None]:
    """Return the cells of a study by their directories: those planned and those begun.

    None: one that was begun without a plan and has no record to tell what it is.
    """
    found: dict[str, Cell | None] = {cell.directory: cell for cell in read_plans(study)}
    begun = {
        path.parent for mark in ("run.json", presence.LOCK) for path in study.glob(f"*/{mark}")
    }
    for directory in sorted(map(str, begun - set(map(Path, found)))):
        try:
            config = runs.read_record(Path(directory) / "run.json")["config"]
            found[directory] = Cell.of(config, directory)
        except (runs.DamagedError, OSError, LookupError, TypeError, AttributeError):
            found[directory] = None
    return dict(sorted(found.items(), key=_order))


def _order(entry: tuple[str, Cell | None]) -> tuple[Any, ...]:
    directory, cell = entry
    if cell is None:
        return (1, directory)
    return (0, cell.dataset, cell.model, cell.norm, -cell.batch_size, cell.seed, directory)


def standing(directory: str | Path) -> Standing:
    """Tell where a run stands, by its files alone, from any machine that sees them."""
    place = str(directory)
    sign = presence.read_sign(Path(directory))
    alive = sign is not None and sign.is_fresh()
    try:
        record = runs.Run(directory).record()
    except (runs.DamagedError, OSError) as error:
        return Standing(place, "running" if alive else DAMAGED, message=str(error))
    result = record.get("result") if record else None
    reported = result.get("test_error") if isinstance(result, dict) else None
    test_error = float(reported) if isinstance(reported, int | float) else None
    if record is not None and record["status"] in runs.FINISHED:
        return Standing(place, record["status"], test_error)  # though somebody may be looking at it
    if alive and sign is not None:
        age = max(0.0, time.time() - sign.beat)
        progress = f"step {sign.step:,} of {sign.total_steps:,}" if sign.total_steps else "starting"
        done = f" ({sign.step / sign.total_steps:.0%})" if sign.total_steps else ""
        message = f"{progress}{done}, {sign}, last sign of life {age:.0f} s ago"
        return Standing(place, "running", test_error, message)
    if record is None and sign is None:
        return Standing(place, MISSING)
    if record is None:
        return Standing(place, STALE, message=_last_words(sign))
    if record["status"] == "running":
        return Standing(place, STALE, test_error, _last_words(sign))
    message = str(record.get("error") or "").partition("\n")[0]
    return Standing(place, record["status"], test_error, message)


def table(standings: Iterable[Standing]) -> str:
    """Put cells into words, a line each and one below for what there is to say."""
    lines = [f"{'status':<14}{'test error':>11}  run directory"]
    for cell in standings:
        error = "–" if cell.test_error is None else f"{cell.test_error:.2f} %"
        lines.append(f"{cell.state:<14}{error:>11}  {cell.directory}")
        if cell.message:
            lines.append(f"{'':<27}{cell.message}")
    return "\n".join(lines)


def exit_code(standings: Sequence[Standing]) -> int:
    """Return 0 if every cell has its result, 3 while some process is at work on one, else 1."""
    if any(cell.running for cell in standings):
        return cli.AT_WORK
    return cli.DONE if all(cell.finished for cell in standings) else cli.FAILED


def read_plans(study: Path) -> list[Cell]:
    """Return the cells that the sweeps of a study set out to train, each once."""
    cells: dict[str, Cell] = {}
    for path in sorted(study.glob(f"{PLAN_PREFIX}*.json")):
        try:
            for entry in json.loads(path.read_bytes()):
                directory = str(study / entry["run_id"])
                cells[entry["run_id"]] = Cell(**{**entry, "directory": directory})
        except (ValueError, TypeError, KeyError, OSError) as error:
            log.warning("%s is not the plan of a sweep (%s); ignored", path, error)
    return list(cells.values())


def write_plan(study: Path, cells: Sequence[Cell]) -> None:
    """Note the cells under a name that follows from them, so that a repeated sweep adds nothing.

    Raises:
        WriteError: if the study cannot be written.
    """
    entries: list[dict[str, Any]] = [
        {k: v for k, v in vars(cell).items() if k != "directory"} for cell in cells
    ]
    text = json.dumps(entries, indent=1) + "\n"
    path = study / f"{PLAN_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    partial = study / f".{path.name}.{uuid.uuid4().hex}"  # several may write the same plan
    with runs.explained(path):
        study.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _last_words(sign: presence.Sign | None) -> str:
    if sign is None:
        return "its process died; the same command resumes it"
    return f"{sign} died; the same command resumes it"
