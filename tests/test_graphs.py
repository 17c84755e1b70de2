"""The graph engine on a CPU: kernels recorded and replayed as a CUDA graph would (tests.replays).

What the device itself adds (streams, pools, the capture) is tested where there is one.
"""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch

from gnbench.runs.runner import run
from gnbench.train import engine
from gnbench.train.cuda_graphs import Pack
from gnbench.train.engine import GraphEngine
from tests import tiny
from tests.replays import Recorder
from tests.test_training import TIMES, assert_same_state, rows, start

RECIPES = [
    ["optimizer=adam"],
    ["optimizer=sgd", "schedule=multistep"],
    ["optimizer=adamw", "optimizer.decay_norm_and_bias=false", "schedule.warmup_epochs=1"],
    ["schedule=cosine", "schedule.per=epoch", "dataset.augmentation=none"],
    ["schedule=constant", "dataset.augmentation=pad_crop_flip"],
    ["model.dropout=0.5"],
    ["precision=bf16"],
    ["batch=fixed_steps", "batch.reference_size=6"],
]
NORMS = ["none", "bn", "gn", "ln", "in", "lrn"]
CASES = [
    *((norm, "simplenetv2") for norm in NORMS),
    *((norm, model) for norm in ("bn", "gn") for model in ("simplenet", "resnet18")),
]


def graph(training, recorder=None):
    """Give the training, not begun, the graph engine."""
    eager = training.engine
    training.engine = GraphEngine(
        *(eager.model, eager.optimizer, eager.base_lr, eager.schedule),
        *("bf16" if eager.bf16 else "fp32", eager.device),
        pack=Pack(recorder or Recorder(), eager.device),
    )
    return training


def plain(training):
    return training


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Have graphs of four steps, so that a short training meets chunks and remainders."""
    monkeypatch.setattr(engine, "STEPS_A_GRAPH", 4)


def assert_replayed_as_eager(config):
    eager, recorder = start(config), Recorder()
    expected = rows(eager)  # before the other one seeds the generator
    replayed = graph(start(config), recorder)
    assert rows(replayed) == expected
    assert_same_state(replayed, eager)
    assert replayed.engine.name == "graph"
    assert recorder.replays[1] > recorder.recorded >= 3  # chunk, rest of an epoch, evaluation


@pytest.mark.parametrize(("norm", "model"), CASES)
def test_a_replayed_training_is_the_eager_one_to_the_bit(tiny_config, norm, model):
    """Four steps of ten images in a graph, then a partial batch of eight."""
    assert_replayed_as_eager(
        tiny_config(f"norm={norm}", f"model={model}", "batch_size=10", "epochs=3")
    )


@pytest.mark.parametrize("settings", RECIPES, ids=" ".join)
def test_it_is_so_with_every_recipe(tiny_config, settings):
    """Nine steps of five images: two graphs, one alone, and a partial batch of three."""
    assert_replayed_as_eager(tiny_config("batch_size=5", "epochs=5", *settings))


@pytest.mark.parametrize(("first", "second"), [(graph, graph), (graph, plain), (plain, graph)])
@pytest.mark.parametrize("stop_after", [1, 7, 16, 23])
def test_either_engine_continues_the_other_s_checkpoint(
    tiny_config, tmp_path, first, second, stop_after
):
    """Stopped at the first yield from that step on, in the midst of a chunk of the next one."""
    config = tiny_config("batch_size=5", "epochs=5", "model.dropout=0.2", "norm=bn")
    whole = start(config)
    expected = rows(whole)
    one = first(start(config))
    before = []
    for row in one.run():
        before += [row] if row else []
        if one.position.step >= stop_after:
            torch.save(one.state_dict(), tmp_path / "state.pt")
            break
    other = second(start(config))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after = [row for row in other.run() if row]
    assert [dataclasses.replace(row, **TIMES) for row in before + after] == expected
    assert_same_state(other, whole)


def test_a_training_in_use_can_be_set_back(tiny_config):
    """Graphs made before hold the addresses of moments that are no more."""
    config = tiny_config("batch_size=5", "epochs=3")
    training = graph(start(config))
    calls = training.run()
    next(calls)
    state = copy.deepcopy(training.state_dict())
    first = [row for row in calls if row]
    training.load_state_dict(state)
    again = [row for row in training.run() if row]
    assert [row.train_loss for row in again] == [row.train_loss for row in first]


def test_a_diverging_run_ends_at_the_same_step(tiny_config, monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    config = tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "batch_size=2")
    eager, replayed = start(config), graph(start(config))
    assert repr(rows(replayed)) == repr(rows(eager))  # of NaN, too
    assert replayed.diverged
    assert replayed.engine.name == "graph"


class Asking(tiny.SimpleNetV2):
    """A network that asks the device for a value."""

    def forward(self, x):
        return super().forward(x) + 0 * x.sum().item()


class Counting(tiny.SimpleNetV2):
    """A network that counts its passes in Python, where a graph does not renew the count."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        return super().forward(x) * (1 + 1 / (1 + self.passes))


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Asking, "cannot be captured"), (Counting, "does not repeat what the step itself does")],
)
def test_what_cannot_be_replayed_is_trained_without(tiny_config, caplog, network, reason):
    config = tiny_config(
        f"model._target_=tests.test_graphs.{network.__name__}", "batch_size=5", "epochs=3"
    )
    training = graph(start(config))
    result = rows(training)
    assert training.engine.name == "eager"
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert reason in line
    assert "going on with engine=eager" in line
    if network is Asking:
        assert result == rows(start(config))


