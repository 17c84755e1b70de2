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
from tabulate import tabulate

from gnbench.aggregate.compare import CONFIDENCE, Cell, Pool, cell_of, holm, pool
from gnbench.aggregate.pairs import as_text
from gnbench.aggregate.statistics import differing
from gnbench.aggregate.study import CELL, Study, flattened, of_their_size
from gnbench.composition import composed
from gnbench.config import RunConfig, all_settings, conf_dir
from gnbench.errors import ConfigError

REPLICATED = "replicated"
CONSISTENT = "consistent"
UNDECIDED = "undecided"
NOT_REPLICATED = "not replicated"
WORDS = (REPLICATED, CONSISTENT, UNDECIDED, NOT_REPLICATED)
Weights = Mapping[tuple[str, int], float]  # of the cells in a contrast, by norm and batch size


@dataclass
class Contrast:
    """A weighted sum of errors, in points, as published and as found, and whether they agree.

    Of an order (``order``) only the sign of what was published counts. What so few seeds cannot
    tell is None: ``error`` is the standard error of what is tested, ``found`` − ``published``, of
    an order ``found``; ``low`` and ``high`` are its 95 % interval, ``p`` that it is 0 and
    ``p_holm`` that corrected over all contrasts.
    """

    name: str
    published: float
    found: float
    order: bool = False
    error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    word: str = UNDECIDED

    @property
    def tested(self) -> float:
        """What is tested against 0, in points."""
        return self.found if self.order else self.found - self.published


@dataclass
class Network:
    """The contrasts of a dataset and model of a study, and what must be said of them."""

    name: tuple[str, str]
    against: tuple[str, str]  # the published one; another: only orders are compared
    contrasts: list[Contrast]
    lacking: list[str] = field(default_factory=list)  # published cells that the study lacks

    @property
    def order(self) -> bool:
        """Whether only orders are compared."""
        return any(contrast.order for contrast in self.contrasts)


def replicate(
    study: Study, published: pd.DataFrame, against: str = "bn", margin: float = 1.0
) -> list[Network]:
    """Hold the finished runs of ``study`` against ``published`` values (of one source).

    Of a network that was published as it is, contrasts are compared: every norm less ``against`` at
    each batch size, and the change of every norm over the batch sizes (a straight line over their
    logarithm), where both have the cells. With the variance over seeds s² pooled over the cells,
    n seeds here and n′ there, a contrast is

    - *replicated* if it is shown to lie within ``margin`` points of the published one, by two
      one-sided tests at 5 % (Schuirmann 1987);
    - else *consistent* if |Δ| ≤ t · s · √(1/n + 1/n′);
    - *not replicated* if p, corrected over all contrasts (Holm 1979), is below 0.05;
    - *undecided* otherwise, or where no spread over seeds is known.

    Of other networks only the order of the norms is compared, at the batch sizes that both have:
    *replicated* if it is shown, *not replicated* if the opposite is, else *undecided*.

    Raises:
        ConfigError: if they share no contrast, or a norm stands for several lines of the study.
    """
    finished = study.finished
    networks: list[Network] = []
    pools: list[Pool | None] = []
    for name, runs in finished.groupby(CELL[:2]):
        own = (str(name[0]), str(name[1]))
        cells = _cells(runs, own)
        there = {(str(d), str(m)): rows for (d, m), rows in published.groupby(CELL[:2])}
        sized = of_their_size(published, runs)
        same = own in {*sized[CELL[:2]].itertuples(index=False, name=None)}
        chosen = {own: there[own]} if same else there
        for other, rows in chosen.items():
            values = {(str(r["norm"]), int(r["batch_size"])): r for _, r in rows.iterrows()}
            common = [key for key in values if key in cells]
            if same:
                pooled = _pool([*cells.values()], rows)
                found = _contrasts(common, cells, values, pooled, against)
                lacking = [
                    f"{norm} at {size}" for norm, size in values if (norm, size) not in cells
                ]
            else:
                pooled = pool([*cells.values()])
                found, lacking = _orders(common, cells, values, pooled), []
            if found:
                networks.append(Network(own, other, found, lacking))
                pools.append(pooled)
    if not networks:
        norms, held, sizes = (
            ", ".join(map(str, sorted({*values}))) or "none"
            for values in (published["norm"], finished["norm"], published["batch_size"])
        )
        raise ConfigError(
            f"{study.path} and {published['source'].iloc[0]} share no contrast: finish runs of two "
            f"of its norms ({norms}; finished here: {held}) at one of its batch sizes ({sizes})"
        )
    tested = [c for one in networks for c in one.contrasts if c.p is not None]
    for contrast, p in zip(tested, holm([c.p for c in tested if c.p is not None]), strict=True):
        contrast.p_holm = p
    for one, pooled in zip(networks, pools, strict=True):
        for contrast in one.contrasts:
            contrast.word = _word(contrast, pooled, margin)
    return networks


