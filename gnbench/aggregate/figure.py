"""Tables → matplotlib figures."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Colour-blind-safe hues of Okabe & Ito (2008), BN blue and GN red as in the report.
STYLES = {
    "bn": ("#0072B2", "o"),
    "gn": ("#D62728", "s"),
    "ln": ("#009E73", "^"),
    "in": ("#E69F00", "D"),
    "lrn": ("#CC79A7", "v"),
    "none": ("#000000", "X"),
}
MORE_STYLES = (("#56B4E9", "P"), ("#8C564B", "*"), ("#7F7F7F", "h"))  # for norms of a user's own
LINES = ("-", "--", "-.", ":")
HUES = (  # of contenders: the plain loop, and two engines, compiled or not, once or twice at once
    *("#000000", "#0072B2", "#D62728", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#8C564B", "#7F7F7F"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
BASELINE = "#666666"
BEYOND_ONE_SEED = 0.18  # opacity of an interval band


def sort_norms(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by norm in the order of the legend, unknown norms last, then by batch size."""
    rank = {norm: index for index, norm in enumerate(STYLES)}
    return table.sort_values(
        ["norm", "batch_size"],
        key=lambda c: c.map(lambda n: (rank.get(n, len(rank)), n)) if c.name == "norm" else c,
        kind="stable",
    )


def line_label(row: Any, settings: Sequence[str]) -> str:
    """Name a line: its norm, and every setting in which the lines differ."""
    parts = [str(row["norm"]).upper() if row["norm"] != "none" else "no norm"]
    for name in settings:
        if not pd.isna(row[name]):
            value = row[name]
            whole = isinstance(value, float) and value.is_integer()
            parts.append(f"{name}={int(value) if whole else value}")
    return " ".join(parts)


