"""What is said of norms: tables whose answer is known by hand, studies drawn by the thousand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gnbench.aggregate.compare import (
    Cell,
    Line,
    cell_of,
    compare,
    compared,
    holm,
    mcnemar,
    pool,
    undecided,
    zeros,
)
from gnbench.aggregate.statistics import settings_of, summarize
from gnbench.aggregate.verdict import comparison_table, markdown, panels
from gnbench.runs.directory import RunDirectory


def cell(*errors, **more):
    return Cell(np.array(errors, dtype=float), **more)


def study(errors, **columns):
    """Return runs from errors by norm and batch size."""
    return pd.DataFrame(
        [
            {"dataset": "d", "model": "m", "norm": norm, "batch_size": size, "seed": seed}
            | {"run_id": f"{norm}{size}{seed}", "status": "completed", "test_error": float(error)}
            | {"directory": "none", "dataset.test_images": 10}
            | {name: values[norm] for name, values in columns.items()}
            for norm, cells in errors.items()
            for size, values in cells.items()
            for seed, error in enumerate(values)
        ]
    )


def said(runs, against="bn", registered=()):
    [panel] = panels(runs, settings_of(summarize(runs)), against, registered).values()
    return "\n".join(panel.sentences())


def test_the_pooled_variance_by_hand():
    """Deviations ±1 of 50 % and ±0.6 of 10 %, in units of √(p (100 − p)): 1/50 and 0.6/30."""
    pooled = pool([cell(49, 51), cell(9.4, 10.6), cell(30)])
    assert pooled.freedom == 2
    assert pooled.scale == pytest.approx((2 / 2500 + 2 * 0.36 / 900) / 2)
    assert pooled.variance(cell(30)) == pytest.approx(pooled.scale * 30 * 70)
    assert pooled.half(cell(49, 51)) == pytest.approx(4.3026527 * math.sqrt(pooled.scale * 1250))
    assert pooled.levene is None
    assert pool([cell(1), cell(2)]) is None
    assert pool([cell(1, 2, diverged=True)]) is None
    assert pool([cell(20, 20), cell(21)]) is None  # or every difference would be certain
    assert pool([cell(0, 0), cell(100, 100)]) is None


def test_spreads_that_differ_are_said():
    rng = np.random.default_rng(0)
    calm, wild = (20 + spread * rng.standard_normal(12) for spread in (0.1, 2.0))
    runs = study({"bn": {2: calm}, "gn": {2: wild}})
    assert "The spreads of the cells differ (Levene's test, p = " in said(runs)
    found = pool([Cell(calm), Cell(wild)])
    scaled = [c / math.sqrt(c.mean() * (100 - c.mean())) for c in (calm, wild)]
    # Scipy's counts both middle values of each, which lie equally far from the median.
    others = [np.sort(np.abs(values - np.median(values)))[1:] for values in scaled]
    assert found.levene == pytest.approx(stats.f_oneway(*others).pvalue)
    assert found.levene < stats.levene(*scaled, center="median").pvalue < 1e-2
    assert "spreads" not in said(study({"bn": {2: wild}, "gn": {2: wild + 1}}))


def test_two_norms_at_one_batch_size_are_students_t_test():
    """With nearly equal means p (100 − p) is a constant, and the pooled test the classical one."""
    bn, gn = [20.0, 20.1, 20.3, 19.9], [20.4, 20.2, 20.5]
    line, other = Line("GN", {2: cell(*gn)}), Line("BN", {2: cell(*bn)})
    line.reference = other
    compare([line, other], pool([line.cells[2], other.cells[2]]))
    [found] = line.comparisons
    expected = stats.ttest_ind(gn, bn)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue, rel=0.02)
    bounds = (found.ci_low, found.ci_high)
    assert bounds == pytest.approx((interval.low, interval.high), abs=2e-3)
    assert (found.p_holm, found.family) == (found.p, 1)
    # The smallest difference shown four times in five: by the quantiles 2.571 and 0.920 of 5.
    error = (found.ci_high - found.difference) / 2.570582
    assert found.detectable == pytest.approx((2.570582 + 0.919544) * error, rel=1e-4)


def test_holms_correction_by_hand():
    """p = 0.01, 0.04, 0.03 become 0.03, 0.06, 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("registered", "families"), [((), [3, 3, 3]), ((2,), [1, 2, 2])])
