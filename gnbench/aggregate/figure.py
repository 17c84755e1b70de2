"""Tables → matplotlib figures."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from gnbench import files
from gnbench.aggregate.statistics import settings_of
from gnbench.aggregate.study import CELL

if TYPE_CHECKING:
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
# For norms of a user's own; the last four by their least distance (CIELAB) from all others, as seen
# with and without red or green cones, on a light page and a dark one.
MORE_COLOURS = ("#56B4E9", "#8C564B", "#7F7F7F", "#3300FF", "#67325D", "#E08B52", "#296600")
MORE_MARKERS = ("P", "*", "h", "<", "p", "d", ">", "8")  # one more, so that no pair comes again
LINES = ("-", "--", "-.", ":")
BASELINE = "#666666"
# For a paper: as wide as a column (inches), type as small as in captions, fonts embedded whole.
COLUMN = 3.25
PAPER: Any = {
    "font.size": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def styled(style: str) -> AbstractContextManager[None]:
    """Have figures drawn and saved for a ``paper``, or as they are for a screen."""
    return mpl.rc_context(PAPER if style == "paper" else None)


def draw_errors(
    summary: pd.DataFrame,
    finished: pd.DataFrame,
    order: str = "descending",
    baseline: str | None = None,
    reference: pd.DataFrame | None = None,
    paper: bool = False,
) -> Figure:
    """Draw test error (%) against batch size, a panel for every dataset and model.

    Where there is but one batch size and one numeric setting that differs, against that.

    Each line is a norm (and whatever else differs): its mean over seeds, the pooled 95 % interval
    as a band, each seed as a faint point. A model named ``baseline`` that has a single cell is a
    dashed gray line in the panels of its dataset. ``reference`` (of `published`) is overlaid as
    hollow markers, its baseline as a dotted line. For a ``paper`` the panels stand one below
    another in a column, without titles, which are for its captions to say.
    """
    from matplotlib.transforms import ScaledTranslation

    x = x_axis(summary)
    settings = [name for name in settings_of(summary) if name != x]
    beside = is_beside(summary, baseline)
    panels = summary[~beside].groupby(["dataset", "model"])
    width, height = (COLUMN, 2.1) if paper else (4.8, 4.4)
    figure, axes = grid(len(panels), width, height, columns=1 if paper else 3)
    rows = 0  # of the legends
    for axis, (key, panel) in zip(axes, panels, strict=True):
        dataset, model = map(str, key)
        for line, label, style in styled_lines(panel, settings, set(summary["norm"])):
            line = line.sort_values(x)
            sizes, mean = line[x], line["test_error_mean"]
            axis.plot(sizes, mean, label=label, zorder=3, **style)
            low, high = line["pooled_low"].fillna(mean), line["pooled_high"].fillna(mean)
            axis.fill_between(sizes, low, high, color=style["color"], alpha=0.18, linewidth=0)
            seeds = finished.merge(line[list(dict.fromkeys([*CELL, *settings, x]))])
            if len(seeds) > len(line):
                faint: dict[str, Any] = {"color": style["color"], "alpha": 0.35}
                axis.plot(seeds[x], seeds["test_error"], ".", **faint)
        ticks = set(panel[x])
        if reference is not None:
            looks = norm_styles(set(summary["norm"]), set(reference["norm"]))
            ticks |= _overlay(axis, reference, dataset, model, baseline, looks)
        for _, row in summary[beside & (summary["dataset"] == dataset)].iterrows():
            label = f"{row['model']} {line_label(row, settings)}, batch size {row['batch_size']}"
            dashed: dict[str, Any] = {"color": BASELINE, "linestyle": "--", "label": label}
            axis.axhline(row["test_error_mean"], zorder=1, **dashed)
            if not pd.isna(row["pooled_low"]):
                span = (row["pooled_low"], row["pooled_high"])
                axis.axhspan(*span, color=BASELINE, alpha=0.1, linewidth=0)
        batch_size_axis(axis, ticks, order)
        axis.set_title(f"{dataset}, {model}")
        if x != "batch_size":
            axis.set_title(f"{dataset}, {model}, batch size {panel['batch_size'].iloc[0]}")
            axis.set_xlabel(x)
        axis.set_ylabel("test error (%)")
        if paper:
            axis.set_title("")
            if len(panels) > 1:
                axis.set_ylabel(f"{dataset}, {model}\ntest error (%)")
        longest = max(len(label) for label in axis.get_legend_handles_labels()[1])
        columns = (
            2 if longest <= (16 if paper else 24) else 1
        )  # or it would be wider than its panel
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        if paper:  # by a length, since long legends leave the axes less of the height
            down = ScaledTranslation(0, -0.33, figure.dpi_scale_trans)
            below |= {"bbox_to_anchor": (0.5, 0), "bbox_transform": axis.transAxes + down}
            below |= {"frameon": False, "borderpad": 0}
        legend = axis.legend(fontsize="small", ncols=columns, **below)
        rows += math.ceil(len(legend.get_texts()) / columns)
    if paper:
        figure.set_figheight(2.1 * len(panels) + 0.15 * rows)
    return figure


def draw_curves(metrics: pd.DataFrame, settings: Sequence[str], order: str) -> Figure:
    """Draw test error (%) per epoch for every cell: a row a dataset and model, a panel a size.

    Bold: the mean over seeds of the epochs that all of them have; faint: each seed.
    """
    from matplotlib.figure import Figure  # half a second, and the page draws without it

    rows = list(metrics.groupby(["dataset", "model"], sort=True))
    columns = max(row["batch_size"].nunique() for _, row in rows)
    figure = Figure(figsize=(1.2 + 2.4 * columns, 0.8 + 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    handles: dict[str, Line2D] = {}
    for (name, row), row_of_axes in zip(rows, axes, strict=True):
        sizes = sorted(row["batch_size"].unique(), reverse=order == "descending")
        for axis in row_of_axes[len(sizes) :]:
            axis.set_axis_off()
        for size, axis in zip(sizes, row_of_axes, strict=False):
            panel = row[row["batch_size"] == size]
            for line, label, style in styled_lines(panel, settings, set(metrics["norm"])):
                seeds = line.pivot_table(index="epoch", columns="run_id", values="test_error")
                if seeds.shape[1] > 1:
                    axis.plot(seeds.index, seeds, color=style["color"], alpha=0.3, linewidth=0.7)
                mean = seeds.dropna().mean(axis=1)
                style |= {"marker": "." if len(mean) == 1 else "", "linewidth": 1.6}
                [drawn] = axis.plot(mean.index, mean, label=label, **style)
                handles.setdefault(label, drawn)
            axis.set_title(f"{', '.join(map(str, name))}\nbatch size {size}", fontsize="small")
            axis.set_xlabel("epoch", fontsize="small")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
        row_of_axes[0].set_ylabel("test error (%)")
    shown = list(handles.values())
    longest = max(len(str(line.get_label())) for line in shown)
    inches = 0.6 + 0.09 * longest  # of a line and its label
    figure.set_figwidth(max(figure.get_figwidth(), inches))
    fitting = int(figure.get_figwidth() / inches)
    ncols = max(1, min(6, len(shown), fitting))
    height = 0.25 * (math.ceil(len(shown) / ncols) - 1)  # of further rows of the legend
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(handles=shown, loc="outside upper center", ncols=ncols)
    return figure


def x_axis(summary: pd.DataFrame) -> str:
    """Return the column that test errors are drawn against: batch_size, or a setting in its place.

    That is the only numeric one that differs, positive throughout, where all batch sizes are one.
    """
    settings = settings_of(summary)
    if summary["batch_size"].nunique() > 1 or len(settings) != 1:
        return "batch_size"
    values = pd.to_numeric(summary[settings[0]], errors="coerce")
    return settings[0] if (values > 0).all() else "batch_size"


def is_beside(summary: pd.DataFrame, baseline: str | None) -> pd.Series[bool]:
    """Tell which rows are the baseline: drawn as a line in the panels of the other models."""
    cells = summary.groupby(["dataset", "model"])["norm"].transform("size")
    models = summary.groupby("dataset")["model"].transform("nunique")
    return (summary["model"] == baseline) & (cells == 1) & (models > 1)


def sort_norms(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by norm in the order of the legend, unknown norms last, then by batch size."""
    norms = [*STYLES, *sorted(set(table["norm"]) - set(STYLES))]
    sorted_by_size = table.sort_values("batch_size", kind="stable")
    return sorted_by_size.sort_values("norm", key=lambda c: c.map(norms.index), kind="stable")


