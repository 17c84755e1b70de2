"""The page of a study: what stands in it, and what a browser makes of it (tests/test_page.py)."""

import html
import itertools
import json
import math
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from gnbench import ConfigError
from gnbench.aggregate.__main__ import write_studies
from gnbench.aggregate.report import commands, contents
from gnbench.aggregate.report.answer import leaders
from gnbench.aggregate.report.contents import Look, Shown
from gnbench.aggregate.statistics import intervals, summarize
from gnbench.aggregate.study import read_study
from gnbench.archive import ArchiveConfig, archive
from gnbench.composition import composed
from gnbench.config import RunConfig
from gnbench.identity import run_id
from tests.conftest import ROOT
from tests.laid_down import page, put, settings

LOOK = Look("descending", "resnet34", "bn", [])
SHIFTS = (-0.3, 0.0, 0.6)
EVIL = "<script>alert('name')</script>&\"'"


def data_of(path):
    """Return the numbers that the scripts of a page read."""
    [text] = re.findall(
        r'<script type="application/json" id="data">(.*)</script>', path.read_text()
    )
    return json.loads(text)


def section(path, name):
    """Return the words of a section of a page."""
    [text] = re.findall(rf'<section id="{name}".*?</section>', path.read_text(), re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def grid(path, sizes=(2, 4, 8), seeds=3, **more):
    for seed, shift in enumerate(SHIFTS[:seeds]):
        for size in sizes:
            put(path, 20 - size / 4 + shift, "norm=bn", batch_size=size, seed=seed, **more)
            put(path, 17 + size / 8 + shift, "norm=gn", batch_size=size, seed=seed, **more)


def lay_down(path):
    """Two norms at three batch sizes over three seeds, and the baseline."""
    grid(path)
    put(path, 7.9, "model=resnet34", "norm=bn", batch_size=128, epochs=5)


@pytest.fixture
def study(tmp_path):
    lay_down(tmp_path / "outputs" / "demo")
    return tmp_path / "outputs" / "demo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The study and its page, which no test changes."""
    path = tmp_path_factory.mktemp("demo") / "outputs" / "demo"
    lay_down(path)
    return path, page(path.parent, "demo")


def test_its_numbers_are_those_of_the_tables(demo):
    study, written = demo
    data = data_of(written)
    summary = summarize(read_study(study).runs)
    assert len(data["cells"]) == len(summary) == 7
    for cell, (_, row) in zip(data["cells"], summary.iterrows(), strict=True):
        panel, line = data["panels"][cell["panel"]], data["lines"][cell["line"]]
        assert (panel["dataset"], panel["model"]) == (row["dataset"], row["model"])
        assert (line["label"], cell["size"]) == (row["norm"].upper(), row["batch_size"])
        mean, low, high = cell["m"]["test_error"]
        assert mean == pytest.approx(row["test_error_mean"], rel=1e-5)
        if row["n_seeds"] > 1:
            assert (low, high) == pytest.approx((row["pooled_low"], row["pooled_high"]), rel=1e-5)
        else:
            assert low is high is None
        assert cell["m"]["train_error"] == [50, None, None] if row["n_seeds"] == 1 else [50, 50, 50]
        x = cell["x"]
        assert (x["epochs"], x["seconds"], x["bytes"], x["peak"]) == (
            5 if row["n_seeds"] == 1 else 3, 4.5, None, 1000,
        )  # fmt: skip
        assert x["steps"] == 10 * x["epochs"]
    assert [panel["beside"] for panel in data["panels"]] == [True, False]
    assert [line["colour"] for line in data["lines"]] == ["#0072b2", "#d62728"]


def test_what_is_said_of_other_measures_is_what_the_tables_would_say_of_them(study):
    put(study, 30.0, "norm=gn", "optimizer.lr=0.01", batch_size=4, status="diverged")
    for seed, eps in ((0, 1e-5), (1, 1e-3), (2, 1e-3)):
        put(study, 15.0 + seed, "norm=ln", f"norm.eps={eps}", batch_size=4, seed=seed)
    runs = read_study(study).runs
    shown = Shown(read_study(study), runs, LOOK)
    measured = runs["test_error"] ** 1.5 / 100
    measured[[1, 4, 5]] = math.nan
    found = intervals(shown.summary, measured, runs["status"], shown.grouped)
    for i, (row, positions) in enumerate(shown.cells):
        values = measured.iloc[positions]
        told = [*found.loc[i, ["test_error_mean", "test_error_std"]], row["n_seeds"]]
        assert told == pytest.approx([values.mean(), values.std(), len(positions)], nan_ok=True)
    again = summarize(runs.assign(test_error=measured))
    pd.testing.assert_frame_equal(found, again[found.columns])


def test_of_an_archive_it_is_the_same_without_links(demo, tmp_path):
    study, written = demo
    given = {"outputs": str(study.parent), "study": "demo", "file": str(tmp_path / "demo.zip")}
    file = archive(ArchiveConfig.parse(given))
    found = page(file, "demo")
    assert found == tmp_path / "demo.tables" / "demo" / "report.html"
    expected, data = data_of(written), data_of(found)
    assert data["runs"].pop("link") == [""] * 19
    assert all(expected["runs"].pop("link"))
    assert data == expected


def test_published_values_are_overlaid_where_they_fit(demo):
    [_, panel] = data_of(demo[1])["panels"]
    gn, bn, baseline = panel["published"]
    assert gn["label"] == "GN, deuscher2021 (corrected)"
    assert (gn["batch_size"][0], gn["test_error"][0]) == (2, 14.35)
    assert bn["test_error"][-1] == 13.24
    assert (bn["colour"], bn["symbol"]) == ("#0072b2", "circle")
    assert baseline == {
        "label": "resnet34 BN, deuscher2021 (corrected)", "test_error": [6.87],
    }  # fmt: skip


def test_values_of_a_network_of_another_size_are_not_overlaid(tmp_path, capsys):
    small = {"model.channels": [16, 32, 64], "model.hidden": 64}
    study = tmp_path / "outputs" / "small"
    put(study, 20.0, *(f"{key}={value}".replace(" ", "") for key, value in small.items()))
    written = page(study.parent, "small")
    assert [panel["published"] for panel in data_of(written)["panels"]] == [[]]
    assert "Published:" not in written.read_text()
    write_studies(study.parent, reference="deuscher2021")
    assert "figure.reference=deuscher2021: no values for these networks" in capsys.readouterr().out


def test_the_table_of_runs_has_every_setting_that_differs_and_leads_to_each_directory(study):
    put(study, 30.0, "norm=gn", "optimizer.lr=0.01", batch_size=4, name="moved & renamed #1")
    (study / "moved & renamed #1" / "gnbench.log").write_text("hello\n")
    put(study, 1.0, "norm=gn", batch_size=4, seed=7, status="failed", epochs=0)
    path = page(study.parent, "demo")
    runs = data_of(path)["runs"]
    columns = {column["key"]: column for column in runs["columns"]}
    assert {"status", "norm", "batch_size", "seed", "test_error", "optimizer.lr"} <= set(columns)
    assert "optimizer.eps" not in columns
    assert sorted(set(columns["optimizer.lr"]["numbers"])) == [0.001, 0.01]
    assert "RuntimeError: it broke" in columns["error"]["texts"]
    records = [path.parent / unquote(link) / "run.json" for link in runs["link"]]
    assert [run_id(json.loads(r.read_text())["config"]) for r in records] == runs["id"]
    logs = [r.parent.name for r, log in zip(records, runs["log"], strict=True) if log]
    assert logs == ["moved & renamed #1"]
    above = page(study.parent)
    assert above == study.parent / "report.html"
    for link in data_of(above)["runs"]["link"]:
        assert (above.parent / unquote(link) / "run.json").is_file()


def test_what_stands_in_place_of_the_batch_size_is_an_axis(tmp_path):
    for images in (2, 4, 8):
        put(tmp_path / "g", 10.0 + images, "norm=ghost_bn", f"norm.images={images}", batch_size=64)
    data = data_of(page(tmp_path, "g"))
    assert data["studies"] == [{"name": "g", "setting": "norm.images"}]
    assert [cell["x"]["setting"] for cell in data["cells"]] == [2, 4, 8]
    [joined] = {cell["joined"] for cell in data["cells"]}
    assert data["lines"][joined]["label"] == "GHOST_BN"
    assert len({line["colour"] for line in data["lines"]}) == 1  # three lines of a norm, and theirs


def test_many_lines_of_one_norm_have_hues_of_their_own(tmp_path):
    for lr in range(1, 26):
        optimizer = settings("norm=gn")["optimizer"] | {"lr": lr / 1000}
        put(tmp_path / "g", 10.0, "norm=gn", optimizer=optimizer)
    lines = data_of(page(tmp_path, "g"))["lines"][:25]
    for colour in ("colour", "dark"):
        assert len({line[colour] for line in lines[:13]}) == 13
        assert len({(line[colour], line["dash"]) for line in lines}) == 25


def test_all_of_many_norms_look_different(tmp_path):
    for number in range(20):
        name = {"name": f"mine{number}"}
        put(tmp_path / "m", 10.0, norm=settings("norm=gn")["norm"] | name)
    lines = data_of(page(tmp_path, "m"))["lines"]
    for colour in ("colour", "dark"):
        assert len({(line[colour], line["dash"]) for line in lines}) == 20
        assert len({(line[colour], line["symbol"]) for line in lines}) == 20
    script = Path(contents.__file__).with_name("page.js").read_text()
    for symbol in contents.SYMBOLS.values():  # has its sign beside the boxes
        assert re.search(rf'^    "?{symbol}"?: "M', script, re.MULTILINE), symbol


def test_of_very_many_epochs_every_second_is_there_and_the_last(study, monkeypatch):
    monkeypatch.setattr(contents, "MOST_POINTS", 50)  # of 59
    data = data_of(page(study.parent, "demo"))
    assert data["curves"]["stride"] == 2
    epochs = {tuple(run["epoch"]) for run in data["curves"]["runs"].values()}
    assert epochs == {(2, 3), (2, 4, 5)}
    run = data["curves"]["runs"][str(data["cells"][0]["runs"][0])]
    assert [run["unit"] * passed for passed in itertools.accumulate(run["seconds"])] == [3, 6, 7.5]
    assert run["steps"] == 10


def test_the_answer_for_the_smallest_batch_size(demo):
    said = section(demo[1], "answer")
    assert "cifar10, simplenetv2, at batch size 2 Lowest test error GN : 17.35 % (95 %: " in said
    assert "Shown: the next, BN, errs 2.25 points more (95 %: +" in said
    assert "by Holm over 3 batch sizes" in said
    assert said.index("simplenetv2") < said.index("resnet34")
    assert "No other line has a result there" in said


def test_the_best_is_compared_with_the_second_as_the_verdict_compares_two(demo):
    shown = Shown(read_study(demo[0]), read_study(demo[0]).runs, LOOK)
    panel = shown.panels["cifar10", "simplenetv2"]
    [gn] = [line for line in panel.lines if line.label == "GN"]
    found = leaders(panel, [])
    assert [leader.batch_size for leader in found] == [2, 4, 8]
    for leader, one in zip(found, gn.comparisons, strict=True):
        assert leader.line.label == ("GN" if one.difference < 0 else "BN")
        assert leader.against.difference == pytest.approx(abs(one.difference))
        assert leader.against.p_holm == pytest.approx(one.p_holm)
        assert leader.shown == (one.shown != 0)


def test_the_best_of_three_is_compared_with_the_second_not_with_the_reference(study):
    for seed, shift in enumerate(SHIFTS):
        put(study, 17.3 + shift, "norm=ln", batch_size=2, seed=seed)
    said = section(page(study.parent, "demo"), "answer")
    assert "Not shown: the next, LN, errs 0.05 points more" in said
    assert "points would be shown (power 80 %)" in said


def test_what_one_seed_cannot_show_is_said(tmp_path):
    grid(tmp_path / "one", sizes=(32, 64), seeds=1)
    said = section(page(tmp_path, "one"), "answer")
    assert "BN : 11.70 % (1 seed, no interval)" in said
    assert "Not shown: the next, GN, errs 9.00 points more, but a single seed" in said
    assert "At batch size 2 No run of this study. Published: GN 14.35 %, BN 16.47 % by deu" in said


def test_memory_stands_beside_the_error(tmp_path):
    for norm, error, held in (("bn", 20.0, 3 * 2**20), ("gn", 17.0, 200 * 2**20)):
        run = put(tmp_path / "m", error, f"norm={norm}")
        run.write_record(run.record() | {"activation_bytes": held})
    path = page(tmp_path, "m")
    assert "Memory 200 MiB held for the backward pass; BN: 3.0 MiB." in section(path, "answer")
    assert sorted(cell["x"]["bytes"] / 2**20 for cell in data_of(path)["cells"]) == [3, 200]


def test_what_diverged_is_not_the_best_and_is_named(study):
    put(study, 90.0, "norm=gn", batch_size=2, seed=9, status="diverged")
    path = page(study.parent, "demo")
    assert "at batch size 2 Lowest test error BN" in section(path, "answer")
    assert "Diverged GN" in section(path, "answer")
    assert "Diverged (1) cifar10-simplenetv2-gn-bs2-seed9" in section(path, "gaps")


def test_an_error_of_none_is_the_lowest_and_has_not_diverged(tmp_path):
    for seed in (0, 1, 2):
        put(tmp_path / "exact", 0.5 + seed / 10, "norm=bn", seed=seed)
        put(tmp_path / "exact", 0.0, "norm=gn", seed=seed)
    written = page(tmp_path, "exact")
    assert "Lowest test error GN : 0.00 % (3 seeds, no interval)" in section(written, "answer")
    assert "an error of 0 or 100 % has no variance" in section(written, "answer")
    assert "Diverged" not in section(written, "answer")


@pytest.mark.parametrize("cell", ["1" + "0" * 400, "inf", "nan"])
def test_numbers_that_are_none_cost_their_epoch(tmp_path, cell):
    run = put(tmp_path / "odd", 15.0, "norm=gn")
    header, *rows = run.metrics_path.read_text().splitlines()
    run.metrics_path.write_text("\n".join([header, *rows, ",".join([cell] * 11), ""]))
    [curve] = data_of(page(tmp_path, "odd"))["curves"]["runs"].values()
    assert len(curve["test_error"]) == 3


def test_what_is_missing_failed_or_damaged_is_named(study):
    put(study, 1.0, "norm=gn", batch_size=2, seed=7, status="failed")
    put(study, 1.0, "norm=gn", batch_size=2, seed=8, status="out_of_memory")
    put(study, 12.0, "norm=gn", batch_size=32)
    for name, text in (("half", "{"), ("odd", '{"status": "completed", "config": {"model": 3}}')):
        (study / name).mkdir()
        (study / name / "run.json").write_text(text)
    cut, *_ = sorted(study.glob("*-gn-bs8-*/metrics.csv"))
    cut.write_text(cut.read_text()[:-5])
    (study / "evaluations.csv").write_text("not,our,table\n1,2,3\n")
    said = section(page(study.parent, "demo"), "gaps")
    for words in (
        "Failed (1) cifar10-simplenetv2-gn-bs2-seed7", "RuntimeError: it broke",
        "Out of memory (1) cifar10-simplenetv2-gn-bs2-seed8", "Missing (",
        "cifar10-simplenetv2-bn-bs32-seed0 (others of its grid ran)", "Left out (3)", "/half:",
        "/odd:", "evaluations.csv is not a table of gnbench.evaluate", "ends with epoch 2 of 3",
    ):  # fmt: skip
        assert words in said


def test_a_study_without_a_finished_run_has_a_page(tmp_path):
    cell = {"dataset": "a", "model": "b", "norm": "c", "batch_size": 2, "seed": 0}
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "sweep-00000000.json").write_text(
        json.dumps([{"run_id": "a-b-c", **cell}])
    )
    put(tmp_path / "failed", 1.0, status="failed", epochs=0)
    for name in ("planned", "failed", ["planned", "failed"]):
        path = page(tmp_path, name)
        assert "nothing can be said" in section(path, "answer")
        assert data_of(path)["cells"] == []
    assert "a-b-c (planned by a sweep)" in section(path, "gaps")
    assert path == tmp_path / "report.html"


