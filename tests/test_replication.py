"""A study against published values: numbers by hand, and words that claim no more than they can."""

import math

import numpy as np
import pandas as pd
import pytest

from gnbench import ConfigError
from gnbench.aggregate.replication import overall, replicate
from gnbench.aggregate.replication_verdict import describe, recipe
from gnbench.aggregate.study import Study, all_published, published, read_study
from gnbench.compare import CompareConfig, compare
from tests.laid_down import put

FIGURE3 = ("experiment=figure3",)
SMALL = ("experiment=figure3_small",)
SIZES = (64, 32, 16, 8, 4, 2)


def lay(path, norm, size, errors, *overrides):
    for seed, error in enumerate(errors):
        put(path, error, *(overrides or FIGURE3), f"norm={norm}", seed=seed, batch_size=size)


def values(rows, model="simplenetv2", **more):
    """Published values: norm, batch size, test error."""
    table = pd.DataFrame(rows, columns=["norm", "batch_size", "test_error"])
    given = {"source": "them", "dataset": "cifar10", "model": model, "sd": np.nan, "n": 1}
    return table.assign(**given | {"note": "", "corrected": False} | more)


def words(networks):
    return {c.name: c.word for one in networks for c in one.contrasts}


def test_a_contrast_and_its_interval_by_hand(tmp_path):
    """|Δ| against t · s · √(1/n + 1/n′): three seeds here, one there, of the same spread."""
    lay(tmp_path, "bn", 2, [19.0, 20.0, 21.0])
    lay(tmp_path, "gn", 2, [17.0, 18.0, 19.0])
    [one] = replicate(read_study(tmp_path), values([("bn", 2, 20.0), ("gn", 2, 16.0)]))
    [contrast] = one.contrasts
    assert contrast.name == "gn − bn at 2"
    assert (contrast.published, contrast.found) == (-4, -2)
    scale = (2 / (20 * 80) + 2 / (18 * 82)) / 4  # squares of residuals over p (100 − p), 4 degrees
    here = scale * (20 * 80 + 18 * 82) / 3
    there = scale * (20 * 80 + 16 * 84) / 1
    assert contrast.error == pytest.approx(math.sqrt(here + there))
    assert contrast.low == pytest.approx(2 - 2.776445 * contrast.error)  # t(0.975, 4)
    assert contrast.word == "consistent"


def test_spreads_that_were_published_count(tmp_path):
    lay(tmp_path, "bn", 2, [19.0, 20.0, 21.0])
    lay(tmp_path, "gn", 2, [17.0, 18.0, 19.0])
    there = values([("bn", 2, 20.0), ("gn", 2, 16.0)], sd=0.5, n=5)
    [one] = replicate(read_study(tmp_path), there)
    squares = 2 / 1600 + 2 / 1476 + 4 * 0.25 / 1600 + 4 * 0.25 / 1344
    scale = squares / 12  # 4 degrees here, 8 there: one spread of both
    variance = scale * ((1600 + 1476) / 3 + (1600 + 1344) / 5)
    assert one.contrasts[0].error == pytest.approx(math.sqrt(variance))


def test_single_seeds_are_tested_with_a_spread_that_was_published(tmp_path):
    lay(tmp_path, "bn", 2, [20.0])
    lay(tmp_path, "gn", 2, [16.1])
    there = values([("bn", 2, 20.0), ("gn", 2, 16.0)], sd=0.1, n=5)
    assert words(replicate(read_study(tmp_path), there)) == {"gn − bn at 2": "replicated"}


def test_the_four_words(tmp_path):
    """Spread 0.01: at 2 as published, at 4 far away."""
    for size, gn in ((2, 18.0), (4, 14.0)):
        lay(tmp_path, "bn", size, [19.99, 20.0, 20.01])
        lay(tmp_path, "gn", size, [gn - 0.01, gn, gn + 0.01])
    there = values([(n, s, e) for s in (2, 4) for n, e in (("bn", 20.0), ("gn", 18.0))])
    networks = replicate(read_study(tmp_path), there)
    assert words(networks) == {
        "gn − bn at 2": "replicated",
        "gn − bn at 4": "not replicated",
        "bn, from 2 to 4": "replicated",
        "gn, from 2 to 4": "not replicated",
    }
    assert overall(networks) == "not replicated"


