"""Several seeds in one command: each run is what it would have been alone."""

import json
import signal

import pytest

from gnbench.check import compose
from gnbench.errors import ConfigError
from gnbench.identity import run_id
from gnbench.runs.directory import RunDirectory, read_record
from gnbench.runs.runner import run
from tests import tiny
from tests.conftest import ALL_CORES, measured, started

SMALL = (*tiny.OVERRIDES, "model._target_=tests.trainings.small")
THREE = (*SMALL, "norm=bn", "model.dropout=0.2", "seed=5", "replicas=3")
STATES = ["completed", "interrupted", "missing"]


def found(tmp_path, outputs="outputs"):
    study = tmp_path / outputs / "default"
    return {path.parent.name: measured(path) for path in study.glob("*/metrics.csv")}


@pytest.mark.slow
def test_a_sweep_of_replicas_is_a_grid_of_runs(cli, tmp_path, tiny_config):
    alone = {}
    for config in compose(*THREE).runs():
        run(one := config.with_(outputs=str(tmp_path / "alone")))
        alone[config.run_id] = measured(RunDirectory(one.run_dir).metrics_path)
    done = cli("-m", *THREE, "norm=bn,gn", env=ALL_CORES, check=0)
    assert done.stdout.count("completed") == 6
    runs = found(tmp_path)
    assert {name: rows for name, rows in runs.items() if "-bn-" in name} == alone
    for name in runs:
        config = read_record(tmp_path / "outputs" / "default" / name / "run.json")["config"]
        assert (run_id(config), config["replicas"]) == (name, 1)
    [plan] = (tmp_path / "outputs" / "default").glob("sweep-*.json")
    assert {cell["run_id"] for cell in json.loads(plan.read_text())} == set(runs)


@pytest.mark.slow
def test_interrupted_replicas_go_on_where_they_were(cli, tmp_path):
    """The first one complete, the second one interrupted, the third one not begun."""
    command = (*THREE, *tiny.SMALL, "epochs=100")
    process = started(tmp_path, "gnbench", *command)
    for line in process.stderr:
        if "seed6" in line:
            break
    for line in process.stderr:
        if "epoch 1/" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert [state for line in out.splitlines() for state in STATES if state in line] == STATES
    status = cli("study=default", module="gnbench.status")
    assert status.returncode == 1
    assert "3 cells: 1 completed, 1 interrupted, 1 missing" in status.stdout
    again = cli(*command, check=0)
    assert again.stderr.count("is completed") == again.stderr.count("resumes after step") == 1
    interrupted = found(tmp_path)
    cli(*command, "outputs=whole", check=0)
    assert interrupted == found(tmp_path, "whole")


@pytest.mark.slow
def test_a_replica_that_fails_does_not_stop_the_others(cli, tmp_path):
    in_the_way = tmp_path / compose(*THREE).runs()[1].run_dir
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    done = cli(*THREE, check=1)
    assert done.stdout.count("completed") == 2
    assert "failed" in done.stdout
    assert len(found(tmp_path)) == 2


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["replicas=0"], "replicas=0"),
        (["replicas=1001"], "replicas=1001"),
        (["replicas=2", f"seed={2**63 - 1}"], f"seed={2**63 - 1}"),
        (["replicas=2", "rerun=true"], "rerun=true"),
    ],
)
def test_numbers_of_replicas_that_cannot_work(settings, names):
    with pytest.raises(ConfigError, match=names):
        compose(*SMALL, *settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["replicas=2", "hydra.run.dir=mine"], "hydra.run.dir=mine"),
        (["-m", "replicas=1000", "seed=range(0,11)"], "a sweep of more than 10000 runs"),
    ],
)
def test_replicas_that_the_command_line_refuses(cli, tmp_path, settings, names):
    assert names in cli(*settings, *SMALL, check=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_library_call_is_one_run():
    config = compose(*SMALL, "replicas=2")
    with pytest.raises(ConfigError, match="replicas=2"):
        run(config)
    assert [one.seed for one in config.runs()] == [0, 1]
