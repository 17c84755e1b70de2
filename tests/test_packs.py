"""Replicas whose steps are replayed side by side: each is, to the bit, what it is alone.

On a CPU kernels are recorded and replayed as a CUDA graph would (tests.replays).
"""

import copy
import dataclasses
import logging
import os
import signal
from math import isnan

import pytest
import torch

from gnbench.build import build_training, draws_random_numbers, load_dataset
from gnbench.config import run_id
from gnbench.runs import runner as execution
from gnbench.runs.directory import Run
from gnbench.runs.runner import run_all
from gnbench.runs.signals import Interrupted
from gnbench.sweep import command as sweep
from gnbench.sweep import state as grid
from gnbench.train import cuda_graphs as graphs
from gnbench.train import engine
from gnbench.train.cuda_graphs import Pack
from gnbench.train.engine import GraphEngine
from tests.conftest import measured
from tests.replays import Recorder
from tests.test_graphs import CASES, RECIPES, on_cuda
from tests.test_training import TIMES, assert_same_state, rows, start

CPU = torch.device("cpu")
SHORT = ("batch_size=5", "epochs=3")  # nine steps and a partial one an epoch: 4, 4, 1, and 1
REPLICAS = (*SHORT, "seed=3", "replicas=3", "norm=bn")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(engine, "STEPS_A_GRAPH", 4)


@pytest.fixture
def recorder(monkeypatch):
    """Have the runs of this process replayed; return by what."""
    found = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: found)
    return found


def seeds(tiny_config, *settings):
    return [tiny_config(*settings, f"seed={seed}") for seed in (3, 4, 5)]


def built(configs, pack):
    return [build_training(config, load_dataset(config), pack=pack) for config in configs]


def in_turns(trainings):
    """Go through the trainings a call each at a time; return their rows."""
    calls = dict(enumerate(training.run() for training in trainings))
    found = [[] for _ in trainings]
    while calls:
        for number, call in list(calls.items()):
            row = next(call, "over")
            if row == "over":
                del calls[number]
            elif row:
                found[number].append(dataclasses.replace(row, **TIMES))
    return found


def assert_packed_as_alone(configs, pack):
    alone = [start(config) for config in configs]
    expected = [rows(training) for training in alone]
    packed = built(configs, pack)
    # repr: of NaN, too
    assert repr(in_turns(packed)) == repr(expected)
    for one, other in zip(packed, alone, strict=True):
        assert_same_state(one, other)
        assert (one.engine.kind, other.engine.kind) == ("graph", "eager")


@pytest.mark.parametrize(("norm", "model"), [c for c in CASES if c[1] != "simplenet"])
def test_each_of_a_pack_is_what_it_is_alone(tiny_config, norm, model):
    recorder = Recorder()
    configs = seeds(tiny_config, *SHORT, f"norm={norm}", f"model={model}")
    assert_packed_as_alone(configs, Pack(recorder, CPU))
    # Of twelve calls three warm up and one is the proof; evaluation is each one's own.
    assert recorder.replays == {3: 9, 1: 3 * 2}


@pytest.mark.parametrize("settings", [s for s in RECIPES if "dropout" not in s[0]], ids=" ".join)
def test_it_is_so_with_every_recipe(tiny_config, settings):
    assert_packed_as_alone(seeds(tiny_config, *SHORT, *settings), Pack(Recorder(), CPU))


