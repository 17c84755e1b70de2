"""What the data show, in words, and what they do not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from gnbench.aggregate.compare import (
    DIFFERENT_SPREADS,
    Comparison,
    Line,
    Pool,
    cell_of,
    compare,
    pool,
)
from gnbench.aggregate.figure import line_label, sort_lines
from gnbench.runs.directory import FINISHED

NUMBERS = ["batch_size", "n_seeds", "n_seeds_against", "difference", "ci_low", "ci_high"]
NUMBERS += ["p", "p_holm", "family", "detectable"]
NUMBERS += ["final_difference", "final_low", "final_high", "mcnemar"]
COLUMNS = ["dataset", "model", "line", "against", *NUMBERS]
NO_VARIANCE = "an error of 0 or 100 % has no variance"
Panels = Mapping[tuple[str, str], "Panel"]


class Panel:
    """The lines of a dataset and model, compared: ``pooled`` is their variance over seeds."""

    def __init__(
        self,
        runs: pd.DataFrame,
        settings: Sequence[str],
        against: str,
        registered: Sequence[int] = (),
    ) -> None:
        """Compare finished ``runs`` of a dataset and model, which ``settings`` tell apart."""
        self.against = against
        runs = sort_lines(runs, settings)
        self.lines: list[Line] = []
        first: list[Any] = []  # a run of each line
        for _, own in runs.groupby(["norm", *settings], dropna=False, sort=False):
            cells = {int(str(size)): cell_of(rows) for size, rows in own.groupby("batch_size")}
            self.lines.append(Line(line_label(own.iloc[0], settings), cells))
            first.append(own.iloc[0])
        self.alone: dict[str, str] = {}  # lines without a reference, and why
        recipe = [name for name in settings if not name.startswith("norm.")]
        for line, run in zip(self.lines, first, strict=True):
            line.reference = self._reference(line, run, first, recipe)
        if not self.alone and not any(line.reference for line in self.lines):
            self.alone = {line.label: "stands for several lines" for line in self.lines}
        self.pooled = pool([cell for line in self.lines for cell in line.cells.values()])
        compare(self.lines, self.pooled, registered)

    def _reference(
        self, line: Line, run: Any, first: Sequence[Any], recipe: Sequence[str]
    ) -> Line | None:
        """Find the line of the label `against`, or of that norm with the same ``recipe``."""
        against = self.against.lower()
        pairs = list(zip(self.lines, first, strict=True))
        of_norm = [(one, other) for one, other in pairs if str(other["norm"]).lower() == against]
        if not of_norm:
            named = [one for one in self.lines if one.label.lower() == against]
            if named and named[0] is not line:
                return named[0]
            if not named:
                self.alone[line.label] = "is not there"
            return None
        if str(run["norm"]).lower() == against:
            return None
        fitting = [
            one
            for one, other in of_norm
            if all(pd.isna([run[n], other[n]]).all() or run[n] == other[n] for n in recipe)
        ]
        if len(fitting) == 1:
            return fitting[0]
        why = "stands for several lines" if fitting else "has no line of the same recipe"
        self.alone[line.label] = why
        return None

    def comparisons(self) -> list[dict[str, Any]]:
        """Return the rows of ``comparisons.csv``, without dataset and model."""
        return [
            {"line": line.label, "against": line.reference.label}
            | {name: getattr(one, name) for name in NUMBERS}
            for line in self.lines
            if line.reference is not None
            for one in line.comparisons
        ]

    def sentences(self) -> list[str]:
        """Say what the comparisons show, and what they cannot."""
        said = [text for line in self.lines for text in self._said(line)]
        if len(self.lines) > 1:
            labels = ", ".join(f"'figure.against=\"{line.label}\"'" for line in self.lines)
            for why, group in itertools.groupby(self.alone, key=self.alone.__getitem__):
                everything = len(self.alone) == len(self.lines)
                names = "Nothing is" if everything else f"{', '.join(group)}: not"
                said.append(
                    f"{names} compared: figure.against={self.against} {why}; choose a norm or "
                    f"{labels}."
                )
        if self.pooled is None:
            if any(line.comparisons for line in self.lines):
                said.append(self._no_interval())
            return said
        slopes = [line for line in self.lines if line.slope_half is not None]
        if slopes:
            parts = [f"{line.label} {line.slope:+.2f} ± {line.slope_half:.2f}" for line in slopes]
            said.append(
                "A doubling of the batch size adds to the error, in points, on average (a straight "
                f"line): {'; '.join(parts)}."
            )
        if spreads := different_spreads(self.pooled):
            said.append(spreads)
        return said

    def _no_interval(self) -> str:
        cells = [cell for line in self.lines for cell in line.cells.values()]
        if all(cell.seeds == 1 for cell in cells):
            return "A single seed has no interval; more would tell differences from noise."
        return "No spread over seeds is known: the cells with several agree exactly or diverged."

    def _said(self, line: Line) -> list[str]:
        """Put the comparisons of a line into words."""
        if line.reference is None or not line.comparisons:
            return []
        names = f"{line.label} against {line.reference.label}"
        tested = [c for c in line.comparisons if c.p is not None]
        untested = [
            size
            for size, cell in sorted(line.cells.items())
            if size in line.reference.cells
            and not (cell.usable and line.reference.cells[size].usable)
        ]
        said = []
        if tested:
            said.append(f"{names}: {_shown(tested)}.")
            said += _crossing(line, tested, untested)
            said.append(_detectable(tested))
        for one in line.comparisons:
            if one.mcnemar is not None:
                differ = "err differently" if one.mcnemar < 0.05 else "cannot be told apart"
                said.append(
                    f"{names} at {one.batch_size}: on these test images the two networks {differ} "
                    f"(McNemar, p {p_value(one.mcnemar, '= ')}); that says nothing of other seeds."
                )
        if untested:
            pairs = {size: (line.cells[size], line.reference.cells[size]) for size in untested}
            diverged = [s for s, pair in pairs.items() if any(cell.diverged for cell in pair)]
            exact = [size for size in untested if size not in diverged]
            for sizes, why in ((diverged, "runs diverged"), (exact, NO_VARIANCE)):
                if sizes:
                    said.append(f"{names}: not compared at {_listed(sizes)}, where {why}.")
        return said


def different_spreads(pooled: Pool) -> str:
    """Warn where the spreads of the cells differ, by Levene's test; else nothing."""
    if pooled.levene is None or pooled.levene >= DIFFERENT_SPREADS:
        return ""
    return (
        f"The spreads of the cells differ (Levene's test, p = {pooled.levene:.2g}): the pooled "
        "intervals are too narrow for some and too wide for others."
    )


