"""Studies → the numbers of the page: one JSON document, which its scripts draw.

All that is a statistic is computed here, by the same functions as the tables of aggregate.
"""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from gnbench import zipped
from gnbench.aggregate.figure import (
    LINES,
    MORE_COLOURS,
    MORE_MARKERS,
    STYLES,
    is_beside,
    line_label,
    norm_styles,
    source_of,
    styled_lines,
    x_axis,
)
from gnbench.aggregate.report.runs import MEASURED, runs_table
from gnbench.aggregate.statistics import intervals, settings_of, summarize
from gnbench.aggregate.study import CELL, Study, all_published, of_their_size, read_metrics
from gnbench.aggregate.verdict import Panel, panels
from gnbench.runs.directory import FINISHED

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"}
SYMBOLS |= {"X": "x", "P": "cross", "*": "star", "h": "hexagon", "<": "triangle-left"}
SYMBOLS |= {">": "triangle-right", "d": "diamond-tall", "p": "pentagon", "8": "octagon"}
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
HUES = [*STYLES.values()][2:5]  # those of BN and GN come late
HUES += [*zip(MORE_COLOURS, MORE_MARKERS, strict=False), *STYLES.values()]
HUES = [*dict.fromkeys(HUES)]  # 13, which no number of dashes divides
# What can be drawn: column, name, name at its axis, whether its interval is pooled over cells.
METRICS = (
    ("test_error", "test error, median of the last five epochs (%)", "test error (%)", True),
    ("test_error_final", "test error, last epoch (%)", "test error (%)", True),
    ("balanced_test_error", "balanced test error, last epoch (%)", "balanced error (%)", False),
    ("val_error", "validation error (%)", "validation error (%)", False),
    ("train_error", "training error, last epoch (%)", "training error (%)", False),
    ("test_loss", "test loss, last epoch", "test loss", False),
    ("train_loss", "training loss, last epoch", "training loss", False),
)
HELD = {"epochs": "epochs_done", "steps": "steps", "seconds": "seconds"}
HELD |= {"bytes": "activation_bytes", "peak": "peak_memory_bytes"}
CURVES = {"test_error": 0.01, "train_error": 0.01, "test_loss": 0.001, "train_loss": 0.001}
MOST_POINTS = 32_000  # of all curves together: some 0.6 MB
LARGEST = 10**9  # what diverged is not drawn
EVALUATIONS = "evaluations.csv"
EVALUATED = ("run_id", "statistics", "images", "trained_images", "test_error")


@dataclass(frozen=True)
class Look:
    """The group ``figure`` of the configuration, as in ``conf/report.yaml``."""

    order: str
    baseline: str | None
    against: str
    registered: list[int]


@dataclass
class Shown:
    """A study, the ``runs`` of it that count, and what aggregate computes of them."""

    study: Study
    runs: pd.DataFrame
    look: Look
    summary: pd.DataFrame = field(init=False)
    metrics: pd.DataFrame = field(init=False)
    last: pd.DataFrame = field(init=False)  # the last row of each
    panels: dict[tuple[str, str], Panel] = field(init=False)
    evaluations: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = read_metrics(self.runs)
        last = self.metrics.groupby("run_id")[[*MEASURED.values()]].last()
        self.last = last.set_axis([*MEASURED], axis=1)
        self.summary = summarize(self.runs)
        self.panels = panels(
            self.finished, settings_of(self.summary), self.look.against, self.look.registered
        )
        self.evaluations = self._read_evaluations()

    @functools.cached_property
    def finished(self) -> pd.DataFrame:
        """The runs that have a result."""
        return self.runs[self.runs["status"].isin(FINISHED)]

    def column(self, name: str) -> pd.Series[float]:
        """Return a number of every run, NaN where it is not known."""
        if name in self.last:
            return self.runs["run_id"].map(self.last[name]).astype(float)
        if name not in self.runs:
            return pd.Series(math.nan, self.runs.index)
        return pd.to_numeric(self.runs[name], errors="coerce").astype(float)

    @functools.cached_property
    def grouped(self) -> Any:
        """The finished runs by the rows of the summary, as `summarize` groups them."""
        keys = [*CELL, *settings_of(self.summary)]
        return self.finished.groupby(keys, dropna=False, sort=True)

    @functools.cached_property
    def cells(self) -> list[tuple[pd.Series[Any], npt.NDArray[np.int_]]]:
        """The rows of the summary, each with the positions of its runs among the finished ones."""
        of_run = self.grouped.ngroup().to_numpy()
        ends = np.cumsum(self.summary["n_seeds"])[:-1]
        positions = np.split(np.argsort(of_run, kind="stable"), ends)[: len(self.summary)]
        rows = [row for _, row in self.summary.iterrows()]
        return list(zip(rows, positions, strict=True))

    def _read_evaluations(self) -> pd.DataFrame:
        """Read ``evaluations.csv``, the rows of finished runs; a damaged one is a problem."""
        path, nothing = self.study.path / EVALUATIONS, pd.DataFrame(columns=[*EVALUATED])
        try:
            data = io.BytesIO(zipped.read_bytes(path))
            table = pd.read_csv(data, dtype=str, keep_default_na=False)
            table = table[[*EVALUATED]].assign(test_error=table["test_error"].astype(float))
            pd.to_numeric(table["images"].replace("", "0"))
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, LookupError) as error:
            self.study.problems.append(f"{path} is not a table of gnbench.evaluate ({error})")
            return nothing
        return table[table["run_id"].isin(self.finished["run_id"])]


