"""Two studies side by side: in which settings they differ, and what cells that both have show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from gnbench.aggregate.compare import (
    Cell,
    Comparison,
    Pool,
    cell_of,
    compared,
    correct_by_holm,
    find_detectable,
    of_last_epoch,
    pool,
)
from gnbench.aggregate.figure import line_label, sort_lines
from gnbench.aggregate.statistics import differing
from gnbench.aggregate.study import CELL, RECORD, VERSIONS, Study, read_metrics
from gnbench.train.row import METRICS

MEASURED = [name for name in METRICS if name not in ("images_per_second", "seconds")]
CIRCUMSTANCES = [*VERSIONS, "device", "engine"]
NO_SETTINGS = {*RECORD, "side", "dataset.name", "model.name", "norm.name"}
ANY = "*"  # stands in a key for a setting in which the studies differ as a whole
Measured = Mapping[tuple[str, str], pd.DataFrame]  # by side and run: an epoch a row


@dataclass
class Pair:
    """A cell that both studies have; the difference is that of the mean errors, b − a.

    ``same_seeds`` of the ``common_seeds`` measured the same in every epoch.
    """

    network: tuple[str, str]  # dataset and model
    label: str
    a: Cell
    b: Cell
    comparison: Comparison
    common_seeds: int
    same_seeds: int

    @property
    def identical(self) -> bool:
        """Whether both have the same seeds, all of which measured the same."""
        return self.same_seeds == self.a.seeds == self.b.seeds

    @property
    def different(self) -> bool:
        """Whether they are shown to err differently; of one seed each, on these test images."""
        one = self.comparison
        p = one.mcnemar if one.p is None else one.p_holm
        return not self.identical and p is not None and p < 0.05

    @property
    def known(self) -> bool:
        """Whether anything can be said of it."""
        tested = self.comparison.p is not None or self.comparison.mcnemar is not None
        return self.identical or tested


@dataclass
class Pairs:
    """What two studies have in common, and in what they differ (a line of text each)."""

    cells: list[Pair] = field(default_factory=list)
    only_in: dict[str, list[str]] = field(default_factory=lambda: {"a": [], "b": []})
    settings: list[str] = field(default_factory=list)
    apart: str = ""  # the settings of which they have no value in common, though one has several
    circumstances: list[str] = field(default_factory=list)


def pair(a: Study, b: Study) -> Pairs:
    """Match the cells of the finished runs of two studies, and compare them.

    Cells match in dataset, model, norm, batch size and all settings but those in which the studies
    differ as a whole: of one value in all runs of a network, or norm, in one and of another in the
    other. The p-values are corrected by Holm's method over all cells that are not identical.
    """
    sides = {"a": a.finished, "b": b.finished}
    runs = pd.concat([table.assign(side=side) for side, table in sides.items()], ignore_index=True)
    found = Pairs(circumstances=_circumstances(sides))
    texts, found.settings = _settings(runs)
    names = [str(name) for name in texts]
    in_both = texts[runs.groupby(CELL)["side"].transform("nunique") > 1].join(runs["side"])
    one, other = (in_both[in_both["side"] == side] for side in sides)
    found.apart = ", ".join(n for n in names if not {*one[n]} & {*other[n]} and len(one))
    runs["key"] = [*map(tuple, runs[CELL].astype(str).join(texts).to_numpy())]
    measured = {
        (side, str(run)): rows[MEASURED].reset_index(drop=True)
        for side, table in sides.items()
        for run, rows in read_metrics(table).groupby("run_id")
    }
    labels = sorted({name for table in sides.values() for name in differing(table)})
    pools: list[tuple[list[Pair], Pool | None]] = []
    for network, rows in runs.groupby(CELL[:2]):
        own = [name for name in labels if not (texts.loc[rows.index, name] == ANY).any()]
        rows = sort_lines(rows, own)
        rows["label"] = [line_label(row, own) for _, row in rows.iterrows()]
        pools.append(_match(found, rows, measured, (str(network[0]), str(network[1]))))
    correct_by_holm([one.comparison for one in found.cells if not one.identical])
    for pairs, pooled in pools:
        find_detectable([one.comparison for one in pairs if not one.identical], pooled)
    return found


def _match(
    found: Pairs, rows: pd.DataFrame, measured: Measured, network: tuple[str, str]
) -> tuple[list[Pair], Pool | None]:
    """Add what the two have of a network to ``found``; return the pairs and their variance.

    Runs that measured the same count once in it.
    """
    cells: dict[str, dict[Any, pd.DataFrame]] = {"a": {}, "b": {}}
    for (side, key), own in rows.groupby(["side", "key"], sort=False):
        cells[str(side)][key] = own
    same = {
        key: _same_seeds(own, cells["b"][key], measured)
        for key, own in cells["a"].items()
        if key in cells["b"]
    }
    spread = [cell_of(own) for own in cells["a"].values()]
    for key, own in cells["b"].items():
        others = own[~own["seed"].isin(same.get(key, []))]
        spread += [cell_of(others)] if len(others) else []
    pooled = pool(spread)
    final = pool([of_last_epoch(c.correct, c.diverged) for c in spread if c.correct is not None])
    pairs = []
    for key, own in cells["a"].items():
        if key not in same:
            continue
        one, other = cell_of(own), cell_of(cells["b"][key])
        size = int(own["batch_size"].iloc[0])
        comparison = compared(size, other, one, pooled, final)
        common = len({*own["seed"]} & {*cells["b"][key]["seed"]})
        label = str(own["label"].iloc[0])
        pairs.append(Pair(network, label, one, other, comparison, common, len(same[key])))
    found.cells += pairs
    for side in ("a", "b"):
        found.only_in[side] += [
            f"{', '.join(network)}: {own['label'].iloc[0]}, batch size {own['batch_size'].iloc[0]}"
            for key, own in cells[side].items()
            if key not in same
        ]
    return pairs, pooled


def _same_seeds(a: pd.DataFrame, b: pd.DataFrame, measured: Measured) -> list[int]:
    """Return the seeds of which two cells measured the same, in every epoch."""
    both = a.merge(b, on="seed", suffixes=("_a", "_b"))
    found = []
    for _, row in both.iterrows():
        one, other = (measured.get((side, str(row[f"run_id_{side}"]))) for side in ("a", "b"))
        reported = row["test_error_a"] == row["test_error_b"]
        if one is not None and other is not None and reported and one.equals(other):
            found.append(int(row["seed"]))
    return found


def _settings(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return all settings as text, and in words those in which the studies differ as a whole.

    Those are `ANY` in the table.
    """
    names = [n for n in runs.columns if n not in NO_SETTINGS and not n.endswith("._partial_")]
    texts = runs[names].map(as_text)
    found: dict[tuple[str, str, str], list[str]] = {}  # of which networks or norms it is so
    groups: dict[str, int] = {}
    for prefix, scope in (("norm.", CELL[:3]), ("", CELL[:2])):
        columns = [name for name in names if name.startswith("norm.") == bool(prefix)]
        for group, rows in runs.groupby(scope):
            a, b = (texts.loc[rows.index[rows["side"] == side]] for side in ("a", "b"))
            if a.empty or b.empty:
                continue
            groups[prefix] = groups.get(prefix, 0) + 1
            for name in columns:
                one, other = {*a[name]}, {*b[name]}
                if len(one) == len(other) == 1 and one != other:
                    texts.loc[rows.index, name] = ANY
                    where = ", ".join(map(str, group))
                    found.setdefault((name, *one, *other), []).append(where)
    components = {name.removesuffix("name") for name, *_ in found if name.endswith(".name")}
    lines = []
    for (name, first, second), places in found.items():
        component = name[: name.find(".") + 1]
        if component in components and name != f"{component}name":
            continue  # the name of another optimizer says it all
        everywhere = len(places) == groups["norm." if component == "norm." else ""]
        qualified = "" if everywhere else f" ({'; '.join(places)})"
        lines.append(f"{name}: {first} in a, {second} in b{qualified}")
    return texts, sorted(lines)


def as_text(value: Any) -> str:
    """Write a setting so that 1, 1.0 and, from a table with gaps, 1.0 are the same."""
    if pd.isna(value):
        return "–"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _circumstances(sides: Mapping[str, pd.DataFrame]) -> list[str]:
    """Name the versions and machines in which the studies differ."""
    lines = []
    for name in CIRCUMSTANCES:
        values = {side: sorted({*table[name].map(as_text)}) for side, table in sides.items()}
        if values["a"] != values["b"]:
            said = "; ".join(f"{', '.join(texts)} in {side}" for side, texts in values.items())
            lines.append(f"{name}: {said}")
    return lines