def test_registered_endpoints_are_a_family_of_their_own(registered, families):
    errors = {size: np.array([20.0, 20.2, 20.4]) for size in (2, 4, 8)}
    line = Line("GN", {size: Cell(e + 0.3) for size, e in errors.items()})
    line.reference = Line("BN", {size: Cell(e) for size, e in errors.items()})
    cells = [*line.cells.values(), *line.reference.cells.values()]
    compare([line, line.reference], pool(cells), registered)
    assert [c.family for c in line.comparisons] == families
    for c, size in zip(line.comparisons, families, strict=True):
        assert c.p_holm == pytest.approx(min(1, size * c.p), rel=0.1)
    wider = line.comparisons[1].detectable
    assert wider > line.comparisons[1].error * (2.179 + 0.873)  # t of 12 without a correction


def test_the_slope_is_that_of_least_squares():
    rng = np.random.default_rng(1)
    errors = {size: 20 + 0.5 * math.log2(size) + rng.normal(0, 0.2, 3) for size in (2, 8, 64)}
    line = Line("GN", {size: Cell(values) for size, values in errors.items()})
    compare([line], pool(list(line.cells.values())))
    x = np.log2([size for size, values in errors.items() for _ in values])
    fitted = stats.linregress(x, np.concatenate(list(errors.values())))
    assert line.slope == pytest.approx(fitted.slope)
    assert 0.3 < line.slope_half / (stats.t.ppf(0.975, 7) * fitted.stderr) < 3


def test_where_two_lines_cross_by_hand():
    x, d = np.array([1.0, 2.0, 3.0]), np.array([-2.0, 2.0, 4.0])
    assert zeros(x, d) == [1.5]
    # Without variance the set is the crossing itself; far from 0 there is none.
    assert undecided(x, d, np.zeros(3), 2.0) == []
    assert undecided(x, d + 10, np.full(3, 0.01), 2.0) == []
    [(low, high)] = undecided(x, d, np.full(3, 0.04), 2.0)
    for at in (low, high):  # there |d| is two standard errors
        w = at - 1
        assert abs(-2 + 4 * w) == pytest.approx(2 * math.sqrt(0.04 * ((1 - w) ** 2 + w**2)))
    assert low < 1.5 < high
    # All undecided: the whole range, in one piece.
    assert undecided(x, np.zeros(3), np.full(3, 1.0), 2.0) == [(1.0, 3.0)]
    # Touching is no crossing; a stretch of zeros between the signs has one in its middle.
    assert zeros(x, np.array([-1.0, 0.0, -1.0])) == zeros(x, np.array([1.0, 0.0, 0.0])) == []
    assert zeros(np.arange(4.0), np.array([-1.0, 0.0, 0.0, 1.0])) == [1.5]


SPREAD = np.array([-0.1, 0.0, 0.1])


def test_nothing_is_interpolated_across_a_batch_size_that_diverged():
    bn = {2: 24 + SPREAD, 8: 24 + SPREAD, 32: 24 + SPREAD}
    gn = {2: 20 + SPREAD, 8: 90 + SPREAD, 32: 20 + SPREAD}
    runs = study({"bn": bn, "gn": gn})
    runs.loc[runs["test_error"] > 80, "status"] = "diverged"
    text = said(runs)
    assert "lower error at 2 (-4.00 [" in text
    assert "]) and 32 (-4.00 [" in text
    assert "do not cross" not in text
    assert "not shown by these data. What happens about 8 is not known." in text


