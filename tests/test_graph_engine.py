"""The graph engine on a CPU: kernels recorded and replayed as a CUDA graph would (tests.replays).

What the device itself adds (streams, pools, the capture) is tested where there is one.
"""

import copy
import gc
import math
import shutil
import weakref

import pytest
import torch

from gnbench.build import build_training, load_dataset
from gnbench.runs.runner import run
from gnbench.train.replicas import ReplicaGroup
from tests.replays import Recorder
from tests.trainings import (
    CPU,
    NORMS,
    OPTIMIZERS,
    Network,
    assert_same_weights,
    rows,
    through_a_file,
    timeless,
    training,
)

RECIPES = [
    {"optimizer": "adam", "schedule": "constant", "augmentation": "none"},
    {"optimizer": "sgd", "lr": 0.02, "augmentation": "pad_crop_flip"},
    {"dropout": 0.5},
    {"precision": "bf16"},
    {"total_steps": 25, "drop_last": True},
    {"images_a_pass": 2},
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Have graphs of four steps, so that a short training meets chunks and remainders."""
    monkeypatch.setattr("gnbench.train.graph_engine.STEPS_A_GRAPH", 4)


def group(recorder=None):
    return ReplicaGroup(recorder or Recorder(), CPU)


# While a dispatch mode looks on, as the recorder's does, autograd takes the gradient of a maximum
# by other kernels, which add up γ's, β's and τ's in another order.
OF_A_MAXIMUM = ("frn", "evonorm_b0")


def assert_replayed_as_eager(norm, **settings):
    eager, recorder = training(norm, **settings), Recorder()
    expected = rows(eager)  # before the other one seeds the generator
    replayed = training(norm, **settings, group=group(recorder))
    found = rows(replayed)
    if norm in OF_A_MAXIMUM:
        assert [row.train_loss for row in found] == pytest.approx([r.train_loss for r in expected])
        ours, theirs = (t.engine.model.state_dict() for t in (replayed, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert found == expected
        assert_same_weights(replayed, eager)
    assert replayed.engine.name == "graph"
    assert recorder.replays[1] > recorder.recorded >= 3  # chunk, rest of an epoch, evaluation


@pytest.mark.parametrize("norm", NORMS)
def test_a_replayed_training_is_the_eager_one_to_the_bit(norm):
    """Four steps of ten images in a graph, then a partial batch of eight."""
    assert_replayed_as_eager(norm, batch_size=10, epochs=3)


@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_it_is_so_with_every_recipe(settings):
    """Nine steps of five images: two graphs, one alone, and a partial batch of three."""
    assert_replayed_as_eager("bn", batch_size=5, epochs=3, **settings)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stop_after", [1, 16])
def test_either_engine_continues_the_other_s_checkpoint(tmp_path, first, second, stop_after):
    """Stopped at the first yield from that step on, in the midst of a chunk of the next one."""
    settings = {"batch_size": 5, "epochs": 3, "dropout": 0.2}
    whole = training(**settings)
    expected = rows(whole)
    one = training(**settings, group=group() if first else None)
    before = []
    for row in one.run():
        before += [timeless(row)] if row else []
        if one.position.step >= stop_after:
            state = through_a_file(one, tmp_path / "checkpoint.pt")
            break
    other = training(**settings, group=group() if second else None)
    other.load_state_dict(state)
    assert before + rows(other) == expected
    assert_same_weights(other, whole)


def test_a_training_in_use_can_be_set_back():
    """Graphs made before hold the addresses of moments that are no more."""
    one = training(batch_size=5, epochs=3, group=group())
    calls = one.run()
    next(calls)
    state = copy.deepcopy(one.state_dict())
    first = [timeless(row) for row in calls if row]
    one.load_state_dict(state)
    assert rows(one) == first


def test_a_diverging_run_ends_at_the_same_step(monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    settings = {"norm": "none", "optimizer": "sgd", "lr": 1e9, "batch_size": 2}
    eager, replayed = training(**settings), training(**settings, group=group())
    assert repr(rows(replayed)) == repr(rows(eager))  # of NaN, too
    assert replayed.diverged
    assert replayed.engine.name == "graph"


class Asking(Network):
    """A network that asks the device for a value."""

    def forward(self, x):
        return super().forward(x) + 0 * x.sum().item()


class Counting(Network):
    """A network that counts its passes in Python, where a graph does not renew the count."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        return super().forward(x) * (1 + 1 / (1 + self.passes))


def averaging(norm, dropout):
    """Build a network whose share of a running average is a number of Python's."""
    model = Network("bn")
    model[1].momentum = model[5].momentum = None
    return model


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Asking, "cannot be captured"),
        (averaging, "cannot be captured"),
        (Counting, "does not repeat what the step itself does"),
    ],
)
def test_what_cannot_be_replayed_is_trained_plainly(caplog, network, reason):
    settings = {"network": network, "batch_size": 5, "epochs": 3}
    eager, one = training(**settings), training(**settings, group=group())
    found, expected = rows(one), rows(eager)
    assert one.engine.name == "eager"
    [line] = caplog.messages
    assert line.startswith("engine=graph: ")
    assert reason in line
    assert line.endswith("; going on with engine=eager")
    if network is not Counting:  # whose trial passes have counted as well
        assert found == expected
        assert_same_weights(one, eager)


