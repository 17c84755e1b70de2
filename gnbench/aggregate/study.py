"""``python -m gnbench.aggregate``: run directories → tables, figure and curves."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from omegaconf import DictConfig
from scipy.special import stdtrit

from gnbench import cli
from gnbench.config import ConfigError, conf_dir, identity, processes, run_id
from gnbench.runs import directory as runs
from gnbench.sweep.state import find_studies, read_plans

log = logging.getLogger(__name__)

CELL = ["dataset", "model", "norm", "batch_size"]
RECORD = [
    "study",
    "run_id",
    "status",
    *CELL,
    "seed",
    "test_error",
    "test_error_final",
    "epochs_done",
    "seconds",
    "peak_memory_bytes",
    "device",
    "engine",
    "gnbench",
    "torch",
    "python",
    "started",
    "error",
    "directory",
]
VERSIONS = ("gnbench", "torch", "python")
CONFIDENCE = 0.95
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
    def finished(self) -> pd.DataFrame:
        """The runs that have a result."""
        return self.runs[self.runs["status"].isin(runs.FINISHED)]

    @property
    def unfinished(self) -> pd.DataFrame:
        """The runs that have none: running, interrupted, failed, out of memory."""
        return self.runs[~self.runs["status"].isin(runs.FINISHED)]


def read_runs(outputs: str | Path = "outputs", study: str | None = None) -> pd.DataFrame:
    """Read all runs of one study or of all as a DataFrame, a row a run.

    Columns: those of ``results.csv``, i.e. the record (errors in percent, time in seconds, memory
    in bytes) and every setting of the run's identity under its dotted name.

    Raises:
        ConfigError: if there is no such study.
    """
    return pd.concat(
        [read_study(path).runs for path in find_studies(outputs, study)], ignore_index=True
    )


def read_study(path: Path) -> Study:
    """Read every run of a study; nothing half-written or damaged stops it."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    with os.scandir(path) as entries:
        folders = sorted(e.path for e in entries if e.is_dir() and not e.name.startswith("."))
    for folder in folders:
        try:
            rows.append(_flat_record(path.name, Path(folder)))
        except FileNotFoundError:
            if any(Path(folder).iterdir()):
                problems.append(f"{folder}: no run.json (a run that died at its start?); left out")
        except (runs.DamagedError, OSError) as error:
            problems.append(f"{folder}: {error}; left out")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            problem = f"run.json is not of this form ({type(error).__name__}: {error})"
            problems.append(f"{folder}: {problem}; left out")
    table = pd.DataFrame(
        rows, columns=list(dict.fromkeys([*RECORD, *(k for r in rows for k in r)]))
    )
    table, duplicates = _drop_duplicates(table)
    study = Study(path, table, problems + duplicates)
    study.missing = _missing(study)
    study.notes = _mixed_versions(study.finished)
    return study


def read_metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Read the ``metrics.csv`` of every run in ``table`` (of `read_runs`), a row an epoch.

    The columns are those of the file, preceded by ``run_id`` and the cell of the run.
    """
    header = (",".join(runs.METRICS) + "\n").encode()
    lines = []
    for number, directory in enumerate(table["directory"]):
        try:
            data = Path(directory, "metrics.csv").read_bytes()
        except OSError:
            continue
        first, _, body = data.partition(b"\n")
        if first + b"\n" == header:
            whole = body[: body.rfind(b"\n") + 1]  # a row being written does not count
            lines += [
                b"%d,%s\n" % (number, line)
                for line in whole.splitlines()
                if line.count(b",") == len(runs.METRICS) - 1
            ]
    metrics = pd.read_csv(
        io.BytesIO(b"".join(lines)),
        names=["run", *runs.METRICS],
        dtype=str,
        keep_default_na=False,
    ).apply(pd.to_numeric, errors="coerce")
    metrics = metrics.dropna(subset=["run", "epoch", "test_wrong", "test_total"])
    metrics = metrics.drop_duplicates(["run", "epoch"], keep="last")
    cells = table[["run_id", *CELL, "seed"]].reset_index(drop=True)
    joined = cells.join(metrics.set_index("run"), how="inner")
    return joined.reset_index(drop=True)


def differing(table: pd.DataFrame) -> list[str]:
    """Name the settings beyond the cell and the seed in which runs of ``table`` differ.

    Settings of a norm are compared among runs of that norm, all others among runs of the same
    dataset and model: what lies between the norms compared must be the same, or be said.
    """
    names = []
    for column in table.columns:
        if column in (*RECORD, "dataset.name", "model.name", "norm.name") or (
            column.endswith("._partial_")
        ):
            continue
        scope = CELL[:3] if column.startswith("norm.") else CELL[:2]
        if (table.groupby(scope)[column].nunique(dropna=False) > 1).any():
            names.append(column)
    # Of an optimizer, schedule or batch policy that differs by name, what the name implies is said.
    return sorted(
        name
        for name in names
        if not any(
            name != other
            and name.split(".")[0] == other.split(".")[0]
            and (table.groupby(other)[name].nunique(dropna=False) == 1).all()
            for other in names
            if other.endswith(".name")
        )
    )


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Summarize runs over their seeds: a row for every cell and every other setting that differs.

    ``test_error_mean`` and ``_std`` in percent (std with n-1); ``ci_low`` and ``ci_high`` are the
    95 % interval of the mean by Student's t over seeds, empty for a single one. Only runs with a
    result count, each once though several studies may hold it; ``n_diverged`` of them diverged.
    """
    table = table[table["status"].isin(runs.FINISHED)].drop_duplicates("run_id")
    keys = CELL + differing(table)
    grouped = table.groupby(keys, dropna=False, sort=True)
    summary = grouped["test_error"].agg(["size", "mean", "std"]).reset_index()
    summary.columns = pd.Index([*keys, "n_seeds", "test_error_mean", "test_error_std"])
    n = summary["n_seeds"]
    quantile = stdtrit((n - 1).clip(lower=1), (1 + CONFIDENCE) / 2)
    half = quantile * summary["test_error_std"] / n**0.5
    summary["ci_low"] = summary["test_error_mean"] - half
    summary["ci_high"] = summary["test_error_mean"] + half
    summary["n_diverged"] = grouped["status"].agg(lambda s: int((s == "diverged").sum())).to_numpy()
    return summary