def test_an_error_of_none_is_not_called_diverged():
    """It has no variance to be tested by; McNemar's test of single networks needs none."""
    runs = study({"bn": {2: [0.5, 0.7]}, "gn": {2: [0.0, 0.0]}})
    assert "not compared at 2, where an error of 0 or 100 % has no variance" in said(runs)
    runs["status"] = ["completed", "completed", "diverged", "completed"]
    assert "not compared at 2, where runs diverged" in said(runs)
    wrong = np.ones((1, 1000), dtype=bool)
    wrong[0, :20] = False
    one = compared(2, cell(0, correct=np.ones_like(wrong)), cell(2, correct=wrong), None, None)
    assert one.mcnemar == pytest.approx(2 * 0.5**20)


def test_a_crossing_that_is_shown_is_said():
    bn = {2: 24 + SPREAD, 8: 20 + SPREAD, 32: 18 + SPREAD}
    gn = {2: 21 + SPREAD, 8: 20 + SPREAD, 32: 21 + SPREAD}
    text = said(study({"bn": bn, "gn": gn}))
    assert "GN against BN: lower error at 2 (-3.00 [" in text
    assert "no difference is shown at 8 (+0.00" in text
    assert "higher error at 32 (+3.00" in text
    assert "p by Holm over 3 comparisons, the intervals each by itself" in text
    assert "They cross at batch size 8 (95 %: 7." in text
    assert "With 3 seeds a difference of 0." in text
    assert "on average (a straight line): BN -1.50 ± 0." in text


@pytest.mark.parametrize(
    ("gn", "words"),
    [
        ({2: 23 + SPREAD, 8: 22 + SPREAD}, "They do not cross between 2 and 8."),
        ({2: 20 + SPREAD, 8: 20 + SPREAD}, "Whether they cross is not shown by these data."),
        ({2: 20 + SPREAD}, "no difference is shown at 2"),
    ],
)
def test_what_is_not_shown_is_said(gn, words):
    assert words in said(study({"bn": {2: 20 + SPREAD, 8: 20 + SPREAD}, "gn": gn}))


def test_single_seeds_show_nothing_but_the_two_networks(tmp_path):
    runs = study({"bn": {2: [50]}, "gn": {2: [40]}})
    for i, right in enumerate(([1] * 5 + [0] * 5, [1] * 6 + [0] * 4)):
        directory = RunDirectory(tmp_path / str(i))
        directory.path.mkdir()
        directory.save_correct(np.array(right, dtype=bool))
        runs.loc[i, "directory"] = str(directory.path)
    text = said(runs)
    assert "A single seed has no interval; more would tell differences from noise." in text
    assert "the two networks cannot be told apart (McNemar, p = 1.000)" in text
    assert "doubling" not in text
    # Without what the runs got right nothing is said of it; a damaged file counts as none.
    (tmp_path / "0" / "correct.npy").write_bytes(b"not an array")
    assert cell_of(runs[runs["norm"] == "bn"]).correct is None
    assert "McNemar" not in said(runs)


def test_mcnemar_by_hand():
    """Seven images that one alone gets right, one that the other does: 2 · (1 + 8) / 2⁸."""
    one = np.array([True] * 7 + [False] + [True] * 20)
    other = np.array([False] * 7 + [True] + [True] * 20)
    assert mcnemar(one, other) == pytest.approx(2 * 9 / 256)
    assert mcnemar(one, one) == 1.0


def test_the_last_epochs_interval_holds_seeds_and_images():
    """Three seeds each; the variance by hand, that of images by the paired differences."""
    rng = np.random.default_rng(2)
    hard = 0.4 * rng.random(4000)  # how hard an image is, for both
    one, other = (rng.random((3, 4000)) > hard + shift for shift in (0.0, 0.05))
    cells = [Cell(np.array([20.0, 20.3, 20.1]), correct=bits) for bits in (one, other)]
    line = Line("GN", {2: cells[0]}, reference=Line("BN", {2: cells[1]}))
    compare([line, line.reference], pool(cells))
    [found] = line.comparisons
    errors = [100 * (1 - bits.mean(axis=1)) for bits in (one, other)]
    assert found.final_difference == pytest.approx(errors[0].mean() - errors[1].mean())
    differences = 100 * ((~one).mean(axis=0) - (~other).mean(axis=0))
    seeds = np.mean([e.var(ddof=1) for e in errors]) * 2 / 3
    half = stats.t.ppf(0.975, 4) * math.sqrt(seeds + differences.var(ddof=1) / 4000)
    assert (found.final_high - found.final_low) / 2 == pytest.approx(half, rel=0.02)
    assert found.mcnemar is None


