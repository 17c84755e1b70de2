"""Trackers: what they are told, what they cost when they fail, and what the real ones write."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from gnbench import build
from gnbench.check import check_machine, compose, composed
from gnbench.config import RunConfig, conf_dir
from gnbench.errors import ConfigError, Interrupted
from gnbench.runs.directory import RunDirectory
from gnbench.runs.runner import run, run_all
from gnbench.trackers import Guard, MLflow, TensorBoard, WandB
from gnbench.train.engine import EagerEngine
from gnbench.train.row import METRICS
from tests import tiny
from tests.conftest import environment, measured, started

OPTIONS = sorted(path.stem for path in (conf_dir() / "tracker").glob("*.yaml"))
MINE = ("tracker.name=mine", "tracker._target_=tests.test_trackers.Listener")
DROPOUT = ("model.dropout=0.5",)  # draws from torch's generator

heard = []  # by a Listener, since the test began


def needs(package):
    """Skip a test whose package is not installed."""
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed: pip install 'gnbench[{package}]'",
    )


class Listener:
    """A tracker of one's own."""

    def __init__(self, run, label=None):
        heard.append(("begin", run, label))

    def log(self, row):
        heard.append(("log", row))

    def close(self, record):
        heard.append(("close", record))


class Meddler(Listener):
    """Draws from torch's generator, and changes what it is given."""

    def __init__(self, run):
        run.rows.clear()
        run.settings.clear()
        torch.manual_seed(1)

    def log(self, row):
        torch.rand(10)
        row.clear()

    def close(self, record):
        record["result"].clear()


class Failing(Listener):
    """Raises at one of the three, and says where it was called."""

    def __init__(self, run, at, error="ValueError"):
        self.at, self.error = at, {"ValueError": ValueError, "SystemExit": SystemExit}[error]
        self.called("begin")

    def log(self, row):
        self.called("log")

    def close(self, record):
        self.called("close")

    def called(self, name):
        heard.append(name)
        if name == self.at:
            raise self.error(f"no {name} today\nand more")


class Scribe(Listener):
    """Writes into the run directory what it is told, and by which process."""

    def __init__(self, run):
        self.path = run.run_dir / "told.txt"
        self.write("begin")

    def log(self, row):
        self.write(f"log {row['epoch']}")

    def close(self, record):
        self.write(f"close {record['status']}")

    def write(self, line):
        with self.path.open("a") as file:
            file.write(f"{os.environ['RANK']} {line}\n")


class Dying:
    """Has its process killed as it logs the third epoch, which no checkpoint holds yet."""

    def log(self, row):
        super().log(row)
        if row["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingTensorBoard(Dying, TensorBoard):
    pass


class DyingMLflow(Dying, MLflow):
    pass


class DyingWandB(Dying, WandB):
    pass


@pytest.fixture
def small_config(tiny_config):
    """Compose a run of a network of 8,000 weights."""
    return lambda *overrides: tiny_config(*tiny.SMALL, *overrides)


@pytest.fixture(autouse=True)
def _nobody_has_heard_anything():
    heard.clear()


def of(config):
    return RunDirectory(config.run_dir)


def whole_rows(config):
    return of(config).rows()


def weights(config):
    return torch.load(of(config).model_path, weights_only=True)


def assert_same_without_tracker(config):
    """Hold metrics, but for times, result and weights against those of a run without a tracker."""
    none = {"name": "none", "_target_": "gnbench.trackers.Tracker"}
    other = config.with_(study="without", tracker=none)
    assert run(other)["result"] == of(config).record()["result"]
    assert measured(of(config).metrics_path) == measured(of(other).metrics_path)
    ours, others = weights(config), weights(other)
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def interrupt(config, monkeypatch, step, number=signal.SIGTERM):
    """Begin the run and send it a signal after ``step``."""
    take = EagerEngine.train_steps

    def signalled(engine, epoch, at, most):
        taken = take(engine, epoch, at, most)
        if epoch.first_step + at == step:
            os.kill(os.getpid(), number)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "train_steps", signalled)
        with pytest.raises(Interrupted):
            run(config)
    assert of(config).record()["status"] == "interrupted"


