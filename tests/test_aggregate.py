import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gnbench import ConfigError
from gnbench.aggregate.__main__ import describe, write_studies
from gnbench.aggregate.figure import STYLES, draw_curves, draw_errors, save
from gnbench.aggregate.statistics import differing, summarize
from gnbench.aggregate.study import CELL, published, read_metrics, read_runs, read_study
from gnbench.runs.directory import METRICS
from tests.conftest import ROOT
from tests.laid_down import put, settings


@pytest.fixture
def study(tmp_path):
    """Two norms at three batch sizes over three seeds, and the baseline."""
    path = tmp_path / "outputs" / "demo"
    for seed, shift in enumerate((-0.3, 0.0, 0.6)):
        for size in (2, 4, 8):
            put(path, 20 - size / 4 + shift, "norm=bn", batch_size=size, seed=seed)
            put(path, 17 + size / 8 + shift, "norm=gn", batch_size=size, seed=seed)
    put(path, 7.9, "model=resnet34", "norm=bn", batch_size=128, epochs=5)
    return path


def cell(summary, **wanted):
    rows = summary[(summary[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_summary_against_hand_arithmetic(study):
    summary = summarize(read_study(study).runs)
    assert list(summary.columns) == [
        *CELL, "n_seeds", "test_error_mean", "test_error_std", "ci_low", "ci_high", "n_diverged",
        "pooled_low", "pooled_high",
    ]  # fmt: skip
    row = cell(summary, model="simplenetv2", norm="gn", batch_size=8)
    values = np.array([17.7, 18.0, 18.6])
    assert row["n_seeds"] == 3
    assert row["test_error_mean"] == pytest.approx(18.1)
    assert row["test_error_std"] == pytest.approx(((values - 18.1) ** 2).sum() ** 0.5 / 2**0.5)
    # t(0.975, 2) = 4.303 in any table of Student's distribution
    half = 4.302653 * row["test_error_std"] / 3**0.5
    assert row["ci_high"] - row["test_error_mean"] == pytest.approx(half, rel=1e-5)
    assert row["test_error_mean"] - row["ci_low"] == pytest.approx(half, rel=1e-5)
    alone = cell(summary, model="resnet34", batch_size=128)
    assert alone["n_seeds"] == 1
    assert np.isnan([alone["test_error_std"], alone["ci_low"], alone["ci_high"]]).all()


def test_it_never_averages_over_settings_that_differ(study):
    put(study, 30.0, "norm=gn", "optimizer.lr=0.01", batch_size=4)
    put(study, 40.0, "norm=gn", "norm.num_groups=8", batch_size=4)
    table = read_study(study).runs
    assert differing(table) == ["norm.num_groups", "optimizer.lr"]
    summary = summarize(table)
    at_four = summary[(summary["norm"] == "gn") & (summary["batch_size"] == 4)]
    assert sorted(at_four["test_error_mean"]) == pytest.approx([17.6, 30.0, 40.0])
    labels = [text.get_text() for text in draw(summary, table).axes[-1].get_legend().get_texts()]
    assert "GN norm.num_groups=8 optimizer.lr=0.001" in labels
    assert "GN norm.num_groups=16 optimizer.lr=0.01" in labels


@pytest.mark.parametrize(
    "other",
    [
        {"processes": 4},
        {"precision": "bf16"},
        {"optimizer": {"name": "on", "_target_": "x", "lr": 1, "decay_norm_and_bias": True}},
    ],
)
def test_runs_that_differ_otherwise_are_never_averaged_either(tmp_path, other):
    put(tmp_path / "a", 20, "norm=gn", seed=0)
    put(tmp_path / "a", 10, "norm=gn", seed=1, **other)
    assert sorted(summarize(read_study(tmp_path / "a").runs)["test_error_mean"]) == [10, 20]


def test_a_name_that_yaml_took_for_something_else_is_text(study):
    """In records from before such names were refused; and settings of mixed kinds."""
    config = settings("norm=gn")
    for error, name in enumerate((True, None, 5), start=30):
        for group in ("norm", "model", "dataset", "optimizer"):
            put(study, error, "norm=gn", **{group: config[group] | {"name": name}})
        put(study, error, "norm=gn", norm=config["norm"] | {"eps": name})
    found = read_study(study)
    assert found.problems == []
    for column in ("norm", "model", "dataset", "optimizer.name"):
        odd = found.runs[found.runs[column].isin(["True", "None", "5"])]
        assert sorted(odd["test_error"]) == [30, 31, 32]
    summary = summarize(found.runs)
    assert summary["n_seeds"].sum() == len(found.runs) == 19 + 15
    assert "TRUE" in describe(found, summary, "descending")
    assert draw(summary, found.runs)


def test_components_that_differ_have_lines_of_their_own(tmp_path):
    """The same numbers, but another optimizer or another implementation of the norm."""
    path = tmp_path / "components"
    put(path, 10.0, "norm=gn")
    put(path, 20.0, "norm=gn", "optimizer=adam", "optimizer.weight_decay=0.01")
    put(path, 30.0, "norm=gn", "norm._target_=gnbench.norms.ReferenceGroupNorm")
    table = read_study(path).runs
    assert differing(table) == ["norm._target_", "optimizer.name"]
    summary = summarize(table)
    assert summary["n_seeds"].tolist() == [1, 1, 1]
    labels = {text.get_text() for text in draw(summary, table).axes[0].get_legend().get_texts()}
    assert len(labels) == 3


def test_a_run_that_several_studies_hold_counts_once(study):
    shutil.copytree(study, study.parent / "copy")
    both = read_runs(study.parent)
    assert len(both) == 38
    pd.testing.assert_frame_equal(summarize(both), summarize(read_study(study).runs))


def test_what_differs_between_the_norms_compared_is_said(tmp_path):
    """BN at one length and GN at another must not pass for a comparison of norms."""
    path = tmp_path / "unfair"
    put(path, 10.0, "norm=bn", "epochs=5")
    put(path, 11.0, "norm=gn", "epochs=50")
    assert differing(read_study(path).runs) == ["epochs"]
    assert differing(read_study(path).runs.iloc[:1]) == []


def test_failed_running_and_interrupted_runs_are_named_and_not_counted(study):
    put(study, 1.0, "norm=gn", batch_size=2, seed=7, status="failed")
    put(study, 1.0, "norm=gn", batch_size=2, seed=8, status="running")
    put(study, 1.0, "norm=gn", batch_size=2, seed=9, status="interrupted")
    put(study, 90.0, "norm=bn", batch_size=2, seed=9, status="diverged")
    found = read_study(study)
    summary = summarize(found.runs)
    assert cell(summary, norm="gn", batch_size=2)["n_seeds"] == 3
    diverged = cell(summary, norm="bn", batch_size=2)
    assert (diverged["n_seeds"], diverged["n_diverged"]) == (4, 1)
    text = describe(found, summary, "descending")
    assert "not finished:" in text
    for status, seed in (("failed", 7), ("running", 8), ("interrupted", 9)):
        line = next(line for line in text.splitlines() if f"seed{seed}" in line)
        assert line.strip().startswith(status)
    assert "RuntimeError: it broke" in text
    assert "1 diverged" in text


def test_missing_cells_are_named(study):
    plan = [
        {"run_id": f"cifar10-simplenetv2-{norm}-bs64-seed0-0123456{norm[0]}", "dataset": "cifar10",
         "model": "simplenetv2", "norm": norm, "batch_size": 64, "seed": 0}
        for norm in ("bn", "gn")
    ]  # fmt: skip
    (study / "sweep-00000000.json").write_text(json.dumps(plan))
    (study / "sweep-11111111.json").write_text('[{"run_id": "cut of')
    put(study, 12.0, "norm=gn", batch_size=32)
    missing = read_study(study).missing
    assert missing == [
        "cifar10-simplenetv2-bn-bs64-seed0-0123456b (planned by a sweep)",
        "cifar10-simplenetv2-gn-bs64-seed0-0123456g (planned by a sweep)",
    ]
    (study / "sweep-00000000.json").unlink()  # without a plan, what the grid evidently lacks
    assert read_study(study).missing == [
        *(f"cifar10-simplenetv2-bn-bs32-seed{s} (others of its grid ran)" for s in range(3)),
        *(f"cifar10-simplenetv2-gn-bs32-seed{s} (others of its grid ran)" for s in (1, 2)),
    ]


def test_a_complete_study_has_nothing_missing(study):
    found = read_study(study)
    assert (found.missing, found.problems) == ([], [])
    assert "missing" not in describe(found, summarize(found.runs), "descending")


def test_duplicates_are_counted_once(study):
    before = summarize(read_study(study).runs)
    original = next(p for p in study.iterdir() if "gn-bs4-seed0" in p.name)
    shutil.copytree(original, study / "a copy of it")
    put(study, 1.0, "norm=gn", batch_size=4, seed=1, status="running", name="restarted elsewhere")
    found = read_study(study)
    pd.testing.assert_frame_equal(summarize(found.runs), before)
    assert len(found.problems) == 2
    assert all("counted once" in problem for problem in found.problems)
    assert (found.runs["status"] == "completed").all()


def test_a_half_written_run_never_breaks_it(study):
    whole = read_study(study).runs
    texts = (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"status": "completed"}', b'{"status": "x"}',
             b'{"status": "completed", "config": {}}',
             b'{"status": "completed", "config": {"model": 3}}')  # fmt: skip
    for number, text in enumerate(texts):
        (study / f"half{number}").mkdir()
        (study / f"half{number}" / "run.json").write_bytes(text)
    config = settings("norm=gn")
    odd = {"dataset": "cifar10", "batch_size": "2", "seed": None, "norm": {}}
    changes = [{"config": config | {key: value}} for key, value in odd.items()]
    changes += [{"versions": "x"}, {"result": [1]}, {"result": None}, {"result": {}},
                {"result": {"test_error": "5"}}, {"seconds": "x"}]  # fmt: skip
    for value in (10**400, 2**63, -1, True, float("nan"), float("inf")):
        changes += [{"config": config | {key: value}} for key in ("batch_size", "seed")]
        changes += [{"seconds": value}, {"peak_memory_bytes": value}]
        changes += [{"result": {"test_error": value, "epochs": 3}}]
    changes += [{"config": config | {"batch_size": 0}}, {"result": {"test_error": 100.5}}]
    changes += [{"config": config | {"dataset": config["dataset"] | {"test_images": 10**400}}}]
    for number, change in enumerate(changes):
        run = put(study, 1.0, "norm=gn", name=f"odd{number}")
        run.record_path.write_text(json.dumps(run.record() | change))
    (study / "empty").mkdir()
    (study / "begun").mkdir()
    (study / "begun" / "gnbench.log").write_text("hello")
    found = read_study(study)
    pd.testing.assert_frame_equal(found.runs, whole)
    assert len(found.problems) == len(texts) + len(changes) + 1
    assert sum("no run.json" in problem for problem in found.problems) == 1
    assert sum("completed but has no result" in problem for problem in found.problems) == 2


def test_a_text_of_another_kind_does_not_stop_it(study):
    for number, value in enumerate((5, None, ["x"], {"a": 1}, "")):
        run = put(study, 1.0, seed=number + 3, status="failed")
        run.write_record(run.record() | dict.fromkeys(("started", "error", "device"), value))
    found = read_study(study)
    assert len(found.unfinished) == 5
    text = describe(found, summarize(found.runs), "descending")
    assert f"failed  {found.unfinished['run_id'].iloc[-1]}\n" in text


def test_metrics_leave_out_rows_that_are_cut_or_wrong(study):
    whole = read_metrics(read_study(study).runs)
    assert len(whole) == 18 * 3 + 5
    assert list(whole) == ["run_id", *CELL, "seed", *METRICS]
    files = sorted(study.glob("*simplenetv2*/metrics.csv"))
    with files[0].open("a") as file:
        file.write("4,40,0.001,1.0")
    files[1].write_text("not,our,header\n1,2,3\n")
    with files[2].open("a") as file:
        file.write('4,40\n5,50,a,b,c,d,e,f,g,h,i\n6,",3,4,5,6,7,8,9,10,11,12\n7,1,2,"3,4,5\n')
    files[3].unlink()
    files[4].write_bytes(b"\xff\x00\n\n\n")
    files[5].write_text(",".join(["epoch", *METRICS, "run"]) + "\n" + "1," * len(METRICS) + "1,7\n")
    metrics = read_metrics(read_study(study).runs)
    assert len(metrics) == 14 * 3 + 1 + 5
    assert metrics["epoch"].max() == 5


def test_metrics_of_another_version_are_read_by_their_names(study):
    """One that has columns in another order, one more that we do not know, and lacks a time."""
    whole = read_metrics(read_study(study).runs)
    path, *_ = sorted(study.glob("*simplenetv2*/metrics.csv"))
    table = pd.read_csv(path).iloc[:, ::-1].drop(columns="seconds").assign(val_error=1.0)
    table.to_csv(path, index=False)
    expected = whole.copy()
    expected.loc[expected["run_id"] == path.parent.name, "seconds"] = np.nan
    pd.testing.assert_frame_equal(read_metrics(read_study(study).runs), expected)


def draw(summary, table, **options):
    return draw_errors(summary, table, **{"baseline": "resnet34", **options})


def test_figure_axes_order_baseline_and_colours(study):
    table = read_study(study).runs
    summary = summarize(table)
    figure = draw(summary, table)
    [axis] = figure.axes
    assert axis.get_title() == "cifar10, simplenetv2"
    assert axis.get_xscale() == "log"
    assert axis.xaxis.get_transform().base == 2
    assert [t.get_text() for t in axis.get_xticklabels()] == ["2", "4", "8"]
    assert axis.xaxis_inverted()
    assert axis.get_ylabel() == "test error (%)"
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["BN"].get_color() == STYLES["bn"][0]
    assert lines["GN"].get_color() == STYLES["gn"][0]
    assert lines["BN"].get_marker() != lines["GN"].get_marker()
    assert list(lines["GN"].get_ydata()) == pytest.approx([17.35, 17.6, 18.1])
    dashed = lines["resnet34 BN, batch size 128"]
    assert dashed.get_linestyle() == "--"
    assert list(dashed.get_ydata()) == [7.9, 7.9]
    points = [line for line in axis.lines if line.get_marker() == "."]
    assert sorted(len(line.get_xdata()) for line in points) == [9, 9]
    assert not draw(summary, table, order="ascending").axes[0].xaxis_inverted()
    assert len(draw(summary, table, baseline=None).axes) == 2


def test_the_baseline_model_alone_has_a_panel(tmp_path):
    path = tmp_path / "resnet"
    for size in (2, 4):
        put(path, 10.0 + size, "model=resnet34", "norm=gn", batch_size=size)
    table = read_study(path).runs
    [axis] = draw(summarize(table), table).axes
    assert axis.get_title() == "cifar10, resnet34"
    assert list(axis.lines[0].get_ydata()) == [12.0, 14.0]


def test_published_values_are_hollow_markers(study):
    table = read_study(study).runs
    figure = draw(summarize(table), table, reference=published("deuscher2021"))
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [line.get_label() for line in hollow] == [
        "BN, deuscher2021 (corrected)", "GN, deuscher2021 (corrected)",
    ]  # fmt: skip
    assert list(hollow[0].get_ydata()) == [16.47, 15.46, 14.86, 14.55, 14.05, 13.24]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [
        "2", "4", "8", "16", "32", "64",
    ]  # fmt: skip
    dotted = {line.get_label(): line for line in figure.axes[0].lines}[
        "resnet34 BN, deuscher2021 (corrected)"
    ]
    assert list(dotted.get_ydata()) == [6.87, 6.87]
    with pytest.raises(ConfigError, match=r"figure\.reference=nobody: choose one of deuscher2021"):
        published("nobody")


def test_norms_of_a_user_s_own_get_a_style(tmp_path):
    path = tmp_path / "own"
    for number in range(20):
        put(path, 10.0, norm=settings("norm=gn")["norm"] | {"name": f"mine{number}"})
    put(path, 11.0, "norm=gn")
    table = read_study(path).runs
    [axis] = draw(summarize(table), table).axes
    assert {"GN", "MINE0", "MINE19"} < {line.get_label() for line in axis.lines}
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.lines]
    assert looks[0] == (*STYLES["gn"][:1], "-", "s")
    assert len({look[:2] for look in looks}) == 21  # where there are no markers
    assert len({look[::2] for look in looks}) == 21  # where there are points alone


def test_at_one_batch_size_the_only_setting_is_the_axis(tmp_path):
    path = tmp_path / "ghost"
    for images, error in ((2, 18.0), (8, 17.0), (64, 16.0)):
        for seed in (0, 1):
            settings = (f"norm.images={images}", "batch_size=64")
            put(path, error + seed, "norm=ghost_bn", *settings, seed=seed, batch_size=64)
    table = read_study(path).runs
    [axis] = draw(summarize(table), table).axes
    assert axis.get_xlabel() == "norm.images"
    assert axis.get_title() == "cifar10, simplenetv2, batch size 64"
    line = {line.get_label(): line for line in axis.lines}["GHOST_BN"]
    assert list(line.get_xdata()) == [2, 8, 64]
    assert list(line.get_ydata()) == [18.5, 17.5, 16.5]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["2", "8", "64"]


def test_curves_have_a_panel_for_every_batch_size(study):
    table = read_study(study).runs
    figure = draw_curves(read_metrics(table), [], "descending")
    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titles == [
        "cifar10, resnet34\nbatch size 128",
        *(f"cifar10, simplenetv2\nbatch size {size}" for size in (8, 4, 2)),
    ]
    means = [line for line in figure.axes[-1].lines if line.get_alpha() is None]
    assert [list(line.get_xdata()) for line in means] == [[1, 2, 3], [1, 2, 3]]


def test_runs_of_different_versions_together_are_noted(study):
    assert read_study(study).notes == []
    one, *_ = sorted(study.glob("*/run.json"))
    record = json.loads(one.read_text())
    record["versions"]["gnbench"] = "0.2.0"
    one.write_text(json.dumps(record))
    [note] = read_study(study).notes
    assert note == (
        "runs of different versions of gnbench together: 0.1.0 (18 runs), 0.2.0 (1 runs)"
    )
    record["status"] = "failed"  # it has no result that could be compared
    one.write_text(json.dumps(record))
    assert read_study(study).notes == []


def test_runs_on_different_devices_together_are_noted(study):
    for path, device in zip(
        sorted(study.glob("*/run.json")),
        ["cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA H200)", "cpu (AMD EPYC, 1 threads)"] * 10,
        strict=False,
    ):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"device": device}))
    [note] = read_study(study).notes
    assert note == "runs on different devices together: NVIDIA H200 (13 runs), AMD EPYC (6 runs)"


