"""Norms against a reference: differences, their intervals, slopes, and where two norms cross.

All intervals are of 95 %, each by itself, by Student's t. They rest on the variance of an error
over seeds, pooled over the cells of a network and scaled by p (100 − p), as that of a share of
wrong images; that of the last epochs adds the variance over test images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtr, stdtrit

from gnbench.errors import DamagedError
from gnbench.runs.directory import read_correct

Numbers = npt.NDArray[np.float64]

CONFIDENCE = 0.95
POWER = 0.80  # with which the smallest detectable difference is found
# The settings of a dataset that say which its test images are.
TEST_SET = ("name", "_target_", "content", "test_fraction", "split_seed", "test_images")
DIFFERENT_SPREADS = 0.05  # p of Levene's test below which the pooling is warned of


@dataclass(frozen=True)
class Cell:
    """The runs of a line at a batch size: their test errors in percent, a seed each.

    ``correct`` (seeds × test images, bool) is what the networks of the last epoch got right, and
    ``test_set`` says of which images: only where it is the same are two cells paired.
    """

    errors: Numbers
    diverged: bool = False
    correct: npt.NDArray[np.bool_] | None = None
    test_set: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The mean error in percent."""
        return float(self.errors.mean())

    @property
    def seeds(self) -> int:
        """The number of runs."""
        return len(self.errors)

    @property
    def usable(self) -> bool:
        """Whether it can be compared: errors of chance, none or all have no such variance."""
        return not self.diverged and 0 < self.mean < 100


def of_last_epoch(correct: npt.NDArray[np.bool_], diverged: bool = False) -> Cell:
    """Return the cell by the errors of the last epoch; ``correct`` is seeds × test images."""
    return Cell(100 * (1 - correct.mean(axis=1)), diverged)


@dataclass(frozen=True)
class Pool:
    """The variance of an error over seeds: ``scale`` · p (100 − p) at a mean of p percent."""

    scale: float
    freedom: int  # degrees of freedom
    levene: float | None  # p that the scaled spreads of the cells are equal

    def variance(self, cell: Cell) -> float:
        """Return the variance of the mean of a cell."""
        return self.scale * cell.mean * (100 - cell.mean) / cell.seeds

    def half(self, cell: Cell) -> float:
        """Return half the 95 % interval of the mean of a cell."""
        return self.quantile() * math.sqrt(self.variance(cell))

    def quantile(self, probability: float = (1 + CONFIDENCE) / 2) -> float:
        """Return a quantile of Student's t."""
        return float(stdtrit(self.freedom, probability))


def pool(cells: Sequence[Cell]) -> Pool | None:
    """Pool the variances of ``cells``; None if no cell has two seeds, or all agree exactly.

    Cells with a diverged run are left out: their errors are those of chance.
    """
    scaled = [
        (cell.errors - cell.mean) / math.sqrt(cell.mean * (100 - cell.mean))
        for cell in cells
        if cell.seeds > 1 and cell.usable
    ]
    freedom = sum(len(residuals) - 1 for residuals in scaled)
    if not freedom:
        return None
    scale = sum(float(np.square(residuals).sum()) for residuals in scaled) / freedom
    if scale < 1e-20:  # but for rounding
        return None
    return Pool(scale, freedom, _levene(scaled))


def _levene(residuals: Sequence[Numbers]) -> float | None:
    """Test whether spreads about the medians are equal (Brown & Forsythe 1974).

    Of an odd number of values one lies on the median whatever the spread is, of an even number two
    lie equally far from it: one of those is left out (Hines & Hines 2000). So cells of two seeds
    tell nothing.
    """
    spreads = [
        np.delete(spread, spread.argmin())
        for spread in (np.abs(values - np.median(values)) for values in residuals)
        if len(spread) > 2
    ]
    if len(spreads) < 2 or not any(np.ptp(values) for values in spreads):
        return None
    from scipy.stats import f_oneway

    return float(f_oneway(*spreads).pvalue)


@dataclass
class Comparison:
    """A line against the reference at a batch size: the difference is line − reference, in points.

    What so few seeds cannot tell is None. ``p_holm`` is corrected over ``family`` comparisons;
    ``detectable`` is the difference that so many seeds would show, so corrected, in four of five
    studies. ``final_difference`` is that of the last epochs; ``final_low`` and ``final_high`` bound
    it if seeds and test images were drawn anew; ``mcnemar`` is the p, corrected in the same way,
    that two networks of one seed each err equally often.
    """

    batch_size: int
    n_seeds: int
    n_seeds_against: int
    difference: float
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    family: int | None = None
    detectable: float | None = None
    final_difference: float | None = None
    final_low: float | None = None
    final_high: float | None = None
    mcnemar: float | None = None
    error: float | None = field(default=None, repr=False)  # standard error of the difference

    @property
    def shown(self) -> int:
        """−1 if the line is shown to err less than the reference, 1 if more, 0 if neither."""
        shown = self.p_holm is not None and self.p_holm < 1 - CONFIDENCE
        return int(np.sign(self.difference)) if shown else 0


