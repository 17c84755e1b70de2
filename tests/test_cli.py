"""The real commands in processes of their own, as a user types them."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from gnbench import datasets
from gnbench.check import compose
from gnbench.runs.runner import run
from gnbench.sweep.account import objective
from tests import tiny
from tests.conftest import ALL_CORES, ROOT, environment, measured, started, variant

HEAVY = ("torch", "torchvision", "pandas", "matplotlib", "plotly", "tensorboard", "mlflow", "wandb")


def imported(*arguments, module="gnbench"):
    """Name the heavy packages that a command imports."""
    script = (
        f"import runpy, sys; sys.argv = {[module, *arguments]!r}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return eval(done.stdout.rpartition("HEAVY ")[2])


def statuses(outputs):
    return {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in Path(outputs).rglob("run.json")
    }


def test_a_single_run_then_aggregate(cli, tmp_path):
    done = cli(*tiny.OVERRIDES, "norm=gn", "batch_size=2", check=0)
    [directory] = (tmp_path / "outputs" / "default").glob("tiny-simplenetv2-gn-bs2-seed0-*")
    files = {p.name for p in directory.iterdir()}
    assert files == {"run.json", "metrics.csv", "model.pt", "correct.npy", "gnbench.log", ".lock"}
    assert "epoch 2/2" in done.stderr
    assert "completed" in (directory / "gnbench.log").read_text()
    # A console that has no γ or –.
    done = cli(module="gnbench.aggregate", env={"PYTHONIOENCODING": "ascii"}, check=0)
    assert "study default: 1 finished runs" in done.stdout
    assert (directory.parent / "figure.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs"]


def test_a_sweep_fills_one_study_and_repeating_it_trains_nothing(cli, tmp_path):
    sweep = ("-m", *tiny.OVERRIDES, "norm=choice(bn,gn)", "batch_size=range(8,9)", "study=grid")
    done = cli(*sweep, check=0)
    table = done.stdout.splitlines()
    assert table[0].split() == ["status", "test", "error", "run", "directory"]
    assert [line.split()[0] for line in table[1:]] == ["completed"] * 2
    assert len(statuses(tmp_path)) == 2
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*-*/*.*")}
    done = cli(*sweep, check=0)
    assert done.stderr.count("is completed (test error") == 2
    # The same cell as a single run finds the directory of the sweep.
    done = cli(*tiny.OVERRIDES, "norm=bn", "study=grid", check=0)
    assert "is completed" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*-*/*.*")} == before


@pytest.mark.parametrize("cores", [{}, pytest.param(ALL_CORES, marks=pytest.mark.slow)])
def test_a_failing_cell_is_recorded_and_the_sweep_goes_on(cli, tmp_path, cores):
    """Found in training, not before: a network breaks on real images. One or two at a time."""
    (tmp_path / "breaking.py").write_text(
        "from gnbench.models import SimpleNetV2 as Good\n"
        "class Bad(Good):\n"
        "    def forward(self, x):\n"
        "        if not x.is_meta: raise RuntimeError('the weights are gone')\n"
        "        return super().forward(x)\n"
    )
    env = {"PYTHONIOENCODING": "ascii", **cores}  # a console that has no –
    target = "model._target_=breaking.Bad"
    done = cli("-m", *tiny.OVERRIDES, f"{target},breaking.Good", env=env, check=1)
    assert sorted(statuses(tmp_path).values()) == ["completed", "failed"]
    lines = done.stdout.splitlines()
    assert lines[1].startswith("failed")
    assert "the weights are gone" in lines[2]
    assert lines[3].startswith("completed")
    # A single failing run shows where it failed.
    done = cli(*tiny.OVERRIDES, target, check=1)
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_a_home_directory_is_no_folder_of_its_name(cli, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,none", "outputs='~/runs'")
    done = cli(*sweep, cwd=here, env={"HOME": str(tmp_path / "home"), **ALL_CORES}, check=0)
    assert list(here.iterdir()) == []
    assert sorted(p.parents[2] for p in tmp_path.rglob("run.json")) == [tmp_path / "home/runs"] * 2
    assert done.stdout.count(f"{tmp_path}/home/runs/default/tiny-") == 2


@pytest.mark.slow
def test_the_console_script_finds_parts_in_the_working_directory(tmp_path):
    script = shutil.which("gnbench", path=f"{Path(sys.executable).parent}")
    if script is None:
        pytest.skip("gnbench is not installed beside this Python")
    (tmp_path / "mylib.py").write_text(
        "from torch import nn\n\n\nclass MyNorm(nn.GroupNorm):\n"
        "    def __init__(self, channels):\n        super().__init__(4, channels)\n"
    )
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    yaml = "name: mine\n_target_: mylib.MyNorm\n_partial_: true\n"
    (tmp_path / "mine" / "norm" / "mine.yaml").write_text(yaml)
    done = subprocess.run(
        [script, "--config-dir=mine", *tiny.OVERRIDES, "norm=mine", "epochs=1"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [name] = statuses(tmp_path)
    assert name.startswith("tiny-simplenetv2-mine-bs8-seed0-")


@pytest.mark.slow
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
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cores", [{}, ALL_CORES], ids=["one", "all"])
def test_a_sweep_that_cannot_be_run_again_says_so_and_fails(cli, tmp_path, cores):
    """The old results stand, but that is not what was asked for."""
    module = tmp_path / "coming_and_going.py"
    module.write_text(
        "import os\nfrom tests import tiny\nfrom gnbench.errors import DataError\n"
        "def images(root=None):\n"
        "    if 'GONE' in os.environ: raise DataError('the images are gone')\n"
        "    return tiny.dataset()\n"
    )
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "dataset._target_=coming_and_going.images")
    cli(*sweep, check=0)
    done = cli(*sweep, "rerun=true", env={"GONE": "1", **cores}, check=1)
    assert done.stdout.count("the images are gone") == 2
    assert done.stderr.count("the images are gone") == 2
    assert set(statuses(tmp_path).values()) == {"completed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=variant)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_sweep_resumes_and_ends_as_if_it_never_was(cli, tmp_path, number, code):
    long = ("norm=bn,gn", "epochs=100", "dataset.augmentation=none")
    sweep = ("-m", *tiny.OVERRIDES, *tiny.SMALL, *long)
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
        assert len(whole) == 101


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_command_imports_what_it_does_not_need(tmp_path):
    outputs = f"outputs={tmp_path}/outputs"
    assert imported(*tiny.OVERRIDES, outputs) == ["torch"]
    assert imported(outputs, module="gnbench.status") == []
    assert imported(outputs, module="gnbench.aggregate") == ["pandas", "matplotlib"]
    assert imported(outputs, module="gnbench.report") == ["pandas", "matplotlib", "plotly"]
    assert imported("--help") == []
    assert imported("--cfg", "job") == []
    for module in ("bench", "report", "archive", "compare", "show"):
        assert imported("--help", module=f"gnbench.{module}") == []


def test_help_is_something_a_newcomer_can_act_on(cli):
    text = cli("--help", check=0).stdout
    for words in (
        "python -m gnbench experiment=quickstart",
        "python -m gnbench -m norm=bn,gn batch_size=2,4,8,16,32,64",
        "norm: " + ", ".join(sorted(p.stem for p in (ROOT / "conf" / "norm").glob("*.yaml"))),
        "outputs/<study>/<run id>/",
    ):
        assert words in text
    assert "$" not in text.replace("$(gnbench", "").replace("${", "")


@pytest.mark.slow
def test_tab_completion_offers_options_and_keys(cli):
    def complete(line):
        env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        return cli("-sc", "query=bash", env=env, check=0).stdout.split()

    norms = {f"norm={path.stem}" for path in (ROOT / "conf" / "norm").glob("*.yaml")}
    assert set(complete("gnbench norm=")) == norms
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


@pytest.mark.slow
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


OWN = """
import torch
from gnbench.datasets import Dataset
from torch import nn