def test_batch_norm_that_averages_over_all_batches_falls_back(tiny_config):
    """Its share of the running average is a number of Python's."""
    config = tiny_config("norm=bn", "norm.momentum=null", "batch_size=5", "epochs=3")
    training = graph(start(config))
    eager = start(config)
    assert rows(training) == rows(eager)
    assert_same_state(training, eager)
    assert training.engine.name == "eager"


class Python(torch.optim.SGD):
    """An optimizer that counts its steps in Python and steps accordingly."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            parameter.data.add_(parameter.grad, alpha=-0.01 / state["step"])


def test_an_optimizer_that_counts_in_python_is_not_recorded(tiny_config, caplog):
    config = tiny_config("optimizer._target_=tests.test_graphs.Python", "optimizer=sgd", "epochs=3")
    training, eager = graph(start(config)), start(config)
    assert rows(training) == rows(eager)
    assert_same_state(training, eager)
    assert "the optimizer keeps numbers of Python's; going on with engine=eager" in caplog.text


def test_without_memory_for_a_graph_the_training_goes_on(tiny_config, caplog):
    class Full(Recorder):
        def record(self, work):
            raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_config("norm=bn", "batch_size=5", "epochs=3")
    training, eager = graph(start(config), Full()), start(config)
    assert rows(training) == rows(eager)
    assert_same_state(training, eager)
    assert "no memory for a graph; going on with engine=eager" in caplog.text


def test_a_training_that_is_over_needs_no_collector_to_go(tiny_config):
    """Or the graphs of a sweep's last run would sit beside those of the next one."""
    gc.collect()
    gc.disable()
    try:
        training = graph(start(tiny_config("batch_size=5", "epochs=3")))
        rows(training)
        gone = weakref.ref(training.engine)
        training.engine.close()
        del training
        assert gone() is None
    finally:
        gc.enable()


def test_a_graph_without_a_gpu_is_an_eager_run(tiny_config, caplog):
    record = run(tiny_config("engine=graph", "epochs=1"))
    assert (record["status"], record["engine"]) == ("completed", "eager")
    assert "there are no CUDA graphs on the cpu; going on with engine=eager" in caplog.text


def assert_graph_is_eager_on_cuda(tiny_config, *settings):
    common = ("device=cuda", "batch_size=5", "epochs=5", *settings)
    eager = start(tiny_config(*common, "engine=eager"))
    expected = rows(eager)
    replayed = start(tiny_config(*common, "engine=graph"))
    assert rows(replayed) == expected
    assert_same_state(replayed, eager)
    assert (eager.engine.kind, replayed.engine.kind) == ("eager", "graph")


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize(("norm", "model"), CASES)
def test_on_cuda_the_graph_is_the_eager_engine_to_the_bit(tiny_config, norm, model):
    assert_graph_is_eager_on_cuda(tiny_config, f"norm={norm}", f"model={model}")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("settings", [*RECIPES, ["compile=true"]], ids=" ".join)
def test_on_cuda_it_is_so_with_every_recipe(tiny_config, settings):
    assert_graph_is_eager_on_cuda(tiny_config, *settings)


@pytest.mark.cuda
@on_cuda
def test_on_cuda_a_failed_capture_leaves_no_trace(tiny_config):
    """Cumulative batch norm waits for the device; dropout and another graph come after it."""
    fails = ("norm=bn", "norm.momentum=null", "model.dropout=0.5", "device=cuda", "batch_size=5")
    eager = start(tiny_config(*fails, "epochs=5"))
    expected = rows(eager)
    training = start(tiny_config(*fails, "epochs=5", "engine=graph"))
    assert rows(training) == expected
    assert_same_state(training, eager)
    assert training.engine.kind == "eager"
    assert_graph_is_eager_on_cuda(tiny_config, "model.dropout=0.5")
