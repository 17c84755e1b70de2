"""Replicas whose steps are replayed side by side: each is, to the bit, what it is alone.

On a CPU kernels are recorded and replayed as a CUDA graph would (tests.replays).
"""

import logging
import os
import signal

import pytest
import torch

from gnbench import build
from gnbench.errors import Interrupted, LockedError
from gnbench.runs import runner
from gnbench.runs.directory import RunDirectory
from gnbench.runs.runner import run, run_all
from gnbench.train import cuda_graphs
from gnbench.train.graph_engine import GraphEngine
from gnbench.train.replicas import ReplicaGroup
from tests.conftest import measured
from tests.replays import Recorder
from tests.trainings import (
    CPU,
    Network,
    assert_same_weights,
    assert_together_as_alone,
    in_turns,
    rows,
    three,
    training,
)

SHORT = {"batch_size": 5, "epochs": 3}  # nine steps and a partial one an epoch: 4, 4, 1, and 1
REPLICAS = (
    *("model._target_=tests.trainings.small", "norm=bn"),
    *("batch_size=5", "epochs=3", "seed=3", "replicas=3"),
)
FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("gnbench.train.graph_engine.STEPS_A_GRAPH", 4)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_each_replica_is_what_it_is_alone(norm):
    recorder = Recorder()
    assert_together_as_alone(ReplicaGroup(recorder, CPU), norm=norm, **SHORT)
    # Of twelve calls three warm up; evaluation is each one's own.
    assert recorder.replays == {3: 9, 1: 3 * 2}


def test_one_that_diverges_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    settings = {"norm": "none", "optimizer": "sgd", **SHORT}
    recorder = Recorder()
    found = []
    for group in (None, ReplicaGroup(recorder, CPU)):
        trainings = [
            training(seed=seed, lr=lr, group=group, **settings)
            for seed, lr in ((3, 0.1), (4, 1e9), (5, 0.1))
        ]
        found.append(repr(in_turns(trainings) if group else [rows(one) for one in trainings]))
        assert [one.diverged for one in trainings] == [False, True, False]
    assert found[0] == found[1]
    assert recorder.replays[2] > 0


def test_what_is_read_of_one_is_never_behind():
    """Two have asked for steps that wait for the third."""
    alone = three(**SHORT)[1]
    calls = alone.run()
    while alone.position.step < 8:
        next(calls)
    together = three(group=ReplicaGroup(Recorder(), CPU), **SHORT)
    for one in together[:2]:
        calls = one.run()
        next(calls), next(calls)
        assert one.position.step == 8
    state = together[1].state_dict()
    assert state["processes"][0]["loss_sum"] == alone.engine.own_totals()[0]
    assert_same_weights(together[1], alone)


class Asking(Network):
    """A network that asks the device for a value."""

    def forward(self, x):
        return super().forward(x) + 0 * x.sum().item()


def test_what_no_graph_can_hold_is_trained_plainly(caplog):
    settings = {"network": Asking, **SHORT}
    expected = [rows(one) for one in three(**settings)]
    together = three(group=ReplicaGroup(Recorder(), CPU), **settings)
    assert in_turns(together) == expected
    assert {one.engine.name for one in together} == {"eager"}
    assert caplog.text.count("; going on with engine=eager") == 3


@pytest.mark.parametrize("where", ["first look", "step", "record"])
def test_without_memory_for_all_at_once_each_has_a_graph_of_its_own(monkeypatch, caplog, where):
    class Small(Recorder):
        def run(self, work, strictly=False):
            super().run(work, strictly)
            if strictly and work.branches > 1 and where == "step":
                raise FULL

        def record(self, work):
            replay = super().record(work)
            if work.branches > 1 and where == "record":
                raise FULL
            return replay

    class Look(cuda_graphs.Snapshot):
        def __init__(self, tensors, device):
            super().__init__(tensors, device)
            positions = [t for t in tensors if (t.dtype, t.shape) == (torch.int64, (1,))]
            if len(positions) == 3 and where == "first look":
                raise FULL

    monkeypatch.setattr(cuda_graphs, "Snapshot", Look)
    recorder = Small()
    assert_together_as_alone(ReplicaGroup(recorder, CPU), **SHORT)
    assert set(recorder.replays) == {1}
    [line] = caplog.messages
    assert "no memory for a graph; each has graphs of its own" in line


# As runs, with their directories.