def contents(shown: Sequence[Shown], look: Look, folder: Path) -> dict[str, Any]:
    """Return what ``page.js`` reads; ``folder`` is that of the page."""
    lines = _Lines({str(norm) for one in shown for norm in one.summary["norm"]})
    numbers: dict[tuple[int, str], int] = {}  # of a run, by study and id
    for number, one in enumerate(shown):
        for run_id in one.study.runs["run_id"]:
            numbers[number, run_id] = len(numbers)
    found: dict[str, list[Any]] = {"panels": [], "cells": [], "evaluations": []}
    for number, one in enumerate(shown):
        _add_study(found, number, one, look, lines, numbers)
    known = {name for cell in found["cells"] for name in cell["m"]}
    return {
        "order": look.order,
        "studies": [{"name": one.study.path.name, "setting": _setting(one)} for one in shown],
        "metrics": [
            {"key": key, "name": name, "short": short, "pooled": pooled}
            for key, name, short, pooled in METRICS
            if key in known
        ],
        "lines": lines.styles(),
        **found,
        "runs": runs_table([(one.study, one.last) for one in shown], folder),
        "curves": _curves(shown, numbers),
    }


class _Lines:
    """The lines of all studies: what has the same label looks the same everywhere."""

    def __init__(self, norms: set[str]) -> None:
        self.numbers: dict[tuple[str, str], int] = {}
        self.of_norms = norm_styles(norms, set(all_published()["norm"]))

    def number(self, row: Any, settings: Sequence[str]) -> int:
        """Return the number of the line that a row of the summary belongs to."""
        key = (str(row["norm"]), line_label(row, settings))
        return self.numbers.setdefault(key, len(self.numbers))

    def look(self, norm: str) -> dict[str, str]:
        """Return colours and symbol of a norm that ran or was published."""
        colour, marker, _ = self.of_norms[norm]
        return {"colour": to_hex(colour), "dark": _for_dark(colour), "symbol": SYMBOLS[marker]}

    def styles(self) -> list[dict[str, str]]:
        """Return label, symbol, dashes and colours of every line; ``dark`` is for a dark page."""
        norms = [norm for norm, _ in self.numbers]
        table = pd.DataFrame({"norm": norms, "batch_size": 1, "line": range(len(norms))})
        styles: dict[int, dict[str, str]] = {}
        labels = [label for _, label in self.numbers]
        drawn = styled_lines(table, ["line"], set(norms)) if norms else ()
        for rows, _, style in drawn:
            number = int(rows["line"].iloc[0])
            if len(set(norms)) == 1 and len(norms) > len(LINES):  # hues are free: no shades of one
                colour, marker = HUES[number % len(HUES)]
                style |= {"color": colour, "marker": marker}
            styles[number] = {
                "label": labels[number],
                "colour": to_hex(style["color"]),
                "dark": _for_dark(style["color"]),
                "symbol": SYMBOLS[style["marker"]],
                "dash": DASHES[style["linestyle"]],
            }
        return [styles[number] for number in sorted(styles)]