def draw_errors(
    summary: pd.DataFrame,
    finished: pd.DataFrame,
    order: str = "descending",
    baseline: str | None = None,
    reference: pd.DataFrame | None = None,
) -> Figure:
    """Draw test error (%) against batch size, a panel for every dataset and model.

    Each line is a norm (and whatever else differs): its mean over seeds, the 95 % interval as a
    band, each seed as a faint point. A model named ``baseline`` that has a single cell is a dashed
    gray line in the panels of its dataset. ``reference`` (of `published`) is
    overlaid as hollow markers, its baseline as a dotted line.
    """
    settings = [c for c in summary.columns if c in finished.columns and c not in _CELL]
    panels, baselines = _panels(summary, baseline)
    figure, axes = _grid(len(panels), width=4.8, height=4.4)
    colours = _styles(summary["norm"])
    for axis, ((dataset, model), rows) in zip(axes, panels, strict=False):
        seeds = finished[(finished["dataset"] == dataset) & (finished["model"] == model)]
        for line, label, colour, marker, style in _lines(rows, settings, colours):
            line = line.sort_values("batch_size")
            mean = line["test_error_mean"]
            axis.plot(
                line["batch_size"],
                mean,
                color=colour,
                marker=marker,
                linestyle=style,
                label=label,
                zorder=3,
            )
            axis.fill_between(
                line["batch_size"],
                line["ci_low"].fillna(mean),
                line["ci_high"].fillna(mean),
                color=colour,
                alpha=BEYOND_ONE_SEED,
                linewidth=0,
            )
            points = seeds.merge(line[[*_CELL, *settings]], on=[*_CELL, *settings])
            if len(points) > len(line):
                axis.plot(points["batch_size"], points["test_error"], ".", color=colour, alpha=0.35)
        sizes = set(rows["batch_size"])
        if reference is not None:
            sizes |= _overlay(axis, reference, dataset, model, baseline, colours)
        for _, row in baselines[baselines["dataset"] == dataset].iterrows():
            _baseline(axis, row, settings)
        _batch_size_axis(axis, sizes, order)
        axis.set_title(f"{dataset}, {model}")
        axis.set_ylabel("test error (%)")
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def draw_curves(metrics: pd.DataFrame, settings: Sequence[str], order: str) -> Figure:
    """Draw test error (%) per epoch for every cell: a row a dataset and model, a panel a size.

    Bold: the mean over seeds of the epochs that all of them have; faint: each seed.
    """
    rows = list(metrics.groupby(["dataset", "model"], sort=True))
    columns = max(row["batch_size"].nunique() for _, row in rows)
    figure = Figure(figsize=(1.2 + 2.4 * columns, 0.8 + 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    colours = _styles(metrics["norm"])
    handles: dict[str, Line2D] = {}
    for (name, row), row_of_axes in zip(rows, axes, strict=True):
        sizes = sorted(row["batch_size"].unique(), reverse=order == "descending")
        for axis in row_of_axes[len(sizes) :]:
            axis.set_axis_off()
        for size, axis in zip(sizes, row_of_axes, strict=False):
            cell = sort_norms(row[row["batch_size"] == size])
            for line, label, colour, _, style in _lines(cell, settings, colours):
                by_seed = line.pivot_table(index="epoch", columns="run_id", values="test_error")
                if by_seed.shape[1] > 1:
                    axis.plot(by_seed.index, by_seed, color=colour, alpha=0.3, linewidth=0.7)
                mean = by_seed.dropna().mean(axis=1)
                marker = "." if len(mean) == 1 else ""
                [drawn] = axis.plot(
                    mean.index, mean, color=colour, linestyle=style, marker=marker, linewidth=1.6
                )
                handles.setdefault(label, drawn)
            axis.set_title(f"{', '.join(map(str, name))}\nbatch size {size}", fontsize="small")
            axis.set_xlabel("epoch", fontsize="small")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
        row_of_axes[0].set_ylabel("test error (%)")
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=min(6, len(handles)),
    )
    return figure


def draw_speed(rows: pd.DataFrame, device: str) -> Figure:
    """Draw how many times as fast as the plain loop each contender is, against batch size.

    ``rows`` are those of ``bench.csv``; a panel a dataset, model and norm. Dotted: the hardware's
    limit for the first precision.
    """
    panels = list(rows.groupby(["dataset", "model", "norm"], sort=False))
    styles = dict(zip(rows["precision"].unique(), LINES, strict=False))
    kinds = ["engine", "compiled", "runs", "replicas"]
    ways = rows[kinds].drop_duplicates().itertuples(index=False, name=None)
    hues = dict(zip(ways, itertools.cycle(HUES), strict=False))
    figure, axes = _grid(len(panels), width=4.8, height=4.0)
    for axis, (name, panel) in zip(axes, panels, strict=True):
        lines = panel.groupby(["precision", *kinds], sort=False)
        for index, (way, line) in enumerate(lines):
            line = line.sort_values("batch_size")
            precision, engine, compiled, runs, replicas = cast(tuple[str, str, bool, int, int], way)
            together = f", {runs} at once" if runs > 1 else ""
            packed = f", {replicas} replicas" if replicas > 1 else ""
            axis.plot(
                line["batch_size"],
                line["speedup"],
                color=hues[engine, compiled, runs, replicas],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=styles[precision],
                label=f"{engine}{' compiled' * compiled} {precision}{together}{packed}",
            )
        first = next(line for _, line in lines).sort_values("batch_size")
        axis.plot(
            first["batch_size"],
            first["speedup"] / first["limit_fraction"],
            ":",
            color=BASELINE,
            label=f"the hardware's limit, {first['precision'].iloc[0]}",
        )
        _batch_size_axis(axis, set(panel["batch_size"]), "descending")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.set_ylabel("speed, the plain loop being 1")
        axis.set_title(", ".join(map(str, name)))
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.suptitle(device, fontsize="small")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically; the same figure gives the same bytes."""
    suffix = path.suffix.removeprefix(".")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with mpl.rc_context({"svg.hashsalt": "gnbench"}):
            figure.savefig(partial, format=suffix, dpi=150, metadata=dates.get(suffix))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_CELL = ["dataset", "model", "norm", "batch_size"]


def _panels(
    summary: pd.DataFrame, baseline: str | None
) -> tuple[list[tuple[tuple[str, str], pd.DataFrame]], pd.DataFrame]:
    """Split into the panels to draw and the rows that are baselines in other panels."""
    panels = []
    baselines = summary.iloc[:0]
    for (dataset, model), rows in summary.groupby(["dataset", "model"], sort=True):
        others = summary[(summary["dataset"] == dataset) & (summary["model"] != model)]
        if model == baseline and len(rows) == 1 and not others.empty:
            baselines = pd.concat([baselines, rows])
        else:
            panels.append(((str(dataset), str(model)), rows))
    panels = [(key, sort_norms(rows)) for key, rows in panels]
    return panels, baselines


def _lines(
    rows: pd.DataFrame, settings: Sequence[str], colours: dict[str, tuple[str, str]]
) -> Iterator[tuple[pd.DataFrame, str, str, str, str]]:
    """Yield what each line draws, with its label, colour, marker and line style.

    Lines of the same norm share its colour and differ in style.
    """
    drawn: Counter[str] = Counter()
    for keys, line in rows.groupby(["norm", *settings], dropna=False, sort=False):
        norm = str(keys[0])
        yield (line, line_label(line.iloc[0], settings), *colours[norm], LINES[drawn[norm] % 4])
        drawn[norm] += 1


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _styles(norms: pd.Series) -> dict[str, tuple[str, str]]:
    others = sorted(set(norms) - set(STYLES))
    more = {norm: MORE_STYLES[i % len(MORE_STYLES)] for i, norm in enumerate(others)}
    return STYLES | more


def _batch_size_axis(axis: Axes, sizes: set[int], order: str) -> None:
    ticks = sorted(sizes)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(min(ticks) / 2**0.4, max(ticks) * 2**0.4)
    if order == "descending":
        axis.invert_xaxis()
    axis.set_xlabel("batch size")
    axis.grid(alpha=0.25)


def _baseline(axis: Axes, row: Any, settings: Sequence[str]) -> None:
    label = f"{row['model']} {line_label(row, settings)}, batch size {row['batch_size']}"
    axis.axhline(row["test_error_mean"], color=BASELINE, linestyle="--", label=label, zorder=1)
    if not pd.isna(row["ci_low"]):
        axis.axhspan(row["ci_low"], row["ci_high"], color=BASELINE, alpha=0.1, linewidth=0)


def _overlay(
    axis: Axes,
    reference: pd.DataFrame,
    dataset: str,
    model: str,
    baseline: str | None,
    colours: dict[str, tuple[str, str]],
) -> set[int]:
    """Draw the published values of a panel; return their batch sizes."""
    of_dataset = reference[reference["dataset"] == dataset]
    values = of_dataset[of_dataset["model"] == model]
    for _, row in of_dataset[of_dataset["model"] == baseline].iterrows():
        if model != baseline and not values.empty:
            label = f"{baseline} {str(row['norm']).upper()}, {row['source']}"
            axis.axhline(row["test_error"], color=BASELINE, linestyle=":", label=label, zorder=1)
    for norm, line in sort_norms(values).groupby("norm", sort=False):
        colour, marker = colours.get(str(norm), MORE_STYLES[0])
        source = line["source"].iloc[0]
        axis.plot(
            line["batch_size"],
            line["test_error"],
            marker,
            color=colour,
            markerfacecolor="none",
            label=f"{str(norm).upper()}, {source}",
            zorder=2,
        )
    return set(values["batch_size"])
