"""Several seeds in one command: each run is what it would have been alone."""

import json
import signal

import pytest

from gnbench import replicas
from gnbench.config import run_id
from gnbench.runs.directory import Run, read_record
from gnbench.runs.runner import run
from tests import tiny
from tests.conftest import measured, started

THREE = (*tiny.OVERRIDES, "norm=bn", "model.dropout=0.2", "seed=5", "replicas=3")
STATES = ["completed", "interrupted", "missing"]


@pytest.fixture
def alone(tiny_config, tmp_path):
    """Carry out seeds 5, 6 and 7, each by itself; return their metrics by run id."""
    found = {}
    for seed in (5, 6, 7):
        config = tiny_config(
            "norm=bn", "model.dropout=0.2", f"seed={seed}", f"outputs={tmp_path}/alone"
        )
        run(config)
        name = run_id(config)
        found[name] = measured(Run(f"{tmp_path}/alone/default/{name}").metrics_path)
    return found


def found(tmp_path, outputs="outputs"):
    study = tmp_path / outputs / "default"
    return {path.parent.name: measured(path) for path in study.glob("*/metrics.csv")}


def test_each_replica_is_the_run_it_would_be_alone(cli, tmp_path, alone):
    done = cli(*THREE, check=0)
    assert found(tmp_path) == alone
    assert done.stdout.count("completed") == 3
    for directory in (tmp_path / "outputs" / "default").iterdir():
        if directory.is_dir():
            config = read_record(directory / "run.json")["config"]
            assert (run_id(config), config["replicas"]) == (directory.name, 1)
    again = cli(*THREE, check=0)
    assert again.stderr.count("is completed") == 3


def test_a_sweep_of_replicas_is_a_grid_of_runs(cli, tmp_path, alone):
    done = cli("-m", *THREE, "norm=bn,gn", check=0)
    assert done.stdout.count("completed") == 6
    assert {name: rows for name, rows in found(tmp_path).items() if "-bn-" in name} == alone
    [plan] = (tmp_path / "outputs" / "default").glob("sweep-*.json")
    assert {cell["run_id"] for cell in json.loads(plan.read_text())} == set(found(tmp_path))
    cli("study=default", module="gnbench.status", check=0)


def test_interrupted_replicas_go_on_where_they_were(cli, tmp_path):
    """The first one complete, the second one interrupted, the third one not begun."""
    command = (*THREE, "epochs=60")
    process = started(tmp_path, "gnbench", *command)
    for line in process.stderr:
        if "seed6" in line:
            break
    for line in process.stderr:
        if "epoch 1/" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 143
    assert [line.split()[0] for line in out.splitlines()[1:]] == STATES
    status = cli("study=default", module="gnbench.status")
    assert status.returncode == 1
    assert "3 cells: 1 completed, 1 interrupted, 1 missing" in status.stdout
    again = cli(*command, check=0)
    assert again.stderr.count("is completed") == again.stderr.count("resumes after step") == 1
    interrupted = found(tmp_path)
    cli(*command, "outputs=whole", check=0)
    assert interrupted == found(tmp_path, "whole")


def test_a_replica_that_fails_does_not_stop_the_others(cli, tmp_path, tiny_config):
    _, second, _ = replicas(tiny_config(*THREE))
    in_the_way = tmp_path / "outputs" / "default" / run_id(second)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    done = cli(*THREE, check=1)
    states = [line.split()[0] for line in done.stdout.splitlines() if "%" in line or "–" in line]
    assert states == ["completed", "failed", "completed"]
    assert "cannot be written" in done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["replicas=0"], "replicas=0: must be an integer from 1 to 1000"),
        (["replicas=1001"], "replicas=1001: must be an integer from 1 to 1000"),
        (["replicas=2", f"seed={2**63 - 1}"], f"seed={2**63 - 1}: must be an integer from 0 to"),
        (["replicas=2", "rerun=true"], "rerun=true: after an interruption the first would be"),
        (["replicas=2", "hydra.run.dir=mine"], "hydra.run.dir=mine: with replicas=2 every run has"),
        (["-m", "replicas=1000", "seed=range(0,11)"], "a sweep of more than 10000 runs; split it"),
    ],
)
def test_numbers_of_replicas_that_cannot_work(cli, tmp_path, settings, says):
    done = cli(*settings, *tiny.OVERRIDES, check=2)
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_library_call_is_one_run(tiny_config):
    config = tiny_config("replicas=2")
    with pytest.raises(ValueError, match="replicas=2: this is one run"):
        run(config)
    assert [one.seed for one in replicas(config)] == [0, 1]