def overall(networks: Sequence[Network]) -> str:
    """Put all contrasts into one word: the worst, which is that of the weakest link."""
    found = Counter(c.word for one in networks for c in one.contrasts)
    return next(word for word in reversed(WORDS) if found[word])


def _cells(runs: pd.DataFrame, network: tuple[str, str]) -> dict[tuple[str, int], Cell]:
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
    known = published[published["sd"].notna() & (published["n"] > 1)]
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
    common: Sequence[tuple[str, int]],
    cells: Mapping[tuple[str, int], Cell],
    values: Mapping[tuple[str, int], pd.Series],
    pooled: Pool | None,
    against: str,
) -> list[Contrast]:
    """Compare differences from a norm, and changes over the batch sizes."""
    found = []
    for name, weights in [*_differences(common, against), *_changes(common)]:
        contrast = Contrast(
            name,
            sum(w * float(values[key]["test_error"]) for key, w in weights.items()),
            sum(w * cells[key].mean for key, w in weights.items()),
        )
        if pooled is not None and all(cells[key].usable for key in weights):
            variance = sum(
                w**2 * (pooled.variance(cells[key]) + _variance(pooled, values[key]))
                for key, w in weights.items()
            )
            _test(contrast, pooled, variance)
        found.append(contrast)
    return found


def _variance(pooled: Pool, value: pd.Series) -> float:
    """Return the variance of a published mean: its own if it is known, else that found here."""
    p, n = float(value["test_error"]), int(value["n"])
    known = pd.notna(value["sd"]) and n > 1
    return float(value["sd"]) ** 2 / n if known else pooled.scale * p * (100 - p) / n


def _differences(common: Sequence[tuple[str, int]], against: str) -> Iterator[tuple[str, Weights]]:
    for norm, size in sorted(common, key=lambda key: (key[0], key[1])):
        if norm != against and (against, size) in common:
            yield f"{norm} − {against} at {size}", {(norm, size): 1.0, (against, size): -1.0}


def _changes(common: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Weights]]:
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
    common: Sequence[tuple[str, int]],
    cells: Mapping[tuple[str, int], Cell],
    values: Mapping[tuple[str, int], pd.Series],
    pooled: Pool | None,
) -> list[Contrast]:
    """Compare the order of all pairs of norms, the one with the lower published error first."""
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
                order=True,
            )
            if pooled is not None and one.usable and other.usable:
                _test(contrast, pooled, pooled.variance(one) + pooled.variance(other))
            found.append(contrast)
    return found


def _test(contrast: Contrast, pooled: Pool, variance: float) -> None:
    """Fill in the interval and p of a contrast."""
    contrast.error = math.sqrt(variance)
    half = pooled.quantile() * contrast.error
    contrast.low, contrast.high = contrast.tested - half, contrast.tested + half
    contrast.p = 2 * float(stdtr(pooled.freedom, -abs(contrast.tested) / contrast.error))


def _word(contrast: Contrast, pooled: Pool | None, margin: float) -> str:
    """Judge a contrast, as `replicate` says."""
    if pooled is None or contrast.error is None or contrast.p is None or contrast.p_holm is None:
        return UNDECIDED
    significant = contrast.p_holm < 1 - CONFIDENCE
    if contrast.order:
        shown = REPLICATED if contrast.found < 0 else NOT_REPLICATED
        return shown if significant else UNDECIDED
    if abs(contrast.tested) + pooled.quantile(CONFIDENCE) * contrast.error < margin:
        return REPLICATED
    if contrast.p >= 1 - CONFIDENCE:
        return CONSISTENT
    return NOT_REPLICATED if significant else UNDECIDED


