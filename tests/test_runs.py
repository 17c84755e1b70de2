import errno
import itertools
import json
import math
import os
import shutil
import signal
import threading

import pytest
import torch

from gnbench import build
from gnbench.errors import ConfigError, DataError, Interrupted, LockedError
from gnbench.runs import directory, open_run
from gnbench.runs.directory import RunDirectory, read_correct
from gnbench.runs.runner import run
from gnbench.train.engine import EagerEngine
from gnbench.train.row import COLUMNS
from tests import tiny
from tests.conftest import measured


def of(config):
    return RunDirectory(config.run_dir)


def killed(*_):
    """End the process where something else was to be done."""
    raise SystemExit


def test_a_run_directory_holds_what_the_contract_says(tiny_config):
    config = tiny_config("epochs=7")
    record = run(config)
    folder = config.run_dir
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "run.json", "metrics.csv", "model.pt", "correct.npy", "gnbench.log", ".lock",
    }  # fmt: skip
    assert record == json.loads((folder / "run.json").read_text())
    assert set(record) == {
        "status", "config", "seed", "error", "result", "versions", "device", "engine",
        "started", "seconds", "peak_memory_bytes", "activation_bytes",
    }  # fmt: skip
    assert record["status"] == "completed"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["device"].startswith("cpu (")
    assert record["peak_memory_bytes"] > 0
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
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
        "balanced_test_error": errors[-1],  # five test images of each class
    }
    model = build.build_model(config)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    # Whether each test image was right, one at a time and by hand.
    data = tiny.dataset()
    images = (data.test_images / 255 - 0.2860) / 0.3530
    with torch.inference_mode():
        right = [
            model.eval()(image.movedim(2, 0)[None]).argmax().item() == label
            for image, label in zip(images, data.test_labels.tolist(), strict=True)
        ]
    correct = read_correct(folder / "correct.npy", total=20)
    assert correct.tolist() == right
    assert 20 - sum(right) == int(rows[-1].split(",")[7])
    assert (folder / "correct.npy").stat().st_size == 128 + 3


def test_a_complete_run_is_not_trained_again_unless_asked(tiny_config, caplog):
    caplog.set_level("INFO")
    config = tiny_config()
    first = run(config)
    metrics = of(config).metrics_path.read_text()
    assert run(config) == first
    assert "is completed (test error" in caplog.text
    assert of(config).metrics_path.read_text() == metrics
    again = run(tiny_config("rerun=true"))
    assert again["started"] >= first["started"]
    assert measured(of(config).metrics_path) == [r.split(",")[:9] for r in metrics.splitlines()]


def interrupt(config, monkeypatch, step, *signals):
    """Begin the run and send it ``signals`` after ``step``; return what it raised."""
    take = EagerEngine.train_steps

    def signalled(engine, epoch, at, most):
        taken = take(engine, epoch, at, most)
        if epoch.first_step + at == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "train_steps", signalled)
        with pytest.raises(Interrupted) as caught:
            run(config)
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(
    tiny_config, number, tmp_path, monkeypatch
):
    config = tiny_config("epochs=3")
    expected = run(tiny_config("epochs=3", f"outputs={tmp_path}/whole"))
    whole = measured(RunDirectory(tmp_path / "whole" / "default" / config.run_id).metrics_path)

    caught = interrupt(config, monkeypatch, 8, number, number)  # as Slurm does without grace time
    assert caught.exit_code == 128 + number
    assert of(config).record()["status"] == "interrupted"
    assert torch.load(of(config).checkpoint_path, weights_only=True)["position"]["step"] == 9
    assert signal.getsignal(number) != signal.SIG_IGN
    record = run(config)
    assert measured(of(config).metrics_path) == whole
    assert record["result"] == expected["result"]
    assert not of(config).checkpoint_path.exists()


def test_rerun_of_an_interrupted_run_resumes_it_too(tiny_config, monkeypatch):
    config = tiny_config("epochs=3", "rerun=true")
    run(config)
    interrupt(config, monkeypatch, 8, signal.SIGINT)
    take = EagerEngine.train_steps
    steps = []

    def counted(engine, epoch, at, most):
        steps.append(epoch.first_step + at)
        return take(engine, epoch, at, most)

    monkeypatch.setattr(EagerEngine, "train_steps", counted)
    assert run(config)["status"] == "completed"
    assert steps == list(range(9, 18))