def published(source: str) -> pd.DataFrame:
    """Return the published results of ``source`` (``dataset,model,norm,batch_size,test_error``).

    Raises:
        ConfigError: if the package carries none of that name.
    """
    table = pd.read_csv(PUBLISHED, keep_default_na=False)
    rows = table[table["source"] == source]
    if rows.empty:
        known = ", ".join(sorted(table["source"].unique()))
        raise ConfigError(f"figure.reference={source}: choose one of {known}")
    return rows


def write_studies(
    outputs: str | Path = "outputs",
    study: str | None = None,
    order: str = "descending",
    baseline: str | None = "resnet34",
    reference: str | None = None,
) -> list[Study]:
    """Write tables and figures of one study, or of every one, beside its runs; print the account.

    Raises:
        ConfigError: before anything is written.
    """
    from gnbench.aggregate import figure

    if order not in ("ascending", "descending"):
        raise ConfigError(f"figure.order={order}: choose one of ascending, descending")
    values = None if reference is None else published(reference)
    studies = [read_study(path) for path in find_studies(outputs, study)]
    if values is not None:
        for each in studies:
            cells = each.runs[["dataset", "model"]].drop_duplicates()
            if cells.merge(values, on=["dataset", "model"]).empty:
                each.problems.append(f"figure.reference={reference}: no values for these networks")
    for each in studies:
        _write_csv(each.runs, each.path / "results.csv")
        summary = summarize(each.runs)
        _write_csv(summary, each.path / "summary.csv")
        if not summary.empty:
            drawing = figure.draw_errors(summary, each.finished, order, baseline, values)
            for suffix in ("png", "svg", "pdf"):
                figure.save(drawing, each.path / f"figure.{suffix}")
        metrics = read_metrics(each.runs)
        each.notes += _short_metrics(each.finished, metrics)
        if not metrics.empty:
            settings = differing(each.runs)
            names = ["run_id", *settings]
            metrics = metrics.merge(each.runs[names], on="run_id")
            figure.save(figure.draw_curves(metrics, settings, order), each.path / "curves.png")
        print(describe(each, summary, order))
    return studies


def describe(study: Study, summary: pd.DataFrame, order: str) -> str:
    """Put a study into words: a table for every dataset and model, then what is not in it."""
    from gnbench.aggregate.figure import line_label, sort_norms

    lines = [f"study {study.path.name}: {len(study.finished)} finished runs in {study.path}"]
    settings = [c for c in summary.columns if c in study.runs.columns and c not in CELL]
    for (dataset, model), group in summary.groupby(["dataset", "model"]):
        sizes = sorted(group["batch_size"].unique(), reverse=order == "descending")
        lines += ["", f"{dataset}, {model}: test error in %, mean ± half its 95 % interval (seeds)"]
        cells: dict[str, dict[int, str]] = {}
        for _, row in sort_norms(group).iterrows():
            text = f"{row['test_error_mean']:.2f}"
            if row["n_seeds"] > 1:
                text += f" ± {row['ci_high'] - row['test_error_mean']:.2f}"
            text += f" ({row['n_seeds']})"
            if row["n_diverged"]:
                text += f" {row['n_diverged']} diverged"
            cells.setdefault(line_label(row, settings), {})[row["batch_size"]] = text
        width = max(len("batch size"), *map(len, cells))
        columns = [max(len(str(s)), *(len(c.get(s, "–")) for c in cells.values())) for s in sizes]
        lines.append(_table_line("batch size", map(str, sizes), width, columns))
        for label, texts in cells.items():
            lines.append(_table_line(label, [texts.get(s, "–") for s in sizes], width, columns))
    for title, entries in (
        ("not finished", [_unfinished(row) for _, row in study.unfinished.iterrows()]),
        ("missing", study.missing),
        ("left out", study.problems),
        ("note", study.notes),
    ):
        if entries:
            lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)]
    return "\n".join([*lines, ""])