def test_what_differs_but_maybe_by_less_than_the_margin_is_undecided(tmp_path):
    """Δ = 1.2 ± 0.6: not 0, and on which side of 1 is open; Δ = 2.2 is beyond it."""
    noise = np.array([-0.25, 0.0, 0.25])
    for size in SIZES:
        lay(tmp_path, "bn", size, 20 + noise)
        lay(tmp_path, "gn", size, 20 + noise + {8: 1.2, 4: 2.2}.get(size, 0.0))
    there = values([(norm, s, 20.0) for s in SIZES for norm in ("bn", "gn")])
    networks = replicate(read_study(tmp_path), there)
    found = words(networks)
    contrasts = {c.name: c for c in networks[0].contrasts}
    assert contrasts["gn − bn at 8"].low > 0
    assert found["gn − bn at 8"] == "undecided"
    assert found["gn − bn at 4"] == "not replicated"
    assert overall(networks) == "not replicated"


def test_the_change_over_batch_sizes_is_that_of_a_straight_line(tmp_path):
    """Where the errors lie on a line it is last minus first; else that of numpy's fit."""
    errors = dict(zip(SIZES, (20.0, 19.0, 19.5, 18.0, 16.0, 17.0), strict=True))
    for size, error in errors.items():
        lay(tmp_path, "gn", size, [error - 0.1, error + 0.1])
    there = values([("gn", size, 10 + 0.5 * math.log2(size)) for size in SIZES])
    [one] = replicate(read_study(tmp_path), there)
    [contrast] = one.contrasts
    assert contrast.name == "gn, from 2 to 64"
    assert contrast.published == pytest.approx(2.5)
    slope = np.polyfit([math.log2(size) for size in SIZES], [*errors.values()], 1)[0]
    assert contrast.found == pytest.approx(5 * slope)


def test_a_single_seed_decides_nothing(tmp_path):
    for norm in ("bn", "gn"):
        lay(tmp_path, norm, 2, [15.0])
    networks = replicate(read_study(tmp_path), published("deuscher2021"))
    assert words(networks) == {"gn − bn at 2": "undecided"}
    assert len(networks[0].lacking) == 10


def test_a_diverged_cell_decides_nothing(tmp_path):
    lay(tmp_path, "bn", 2, [15.0, 15.2])
    for seed in (0, 1):
        put(tmp_path, 90.0, *FIGURE3, "norm=gn", seed=seed, status="diverged")
    networks = replicate(read_study(tmp_path), published("deuscher2021"))
    assert words(networks) == {"gn − bn at 2": "undecided"}


def test_of_another_network_only_the_order_counts(tmp_path):
    """Wu & He: BN < GN < LN < IN at batch size 32, of ImageNet and ResNet-50."""
    for norm, error in (("bn", 16.0), ("gn8", 17.0), ("ln", 17.02), ("in", 16.5)):
        lay(tmp_path, norm, 32, [error - 0.05, error, error + 0.05], *SMALL)
    [one] = replicate(read_study(tmp_path), published("wu2018"))
    assert one.order
    assert words([one]) == {
        "bn < gn at 32": "replicated",
        "bn < ln at 32": "replicated",
        "bn < in at 32": "replicated",
        "gn < ln at 32": "undecided",
        "gn < in at 32": "not replicated",
        "ln < in at 32": "not replicated",
    }


def test_of_another_size_of_a_network_only_the_order_counts(tmp_path):
    lay(tmp_path, "bn", 64, [16.0, 16.1], *SMALL)
    lay(tmp_path, "gn8", 64, [18.0, 18.1], *SMALL)
    [one] = replicate(read_study(tmp_path), published("deuscher2021"))
    assert words([one]) == {"bn < gn at 64": "replicated"}


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_source_within_the_margin_is_seldom_called_wrong(shift):
    """Of drawn studies whose truth lies within the margin, or at it, at most 5 % are called so."""
    drawn = [drawn_study(seed, shift) for seed in range(300)]
    assert sum("not replicated" in words(one).values() for one in drawn) / 300 < 0.05 + ALLOWED