def test_names_are_text_and_never_markup(tmp_path):
    path = tmp_path / "evil"
    for group in ("norm", "model", "dataset"):
        config = settings("norm=gn")
        folder = f"{group}<script>alert(2)"
        put(path, 10.0, "norm=gn", name=folder, **{group: config[group] | {"name": EVIL}})
    run = put(path, 1.0, "norm=bn", status="failed", name="failed")
    run.write_record(run.record() | {"error": EVIL, "device": EVIL, "started": EVIL})
    written = page(tmp_path, "evil")
    text = written.read_text()
    assert "<script>alert" not in text.lower()
    ours = re.sub(r"(?s)(<script>)(?=/\*).*?(</script>)", r"\1\2", text)  # without plotly.js
    assert len(re.findall("<script", ours)) == 3
    labels = {line["label"] for line in data_of(written)["lines"]}
    assert labels == {"GN", EVIL.upper()}
    assert html.escape(EVIL) in text


def test_it_is_one_file_under_six_megabytes_that_loads_nothing(demo):
    study, path = demo
    text = path.read_text()
    assert path.stat().st_size < 6_000_000
    ours = text[: text.index('<script type="application/json"')]
    assert re.findall(r'(?:src|href)="(?!#|data:)', ours) == []
    assert "@import" not in ours
    assert page(study.parent, "demo").read_text() == text  # the same runs, the same bytes


