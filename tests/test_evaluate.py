"""Finished weights under other statistics, against torch's own averages and hand arithmetic."""

import csv
import shutil

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from gnbench import evaluate as command
from gnbench.check import compose
from gnbench.config import RunConfig
from gnbench.errors import ConfigError
from gnbench.evaluate import EvaluateConfig
from gnbench.norms import batch_group_norm
from gnbench.runs.directory import RunDirectory
from gnbench.runs.runner import run
from gnbench.train import batch_statistics
from gnbench.train.batch_statistics import (
    EvalNorm,
    Moments,
    OfBatches,
    batch_norms,
    evaluated,
    replaced,
    training_moments,
    with_moments,
)
from gnbench.train.batches import draw_epoch
from tests import tiny
from tests.trainings import Network, data

CONFIG = compose(*tiny.OVERRIDES, "dataset.augmentation=flip", "seed=3")


@pytest.fixture
def network():
    """Return a network whose running statistics are those of no data."""
    torch.manual_seed(0)
    model = Network("bn")
    for layer in batch_norms(model).values():
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias)
        nn.init.uniform_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 1, 2)
    return model.eval()


def batches(train, images):
    """Return the inputs of the epoch after the last, a whole batch at a time."""
    plan = draw_epoch(CONFIG.seed, CONFIG.epochs, len(train), "flip")
    starts = range(0, len(train) - images + 1, images)
    return [train.batch(plan, slice(start, start + images))[0] for start in starts]


@pytest.mark.parametrize("images", [2, 5, 48])
def test_precise_statistics_are_torchs_average_over_batches(network, images):
    train = data(48)
    moments = training_moments(network, train, CONFIG, images)
    expected = Network("bn")
    expected.load_state_dict(network.state_dict())
    update_bn(batches(train, images), expected)
    ours = with_moments(network, moments).state_dict()
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_precise_statistics_are_over_batches_in_the_order_of_the_training(network):
    """Of data sorted by class, and no others: 48 images of four classes, twelve to a batch."""
    settings = {**CONFIG.dataset.plain(), "order": "sorted_by_class", "augmentation": "none"}
    train = data(48)
    moments = training_moments(network, train, CONFIG.with_(dataset=settings), 12)
    expected = Network("bn")
    expected.load_state_dict(network.state_dict())
    inputs, labels = train.chunk(0, 48)
    update_bn([inputs[labels == label] for label in range(4)], expected)
    ours = with_moments(network, moments).state_dict()
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("images", [2, 5])
def test_population_statistics_are_those_of_all_values_at_once(network, images):
    """All that goes into a batch norm, kept and looked at as a whole, in float64."""
    train, seen = data(48), {}
    moments = training_moments(network, train, CONFIG, images)
    for name, layer in batch_norms(network).items():
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: seen.setdefault(name, []).append(inputs[0].double())
        )
    for inputs in batches(train, images):
        network.train()(inputs)
    for name, own in moments.items():
        values = torch.cat(seen[name])
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        torch.testing.assert_close(own.mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.population.double(), variance, rtol=1e-5, atol=1e-6)
        assert (own.variance / own.population - 1).abs().max() > 1e-3  # they do differ


def test_batch_statistics_are_those_of_a_network_in_train_mode(network):
    test, images = data(20, seed=1), 3  # the last batch has two images
    order = draw_epoch(CONFIG.seed, 0, len(test), "none").order
    normalized, labels = test.chunk(0, 20)
    wrong = 0
    for at in range(0, 20, images):
        index = order[at : at + images]
        logits = network.train()(normalized[index])
        wrong += int((logits.argmax(dim=1) != labels[index]).sum())
    network.eval()
    found = list(evaluated(CONFIG, network, data(48), test, {images: ["batch"]}))
    assert found == [("batch", 3, wrong)]


def test_evalnorm_is_the_variance_of_the_mixture():
    """The image has a share of 1/images in it, the training set the rest."""
    torch.manual_seed(0)
    training = 2 + 3 * torch.randn(500, 6, 2, 2)
    image = torch.randn(1, 6, 2, 2)
    variance, mean = torch.var_mean(training, (0, 2, 3), correction=0)
    bn = nn.BatchNorm2d(6, eps=0.0)
    nn.init.uniform_(bn.weight)
    output = EvalNorm(bn, Moments(mean, variance, variance), images=4)(image)
    weights = torch.cat([torch.full((2000,), 0.75 / 2000), torch.full((4,), 0.25 / 4)]).double()
    for channel in range(6):
        values = torch.cat([training[:, channel].flatten(), image[0, channel].flatten()]).double()
        middle = (weights * values).sum()
        spread = (weights * (values - middle).square()).sum().sqrt()
        expected = (image[0, channel] - middle) / spread * bn.weight[channel]
        torch.testing.assert_close(output[0, channel], expected.float(), rtol=1e-4, atol=1e-5)