@pytest.mark.slow
def test_a_contrast_at_the_margin_is_seldom_called_replicated():
    """Two one-sided tests at 5 %."""
    drawn = [drawn_study(seed, 1.0) for seed in range(300)]
    assert sum(words(one)["gn − bn at 8"] == "replicated" for one in drawn) / 300 < 0.05 + ALLOWED


ALLOWED = 2.6 * math.sqrt(0.05 * 0.95 / 300)


def drawn_study(seed, shift):
    """Draw a study of three seeds and a paper of one run, GN's errors there ``shift`` lower."""
    rng = np.random.default_rng(seed)
    truth = {(norm, size): rng.uniform(12, 18) for norm in ("bn", "gn") for size in SIZES}
    errors = {key: rng.normal(mean, 0.1, 4) for key, mean in truth.items()}
    there = values([(*key, e[3] - shift * (key[0] == "gn")) for key, e in errors.items()])
    rows = [
        {"dataset": "cifar10", "model": "simplenetv2", "norm": norm, "batch_size": size}
        | {"seed": i, "test_error": drawn[i], "status": "completed", "directory": ""}
        for (norm, size), drawn in errors.items()
        for i in range(3)
    ]
    return replicate(Study("drawn", pd.DataFrame(rows)), there)


def test_a_part_of_what_was_published_is_undecided_as_a_whole(tmp_path):
    """GN alone, or two norms of four, may repeat theirs: of the rest nothing is known."""
    for size in (2, 64):
        lay(tmp_path / "a", "gn", size, [15.0, 15.01, 15.02])
    there = values([(n, s, 15.0) for n in ("bn", "gn") for s in (2, 64)])
    networks = replicate(read_study(tmp_path / "a"), there)
    assert words(networks) == {"gn, from 2 to 64": "replicated"}
    assert networks[0].lacking == ["bn at 2", "bn at 64"]
    assert overall(networks) == "undecided"
    for norm, error in (("bn", 15.0), ("gn", 18.0)):
        lay(tmp_path / "b", norm, 32, [error, error + 0.1])
    networks = replicate(read_study(tmp_path / "b"), published("wu2018"))
    assert words(networks) == {"bn < gn at 32": "replicated"}
    assert networks[0].lacking == ["in at 32", "ln at 32"]
    assert overall(networks) == "undecided"


def test_what_was_not_published_does_not_join_in(tmp_path):
    """Another data set, and lines of norms that were not published, change no word."""
    for norm, error in (("bn", 20.0), ("gn", 18.0)):
        lay(tmp_path, norm, 2, [error - 0.01, error, error + 0.01])
    there = values([("bn", 2, 20.0), ("gn", 2, 18.0)])
    alone = words(replicate(read_study(tmp_path), there))
    for norm in ("bn", "gn"):
        lay(tmp_path, norm, 2, [9.0, 11.0], *FIGURE3, "dataset=fashion_mnist")
        lay(tmp_path, norm, 2, [9.0], *FIGURE3, "dataset=fashion_mnist", "epochs=2")
    lay(tmp_path, "ln", 2, [18.0], *FIGURE3, "norm.eps=1e-3")
    lay(tmp_path, "ln", 2, [18.0])
    study = read_study(tmp_path)
    networks = replicate(study, there)
    assert words(networks) == alone == {"gn − bn at 2": "replicated"}
    said = describe(study, there, networks, [], 1.0, "plain")
    assert "not published, left out:\n  fashion_mnist, simplenetv2" in said


def test_what_must_be_weighed_is_said(tmp_path):
    """Spreads that differ, contrasts below the margin, single runs there, power, the margin."""
    rng = np.random.default_rng(0)
    for norm in ("bn", "gn"):
        for size in SIZES:
            spread = 2.0 if (norm, size) == ("bn", 2) else 0.1
            lay(tmp_path, norm, size, 15 + spread * rng.standard_normal(6))
    study = read_study(tmp_path)
    there = published("deuscher2021")
    there = there[there["model"] == "simplenetv2"]
    said = describe(study, there, replicate(study, there, margin=2.5), [], 2.5, "plain")
    assert "margin ± 2.5" in said
    assert "The spreads of the cells differ (Levene's test" in said
    assert "Published as less than 2.5 points" in said
    assert "Single runs there are taken to spread as those here do." in said
    assert "points would be shown not to be 0" in said
    assert " 6, 1 " in said