def sort_lines(table: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """Sort rows by norm, within it by ``settings``, then by batch size."""
    if settings:
        number = table.groupby(
            list(settings), dropna=False
        ).ngroup()  # in the order of their values
        table = table.iloc[number.to_numpy().argsort(kind="stable")]
    return sort_norms(table)


def line_label(row: Any, settings: Sequence[str]) -> str:
    """Name a line: its norm, and every setting in which the lines differ."""
    parts = [str(row["norm"]).upper() if row["norm"] != "none" else "no norm"]
    for name in settings:
        value = row[name]
        if pd.isna(value):
            continue
        whole = isinstance(value, float) and value.is_integer()
        parts.append(f"{name}={int(value) if whole else value}")
    return " ".join(parts)


def grid(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels, ``columns`` in a row, each of so many inches."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def batch_size_axis(axis: Axes, sizes: set[int], order: str) -> None:
    """Make the x axis one of batch sizes: in powers of 2, a tick at each, 64 → 2 if descending."""
    ticks = sorted(sizes)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(min(ticks) / 2**0.4, max(ticks) * 2**0.4)
    if order == "descending":
        axis.invert_xaxis()
    axis.set_xlabel("batch size")
    axis.grid(alpha=0.25)


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes.

    Raises:
        WriteError: if it cannot be written.
    """
    suffix = path.suffix.removeprefix(".")
    date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    buffer = io.BytesIO()
    dpi = mpl.rcParams["savefig.dpi"]
    with mpl.rc_context({"svg.hashsalt": "gnbench"}):
        figure.savefig(buffer, format=suffix, dpi=150 if dpi == "figure" else dpi, metadata=date)
    files.replace(path, buffer.getbuffer())


def norm_styles(norms: Set[str], others: Set[str] = frozenset()) -> dict[str, tuple[str, str, int]]:
    """Return colour, marker and the number of the first dashes of norms; ``others`` come last.

    Up to 28 of a user's own differ in colour or dashes, all that are drawn without markers, and
    in colour or marker, all that a single point has.
    """
    styles = {norm: (*style, 0) for norm, style in STYLES.items()}
    names = (norm for norm in (*sorted(norms), *sorted(others - norms)) if norm not in STYLES)
    looks = zip(itertools.cycle(MORE_COLOURS), itertools.cycle(MORE_MARKERS), strict=False)
    for i, (norm, look) in enumerate(zip(names, looks, strict=False)):
        styles[norm] = (*look, i // len(MORE_COLOURS))
    return styles


def styled_lines(
    rows: pd.DataFrame, settings: Sequence[str], norms: Set[str]
) -> Iterator[tuple[pd.DataFrame, str, dict[str, Any]]]:
    """Yield the rows of every line of a panel, its label and how it is drawn.

    Lines of the same norm share its colour, or shades of it, and differ in style. ``norms`` are
    those of all panels.
    """
    styles = norm_styles(norms)
    drawn: Counter[str] = Counter()
    sorted_rows = sort_lines(rows, settings)
    lines = list(sorted_rows.groupby(["norm", *settings], dropna=False, sort=False))
    of_norm = Counter(str(key[0]) for key, _ in lines)
    for key, line in lines:
        norm = str(key[0])
        colour, marker, first = styles[norm]
        if of_norm[norm] > len(LINES):  # more than there are styles: from dark to light
            share = 0.75 * drawn[norm] / of_norm[norm]
            red, green, blue = (part + (1 - part) * share for part in to_rgb(colour))
            colour = to_hex((red, green, blue))
        dashes = LINES[(first + drawn[norm]) % len(LINES)]
        style = {"color": colour, "marker": marker, "linestyle": dashes}
        yield line, line_label(line.iloc[0], settings), style
        drawn[norm] += 1


def _overlay(
    axis: Axes,
    reference: pd.DataFrame,
    dataset: str,
    model: str,
    baseline: str | None,
    looks: Mapping[str, tuple[str, str, int]],
) -> set[int]:
    """Draw the published values of a panel by the ``looks`` of norms; return their batch sizes."""
    of_dataset = reference[reference["dataset"] == dataset]
    values = of_dataset[of_dataset["model"] == model]
    for _, row in of_dataset[of_dataset["model"] == baseline].iterrows():
        if model != baseline and not values.empty:
            label = f"{baseline} {str(row['norm']).upper()}, {source_of(row)}"
            axis.axhline(row["test_error"], color=BASELINE, linestyle=":", label=label, zorder=1)
    for norm, line in sort_norms(values).groupby("norm", sort=False):
        colour, marker, _ = looks[str(norm)]
        label = f"{str(norm).upper()}, {source_of(line.iloc[0])}"
        hollow: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "label": label}
        axis.plot(line["batch_size"], line["test_error"], marker, zorder=2, **hollow)
    return set(values["batch_size"])


def source_of(row: Any) -> str:
    """Name the source of a published value, and whether it was corrected."""
    return f"{row['source']}{' (corrected)' if row['corrected'] else ''}"


def draw_memory(table: pd.DataFrame) -> Figure:
    """Draw the MiB of activations (rows of ``memory.csv``) against batch size, a line a norm."""
    figure, [axis] = grid(1, width=4.8, height=4.4)
    table = table.assign(mebibytes=table["activation_bytes"] / 2**20)
    for line, label, style in styled_lines(table, [], set(table["norm"])):
        axis.plot(line["batch_size"], line["mebibytes"], label=label, **style)
        if line["peak_bytes"].notna().all():
            peak = {**style, "linestyle": ":", "label": f"{label}, peak of the device"}
            axis.plot(line["batch_size"], line["peak_bytes"] / 2**20, **peak)
    batch_size_axis(axis, set(table["batch_size"]), "ascending")
    axis.set_yscale("log", base=2)
    axis.set_ylabel("activations held for the backward pass (MiB)")
    axis.set_title(", ".join(table.iloc[0][["dataset", "model", "precision"]]))
    axis.legend(fontsize="small", ncols=2)
    return figure