class Python(torch.optim.SGD):
    """An optimizer that counts its steps in Python and steps accordingly."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            parameter.data.add_(parameter.grad, alpha=-0.01 / state["step"])


def test_an_optimizer_that_counts_in_python_is_not_recorded(monkeypatch, caplog):
    monkeypatch.setitem(OPTIMIZERS, "python", Python)
    eager, one = training(optimizer="python"), training(optimizer="python", group=group())
    assert rows(one) == rows(eager)
    assert_same_weights(one, eager)
    assert "the optimizer keeps numbers of Python's; going on with engine=eager" in caplog.text


def test_without_memory_for_a_graph_the_training_goes_on(caplog):
    class Full(Recorder):
        def record(self, work):
            raise torch.OutOfMemoryError("CUDA out of memory")

    settings = {"batch_size": 5, "epochs": 3}
    eager, one = training(**settings), training(**settings, group=group(Full()))
    assert rows(one) == rows(eager)
    assert_same_weights(one, eager)
    assert "no memory for a graph; going on with engine=eager" in caplog.text


def test_a_training_that_is_over_needs_no_collector_to_go():
    """Or the graphs of a sweep's last run would sit beside those of the next one."""
    gc.collect()
    gc.disable()
    try:
        one = training(batch_size=5, epochs=3, group=group())
        rows(one)
        gone = weakref.ref(one.engine)
        one.engine.close()
        del one
        assert gone() is None
    finally:
        gc.enable()


# On a GPU: the real networks and settings.

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
CASES = [(norm, "simplenetv2") for norm in NORMS] + [
    (norm, model) for norm in ("bn", "gn") for model in ("simplenet", "resnet18")
]
SETTINGS = [
    ["optimizer=adam"],
    ["optimizer=sgd", "schedule=multistep"],
    ["optimizer=adamw", "optimizer.decay_norm_and_bias=false", "schedule.warmup_epochs=1"],
    ["schedule=constant", "dataset.augmentation=pad_crop_flip"],
    ["model.dropout=0.5"],
    ["precision=bf16"],
    ["precision=tf32"],
    ["batch.accumulate=2", "norm=bn"],
    ["compile=true"],
]


def chosen(norm):
    """Return the settings that choose a norm at any batch size of these tests."""
    return [f"norm={norm}", *(["norm.images=4"] if norm == "ghost_bn" else [])]


def assert_graph_is_eager_on_cuda(tiny_config, *settings, falls_back=False):
    short = {"precision=bf16", "precision=tf32"} & {*settings}
    if short and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has neither bf16 nor TF32")
    trained, found = [], []
    for engine in ("eager", "graph"):
        config = tiny_config(
            "device=cuda", "batch_size=5", "epochs=5", *settings, f"engine={engine}"
        )
        trained.append(one := build_training(config, load_dataset(config)))
        found.append(rows(one))
    eager, graph = trained
    assert found[0] == found[1]
    if "compile=true" in settings and shutil.which("gcc"):  # else both would go on uncompiled
        assert [one.engine.name for one in trained] == ["eager compiled", "graph compiled"]
    assert_same_weights(graph, eager)
    assert graph.engine.name.partition(" ")[0] == ("eager" if falls_back else "graph")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize(("norm", "model"), CASES)
def test_on_cuda_the_graph_is_the_eager_engine_to_the_bit(tiny_config, norm, model):
    assert_graph_is_eager_on_cuda(tiny_config, *chosen(norm), f"model={model}")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_on_cuda_it_is_so_with_every_recipe(tiny_config, settings):
    assert_graph_is_eager_on_cuda(tiny_config, *settings)


@pytest.mark.cuda
@on_cuda
def test_on_cuda_a_failed_capture_leaves_no_trace(tiny_config):
    """Cumulative batch norm waits for the device; dropout and another graph come after it."""
    fails = ("norm=bn", "norm.momentum=null", "model.dropout=0.5")
    assert_graph_is_eager_on_cuda(tiny_config, *fails, falls_back=True)
    assert_graph_is_eager_on_cuda(tiny_config, "model.dropout=0.5")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_on_cuda_a_whole_run_is_replayed(tiny_config, norm):
    """What comes before its first step must not keep that from being captured."""
    assert run(tiny_config(f"norm={norm}", "device=cuda", "epochs=5"))["engine"] == "graph"


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", NORMS)
def test_on_cuda_a_run_starts_as_on_the_cpu_and_repeats_itself(tiny_config, norm):
    cpu, one, two = (
        build_training(config, load_dataset(config))
        for config in (tiny_config(*chosen(norm), f"device={d}") for d in ("cpu", "cuda", "cuda"))
    )
    for a, b in zip(one.engine.model.parameters(), cpu.engine.model.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)
    assert rows(one) == rows(two)
    assert_same_weights(one, two)
    assert one.engine.name == two.engine.name == "graph"


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_on_cuda_a_checkpoint_of_a_cpu_goes_on(tiny_config, tmp_path, norm, engine, optimizer):
    """And comes back: the moments lie elsewhere in another order."""

    def built(device):
        choices = (f"norm={norm}", f"engine={engine}", f"optimizer={optimizer}", "epochs=6")
        config = tiny_config(f"device={device}", *choices)
        return build_training(config, load_dataset(config))

    state = None
    for device in ("cpu", "cuda", "cpu"):
        one = built(device)
        if state:
            one.load_state_dict(state)
        calls, end = one.run(), one.position.step + 12
        while one.position.step < end:
            next(calls)
        assert one.engine.name == ("eager" if device == "cpu" else engine)
        state = through_a_file(one, tmp_path / "checkpoint.pt")
    assert math.isfinite(state["processes"][0]["loss_sum"])