def _for_dark(colour: str) -> str:
    """Return a colour for a dark page: the hue kept, dark shades made light and light ones dark."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    lightness = min(0.88, 0.78 - 0.4 * (lightness - 0.3) / 0.6)
    return to_hex(colorsys.hls_to_rgb(hue, lightness, saturation))


def _setting(one: Shown) -> str | None:
    """Return the setting that stands in for the batch size on the axis, if one does."""
    name = None if one.summary.empty else x_axis(one.summary)
    return None if name == "batch_size" else name


def _add_study(
    found: dict[str, list[Any]],
    number: int,
    one: Shown,
    look: Look,
    lines: _Lines,
    numbers: dict[tuple[int, str], int],
) -> None:
    """Add the panels, the cells and the evaluations of a study."""
    settings, axis = settings_of(one.summary), _setting(one)
    besides = [name for name in settings if name != axis]
    beside = is_beside(one.summary, look.baseline)
    places: dict[tuple[str, str], int] = {}
    published = of_their_size(all_published(), one.runs)
    columns = {name: one.column(name)[one.finished.index].to_numpy() for name in HELD.values()}
    ids = one.finished["run_id"].to_numpy()
    cell_of_run = {ids[i]: cell for cell, (_, runs) in enumerate(one.cells) for i in runs}
    evaluations = dict([*one.evaluations.groupby(one.evaluations["run_id"].map(cell_of_run))])
    for values, (cell_number, (row, runs)) in zip(_values(one), enumerate(one.cells), strict=True):
        key = (str(row["dataset"]), str(row["model"]))
        if key not in places:
            places[key] = len(found["panels"])
            found["panels"].append(
                {
                    "study": number,
                    "dataset": key[0],
                    "model": key[1],
                    "beside": bool(beside[cell_number]),
                    "published": _published(published, key, look.baseline, lines),
                }
            )
        held = {name: _mean(columns[column][runs]) for name, column in HELD.items()}
        cell: dict[str, Any] = {
            "panel": places[key],
            "line": lines.number(row, settings),
            "joined": lines.number(row, besides) if axis else None,
            "size": int(row["batch_size"]),
            "x": {name: figures(value) for name, value in held.items()},
            "runs": [numbers[number, run_id] for run_id in ids[runs]],
            "diverged": int(row["n_diverged"]),
            "m": values,
        }
        if axis:
            cell["x"]["setting"] = figures(float(row[axis]))
        found["evaluations"] += [
            {"cell": len(found["cells"]), **entry}
            for entry in _evaluations(evaluations.get(cell_number))
        ]
        found["cells"].append(cell)


def _values(one: Shown) -> list[dict[str, list[Any]]]:
    """Return for every row of the summary mean, low and high of every metric."""
    collected: list[dict[str, list[Any]]] = [{} for _ in range(len(one.summary))]
    status = one.finished["status"]
    for name, _, _, pooled in METRICS:
        numbers = one.column(name)[one.finished.index]
        if numbers.isna().all():
            continue
        table = intervals(one.summary, numbers, status, one.grouped)
        low, high = ("pooled_low", "pooled_high") if pooled else ("ci_low", "ci_high")
        rows = table[["test_error_mean", low, high]].to_numpy().tolist()
        for values, row in zip(collected, rows, strict=True):
            entry = [figures(value, 6) for value in row]
            if entry[0] is not None:
                values[name] = entry
    return collected


def _published(
    table: pd.DataFrame, key: tuple[str, str], baseline: str | None, lines: _Lines
) -> list[dict[str, Any]]:
    """Return the published values of a panel, a series a norm; the baseline has no sizes.

    A series looks like its norm, whatever else the label of a line of that norm says.
    """
    dataset, model = key
    series = []
    own = table[(table["dataset"] == dataset) & (table["model"] == model)]
    for (norm, _), rows in own.groupby(["norm", "source"], sort=False):
        label = f"{str(norm).upper()}, {source_of(rows.iloc[0])}"
        points = {name: rows[name].tolist() for name in ("batch_size", "test_error")}
        series.append({"label": label, **lines.look(str(norm)), **points})
    beside = table[(table["dataset"] == dataset) & (table["model"] == baseline)]
    for _, row in beside.iterrows():
        if model != baseline and not own.empty:
            label = f"{baseline} {str(row['norm']).upper()}, {source_of(row)}"
            series.append({"label": label, "test_error": [float(row["test_error"])]})
    return series


def _mean(values: npt.NDArray[np.floating[Any]]) -> float:
    """Return the mean of what is known."""
    known = np.count_nonzero(~np.isnan(values))
    return float(np.nansum(values)) / known if known else math.nan


def _evaluations(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Return the evaluations of the runs of a cell, means over seeds."""
    entries: list[dict[str, Any]] = []
    if table is None:
        return entries
    for (name, images), rows in table.groupby(["statistics", "images"], sort=False):
        entries.append(
            {
                "statistics": str(name),
                "images": figures(float(str(images) or "nan")),
                "own": bool((rows["images"] == rows["trained_images"]).any()),
                "error": figures(rows["test_error"].mean(), 6),
                "seeds": int(rows["run_id"].nunique()),
            }
        )
    return entries