def kill(config, monkeypatch):
    """Leave what SIGKILL does: rows of four epochs, a checkpoint in the third, a tracker open."""
    save = RunDirectory.save_checkpoint

    def stop_saving(self, state):
        if state["position"]["epoch"] <= 2:
            save(self, state)

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", stop_saving)
        patch.setattr(RunDirectory, "save_model", killed)
        patch.setattr(Guard, "close", lambda *_: None)
        with pytest.raises(SystemExit):
            run(config)
    assert len(whole_rows(config)) == 4


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tracker_is_no_part_of_what_a_run_is(option):
    config = RunConfig.parse(composed(f"tracker={option}"))
    assert config.tracker.name == option
    assert config.run_id == RunConfig.parse(composed()).run_id
    record = {key: value for key, value in config.plain().items() if key != "tracker"}
    assert RunConfig.parse(record).tracker.name == "none"  # of before there were any


@pytest.mark.slow
def test_a_run_without_a_tracker_imports_none(tmp_path):
    command = ["gnbench", *tiny.OVERRIDES, *tiny.SMALL, f"outputs={tmp_path}"]
    packages = ("tensorboard", "torch.utils.tensorboard", "mlflow", "wandb")
    script = (
        f"import sys, gnbench.__main__; sys.argv = {command!r}\n"
        "try: gnbench.__main__.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('FOUND', [name for name in {packages!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("FOUND []\n")
    assert len(list(tmp_path.rglob("model.pt"))) == 1


@pytest.mark.parametrize("option", OPTIONS)
def test_every_tracker_can_be_chosen(small_config, option):
    needed = option if option != "none" else "torch"
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'gnbench[{needed}]'")
    small_config(f"tracker={option}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracker=tensorbord"], "tracker/tensorbord"),
        (["tracker.uri=x"], "uri"),
        (["tracker._target_=gnbench.trackers.TensorBord"], "tracker._target_=gnbench.*TensorBord"),
        (["tracker._target_=nope.nope"], "tracker._target_=nope.nope: No module named 'nope'"),
        (["+tracker.urll=x"], "tracker=none: .*unexpected keyword argument 'urll'"),
        (["tracker=wandb", "tracker.mode=ofline"], "tracker.mode=ofline: .*'offline', 'online'"),
        (["tracker=mlflow", "tracker.uri=[1]"], r"tracker.uri=\[1\]: must be of type str"),
        (["tracker=mlflow", "~tracker.uri"], "tracker=mlflow: missing a required argument: 'uri'"),
        (["tracker._target_=collections.ChainMap"], "collections.ChainMap has no log, close"),
        (["tracker=mlflow", "tracker.uri=https://me:secret@host"], "^tracker.uri names a user or"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_no_tracker_is_refused_in_a_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - {"none"}))
