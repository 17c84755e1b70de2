"""The real command on a real cluster: a sweep is one job array, and no job's fate costs a result.

Without the programs of a cluster these tests are skipped; GNBENCH_REQUIRE_SLURM=1 has them fail.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny
from tests.conftest import environment, measured, started, variant
from tests.slurm_cluster import UnavailableError, cluster

pytestmark = pytest.mark.slow
LONG = ("-m", *tiny.OVERRIDES, *tiny.SMALL, "epochs=200")  # long enough to be caught in the middle
SLURM = (
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.cpus_per_task=1",
)  # a CPU's bits need the threads


@pytest.fixture(scope="module")
def slurm():
    required = os.environ.get("GNBENCH_REQUIRE_SLURM") == "1"
    if not required:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(cluster())
        except UnavailableError as reason:
            if required:
                raise
            pytest.skip(f"no Slurm to be had: {reason}")
        yield started


@pytest.fixture
def start(tmp_path):
    """Start ``python -m gnbench …`` in an empty folder and go on; it is ended after the test."""
    with contextlib.ExitStack() as stack:

        def call(*arguments):
            process = started(tmp_path, "gnbench", *arguments)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Measure the run that the others are compared with, in one go and without a cluster."""
    outputs = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, "-m", "gnbench", *LONG, f"outputs={outputs}"],
        env=environment(),
        check=True,
        capture_output=True,
    )
    [metrics] = outputs.rglob("metrics.csv")
    return measured(metrics)