def test_evaluations_are_means_over_seeds(tmp_path):
    path = tmp_path / "e"
    rows = ["run_id,dataset,model,norm,batch_size,seed,weights,trained_images,statistics,images,"
            "test_error,test_wrong,test_total"]  # fmt: skip
    for seed, error in enumerate((10.0, 12.0)):
        run = put(path, error, "norm=bn", batch_size=8, seed=seed)
        for name, images, more in (("ema", "", 0), ("batch", 2, 5), ("precise", 8, 1)):
            cell = f"{run.path.name},cifar10,simplenetv2,bn,8,{seed},0,8"
            rows.append(f"{cell},{name},{images},{error + more},1,9")
    rows.append("other,cifar10,simplenetv2,bn,8,0,0,8,ema,,1.0,1,9")  # of a run that is gone
    (path / "evaluations.csv").write_text("\n".join([*rows, ""]))
    found = {entry["statistics"]: entry for entry in data_of(page(tmp_path, "e"))["evaluations"]}
    assert {name: entry["error"] for name, entry in found.items()} == {
        "ema": 11, "batch": 16, "precise": 12,
    }  # fmt: skip
    assert {name: entry["own"] for name, entry in found.items()} == {
        "ema": False, "batch": False, "precise": True,
    }  # fmt: skip
    assert all(entry["seeds"] == 2 for entry in found.values())


