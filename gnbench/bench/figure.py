"""The rows of ``bench.csv`` → a matplotlib figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from gnbench.aggregate.figure import BASELINE, LINES, batch_size_axis, grid

HUES = (
    *("#000000", "#7F7F7F", "#0072B2", "#D62728", "#009E73"),
    *("#CC79A7", "#E69F00", "#56B4E9", "#8C564B"),
)
MARKERS = "os^DvPX*"


def draw_speed(rows: pd.DataFrame, device: str) -> Figure:
    """Draw how many times as fast as the first plain loop each candidate is, against batch size.

    A panel a dataset, model and norm. Dotted: the hardware's limit for the first precision, if
    arithmetic and memory overlap and, below, if they do not.
    """
    panels = list(rows.groupby(["dataset", "model", "norm"], sort=False))
    styles = dict(zip(rows["precision"].unique(), LINES, strict=False))
    ranks = {who: rank for rank, who in enumerate(rows["who"].unique())}
    figure, axes = grid(len(panels), width=4.8, height=4.0)
    for axis, (title, panel) in zip(axes, panels, strict=True):
        panel = panel.sort_values("batch_size")
        for who, line in panel.groupby("who", sort=False):
            axis.plot(
                line["batch_size"],
                line["speedup_overall"],
                color=HUES[ranks[who] % len(HUES)],
                marker=MARKERS[ranks[who] % len(MARKERS)],
                linestyle=styles[line["precision"].iloc[0]],
                label=str(who),
            )
        first = panel[panel["who"] == rows["who"].iloc[0]]
        precision = first["precision"].iloc[0]
        for fraction, style, name in (
            ("limit_fraction", ":", f"the hardware's limit, {precision}"),
            ("limit_in_turn_fraction", "-.", "the limit if nothing overlaps"),
        ):
            axis.plot(
                first["batch_size"],
                first["speedup_overall"] / first[fraction],
                style,
                color=BASELINE,
                label=name,
            )
        batch_size_axis(axis, set(panel["batch_size"]), "descending")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.set_ylabel(f"speed, the plain loop in {precision} being 1")
        axis.set_title(", ".join(map(str, title)))
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.suptitle(device, fontsize="small")
    return figure
