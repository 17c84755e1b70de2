"""Sweeps whose cells run side by side, in processes that are killed and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import joblib
import pytest

from tests import tiny
from tests.conftest import ALL_CORES, ROOT, environment, measured, started, variant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc"),
]
LONG = ("norm=bn,gn,ln", "epochs=60", "dataset.augmentation=none")
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}
# At a time, even on a single core:
TWO = {"joblib": "hydra.launcher.n_jobs=2", "ray": "hydra.launcher.ray.init.num_cpus=2"}


class Sweep:
    """A sweep as a terminal starts it: in a session of its own."""

    def __init__(self, folder, launcher, *arguments, env=None):
        pytest.importorskip(PLUGINS[launcher])
        self.folder = folder
        chosen = [] if launcher == "joblib" else [f"hydra/launcher={launcher}"]  # is the default
        command = ("gnbench", "-m", *tiny.OVERRIDES, *chosen, *arguments)
        self.process = started(folder, *command, env=env, start_new_session=True)

    def workers(self):
        """Return the process at work on each cell: the one that holds its lock."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                for link in (process / "fd").iterdir():
                    with suppress(OSError):  # this file has just been closed
                        file = link.readlink()
                        if file.name == ".lock" and file.is_relative_to(self.folder.resolve()):
                            found[file.parent] = int(process.name)
        return found

    def wait_for_workers(self, count, file):
        """Wait until so many cells at once are being trained and have written ``file``."""
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            busy = {d: pid for d, pid in self.workers().items() if (d / file).exists()}
            if len(busy) == count:
                return busy
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(self.process.communicate())

    def end(self, code):
        """Wait for the end, check the exit code and that no process is left; return the output."""
        out, err = self.process.communicate(timeout=200)
        assert self.process.returncode == code, err + out
        assert "Traceback" not in err
        until = time.monotonic() + 20
        while self.left() and time.monotonic() < until:
            time.sleep(0.1)
        assert self.left() == []
        return out, err

    def left(self):
        """Name the processes of the session that live."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


def table(out):
    """Return the statuses in the table at the end; Ray's own log may go on behind it."""
    lines = out[out.index("status  ") :].splitlines()[1:]
    return [line.split()[0] for line in lines if line[:1].isalpha()]


def records(folder):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.rglob("run.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train the cells of ``LONG`` without interruption; return their metrics by run."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, "-m", "gnbench", "-m", *tiny.OVERRIDES, *LONG],
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )
    return metrics(folder)


