"""A study in one file: the same runs, read in place, and nothing in it that names a place."""

import json
import shutil
import socket
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gnbench import ConfigError, read_runs, zipped
from gnbench.aggregate.__main__ import write_studies
from gnbench.aggregate.statistics import summarize
from gnbench.aggregate.study import read_metrics, read_study, short_metrics
from gnbench.archive import ArchiveConfig, archive, neutral
from gnbench.identity import run_id
from gnbench.runs.directory import read_correct
from gnbench.sweep.plan import find_studies, known_cells, plan_of
from tests.conftest import ROOT
from tests.laid_down import put, settings

SECRET = "/home/lovelace/projects"


def archived(path, **changed):
    given = {"outputs": str(path.parent), "study": path.name, "file": None}
    return archive(ArchiveConfig.parse(given | changed))


@pytest.fixture
def study(tmp_path):
    """Two norms at two batch sizes over two seeds, with all that a run and a study may have."""
    path = tmp_path / "outputs" / "demo"
    for seed in (0, 1):
        for size in (2, 8):
            for norm, error in (("bn", 20 - size), ("gn", 15)):
                run = put(path, error + seed, f"norm={norm}", batch_size=size, seed=seed)
                config = run.record()["config"]
                config["outputs"] = f"{SECRET}/outputs"
                config["dataset"]["root"] = f"{SECRET}/data"
                config["tracker"] = {
                    "name": "mlflow",
                    "_target_": "x",
                    "uri": "http://lovelace-host:5",
                }
                run.write_record(run.record() | {"config": config})
                run.save_correct(np.arange(10_000) % 5 < 4)
                (run.path / "model.pt").write_bytes(b"weights")
                (run.path / "gnbench.log").write_text(SECRET)
                (run.path / "heartbeat.json").write_text(SECRET)
    failed = put(path, 1.0, "norm=gn", seed=7, status="failed")
    error = f"WriteError: {SECRET}/outputs/demo/x on {socket.gethostname()} cannot be written"
    failed.write_record(failed.record() | {"error": error})
    (path / "evaluations.csv").write_text("run_id\n")
    name, data = plan_of([cell for cell in known_cells(path).values() if cell])
    (path / name).write_bytes(data)
    return path


def texts(file):
    with zipfile.ZipFile(file) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_what_is_read_from_an_archive_is_what_is_read_from_the_folder(study, tmp_path):
    file = archived(study)
    assert file == study.parent / "demo.zip"
    moved = tmp_path / "elsewhere" / "study of ada.zip"
    moved.parent.mkdir()
    file.rename(moved)
    here, there = read_runs(study.parent), read_runs(moved)
    assert there["run_id"].tolist() == [Path(d).name for d in there["directory"]]
    # All but the error that names a place.
    here, there = (table.drop(columns=["directory", "error"]) for table in (here, there))
    pd.testing.assert_frame_equal(here, there)
    [place] = find_studies(moved, archives=True)
    assert place == moved / "demo"
    found, original = read_study(place), read_study(study)
    pd.testing.assert_frame_equal(read_metrics(found.runs), read_metrics(original.runs))
    assert (found.missing, found.problems) == (original.missing, [])
    first = Path(found.finished["directory"].iloc[0])
    assert read_correct(first / "correct.npy", 10_000).sum() == 8000


def test_no_path_host_or_address_is_in_it_and_no_weights(study):
    found = texts(archived(study))
    assert {name.rpartition("/")[2].partition("-")[0] for name in found} == {
        "run.json", "metrics.csv", "correct.npy", "evaluations.csv", "sweep",
    }  # fmt: skip
    for secret in ("lovelace", "/home", socket.gethostname(), str(study), str(Path.home())):
        assert [name for name, data in found.items() if secret.encode() in data] == []
    errors = {json.loads(data)["error"] for name, data in found.items() if "run.json" in name}
    assert errors == {None, "WriteError: …"}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("it is '/mnt/my data/x y.npz' and/or 3/4 of it", "it is … and/or 3/4 of it"),
        ("no ~/runs, no C:\\Users\\ada\\x, no \\\\server\\share", "no …, no …, no …"),
        ("see https://ada:pw@host:80/x, please", "see … please"),
        ("File '/a/b.py', line 3 (/c/d.py:4)", "File …, line 3 (…:4)"),
        ("shape (3, 4) of model.weight: 1/2", "shape (3, 4) of model.weight: 1/2"),
    ],
)
def test_places_are_taken_out_of_a_sentence(said, kept):
    config = settings("norm=gn")
    assert neutral({"config": config, "device": said})["device"] == kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("RuntimeError: lost gpu03.cluster.edu:8080 (192.168.3.4)", "RuntimeError: …"),
        ("OSError: /home/jane doe/x: no such file", "OSError: …"),
        ("/home/jane doe/x: no such file", "…"),
        ("jane@gpu03 is gone", "…"),
        (None, None),
    ],
)
def test_of_an_error_only_its_type_is_told(said, kept):
    config = settings("norm=gn")
    assert neutral({"config": config, "error": said})["error"] == kept


@pytest.mark.parametrize("path", sorted(ROOT.glob("outputs/reference/*/*/run.json")), ids=str)
def test_no_committed_run_is_renamed(path):
    record = json.loads(path.read_text())
    clean = neutral(record)
    assert run_id(clean["config"]) == path.parent.name
    assert list(clean) == list(record)
    assert clean | {"config": 0} == record | {"config": 0}


