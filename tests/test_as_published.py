"""What the report's code would have printed, measured beside a run: the number, and no trace."""

import csv
import os
import signal

import pytest
import torch
from torch import nn

from gnbench import build
from gnbench.aggregate.study import PUBLISHED, read_study
from gnbench.check import compose
from gnbench.errors import ConfigError, Interrupted
from gnbench.runs.directory import RunDirectory
from gnbench.runs.runner import run
from gnbench.train.as_published import best, epoch_row, measure, printed_error
from gnbench.train.engine import EagerEngine
from gnbench.train.replicas import ReplicaGroup
from tests import tiny, trainings
from tests.conftest import measured
from tests.replays import Recorder

# Six steps an epoch; the 20 test images are two batches of 8 and one of 4. A test pass in train
# mode moves the statistics of batch norm, and dropout draws random numbers.
RUN = (*tiny.SMALL, "norm=bn", "model.dropout=0.5", "optimizer.lr=0.01", "as_published=true")


def table(config):
    """Return the rows of a run's as_published.csv as numbers."""
    with RunDirectory(config.run_dir).as_published_path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four epochs that nobody disturbs, and its record."""
    outputs = tmp_path_factory.mktemp("whole")
    config = compose(*tiny.OVERRIDES, *RUN, "epochs=4", f"outputs={outputs}")
    return config, run(config)


def test_the_run_itself_is_the_same_to_the_bit(whole, tiny_config):
    with_it, found = whole
    without = tiny_config(*RUN, "epochs=4", "as_published=false")
    expected = run(without)
    assert with_it.run_id == without.run_id
    folder, other = RunDirectory(with_it.run_dir), RunDirectory(without.run_dir)
    assert measured(folder.metrics_path) == measured(other.metrics_path)
    assert folder.correct_path.read_bytes() == other.correct_path.read_bytes()
    weights, others = (torch.load(d.model_path, weights_only=True) for d in (folder, other))
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert not other.as_published_path.exists()

    kept = table(with_it)[int(table(with_it)[-1]["best_epoch"]) - 1]
    assert found["result"] == {
        **expected["result"],
        "printed_error": kept["printed_error"],
        "printed_epoch": kept["epoch"],
    }
    said = f"would have printed {kept['printed_error']:.2f} % (of epoch {kept['epoch']:.0f}, its"
    assert said in folder.log_path.read_text()
    # Nor do the readers of records mind.
    runs = read_study(with_it.run_dir.parent).finished
    assert runs["test_error"].tolist() == [expected["result"]["test_error"]]


def test_a_recorded_training_is_the_same_to_the_bit(monkeypatch):
    """Steps replayed as CUDA graphs replay them, with a measurement after each epoch."""
    monkeypatch.setattr("gnbench.train.graph_engine.STEPS_A_GRAPH", 4)

    def trained(group, measuring):
        one, found, numbers = trainings.training(dropout=0.5, epochs=3, group=group), [], []
        for row in one.run():
            if row is not None:
                found.append(trainings.timeless(row))
                if measuring:
                    numbers.append(measure(one.engine.model, one.test, "fp32", 8))
        return one, found, numbers

    plain, rows, expected = trained(None, True)
    assert trained(None, False)[1] == rows
    replayed, again, numbers = trained(ReplicaGroup(Recorder(), trainings.CPU), True)
    assert replayed.engine.name == "graph"
    assert (again, numbers) == (rows, expected)
    trainings.assert_same_weights(replayed, plain)


def by_hand(model, images, labels):
    """Count errors: of batches of 8 in train mode, then of one image at a time in eval mode."""
    with torch.inference_mode():
        logits = [model.train()(batch) for batch in images.split(8)]
        wrong = (torch.cat(logits).argmax(1) != labels).sum().item()
        logits = [model.eval()(image[None]) for image in images]
        return wrong, (torch.cat(logits).argmax(1) != labels).sum().item()


def test_a_row_is_that_of_passes_by_hand(tiny_config):
    config = tiny_config(*RUN, "model.dropout=0", "epochs=2")
    run(config)
    model = build.build_model(config)
    model.load_state_dict(torch.load(config.run_dir / "model.pt", weights_only=True))
    data = tiny.dataset()
    images = ((data.test_images / 255 - 0.2860) / 0.3530).movedim(3, 1)
    wrong, moved_wrong = by_hand(model, images, data.test_labels)
    row = table(config)[-1]
    assert row.pop("best_epoch") in (1, 2)
    assert row == {
        "epoch": 2,
        "train_mode_wrong": wrong,
        "train_mode_test_error": pytest.approx(5 * wrong),
        "eval_mode_wrong": moved_wrong,
        "printed_error": pytest.approx(100 - 100 * (20 - moved_wrong) / 128),
    }


def test_the_pass_in_train_mode_moves_the_statistics_of_the_pass_in_eval_mode():
    """Against labels that are what the network says with its own statistics."""
    torch.manual_seed(0)
    model, data = trainings.Network("bn"), trainings.data(200, seed=1)
    images, _ = data.chunk(0, 200)
    with torch.inference_mode():
        data.labels = model.eval()(images).argmax(1)
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    found = measure(model, data, "fp32", batch_size=8)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found == by_hand(model, images, data.labels)
    assert found[0] > found[1] > 0


def test_without_statistics_of_batches_and_dropout_it_is_the_own_test_error(tiny_config):
    config = tiny_config(*RUN, "norm=gn8", "model.dropout=0")
    run(config)
    wrong = [row["test_wrong"] for row in RunDirectory(config.run_dir).rows()]
    assert [row["train_mode_wrong"] for row in table(config)] == wrong
    assert [row["eval_mode_wrong"] for row in table(config)] == wrong


def test_dropout_is_on_where_the_epoch_is_chosen():
    """With all units dropped every logit is 0, and class 0 right for 5 of 20 images."""
    data = trainings.data(20)
    stored, _ = data.chunk(0, 20)

    class Knows(nn.Module):
        def forward(self, images):
            equal = (images[:, None] == stored).flatten(2).all(2)
            logits = nn.functional.one_hot(equal.int().argmax(1) % 4, 4).float()
            return nn.functional.dropout(logits, 1.0, self.training)

    assert measure(Knows().eval(), data, "fp32", batch_size=8) == (15, 0)


def test_the_divisor_is_that_of_the_report():
    """79 · 128 = 10,112 for 10,000 images; and every value of figure 3 as it was corrected."""
    assert printed_error(1324, 10_000) == pytest.approx(100 - 867_600 / 10_112)
    assert printed_error(64, 128) == 50
    with PUBLISHED.open() as file:
        values = [row for row in csv.DictReader(file) if row["test_error_corrected"]]
    assert len(values) == 13
    for row in values:
        wrong = round(100 * float(row["test_error_corrected"]))
        assert printed_error(wrong, 10_000) == pytest.approx(float(row["test_error"]), abs=0.01)


def test_the_best_epoch_is_the_first_with_the_fewest_errors_in_train_mode():
    rows = []
    for epoch, wrong in enumerate([(9, 1), (7, 8), (7, 2), (6, 9)], start=1):
        rows.append(epoch_row(rows, epoch, wrong, 20))
    assert [row["best_epoch"] for row in rows] == [1, 2, 2, 4]
    assert best(rows)["printed_error"] == pytest.approx(100 * (1 - 11 / 128))


def stop(config, monkeypatch, after_step):
    """Begin the run and interrupt it after a step."""
    take = EagerEngine.train_steps

    def signalled(engine, epoch, at, most):
        taken = take(engine, epoch, at, most)
        if epoch.first_step + at + 1 == after_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "train_steps", signalled)
        with pytest.raises(Interrupted):
            run(config)


@pytest.mark.parametrize("after_step", [9, 12])  # in the midst of an epoch; before its evaluation
def test_an_interrupted_run_measures_the_same(tiny_config, whole, monkeypatch, after_step):
    config = tiny_config(*RUN, "epochs=4")
    stop(config, monkeypatch, after_step)
    assert table(config) == table(whole[0])[:1]
    assert run(config)["result"] == whole[1]["result"]
    assert table(config) == table(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["append", "save_as_published", "save_model"])
def test_a_killed_run_measures_the_same(tiny_config, whole, monkeypatch, method):
    """Killed as soon as a file of the third epoch is there, or at its end.

    The last checkpoint is of the second epoch: what is in the files beyond it comes again. At the
    end it is of the end, and the table is lost.
    """
    config, at_end = tiny_config(*RUN, "epochs=4", "checkpoint_seconds=0"), method == "save_model"
    save, write = RunDirectory.save_checkpoint, getattr(RunDirectory, method)

    def seldom(self, state):
        if at_end or state["position"]["step"] < 12:
            save(self, state)

    def killing(self, argument):
        write(self, argument)
        if len(self.rows()) >= 3:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", seldom)
        patch.setattr(RunDirectory, method, killing)
        with pytest.raises(SystemExit):
            run(config)
    if at_end:
        RunDirectory(config.run_dir).as_published_path.unlink()
    assert run(config)["result"] == whole[1]["result"]
    assert table(config) == table(whole[0])


@pytest.mark.slow
def test_asked_for_too_late_it_says_so_and_gives_no_number(tiny_config, monkeypatch, caplog):
    config, without = tiny_config(*RUN), tiny_config(*RUN, "as_published=false", "rerun=true")
    stop(without, monkeypatch, after_step=9)
    result = run(config)["result"]
    assert "printed_error" not in result
    assert "as_published=true came after epochs that were not measured" in caplog.text
    assert [row["epoch"] for row in table(config)] == [2]
    again = run(tiny_config(*RUN, "rerun=true"))["result"]
    assert [row["epoch"] for row in table(config)] == [1, 2]
    assert again["printed_epoch"] == table(config)[-1]["best_epoch"]
    run(without)
    assert not RunDirectory(config.run_dir).as_published_path.exists()
    assert "was trained without as_published" not in caplog.text
    run(config)
    assert f"{config.run_id} was trained without as_published; rerun=true" in caplog.text


def test_an_older_record_has_no_such_setting(tiny_config):
    older = {name: v for name, v in tiny_config().plain().items() if name != "as_published"}
    assert tiny_config().parse(older).as_published is False


def test_what_cannot_be_measured_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"as_published=true: not on several processes \(2\)"):
        tiny_config(*RUN).with_(processes=2)
    # A last test batch of one image, of which the last batch norms see one pixel.
    small = ("dataset.image=[1,4,4]", "model.final_pool=false", "batch_size=19")
    tiny_config(*RUN, *small, "as_published=false")
    with pytest.raises(ConfigError, match="as_published=true: of the last 1 test images in train"):
        tiny_config(*RUN, *small)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_cuda_the_run_itself_is_the_same_to_the_bit(tiny_config, engine):
    chosen = (*RUN, "device=cuda", f"engine={engine}", "epochs=4")
    with_it, without = (
        tiny_config(*chosen, f"study=with_{s}", f"as_published={s}") for s in ("true", "false")
    )
    assert [run(one)["engine"] for one in (with_it, without)] == [engine, engine]
    folder, other = RunDirectory(with_it.run_dir), RunDirectory(without.run_dir)
    assert measured(folder.metrics_path) == measured(other.metrics_path)
    assert len(table(with_it)) == 4
