"""A study against published values: numbers by hand, and words that claim no more than they can."""

import math

import numpy as np
import pandas as pd
import pytest

from gnbench import ConfigError
from gnbench.aggregate.replication import overall, recipe, replicate
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
    here = squares / 12 * (1600 + 1476) / 3
    assert one.contrasts[0].error == pytest.approx(math.sqrt(here + 2 * 0.25 / 5))


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


def test_a_single_test_that_fails_among_many_is_undecided(tmp_path):
    """Outside its own interval, but not once the number of contrasts counts."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(3)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    for size in SIZES:
        lay(tmp_path, "bn", size, 20 + noise)
        lay(tmp_path, "gn", size, 20 + noise + (4.2 if size == 8 else 0))
    there = values([(norm, s, 20.0) for s in SIZES for norm in ("bn", "gn")])
    networks = replicate(read_study(tmp_path), there)
    found = words(networks)
    assert found.pop("gn − bn at 8") == "undecided"
    assert {*found.values()} == {"consistent"}
    assert overall(networks) == "undecided"


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


def test_a_source_that_is_right_is_seldom_called_wrong():
    """Of drawn studies and papers of one truth at most 5 % have a contrast "not replicated"."""
    rng = np.random.default_rng(1)
    truth = {(norm, size): rng.uniform(12, 18) for norm in ("bn", "gn") for size in SIZES}
    wrong, studies = 0, 300
    for _ in range(studies):
        drawn = {key: rng.normal(mean, 0.3, 4) for key, mean in truth.items()}
        there = values([(*key, errors[3]) for key, errors in drawn.items()])
        rows = [
            {"dataset": "cifar10", "model": "simplenetv2", "norm": key[0], "batch_size": key[1]}
            | {"seed": seed, "test_error": errors[seed], "status": "completed", "directory": ""}
            for key, errors in drawn.items()
            for seed in range(3)
        ]
        networks = replicate(Study("drawn", pd.DataFrame(rows)), there)
        wrong += overall(networks) == "not replicated"
    assert wrong / studies < 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / studies)


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
        "epochs: 3, there 30",
        "norm.num_groups (gn): 8, there 16",
    ]
    assert recipe(read_study(tmp_path), "wu2018") == []


@pytest.mark.parametrize(("gap", "code"), [(1.9, True), (9.0, False)])
def test_the_command_says_it_and_writes_it(tmp_path, capsys, gap, code):
    lay(tmp_path / "mine", "bn", 2, [16.4, 16.5, 16.6])
    lay(tmp_path / "mine", "gn", 2, [e - gap for e in (16.4, 16.5, 16.6)])
    given = {"outputs": str(tmp_path), "a": "mine", "b": "deuscher2021", "write": None}
    given |= {"against": "bn", "margin": 1.0}
    assert compare(CompareConfig.parse(given)) == code
    said = capsys.readouterr().out
    word = "replicated" if code else "not replicated"
    assert f"Verdict: {word}." in said
    assert "corrected" in said
    for name in ("it.md", "it.csv"):
        compare(CompareConfig.parse(given | {"write": str(tmp_path / name)}))
    assert f"Verdict: {word}." in (tmp_path / "it.md").read_text()
    assert pd.read_csv(tmp_path / "it.csv")["word"].tolist() == [word]


def test_nothing_in_common_is_one_line_and_nothing_is_written(tmp_path):
    lay(tmp_path / "mine", "bn", 2, [16.4])
    given = {"outputs": str(tmp_path), "a": "mine", "b": "wu2018", "against": "bn", "margin": 1.0}
    with pytest.raises(ConfigError, match="share no contrast"):
        compare(CompareConfig.parse(given | {"write": str(tmp_path / "new" / "it.md")}))
    assert not (tmp_path / "new").exists()


def test_every_published_value_is_whole():
    table = all_published()
    assert (table["n"] >= 1).all()
    assert table["test_error"].between(0, 100).all()
    assert not table.duplicated(["source", "dataset", "model", "norm", "batch_size"]).any()
