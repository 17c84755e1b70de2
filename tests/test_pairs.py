"""Two studies side by side: statistics by hand, and verdicts that claim no more than they can."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from gnbench import ConfigError
from gnbench.aggregate.pairs import pair
from gnbench.aggregate.study import read_study
from gnbench.archive import ArchiveConfig, archive
from gnbench.cli import with_names
from gnbench.compare import CompareConfig, compare, judge
from tests.laid_down import put, settings


def lay(path, errors, *overrides, **changes):
    """Lay down a run for each error, of seeds 0, 1, …"""
    runs = [put(path, error, *overrides, seed=seed, **changes) for seed, error in enumerate(errors)]
    return runs[0]


def paired(tmp_path):
    return pair(read_study(tmp_path / "a"), read_study(tmp_path / "b"))


def compared(tmp_path, **more):
    given = {"outputs": str(tmp_path), "a": "a", "b": "b", "write": None}
    given |= {"against": None, "margin": None}
    return compare(CompareConfig.parse(given | more))


def said(tmp_path):
    equal, sentences = judge(paired(tmp_path))
    return equal, " ".join(sentences)


def test_the_difference_and_its_interval_by_hand(tmp_path):
    """Two cells of three seeds: the variance of each is that of its residuals, 4 degrees."""
    lay(tmp_path / "a", [19.0, 20.0, 21.0], "norm=gn")
    lay(tmp_path / "b", [49.0, 50.0, 51.0], "norm=gn", "epochs=31")
    [one] = paired(tmp_path).cells
    # Squares of residuals over p (100 − p): 2 / 1600 and 2 / 2500.
    scale = (2 / 1600 + 2 / 2500) / 4
    error = (scale * 1600 / 3 + scale * 2500 / 3) ** 0.5
    assert one.comparison.difference == 30
    half = 2.776445 * error  # t(0.975, 4) in any table of Student's distribution
    assert one.comparison.ci_high - 30 == pytest.approx(half, rel=1e-6)
    assert 30 - one.comparison.ci_low == pytest.approx(half, rel=1e-6)
    # t(0.80, 4) = 0.940965
    assert one.comparison.detectable == pytest.approx((2.776445 + 0.940965) * error, rel=1e-6)
    equal, sentences = said(tmp_path)
    assert not equal
    assert "Different: b errs more than a at the only cell." in sentences


def test_p_is_corrected_over_all_cells_of_all_networks(tmp_path):
    for size in (2, 4):
        for overrides in (("norm=gn",), ("norm=gn", "model=resnet34")):
            lay(tmp_path / "a", [19.0, 20.0, 21.0], *overrides, batch_size=size)
            lay(tmp_path / "b", [20.0, 21.0, 22.0], *overrides, batch_size=size)
    cells = paired(tmp_path).cells
    assert len(cells) == 4
    for one in cells:
        assert one.comparison.family == 4
        assert one.comparison.p_holm == pytest.approx(min(1, 4 * one.comparison.p))
    equal, sentences = said(tmp_path)
    assert equal
    assert "Not to be told apart: all 4 cells." in sentences
    assert "p by Holm over 4 cells" in sentences
    assert sentences.endswith("Verdict: not to be told apart.")


def test_a_copy_is_identical_whatever_its_times(tmp_path):
    for norm in ("bn", "gn"):
        lay(tmp_path / "a", [20.0, 21.0], f"norm={norm}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").glob("*/metrics.csv"):
        path.write_text(path.read_text().replace(",99.0,1.5", ",5.0,30.5"))
    assert said(tmp_path) == (
        True,
        "Identical: all 2 cells: the same seeds measured the same in every epoch. "
        "Verdict: identical.",
    )


def test_seeds_that_both_have_alike_count_once(tmp_path):
    """As if b had the two that a lacks, in the variance; and one epoch tells runs apart."""
    lay(tmp_path / "a", [19.0, 20.0], "norm=gn")
    lay(tmp_path / "b", [19.0, 20.0, 21.0, 22.0], "norm=gn")
    [one] = paired(tmp_path).cells
    assert (one.common_seeds, one.same_seeds, one.identical) == (2, 2, False)
    scale = (0.5 / (19.5 * 80.5) + 0.5 / (21.5 * 78.5)) / 2
    variance = scale * (19.5 * 80.5 / 2 + 20.5 * 79.5 / 4)
    half = one.comparison.ci_high - one.comparison.difference
    assert half == pytest.approx(4.302653 * variance**0.5, rel=1e-6)  # t(0.975, 2)
    path = next((tmp_path / "b").glob("*seed0*/metrics.csv"))
    path.write_text(path.read_text().replace(",50.0,1.0,", ",50.0,1.0000001,", 1))
    [one] = paired(tmp_path).cells
    assert (one.common_seeds, one.same_seeds) == (2, 1)
    assert "Settings, versions and machine are the same, the bits are not" in said(tmp_path)[1]


@pytest.mark.parametrize(
    ("flipped", "p", "equal"),
    [(0, 1.0, True), (5, 2 / 2**5, True), (10, 2 / 2**10, False)],
)
def test_single_seeds_are_told_apart_image_by_image(tmp_path, flipped, p, equal):
    right = np.arange(10_000) % 5 < 4
    lay(tmp_path / "a", [20.0], "norm=gn").save_correct(right)
    other = right.copy()
    other[np.flatnonzero(right)[:flipped]] = False  # b errs where a does not, never else
    lay(tmp_path / "b", [20.1], "norm=gn").save_correct(other)
    [one] = paired(tmp_path).cells
    assert one.comparison.mcnemar == pytest.approx(p)
    found, sentences = said(tmp_path)
    assert found is equal
    assert "of other seeds it says nothing" in sentences
    assert ("Different: b errs more than a at the only cell" in sentences) is not equal


def test_of_single_seeds_without_images_nothing_is_said(tmp_path):
    lay(tmp_path / "a", [20.0], "norm=gn")
    lay(tmp_path / "b", [20.1], "norm=gn")
    equal, sentences = said(tmp_path)
    assert not equal
    assert "Nothing can be said: the only cell: no cell of the network has seeds" in sentences
    assert sentences.endswith("Verdict: not known to be equal.")


def test_a_cell_with_a_diverged_run_is_not_called_equal(tmp_path):
    for size in (2, 4):
        for name in ("a", "b"):
            lay(tmp_path / name, [19.0, 20.0, 21.0], "norm=gn", batch_size=size, epochs=3)
    put(tmp_path / "b", 90.0, "norm=gn", batch_size=4, seed=3, status="diverged")
    equal, sentences = said(tmp_path)
    assert not equal
    assert "Identical: GN, batch size 2:" in sentences
    assert "Nothing can be said: GN, batch size 4: runs diverged." in sentences


def test_settings_in_which_the_studies_differ_as_a_whole_are_named_and_do_not_part_cells(tmp_path):
    def lay_down(name, norm, rate, groups=16):
        changes = {"optimizer": settings()["optimizer"] | {"lr": rate}}
        changes |= {"precision": "bf16"} if name == "b" else {}
        if norm == "gn":
            changes["norm"] = settings("norm=gn")["norm"] | {"num_groups": groups}
        lay(tmp_path / name, [20.0, 21.0], f"norm={norm}", **changes)

    for rate in (0.001, 0.01):
        for norm in ("bn", "gn"):
            lay_down("a", norm, rate)
            lay_down("b", norm, rate, groups=8)
    lay_down("b", "gn", 0.1, groups=8)
    lay_down("a", "ln", 0.001)
    found = paired(tmp_path)
    assert [one.label for one in found.cells] == [
        f"{norm} optimizer.lr={rate}" for norm in ("BN", "GN") for rate in (0.001, 0.01)
    ]
    assert found.settings == [
        "norm.num_groups: 16 in a, 8 in b (cifar10, simplenetv2, gn)",
        "precision: fp32 in a, bf16 in b",
    ]
    assert found.only_in == {
        "a": ["cifar10, simplenetv2: LN optimizer.lr=0.001, batch size 2"],
        "b": ["cifar10, simplenetv2: GN optimizer.lr=0.1, batch size 2"],
    }


def test_another_optimizer_is_named_without_all_its_settings(tmp_path):
    lay(tmp_path / "a", [20.0], "norm=gn")
    lay(tmp_path / "b", [20.0], "norm=gn", "optimizer=sgd")
    assert paired(tmp_path).settings == ["optimizer.name: adamw in a, sgd in b"]


def test_versions_and_machines_that_differ_are_named(tmp_path):
    lay(tmp_path / "a", [20.0], "norm=gn")
    run = lay(tmp_path / "b", [20.0], "norm=gn")
    record = run.record()
    record["versions"]["gnbench"] = "0.2.0+gabc"
    run.write_record(record | {"device": "cuda:0 (a card)", "engine": "graph"})
    assert paired(tmp_path).circumstances == [
        "gnbench: 0.1.0 in a; 0.2.0+gabc in b",
        "device: cpu in a; cuda:0 (a card) in b",
        "engine: eager in a; graph in b",
    ]


def test_damaged_and_unfinished_runs_are_named_and_do_not_count(tmp_path, capsys):
    lay(tmp_path / "a", [20.0, 21.0], "norm=gn")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    put(tmp_path / "b", 1.0, "norm=gn", seed=5, status="failed")
    (tmp_path / "b" / "half").mkdir()
    (tmp_path / "b" / "half" / "run.json").write_text("{")
    assert compared(tmp_path)
    text = capsys.readouterr().out
    assert f"left out of b:\n  {tmp_path}/b/half: " in text
    assert "b: " + f"{tmp_path}/b, 2 finished runs" in text


def test_a_study_is_found_by_name_by_folder_and_in_an_archive(tmp_path, capsys):
    lay(tmp_path / "a", [20.0], "norm=gn")
    given = {"outputs": str(tmp_path), "study": "a", "file": str(tmp_path / "x y" / "c.zip")}
    file = archive(ArchiveConfig.parse(given))
    for name in (str(tmp_path / "a"), str(file), f"{file}/a"):
        assert compared(tmp_path, b=name)
    assert "Verdict: identical." in capsys.readouterr().out


def test_it_writes_what_it_is_asked_to(tmp_path):
    lay(tmp_path / "a", [19.0, 20.0, 21.0], "norm=gn")
    lay(tmp_path / "b", [49.0, 50.0, 51.0], "norm=gn")
    assert not compared(tmp_path, write=str(tmp_path / "c" / "out.csv"))
    table = pd.read_csv(tmp_path / "c" / "out.csv")
    [row] = json.loads(table.to_json(orient="records"))
    assert (row["line"], row["test_error_a"], row["test_error_b"]) == ("GN", 20.0, 50.0)
    assert (row["difference"], row["identical"]) == (30.0, False)
    compared(tmp_path, write=str(tmp_path / "out.md"))
    text = (tmp_path / "out.md").read_text()
    assert "| GN |            2 |    3, 3 | 20.00 | 50.00 |  +30.00 |" in text
    assert text.endswith("Verdict: different.\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"b": None}, "name two studies: python -m gnbench.compare A B"),
        ({"b": "c"}, r"c: there is no such study; .* a name under .* \(a, b, failed, other\)"),
        (
            {"margin": 2.0},
            r"margin=2.0: is for published values \(deuscher2021, wu2018\); leave it",
        ),
        ({"write": "x.txt"}, r"write=x.txt: choose NAME.csv or NAME.md"),
        ({"b": "failed"}, r"no cell is finished in both \(runs: 1 in .* and 0 in"),
        ({"b": "other"}, r"no cell is finished in both \(runs: 1 in .* and 2 in .*optimizer.lr"),
    ],
)
def test_bad_input_is_refused(tmp_path, more, message):
    for name in ("a", "b"):
        lay(tmp_path / name, [20.0], "norm=gn")
    for rate in (0.1, 0.2):
        lay(tmp_path / "other", [20.0], "norm=gn", f"optimizer.lr={rate}")
    lay(tmp_path / "failed", [20.0], "norm=gn", status="failed")
    with pytest.raises(ConfigError, match=message):
        compared(tmp_path, **{"write": str(tmp_path / "x.csv"), **more})
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "failed", "other"}


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["x", "y/z"], ['a="x"', 'b="y/z"']),
        (["x", "write=o.md", "y"], ['a="x"', "write=o.md", 'b="y"']),
        (["--cfg", "job", "-cd", "d", "x"], ["--cfg", "job", "-cd", "d", 'a="x"']),
        (["x", "y", "z"], ['a="x"', 'b="y"', "z"]),
        (["a b", 'q"\\'], ['a="a b"', 'b="q\\"\\\\"']),
        (["${a}"], ['a="\\${a}"']),
    ],
)
def test_bare_words_become_settings(words, settings):
    assert with_names(words, ("a", "b")) == settings


def test_the_command_says_by_its_exit_code_that_studies_differ(cli, tmp_path):
    lay(tmp_path / "outputs" / "a", [20.0, 20.4], "norm=gn")
    lay(tmp_path / "one, two" / "b", [60.0, 60.4], "norm=gn")
    done = cli("a", "one, two/b", module="gnbench.compare", check=1)
    assert done.stdout.endswith("Verdict: different.\n\n")


@pytest.mark.slow
def test_the_command_ends_with_0_if_they_do_not_and_with_2_for_bad_input(cli, tmp_path):
    lay(tmp_path / "outputs" / "a", [20.0, 20.4], "norm=gn")
    assert "Verdict: identical." in cli("a", "a", module="gnbench.compare", check=0).stdout
    for words, line in (
        (["a", "a", "b"], "gnbench: b: this is no setting: write KEY=VALUE\n"),
        (["a", "b"], "gnbench: b: there is no such study; "),
        (["a"], "gnbench: name two studies: python -m gnbench.compare A B\n"),
    ):
        assert cli(*words, module="gnbench.compare", check=2).stderr.startswith(line)