@dataclass
class Line:
    """A norm, with whatever else tells it from others, over batch sizes; against a reference."""

    label: str
    cells: dict[int, Cell]
    reference: Line | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    slope: float | None = None  # points a doubling of the batch size
    slope_half: float | None = None  # half its interval
    crossings: list[float] = field(default_factory=list)  # where the mean difference is 0
    crossing_set: list[tuple[float, float]] = field(default_factory=list)


def compare(lines: Sequence[Line], pooled: Pool | None, registered: Sequence[int] = ()) -> None:
    """Fill in what ``lines`` show, each against its reference.

    The p-values are corrected by Holm's method (1979) over all comparisons of the lines; those at
    batch sizes that were ``registered`` beforehand as endpoints are a family of their own.
    """
    cells = [cell for line in lines for cell in line.cells.values()]
    final_pool = pool(
        [of_last_epoch(c.correct, c.diverged) for c in cells if c.correct is not None]
    )
    for line in lines:
        _fit_slope(line, pooled)
        if line.reference is None:
            continue
        for size, cell in sorted(line.cells.items()):
            other = line.reference.cells.get(size)
            if other is not None:
                line.comparisons.append(compared(size, cell, other, pooled, final_pool))
    everything = [c for line in lines for c in line.comparisons]
    for chosen in (True, False):
        family = [c for c in everything if (c.batch_size in registered) == chosen]
        correct_by_holm(family)
        find_detectable(family, pooled)
    if pooled is not None:
        for line in lines:
            _find_crossings(line, pooled)


def compared(
    size: int, cell: Cell, other: Cell, pooled: Pool | None, final_pool: Pool | None
) -> Comparison:
    """Compare ``cell`` with ``other``, by the pooled variances of reported and of last errors."""
    found = Comparison(size, cell.seeds, other.seeds, cell.mean - other.mean)
    if cell.diverged or other.diverged:
        return found
    if pooled is not None and cell.usable and other.usable:
        found.error = math.sqrt(pooled.variance(cell) + pooled.variance(other))
        half = pooled.quantile() * found.error
        found.ci_low, found.ci_high = found.difference - half, found.difference + half
        found.p = 2 * float(stdtr(pooled.freedom, -abs(found.difference) / found.error))
    one, two = cell.correct, other.correct
    if one is None or two is None or cell.test_set != other.test_set:
        return found
    final, other_final = of_last_epoch(one), of_last_epoch(two)
    found.final_difference = final.mean - other_final.mean
    if final_pool is not None and final.usable and other_final.usable:
        # The variance of the mean over images of how much more often one errs on each.
        of_images = 100**2 * float(np.var(two.mean(axis=0) - one.mean(axis=0), ddof=1))
        variance = final_pool.variance(final) + final_pool.variance(other_final)
        half = final_pool.quantile() * math.sqrt(variance + of_images / one.shape[1])
        found.final_low = found.final_difference - half
        found.final_high = found.final_difference + half
    elif len(one) == len(two) == 1:
        found.mcnemar = mcnemar(one[0], two[0])
    return found


def mcnemar(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Return the exact two-sided p that two networks err equally often (McNemar 1947)."""
    from scipy.stats import binomtest

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def correct_by_holm(family: Sequence[Comparison]) -> None:
    """Correct the p-values of all that were tested, and those of McNemar's test."""
    tested = [c for c in family if c.p is not None]
    for one, p in zip(tested, holm([c.p for c in tested if c.p is not None]), strict=True):
        one.p_holm, one.family = p, len(tested)
    alone = [c for c in family if c.mcnemar is not None]
    for one, p in zip(
        alone, holm([c.mcnemar for c in alone if c.mcnemar is not None]), strict=True
    ):
        one.mcnemar = p


def find_detectable(family: Sequence[Comparison], pooled: Pool | None) -> None:
    """Fill in which difference would be shown, once the p-values are corrected."""
    for one in family:
        if pooled is not None and one.error is not None and one.family is not None:
            # At the first step of Holm's method, which the smallest p of the family must pass.
            least = pooled.quantile(1 - (1 - CONFIDENCE) / 2 / one.family)
            one.detectable = (least + pooled.quantile(POWER)) * one.error


def _fit_slope(line: Line, pooled: Pool | None) -> None:
    """Fit error = a + slope · log2(batch size) by least squares over the runs of ``line``."""
    cells = {size: cell for size, cell in line.cells.items() if cell.usable}
    if len(cells) < 2:
        return
    x = np.log2(list(cells))
    n = np.array([cell.seeds for cell in cells.values()])
    means = np.array([cell.mean for cell in cells.values()])
    centered = x - np.average(x, weights=n)
    shares = n * centered / (n * centered**2).sum()  # of each mean in the slope
    line.slope = float((shares * means).sum())
    if pooled is not None:
        variances = np.array([pooled.variance(cell) for cell in cells.values()])
        line.slope_half = pooled.quantile() * math.sqrt(float((shares**2 * variances).sum()))


def _find_crossings(line: Line, pooled: Pool) -> None:
    """Look between batch sizes that are neighbours; not across one that could not be compared."""
    for tested, group in itertools.groupby(line.comparisons, key=lambda c: c.error is not None):
        found = list(group)
        if not tested:
            continue
        x = np.log2([c.batch_size for c in found])
        d = np.array([c.difference for c in found])
        v = np.array([c.error or 0.0 for c in found]) ** 2
        line.crossings += [2**at for at in zeros(x, d)]
        sets = undecided(x, d, v, pooled.quantile())
        line.crossing_set += [(2**low, 2**high) for low, high in sets]


def zeros(x: Numbers, d: Numbers) -> list[float]:
    """Return where ``d``, linear between its points ``x``, changes its sign.

    Where it is 0 on the way from one sign to the other, the middle of that stretch.
    """
    found: list[float] = []
    last: tuple[float, float] | None = None  # the last point that is not 0
    zero_since: float | None = None
    for at, value in zip(x, d, strict=True):
        if value == 0:
            zero_since = float(at) if zero_since is None else zero_since
            zero_until = float(at)
            continue
        if last is not None and last[1] * value < 0:
            if zero_since is None:
                found.append(float(last[0] + (at - last[0]) * last[1] / (last[1] - value)))
            else:
                found.append((zero_since + zero_until) / 2)
        last, zero_since = (float(at), float(value)), None
    return found


def undecided(x: Numbers, d: Numbers, v: Numbers, quantile: float) -> list[tuple[float, float]]:
    """Return the intervals of ``x`` on which |d| ≤ quantile · standard error.

    ``d`` is linear between its points, whose variances are ``v`` and independent. Where two curves
    truly cross, this set holds that place as often as the interval of a difference holds 0 (the
    inverse of a test; Fieller 1954 for a straight line).
    """
    pieces: list[tuple[float, float]] = []
    for i in range(len(x) - 1):
        # At a share w of the way from one point to the next: d² − q² · variance ≤ 0.
        a = (d[i + 1] - d[i]) ** 2 - quantile**2 * (v[i] + v[i + 1])
        b = 2 * d[i] * (d[i + 1] - d[i]) + 2 * quantile**2 * v[i]
        c = d[i] ** 2 - quantile**2 * v[i]
        roots = np.roots([a, b, c]) if a or b else np.array([])
        cuts = sorted({0.0, 1.0, *(float(r.real) for r in roots if not r.imag and 0 < r.real < 1)})
        for low, high in itertools.pairwise(cuts):
            middle = (low + high) / 2
            if a * middle**2 + b * middle + c <= 0:
                start, end = (float(x[i] + w * (x[i + 1] - x[i])) for w in (low, high))
                if pieces and pieces[-1][1] >= start:
                    pieces[-1] = (pieces[-1][0], end)
                else:
                    pieces.append((start, end))
    return pieces


def cell_of(runs: pd.DataFrame) -> Cell:
    """Return the cell of finished runs (rows of ``results.csv``), with what they got right.

    ``correct.npy`` counts only if every run of the cell has one, and all of the same test images.
    """
    errors = runs["test_error"].to_numpy(float)
    diverged = bool((runs["status"] == "diverged").any())
    try:
        sizes = runs["dataset.test_images"]
        correct = [
            read_correct(Path(directory, "correct.npy"), int(total))
            for directory, total in zip(runs["directory"], sizes, strict=True)
        ]
    except (OSError, DamagedError, LookupError, TypeError, ValueError):
        return Cell(errors, diverged)  # of an older version, or damaged
    nothing = [None] * len(runs)
    columns = (runs.get(f"dataset.{key}", nothing) for key in TEST_SET)
    texts = (["" if pd.isna(value) else str(value) for value in column] for column in columns)
    test_sets = {*zip(*texts, strict=True)}
    if len(test_sets) != 1:
        return Cell(errors, diverged)
    return Cell(errors, diverged, np.stack(correct), test_sets.pop())