@pytest.mark.slow
def test_its_commands_train_the_very_runs_again(tmp_path):
    study = tmp_path / "demo"
    grid(study, sizes=(2, 4), seeds=2)
    put(study, 1.0, "norm=ghost_bn", "norm.images=2", "batch.lr_rule=sqrt", batch_size=4)
    put(study, 1.0, "norm=bn", "model.channels=[16,16,16]", "optimizer.eps=1e-5", batch_size=4)
    found = read_study(study).runs
    lines, notes = commands.commands(found["directory"].tolist(), "demo")
    assert notes == []
    assert [line for line in lines if "norm=bn,gn" in line] == [
        ["gnbench", "-m", "model=simplenetv2", "norm=bn,gn", "dataset=cifar10", "optimizer=adamw",
         "schedule=cosine", "batch=fixed_epochs", "epochs=30", "batch_size=2,4", "seed=0,1",
         "study=demo"]
    ]  # fmt: skip
    again = set()
    for line in lines:
        words = [word for word in line if "=" in word]
        axes = {w.partition("=")[0]: w.partition("=")[2].split(",") for w in words if "[" not in w}
        fixed = [word for word in words if "[" in word]
        for combination in pd.MultiIndex.from_product(axes.values()):
            overrides = [f"{k}={v}" for k, v in zip(axes, combination, strict=True)]
            again.add(RunConfig.parse(composed(*overrides, *fixed)).run_id)
    assert again == set(found["run_id"])


