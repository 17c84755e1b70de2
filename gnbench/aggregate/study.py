"""Run directories → tables, with what a reader of them must know besides."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gnbench import config, identity, zipped
from gnbench.errors import ConfigError, DamagedError
from gnbench.identity import all_settings, by_dotted_name, run_id
from gnbench.runs.directory import FINISHED, read_record
from gnbench.sweep.plan import find_studies, read_plans
from gnbench.train.row import METRICS

CELL = ["dataset", "model", "norm", "batch_size"]
VERSIONS = ["gnbench", "torch", "python"]
NUMBERS = ["test_error", "test_error_final", "epochs_done", "seconds", "peak_memory_bytes"]
NUMBERS += ["activation_bytes", "val_error"]
# Numbers that earlier versions did not record: no column without.
LATER = ["balanced_test_error", "printed_error"]
NUMBERS += LATER
TEXTS = ["device", "engine", *VERSIONS, "started", "error"]
RECORD = ["study", "run_id", "status", *CELL, "seed", *NUMBERS, *TEXTS, "directory"]
PUBLISHED = Path(__file__).parents[1] / "data" / "published.csv"


@dataclass
class Study:
    """What a study folder holds: a row a run in ``runs``, and what a reader must know besides."""

    path: Path
    runs: pd.DataFrame
    problems: list[str] = field(default_factory=list)  # damaged or duplicated runs
    missing: list[str] = field(default_factory=list)  # planned or evidently meant, never begun
    notes: list[str] = field(default_factory=list)  # what a reader should weigh

    @property
    def tables(self) -> Path:
        """Where its tables and figures go: beside the runs, or beside the archive they lie in."""
        return zipped.written_beside(self.path)

    @property
    def finished(self) -> pd.DataFrame:
        """The runs that have a result."""
        return self.runs[self.runs["status"].isin(FINISHED)]

    @property
    def unfinished(self) -> pd.DataFrame:
        """The runs that have none: running, interrupted, failed, out of memory."""
        return self.runs[~self.runs["status"].isin(FINISHED)]


def read_runs(outputs: str | Path = "outputs", study: str | None = None) -> pd.DataFrame:
    """Read all runs of one study or of all as a DataFrame, a row a run.

    Columns: those of ``results.csv``, i.e. the record (errors in percent, time in seconds, memory
    in bytes) and every setting of the run's identity under its dotted name.

    Raises:
        ConfigError: if there is no such study.
    """
    places = find_studies(Path(outputs).expanduser(), study, archives=True)
    studies = map(read_study, places)
    return pd.concat([each.runs for each in studies], ignore_index=True)


def read_study(path: Path) -> Study:
    """Read every run of a study; nothing half-written or damaged stops it."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for folder in zipped.folders(path):
        try:
            rows.append(_row(path.name, folder))
        except FileNotFoundError:
            if any(zipped.glob(folder, "*")):
                problems.append(f"{folder}: no run.json (a run that died at its start?); left out")
        except (DamagedError, OSError) as error:
            problems.append(f"{folder}: {error}; left out")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            problem = f"run.json is not of this form ({type(error).__name__}: {error})"
            problems.append(f"{folder}: {problem}; left out")
    absent = [name for name in LATER if all(row[name] is None for row in rows)]
    columns = dict.fromkeys([*RECORD, *itertools.chain(*rows)])
    table, duplicates = _drop_duplicates(pd.DataFrame(rows, columns=list(columns)))
    study = Study(path, table.drop(columns=absent), problems + duplicates)
    study.missing = _missing(study)
    study.notes = _mixed_origins(study.finished)
    return study


def read_metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Read the ``metrics.csv`` of every run in ``table`` (of `read_runs`), a row an epoch.

    The columns are those of the file, preceded by ``run_id`` and the cell of the run. What a run
    of another version did not measure is empty; rows that are cut or not of numbers are left out.
    """
    lines: dict[str, list[str]] = {",".join(METRICS): []}
    for number, directory in enumerate(table["directory"]):
        try:
            data = zipped.read_bytes(Path(directory, "metrics.csv"))
        except OSError:
            continue
        text = data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        header, *rows = text[: text.rfind("\n") + 1].split("\n")  # the last one may be half-written
        commas = header.count(",")
        lines.setdefault(header, []).extend(
            f"{number},{row}" for row in rows if row.count(",") == commas
        )
    tables = [
        pd.read_csv(
            io.StringIO("\n".join([f"run,{header}", *rows])),
            dtype=str,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE,
            usecols=lambda name: name in ("run", *METRICS),
        )
        for header, rows in lines.items()
    ]
    metrics = pd.concat(tables).apply(pd.to_numeric, errors="coerce")
    counts = metrics[["epoch", "test_wrong", "test_total"]].astype(float)
    metrics = metrics[np.isfinite(counts).all(axis=1)]
    metrics = metrics.drop_duplicates(["run", "epoch"], keep="last").set_index("run")
    cells = table[["run_id", *CELL, "seed"]].reset_index(drop=True)
    return cells.join(metrics, how="inner").reset_index(drop=True)


def short_metrics(finished: pd.DataFrame, metrics: pd.DataFrame) -> list[str]:
    """Name the finished runs whose metrics end before the last epoch, which always has a row."""
    last = finished["run_id"].map(metrics.groupby("run_id")["epoch"].max()).fillna(0)
    table = finished.assign(last=last)
    short = table[table["last"] < pd.to_numeric(table["epochs_done"]).fillna(0)]
    return [
        f"{row['directory']}/metrics.csv ends with epoch {row['last']:.0f} of "
        f"{row['epochs_done']:.0f}; the result stands in run.json"
        for _, row in short.iterrows()
    ]


def published(source: str) -> pd.DataFrame:
    """Return the published results of ``source``, of those of `all_published`.

    Raises:
        ConfigError: if the package carries none of that name.
    """
    table = all_published()
    rows = table[table["source"] == source]
    if rows.empty:
        known = ", ".join(sorted(table["source"].unique()))
        raise ConfigError(f"figure.reference={source}: choose one of {known}")
    return rows


def all_published() -> pd.DataFrame:
    """Return all published results (``source,dataset,model,norm,batch_size,test_error,sd,n``).

    Where an error of the evaluation is known exactly, ``test_error`` is the corrected one, and
    ``corrected`` is true. It is the mean of ``n`` runs, with ``sd`` over them if that was told.
    """
    table = pd.read_csv(PUBLISHED, keep_default_na=False)
    table["sd"] = pd.to_numeric(table["sd"], errors="coerce")
    corrected = pd.to_numeric(table["test_error_corrected"], errors="coerce")
    table["corrected"] = corrected.notna()
    table["test_error"] = corrected.fillna(table["test_error"])
    return table


def of_their_size(published: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out what was ``published`` of networks that ``runs`` have in another size."""
    sizes = flattened({"model": identity.LATER["gnbench.models.SimpleNetV2"]})
    others = {
        model
        for model, own in runs.groupby("model")
        for name, size in sizes.items()
        if name in own and (own[name].dropna() != size).any()
    }
    return published[~published["model"].isin(others)]