def test_a_path_that_makes_the_run_what_it_is_is_refused(study):
    put(study, 5.0, "norm=gn", f"+norm.weights={SECRET}/w.pt")
    with pytest.raises(ConfigError, match=rf"norm\.weights={SECRET}/w.pt of .* names a place"):
        archived(study)
    assert not list(study.parent.glob("*.zip"))


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    one = archived(study)
    shutil.copytree(study, tmp_path / "again" / "demo")
    for path in (tmp_path / "again").rglob("*"):
        path.touch()
    other = archived(tmp_path / "again" / "demo", file=str(tmp_path / "new" / "copy.zip"))
    assert one.read_bytes() == other.read_bytes()


def test_aggregate_writes_beside_the_archive(study, tmp_path, capsys):
    file = archived(study, file=str(tmp_path / "shared" / "demo.zip"))
    before = file.read_bytes()
    write_studies(file)
    tables = tmp_path / "shared" / "demo.tables" / "demo"
    assert f"tables and figures are in {tables}\n" in capsys.readouterr().out
    assert file.read_bytes() == before
    summary = summarize(read_study(study).runs)
    assert (tables / "summary.csv").read_text() == summary.to_csv(index=False)
    assert {path.suffix for path in tables.iterdir()} == {
        ".csv", ".md", ".pdf", ".png", ".svg", ".tex",
    }  # fmt: skip
    results = pd.read_csv(tables / "results.csv")
    assert results["directory"].str.startswith(f"{file}/demo/").all()


def test_damaged_runs_are_named_and_the_others_archived(study, capsys):
    (study / "half").mkdir()
    (study / "half" / "run.json").write_text("{")
    unreadable = next(study.glob("*-bn-*")) / "as_published.csv"
    unreadable.mkdir()
    found = texts(archived(study))
    assert not any("half" in name or "as_published" in name for name in found)
    said = capsys.readouterr().out
    assert "9 runs" in said
    assert f"{study}/half: " in said
    assert f"{unreadable}: " in said


def test_a_damaged_place_in_an_archive_is_named(study):
    file = archived(study)
    with zipfile.ZipFile(file) as opened:
        members = opened.infolist()
    record, metrics = (
        next(member for member in members if fnmatch(member.filename, pattern))
        for pattern in ("*gn-bs2-seed0*/run.json", "*gn-bs8-seed1*/metrics.csv")
    )
    data = bytearray(file.read_bytes())
    for member in (record, metrics):
        start = member.header_offset + 30 + len(member.filename)
        data[start + 5 : start + 20] = bytes(15)
    file.write_bytes(data)
    [place] = find_studies(file, archives=True)
    found = read_study(place)
    [problem] = found.problems
    assert problem.startswith(f"{file}/{Path(record.filename).parent}: ")
    assert "is damaged in its archive" in problem
    assert len(found.finished) == 7
    [note] = short_metrics(found.finished, read_metrics(found.runs))
    assert f"{file}/{metrics.filename} ends with epoch 0 of 3" in note


def test_folders_and_files_in_an_archive_are_found_as_on_a_disk(tmp_path):
    names = ["s/a/run.json", "s/b/run.json", "s/.c/run.json", "s/plan-1.json", "t/x", "top"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.mkdir("s/empty")
        for name in names:
            opened.writestr(name, name)
            (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "s" / "empty").mkdir()

    def listed(root):
        found = [zipped.folders(root), zipped.folders(root / "s")]
        patterns = ((root, "*"), (root, "*/run.json"), (root / "s", "*/run.json"))
        patterns += ((root / "s", "plan-*.json"), (root / "s" / "a", "*"), (root / "no", "*"))
        found += [sorted(zipped.glob(folder, pattern)) for folder, pattern in patterns]
        return [[path.relative_to(root).as_posix() for path in paths] for paths in found]

    assert listed(tmp_path / "a.zip") == listed(tmp_path / "a")
    assert zipped.read_bytes(tmp_path / "a.zip" / "s" / "a" / "run.json") == b"s/a/run.json"
    for root in (tmp_path / "a.zip", tmp_path / "a"):
        with pytest.raises(FileNotFoundError):
            zipped.read_bytes(root / "s" / "no")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"study": None}, "study=null: an archive holds one study; choose one of demo"),
        ({"study": "other"}, "study=other: no runs"),
        ({"file": "demo.tar"}, r"file=demo.tar: an archive is a .zip; choose NAME.zip"),
    ],
)
def test_bad_input_is_refused(study, changed, message):
    with pytest.raises(ConfigError, match=message):
        archived(study, **changed)
    assert {path.name for path in study.parent.iterdir()} == {"demo"}


def test_a_zip_without_a_study_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as opened:
        opened.writestr("notes.txt", "hello")
    with pytest.raises(ConfigError, match=r"other\.zip: holds no study; take one that"):
        read_runs(tmp_path / "other.zip")


def test_the_commands_on_archives(cli, tmp_path, study):
    done = cli("study=demo", module="gnbench.archive", check=0)
    assert done.stdout.startswith("outputs/demo.zip: 9 runs, ")
    before = sorted(tmp_path.rglob("*"))
    [line] = cli("outputs=outputs/demo.zip", module="gnbench.status", check=2).stderr.splitlines()
    assert "is an archive, this needs a folder" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "none.zip").write_text("not a zip")
    with pytest.raises(ConfigError, match=r"none\.zip: not a whole archive .* fetch it again"):
        write_studies(tmp_path / "none.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["none.zip"]