@pytest.mark.parametrize("error", [0.0, 100.0])
def test_a_published_error_of_none_or_all_decides_nothing(tmp_path, error):
    lay(tmp_path, "bn", 2, [19.0, 20.0, 21.0])
    lay(tmp_path, "gn", 2, [17.0, 18.0, 19.0])
    there = values([("bn", 2, 20.0), ("gn", 2, error)], sd=0.0, n=3)
    networks = replicate(read_study(tmp_path), there)
    assert words(networks) == {"gn − bn at 2": "undecided"}


def test_the_norm_that_others_are_compared_with_is_checked(tmp_path):
    for norm in ("bn", "gn"):
        lay(tmp_path, norm, 2, [15.0])
    study = read_study(tmp_path)
    assert words(replicate(study, published("deuscher2021"), "GN")) == {"bn − gn at 2": "undecided"}
    with pytest.raises(ConfigError, match="against=ln: choose one of bn, gn"):
        replicate(study, published("deuscher2021"), "ln")


def test_a_norm_that_stands_for_several_lines_is_refused(tmp_path):
    lay(tmp_path, "bn", 2, [15.0])
    lay(tmp_path, "gn", 2, [15.0])
    lay(tmp_path, "gn", 2, [15.0], *FIGURE3, "norm.num_groups=8")
    with pytest.raises(ConfigError, match=r"several lines, which differ in norm\.num_groups"):
        replicate(read_study(tmp_path), published("deuscher2021"))


def test_settings_that_differ_from_the_preset_are_named(tmp_path):
    lay(tmp_path, "bn", 2, [15.0])
    lay(tmp_path, "gn", 2, [15.0], *FIGURE3, "norm.num_groups=8", "epochs=3")
    assert recipe(read_study(tmp_path), "deuscher2021") == [
        "epochs: 3, in replicate/deuscher2021 30",
        "norm.num_groups (gn): 8, in replicate/deuscher2021 16",
    ]
    assert "model.hidden: 1024, in replicate/wu2018_order 64" in recipe(
        read_study(tmp_path), "wu2018"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "word"),
    [(0, "replicated"), pytest.param(9, "not replicated", marks=pytest.mark.slow)],
)
def test_the_command_says_it_and_writes_it(tmp_path, capsys, shift, word):
    table = published("deuscher2021")
    for _, row in table[table["model"] == "simplenetv2"].iterrows():
        error = row["test_error"] + shift * (row["norm"] == "gn")
        lay(tmp_path / "mine", row["norm"], row["batch_size"], [error - 0.1, error, error + 0.1])
    given = {"outputs": str(tmp_path), "a": "mine", "b": "deuscher2021", "write": None}
    given |= {"against": None, "margin": None}
    assert compare(CompareConfig.parse(given)) == (not shift)
    said = capsys.readouterr().out
    assert f"Verdict: {word}." in said
    assert "corrected" in said
    for name in ("it.md", "it.csv"):
        compare(CompareConfig.parse(given | {"write": str(tmp_path / name)}))
    assert f"Verdict: {word}." in (tmp_path / "it.md").read_text()
    assert pd.read_csv(tmp_path / "it.csv")["word"].tolist().count(word) == (6 if shift else 8)


def test_nothing_in_common_is_one_line_and_nothing_is_written(tmp_path):
    lay(tmp_path / "mine", "bn", 2, [16.4])
    given = {"outputs": str(tmp_path), "a": "mine", "b": "wu2018", "against": None, "margin": None}
    with pytest.raises(ConfigError, match="share no contrast"):
        compare(CompareConfig.parse(given | {"write": str(tmp_path / "new" / "it.md")}))
    assert not (tmp_path / "new").exists()


def test_every_published_value_is_whole():
    table = all_published()
    assert (table["n"] >= 1).all()
    assert table["test_error"].between(0, 100).all()
    assert not table.duplicated(["source", "dataset", "model", "norm", "batch_size"]).any()