def _row(study: str, run_dir: Path) -> dict[str, Any]:
    """Return a row of ``results.csv`` for a run directory."""
    record = read_record(run_dir / "run.json")
    settings = all_settings(record["config"])
    result, versions = record.get("result") or {}, record.get("versions") or {}
    known = {
        **record,
        **{name: versions.get(name) for name in VERSIONS},
        **{name: str(settings[name]["name"]) for name in ("dataset", "model", "norm")},
        "study": study,
        "run_id": run_id(record["config"]),
        "batch_size": settings["batch_size"],
        "seed": settings["seed"],
        "test_error": result.get("test_error"),
        "test_error_final": result.get("test_error_final"),
        "val_error": result.get("val_error"),
        "balanced_test_error": result.get("balanced_test_error"),
        "printed_error": result.get("printed_error"),
        "epochs_done": result.get("epochs"),
        "directory": str(run_dir),
        "processes": int(record["config"].get("processes", 1)),
    }
    row = {name: known.get(name) for name in [*RECORD, "processes"]}
    if row["status"] in FINISHED and row["test_error"] is None:
        raise DamagedError(f"{run_dir / 'run.json'} is {row['status']} but has no result")
    kinds: dict[str, Any] = {"batch_size": int, "seed": int}
    kinds |= dict.fromkeys(NUMBERS, int | float | None)
    for name, kind in kinds.items():
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}")
        most = 100 if name.endswith("error") else config.LARGEST
        if value is not None and not int(name == "batch_size") <= value <= most:  # or it is NaN
            raise ValueError(f"{name} is not from {int(name == 'batch_size')} to {most}")
    row |= {name: str(row[name]) for name in TEXTS if row[name] is not None}
    for name, value in flattened(settings).items():
        if isinstance(value, int) and abs(value) > config.LARGEST:
            raise ValueError(f"{name} is too large a number")
        row.setdefault(name, value)
    return row


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted names; a list as JSON, a component's name as text."""
    found = by_dotted_name(settings)
    for name, value in found.items():
        if isinstance(value, list):
            found[name] = json.dumps(value)
        elif name.endswith(".name"):  # YAML had taken on, 1e3 or null for something else
            found[name] = str(value)
    return found


def _drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Keep one directory of every run: a finished one if there is, else the last begun."""
    finished = table["status"].isin(FINISHED)
    ranked = table.assign(_finished=finished).sort_values(
        ["_finished", "started"], ascending=False, kind="stable", na_position="last"
    )
    extra = ranked[ranked.duplicated("run_id")]
    problems = [
        f"{row['directory']}: the same run as {row['run_id']}, counted once"
        for _, row in extra.iterrows()
    ]
    return table.drop(index=extra.index).reset_index(drop=True), problems


def _mixed_origins(finished: pd.DataFrame) -> list[str]:
    """Say so if the results of a study were made by different versions, or on different devices."""
    origins = {f"of different versions of {name}": finished[name] for name in VERSIONS}
    # As `describe_device` names them, without their number and threads.
    origins["on different devices"] = finished["device"].str.replace(
        r"^(?:cpu|cuda:\d+) \((.*?)(?:, \d+ threads)?\)$", r"\1", regex=True
    )
    notes = []
    for which, values in origins.items():
        counts = values.value_counts(dropna=False)
        if len(counts) > 1:
            parts = ", ".join(f"{value} ({count} runs)" for value, count in counts.items())
            notes.append(f"runs {which} together: {parts}")
    return notes


def _missing(study: Study) -> list[str]:
    """Name the cells that the sweeps of a study planned; without a plan, what its grid lacks."""
    plan = read_plans(study.path)
    if plan:
        begun = set(study.runs["run_id"])
        return [f"{cell.run_id} (planned by a sweep)" for cell in plan if cell.run_id not in begun]
    missing = []
    for (dataset, model), group in study.runs.groupby(["dataset", "model"]):
        found = set(group[["norm", "batch_size", "seed"]].itertuples(index=False, name=None))
        axes = (sorted(group[key].unique()) for key in ("norm", "batch_size", "seed"))
        for norm, size, seed in itertools.product(*axes):
            if (norm, size, seed) not in found:
                name = f"{dataset}-{model}-{norm}-bs{size}-seed{seed}"
                missing.append(f"{name} (others of its grid ran)")
    return missing