@pytest.fixture
def recorder(monkeypatch):
    """Have the runs of this process replayed; return by what."""
    found = Recorder()
    monkeypatch.setattr(cuda_graphs, "recorder", lambda device: found)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what gives the metrics of runs, each carried out by itself without graphs."""
    known = {}

    def metrics(configs):
        for config in configs:
            if config.run_id not in known:
                folder = tmp_path_factory.mktemp("alone")
                one = config.with_(engine="eager", outputs=str(folder), wait=False)
                assert run(one)["engine"] == "eager"
                known[config.run_id] = measured(RunDirectory(one.run_dir).metrics_path)
        return [known[config.run_id] for config in configs]

    return metrics


def found(configs):
    return [measured(RunDirectory(config.run_dir).metrics_path) for config in configs]


def states(configs):
    return [RunDirectory(config.run_dir).record()["status"] for config in configs]


def carried_out(configs):
    return [outcome["status"] for _, outcome in run_all(configs)]


def steps_taken(monkeypatch, after=None, before=None):
    """Call these with engine and steps taken after, or step at hand before, every engine call."""
    take = GraphEngine.train_steps

    def noted(engine, epoch, at, most):
        if before:
            before(engine, epoch.first_step + at)
        taken = take(engine, epoch, at, most)
        if after:
            after(engine, epoch.first_step + at + taken)
        return taken

    monkeypatch.setattr(GraphEngine, "train_steps", noted)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def stop_at(step, configs, monkeypatch):
    """Carry out runs until one has taken that many steps."""

    def signalled(engine, taken):
        if taken == step and not engines:
            engines.append(engine)
            terminate()

    engines = []
    with monkeypatch.context() as patch:
        steps_taken(patch, after=signalled)
        with pytest.raises(Interrupted) as caught:
            list(run_all(configs))
    assert caught.value.exit_code == 143


def test_replicas_are_replayed_together_and_each_has_its_directory(tiny_config, recorder, alone):
    configs = tiny_config(*REPLICAS).runs()
    assert carried_out(configs) == ["completed"] * 3
    assert recorder.replays == {3: 9, 1: 3 * 2}
    assert found(configs) == alone(configs)
    for config in configs:
        directory = RunDirectory(config.run_dir)
        record = directory.record()
        assert (record["engine"], record["seed"]) == ("graph", config.seed)
        assert record["peak_memory_bytes"] is None  # it would be that of all three
        said = directory.log_path.read_text()
        assert said.count(f"{config.run_id} completed") == 1
        assert said.count(" completed in ") == 1  # and nothing of the others
        assert said.count("  epoch ") == 3
        assert not directory.checkpoint_path.exists()
    before = recorder.replays.total()
    assert carried_out(configs) == ["completed"] * 3
    assert recorder.replays.total() == before


@pytest.mark.slow
def test_a_signal_has_all_of_them_save_and_end(tiny_config, recorder, alone, monkeypatch):
    configs = tiny_config(*REPLICAS).runs()
    stop_at(18, configs, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert states(configs) == ["interrupted"] * 3
    saved = [torch.load(c.run_dir / "checkpoint.pt", weights_only=True) for c in configs]
    # One was a call ahead.
    assert sorted(state["position"]["step"] for state in saved) == [14, 14, 18]
    assert carried_out(configs) == ["completed"] * 3
    assert found(configs) == alone(configs)


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    "events",
    [
        pytest.param((terminate, terminate), id="signals", marks=pytest.mark.slow),
        pytest.param((fail,), id="fault"),
    ],
)
def test_none_goes_on_from_steps_cut_short(tiny_config, recorder, alone, monkeypatch, events):
    """By a second signal, which does not wait for the end of a step, or a fault of the device."""

    def cut_short(branches, kernels):
        if branches == 3 and recorder.replays[3] == 3:
            kernels.replay(len(kernels.calls) // 2)
            for event in events:
                event()

    monkeypatch.setattr("gnbench.runs.signals.ECHO", 0)
    configs = tiny_config(*REPLICAS).runs()
    recorder.before = cut_short
    if fail in events:
        assert [type(error) for _, error in run_all(configs)] == [RuntimeError] * 3
    else:
        with pytest.raises(Interrupted):
            list(run_all(configs))
    assert states(configs) == ["failed" if fail in events else "interrupted"] * 3
    assert carried_out(configs) == ["completed"] * 3
    assert found(configs) == alone(configs)


def test_a_signal_before_the_first_step_begins_no_other(tiny_config, recorder, monkeypatch):
    begun = []

    def load(config):
        begun.append(config.seed)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build, "load_dataset", load)
    with pytest.raises(Interrupted):
        list(run_all(tiny_config(*REPLICAS).runs()))
    assert begun == [3]


@pytest.mark.slow
def test_those_behind_catch_up_and_go_on_in_step(tiny_config, recorder, alone, monkeypatch):
    """One is complete, one was interrupted at step 18, one has not begun."""
    configs = tiny_config(*REPLICAS, "epochs=4").runs()
    complete, interrupted, _ = configs
    list(run_all([complete]))
    stop_at(18, [interrupted], monkeypatch)
    recorder.replays.clear()
    begun = []
    steps_taken(monkeypatch, before=lambda engine, step: begun.append(step))
    assert carried_out(configs) == ["completed"] * 3
    assert found(configs) == alone(configs)
    assert begun == sorted(begun)
    # From step 20 on, two epochs of four calls, together but for what is yet to warm up.
    assert recorder.replays[2] >= 5


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 14])
def test_one_that_fails_does_not_stop_the_others(tiny_config, recorder, alone, monkeypatch, step):
    def failing(engine, at):
        if at == step and engines in ([], [engine]):
            engines.append(engine)
            raise RuntimeError("a fault")

    engines = []
    configs = tiny_config(*REPLICAS).runs()
    with monkeypatch.context() as patch:
        steps_taken(patch, before=failing)
        [(number, error)] = [o for o in run_all(configs) if isinstance(o[1], Exception)]
    assert str(error) == "a fault"
    others = [config for config in configs if config is not configs[number]]
    assert (states(configs)[number], states(others)) == ("failed", ["completed"] * 2)
    assert found(others) == alone(others)
    assert carried_out(configs) == ["completed"] * 3
    assert found(configs) == alone(configs)


@pytest.mark.parametrize("wait", [False, True])
def test_one_that_another_process_trains_is_left_to_it_or_comes_last(tiny_config, recorder, wait):
    configs = tiny_config(*REPLICAS, f"wait={str(wait).lower()}").runs()
    outcomes = run_all(configs)
    with RunDirectory(configs[1].run_dir).locked():
        ended = dict(next(outcomes) for _ in range(2 if wait else 3))
    if wait:
        assert set(ended) == {0, 2}
        [(number, record)] = outcomes
        assert (number, record["status"]) == (1, "completed")
    else:
        assert isinstance(ended[1], LockedError)
    assert recorder.replays[2] > 0


def test_a_signal_is_heeded_while_a_later_one_waits(tiny_config, monkeypatch):
    """On a CPU: the first one is complete, and nothing is left to save."""

    def hold(*_):
        terminate()
        raise AssertionError("not heeded at once")

    outcomes = run_all(tiny_config(*REPLICAS).runs())
    next(outcomes)
    monkeypatch.setattr(RunDirectory, "locked", hold)
    with pytest.raises(Interrupted):
        next(outcomes)


@pytest.mark.slow
def test_what_draws_random_numbers_goes_one_by_one(tiny_config, recorder, alone, caplog):
    caplog.set_level(logging.INFO)
    configs = tiny_config(*REPLICAS, "model.dropout=0.2").runs()
    assert carried_out(configs) == ["completed"] * 3
    assert set(recorder.replays) == {1}
    assert "replicas=3: a step draws random numbers; one by one" in caplog.text
    assert found(configs) == alone(configs)


@pytest.mark.parametrize(
    "full", [pytest.param("build_training", marks=pytest.mark.slow), "load_state_dict"]
)
def test_one_without_room_beside_the_others_comes_after_them(
    tiny_config, recorder, alone, monkeypatch, full
):
    """Without room for its weights, or for its checkpoint: the second one, as long as it is so."""
    configs = tiny_config(*REPLICAS).runs()
    owner = build if full == "build_training" else GraphEngine
    if full == "load_state_dict":
        stop_at(14, configs[1:2], monkeypatch)
    do, refused = getattr(owner, full), []

    def narrow(first, *arguments):
        if not refused and (owner is GraphEngine or first.seed == 4):
            refused.append(first)
            raise FULL
        return do(first, *arguments)

    monkeypatch.setattr(owner, full, narrow)
    outcomes = list(run_all(configs))
    assert [record["status"] for _, record in outcomes] == ["completed"] * 3
    assert outcomes[-1][0] == 1
    assert recorder.replays[2] > 0
    assert found(configs) == alone(configs)


@pytest.mark.slow
def test_more_than_a_graph_has_branches_go_in_groups(tiny_config, recorder, monkeypatch):
    monkeypatch.setattr(runner, "MOST_REPLICAS", 2)
    numbers = [number for number, _ in run_all(tiny_config(*REPLICAS).runs())]
    assert (sorted(numbers[:2]), numbers[2:]) == ([0, 1], [2])
    assert recorder.replays == {2: 9, 1: 9 + 3 * 2}


def test_they_share_one_copy_of_the_images(tiny_config, recorder, monkeypatch):
    addresses = set()
    do = build.build_training

    def noted(*arguments):
        one = do(*arguments)
        addresses.add(one.train.images.data_ptr())
        return one

    monkeypatch.setattr(build, "build_training", noted)
    list(run_all(tiny_config(*REPLICAS, "epochs=1").runs()))
    assert len(addresses) == 1