def _curves(shown: Sequence[Shown], numbers: dict[tuple[int, str], int]) -> dict[str, Any]:
    """Return the epochs of every run in columns; of too many, every ``stride``-th and the last.

    ``epoch`` is missing where it counts 1, 2, 3; ``seconds`` have passed since the start, in
    ``unit``; ``steps`` are those of an epoch. Columns are written as by `_steps`.
    """
    rows = sum(len(one.metrics) for one in shown)
    stride = max(1, math.ceil(rows / MOST_POINTS))
    runs = {}
    for number, one in enumerate(shown):
        run, names = pd.factorize(one.metrics["run_id"])
        table = one.metrics.iloc[np.lexsort((one.metrics["epoch"], run))]
        columns = {name: table[name].to_numpy(float) for name in (*CURVES, "epoch", "step")}
        seconds = table["seconds"].to_numpy(float)
        ends = np.bincount(run).cumsum()
        for run_id, start, end in zip(names, [0, *ends], ends, strict=False):
            all_epochs = columns["epoch"][start:end]
            last = all_epochs[-1]
            kept = start + np.flatnonzero((all_epochs % stride == 0) | (all_epochs == last))
            epochs = columns["epoch"][kept].astype(int).tolist()
            entry: dict[str, Any] = {
                name: _steps(columns[name][kept], unit) for name, unit in CURVES.items()
            }
            took = seconds[start:end]
            passed = np.where(np.isnan(took), np.nan, np.nancumsum(took))[kept - start]
            most = passed[-1] if math.isfinite(passed[-1]) and passed[-1] > 0 else 1.0
            entry["unit"] = 10.0 ** (math.floor(math.log10(most)) - 3)
            entry["seconds"] = _steps(passed, entry["unit"])
            entry["steps"] = figures(float(columns["step"][kept[-1]]) / last) if last else None
            if epochs != list(range(1, len(epochs) + 1)):
                entry["epoch"] = epochs
            runs[str(numbers[number, run_id])] = entry
    return {"stride": stride, "units": CURVES, "runs": runs}


def _steps(values: npt.NDArray[np.float64], unit: float) -> list[int | None]:
    """Write numbers as steps from one to the next in ``unit``: fewer digits; None: not known."""
    steps: list[int | None] = [None] * len(values)
    known = np.flatnonzero(np.abs(values) < LARGEST * unit)  # which NaN is not
    rounded = np.rint(values[known] / unit).astype(int)
    for i, step in zip(known.tolist(), np.diff(rounded, prepend=0).tolist(), strict=True):
        steps[i] = step
    return steps


def figures(value: Any, digits: int = 7) -> float | int | None:
    """Round to significant digits; what is not a finite number is None."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded
