"""Norms against a reference: differences, their intervals, slopes, and where two norms cross.

All intervals are of 95 % and rest on one variance: that of an error over seeds, pooled over the
cells of a network and scaled by p (100 − p), as that of a share of wrong images.
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
from gnbench.runs.directory import FINISHED, read_correct

Numbers = npt.NDArray[np.float64]

CONFIDENCE = 0.95
POWER = 0.80  # with which the smallest detectable difference is found
DIFFERENT_SPREADS = 0.05  # p of Levene's test below which the pooling is warned of
RESAMPLES = 1000


@dataclass(frozen=True)
class Cell:
    """The runs of a line at a batch size: their test errors in percent, a seed each."""

    errors: Numbers
    diverged: bool = False
    correct: npt.NDArray[np.bool_] | None = None  # seeds × test images, of the last epoch

    @property
    def mean(self) -> float:
        """The mean error in percent."""
        return float(self.errors.mean())


@dataclass(frozen=True)
class Pool:
    """The variance of an error over seeds: ``scale`` · p (100 − p) at a mean of p percent."""

    scale: float
    freedom: int  # degrees of freedom
    levene: float | None  # p that the scaled spreads of the cells are equal

    def variance(self, cell: Cell) -> float:
        """Return the variance of the mean of a cell."""
        return self.scale * cell.mean * (100 - cell.mean) / len(cell.errors)

    def half(self, cell: Cell) -> float:
        """Return half the 95 % interval of the mean of a cell."""
        return self.quantile() * math.sqrt(self.variance(cell))

    def quantile(self, probability: float = (1 + CONFIDENCE) / 2) -> float:
        """Return a quantile of Student's t."""
        return float(stdtrit(self.freedom, probability))


def pool(cells: Sequence[Cell]) -> Pool | None:
    """Pool the variances of ``cells``; None if no cell has two seeds.

    Cells with a diverged run are left out: their errors are those of chance.
    """
    scaled = [
        (cell.errors - cell.mean) / math.sqrt(cell.mean * (100 - cell.mean))
        for cell in cells
        if len(cell.errors) > 1 and not cell.diverged and 0 < cell.mean < 100
    ]
    freedom = sum(len(residuals) - 1 for residuals in scaled)
    if not freedom:
        return None
    scale = sum(float(np.square(residuals).sum()) for residuals in scaled) / freedom
    return Pool(scale, freedom, _levene([r for r in scaled if len(r) > 2]))


def _levene(residuals: Sequence[Numbers]) -> float | None:
    """Test whether spreads are equal (Brown & Forsythe 1974: about the medians)."""
    if len(residuals) < 2 or not any(np.ptp(values) for values in residuals):
        return None
    from scipy.stats import levene

    return float(levene(*residuals, center="median").pvalue)