def until(found, seconds=300):
    """Ask again and again until there is an answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := found():
            return answer
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def training(outputs, pattern, file="metrics.csv"):
    """Wait until a run is in the middle of its training; return its directory."""
    [path] = until(lambda: list(outputs.glob(f"default/*{pattern}*/{file}")))
    return path.parent


def job(outputs, index=None):
    """Name the only job, or the one with this index in the only array."""
    pattern = "*[0-9]" if index is None else f"*_{index}"
    [folder] = (outputs / "default" / ".submitit").glob(pattern)
    return folder.name


def column(table):
    return [line.split()[0] for line in table.splitlines()[1:] if not line.startswith(" ")]


def is_progress(line):
    """Tell whether a line says how far the sweep is."""
    return line.startswith("gnbench: ") and " cells done, " in line


def test_a_sweep_is_one_job_array_whose_cells_any_launcher_finds(slurm, cli, tmp_path):
    before = set(slurm.jobs())
    sweep = ("-m", *tiny.OVERRIDES, "norm=bn,gn", "batch_size=8,16")
    done = cli(*sweep, "hydra/launcher=submitit_slurm", check=0)
    assert column(done.stdout) == ["completed"] * 4
    assert [line for line in done.stderr.splitlines() if not is_progress(line)] == []
    jobs = slurm.jobs().keys() - before
    assert {name.partition("_")[2] for name in jobs} == {"0", "1", "2", "3"}
    assert len({name.partition("_")[0] for name in jobs}) == 1
    until(lambda: all(slurm.jobs()[name] == "COMPLETED" for name in jobs))
    [script] = (tmp_path / "outputs" / "default" / ".submitit").glob("*/*_submission.sh")
    lines = script.read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR2@120", "#SBATCH --time=240"} <= set(lines)
    done = cli(*sweep, check=0)
    assert done.stderr.count("is completed (test error") == 4
    done = cli(module="gnbench.aggregate", check=0)
    assert "study default: 4 finished runs" in done.stdout
    assert "left out" not in done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["scontrol", "requeue"], []),
        # What Slurm does signal_delay_s before the limit; submitit looks at the clock.
        (["scancel", "--signal=USR2"], ["this job is timed-out", "19 remaining timeouts"]),
    ],
    ids=["scontrol requeue", "time limit"],
)
def test_a_requeued_run_ends_as_if_it_never_was(slurm, start, whole, tmp_path, command, words):
    process = start(*LONG, *SLURM, "hydra.launcher.timeout_min=5")
    directory = training(tmp_path / "outputs", "-gn-")
    name = job(tmp_path / "outputs")
    subprocess.run([*command, name], check=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err + slurm.logs()
    assert column(out) == ["completed"]
    until(lambda: slurm.jobs()[name] == "COMPLETED")  # the result is there a moment before
    log = (directory / "gnbench.log").read_text()
    assert log.count("interrupted; the same command resumes it") == 1
    assert log.count("resumes after step") == 1
    epochs = re.findall(r"epoch (\d+)/200 ", log)
    assert epochs == [str(n + 1) for n in range(200)]  # not one of them twice
    assert measured(directory / "metrics.csv") == whole
    said = (tmp_path / f"outputs/default/.submitit/{name}/{name}_0_log.out").read_text()
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "partition",
    ["low", pytest.param("lowest", marks=variant)],
    ids=["grace time", "no grace time"],
)
def test_a_preempted_run_gives_way_and_resumes(slurm, start, whole, tmp_path, partition):
    outputs = tmp_path / "outputs"
    process = start(*LONG, *SLURM, "norm=bn,gn", f"hydra.launcher.partition={partition}")
    training(outputs, "-bn-")
    directory = training(outputs, "-gn-")
    names = [job(outputs, index) for index in (0, 1)]
    urgent = ["srun", "--quiet", "--partition=high", "--cpus-per-task=16", "true"]
    subprocess.run(urgent, check=True, timeout=120)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err + slurm.logs()
    assert column(out) == ["completed"] * 2
    until(lambda: all(slurm.jobs()[name] == "COMPLETED" for name in names))
    for path in outputs.rglob("gnbench.log"):
        log = path.read_text()
        assert log.count("interrupted; the same command resumes it") == 1
        assert log.count("resumes after step") == 1
        assert re.findall(r"epoch (\d+)/200 ", log) == [str(n + 1) for n in range(200)]
    assert measured(directory / "metrics.csv") == whole


def test_lost_jobs_cost_their_own_cells_and_the_same_command_mends_them(
    slurm, start, whole, cli, tmp_path
):
    outputs = tmp_path / "outputs"
    sweep = (*LONG, *SLURM, "norm=bn,gn,ln", "checkpoint_seconds=0.1")
    process = start(*sweep)
    training(outputs, "-bn-", "checkpoint.pt")
    killed, cancelled = job(outputs, 0), job(outputs, 1)
    array, _, index = killed.partition("_")
    os.kill(slurm.trainer(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID=index), signal.SIGKILL)
    directory = training(outputs, "-gn-")
    subprocess.run(["scancel", cancelled], check=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err + slurm.logs()
    assert column(out) == ["stale", "interrupted", "completed"]
    first, second = (line for line in err.splitlines() if not is_progress(line))
    assert first.startswith(f"job {killed} is lost (FAILED), see /")
    assert second.startswith(f"job {cancelled} is lost (CANCELLED by ")
    assert (directory / "checkpoint.pt").exists()
    done = cli(*sweep, check=0)
    assert column(done.stdout) == ["completed"] * 3
    logs = {path: path.read_text() for path in outputs.rglob("gnbench.log")}
    assert sorted(text.count("resumes after step") for text in logs.values()) == [0, 1, 1]
    assert measured(directory / "metrics.csv") == whole


def test_what_the_cluster_refuses_is_said_on_one_line(slurm, cli):
    done = cli(*LONG, *SLURM, "hydra.launcher.partition=nope", check=1)
    assert done.stderr.splitlines()[-1].startswith("gnbench: sbatch: error: invalid partition")
    assert "Traceback" not in done.stderr
    assert column(done.stdout) == ["missing"]


def test_no_cluster_is_said_and_nothing_is_written(cli, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = cli(*LONG, *SLURM, env={"PATH": "/nonexistent"}, check=2)
    assert done.stderr == "gnbench: hydra/launcher: no cluster here (Slurm's srun is not on PATH)\n"
    assert list(tmp_path.iterdir()) == []
