"""``table.tex``: test errors as a table of LaTeX, to be taken into a paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from gnbench.aggregate.figure import line_label, sort_norms
from gnbench.aggregate.statistics import settings_of
from gnbench.aggregate.verdict import Panel

ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{special: f"\\{special}" for special in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """Write a text so that LaTeX shows it as it is."""
    return "".join(ESCAPED.get(character, character) for character in text)


def table(summary: pd.DataFrame, panels: Mapping[tuple[str, str], Panel], order: str) -> str:
    """Return the table of a `summary`: a row a line of the figure, a column a batch size.

    A cell is the mean ± half its pooled 95 % interval, in percent. Bold is what the verdict of
    ``panels`` shows to err less than what it is compared with: a line than its reference, a
    reference than every line that is compared with it.
    """
    sizes = sorted(summary["batch_size"].unique(), reverse=order == "descending")
    several = len(summary.groupby(["dataset", "model"])) > 1
    columns = len(sizes) + 1
    lines: list[str] = []
    for (dataset, model), rows in summary.groupby(["dataset", "model"]):
        better = _better(panels.get((str(dataset), str(model))))
        cells: dict[str, dict[int, str]] = {}
        for _, row in sort_norms(rows).iterrows():
            label, size = line_label(row, settings_of(summary)), int(row["batch_size"])
            cells.setdefault(label, {})[size] = _cell(row, bold=(label, size) in better)
        if several:
            title = escaped(f"{dataset}, {model}")
            lines += [r"\midrule"] if lines else []
            lines.append(rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{title}}}}} \\")
        for label, own in cells.items():
            lines.append(_row(escaped(label), (own.get(size, "--") for size in sizes)))
    notes = [
        "% Test error in %, mean over seeds" + _seeds(summary),
        "% ±: half the 95 % interval of the mean, its variance pooled over the cells of a network.",
        "% Bold: shown to err less (p < 0.05 by Holm) than " + _references(panels) + ".",
    ]
    if summary["n_diverged"].any():
        notes.append("% Dagger: with a run that diverged.")
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *notes,
            rf"\begin{{tabular}}{{l{'r' * len(sizes)}}}",
            r"\toprule",
            _row("batch size", map(str, sizes)),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _row(label: str, cells: Iterable[str]) -> str:
    return " & ".join([label, *cells]) + r" \\"


def _cell(row: Any, bold: bool) -> str:
    text = f"{row['test_error_mean']:.2f}"
    if not pd.isna(row["pooled_high"]):
        text += rf" \pm {row['pooled_high'] - row['test_error_mean']:.2f}"
    text = rf"\mathbf{{{text}}}" if bold else text
    dagger = r"^{\dagger}" if row["n_diverged"] else ""
    return f"${text}{dagger}$"


def _better(panel: Panel | None) -> set[tuple[str, int]]:
    """Return the lines, by label and batch size, that are shown to err less than another."""
    found: set[tuple[str, int]] = set()
    against: dict[tuple[str, int], list[int]] = {}  # of a reference, what its lines show
    for line in panel.lines if panel is not None else ():
        for one in line.comparisons if line.reference is not None else ():
            if one.shown < 0:
                found.add((line.label, one.batch_size))
            if line.reference is not None:
                against.setdefault((line.reference.label, one.batch_size), []).append(one.shown)
    return found | {key for key, shown in against.items() if min(shown) > 0}


def _seeds(summary: pd.DataFrame) -> str:
    numbers = sorted(set(summary["n_seeds"]))
    if not numbers:
        return "."
    counts = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f" ({counts} a cell)."


def _references(panels: Mapping[tuple[str, str], Panel]) -> str:
    """Say what lines are compared with."""
    lines = [line for panel in panels.values() for line in panel.lines]
    labels = sorted({line.reference.label for line in lines if line.reference is not None})
    if not labels:
        return "what it is compared with, here nothing"
    named = " ".join(", ".join(labels).split())
    return f"{named}; that itself: than all that is compared with it"
