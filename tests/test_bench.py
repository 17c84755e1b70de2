"""The benchmark's arithmetic and bookkeeping; never its times."""

import copy
import io
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from multiprocessing import active_children
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tqdm import tqdm

from gnbench.aggregate.figure import draw_speed
from gnbench.bench import __main__ as bench
from gnbench.bench import worker as contenders
from gnbench.bench.__main__ import Case, Contender, ContenderError, Team, compare, take_turns
from gnbench.bench.worker import MATMUL_FLOPS, Bookkeeping, EngineLoop, PlainLoop, count_flops
from gnbench.build import compose
from gnbench.runs.directory import Run
from gnbench.train import cuda_graphs as graphs
from gnbench.train import devices
from tests import tiny
from tests.conftest import started
from tests.replays import Recorder

SMALL = (
    *("norms=[gn]", "batch_sizes=[8]", "precisions=[fp32]", "datasets=[fashion_mini]"),
    *("warmup_steps=4", "rounds=2", "seconds=0.05", "device=cpu"),
)


@pytest.fixture(autouse=True)
def one_core():
    """Contenders take all cores there are: leave some to the other tests."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


def test_every_contender_is_timed_and_compared(cli, tmp_path):
    settings = (*SMALL, "precisions=[bf16]")
    done = cli(*settings, module="gnbench.bench", check=0)
    folder = tmp_path / "outputs" / "bench"
    rows = pd.read_csv(folder / "bench.csv")
    found = list(rows[["engine", "precision", "runs"]].itertuples(index=False, name=None))
    assert found == [("plain", "bf16", 1), ("eager", "bf16", 1), ("eager", "bf16", 2)]
    assert rows["speedup"][0] == 1
    throughput = 1000 * rows["batch_size"] / rows["ms_per_step"]
    assert throughput.tolist() == pytest.approx(rows["images_per_second"].tolist())
    assert (rows["peak_memory_bytes"] > 50 * 2**20).all()
    assert rows["overhead"].isna().tolist() == [True, False, False]
    rounds = pd.read_csv(folder / "bench_rounds.csv")
    assert rounds.groupby("who")["round"].apply(list).to_dict() == {
        str(key): [1, 2] for key in [*(Contender(*c) for c in found), "bf16", "copy"]
    }
    medians = rounds.groupby("who")["per_second"].median()
    assert 8 * medians["eager bf16 ×2"] == pytest.approx(rows["images_per_second"].iloc[-1])
    about = json.loads((folder / "bench.json").read_text())
    assert about["command"] == f"python -m gnbench.bench {' '.join(settings)}"
    assert about["device"].startswith("cpu (")
    assert "fashion_mini, simplenetv2 gn, batch size 8" in done.stdout
    assert "eager bf16 ×2" in done.stdout
    assert (folder / "bench.png").stat().st_size > 10_000
    assert (folder / "bench.svg").exists()


def test_ratios_are_medians_of_the_rounds_and_the_limit_is_the_longer_time():
    case = Case("cifar10", "simplenetv2", "gn", 4)
    plain, engine = Contender("plain", "fp32"), Contender("eager", "fp32", 2)
    team = SimpleNamespace(
        threads=1,
        memory=7,
        startup_seconds=3.0,
        first_step_seconds=0.5,
        bookkeeping=Bookkeeping(steps=1000, epoch_seconds=0.1, checkpoint_seconds=0.25),
        kernels=None,
    )
    rates = {
        plain: [10.0, 5.0, 10.0],  # the machine was slow in the second round
        engine: [30.0, 20.0, 50.0],
        "fp32": [100.0, 50.0, 100.0],
        "copy": [200.0, 40.0, 200.0],
    }
    first, second = compare(case, {plain: team, engine: team}, rates, flops=MATMUL_FLOPS, pause=50)
    assert first["speedup"] == first["speedup_min"] == first["speedup_max"] == 1
    assert (second["speedup_min"], second["speedup"], second["speedup_max"]) == (3, 4, 5)
    assert second["images_per_second"] == 120
    assert second["ms_per_step"] == pytest.approx(1000 / 30)
    assert second["limit_ms_per_step"] == pytest.approx(10)  # 10, 25 (the copy) and 10 ms
    assert second["limit_fraction"] == pytest.approx(0.5)  # of 0.3, 0.5 and 0.5
    # A run takes 15 steps a second: 0.1 s in 1000 of them; 0.25 s in 50.
    assert second["overhead"] == pytest.approx(0.1 * 15 / 1000 + 0.25 / 50)


def test_on_a_gpu_the_limit_may_be_the_chain_of_kernels():
    case = Case("cifar10", "simplenetv2", "gn", 2)
    plain, graph = Contender("plain", "fp32"), Contender("graph", "fp32")
    packed = Contender("graph", "fp32", replicas=8)
    costs = {"threads": 1, "memory": 7, "startup_seconds": 3.0, "first_step_seconds": 0.5}
    bookkeeping = Bookkeeping(steps=1000, epoch_seconds=0.1, checkpoint_seconds=0.25)
    teams = {
        plain: SimpleNamespace(**costs, bookkeeping=None, kernels=None),
        graph: SimpleNamespace(**costs, bookkeeping=bookkeeping, kernels=90.0),
        packed: SimpleNamespace(**costs, bookkeeping=bookkeeping, kernels=80.0),
    }
    # A thousand kernels a millisecond: 80 take 0.08 ms, longer than the product and the copy.
    rates = {plain: [500.0], graph: [6250.0], packed: [25000.0]}
    rates |= {"fp32": [50e3], "copy": [20e3], "chain": [1e3]}
    rows = compare(case, teams, rates, flops=MATMUL_FLOPS, pause=50)
    assert [row["limit_ms_per_step"] for row in rows] == pytest.approx([0.08, 0.08, 0.05])
    assert [row["limit_fraction"] for row in rows] == pytest.approx([0.04, 0.5, 1.25])
    assert [row["kernels_per_step"] for row in rows] == [None, 90, 80]
    assert rows[2]["overhead"] == pytest.approx(
        0.1 * 25 + 0.01
    )  # a hundred times what all their checkpoints take apart


def test_a_chain_is_as_many_kernels_one_after_another(monkeypatch):
    recorder = Recorder()
    chain = contenders.Chain(recorder, torch.device("cpu"))
    chain.take(2)
    assert recorder.replays == {1: 2}
    [token] = {id(call[1][0]): call[1][0] for call in recorder.calls}.values()
    assert len(recorder.calls) == contenders.LINKS
    assert token.item() == 4 * contenders.LINKS  # warmed up, recorded, and twice


def test_replicas_are_timed_in_step(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: recorder)
    config = compose(*tiny.OVERRIDES, "norm=bn", "epochs=50")
    plain, loop = PlainLoop(config), EngineLoop(config, replicas=3)
    plain.take(3)
    plain.save(tmp_path / "state.pt")
    loop.load(tmp_path / "state.pt")
    assert loop.take(40) == 3 * 40
    assert recorder.replays[3] > 0
    assert [training.engine.kind for training in loop.trainings] == ["graph"] * 3
    states = [training.engine.optimizer.state.values() for training in loop.trainings]
    assert len({next(iter(state))["exp_avg"].data_ptr() for state in states}) == 3
    assert len({weights(training.engine.model).sum().item() for training in loop.trainings}) == 3
    assert (loop.engine_names(None), loop.kernels(None)) == ({"graph"}, None)


def test_no_graph_of_an_epoch_s_end_is_recorded_while_the_clock_runs(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "recorder", lambda device: recorder)
    config = compose(*tiny.OVERRIDES, "norm=bn", "batch_size=2", "epochs=50")  # 16 + 8 steps
    loop = EngineLoop(config, replicas=2)
    loop.pass_epoch_ends(None)
    recorded = recorder.recorded
    assert recorded == 2 + 2  # sixteen steps, one, and the evaluation of either
    loop.take(60)
    assert recorder.recorded == recorded
    record = recorder.record

    def not_together(work):
        if work.branches == 2:
            raise RuntimeError("not captured")
        return record(work)

    recorder.record = not_together
    for training in loop.trainings:
        training.engine.load_state_dict(training.engine.state_dict())
    loop.take(60)
    assert loop.engine_names(None) == {"graph", "graphs one by one"}


def test_packed_replicas_are_timed_where_there_are_graphs(monkeypatch):
    config = SimpleNamespace(
        device="cuda", precisions=["fp32"], compile=[False], runs=[1, 2], replicas=[1, 8]
    )
    monkeypatch.setattr(devices, "choose_device", torch.device)
    assert list(map(str, bench.contenders(config))) == [
        *("plain fp32", "eager fp32", "eager fp32 ×2"),
        *("graph fp32", "graph fp32 8 replicas", "graph fp32 ×2"),
    ]


def test_the_bookkeeping_of_a_run_is_all_that_differs(monkeypatch):
    """Time passes here at a row and a checkpoint, and nowhere else."""
    clock = [0.0]
    append, save = Run.append, Run.save_checkpoint

    def slow_append(self, row):
        clock[0] += 3.0
        append(self, row)

    def slow_save(self, state):
        clock[0] += 5.0
        save(self, state)

    monkeypatch.setattr(Run, "append", slow_append)
    monkeypatch.setattr(Run, "save_checkpoint", slow_save)
    clocks = SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    monkeypatch.setattr(contenders, "time", clocks)
    loop = EngineLoop(compose(*tiny.OVERRIDES))
    before = copy.deepcopy(loop.training.state_dict())
    assert loop.bookkeeping(None) == Bookkeeping(6, 3.0, 5.0)
    after = loop.training.state_dict()
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in after["model"])
    assert after["position"] == before["position"]


def test_everyone_has_a_turn_in_every_round(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    turns = []

    class Counting:
        def __init__(self, name, runs):
            self.name = name
            self.trainings = runs

        def settle(self):
            turns.append((self.name, "settles"))

        def rate(self, count):
            turns.append((self.name, count))
            return 100.0

    one, two = Contender("eager", "fp32"), Contender("eager", "fp32", 2)
    config = SimpleNamespace(rounds=3, seconds=0.5)
    bar = tqdm(file=io.StringIO())
    rates = take_turns({one: Counting("one", 1), two: Counting("two", 2)}, config, bar)
    assert rates == {one: [100.0] * 3, two: [100.0] * 3}
    assert turns[:2] == [("one", bench.SETTLING), ("two", bench.SETTLING)]
    for turn in range(3):
        block = turns[2 + 4 * turn :][:4]
        # Half as many steps in each of the two runs.
        whole = [[("one", "settles"), ("one", 50)], [("two", "settles"), ("two", 25)]]
        assert sorted([block[:2], block[2:]]) == whole


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rounds=0", "rounds=0: must be an integer >= 1"),
        ("seconds=0", "seconds=0.0: must be a number over 0"),
        ("norms=[]", "norms=[]: name at least one, and none twice"),
        ("runs=[1,1]", "runs=[1, 1]: name at least one, and none twice"),
        ("norms=[gm]", "In 'config': Could not find 'norm/gm'"),
        ("precisions=[fp8]", "precisions=fp8: choose from fp32, bf16"),
        ("runs=[0]", "runs=0: must be an integer >= 1"),
        ("outputs=", "outputs='' is not a folder"),
        ("batch_sizes=[0]", "batch_size=0: must be an integer >= 1"),
        ("round=1", "Could not override 'round'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(cli, tmp_path, setting, says):
    done = cli(*SMALL, setting, module="gnbench.bench", check=2)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"gnbench: {says}")
    assert list(tmp_path.iterdir()) == []


def test_quick_is_a_smaller_benchmark_whose_settings_can_be_overridden(cli):
    done = cli("--quick", "--cfg", "job", "rounds=7", module="gnbench.bench", check=0)
    assert "datasets:\n- fashion_mini" in done.stdout
    assert "rounds: 7" in done.stdout


def test_a_contender_that_dies_or_cannot_be_built_is_named():
    with ExitStack() as stack:
        team = Team(Contender("eager", "fp32", 2), tiny.OVERRIDES, stack)
        assert team.threads == max(1, bench.cores() // 2)
        assert team.ask("take", 3) == [3, 3]
        os.kill(active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(ContenderError, match="eager fp32 ×2: its process died"):
            team.ask("take", 3)
        with pytest.raises(ContenderError, match="eager fp32 ×2: its process died"):
            team.ask("take", 3)
    assert active_children() == []
    broken = (*tiny.OVERRIDES, "dataset.classes=5")
    with ExitStack() as stack:
        with pytest.raises(ContenderError, match=r"plain fp32: dataset\.classes=5: the labels say"):
            Team(Contender("plain", "fp32"), broken, stack)
        assert active_children() == []


def test_a_training_that_ends_is_said_to_end():
    loop = EngineLoop(compose(*tiny.OVERRIDES, "norm=none", "optimizer=sgd", "optimizer.lr=1e9"))
    with pytest.raises(RuntimeError, match="the training came to its end"):
        loop.take(100)


def test_a_case_that_fails_does_not_stop_the_others(tmp_path):
    process = started(tmp_path, "gnbench.bench", *SMALL, "batch_sizes=[8,4]", "runs=[1]")
    contenders = []
    while len(contenders) < 2 and process.poll() is None:
        time.sleep(0.05)
        command = ["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        contenders = [int(line.split()[0]) for line in listed if "spawn_main" in line]
    assert len(contenders) == 2, process.communicate()
    os.kill(contenders[0], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    [line] = err.splitlines()
    assert line.endswith("simplenetv2 gn, batch size 8: plain fp32: its process died")
    assert line.startswith("gnbench: ")
    results = pd.read_csv(tmp_path / "outputs" / "bench" / "bench.csv")
    assert set(results["batch_size"]) == {4}


def test_ctrl_c_ends_all_processes_and_keeps_what_was_measured(tmp_path):
    settings = (*SMALL, "batch_sizes=[8,4]", "runs=[1]")
    process = started(tmp_path, "gnbench.bench", *settings, start_new_session=True)
    until = time.monotonic() + 120
    results = tmp_path / "outputs" / "bench" / "bench.csv"
    while not results.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(2)  # into the start of the next case
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert set(pd.read_csv(results)["batch_size"]) == {8}
    for _ in range(200):  # a killed contender's data workers notice within seconds
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
            continue
        break
    else:
        raise AssertionError("a process is left")


def test_outputs_that_cannot_be_written_are_found_before_anything_is_timed(cli, tmp_path):
    (tmp_path / "file").touch()
    done = cli(*SMALL, "outputs=file/bench", module="gnbench.bench", check=1)
    [line] = done.stderr.splitlines()
    assert line.startswith("gnbench: file/bench cannot be written")
    assert done.stdout == ""


@pytest.mark.parametrize("settings", [tiny.OVERRIDES, tiny.COLOURS], ids=["gray", "colours"])
def test_the_plain_loop_sees_the_pixels_that_an_engine_sees(settings):
    """Some of them mirrored."""
    config = compose(*settings, "dataset.augmentation=flip")
    data = EngineLoop(config).training.train

    def pixels(images):
        mean, std = (torch.tensor(list(config.dataset[k])).view(-1, 1, 1) for k in ("mean", "std"))
        return (255 * (images * std + mean)).round().to(torch.uint8)

    stored = pixels(data.chunk(0, len(data))[0])
    known = [*stored, *stored.flip(3)]
    images, _ = next(PlainLoop(config).batches)
    assert len(images) == 8
    for image in pixels(images):
        assert any(torch.equal(image, other) for other in known)


def test_flops_are_those_of_hand_arithmetic():
    """Multiply-adds of each layer; backwards twice those, but for the input of the first."""
    config = compose("dataset=cifar10", "norm=bn", "batch_size=4")
    layers = [
        *(32 * 32 * 9 * 3 * 32, 32 * 32 * 9 * 32 * 32, 16 * 16 * 9 * 32 * 64),
        *(16 * 16 * 9 * 64 * 64, 8 * 8 * 9 * 64 * 128, 8 * 8 * 9 * 128 * 128),
        *(2048 * 1024, 1024 * 10),
    ]
    assert count_flops(config) == 2 * 4 * (3 * sum(layers) - layers[0])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_engine_continues_what_the_plain_loop_began(tmp_path):
    """And moves as far in a step: the same optimizer and schedule."""
    config = compose(*tiny.OVERRIDES, "norm=bn", "epochs=5")
    engine, plain = EngineLoop(config), PlainLoop(config)
    plain.take(9)
    plain.save(tmp_path / "state.pt")
    engine.load(tmp_path / "state.pt")
    before = weights(plain.model)
    assert torch.equal(weights(engine.training.engine.model), before)
    assert engine.take(1) == plain.take(1) == 1
    moved = [
        float((weights(model) - before).abs().sum())
        for model in (engine.training.engine.model, plain.model)
    ]
    assert moved[0] == pytest.approx(moved[1], rel=0.5)  # another batch
    assert plain.optimizer.param_groups[0]["fused"] is None
    assert 0 < plain.wrong < 10 * 8
    assert plain.loss_sum > 0


def test_the_figure_has_a_line_for_every_contender():
    rows = pd.DataFrame(
        {
            "dataset": "cifar10", "model": "simplenetv2", "norm": norm, "batch_size": size,
            "engine": engine, "compiled": compiled, "precision": "fp32", "runs": runs,
            "replicas": replicas, "speedup": 2.0, "limit_fraction": 0.5,
        }
        for norm in ("bn", "gn")
        for size in (2, 64)
        for engine, compiled, runs, replicas in (
            *(("plain", False, 1, 1), ("eager", False, 1, 1), ("eager", False, 2, 1)),
            *(("eager", True, 1, 1), ("graph", False, 1, 8)),
        )
    )  # fmt: skip
    panels = draw_speed(rows, "cpu").axes
    assert [axis.get_title() for axis in panels] == [
        "cifar10, simplenetv2, bn",
        "cifar10, simplenetv2, gn",
    ]
    assert len({line.get_color() for line in panels[0].lines}) == 6
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == [
        *("plain fp32", "eager fp32", "eager fp32, 2 at once", "eager compiled fp32"),
        "graph fp32, 8 replicas",
        "the hardware's limit, fp32",
    ]