def panels(
    runs: pd.DataFrame, settings: Sequence[str], against: str, registered: Sequence[int] = ()
) -> dict[tuple[str, str], Panel]:
    """Compare the finished runs of every dataset and model."""
    finished = runs[runs["status"].isin(FINISHED)].drop_duplicates("run_id")
    return {
        (str(dataset), str(model)): Panel(rows, settings, against, registered)
        for (dataset, model), rows in finished.groupby(["dataset", "model"])
    }


def comparison_table(found: Panels) -> pd.DataFrame:
    """Return ``comparisons.csv``: a row a line and batch size."""
    rows = [
        {"dataset": dataset, "model": model, **row}
        for (dataset, model), panel in found.items()
        for row in panel.comparisons()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def markdown(study: str, found: Panels, notes: Sequence[str] = ()) -> str:
    """Return ``verdict.md``: the sentences, the differences that they rest on, what to weigh."""
    parts = [f"# {study}"]
    for (dataset, model), panel in found.items():
        parts.append(f"## {dataset}, {model}")
        parts += panel.sentences() or ["One line: nothing is compared."]
        heads, rows = comparison_rows(panel)
        if rows:
            parts.append(tabulate(rows, heads, "github", disable_numparse=True))
    if notes:
        parts += ["## To be weighed", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def comparison_rows(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Return the comparisons of a panel in words, headings first."""
    rows = [
        [
            f"{row['line']} − {row['against']}",
            str(row["batch_size"]),
            f"{row['n_seeds']}, {row['n_seeds_against']}",
            f"{row['difference']:+.2f}",
            interval(row["ci_low"], row["ci_high"]),
            p_value(row["p_holm"]),
            "–" if row["detectable"] is None else f"{row['detectable']:.2f}",
            "–" if row["final_difference"] is None else f"{row['final_difference']:+.2f}",
            interval(row["final_low"], row["final_high"]),
            p_value(row["mcnemar"]),
        ]
        for row in panel.comparisons()
    ]
    heads = ["difference in points", "batch size", "seeds", "mean", "95 %", "p (Holm)"]
    heads += ["detectable", "last epoch", "95 %, seeds and test images", "McNemar p"]
    return heads, rows


def _shown(tested: Sequence[Comparison]) -> str:
    words = {-1: "lower error at", 1: "higher error at", 0: "no difference is shown at"}
    parts = []
    for sign, group in itertools.groupby(tested, key=lambda c: c.shown):
        found = [
            f"{c.batch_size} ({c.difference:+.2f} [{c.ci_low:+.2f}, {c.ci_high:+.2f}])"
            for c in group
        ]
        parts.append(f"{words[sign]} {_listed(found)}")
    families = sorted({c.family for c in tested if c.family and c.family > 1})
    if families:
        over = _listed(families)
        parts.append(f"p by Holm over {over} comparisons, the intervals each by itself")
    return "; ".join(parts)


def _crossing(line: Line, tested: Sequence[Comparison], untested: Sequence[int]) -> list[str]:
    """Say where the two lines cross, if that is shown."""
    if len(tested) < 2:
        return []
    signs = {c.shown for c in tested}
    low, high = tested[0].batch_size, tested[-1].batch_size
    gap = [size for size in untested if low < size < high]
    besides = f" What happens about {_listed(gap)} is not known." if gap else ""
    if {-1, 1} <= signs and line.crossings:
        where = " and ".join(f"{at:.3g}" for at in line.crossings)
        pieces = " or ".join(f"{a:.3g} to {b:.3g}" for a, b in line.crossing_set)
        return [f"They cross at batch size {where} (95 %: {pieces}).{besides}"]
    if not line.crossing_set and not gap:
        return [f"They do not cross between {low} and {high}."]
    return [f"Whether they cross is not shown by these data.{besides}"]


def _detectable(tested: Sequence[Comparison]) -> str:
    found = [c.detectable for c in tested if c.detectable is not None]
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    points = f"{low} points" if low == high else f"{low} to {high} points"
    seeds = _listed(sorted({n for c in tested for n in (c.n_seeds, c.n_seeds_against)}))
    return f"With {seeds} seeds a difference of {points} would be shown (power 80 %)."


def _listed(values: Sequence[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def interval(low: float | None, high: float | None) -> str:
    """Put an interval of a difference into words."""
    return "–" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def p_value(value: float | None, equals: str = "") -> str:
    """Put a p-value into words, after ``equals`` where it is not too small to be said."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{equals}{value:.3f}"