def test_only_networks_of_the_same_test_images_are_paired():
    bits = np.random.default_rng(3).random((2, 1, 400)) > 0.2
    for sets, paired in ((("one", "one"), True), (("one", "other"), False)):
        cells = [
            Cell(np.array([20.0]), correct=own, test_set=(name,))
            for own, name in zip(bits, sets, strict=True)
        ]
        line = Line("GN", {2: cells[0]}, reference=Line("BN", {2: cells[1]}))
        compare([line], None)
        [found] = line.comparisons
        assert (found.mcnemar is not None) == (found.final_difference is not None) == paired


def test_the_test_images_are_known_by_their_dataset_and_split(tmp_path):
    runs = study({"bn": {2: [20.0, 21.0]}}).assign(**{"dataset.test_images": 8})
    for number in runs.index:
        directory = RunDirectory(tmp_path / str(number))
        directory.path.mkdir()
        directory.save_correct(np.arange(8) < 6)
        runs.loc[number, "directory"] = str(directory.path)
    assert cell_of(runs).correct.tolist() == [[True] * 6 + [False] * 2] * 2
    first, second = (
        cell_of(runs.assign(**{"dataset.content": "abc", "dataset.split_seed": seed}))
        for seed in (0, 1)
    )
    assert first.test_set != second.test_set
    mixed = cell_of(runs.assign(**{"dataset.split_seed": range(len(runs))}))
    assert mixed.correct is None


def test_lines_are_compared_with_that_of_their_own_recipe():
    runs = study(
        {"bn": {2: 20 + SPREAD}, "gn": {2: 21 + SPREAD}},
    )
    other = runs.assign(run_id=runs["run_id"] + "x", test_error=runs["test_error"] + 5)
    runs = pd.concat([runs.assign(**{"optimizer.lr": 0.1}), other.assign(**{"optimizer.lr": 0.2})])
    runs.loc[(runs["norm"] == "gn") & (runs["optimizer.lr"] == 0.2), "test_error"] += 1
    text = said(runs)
    assert "GN optimizer.lr=0.1 against BN optimizer.lr=0.1: higher error at 2 (+1.00" in text
    assert "GN optimizer.lr=0.2 against BN optimizer.lr=0.2: higher error at 2 (+2.00" in text


def test_any_line_can_be_the_reference():
    runs = study({"gn": {64: 20 + SPREAD}})
    more = runs.assign(run_id=runs["run_id"] + "x", test_error=runs["test_error"] + 3)
    runs = pd.concat([runs.assign(**{"norm.images": 64}), more.assign(**{"norm.images": 2})])
    middle = runs.assign(**{"norm.images": 8}, run_id=runs["run_id"] + "m").iloc[:3]
    text = said(pd.concat([middle, runs]), against="gn norm.images=64")
    assert "GN norm.images=2 against GN norm.images=64: higher error at 64 (+3.00" in text
    assert text.index("GN norm.images=2 against") < text.index("GN norm.images=8 against")
    assert "Nothing is compared: figure.against=bn is not there; choose a norm or" in said(runs)
    assert """'figure.against="GN norm.images=2"'""" in said(runs)
    of_bn = runs.assign(norm="bn", run_id=runs["run_id"] + "y")
    twice = pd.concat([of_bn, study({"gn": {64: 20 + SPREAD}})])
    assert "GN: not compared: figure.against=bn stands for several lines; choose" in said(twice)
    assert "Nothing is compared: figure.against=bn stands for several lines" in said(of_bn)


def test_diverged_cells_are_named_and_not_compared():
    runs = study({"bn": {2: [90, 20], 4: 20 + SPREAD}, "gn": {2: 20 + SPREAD, 4: 21 + SPREAD}})
    runs.loc[runs["test_error"] == 90, "status"] = "diverged"
    text = said(runs)
    assert "GN against BN: higher error at 4" in text
    assert "GN against BN: not compared at 2, where runs diverged." in text
    assert "not compared at 2" in said(runs[runs["batch_size"] == 2])