def recipe(study: Study, source: str) -> list[str]:
    """Name the settings in which finished runs differ from the preset of ``source``, if it has one.

    The preset is ``experiment=replicate/<source>``; data sets and networks that only the study has
    are left out.
    """
    if not (conf_dir() / "experiment" / "replicate" / f"{source}.yaml").is_file():
        return []
    lines: dict[str, None] = {}
    for norm, runs in study.finished.groupby("norm"):
        words = [f"experiment=replicate/{source}"]
        words += [f"norm={norm}"] if (conf_dir() / "norm" / f"{norm}.yaml").is_file() else []
        settings = all_settings(RunConfig.parse(composed(*words)).plain())
        meant = {name: as_text(value) for name, value in flattened(settings)}
        same = (runs["dataset"] == meant["dataset.name"]) & (runs["model"] == meant["model.name"])
        for name in sorted({*meant} & {*runs} - {*CELL, "seed", "norm.name"}):
            if values := sorted({*runs.loc[same, name].map(as_text)} - {meant[name]}):
                of = f" ({norm})" if name.startswith("norm.") else ""
                lines[f"{name}{of}: {', '.join(values)}, there {meant[name]}"] = None
    return [*lines]


def table(networks: Sequence[Network]) -> pd.DataFrame:
    """Return all contrasts, a row each."""
    names = ["published", "found", "order", "low", "high", "p", "p_holm", "word"]
    rows = [
        [*one.name, *one.against, c.name, *(getattr(c, name) for name in names)]
        for one in networks
        for c in one.contrasts
    ]
    heads = ["dataset", "model", "published_dataset", "published_model", "contrast"]
    return pd.DataFrame(rows, columns=[*heads, *names])


def describe(
    study: Study,
    published: pd.DataFrame,
    networks: Sequence[Network],
    differing: Sequence[str],
    margin: float,
    form: str,
) -> str:
    """Put a comparison with ``published`` into words and tables; ``form`` is one of tabulate's."""
    from gnbench.aggregate.verdict import interval, p_value

    source = str(published["source"].iloc[0])
    break_, mark = ("\n\n", "- ") if form == "github" else ("\n", "  ")
    notes = [*published["note"].unique()]
    notes += ["test errors corrected: docs/results.md"] if published["corrected"].any() else []
    parts = [
        f"{study.path}, {len(study.finished)} finished runs, against {source}",
        break_.join([f"{source}:", *(f"{mark}{note}" for note in notes)]),
    ]
    if differing:
        head = f"settings that differ from experiment=replicate/{source}:"
        parts.append(break_.join([head, *(f"{mark}{line}" for line in differing)]))
    for one in networks:
        title = f"{', '.join(one.name)}: contrasts of test errors, in points"
        if one.order:
            other = ", ".join(one.against) if one.against != one.name else "another size of it"
            title = (
                f"{', '.join(one.name)}: the order of the norms, published of {other}; differences "
                "of test errors in points"
            )
        rows = [
            [
                c.name,
                f"{c.published:+.2f}",
                f"{c.found:+.2f}",
                "–" if c.order else f"{c.tested:+.2f}",
                interval(c.low, c.high),
                p_value(c.p_holm),
                c.word,
            ]
            for c in one.contrasts
        ]
        heads = ["", "published", "found", "Δ", "95 %", "p (Holm)", ""]
        if one.order:
            rows = [row[:3] + row[4:] for row in rows]
            heads.remove("Δ")
        aligned = ("left", *["right"] * (len(heads) - 2), "left")
        parts.append(
            f"{title}{break_}"
            + tabulate(rows, heads, form, disable_numparse=True, colalign=aligned)
        )
        if one.lacking:
            parts.append(f"published, not finished here: {', '.join(one.lacking)}")
    parts.append(break_.join(_sentences(study, networks, margin)))
    parts += [break_.join(["left out:", *(f"{mark}{p}" for p in study.problems)])] * bool(
        study.problems
    )
    return "\n\n".join(parts) + "\n"


def _sentences(study: Study, networks: Sequence[Network], margin: float) -> list[str]:
    """Say what became of the contrasts, and the verdict."""
    everything = [c for one in networks for c in one.contrasts]
    several = len(networks) > 1
    said = []
    for word in WORDS:
        names = [
            f"{', '.join(one.name)} {c.name}" if several else c.name
            for one in networks
            for c in one.contrasts
            if c.word == word
        ]
        if names:
            counted = f"{len(names)} of {len(everything)}"
            said.append(f"{word.capitalize()}: {counted} ({'; '.join(names)}).")
    if any(not c.order and c.word == CONSISTENT for c in everything):
        said.append(
            "Consistent says only that the difference is within the noise of so few seeds; "
            f"replicated, that it is shown to be smaller than {margin:g} points."
        )
    if any(c.error is None for c in everything):
        one_seed = study.finished.groupby(CELL)["seed"].nunique().max() < 2
        why = "single seeds have no spread" if one_seed else "no spread is known, or runs diverged"
        said.append(f"Nothing can be said where {why}; more seeds would.")
    return [*said, f"Verdict: {overall(networks)}."]