def metrics(folder):
    return {p.parent.name: measured(p) for p in folder.rglob("metrics.csv")}


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_that_is_not_installed_is_one_line_that_names_the_extra(cli, tmp_path, launcher):
    """A package before them on the path hides the plugins."""
    hidden = tmp_path / "hidden" / "hydra_plugins"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    (tmp_path / "empty").mkdir()
    done = cli(
        *("-m", *tiny.OVERRIDES, "norm=bn,gn", f"hydra/launcher={launcher}"),
        env={"PYTHONPATH": f"{hidden.parent}:{ROOT}"},
        cwd=tmp_path / "empty",
        check=2,
    )
    [line] = done.stderr.splitlines()
    assert line.startswith("gnbench: ")
    assert line.endswith(f"pip install 'gnbench[{launcher}]'")
    assert done.stdout == ""
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("launcher", "chosen"),
    [("joblib", ()), *((launcher, (two,)) for launcher, two in TWO.items())],
    ids=["nothing", *TWO],
)
def test_a_launcher_writes_what_the_basic_one_does(cli, tmp_path, monkeypatch, launcher, chosen):
    """And gives every run its share of the cores."""
    sweep, env = ("norm=bn,gn", "batch_size=8,16"), {"OMP_NUM_THREADS": None, **ALL_CORES}
    out, err = Sweep(tmp_path, launcher, *sweep, *chosen, env=env).end(0)
    assert "Warning" not in err
    assert table(out) == ["completed"] * 4
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    cores = joblib.cpu_count()
    workers = 2 if chosen else min(cores, 4)
    share = {"joblib": max(cores // workers, 1), "ray": 1}[launcher]
    devices = [record["device"] for record in records(tmp_path).values()]
    assert all(device.endswith(f" {share} threads)") for device in devices), devices
    plain = cli("-m", *tiny.OVERRIDES, *sweep, check=0)  # the same directories
    assert plain.stderr.count("is completed (test error") == 4


def test_joblib_launches_again_what_a_killed_worker_took_with_it(tmp_path, whole):
    sweep = Sweep(tmp_path, "joblib", *LONG, "checkpoint_seconds=0.1", TWO["joblib"])
    directory, pid = next(iter(sweep.wait_for_workers(2, "checkpoint.pt").items()))
    os.kill(pid, signal.SIGKILL)
    out, err = sweep.end(0)
    assert table(out) == ["completed"] * 3
    [line] = [line for line in err.splitlines() if "a worker was killed" in line]
    assert directory.name in line
    assert "resumes after step" in (directory / "gnbench.log").read_text()
    assert metrics(tmp_path) == whole


def test_a_worker_killed_at_a_later_replica_goes_on_there(tmp_path):
    sweep = Sweep(
        *(tmp_path, "joblib", "norm=bn,gn", "replicas=2", "epochs=60", TWO["joblib"]),
        "checkpoint_seconds=0.1",
    )
    until, busy = time.monotonic() + 120, {}
    while not busy and time.monotonic() < until:
        at_second = {d: pid for d, pid in sweep.workers().items() if "-seed1-" in d.name}
        busy = {d: pid for d, pid in at_second.items() if (d / "checkpoint.pt").exists()}
    directory, pid = busy.popitem()
    os.kill(pid, signal.SIGKILL)
    out, _ = sweep.end(0)
    assert table(out) == ["completed"] * 4
    assert "resumes after step" in (directory / "gnbench.log").read_text()


DEADLY = """
import os, signal
from gnbench.models import SimpleNetV2 as Good
from tests.tiny import dataset

class Bad(Good):
    def forward(self, x):
        if not x.is_meta: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def killer(root=None): os.kill(os.getpid(), signal.SIGKILL)
"""


IN_TRAINING = ("model._target_=deadly.Bad,deadly.Good,gnbench.models.SimpleNetV2", "stale")
BEFORE_IT = (  # before there is a run directory
    "dataset._target_=deadly.killer,deadly.dataset,tests.tiny.dataset",
    "missing",
)


@pytest.mark.parametrize(
    ("launcher", "deadly", "left"),
    [
        ("joblib", *IN_TRAINING),
        ("ray", *BEFORE_IT),
        pytest.param("joblib", *BEFORE_IT, marks=variant),
        pytest.param("ray", *IN_TRAINING, marks=variant),
    ],
)
def test_only_the_cell_that_kills_its_workers_is_lost(tmp_path, launcher, deadly, left):
    (tmp_path / "deadly.py").write_text(DEADLY)
    sweep = Sweep(tmp_path, launcher, deadly, TWO[launcher])
    out, err = sweep.end(1)
    state = {"joblib": "failed", "ray": left}[launcher]
    assert table(out) == [state, "completed", "completed"]
    said = {"joblib": "its worker was killed 3 times", "ray": "a run is lost (WorkerCrashed"}
    assert (out + err).count(said[launcher]) == 1


@pytest.mark.parametrize(
    ("launcher", "number", "code", "to_all"),
    [
        ("joblib", signal.SIGINT, 130, True),
        ("joblib", signal.SIGTERM, 143, False),
        pytest.param("joblib", signal.SIGTERM, 143, True, marks=variant),
        pytest.param("ray", signal.SIGINT, 130, True, marks=variant),
        ("ray", signal.SIGTERM, 143, False),
    ],
)
def test_an_interrupted_command_has_its_workers_save_and_end(
    cli, tmp_path, whole, launcher, number, code, to_all
):
    """A terminal sends Ctrl-C to all processes, a scheduler SIGTERM to one or to all."""
    sweep = Sweep(tmp_path, launcher, *LONG, TWO[launcher])
    busy = sweep.wait_for_workers(2, "metrics.csv")
    if to_all:
        os.killpg(sweep.process.pid, number)
    else:
        sweep.process.send_signal(number)
    out, _ = sweep.end(code)
    assert table(out).count("interrupted") == 2
    for directory in busy:
        assert records(tmp_path)[directory.name]["status"] == "interrupted"
        assert (directory / "checkpoint.pt").exists()
    cli("-m", *tiny.OVERRIDES, *LONG, check=0)
    for directory in busy:
        assert "resumes after step" in (directory / "gnbench.log").read_text()
    assert metrics(tmp_path) == whole


def test_ray_takes_up_again_what_a_killed_worker_was_at(tmp_path, whole):
    sweep = Sweep(tmp_path, "ray", *LONG, "checkpoint_seconds=0.1", TWO["ray"])
    directory, pid = next(iter(sweep.wait_for_workers(2, "checkpoint.pt").items()))
    os.kill(pid, signal.SIGKILL)
    out, _ = sweep.end(0)
    assert table(out) == ["completed"] * 3
    assert "resumes after step" in (directory / "gnbench.log").read_text()
    assert metrics(tmp_path) == whole


BATCHES = """
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

class Batches(BasicSweeper):
    '''Chooses its cells as it goes, for all that gnbench knows; two at a time.'''
"""


def test_a_sweeper_that_chooses_as_it_goes_has_all_its_cells_in_the_account(tmp_path):
    """The workers carry them out; the command knows them, what failed, and whom to tell to save."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "batches.py").write_text(BATCHES)
    (tmp_path / "coming.py").write_text("def gone(root=None): raise OSError('they are gone')\n")
    chosen = (
        "hydra.sweeper._target_=hydra_plugins.batches.Batches",
        "hydra.sweeper.max_batch_size=2",
    )
    cells = ("dataset._target_=tests.tiny.dataset,coming.gone", "norm=gn,bn", TWO["joblib"])
    out, _ = Sweep(tmp_path, "joblib", *chosen, *cells, "epochs=2").end(1)
    assert sorted(table(out)) == ["completed", "completed", "failed", "failed"]
    long = Sweep(tmp_path, "joblib", *chosen, *LONG, "study=long", TWO["joblib"])
    long.wait_for_workers(2, "metrics.csv")
    long.process.send_signal(signal.SIGTERM)
    out, _ = long.end(143)
    assert table(out)[:2] == ["interrupted", "interrupted"]