def test_the_table_and_the_page_hold_the_same_figures():
    runs = study({"bn": {2: 20 + SPREAD, 4: [21]}, "gn": {2: 21 + SPREAD, 4: [20]}})
    found = panels(runs, [], "bn")
    table = comparison_table(found)
    assert table[["line", "against", "batch_size"]].to_numpy().tolist() == [
        ["GN", "BN", 2],
        ["GN", "BN", 4],
    ]
    assert table["difference"].tolist() == pytest.approx([1.0, -1.0])
    page = markdown("demo", found)
    assert page.startswith("# demo\n\n## d, m\n")
    assert f"| +1.00  | {table['ci_low'][0]:+.2f} to {table['ci_high'][0]:+.2f} |" in page
    alone = panels(study({"gn": {2: [1]}}), [], "bn")
    assert "One line: nothing is compared." in markdown("d", alone)
    assert "To be weighed" not in page
    assert markdown("d", alone, ["one", "two"]).endswith("\n\n## To be weighed\n\n- one\n- two\n")


def drawn(rng, seeds, mean_bn, mean_gn):
    """Draw a study: the variance of a cell is that of its share of errors, times a constant."""

    def cells(means):
        return {
            size: Cell(rng.normal(m, 0.006 * math.sqrt(m * (100 - m)), seeds))
            for size, m in means.items()
        }

    gn, bn = Line("GN", cells(mean_gn)), Line("BN", cells(mean_bn))
    gn.reference = bn
    compare([bn, gn], pool([*gn.cells.values(), *bn.cells.values()]))
    return gn


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_set_of_crossings_holds_the_true_one_as_often_as_it_says(seeds):
    """2,000 studies in which GN and BN cross at a batch size of 2^3.4."""
    sizes = [2, 4, 8, 16, 32, 64]
    bn = {s: 16.0 - 0.4 * (math.log2(s) - 3.4) for s in sizes}
    gn = {s: 16.0 + 0.2 * (math.log2(s) - 3.4) for s in sizes}
    rng, held = np.random.default_rng(seeds), 0
    for _ in range(2000):
        line = drawn(rng, seeds, bn, gn)
        held += any(low <= 2**3.4 <= high for low, high in line.crossing_set)
    assert 0.93 <= held / 2000 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_of_equal_norms_a_difference_is_rarely_claimed(seeds):
    """In at most 5 % of 2,000 studies, over all their batch sizes; and intervals hold 0 in 95 %."""
    means = {s: 15.0 + 0.3 * math.log2(s) for s in (2, 4, 8, 16, 32, 64)}
    rng, claims, held = np.random.default_rng(seeds), 0, []
    for _ in range(2000):
        line = drawn(rng, seeds, means, means)
        claims += any(c.shown for c in line.comparisons)
        held += [c.ci_low <= 0 <= c.ci_high for c in line.comparisons]
    assert claims / 2000 <= 0.05 + 0.01  # 0.01: two standard errors of such a share
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_difference_of_the_detectable_size_is_shown_in_four_of_five_studies():
    """One comparison of six by Holm, the other five of equal norms; by the true variance."""
    sizes = (2, 4, 8, 16, 32, 64)
    error = 0.006 * math.sqrt(20 * 80) * math.sqrt(2 / 3)
    detectable = (stats.t.ppf(1 - 0.025 / 6, 24) + stats.t.ppf(0.8, 24)) * error
    bn = dict.fromkeys(sizes, 20.0)
    rng, shown, claimed = np.random.default_rng(0), 0, []
    for _ in range(1000):
        line = drawn(rng, 3, bn, {**bn, 2: 20.0 + detectable})
        shown += bool(line.comparisons[0].shown)
        claimed.append(line.comparisons[0].detectable)
    assert shown / 1000 == pytest.approx(0.80, abs=0.05)
    assert np.mean(claimed) == pytest.approx(detectable, rel=0.05)
