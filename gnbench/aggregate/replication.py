"""A study against published values: which of their contrasts it repeats.

Levels depend on code, data pipeline and machine; what a paper claims lies in contrasts: a norm less
another at a batch size, and the change of a norm from the smallest batch size to the largest.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from scipy.special import stdtr

from gnbench.aggregate.compare import CONFIDENCE, Cell, Pool, cell_of, holm, pool
from gnbench.aggregate.statistics import differing
from gnbench.aggregate.study import CELL, Study, of_their_size
from gnbench.errors import ConfigError

REPLICATED = "replicated"
CONSISTENT = "consistent"
UNDECIDED = "undecided"
NOT_REPLICATED = "not replicated"
WORDS = (REPLICATED, CONSISTENT, UNDECIDED, NOT_REPLICATED)
MARGIN = 1.0  # points
AGAINST = "bn"
Key = tuple[str, int]  # of a cell: norm and batch size
Weights = Mapping[Key, float]  # of the cells in a contrast


@dataclass
class Contrast:
    """A weighted sum of errors, in points, as published and as found, and whether they agree.

    Of an order (``order``) only the sign of what was published counts. ``seeds`` and
    ``seeds_there`` are the fewest of its cells. What so few seeds cannot tell is None: ``error`` is
    the standard error of what is tested, ``found`` − ``published``, of an order ``found``; ``low``
    and ``high`` are its 95 % interval; ``p`` that it lies within the margin, of an order that it is
    0, and ``p_holm`` that corrected over all contrasts.
    """

    name: str
    published: float
    found: float
    seeds: int
    seeds_there: int
    order: bool = False
    error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    word: str = UNDECIDED

    @property
    def tested(self) -> float:
        """What is tested, in points."""
        return self.found if self.order else self.found - self.published


@dataclass
class Network:
    """The contrasts of a dataset and model of a study, and what must be said of them.

    ``against`` is the published one; if it is another, only orders are compared.
    """

    name: tuple[str, str]
    against: tuple[str, str]
    contrasts: list[Contrast]
    lacking: list[str] = field(default_factory=list)  # published cells that the study lacks
    pooled: Pool | None = None

    @property
    def order(self) -> bool:
        """Whether only orders are compared."""
        return any(contrast.order for contrast in self.contrasts)


def replicate(
    study: Study, published: pd.DataFrame, against: str | None = None, margin: float = MARGIN
) -> list[Network]:
    """Hold the finished runs of ``study`` against ``published`` values (of one source).

    Of a network that was published as it is, contrasts are compared: every norm less ``against`` (BN,
    if it is None) at each batch size, and the change of every norm over the batch sizes (a straight
    line over their logarithm), where both have the cells. With the variance over seeds s² pooled over the cells,
    n seeds here and n′ there, Δ = found − published, a contrast is

    - *replicated* if |Δ| is shown to be less than ``margin``, by two one-sided tests at 5 %
      (Schuirmann 1987);
    - *not replicated* if it is shown to be more, p corrected over all contrasts (Holm 1979);
    - else *consistent* if |Δ| ≤ t · s · √(1/n + 1/n′);
    - *undecided* otherwise, or where no spread over seeds is known.

    If no network of the study was published, only the order of the norms is compared, at the batch
    sizes that both have: *replicated* if it is shown, *not replicated* if the opposite is, else
    *undecided*.

    Raises:
        ConfigError: if they share no contrast, ``against`` was not published, or a published norm
            stands for several lines of the study.
    """
    norms = sorted({*published["norm"]})
    if against is not None and against.lower() not in norms:
        raise ConfigError(f"against={against}: choose one of {', '.join(norms)}")
    meant = published[["norm", "batch_size"]].drop_duplicates()
    runs = study.finished.merge(meant, on=["norm", "batch_size"])
    there = {(str(d), str(m)): rows for (d, m), rows in published.groupby(CELL[:2])}
    here = {(str(d), str(m)): rows for (d, m), rows in runs.groupby(CELL[:2])}
    sized = {
        name: {*of_their_size(published, own)[CELL[:2]].itertuples(index=False, name=None)}
        for name, own in here.items()
    }
    same = [name for name in here if name in sized[name]]
    networks = []
    for name, other in [(n, n) for n in same] or itertools.product(here, there):
        cells = _cells(here[name], name)
        values = {(str(r["norm"]), int(r["batch_size"])): r for _, r in there[other].iterrows()}
        network = Network(name, other, [])
        if same:
            network.pooled = _pool([*cells.values()], there[other])
            lacking = values.keys() - cells.keys()
            network.contrasts = _contrasts(
                cells, values, network.pooled, (against or AGAINST).lower(), margin
            )
        else:
            sizes = {size for _, size in cells.keys() & values.keys()}
            network.pooled = pool([*cells.values()])
            lacking = {key for key in values.keys() - cells.keys() if key[1] in sizes}
            network.contrasts = _orders(cells, values, network.pooled)
        network.lacking = [f"{norm} at {size}" for norm, size in sorted(lacking)]
        networks += [network] * bool(network.contrasts)
    if not networks:
        source, held, sizes_there = (
            ", ".join(map(str, sorted({*values}))) or "none"
            for values in (published["source"], study.finished["norm"], published["batch_size"])
        )
        raise ConfigError(
            f"{study.path} and {source} share no contrast: finish runs of two of its norms "
            f"({', '.join(norms)}; finished here: {held}) at one of its batch sizes ({sizes_there})"
        )
    tested = [c for one in networks for c in one.contrasts if c.p is not None]
    for contrast, p in zip(tested, holm([c.p for c in tested if c.p is not None]), strict=True):
        contrast.p_holm = p
    for one in networks:
        for contrast in one.contrasts:
            contrast.word = _word(contrast, one.pooled, margin)
    return networks


def overall(networks: Sequence[Network]) -> str:
    """Put all contrasts into one word, the weakest; if any published cell lacks, at best undecided.

    What is only partly repeated is not replicated as a whole.
    """
    found = Counter(c.word for one in networks for c in one.contrasts)
    found[UNDECIDED] += sum(len(one.lacking) for one in networks)
    return next(word for word in reversed(WORDS) if found[word])


def _cells(runs: pd.DataFrame, network: tuple[str, str]) -> dict[Key, Cell]:
    """Return the cells of a network by norm and batch size."""
    if names := differing(runs):
        raise ConfigError(
            f"{', '.join(network)}: a norm stands for several lines, which differ in "
            f"{', '.join(names)}; compare a study in which these have one value"
        )
    return {(str(n), int(str(s))): cell_of(rows) for (n, s), rows in runs.groupby(CELL[2:])}


def _pool(cells: Sequence[Cell], published: pd.DataFrame) -> Pool | None:
    """Pool the variances of ``cells`` with those that were published (``sd``, of ``n`` runs)."""
    pooled = pool(cells)
    p = published["test_error"]
    known = published[(published["sd"] > 0) & (published["n"] > 1) & (p > 0) & (p < 100)]
    freedom = int((known["n"] - 1).sum())
    if not freedom:
        return pooled
    p = known["test_error"]
    squares = float(((known["n"] - 1) * known["sd"] ** 2 / (p * (100 - p))).sum())
    if pooled is not None:
        squares += pooled.scale * pooled.freedom
        freedom += pooled.freedom
    return Pool(squares / freedom, freedom, None if pooled is None else pooled.levene)


def _contrasts(
    cells: Mapping[Key, Cell],
    values: Mapping[Key, pd.Series],
    pooled: Pool | None,
    against: str,
    margin: float,
) -> list[Contrast]:
    """Compare differences from a norm, and changes over the batch sizes."""
    common = sorted(cells.keys() & values.keys())
    found = []
    for name, weights in [*_differences(common, against), *_changes(common)]:
        published = {key: float(values[key]["test_error"]) for key in weights}
        contrast = Contrast(
            name,
            sum(w * published[key] for key, w in weights.items()),
            sum(w * cells[key].mean for key, w in weights.items()),
            min(cells[key].seeds for key in weights),
            min(int(values[key]["n"]) for key in weights),
        )
        usable = all(cells[key].usable and 0 < published[key] < 100 for key in weights)
        if pooled is not None and usable:
            contrast.error = math.sqrt(
                sum(
                    w**2 * pooled.variance(cells[key])
                    + w**2 * pooled.scale * p * (100 - p) / int(values[key]["n"])
                    for (key, w), p in zip(weights.items(), published.values(), strict=True)
                )
            )
            _bound(contrast, pooled)
            beyond = (abs(contrast.tested) - margin) / contrast.error
            contrast.p = float(stdtr(pooled.freedom, -beyond))
        found.append(contrast)
    return found


def _differences(common: Sequence[Key], against: str) -> Iterator[tuple[str, Weights]]:
    for norm, size in common:
        if norm != against and (against, size) in common:
            yield f"{norm} − {against} at {size}", {(norm, size): 1.0, (against, size): -1.0}


def _changes(common: Sequence[Key]) -> Iterator[tuple[str, Weights]]:
    """Yield the change of each norm from the smallest to the largest batch size.

    It is that of a straight line over log2 of the batch size: a slope times its range, so that one
    margin in points fits differences and changes.
    """
    for norm in sorted({norm for norm, _ in common}):
        sizes = sorted(size for other, size in common if other == norm)
        if len(sizes) > 1:
            x = [math.log2(size) for size in sizes]
            centered = [value - sum(x) / len(x) for value in x]
            share = (x[-1] - x[0]) / sum(value**2 for value in centered)
            weights = {(norm, s): c * share for s, c in zip(sizes, centered, strict=True)}
            yield f"{norm}, from {sizes[0]} to {sizes[-1]}", weights


def _orders(
    cells: Mapping[Key, Cell], values: Mapping[Key, pd.Series], pooled: Pool | None
) -> list[Contrast]:
    """Compare the order of all pairs of norms, the one with the lower published error first."""
    common = sorted(cells.keys() & values.keys())
    found = []
    for size in sorted({size for _, size in common}):
        errors = {n: float(values[n, s]["test_error"]) for n, s in common if s == size}
        for less, more in itertools.combinations(sorted(errors, key=lambda n: errors[n]), 2):
            if errors[less] == errors[more]:
                continue
            one, other = cells[less, size], cells[more, size]
            contrast = Contrast(
                f"{less} < {more} at {size}",
                errors[less] - errors[more],
                one.mean - other.mean,
                min(one.seeds, other.seeds),
                min(int(values[norm, size]["n"]) for norm in (less, more)),
                order=True,
            )
            if pooled is not None and one.usable and other.usable:
                contrast.error = math.sqrt(pooled.variance(one) + pooled.variance(other))
                _bound(contrast, pooled)
                t = -abs(contrast.found) / contrast.error
                contrast.p = 2 * float(stdtr(pooled.freedom, t))
            found.append(contrast)
    return found


def _bound(contrast: Contrast, pooled: Pool) -> None:
    half = pooled.quantile() * (contrast.error or 0.0)
    contrast.low, contrast.high = contrast.tested - half, contrast.tested + half


def _word(contrast: Contrast, pooled: Pool | None, margin: float) -> str:
    """Judge a contrast, as `replicate` says."""
    if pooled is None or contrast.error is None or contrast.p_holm is None:
        return UNDECIDED
    significant = contrast.p_holm < 1 - CONFIDENCE
    if contrast.order:
        shown = REPLICATED if contrast.found < 0 else NOT_REPLICATED
        return shown if significant else UNDECIDED
    if abs(contrast.tested) + pooled.quantile(CONFIDENCE) * contrast.error < margin:
        return REPLICATED
    if significant:
        return NOT_REPLICATED
    within = abs(contrast.tested) <= pooled.quantile() * contrast.error
    return CONSISTENT if within else UNDECIDED
