import json
import os
import signal
import threading

import pytest
import torch

from gnbench import datasets, execution, experiment, runs
from gnbench.config import run_id
from gnbench.execution import Interrupted, run
from gnbench.runs import Run
from tests.conftest import measured


def place(config):
    return Run(f"{config.outputs}/{config.study}/{run_id(config)}")


def test_a_run_directory_holds_what_the_contract_says(tiny_config):
    config = tiny_config("epochs=7")
    record = run(config)
    directory = place(config).directory
    files = {p.name for p in directory.iterdir()}
    assert files == {"run.json", "metrics.csv", "model.pt", "gnbench.log", ".lock"}
    assert record == json.loads((directory / "run.json").read_text())
    assert set(record) == {
        "status", "config", "seed", "error", "result", "versions", "device", "engine",
        "started", "seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert record["status"] == "completed"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["device"].startswith("cpu (")
    assert record["peak_memory_bytes"] > 0
    header, *rows = (directory / "metrics.csv").read_text().splitlines()
    assert header == (
        "epoch,step,lr,train_loss,train_error,test_loss,test_error,test_wrong,test_total,"
        "images_per_second,seconds"
    )
    errors = [float(row.split(",")[6]) for row in rows]
    assert len(errors) == 7
    assert record["result"] == {
        "test_error": sorted(errors[-5:])[2],
        "test_error_final": errors[-1],
        "epochs": 7,
    }
    model = experiment.build_model(config)
    model.load_state_dict(torch.load(directory / "model.pt", weights_only=True))


def test_a_complete_run_is_not_trained_again_unless_asked(tiny_config, caplog):
    caplog.set_level("INFO")
    config = tiny_config()
    first = run(config)
    metrics = place(config).metrics_path.read_text()
    assert run(config) == first
    assert "is completed (test error" in caplog.text
    assert place(config).metrics_path.read_text() == metrics
    again = run(tiny_config("rerun=true"))
    assert again["started"] >= first["started"]
    assert measured(place(config).metrics_path) == [r.split(",")[:9] for r in metrics.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(
    tiny_config, number, tmp_path, monkeypatch
):
    config = tiny_config("epochs=3")
    expected = run(tiny_config("epochs=3", f"outputs={tmp_path}/whole"))
    whole = measured(Run(f"{tmp_path}/whole/default/{run_id(config)}").metrics_path)

    take = execution.EagerEngine.train_step

    def signalled(engine, data, plan, start, stop, step):
        take(engine, data, plan, start, stop, step)
        if step == 8:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(execution.EagerEngine, "train_step", signalled)
        with pytest.raises(Interrupted) as caught:
            run(config)
    assert caught.value.exit_code == 128 + number
    assert place(config).record()["status"] == "interrupted"
    assert torch.load(place(config).checkpoint_path, weights_only=True)["position"]["step"] == 9
    assert signal.getsignal(number) != signal.SIG_IGN
    record = run(config)
    assert measured(place(config).metrics_path) == whole
    assert record["result"] == expected["result"]
    assert not place(config).checkpoint_path.exists()


def test_rerun_of_an_interrupted_run_resumes_it_too(tiny_config, monkeypatch):
    config = tiny_config("epochs=3", "rerun=true")
    run(config)
    take = execution.EagerEngine.train_step

    def interrupted(engine, data, plan, start, stop, step):
        take(engine, data, plan, start, stop, step)
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(execution.EagerEngine, "train_step", interrupted)
        with pytest.raises(Interrupted):
            run(config)
    steps = []

    def counted(engine, data, plan, start, stop, step):
        take(engine, data, plan, start, stop, step)
        steps.append(step)

    monkeypatch.setattr(execution.EagerEngine, "train_step", counted)
    assert run(config)["status"] == "completed"
    assert steps == list(range(9, 18))


def test_rerun_without_data_keeps_the_old_result(tiny_config, monkeypatch):
    config = tiny_config("rerun=true")
    first = run(config)

    def gone(config):
        raise datasets.DataError("the images are gone")

    monkeypatch.setattr(execution, "load_dataset", gone)
    with pytest.raises(datasets.DataError):
        run(config)
    assert place(config).record() == first
    assert place(config).model_path.exists()


def test_a_signal_before_the_training_is_heeded_at_once(tiny_config, monkeypatch):
    config = tiny_config()

    def slow(config):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the download went on")

    monkeypatch.setattr(execution, "load_dataset", slow)
    with pytest.raises(Interrupted) as caught:
        run(config)
    assert caught.value.exit_code == 143
    assert place(config).record()["status"] == "interrupted"


def test_a_signal_at_the_very_end_spares_the_run_and_stops_the_sweep(tiny_config, monkeypatch):
    save = Run.save_model

    def interrupted(self, state):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, state)

    monkeypatch.setattr(Run, "save_model", interrupted)
    config = tiny_config()
    with pytest.raises(Interrupted):
        run(config)
    assert place(config).record()["status"] == "completed"
    assert place(config).model_path.exists()


def test_a_run_killed_between_its_divergence_and_its_record_stays_diverged(tiny_config):
    config = tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "epochs=9")
    training = experiment.build_training(config, experiment.load_dataset(config))
    rows = [row for row in training.run() if row is not None]
    again = experiment.build_training(config, experiment.load_dataset(config))
    again.load_state_dict(training.state_dict())
    assert training.diverged
    assert len(rows) < 9
    assert list(again.run()) == []


def test_a_checkpoint_whose_rows_are_lost_is_not_used(tiny_config, monkeypatch, caplog):
    """As after a power cut: the checkpoint reached the disk, the rows before it did not."""
    config = tiny_config("epochs=4", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", lambda self, state: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(config)
    lines = place(config).metrics_path.read_text().splitlines(keepends=True)
    place(config).metrics_path.write_text("".join(lines[:2]) + lines[2][:10])
    assert run(config)["result"]["epochs"] == 4
    assert "has fewer epochs than the checkpoint" in caplog.text
    assert len(measured(place(config).metrics_path)) == 5


def test_a_row_after_the_last_checkpoint_is_trained_again_not_repeated(tiny_config, monkeypatch):
    """As after a SIGKILL: rows that no checkpoint covers, the last of them cut in the middle."""
    config = tiny_config("epochs=4", "checkpoint_seconds=0")
    run(tiny_config("epochs=4", "study=whole"))
    whole = measured(Run(f"{config.outputs}/whole/{run_id(config)}").metrics_path)

    save = Run.save_checkpoint
    saved = []

    def stop_saving(self, state):
        if state["position"]["epoch"] < 2:
            save(self, state)
            saved.append(state["position"]["epoch"])

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", stop_saving)
        patch.setattr(Run, "save_model", lambda self, state: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(config)
    assert saved[-1] == 1
    with place(config).metrics_path.open("a") as file:
        file.write("5,30,0.00")
    run(config)
    assert measured(place(config).metrics_path) == whole


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_a_damaged_checkpoint_is_said_set_aside_and_not_used(tiny_config, damage, caplog):
    config = tiny_config("epochs=2")
    directory = place(config)
    directory.directory.mkdir(parents=True)
    if damage == "foreign":
        torch.save({"run_id": "another-run"}, directory.checkpoint_path)
    else:
        torch.save({"run_id": run_id(config)}, directory.checkpoint_path)
        data = directory.checkpoint_path.read_bytes()
        directory.checkpoint_path.write_bytes(data[:100] if damage == "truncated" else b"garbage")
    assert run(config)["status"] == "completed"
    assert "set aside as checkpoint.pt.damaged" in caplog.text
    assert (directory.directory / "checkpoint.pt.damaged").exists()


def test_a_garbage_record_is_set_aside(tiny_config, caplog):
    config = tiny_config("epochs=1")
    directory = place(config)
    directory.directory.mkdir(parents=True)
    directory.record_path.write_text('{"status": "compl')
    assert run(config)["status"] == "completed"
    assert "set aside as run.json.damaged" in caplog.text


def test_a_failure_is_recorded_and_raised(tiny_config, monkeypatch):
    config = tiny_config()

    def fail(*_):
        raise RuntimeError("the dog ate it")

    monkeypatch.setattr(execution.EagerEngine, "train_step", fail)
    with pytest.raises(RuntimeError, match="the dog ate it"):
        run(config)
    record = place(config).record()
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the dog ate it")


def test_out_of_memory_is_a_result(tiny_config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(execution.EagerEngine, "train_step", fail)
    record = run(tiny_config())
    assert (record["status"], record["error"]) == ("out_of_memory", "tried to allocate 80 GiB")


def test_divergence_is_a_result_of_chance_level(tiny_config):
    record = run(
        tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "epochs=9", "study=d")
    )
    assert record["status"] == "diverged"
    assert record["result"]["test_error"] == 75.0
    assert record["result"]["epochs"] < 9


def test_a_diverged_run_reports_its_last_error_not_the_good_epochs_before():
    rows = [{"test_error": e} for e in (9.0, 8.0, 7.0, 90.0)]
    assert runs.result(rows, diverged=True)["test_error"] == 90.0
    assert runs.result(rows, diverged=False)["test_error"] == 8.5
    assert runs.result([], diverged=False) is None


def test_a_run_killed_between_its_weights_and_its_record_ends_from_its_checkpoint(
    tiny_config, monkeypatch
):
    config = tiny_config("epochs=3", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", lambda self, state: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(config)
    rows = measured(place(config).metrics_path)
    assert place(config).record()["status"] == "running"

    def no_step(*_):
        raise AssertionError("it had been trained")

    monkeypatch.setattr(execution.EagerEngine, "train_step", no_step)
    assert run(config)["status"] == "completed"
    assert measured(place(config).metrics_path) == rows
    assert not place(config).checkpoint_path.exists()


def test_an_empty_metrics_file_gets_its_header(tiny_config):
    """As after a disk that was full at the first epoch."""
    config = tiny_config("epochs=1")
    place(config).directory.mkdir(parents=True)
    place(config).metrics_path.touch()
    assert run(config)["result"]["epochs"] == 1
    assert len(measured(place(config).metrics_path)) == 2


def test_two_processes_do_not_train_the_same_run(tiny_config):
    config = tiny_config()
    with place(config).locked():
        outcome = []

        def second():
            try:
                run(config)
            except runs.LockedError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "is being trained by another process" in outcome[0]
    assert run(config)["status"] == "completed"


def test_peak_memory_starts_again_with_every_run(tiny_config):
    """Against a block that the first run of a process touched and the second did not."""
    before = run(tiny_config("seed=1"))["peak_memory_bytes"]
    block = torch.ones(100 * 2**20)  # 400 MiB
    high = run(tiny_config("seed=2"))["peak_memory_bytes"]
    assert high > before + block.nbytes / 2
    del block
    after = run(tiny_config("seed=3"))["peak_memory_bytes"]
    assert after < high - 300 * 2**20


def test_a_bar_shows_on_request_and_lines_elsewhere(tiny_config, capfd, caplog):
    caplog.set_level("INFO")
    run(tiny_config("progress=lines"))
    assert capfd.readouterr().err == ""
    assert caplog.text.count("train loss") == 2
    assert "eta 0:00:00" in caplog.text
    run(tiny_config("progress=bar", "seed=1"))
    assert "gn bs8: 100%" in capfd.readouterr().err
