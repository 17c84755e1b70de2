"""What the data show, in words, and what they do not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from gnbench.aggregate.compare import (
    DIFFERENT_SPREADS,
    Comparison,
    Line,
    cell_of,
    compare,
    pool,
)
from gnbench.aggregate.figure import line_label, sort_norms
from gnbench.runs.directory import FINISHED

COLUMNS = ["dataset", "model", "line", "against", "batch_size", "n_seeds", "n_seeds_against"]
COLUMNS += ["difference", "ci_low", "ci_high", "p", "p_holm", "detectable"]
COLUMNS += ["test_low", "test_high", "mcnemar_p"]


class Panel:
    """The lines of a dataset and model, compared: ``pooled`` is their variance over seeds."""

    def __init__(
        self,
        runs: pd.DataFrame,
        settings: Sequence[str],
        against: str,
        registered: Sequence[int] = (),
    ) -> None:
        """Compare ``runs`` (of one dataset and model) that ``settings`` tell apart."""
        self.against = against
        runs = sort_norms(runs[runs["status"].isin(FINISHED)].drop_duplicates("run_id"))
        self.lines: list[Line] = []
        keys = []
        for _, own in runs.groupby(["norm", *settings], dropna=False, sort=False):
            cells = {int(str(size)): cell_of(rows) for size, rows in own.groupby("batch_size")}
            self.lines.append(Line(line_label(own.iloc[0], settings), cells))
            keys.append(own.iloc[0])
        for line, key in zip(self.lines, keys, strict=True):
            line.reference = self._reference(line, key, keys, settings)
        self.pooled = pool([cell for line in self.lines for cell in line.cells.values()])
        compare(self.lines, self.pooled, registered)

    def _reference(
        self, line: Line, key: Any, keys: Sequence[Any], settings: Sequence[str]
    ) -> Line | None:
        """Find the line named `against`, or of the norm of that name with the same recipe."""
        named = [one for one in self.lines if one.label.lower() == self.against.lower()]
        if named and len({k["norm"] for k in keys if k["norm"] == self.against}) == 0:
            return None if named[0] is line else named[0]
        recipe = [name for name in settings if not name.startswith("norm.")]
        fitting = [
            one
            for one, other in zip(self.lines, keys, strict=True)
            if other["norm"] == self.against
            and all(pd.isna([key[n], other[n]]).all() or key[n] == other[n] for n in recipe)
        ]
        alone = len(fitting) == 1 and key["norm"] != self.against
        return fitting[0] if alone else None

    def comparisons(self) -> list[dict[str, Any]]:
        """Return the rows of ``comparisons.csv``, without dataset and model."""
        rows = []
        for line in self.lines:
            for one in line.comparisons:
                own = asdict(one)
                row = {
                    "line": line.label,
                    "against": line.reference.label if line.reference else None,
                    "n_seeds": one.seeds,
                    "n_seeds_against": one.reference_seeds,
                    "ci_low": one.low,
                    "ci_high": one.high,
                    "mcnemar_p": one.mcnemar,
                }
                rows.append({name: row[name] if name in row else own[name] for name in COLUMNS[2:]})
        return rows

    def sentences(self) -> list[str]:
        """Say what the comparisons show, a sentence or two a line."""
        said = [text for line in self.lines for text in _said(line)]
        compared = any(line.comparisons for line in self.lines)
        if len(self.lines) > 1 and not compared:
            labels = ", ".join(f"'{line.label}'" for line in self.lines)
            said.append(
                f"Nothing is compared: there is no figure.against={self.against} to compare with; "
                f"choose a norm or one of {labels}."
            )
        if compared and self.pooled is None:
            said.append("A single seed has no interval; more would tell differences from noise.")
        if self.pooled is not None:
            said += self._slopes()
            if self.pooled.levene is not None and self.pooled.levene < DIFFERENT_SPREADS:
                said.append(
                    "The spreads of the cells differ (Levene's test, p = "
                    f"{self.pooled.levene:.2g}): the pooled intervals are too narrow for some and "
                    "too wide for others."
                )
        return said

    def _slopes(self) -> list[str]:
        slopes = [line for line in self.lines if line.slope_half is not None]
        if not slopes:
            return []
        parts = [f"{line.label} {line.slope:+.2f} ± {line.slope_half:.2f}" for line in slopes]
        return [f"A doubling of the batch size adds to the error, in points: {'; '.join(parts)}."]


def panels(
    runs: pd.DataFrame, settings: Sequence[str], against: str, registered: Sequence[int] = ()
) -> dict[tuple[str, str], Panel]:
    """Compare the finished runs of every dataset and model."""
    finished = runs[runs["status"].isin(FINISHED)]
    return {
        (str(dataset), str(model)): Panel(rows, settings, against, registered)
        for (dataset, model), rows in finished.groupby(["dataset", "model"])
    }


def comparison_table(found: dict[tuple[str, str], Panel]) -> pd.DataFrame:
    """Return ``comparisons.csv``: a row a line and batch size."""
    rows = [
        {"dataset": dataset, "model": model, **row}
        for (dataset, model), panel in found.items()
        for row in panel.comparisons()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def markdown(study: str, found: dict[tuple[str, str], Panel]) -> str:
    """Return ``verdict.md``: the sentences, and the differences that they rest on."""
    parts = [f"# {study}"]
    for (dataset, model), panel in found.items():
        parts.append(f"## {dataset}, {model}")
        parts += panel.sentences() or ["One line: nothing is compared."]
        rows = [
            [
                f"{row['line']} − {row['against']}",
                row["batch_size"],
                f"{row['n_seeds']}, {row['n_seeds_against']}",
                f"{row['difference']:+.2f}",
                _interval(row["ci_low"], row["ci_high"]),
                _p(row["p_holm"]),
                "–" if row["detectable"] is None else f"{row['detectable']:.2f}",
                _interval(row["test_low"], row["test_high"]),
                _p(row["mcnemar_p"]),
            ]
            for row in panel.comparisons()
        ]
        heads = ["difference in points", "batch size", "seeds", "mean", "95 %", "p (Holm)"]
        heads += ["detectable", "95 %, seeds × images", "McNemar p"]
        if rows:
            parts.append(tabulate(rows, heads, "github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def _said(line: Line) -> list[str]:
    """Put the comparisons of a line into words."""
    if line.reference is None or not line.comparisons:
        return []
    names = f"{line.label} against {line.reference.label}"
    tested = [c for c in line.comparisons if c.p is not None]
    said = []
    if tested:
        said.append(f"{names}: {_shown(tested)}.")
        if crossing := _crossing(line, tested):
            said.append(crossing)
        least = [c.detectable for c in tested if c.detectable is not None]
        low, high = f"{min(least):.1f}", f"{max(least):.1f}"
        seeds = _numbers(sorted({c.seeds for c in tested}))
        points = f"{low} points" if low == high else f"{low} to {high} points"
        said.append(f"With {seeds} seeds a difference of {points} would be shown (power 80 %).")
    for one in line.comparisons:
        if one.mcnemar is not None:
            differ = "err differently" if one.mcnemar < 0.05 else "cannot be told apart"
            said.append(
                f"{names} at {one.batch_size}: on these test images the two networks {differ} "
                f"(McNemar, p {_p(one.mcnemar, ' = ')}); that says nothing of other seeds."
            )
    if diverged := [c.batch_size for c in line.comparisons if c.p is None and tested]:
        said.append(f"{names}: not compared at {_numbers(diverged)}, where runs diverged.")
    return said


def _shown(tested: Sequence[Comparison]) -> str:
    words = {-1: "lower error at", 1: "higher error at", 0: "no difference is shown at"}
    parts = []
    for sign, group in itertools.groupby(tested, key=lambda c: c.shown):
        of_group = list(group)
        sizes = _numbers([c.batch_size for c in of_group])
        found = ", ".join(f"{c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" for c in of_group)
        parts.append(f"{words[sign]} {sizes} ({found})")
    count = len(tested)
    return "; ".join(parts) + (f"; p by Holm over {count}" if count > 1 else "")


def _crossing(line: Line, tested: Sequence[Comparison]) -> str | None:
    """Say where the two lines cross, if that is shown."""
    if len(tested) < 2:
        return None
    signs = {c.shown for c in tested}
    low, high = tested[0].batch_size, tested[-1].batch_size
    if {-1, 1} <= signs:
        where = " and ".join(f"{at:.3g}" for at in line.crossings)
        pieces = " or ".join(f"{a:.3g} to {b:.3g}" for a, b in line.crossing_set)
        return f"They cross at batch size {where} (95 %: {pieces})."
    if not line.crossing_set:
        return f"They do not cross between {low} and {high}."
    return "Whether they cross is not shown by these data."


def _numbers(values: Sequence[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def _p(value: float | None, equals: str = "") -> str:
    if value is None or np.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{equals}{value:.3f}".strip()