@dataclass
class Comparison:
    """A line against the reference at a batch size: the difference is line − reference, in points.

    What cannot be told from so few seeds is None. ``detectable`` is the difference that so many
    seeds would show at 95 % in four of five studies; ``test_low`` and ``test_high`` bound the
    difference of the last epochs if seeds and test images were drawn anew; ``mcnemar`` is the p of
    two networks, of one seed each, that err on the same images.
    """

    batch_size: int
    seeds: int
    reference_seeds: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    test_low: float | None = None
    test_high: float | None = None
    mcnemar: float | None = None
    variance: float | None = None  # of the difference

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

    The p-values are corrected by Holm's method (1979) over all comparisons but those at batch sizes
    that were ``registered`` as endpoints beforehand.
    """
    for line in lines:
        _fit_slope(line, pooled)
        if line.reference is None:
            continue
        for size, cell in sorted(line.cells.items()):
            other = line.reference.cells.get(size)
            if other is not None:
                line.comparisons.append(_compared(size, cell, other, pooled))
        if pooled is not None:
            found = [c for c in line.comparisons if c.variance is not None]
            x = np.log2([c.batch_size for c in found])
            d = np.array([c.difference for c in found])
            v = np.array([c.variance for c in found], dtype=float)
            line.crossings = [2**at for at in zeros(x, d)]
            line.crossing_set = [
                (2**low, 2**high) for low, high in undecided(x, d, v, pooled.quantile())
            ]
    tested = [c for line in lines for c in line.comparisons if c.p is not None]
    for one in tested:
        one.p_holm = one.p
    _correct_by_holm([c for c in tested if c.batch_size not in registered])


def _compared(size: int, cell: Cell, other: Cell, pooled: Pool | None) -> Comparison:
    difference = cell.mean - other.mean
    found = Comparison(size, len(cell.errors), len(other.errors), difference)
    if pooled is not None and not (cell.diverged or other.diverged):
        found.variance = pooled.variance(cell) + pooled.variance(other)
        error = math.sqrt(found.variance)
        half = pooled.quantile() * error
        found.low, found.high = difference - half, difference + half
        if error > 0:
            found.p = 2 * float(stdtr(pooled.freedom, -abs(difference) / error))
        else:  # all seeds of the study gave the same
            found.p = float(difference == 0)
        found.detectable = (pooled.quantile() + pooled.quantile(POWER)) * error
    if cell.correct is not None and other.correct is not None:
        if cell.correct.shape[1] != other.correct.shape[1]:
            return found
        if len(cell.correct) == len(other.correct) == 1:
            found.mcnemar = mcnemar(cell.correct[0], other.correct[0])
        else:
            found.test_low, found.test_high = bootstrap(cell.correct, other.correct)
    return found


def mcnemar(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Return the exact two-sided p that two networks err equally often (McNemar 1947)."""
    from scipy.stats import binomtest

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def bootstrap(
    one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % interval of error(one) − error(other), in points, over seeds × images.

    Both are seeds × images. Each resample draws the images, the same for both, and the seeds of
    each; percentiles (Efron 1979). Over few seeds it is too narrow.
    """
    rng = np.random.default_rng(0)
    images = one.shape[1]
    weights = np.stack(
        [np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(resamples)]
    ).astype(np.float32)
    means = []
    for correct in (one, other):
        errors = 100 * (1 - weights @ correct.T.astype(np.float32) / images)  # resamples × seeds
        drawn = rng.integers(len(correct), size=(resamples, len(correct)))
        means.append(np.take_along_axis(errors, drawn, axis=1).mean(axis=1))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means[0] - means[1], [tail, 100 - tail])
    return float(low), float(high)


def _correct_by_holm(comparisons: Sequence[Comparison]) -> None:
    largest = 0.0
    for rank, one in enumerate(sorted(comparisons, key=lambda c: c.p or 0.0)):
        assert one.p is not None
        largest = max(largest, min(1.0, (len(comparisons) - rank) * one.p))
        one.p_holm = largest


def _fit_slope(line: Line, pooled: Pool | None) -> None:
    """Fit error = a + slope · log2(batch size) by least squares over the runs of ``line``."""
    cells = {size: cell for size, cell in line.cells.items() if not cell.diverged}
    if len(cells) < 2:
        return
    x = np.log2(list(cells))
    n = np.array([len(cell.errors) for cell in cells.values()])
    means = np.array([cell.mean for cell in cells.values()])
    centered = x - np.average(x, weights=n)
    shares = n * centered / (n * centered**2).sum()  # of each mean in the slope
    line.slope = float((shares * means).sum())
    if pooled is not None:
        variances = np.array([pooled.variance(cell) for cell in cells.values()])
        line.slope_half = pooled.quantile() * math.sqrt(float((shares**2 * variances).sum()))


def zeros(x: Numbers, d: Numbers) -> list[float]:
    """Return where ``d``, linear between its points ``x``, changes its sign."""
    found = []
    for (x0, d0), (x1, d1) in itertools.pairwise(zip(x, d, strict=True)):
        if d0 * d1 < 0:
            found.append(float(x0 + (x1 - x0) * d0 / (d0 - d1)))
        elif d1 == 0 and d0 != 0:
            found.append(float(x1))
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

    ``correct.npy`` counts only if every run of the cell has one for equally many images.
    """
    finished = runs[runs["status"].isin(FINISHED)]
    correct = []
    for _, row in finished.iterrows():
        try:
            path = Path(row["directory"], "correct.npy")
            correct.append(read_correct(path, int(row["dataset.test_images"])))
        except (OSError, DamagedError):
            break
    whole = len(correct) == len(finished) and len({len(bits) for bits in correct}) == 1
    return Cell(
        finished["test_error"].to_numpy(float),
        bool((finished["status"] == "diverged").any()),
        np.stack(correct) if whole else None,
    )