def test_rerun_without_data_keeps_the_old_result(tiny_config, monkeypatch):
    config = tiny_config("rerun=true")
    first = run(config)

    def gone(config):
        raise DataError("the images are gone")

    monkeypatch.setattr(build, "load_dataset", gone)
    with pytest.raises(DataError):
        run(config)
    assert of(config).record() == first
    assert of(config).model_path.exists()


def test_a_signal_before_the_training_is_heeded_at_once(tiny_config, monkeypatch):
    config = tiny_config()

    def slow(config):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the download went on")

    monkeypatch.setattr(build, "load_dataset", slow)
    with pytest.raises(Interrupted) as caught:
        run(config)
    assert caught.value.exit_code == 143
    assert not config.run_dir.exists()


def test_a_signal_at_the_very_end_spares_the_run_and_stops_the_sweep(tiny_config, monkeypatch):
    save = RunDirectory.save_model

    def interrupted(self, state):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, state)

    monkeypatch.setattr(RunDirectory, "save_model", interrupted)
    config = tiny_config()
    with pytest.raises(Interrupted):
        run(config)
    assert of(config).record()["status"] == "completed"
    assert of(config).model_path.exists()


def test_a_run_killed_between_its_divergence_and_its_record_stays_diverged(tiny_config):
    config = tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "epochs=9")
    training = build.build_training(config, build.load_dataset(config))
    rows = [row for row in training.run() if row is not None]
    again = build.build_training(config, build.load_dataset(config))
    again.load_state_dict(training.state_dict())
    assert training.diverged
    assert len(rows) < 9
    assert list(again.run()) == []


