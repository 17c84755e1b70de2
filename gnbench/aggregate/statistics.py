"""Runs → what they show over their seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from gnbench.aggregate.compare import CONFIDENCE, Cell, pool
from gnbench.aggregate.study import CELL, RECORD
from gnbench.runs.directory import FINISHED


def differing(table: pd.DataFrame) -> list[str]:
    """Name the settings beyond the cell and the seed in which runs of ``table`` differ.

    Settings of a norm are compared among runs of that norm, all others among runs of the same
    dataset and model: what lies between the norms compared must be the same, or be said.
    """
    cell = (*RECORD, "dataset.name", "model.name", "norm.name")
    names = [
        name
        for name in table.columns
        if name not in cell and not name.endswith("._partial_") and _differs(table, name)
    ]
    # Of an optimizer, schedule or batch policy that differs by name, what the name implies is said.
    return sorted(name for name in names if not any(_implies(table, o, name) for o in names))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Summarize runs over their seeds: a row for every cell and every other setting that differs.

    ``test_error_mean`` and ``_std`` in percent (std with n-1); ``ci_low`` and ``ci_high`` are the
    95 % interval of the mean by Student's t over seeds, empty for a single one; ``pooled_low`` and
    ``pooled_high`` that by the variance of all cells of the network (`compare.pool`). Only runs
    with a result count, each once though several studies may hold it; ``n_diverged`` of them
    diverged. ``balanced_test_error_mean``, if there is one, is of the last epochs: the mean of the
    error rates of the classes; ``test_error_final_mean`` then is the plain error of these epochs.
    """
    table = table[table["status"].isin(FINISHED)].drop_duplicates("run_id")
    keys = CELL + differing(table)
    grouped = table.groupby(keys, dropna=False, sort=True)
    summary = grouped.size().reset_index(name="n_seeds")
    summary = summary.join(intervals(summary, table["test_error"], table["status"], grouped))
    if "balanced_test_error" in table and table["balanced_test_error"].notna().any():
        means = grouped["balanced_test_error"].mean()
        summary["balanced_test_error_mean"] = means.to_numpy()
        summary["test_error_final_mean"] = grouped["test_error_final"].mean().to_numpy()
    return summary


def intervals(
    summary: pd.DataFrame, errors: pd.Series[float], status: pd.Series[str], grouped: Any
) -> pd.DataFrame:
    """Return what `summarize` says of ``errors``, a row a row of ``summary``.

    ``grouped`` are the runs by these rows (`DataFrameGroupBy`); ``errors`` may be of other measures
    than the test error, NaN where they are not known.
    """
    cell = grouped.ngroup().to_numpy()
    diverged = np.bincount(cell, (status == "diverged").to_numpy(), len(summary)).astype(int)
    of_cell = errors.astype(float).groupby(cell)
    columns: dict[str, Any] = {"test_error_mean": of_cell.mean(), "test_error_std": of_cell.std()}
    n = summary["n_seeds"]
    quantile = stdtrit((n - 1).clip(lower=1), (1 + CONFIDENCE) / 2)
    half = quantile * columns["test_error_std"] / n**0.5
    columns["ci_low"] = columns["test_error_mean"] - half
    columns["ci_high"] = columns["test_error_mean"] + half
    columns["n_diverged"] = diverged
    ends = np.cumsum(n)[:-1]
    in_order = np.asarray(errors, np.float64)[np.argsort(cell, kind="stable")]
    by_cell = np.split(in_order, ends)[: len(summary)]  # of none there is one part
    cells = [Cell(own, bool(bad)) for own, bad in zip(by_cell, diverged, strict=True)]
    low, high = np.full((2, len(cells)), np.nan)
    for numbers in summary.groupby(["dataset", "model"]).indices.values():
        pooled = pool([cells[i] for i in numbers])
        for i in numbers:
            if pooled is not None and cells[i].usable:
                half_width = pooled.half(cells[i])
                low[i], high[i] = cells[i].mean - half_width, cells[i].mean + half_width
    return pd.DataFrame(columns | {"pooled_low": low, "pooled_high": high}, summary.index)


def settings_of(summary: pd.DataFrame) -> list[str]:
    """Return the settings beyond the cell by which the rows of `summarize` are told apart."""
    columns = list(summary.columns)
    return columns[len(CELL) : columns.index("n_seeds")]


def _differs(table: pd.DataFrame, name: str) -> bool:
    if table[name].nunique(dropna=False) < 2:
        return False
    scope = CELL[:3] if name.startswith("norm.") else CELL[:2]
    return bool((table.groupby(scope)[name].nunique(dropna=False) > 1).any())


def _implies(table: pd.DataFrame, other: str, name: str) -> bool:
    """Tell whether ``other`` names the component that ``name`` belongs to, and settles it."""
    same = other.endswith(".name") and other.partition(".")[0] == name.partition(".")[0]
    if other == name or not same:
        return False
    return bool((table.groupby(other)[name].nunique(dropna=False) == 1).all())
