"""The real commands in processes of their own, as a user types them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import ROOT, measured, started

HEAVY = ("torch", "torchvision", "pandas", "matplotlib")


def imported(cli, *arguments, module="gnbench"):
    """Name the heavy packages that a command imports."""
    script = (
        f"import runpy, sys; sys.argv = {[module, *arguments]!r}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return eval(done.stdout.rpartition("HEAVY ")[2])


def wait_for(path, text="", seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {path}")


def statuses(outputs):
    return {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in Path(outputs).rglob("run.json")
    }


def test_a_single_run_then_aggregate(cli, tmp_path):
    done = cli(*tiny.OVERRIDES, "norm=gn", "batch_size=2", check=0)
    [directory] = (tmp_path / "outputs" / "default").glob("tiny-simplenetv2-gn-bs2-seed0-*")
    files = {p.name for p in directory.iterdir()}
    assert files == {"run.json", "metrics.csv", "model.pt", "gnbench.log", ".lock"}
    assert "epoch 2/2" in done.stderr
    assert "completed" in (directory / "gnbench.log").read_text()
    done = cli(module="gnbench.aggregate", check=0)
    assert "study default: 1 finished runs" in done.stdout
    assert (directory.parent / "figure.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs"]


def test_a_sweep_fills_one_study_and_repeating_it_trains_nothing(cli, tmp_path):
    sweep = ("-m", *tiny.OVERRIDES, "norm=choice(bn,gn)", "batch_size=range(8,17,8)", "study=grid")
    done = cli(*sweep, check=0)
    table = done.stdout.splitlines()
    assert table[0].split() == ["status", "test", "error", "run", "directory"]
    assert [line.split()[0] for line in table[1:]] == ["completed"] * 4
    assert len(statuses(tmp_path)) == 4
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.csv")}
    done = cli(*sweep, check=0)
    assert done.stderr.count("is completed (test error") == 4
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.csv")} == before
    # The same cell as a single run finds the directory of the sweep.
    done = cli(*tiny.OVERRIDES, "norm=bn", "batch_size=16", "study=grid", check=0)
    assert "is completed" in done.stderr
    assert len(statuses(tmp_path)) == 4


def test_a_failing_cell_is_recorded_and_the_sweep_goes_on(cli, tmp_path):
    """Found in training, not before: the dataset of one cell breaks when it is loaded."""
    module = tmp_path / "breaking.py"
    module.write_text(
        "from tests import tiny\n"
        "def good(root=None): return tiny.dataset()\n"
        "def bad(root=None): raise RuntimeError('the images are gone')\n"
    )
    done = cli(
        "-m",
        *tiny.OVERRIDES,
        "dataset._target_=breaking.bad,breaking.good",
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        check=1,
    )
    assert sorted(statuses(tmp_path).values()) == ["completed", "failed"]
    lines = done.stdout.splitlines()
    assert lines[1].startswith("failed")
    assert "the images are gone" in lines[2]
    assert lines[3].startswith("completed")
    # A single failing run shows where it failed.
    done = cli(
        *tiny.OVERRIDES,
        "dataset._target_=breaking.bad",
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        check=1,
    )
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_size=0"], "batch_size=0: must be an integer >= 1"),
        (["epoks=3"], "Key 'epoks'"),
        (["norm.num_groups=24"], "num_groups=24 does not divide 32 channels"),
        (["study=../x"], "study='../x' is not a plain name"),
        (["-m", "norm=bn,gn", "norm.momentum=0.1"], "Key 'momentum'"),
        (["-m", "norm=gn", "batch_size=2,0,64"], "batch_size=0: must be an integer >= 1"),
        (["batch_size=2,4"], "Ambiguous value"),
        (["norm=nope"], "Available options in 'norm'"),
        (["dataset=null"], "Config group override must be a string"),
        (["model"], "Error parsing override 'model'"),
        (["norm._target_=nope.nope"], "norm._target_=nope.nope: No module named 'nope'"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(cli, tmp_path, arguments, message):
    done = cli(*arguments, check=2)
    assert done.stderr.startswith("gnbench: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_every_bad_cell_of_a_sweep_is_named(cli, tmp_path):
    done = cli("-m", "norm=gn", "norm.num_groups=16,24,48", "batch_size=2,0", check=2)
    assert done.stderr.splitlines() == [
        "gnbench: batch_size=0: must be an integer >= 1",
        "model=simplenetv2, norm=gn: num_groups=24 does not divide 32 channels: use 1, 2, 4, 8, "
        "16, 32",
        "model=simplenetv2, norm=gn: num_groups=48 does not divide 32 channels: use 1, 2, 4, 8, "
        "16, 32",
    ]
    assert list(tmp_path.iterdir()) == []


def test_no_data_is_one_clear_line_that_says_what_to_do(cli, tmp_path):
    """A machine with no network and no package clients: nothing on PATH, every proxy dead."""
    dead = "http://127.0.0.1:9"
    env = {"PATH": "/nonexistent", "GNBENCH_DATA": str(tmp_path / "data")}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), dead)
    done = cli("norm=gn", env=env, check=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gnbench: cifar10 is not to be had here. Tried: files laid down by hand")
    assert "npm is not installed" in last
    assert f"into {tmp_path / 'data'}" in last
    assert "Traceback" not in done.stderr
    assert set(statuses(tmp_path).values()) == {"failed"}


def test_a_sweep_that_cannot_be_run_again_says_so_and_fails(cli, tmp_path):
    """The old results stand, but that is not what was asked for."""
    module = tmp_path / "coming_and_going.py"
    module.write_text(
        "import os\nfrom tests import tiny\nfrom gnbench.datasets import DataError\n"
        "def images(root=None):\n"
        "    if 'GONE' in os.environ: raise DataError('the images are gone')\n"
        "    return tiny.dataset()\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "dataset._target_=coming_and_going.images")
    cli(*sweep, env=env, check=0)
    done = cli(*sweep, "rerun=true", env={**env, "GONE": "1"}, check=1)
    assert done.stdout.count("the images are gone") == 2
    assert done.stderr.count("the images are gone") == 2
    assert set(statuses(tmp_path).values()) == {"completed"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_an_interrupted_sweep_resumes_and_ends_as_if_it_never_was(cli, tmp_path, number, code):
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "epochs=60", "dataset.augmentation=none")
    process = started(tmp_path, "gnbench", *sweep)
    until = time.monotonic() + 120
    while not list(tmp_path.rglob("metrics.csv")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "interrupted; the same command resumes it" in err
    assert "Traceback" not in err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["interrupted", "missing"]
    [log] = tmp_path.rglob("gnbench.log")
    cli(*sweep, check=0)
    assert "resumes after step" in log.read_text()
    cli(*sweep, "study=whole", check=0)
    for name in statuses(tmp_path / "outputs" / "whole"):
        halves, whole = (
            measured(tmp_path / "outputs" / study / name / "metrics.csv")
            for study in ("default", "whole")
        )
        assert halves == whole
        assert len(whole) == 61


def test_presets_that_are_grids_sweep_and_the_command_line_wins(cli, tmp_path):
    done = cli(
        "experiment=quickstart",
        *tiny.OVERRIDES,
        "dataset.train_size=null",
        "batch_size=8",
        "norm=ln,none",
        "seed=3",
        check=0,
    )
    assert len(done.stdout.splitlines()) == 3
    assert {name.rpartition("-")[0] for name in statuses(tmp_path)} == {
        "tiny-simplenetv2-ln-bs8-seed3",
        "tiny-simplenetv2-none-bs8-seed3",
    }
    assert (tmp_path / "outputs" / "quickstart").is_dir()


def test_joblib_launcher_runs_the_cells_side_by_side(cli, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = cli(
        "-m", *tiny.OVERRIDES, "norm=bn,gn", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        check=0,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["completed"] * 2
    plain = cli("-m", *tiny.OVERRIDES, "norm=bn,gn", check=0)  # the same directories
    assert plain.stderr.count("is completed") == 2


def test_help_and_cfg_import_nothing_heavy(cli):
    assert imported(cli, "--help") == []
    assert imported(cli, "--cfg", "job") == []
    assert imported(cli, "--help", module="gnbench.aggregate") == ["pandas"]
    assert imported(cli, "--help", module="gnbench.bench") == []


def test_aggregate_does_not_import_torch(cli, tmp_path):
    cli(*tiny.OVERRIDES, check=0)
    heavy = imported(cli, f"outputs={tmp_path}/outputs", module="gnbench.aggregate")
    assert heavy == ["pandas", "matplotlib"]


def test_training_imports_neither_pandas_nor_matplotlib(cli, tmp_path):
    heavy = imported(cli, *tiny.OVERRIDES, f"outputs={tmp_path}/outputs")
    assert heavy == ["torch"]


def test_help_is_something_a_newcomer_can_act_on(cli):
    text = cli("--help", check=0).stdout
    for words in (
        "python -m gnbench experiment=quickstart",
        "python -m gnbench -m norm=bn,gn batch_size=2,4,8,16,32,64",
        "norm: bn, gn, in, ln, lrn, none, syncbn",
        "outputs/<study>/<run id>/",
    ):
        assert words in text
    assert "$" not in text.replace("$(gnbench", "").replace("${", "")


def test_tab_completion_offers_options_and_keys(cli):
    def complete(line):
        env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        return cli("-sc", "query=bash", env=env, check=0).stdout.split()

    assert set(complete("gnbench norm=")) == {
        f"norm={n}" for n in ("bn", "gn", "in", "ln", "lrn", "none", "syncbn")
    }
    assert complete("gnbench batch_s") == ["batch_size="]
    assert complete("gnbench optimizer.weight") == ["optimizer.weight_decay="]


def test_bad_input_to_aggregate(cli, tmp_path):
    done = cli(module="gnbench.aggregate", check=2)
    assert done.stderr == (
        "gnbench: outputs=outputs: no runs there yet; begin with: python -m gnbench\n"
    )
    assert cli("study=a", "figure.ordre=x", module="gnbench.aggregate", check=2).stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_error_is_there_for_those_who_ask(cli):
    done = cli("batch_size=abc", env={"HYDRA_FULL_ERROR": "1"}, check=2)
    assert "Traceback" in done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, so that nothing is left in the checkout; install it aside."""
    source = tmp_path_factory.mktemp("source") / "gnbench"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", "outputs", ".venv", "*.egg-info", "build"),
    )
    target = tmp_path_factory.mktemp("installed")
    for step in (
        [
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(target.parent / "dist"),
            str(source),
        ],
        ["install", "--no-deps", "--no-index", "--target", str(target)],
    ):
        wheels = (
            [str(p) for p in (target.parent / "dist").glob("*.whl")] if step[0] == "install" else []
        )
        subprocess.run(
            [sys.executable, "-m", "pip", "-q", *step, *wheels], check=True, capture_output=True
        )
    return target


def test_the_installed_wheel_runs_from_anywhere(wheel, tmp_path):
    assert (wheel / "gnbench" / "conf" / "experiment" / "figure3.yaml").exists()
    env = {**os.environ, "PYTHONPATH": str(wheel), "GNBENCH_DATA": str(tmp_path / "data")}
    run = (
        "dataset=fashion_mini", "dataset.train_size=40", "batch_size=20", "epochs=1",
        "progress=lines",
    )  # fmt: skip

    def call(command, *arguments):
        return subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip

    where = call(["-c", "import gnbench; print(gnbench.__file__)"]).stdout
    assert where.startswith(str(wheel))
    call([str(wheel / "bin" / "gnbench")], *run)
    call(["-m", "gnbench"], *run, "seed=1")
    done = call([str(wheel / "bin" / "gnbench-aggregate")])
    assert "study default: 2 finished runs" in done.stdout
    [record] = [json.loads(p.read_text()) for p in tmp_path.rglob("*seed1*/run.json")]
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["versions"]["gnbench"])  # no commit in a wheel
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs"]