def test_rows_that_are_lost_come_back_from_the_checkpoint(tiny_config, monkeypatch, caplog):
    """As after a power cut: the checkpoint reached the disk, the rows before it did not."""
    config = tiny_config("epochs=4", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    text = of(config).metrics_path.read_text()
    lines = text.splitlines(keepends=True)
    of(config).metrics_path.write_text("".join(lines[:2]) + lines[2][:10])
    monkeypatch.setattr(EagerEngine, "train_steps", None)  # nothing is trained again
    assert run(config)["result"]["epochs"] == 4
    assert "metrics.csv had lost rows; restored from the checkpoint" in caplog.text
    assert of(config).metrics_path.read_text() == text


def test_metrics_that_contradict_the_checkpoint_are_set_aside(tiny_config, monkeypatch, caplog):
    config = tiny_config("epochs=2", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    text = of(config).metrics_path.read_text()
    of(config).metrics_path.write_text(text.replace("1,6,", "1,7,"))
    run(config)
    assert "differs from its checkpoint; set aside as metrics.csv.set-aside" in caplog.text
    assert of(config).metrics_path.read_text() == text


def test_a_row_after_the_last_checkpoint_is_trained_again_not_repeated(tiny_config, monkeypatch):
    """As after a SIGKILL: rows that no checkpoint covers, the last of them cut in the middle."""
    config = tiny_config("epochs=4", "checkpoint_seconds=0")
    run(tiny_config("epochs=4", "study=whole"))
    whole = measured(RunDirectory(config.run_dir.parents[1] / "whole" / config.run_id).metrics_path)

    save = RunDirectory.save_checkpoint
    saved = []

    def stop_saving(self, state):
        if state["position"]["epoch"] < 2:
            save(self, state)
            saved.append(state["position"]["epoch"])

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", stop_saving)
        patch.setattr(RunDirectory, "save_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    assert saved[-1] == 1
    with of(config).metrics_path.open("a") as file:
        file.write("5,30,0.00")
    run(config)
    assert measured(of(config).metrics_path) == whole


def checkpoint_of(config, monkeypatch):
    """Leave the checkpoint of a run that was interrupted after its seventh step."""
    interrupt(config, monkeypatch, 6, signal.SIGINT)
    return of(config).checkpoint_path


DAMAGE = {
    "truncated": "is not a whole checkpoint",
    "garbage": "is not a whole checkpoint",
    "empty": "is not a whole checkpoint",
    "a list": "is not a checkpoint",
    "pickled code": "is not a whole checkpoint",
    "identity": "belongs to another run",
    "format": "is not a checkpoint of this form",
    "gnbench": "was written with gnbench 9.9.9+gabc, this is",
    "torch": "was written with torch 1.0, this is",
    "model": "does not fit the run",
    "optimizer": "does not fit the run",
}
FAST_DAMAGE = [*{text: damage for damage, text in DAMAGE.items()}.values()]


@pytest.mark.parametrize(
    "damage",
    # One of each message is fast.
    [one if one in FAST_DAMAGE else pytest.param(one, marks=pytest.mark.slow) for one in DAMAGE],
)
def test_a_checkpoint_that_cannot_be_used_is_said_set_aside_and_not_used(
    tiny_config, damage, caplog, monkeypatch, tmp_path
):
    config = tiny_config("norm=bn")
    whole = run(tiny_config("norm=bn", "study=whole"))
    path = checkpoint_of(config, monkeypatch)
    data = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage in ("garbage", "empty"):
        path.write_bytes(damage.encode() if damage == "garbage" else b"")
    elif damage == "a list":
        torch.save([state], path)
    elif damage == "pickled code":
        torch.save({**state, "rows": [Trap(tmp_path / "sprung")]}, path)
    elif damage in ("gnbench", "torch"):
        version = {"gnbench": "9.9.9+gabc", "torch": "1.0"}[damage]
        torch.save({**state, "versions": {**state["versions"], damage: version}}, path)
    elif damage in ("model", "optimizer"):
        del state[damage][next(iter(state[damage]))]  # a weight; the moments
        torch.save(state, path)
    else:
        torch.save({**state, damage: "another"}, path)
    caplog.clear()
    record = run(config)
    assert record["result"] == whole["result"]
    assert DAMAGE[damage] in caplog.text
    assert "set aside as checkpoint.pt.set-aside" in caplog.text
    assert "resumes after step" not in caplog.text
    assert (path.parent / "checkpoint.pt.set-aside").exists()
    assert not (tmp_path / "sprung").exists()
    assert measured(of(config).metrics_path) == measured(
        of(tiny_config("norm=bn", "study=whole")).metrics_path
    )


def test_a_checkpoint_for_which_there_is_no_memory_now_is_kept(tiny_config, monkeypatch, caplog):
    config = tiny_config()
    path = checkpoint_of(config, monkeypatch)

    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", full)
        assert run(config)["status"] == "out_of_memory"
    assert path.exists()
    caplog.set_level("INFO")
    assert run(config)["status"] == "completed"
    assert "resumes after step 7" in caplog.text


def test_what_ended_a_run_is_said_though_its_rows_cannot_be_read(tiny_config, monkeypatch):
    config = tiny_config()

    def fails(*_, **__):
        raise ValueError("a fault of its own")

    def unreadable(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(EagerEngine, "train_steps", fails)
    monkeypatch.setattr(RunDirectory, "rows", unreadable)
    with pytest.raises(ValueError, match="a fault of its own"):
        run(config)


class Trap:
    """What a pickle can do to its reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_of_another_commit_is_used_and_that_is_said(tiny_config, monkeypatch, caplog):
    config = tiny_config()
    path = checkpoint_of(config, monkeypatch)
    state = torch.load(path, weights_only=True)
    release = directory.versions()["gnbench"].partition("+")[0]
    torch.save({**state, "versions": {**state["versions"], "gnbench": f"{release}+gabc"}}, path)
    caplog.set_level("INFO")
    run(config)
    assert f"was written by gnbench {release}+gabc, this is" in caplog.text
    assert "resumes after step 7" in caplog.text


def test_a_checkpoint_of_other_threads_is_used_and_that_is_said(tiny_config, monkeypatch, caplog):
    config = tiny_config()
    path = checkpoint_of(config, monkeypatch)
    state = torch.load(path, weights_only=True)
    here = of(config).record()["device"]
    assert state["device"] == here
    torch.save({**state, "device": here.replace(" threads", "77 threads")}, path)
    caplog.set_level("INFO")
    run(config)
    assert f"77 threads), this is {here}: it is used all the same" in caplog.text
    assert "resumes after step 7" in caplog.text


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("cuda:1 (NVIDIA H100)", "cuda:0 (NVIDIA H100)", False),
        ("cuda:0 (NVIDIA H200)", "cuda:0 (NVIDIA H100)", True),
        (None, "cuda:0 (NVIDIA H100)", False),  # of a version that did not write it
    ],
)
def test_which_of_several_equal_gpus_it_was_makes_no_difference(
    tiny_config, monkeypatch, caplog, there, here, said
):
    config = tiny_config()
    path = checkpoint_of(config, monkeypatch)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "device": there}, path)
    monkeypatch.setattr("gnbench.train.devices.describe_device", lambda _: here)
    run(config)
    assert ("it is used all the same" in caplog.text) is said


def test_files_set_aside_are_all_kept(tiny_config):
    config = tiny_config("epochs=1")
    for text in ("first", "second"):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        of(config).record_path.write_text(text)
        run(config)
    folder = config.run_dir
    assert (folder / "run.json.set-aside").read_text() == "first"
    assert (folder / "run.json.set-aside-2").read_text() == "second"


def test_a_directory_of_another_run_is_refused(tiny_config):
    one, other = tiny_config("epochs=1"), tiny_config("epochs=1", "seed=1")
    run(one)
    shutil.copytree(one.run_dir, other.run_dir)
    before = {p.name: p.read_bytes() for p in other.run_dir.iterdir()}
    with pytest.raises(ConfigError, match=r"holds another run \(tiny-.*; choose another"):
        run(other)
    assert {p.name: p.read_bytes() for p in other.run_dir.iterdir()} == before


@pytest.mark.slow
def test_checkpoints_take_a_hundredth_of_the_time_at_most(tiny_config, monkeypatch):
    """On a clock that tells 2 s for every checkpoint and 1 s for every step."""
    clock = [0.0]
    save, take = RunDirectory.save_checkpoint, EagerEngine.train_steps
    saved = []

    def slow_save(self, state):
        clock[0] += 2
        saved.append(clock[0])
        save(self, state)

    def slow_step(*arguments):
        clock[0] += 1
        return take(*arguments)

    monkeypatch.setattr(RunDirectory, "save_checkpoint", slow_save)
    monkeypatch.setattr(EagerEngine, "train_steps", slow_step)
    monkeypatch.setattr(open_run.time, "monotonic", lambda: clock[0])
    run(tiny_config("epochs=40", "checkpoint_seconds=5"))  # 240 steps
    pauses = [after - before - 2 for before, after in itertools.pairwise(saved)]
    assert saved[0] == 6 + 2  # the first, when its cost is not known
    assert pauses
    assert all(2 / (2 + pause) < 0.01 for pause in pauses)


def test_a_garbage_record_is_set_aside(tiny_config, caplog):
    config = tiny_config("epochs=1")
    config.run_dir.mkdir(parents=True)
    of(config).record_path.write_text('{"status": "compl')
    assert run(config)["status"] == "completed"
    assert "set aside as run.json.set-aside" in caplog.text


def test_a_failure_is_recorded_and_raised(tiny_config, monkeypatch):
    config = tiny_config()

    def fail(*_):
        raise RuntimeError("the dog ate it")

    monkeypatch.setattr(EagerEngine, "train_steps", fail)
    with pytest.raises(RuntimeError, match="the dog ate it"):
        run(config)
    record = of(config).record()
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the dog ate it")


def test_out_of_memory_is_a_result(tiny_config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(EagerEngine, "train_steps", fail)
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
    assert directory.result(rows, diverged=True)["test_error"] == 90.0
    assert directory.result(rows, diverged=False)["test_error"] == 8.5
    assert directory.result([], diverged=False) is None


def test_a_run_killed_between_its_weights_and_its_record_ends_from_its_checkpoint(
    tiny_config, monkeypatch
):
    config = tiny_config("epochs=3", "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    rows = measured(of(config).metrics_path)
    assert of(config).record()["status"] == "running"

    def no_step(*_):
        raise AssertionError("it had been trained")

    monkeypatch.setattr(EagerEngine, "train_steps", no_step)
    assert run(config)["status"] == "completed"
    assert measured(of(config).metrics_path) == rows
    assert not of(config).checkpoint_path.exists()


def test_an_empty_metrics_file_gets_its_header(tiny_config):
    """As after a disk that was full at the first epoch."""
    config = tiny_config("epochs=1")
    config.run_dir.mkdir(parents=True)
    of(config).metrics_path.touch()
    assert run(config)["result"]["epochs"] == 1
    assert len(measured(of(config).metrics_path)) == 2


def test_two_processes_do_not_train_the_same_run(tiny_config):
    config = tiny_config()
    with of(config).locked():
        outcome = []

        def second():
            try:
                run(config)
            except LockedError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"is being trained by process {os.getpid()} on " in outcome[0]
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
    assert "gn bs8 seed1: 100%" in capfd.readouterr().err


def test_a_validation_has_columns_of_its_own(tiny_config, monkeypatch):
    """Its errors by hand; also after an interruption; without one the run is the one it was."""
    config = tiny_config("dataset.validation_size=8", "epochs=7", "checkpoint_seconds=0")
    interrupt(config, monkeypatch, 11, signal.SIGTERM)
    record = run(config)
    rows = RunDirectory(config.run_dir).rows()
    assert list(rows[0]) == list(COLUMNS)
    assert [row["val_total"] for row in rows] == [8] * 7
    assert [row["step"] for row in rows] == [5 * n for n in range(1, 8)]  # 40 images are left
    errors = [row["val_error"] for row in rows]
    assert record["result"]["val_error"] == sorted(errors[-5:])[2]
    model = build.build_model(config)
    model.load_state_dict(torch.load(config.run_dir / "model.pt", weights_only=True))
    held = build.load_dataset(config)
    images = ((held.validation_images / 255 - 0.2860) / 0.3530).permute(0, 3, 1, 2)
    with torch.inference_mode():
        wrong = (model.eval()(images).argmax(dim=1) != held.validation_labels).sum().item()
    assert rows[-1]["val_wrong"] == wrong
    assert config.run_id != tiny_config("epochs=7").run_id


@pytest.mark.slow
def test_evaluating_seldom_changes_nothing_else(tiny_config):
    """Of twelve epochs the fourth, and the last five; the same weights and the same run."""
    often = tiny_config("epochs=12")
    expected = run(often)
    rows = RunDirectory(often.run_dir).rows()
    seldom = tiny_config("epochs=12", "evaluate_every=4", "rerun=true", "checkpoint_seconds=0")
    assert seldom.run_id == often.run_id
    assert run(seldom)["result"] == expected["result"]
    found = RunDirectory(often.run_dir).rows()
    for one, other in zip(found, rows, strict=True):
        assert one["train_loss"] == other["train_loss"]
        if one["epoch"] in (4, 8, 9, 10, 11, 12):
            assert one["test_wrong"] == other["test_wrong"]
        else:
            assert math.isnan(one["test_wrong"])


def test_an_interruption_between_evaluations_leaves_a_record(tiny_config, monkeypatch):
    config = tiny_config("epochs=12", "evaluate_every=100", "checkpoint_seconds=0")
    interrupt(config, monkeypatch, 20, signal.SIGTERM)
    record = RunDirectory(config.run_dir).record()
    assert (record["status"], record["result"]) == ("interrupted", None)
    assert run(config)["result"]["epochs"] == 12


def test_a_loss_of_precision_is_said_once(tiny_config, monkeypatch):
    found = iter([None, "conv1: a mean of 60 standard deviations"])
    monkeypatch.setattr(open_run, "imprecise_statistics", lambda model, images: next(found))
    config = tiny_config("epochs=5")
    run(config)
    log = of(config).log_path.read_text()
    assert log.count("conv1: a mean of 60 standard deviations: float32 loses more than 1e-3") == 1