def test_a_part_of_one_s_own_is_said_not_to_be_in_the_command(tmp_path):
    config = settings("norm=gn")
    put(tmp_path / "own", 10.0, norm=config["norm"] | {"name": "mine"})
    said = section(page(tmp_path, "own"), "repeat")
    assert "norm=mine" in said
    assert "the command does not say all of it" in said


def test_aggregate_writes_it_as_its_last_step(study, capsys):
    write_studies(study.parent, "demo", report=True, order="ascending")
    assert data_of(study / "report.html")["order"] == "ascending"
    assert capsys.readouterr().out.endswith(f"{study / 'report.html'}\n")
    assert (study / "summary.csv").is_file()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"outputs": "no"}, "no runs there yet"),
        ({"study": "other"}, "study=other: no runs .* choose one of demo"),
        ({"study": ["demo", "other"]}, "study=other: no runs"),
        ({"study": ["../demo"]}, "not a plain name"),
        ({"order": "random"}, "figure.order=random: choose one of ascending, descending"),
        ({"ordre": "ascending"}, "figure.ordre: there is no such setting"),
        ({"registered": [0]}, "figure.registered"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(study, chosen, message):
    with pytest.raises(ConfigError, match=message):
        page(**{"outputs": study.parent, **chosen})
    assert list(study.parent.rglob("*.html")) == []


def test_without_plotly_it_says_what_to_install_and_writes_nothing(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    before = sorted(study.parent.rglob("*"))
    for call in (lambda: page(study.parent), lambda: write_studies(study.parent, report=True)):
        with pytest.raises(ConfigError, match=r"pip install 'gnbench\[report\]'"):
            call()
    assert sorted(study.parent.rglob("*")) == before


def test_the_command_writes_the_page_or_says_in_one_line_why_not(cli, study, tmp_path):
    done = cli("study=[demo]", module="gnbench.report", check=0)
    assert done.stdout == "outputs/demo/report.html\n"
    (study / "report.html").unlink()
    done = cli("study=[demo,nope]", module="gnbench.report", check=2)
    assert done.stdout == ""
    assert done.stderr.startswith("gnbench: study=nope: no runs in outputs/nope; choose one of")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.rglob("report.html")) == []


@pytest.mark.parametrize("name", ["figure3", "ghost"])
def test_the_reference_studies_have_a_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(ROOT / "outputs" / "reference" / name)
    path = page(".")
    assert "Lowest test error" in section(path, "answer")
    assert math.isfinite(data_of(path)["cells"][0]["m"]["test_error"][0])
    assert bool(data_of(path)["evaluations"]) == (name == "ghost")
    assert Path("report.html").exists()