def test_a_missing_extra_is_named_before_anything_is_written(option, monkeypatch):
    config = RunConfig.parse(composed(f"tracker={option}"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'gnbench\[{option}\]'") as caught:
        check_machine(config)
    assert "\n" not in str(caught.value)
    check_machine(config, remote=True)  # of other machines this says nothing


def test_a_tracker_is_told_of_the_run_its_rows_and_its_end(small_config):
    config = small_config(*MINE, "+tracker.label=x", "epochs=3", "study=s", "evaluate_every=1")
    record = run(config)
    (_, told, label), *logged, (_, closed) = heard
    assert (told.run_id, told.study, told.run_dir) == (config.run_id, "s", config.run_dir)
    assert (told.settings, told.rows, told.resumes, label) == (config.plain(), [], False, "x")
    rows = [row for name, row in logged if name == "log"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [tuple(row) for row in rows] == 3 * [METRICS]
    assert rows == whole_rows(config)
    assert closed == record == of(config).record()
    heard.clear()
    run(config)  # which is complete
    assert heard == []


def test_every_replica_has_a_tracker_of_its_own(small_config):
    config = small_config(*MINE, "replicas=2")
    outcomes = dict(run_all(config.runs()))
    begun, closed = ([one[1] for one in heard if one[0] == name] for name in ("begin", "close"))
    assert [told.run_id for told in begun] == [one.run_id for one in config.runs()]
    assert closed == list(outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize("ends", [interrupt, kill])
def test_a_tracker_of_a_run_that_resumes_is_given_the_rows_before(small_config, monkeypatch, ends):
    config = small_config(*MINE, "epochs=4", "checkpoint_seconds=0")
    ends(config, monkeypatch, *([13] if ends is interrupt else []))  # in the third epoch
    heard.clear()
    run(config)
    (_, told, _), *logged, _ = heard
    assert told.resumes
    assert [row["epoch"] for row in told.rows] == [1, 2]
    assert [row["epoch"] for _, row in logged] == [3, 4]
    assert [*told.rows, *(row for _, row in logged)] == whole_rows(config)


@pytest.mark.slow
def test_a_rerun_does_not_resume(small_config):
    run(small_config(*MINE))
    heard.clear()
    run(small_config(*MINE, "rerun=true"))
    assert (heard[0][1].resumes, heard[0][1].rows) == (False, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_closes_its_tracker_with_that_status(small_config, monkeypatch, number):
    config = small_config(*MINE, "epochs=3")
    interrupt(config, monkeypatch, 8, number)
    assert heard[-1][0] == "close"
    assert heard[-1][1] == of(config).record()


def test_a_failed_run_closes_its_tracker_with_its_error(small_config, monkeypatch):
    config = small_config(*MINE)
    monkeypatch.setattr(RunDirectory, "save_correct", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert heard[-1][1]["status"] == "failed"
    assert heard[-1][1]["error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("at", "error"),
    [
        ("begin", "ValueError"),
        ("log", "ValueError"),
        ("log", "SystemExit"),
        ("close", "ValueError"),
    ],
)
def test_a_tracker_that_fails_costs_one_warning_and_no_run(small_config, caplog, at, error):
    failing = ("tracker.name=mine", "tracker._target_=tests.test_trackers.Failing")
    config = small_config(*failing, f"+tracker.at={at}", f"+tracker.error={error}", "epochs=3")
    assert run(config)["status"] == "completed"
    said = f"tracker=mine: {error}: no {at} today; the run goes on without it"
    assert caplog.text.count(said) == caplog.text.count("tracker=") == 1
    assert said in of(config).log_path.read_text()
    # It was not called again after it had failed.
    assert (
        heard
        == {
            "begin": ["begin"],
            "log": ["begin", "log"],
            "close": ["begin", "log", "log", "log", "close"],
        }[at]
    )
    assert_same_without_tracker(config)


def test_a_tracker_whose_module_cannot_be_imported_costs_one_warning(
    small_config, caplog, monkeypatch
):
    config = small_config(*MINE)
    load = build.load_dataset

    def gone(config):  # since it was checked
        monkeypatch.delattr(sys.modules[__name__], "Listener")
        return load(config)

    monkeypatch.setattr(build, "load_dataset", gone)
    assert run(config)["status"] == "completed"
    assert caplog.text.count("tracker=mine: AttributeError: ") == 1


@pytest.mark.slow
def test_a_tracker_can_change_nothing_of_the_training(small_config, monkeypatch):
    meddler = ("tracker._target_=tests.test_trackers.Meddler", *DROPOUT, "epochs=3")
    config = small_config(*meddler, "checkpoint_seconds=0")
    interrupt(config, monkeypatch, 8)
    assert run(config) == of(config).record()
    assert_same_without_tracker(config)
    assert of(config).record()["config"] == config.plain()


def scalars(folder):
    """Read event files as TensorBoard itself does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }
    return accumulator, found


def assert_scalars(config, record):
    """Hold what TensorBoard reads of a finished run against its metrics, each epoch once."""
    accumulator, found = scalars(config.run_dir / "tensorboard")
    rows = whole_rows(config)
    names = set(METRICS) - {"epoch"}
    assert set(found) == names | {f"result/{key}" for key in record["result"]}
    for name in names:
        steps, numbers = zip(*found[name], strict=True)
        assert list(steps) == [row["epoch"] for row in rows]
        # Float32, as TensorBoard keeps a number.
        assert numbers == pytest.approx([row[name] for row in rows], rel=1e-6)
    for key, value in record["result"].items():
        assert found[f"result/{key}"] == [(len(rows), pytest.approx(value))]
    return accumulator


@needs("tensorboard")
def test_tensorboard_reads_back_what_a_run_did(small_config):
    config = small_config("tracker=tensorboard", *DROPOUT, "epochs=3")
    record = run(config)
    accumulator = assert_scalars(config, record)
    [text] = accumulator.Tensors("settings/text_summary")
    assert f'"batch_size": {config.batch_size}' in text.tensor_proto.string_val[0].decode()
    hparams = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.dropout" in hparams
    assert_same_without_tracker(config)


@pytest.mark.slow
@needs("tensorboard")
@pytest.mark.parametrize("ends", [interrupt, kill])
def test_tensorboard_has_each_epoch_of_a_resumed_run_once(small_config, monkeypatch, ends):
    config = small_config("tracker=tensorboard", "epochs=4", "checkpoint_seconds=0")
    ends(config, monkeypatch, *([13] if ends is interrupt else []))
    for again in (config, config.with_(rerun=True)):
        assert_scalars(config, run(again))


@pytest.mark.slow
@needs("tensorboard")
def test_a_tracker_that_comes_late_is_told_what_was_before(small_config, monkeypatch):
    interrupt(small_config("epochs=3"), monkeypatch, 13)
    config = small_config("tracker=tensorboard", "epochs=3")
    assert_scalars(config, run(config))


def client(config):
    from mlflow.tracking import MlflowClient

    return MlflowClient((config.run_dir.parents[1] / "mlruns").as_uri())


def mlflow_runs(config):
    reader = client(config)
    experiment = reader.get_experiment_by_name(config.study)
    return reader.search_runs([experiment.experiment_id])


def assert_mlflow(config, found, record):
    """Hold what MLflow reads of a finished run against its metrics, each epoch once."""
    rows = whole_rows(config)
    assert (found.info.run_name, found.info.status) == (config.run_id, "FINISHED")
    for name in set(METRICS) - {"epoch"}:
        history = client(config).get_metric_history(found.info.run_id, name)
        assert [m.step for m in history] == [row["epoch"] for row in rows]
        if name not in ("images_per_second", "seconds"):  # of an epoch that is trained again
            assert [m.value for m in history] == [row[name] for row in rows]
    for key, value in record["result"].items():
        assert found.data.metrics[f"result.{key}"] == value
    assert found.data.params["model.dropout"] == str(config.model.dropout)
    assert found.data.params["batch_size"] == str(config.batch_size)


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_reads_back_what_runs_did(small_config):
    config = small_config("tracker=mlflow", *DROPOUT, "epochs=3", "replicas=2", "study=s")
    outcomes = [record for _, record in run_all(config.runs())]
    found = {each.info.run_name: each for each in mlflow_runs(config)}
    assert len(found) == 2
    for one, record in zip(config.runs(), outcomes, strict=True):
        assert_mlflow(one, found[one.run_id], record)
        assert found[one.run_id].data.tags["status"] == "completed"
        assert_same_without_tracker(one)


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_goes_on_with_the_run_that_resumes(small_config, monkeypatch):
    config = small_config("tracker=mlflow", "epochs=4")
    interrupt(config, monkeypatch, 13)
    [before] = mlflow_runs(config)
    assert before.info.status == "KILLED"
    record = run(config)
    [found] = mlflow_runs(config)
    assert_mlflow(config, found, record)
    again = run(config.with_(rerun=True))
    newest, oldest = mlflow_runs(config)
    assert oldest.info.run_id == found.info.run_id
    assert_mlflow(config, newest, again)


def wandb_records(config):
    """Read the one offline file of a run by wandb's own reader."""
    [path] = config.run_dir.glob("wandb/offline-run-*/*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        env={**os.environ, "WANDB_ERROR_REPORTING": "false"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_wandb(config, record):
    """Hold what was written offline of a finished run against its metrics, each epoch once."""
    records = wandb_records(config)
    [begun] = [entry["run"] for entry in records if entry["type"] == "run"]
    assert (begun["run_id"], begun["run_group"]) == (
        f"{config.study}-{config.run_id}",
        config.study,
    )
    settings = {k: v for k, v in begun["config"]["update"].items() if k != "_wandb"}
    assert settings == json.loads(json.dumps(config.plain()))
    history = [entry["history"] for entry in records if entry["type"] == "history"]
    rows = whole_rows(config)
    assert [entry["step"]["num"] for entry in history] == [row["epoch"] for row in rows]
    for entry, row in zip(history, rows, strict=True):
        found = {name: entry["item"][name] for name in METRICS if name != "epoch"}
        assert found == {name: row[name] for name in found}
    summary = {}
    for entry in records:
        summary |= entry["summary"]["update"] if entry["type"] == "summary" else {}
    result = {key.removeprefix("result."): v for key, v in summary.items() if "result." in key}
    assert (result or summary["result"]) == record["result"]
    assert [entry["exit"]["exit_code"] for entry in records if entry["type"] == "exit"] == [0]


@pytest.mark.slow
@needs("wandb")
def test_wandb_writes_offline_what_a_run_did(small_config):
    config = small_config("tracker=wandb", *DROPOUT, "epochs=3")
    state = random.getstate()
    assert_wandb(config, run(config))
    assert random.getstate() == state
    assert_same_without_tracker(config)


@pytest.mark.slow
@needs("wandb")
def test_wandb_has_each_epoch_of_a_resumed_run_once(small_config, monkeypatch):
    config = small_config("tracker=wandb", "epochs=4")
    interrupt(config, monkeypatch, 13)
    assert_wandb(config, run(config))


ALONE = {"WANDB_SERVICE": None}  # not with the service of the tests' own process
REAL = [
    pytest.param("tensorboard", "TensorBoard", marks=needs("tensorboard")),
    pytest.param("mlflow", "MLflow", marks=needs("mlflow")),
    pytest.param("wandb", "WandB", marks=needs("wandb")),
]
HELD = {
    "tensorboard": assert_scalars,
    "mlflow": lambda config, record: assert_mlflow(config, *mlflow_runs(config), record),
    "wandb": assert_wandb,
}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "name"), REAL)
def test_each_epoch_stands_once_after_sigkill(small_config, tmp_path, cli, option, name):
    """The third one is trained twice, and logged by both processes."""
    overrides = (
        *tiny.OVERRIDES,
        *tiny.SMALL,
        f"tracker={option}",
        "epochs=4",
        "checkpoint_seconds=0",
    )
    done = cli(*overrides, f"tracker._target_=tests.test_trackers.Dying{name}", env=ALONE)
    assert done.returncode == -signal.SIGKILL
    config = small_config(f"tracker={option}", "epochs=4", "checkpoint_seconds=0")
    assert len(whole_rows(config)) == 3
    HELD[option](config, run(config))


@pytest.mark.slow
@pytest.mark.parametrize(("option", "name"), REAL)
def test_ctrl_c_ends_a_command_as_without_a_tracker(small_config, tmp_path, option, name):
    """The signal reaches all processes of the group, as from a terminal."""
    long = (*tiny.OVERRIDES, *tiny.SMALL, "epochs=100000", f"tracker={option}")
    process = started(tmp_path, "gnbench", *long, env=ALONE, start_new_session=True)
    config = small_config("epochs=100000")
    until = time.monotonic() + 120
    while not whole_rows(config):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)  # until nobody else holds the pipe, either
    assert process.returncode == 130, said
    assert said.count("interrupted; the same command resumes it") == 1
    assert "Traceback" not in said
    assert "tracker=" not in said
    assert of(config).record()["status"] == "interrupted"


@pytest.mark.slow
def test_of_several_processes_one_has_a_tracker(tmp_path):
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "gnbench")
    mine = ("batch_size=4", "tracker._target_=tests.test_trackers.Scribe")
    process = started(tmp_path, *launcher, *tiny.OVERRIDES, *mine, stderr=subprocess.STDOUT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    [path] = tmp_path.rglob("told.txt")
    assert path.read_text().split("\n") == [
        "0 begin", "0 log 1", "0 log 2", "0 close completed", "",
    ]  # fmt: skip