def test_one_that_diverges_does_not_end_the_others(tiny_config, monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    configs = seeds(tiny_config, *SHORT, "norm=none", "optimizer=sgd")
    configs[1].optimizer.lr = 1e9
    recorder = Recorder()
    assert_packed_as_alone(configs, Pack(recorder, CPU))
    assert recorder.replays[2] > 0


def test_what_one_reads_is_never_behind(tiny_config):
    """Two have asked for steps that wait for the third."""
    configs = seeds(tiny_config, *SHORT)
    alone = start(configs[1])
    calls = alone.run()
    while alone.position.step < 8:
        next(calls)
    packed = built(configs, Pack(Recorder(), CPU))
    for training in packed[:2]:
        calls = training.run()
        next(calls), next(calls)
        assert training.position.step == 8
    state = packed[1].state_dict()
    assert state["processes"][0]["loss_sum"] == alone.engine.loss_sum.item()
    assert_same_state(packed[1], alone)
    assert packed[0].engine.own_totals() != alone.engine.own_totals()


def test_what_no_graph_can_hold_is_trained_without(tiny_config, caplog):
    settings = "model._target_=tests.test_graphs.Asking"
    configs = seeds(tiny_config, *SHORT, settings)
    expected = [rows(start(config)) for config in configs]
    packed = built(configs, Pack(Recorder(), CPU))
    assert in_turns(packed) == expected
    assert {training.engine.kind for training in packed} == {"eager"}
    assert caplog.text.count("; going on with engine=eager") == 3


@pytest.mark.parametrize("where", ["first look", "step", "record"])
def test_without_memory_for_all_at_once_each_has_a_graph_of_its_own(
    tiny_config, monkeypatch, caplog, where
):
    full = torch.OutOfMemoryError("CUDA out of memory")

    class Small(Recorder):
        def run(self, work, strictly=False):
            super().run(work, strictly)
            if strictly and work.branches > 1 and where == "step":
                raise full

        def record(self, work):
            replay = super().record(work)
            if work.branches > 1 and where == "record":
                raise full
            return replay

    class Look(graphs.Snapshot):
        def __init__(self, tensors, device):
            super().__init__(tensors, device)
            positions = [t for t in tensors if (t.dtype, t.shape) == (torch.int64, (1,))]
            if len(positions) == 3 and where == "first look":
                raise full

    monkeypatch.setattr(graphs, "Snapshot", Look)
    recorder = Small()
    assert_packed_as_alone(seeds(tiny_config, *SHORT, "norm=bn"), Pack(recorder, CPU))
    assert set(recorder.replays) == {1}
    assert "no memory for a graph; each has graphs of its own" in caplog.text
    assert len(caplog.records) == 1


def alone(tiny_config, tmp_path, *settings):
    """Carry out each seed by itself without graphs; return their metrics by run id."""
    found = {}
    for config in seeds(tiny_config, *settings, "engine=eager", f"outputs={tmp_path}/alone"):
        [(_, record)] = run_all([(config, f"{config.outputs}/default/{run_id(config)}")])
        assert record["engine"] == "eager"
        found[run_id(config)] = measured(Run(record_of(config).directory).metrics_path)
    return found


def record_of(config):
    return Run(f"{config.outputs}/{config.study}/{run_id(config)}")


def members(config):
    return grid.members(config, str(record_of(config).directory))


def found(members):
    return {run_id(config): measured(Run(place).metrics_path) for config, place in members}


def test_replicas_are_packed_and_each_has_its_directory(tiny_config, tmp_path, recorder):
    config = tiny_config(*REPLICAS)
    assert not isnan(sweep.attempt(config, str(record_of(config).directory)))
    assert recorder.replays == {3: 9, 1: 3 * 2}
    assert found(members(config)) == alone(tiny_config, tmp_path, *SHORT, "norm=bn")
    for one, place in members(config):
        record = Run(place).record()
        assert (record["status"], record["engine"], record["seed"]) == (
            *("completed", "graph"),
            one.seed,
        )
        said = Run(place).log_path.read_text()
        assert said.count(f"{run_id(one)} completed") == 1
        assert said.count(" completed in ") == 1  # and nothing of the others
        assert said.count("  epoch ") == 3
        assert not Run(place).checkpoint_path.exists()
    before = recorder.replays.total()
    assert [record["status"] for _, record in run_all(members(config))] == ["completed"] * 3
    assert recorder.replays.total() == before


def test_a_signal_has_all_of_them_save_and_end(tiny_config, tmp_path, recorder, monkeypatch):
    config = tiny_config(*REPLICAS)
    take = GraphEngine.train_steps

    def signalled(engine, epoch, at, most):
        taken = take(engine, epoch, at, most)
        if epoch.first_step + at == 14 and signalled.by is None:
            signalled.by = engine
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    signalled.by = None
    with monkeypatch.context() as patch:
        patch.setattr(GraphEngine, "train_steps", signalled)
        with pytest.raises(Interrupted) as caught:
            list(run_all(members(config)))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    steps = []
    for _, place in members(config):
        assert Run(place).record()["status"] == "interrupted"
        state = torch.load(Run(place).checkpoint_path, weights_only=True)
        steps.append(state["position"]["step"])
    assert steps == [18, 14, 14]  # the first one was a call ahead
    assert [record["status"] for _, record in run_all(members(config))] == ["completed"] * 3
    assert found(members(config)) == alone(tiny_config, tmp_path, *SHORT, "norm=bn")


def breaking(recorder, at, *events):
    """Have these happen in the midst of the ``at``-th replay of all three."""
    record = recorder.record

    def recording(work):
        replay = record(work)
        kernels = recorder.calls

        def broken():
            if work.branches == 3 and recorder.replays[3] == at - 1:
                recorder.replays[3] += 1
                with torch.inference_mode():
                    for kernel, args, kwargs, _ in kernels[: len(kernels) // 2]:
                        kernel(*args, **kwargs)
                for event in events:
                    event()
            replay()

        return broken

    recorder.record = recording


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("events", [(terminate, terminate), (fail,)])
def test_none_goes_on_from_steps_cut_short(tiny_config, tmp_path, recorder, monkeypatch, events):
    """By a second signal, which does not wait for the end of a step, or a fault of the device."""
    monkeypatch.setattr("gnbench.runs.signals.ECHO", 0)
    config = tiny_config(*REPLICAS)
    breaking(recorder, 3, *events)
    if fail in events:
        assert [str(error) for _, error in run_all(members(config))] == 3 * [
            "CUDA error: an illegal memory access was encountered"
        ]
        expected = "failed"
    else:
        with pytest.raises(Interrupted):
            list(run_all(members(config)))
        expected = "interrupted"
    assert [Run(place).record()["status"] for _, place in members(config)] == 3 * [expected]
    assert [record["status"] for _, record in run_all(members(config))] == 3 * ["completed"]
    assert found(members(config)) == alone(tiny_config, tmp_path, *SHORT, "norm=bn")


def test_a_signal_before_the_first_step_begins_no_other(tiny_config, recorder, monkeypatch):
    begun = []

    def load(config):
        begun.append(config.seed)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(execution, "load_dataset", load)
    with pytest.raises(Interrupted):
        list(run_all(members(tiny_config(*REPLICAS))))
    assert begun == [3]


def test_those_behind_catch_up_and_go_on_in_step(tiny_config, tmp_path, recorder, monkeypatch):
    """One is complete, one was interrupted at step 18, two have not begun."""
    config = tiny_config(*SHORT, "seed=2", "replicas=4", "norm=bn", "epochs=4")
    complete, _, interrupted, _ = members(config)
    list(run_all([complete]))
    stop_at(18, interrupted, monkeypatch)
    recorder.replays.clear()
    taken = []
    take = GraphEngine.train_steps

    def noted(engine, epoch, at, most):
        taken.append(epoch.first_step + at)
        return take(engine, epoch, at, most)

    monkeypatch.setattr(GraphEngine, "train_steps", noted)
    assert [record["status"] for _, record in run_all(members(config))] == ["completed"] * 4
    expected = alone(tiny_config, tmp_path, *SHORT, "norm=bn", "epochs=4")
    assert {k: v for k, v in found(members(config)).items() if k in expected} == expected
    assert taken == sorted(taken)
    # From step 20 on, two epochs of four calls, all three together but for what is yet to warm up.
    assert recorder.replays[3] >= 6


def stop_at(step, member, monkeypatch):
    """Carry out a run until that step."""
    take = GraphEngine.train_steps

    def signalled(engine, epoch, at, most):
        taken = take(engine, epoch, at, most)
        if epoch.first_step + at + taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(GraphEngine, "train_steps", signalled)
        with pytest.raises(Interrupted):
            list(run_all([member]))


@pytest.mark.parametrize("step", [0, 4, 14])
def test_one_that_fails_does_not_stop_the_others(
    tiny_config, tmp_path, recorder, monkeypatch, step
):
    config = tiny_config(*REPLICAS)
    take = GraphEngine.train_steps

    def failing(engine, epoch, at, most):
        if epoch.first_step + at == step and failing.engine in (None, engine):
            failing.engine = engine
            raise RuntimeError("a fault")
        return take(engine, epoch, at, most)

    failing.engine = None
    with monkeypatch.context() as patch:
        patch.setattr(GraphEngine, "train_steps", failing)
        assert isnan(sweep.attempt(config, str(record_of(config).directory)))
    states = [Run(place).record()["status"] for _, place in members(config)]
    assert states == ["failed", "completed", "completed"]
    expected = alone(tiny_config, tmp_path, *SHORT, "norm=bn")
    assert found(members(config)[1:]).items() <= expected.items()
    assert not isnan(sweep.attempt(config, str(record_of(config).directory)))
    assert found(members(config)) == expected


def test_one_that_another_process_trains_is_passed_over(tiny_config, recorder, caplog):
    caplog.set_level(logging.INFO)
    config = tiny_config(*REPLICAS)
    _, (_, second), _ = members(config)
    with Run(second).locked():
        assert isnan(sweep.attempt(config, str(record_of(config).directory)))
    assert f"{second} is being trained by" in caplog.text
    assert recorder.replays[2] > 0
    assert not isnan(sweep.attempt(config, str(record_of(config).directory)))


def test_with_wait_it_comes_after_the_others(tiny_config, recorder):
    config = tiny_config(*REPLICAS, "wait=true")
    _, (_, second), _ = members(config)
    with Run(second).locked():
        outcomes = run_all(members(config))
        assert [next(outcomes)[0], next(outcomes)[0]] == [0, 2]
    [(number, record)] = outcomes
    assert (number, record["status"]) == (1, "completed")


def test_a_signal_is_heeded_while_a_later_one_waits(tiny_config, monkeypatch):
    """On a CPU: the first one is complete, and nothing is left to save."""
    config = tiny_config(*REPLICAS, "wait=true")
    _, (_, second), _ = members(config)

    def hold(*_):
        terminate()
        raise AssertionError("not heeded at once")

    with Run(second).locked():
        outcomes = run_all(members(config))
        next(outcomes)
        monkeypatch.setattr(Run, "locked", hold)
        with pytest.raises(Interrupted):
            next(outcomes)


def test_what_draws_random_numbers_goes_one_by_one(tiny_config, tmp_path, recorder, caplog):
    caplog.set_level(logging.INFO)
    settings = (*SHORT, "norm=bn", "model.dropout=0.2")
    config = tiny_config(*settings, "seed=3", "replicas=3")
    assert draws_random_numbers(config)
    assert not draws_random_numbers(tiny_config(*SHORT, "norm=bn"))
    list(run_all(members(config)))
    assert set(recorder.replays) == {1}
    assert "replicas=3: a step draws random numbers; one by one" in caplog.text
    assert found(members(config)) == alone(tiny_config, tmp_path, *settings)


def test_one_without_room_beside_the_others_comes_after_them(
    tiny_config, tmp_path, recorder, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    build = execution.build_training
    under_way = []

    def narrow(config, *arguments):
        if config.seed == 5 and len(under_way) == 2:
            under_way.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        under_way.append(config.seed)
        return build(config, *arguments)

    monkeypatch.setattr(execution, "build_training", narrow)
    config = tiny_config(*REPLICAS)
    numbers = [number for number, record in run_all(members(config)) if record["result"]]
    assert numbers == [0, 1, 2]
    assert caplog.text.count("once more, alone") == 1
    assert recorder.replays[2] > 0
    assert found(members(config)) == alone(tiny_config, tmp_path, *SHORT, "norm=bn")


def test_one_without_room_for_its_checkpoint_leaves_the_pack(
    tiny_config, tmp_path, recorder, monkeypatch
):
    config = tiny_config(*REPLICAS)
    stop_at(14, members(config)[1], monkeypatch)
    packs = []
    load = GraphEngine.load_state_dict

    def full(engine, state):
        packs.append(engine._pack)
        if len(packs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        load(engine, state)

    monkeypatch.setattr(GraphEngine, "load_state_dict", full)
    assert [number for number, _ in run_all(members(config))] == [0, 2, 1]
    assert packs[0]._members == []
    assert found(members(config)) == alone(tiny_config, tmp_path, *SHORT, "norm=bn")


def test_more_than_a_graph_has_branches_go_in_groups(tiny_config, recorder, monkeypatch):
    monkeypatch.setattr(execution, "MOST_BRANCHES", 2)
    outcomes = list(run_all(members(tiny_config(*REPLICAS))))
    assert [number for number, _ in outcomes] == [0, 1, 2]
    assert recorder.replays == {2: 9, 1: 9 + 3 * 2}


def test_they_share_one_copy_of_the_images(tiny_config, recorder, monkeypatch):
    addresses = set()
    build, load = execution.build_training, execution.load_dataset

    def noted(*arguments):
        training = build(*arguments)
        addresses.add(training.train.images.data_ptr())
        return training

    monkeypatch.setattr(execution, "build_training", noted)
    # As it would be if a GPU had to have its own.
    monkeypatch.setattr(execution, "load_dataset", lambda config: copy.deepcopy(load(config)))
    list(run_all(members(tiny_config(*REPLICAS, "epochs=1"))))
    assert len(addresses) == 1


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", ["none", "bn", "gn", "ln", "in", "lrn"])
def test_on_cuda_each_of_a_pack_is_what_it_is_alone(tiny_config, norm):
    device = torch.device("cuda", 0)
    configs = seeds(tiny_config, *SHORT, f"norm={norm}", "device=cuda", "engine=eager")
    assert_packed_as_alone(configs, Pack(graphs.CudaGraphs(device), device))


@pytest.mark.cuda
@on_cuda
def test_on_cuda_a_branch_that_cannot_be_captured_costs_the_others_nothing(tiny_config):
    device = torch.device("cuda", 0)
    configs = seeds(tiny_config, *SHORT, "norm=bn", "device=cuda", "engine=eager")
    expected = [rows(start(config)) for config in configs]
    packed = built(configs, Pack(graphs.CudaGraphs(device), device))

    def refuse(*_):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a capture")

    packed[1].engine.model.register_forward_pre_hook(refuse)
    assert in_turns(packed) == expected
    assert [training.engine.kind for training in packed] == ["graph", "eager", "graph"]
    for training in packed:
        training.engine.close()
    assert_packed_as_alone(configs, Pack(graphs.CudaGraphs(device), device))