def test_it_writes_what_the_contract_says_beside_the_runs(study, capsys, monkeypatch):
    cut, *_ = sorted(study.glob("*-gn-*/metrics.csv"))
    cut.write_text(cut.read_text()[:-5])
    monkeypatch.setenv("HOME", str(study.parents[1]))
    write_studies("~/outputs", reference="wu2018")
    files = {p.name for p in study.iterdir() if p.is_file()}
    assert files == {
        "results.csv", "summary.csv", "comparisons.csv", "verdict.md", "table.tex",
        "figure.png", "figure.svg", "figure.pdf", "curves.png",
    }  # fmt: skip
    results = pd.read_csv(study / "results.csv")
    assert len(results) == 19
    assert {"run_id", "status", *CELL, "seed", "test_error", "optimizer.lr"} <= set(results)
    said = capsys.readouterr().out
    assert "study demo: 19 finished runs" in said
    assert "17.35 ± 0.56 (3)" in said
    assert f"{cut} ends with epoch 2 of 3; the result stands in run.json" in said
    assert "figure.reference=wu2018: no values for these networks" in said
    assert read_runs(study.parent, "demo").equals(read_runs("~/outputs"))


def test_the_reference_runs_give_the_tables_committed_with_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path("outputs/reference/figure3")
    runs = read_study(path).runs
    for name, table in (("results.csv", runs), ("summary.csv", summarize(runs))):
        assert table.to_csv(index=False) == (path / name).read_text()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, suffix):
    put(tmp_path / "a", 10.0, "norm=gn")
    table = read_study(tmp_path / "a").runs
    for name in ("one", "two"):
        save(draw(summarize(table), table), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": "no"}, "no runs there yet"),
        ({"study": "other"}, "study=other: no runs .* choose one of demo"),
        ({"study": "../demo"}, "not a plain name"),
        ({"order": "random"}, "figure.order=random: choose one of ascending, descending"),
        ({"ordre": "ascending"}, "figure.ordre: there is no such setting"),
        ({"reference": "me"}, "figure.reference=me: choose one of"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(study, arguments, message):
    with pytest.raises(ConfigError, match=message):
        write_studies(**{"outputs": study.parent, **arguments})
    assert not (study / "results.csv").exists()


def test_a_study_of_failures_alone_has_tables_and_no_figure(tmp_path, capsys):
    path = tmp_path / "bad"
    put(path, 1.0, status="failed", epochs=0)
    write_studies(tmp_path)
    assert (path / "results.csv").exists()
    assert not (path / "figure.png").exists()
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_thousand_runs_are_read(tmp_path):
    path = tmp_path / "many"
    template = put(path, 10.0, "norm=gn", epochs=30)
    record = template.record()
    metrics = template.metrics_path.read_bytes()
    for seed in range(1, 10_000):
        record["config"]["seed"] = record["seed"] = seed
        folder = path / f"run{seed}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.csv").write_bytes(metrics)
    table = read_study(path).runs
    assert summarize(table)["n_seeds"].tolist() == [10_000]
    assert len(read_metrics(table)) == 300_000