def _table_line(label: str, texts: Any, width: int, columns: Sequence[int]) -> str:
    cells = "  ".join(f"{text:>{size}}" for text, size in zip(texts, columns, strict=True))
    return f"  {label:<{width}}  {cells}"


def _unfinished(row: pd.Series) -> str:
    message = row["error"].partition("\n")[0] if isinstance(row["error"], str) else ""
    return f"{row['status']:<13} {row['run_id']}" + (f": {message}" if message else "")


def _flat_record(study: str, folder: Path) -> dict[str, Any]:
    """Return a row of ``results.csv`` for a run directory."""
    record = runs.read_record(folder / "run.json")
    settings = identity(record["config"])
    result = record.get("result") or {}
    versions = record.get("versions") or {}
    row: dict[str, Any] = {
        "study": study,
        "run_id": run_id(record["config"]),
        "status": record["status"],
        "dataset": settings["dataset"]["name"],
        "model": settings["model"]["name"],
        "norm": settings["norm"]["name"],
        "batch_size": settings["batch_size"],
        "seed": settings["seed"],
        "test_error": result.get("test_error"),
        "test_error_final": result.get("test_error_final"),
        "epochs_done": result.get("epochs"),
        "directory": str(folder),
    }
    row["processes"] = processes(record["config"])
    row |= {key: versions.get(key) for key in VERSIONS}
    row |= {key: record.get(key) for key in RECORD if key not in row}
    if row["status"] in runs.FINISHED and not isinstance(row["test_error"], int | float):
        raise runs.DamagedError(f"{folder / 'run.json'} is {row['status']} but has no result")
    for key in ("batch_size", "seed"):
        if not isinstance(row[key], int):
            raise TypeError(f"{key}={row[key]!r}")
    for key, value in settings.items():
        for name, setting in _flatten(key, value):
            row.setdefault(name, setting)
    return row


def _flatten(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [pair for name, inner in value.items() for pair in _flatten(f"{key}.{name}", inner)]
    return [(key, json.dumps(value) if isinstance(value, list) else value)]


def _drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Keep one directory of every run: a finished one if there is, else the last begun."""
    finished = table["status"].isin(runs.FINISHED)
    ranked = table.assign(_finished=finished).sort_values(
        ["_finished", "started"], ascending=False, kind="stable", na_position="last"
    )
    extra = ranked[ranked.duplicated("run_id")]
    problems = [
        f"{row['directory']}: the same run as {row['run_id']}, counted once"
        for _, row in extra.iterrows()
    ]
    return table.drop(index=extra.index).reset_index(drop=True), problems


def _short_metrics(finished: pd.DataFrame, metrics: pd.DataFrame) -> list[str]:
    """Name the finished runs whose metrics have fewer whole rows than the run had epochs."""
    whole = metrics.groupby("run_id").size()
    table = finished.assign(rows=finished["run_id"].map(whole).fillna(0))
    short = table[table["rows"] < pd.to_numeric(table["epochs_done"]).fillna(0)]
    return [
        f"{row['directory']}/metrics.csv has {row['rows']:.0f} whole rows of "
        f"{row['epochs_done']:.0f}; the result stands in run.json"
        for _, row in short.iterrows()
    ]


def _mixed_versions(finished: pd.DataFrame) -> list[str]:
    """Say so if the results of a study were made by different versions."""
    notes = []
    for name in VERSIONS:
        counts = finished[name].value_counts(dropna=False)
        if len(counts) > 1:
            parts = ", ".join(f"{version} ({count} runs)" for version, count in counts.items())
            notes.append(f"runs of different versions of {name} together: {parts}")
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


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table.to_csv(partial, index=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="aggregate")
def app(config: DictConfig) -> None:
    """Aggregate as ``conf/aggregate.yaml`` says."""
    cli.composed()
    try:
        write_studies(config.outputs, config.study, **config.figure)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))