def test_one_image_at_a_time_is_instance_norm(network):
    """The whole of the statistics is then the image's own, in training and by evalnorm."""
    x = data(5).chunk(0, 5)[0]
    moments = training_moments(network, data(48), CONFIG, images=1)
    of_images = Network("in")
    of_images.load_state_dict(network.state_dict(), strict=False)
    expected = of_images(x)
    for network_of_one in (
        replaced(network, lambda _, bn: OfBatches(bn, 1)),
        replaced(network, lambda name, bn: EvalNorm(bn, moments[name], 1)),
    ):
        torch.testing.assert_close(network_of_one(x), expected, rtol=1e-4, atol=1e-4)


def test_groups_of_channels_keep_their_groups():
    """Of batch group norm too the batches are those of the training: its own output comes back."""
    torch.manual_seed(0)
    model = Network(lambda channels: batch_group_norm(channels, 4, channels_per_group=2))
    x = data(12).chunk(0, 12)[0]
    expected = model.train()(x)
    ours = replaced(model, lambda _, bn: OfBatches(bn, 4))(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Train a network with each of four norms; one of them loses its weights."""
    outputs = tmp_path_factory.mktemp("outputs")
    overrides = {
        "bn": ["norm=bn"],
        "ghost": ["norm=ghost_bn", "norm.images=2"],
        "gn": ["norm=gn8"],
        "lost": ["norm=bn", "seed=1"],
    }
    runs = {
        name: compose(*tiny.OVERRIDES, *TINY, f"outputs={outputs}", *more)
        for name, more in overrides.items()
    }
    for config in runs.values():
        run(config)
    RunDirectory(runs["lost"].run_dir).model_path.unlink()
    return outputs, runs


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


TINY = ("model.channels=[8,8,16]", "model.hidden=16", "dataset.augmentation=flip")


def settings(outputs, **more):
    given = {
        "outputs": str(outputs),
        "study": "default",
        "statistics": ["ema", "precise", "population", "batch", "evalnorm"],
        "images": [2, 16, 64],
        "device": "cpu",
        "root": "unused",
        "pictures": None,
    }
    return EvaluateConfig.parse(given | more)


def test_a_study_is_evaluated_once(study, tmp_path, capsys, monkeypatch):
    outputs, runs = study
    shutil.copytree(outputs, tmp_path / "outputs")
    outputs = tmp_path / "outputs"
    before = {path: path.read_bytes() for path in outputs.glob("default/*/*.*")}
    command.evaluate(settings(outputs))
    said = capsys.readouterr().out
    path = outputs / "default" / "evaluations.csv"
    rows = table(path)
    assert tuple(rows[0]) == command.COLUMNS
    found = {(r["run_id"], r["statistics"], r["images"]) for r in rows}
    # 64 images are more than there are, 8 those of BN's training.
    expected = {"bn": (2, 8, 16), "ghost": (2, 16)}
    assert found == {
        (runs[name].run_id, statistics, str(images))
        for name, counts in expected.items()
        for images in counts
        for statistics in ("precise", "population", "batch", "evalnorm")
    } | {(runs[name].run_id, "ema", "") for name in expected}
    for name in expected:
        [ema] = [r for r in rows if (r["run_id"], r["statistics"]) == (runs[name].run_id, "ema")]
        last = RunDirectory(runs[name].run_dir).rows()[-1]
        assert float(ema["test_error"]) == last["test_error"]
        assert int(ema["test_wrong"]) == last["test_wrong"]
    assert (
        "norm=gn: other statistics are defined for batch norm: nothing to evaluate:\n  tiny-"
        in said
    )
    assert f"no model.pt:\n  {runs['lost'].run_id}" in said
    assert "ema differs" not in said
    assert {path: path.read_bytes() for path in before} == before

    whole = path.read_bytes()
    monkeypatch.setattr(batch_statistics, "evaluated", None)  # nothing is done again
    command.evaluate(settings(outputs))
    assert path.read_bytes() == whole
    assert capsys.readouterr().out.count("ema") == 1  # the heading


def test_each_network_has_a_table_of_its_own(study, tmp_path, capsys):
    outputs, runs = study
    shutil.copytree(outputs, tmp_path / "outputs")
    outputs = tmp_path / "outputs"
    wide = runs["ghost"].with_(outputs=str(outputs))
    wide = wide.with_(model={**wide.model.plain(), "name": "wide", "channels": [8, 8, 24]})
    run(wide)
    command.evaluate(settings(outputs, statistics=["ema"]))
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line in ("tiny simplenetv2", "tiny wide")]
    assert len(heads) == 2
    ghosts = [line.split()[-1] for line in lines if line.startswith("GHOST_BN")]
    rows = table(outputs / "default" / "evaluations.csv")
    assert ghosts == [f"{float(r['test_error']):.2f}" for r in rows if r["norm"] == "ghost_bn"]


def test_what_was_interrupted_or_trained_again_is_completed(study, tmp_path, monkeypatch):
    outputs, runs = study
    shutil.copytree(outputs, tmp_path / "outputs")
    outputs = tmp_path / "outputs"
    path = outputs / "default" / "evaluations.csv"
    whole = batch_statistics.evaluated

    def interrupted(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch_statistics, "evaluated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command.evaluate(settings(outputs))
    assert len(path.read_text().splitlines()) == 2  # the header, and what was finished
    command.evaluate(settings(outputs))
    rows = table(path)
    assert len({(r["run_id"], r["statistics"], r["images"]) for r in rows}) == len(rows) == 22
    # Other weights under the same name: what was found of the old ones goes.
    model = outputs / "default" / runs["bn"].run_id / "model.pt"
    weights = torch.load(model, weights_only=True)
    weights[next(iter(weights))] += 1
    torch.save(weights, model)
    command.evaluate(settings(outputs, statistics=["ema"]))
    rows = table(path)
    assert [r["statistics"] for r in rows if r["run_id"] == runs["bn"].run_id] == ["ema"]
    assert len(rows) == 10


def test_a_run_that_fails_is_named_and_the_others_go_on(study, tmp_path, capsys):
    outputs, runs = study
    shutil.copytree(outputs, tmp_path / "outputs")
    outputs = tmp_path / "outputs"
    model = outputs / "default" / runs["bn"].run_id / "model.pt"
    model.write_bytes(model.read_bytes()[:1000])
    assert not command.evaluate(settings(outputs, statistics=["ema", "ema"], images=[2, 2]))
    said = capsys.readouterr().out
    assert f"cannot be evaluated:\n  {runs['bn'].run_id}: " in said
    rows = table(outputs / "default" / "evaluations.csv")
    assert [r["run_id"] for r in rows] == [runs["ghost"].run_id]


def test_nothing_is_evaluated_if_one_of_the_studies_cannot_be(study, tmp_path):
    outputs, _ = study
    for name in ("default", "other"):
        shutil.copytree(outputs / "default", tmp_path / "outputs" / name)
    (tmp_path / "outputs" / "other" / "evaluations.csv").write_text("name,grade\nme,1\n")
    with pytest.raises(ConfigError, match=r"other.evaluations\.csv is not a table"):
        command.evaluate(settings(tmp_path / "outputs", study=None))
    assert not (tmp_path / "outputs" / "default" / "evaluations.csv").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"images": [0]}, r"^images\[0\]=0: must be at least 1$"),
        ({"statistics": ["emma"]}, r"^statistics\[0\]=emma: choose one of ema, precise.*$"),
        ({"statistics": []}, r"^statistics=\[\]: must be a list of 1$"),
        ({"study": "nothing"}, "^study=nothing: no runs in .*$"),
    ],
)
def test_bad_input_is_one_line(study, more, words):
    outputs, _ = study
    with pytest.raises(ConfigError, match=words):
        command.evaluate(settings(outputs, **more))
    assert not (outputs / "default" / "evaluations.csv").exists()


def test_the_command_refuses_it_before_anything_is_written(study, cli, tmp_path):
    outputs, _ = study
    done = cli(f"outputs={outputs}", "images=[0]", module="gnbench.evaluate", check=2)
    assert done.stderr == "gnbench: images[0]=0: must be at least 1\n"
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_something_else_is_not_overwritten(study, tmp_path):
    outputs, _ = study
    shutil.copytree(outputs, tmp_path / "outputs")
    path = tmp_path / "outputs" / "default" / "evaluations.csv"
    path.write_text("name,grade\nme,1\n")
    with pytest.raises(ConfigError, match=r"is not a table of gnbench\.evaluate: move it away"):
        command.evaluate(settings(tmp_path / "outputs"))
    assert path.read_text() == "name,grade\nme,1\n"


def test_a_record_older_than_a_setting_is_read_with_what_was_done_then():
    config = compose("norm=bn")
    record = config.plain()
    old = {**record, "model": {k: v for k, v in record["model"].items() if k != "hidden"}}
    assert RunConfig.parse(old).run_id == config.run_id
    assert RunConfig.parse(old).model.get("hidden") == 1024
    data = {k: v for k, v in record["dataset"].items() if k not in ("order", "block")}
    older = RunConfig.parse({**record, "dataset": data})
    assert (older, older.run_id) == (config, config.run_id)