class MyNorm(nn.GroupNorm):
    def __init__(self, channels, eps):
        super().__init__(1, channels, eps)

class MyNet(nn.Sequential):
    def __init__(self, norm, image, classes, width):
        super().__init__(
            nn.Conv2d(image[0], width, 3), norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(width, classes),
        )

def mydata(root):
    images = [torch.zeros(n, 28, 28, 1, dtype=torch.uint8) for n in (2000, 1000)]
    return Dataset(images[0], torch.arange(2000) % 10, images[1], torch.arange(1000) % 10)
"""


def pictures_of_fashion(root):
    """Lay down real pictures of two classes, of mixed sizes and modes."""
    dataset = datasets.fashion_mini()
    modes = itertools.cycle(["L", "RGB", "RGBA", "P", "1"])
    for label, name in ((0, "shirt"), (7, "sneaker")):
        (root / name).mkdir(parents=True)
        for number, image in enumerate(dataset.train_images[dataset.train_labels == label][:30]):
            picture = Image.fromarray(image[:, :, 0].numpy()).convert(next(modes))
            picture.resize((24 + number, 40 - number // 2)).save(root / name / f"{number}.png")


@pytest.mark.slow
def test_what_is_one_s_own_joins_the_installed_wheel(wheel, tmp_path):
    """The files of docs/extending.md as they stand there, and the network of a library."""
    page = (ROOT / "docs" / "extending.md").read_text()
    files = re.findall(r"(?m)^    # (myconf/\S+\.yaml)\n((?:    .*\n)+)", page)
    assert [name for name, _ in files] == [
        f"myconf/{name}.yaml" for name in ("norm/mynorm", "model/mynet", "dataset/mydata")
    ]
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "mylib.py").write_text(OWN)
    pictures_of_fashion(tmp_path / "pictures")
    small = ("batch_size=20", "epochs=1", "progress=lines")
    folder = ("dataset=folder", "dataset.root=pictures", "dataset.image=[3,32,32]")
    for choice in (
        ("norm=mynorm", "model=mynet", "dataset=mydata", "dataset.train_size=40"),
        ("norm=mynorm", "model=torchvision", "dataset=fashion_mini", "dataset.train_size=40"),
        ("norm=gn", "model=torchvision", "model.arch=resnet18", *folder),
    ):
        command = ["-m", "gnbench", "--config-dir", "myconf", *choice, *small]
        env = {**os.environ, "PYTHONPATH": str(wheel), "GNBENCH_DATA": str(tmp_path / "data")}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, check=True)
    runs = sorted(path.parent.name.rpartition("-")[0] for path in tmp_path.rglob("model.pt"))
    assert runs == [
        "fashion_mini-tv_resnet18-mynorm-bs20-seed0",
        "folder-tv_resnet18-gn-bs20-seed0",
        "mydata-mynet-mynorm-bs20-seed0",
    ]


@pytest.mark.slow
def test_a_line_is_named_on_the_command_line_as_the_verdict_says(cli, tmp_path):
    small = (*tiny.OVERRIDES, *tiny.SMALL, "epochs=1", "norm=ghost_bn")
    for images in (2, 8):
        run(compose(*small, f"norm.images={images}", f"outputs={tmp_path}/outputs"))
    said = cli(module="gnbench.aggregate", check=0).stdout
    hint = """'figure.against="GHOST_BN norm.images=8"'"""
    assert hint in said
    said = cli(hint.strip("'"), module="gnbench.aggregate", check=0).stdout
    assert "A single seed has no interval" in said
    assert "Nothing is compared" not in said


@pytest.mark.parametrize("result", [{"test_error": 5.0, "val_error": 7.0}, {"test_error": 7.0}])
def test_a_sweeper_optimizes_on_validation_images_if_there_are_any(result):
    assert objective({"result": result}) == 7.0
    assert math.isnan(objective({"result": None}))
