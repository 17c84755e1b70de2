"""The benchmark's arithmetic and bookkeeping; never its times."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from gnbench.bench import __main__ as bench
from gnbench.bench import limit, worker
from gnbench.bench.compare import Candidate, CandidateError, compare, table, take_turns
from gnbench.bench.figure import draw_speed
from gnbench.bench.limit import LINKS, MATMUL_FLOPS
from gnbench.bench.plain_loop import PlainLoop
from gnbench.bench.worker import EngineLoop
from gnbench.check import compose
from gnbench.errors import ConfigError
from gnbench.train import cuda_graphs, devices
from tests import tiny
from tests.conftest import environment, started
from tests.replays import Recorder

SETTINGS = {
    "datasets": ["fashion_mini"],
    "models": ["simplenetv2"],
    "norms": ["gn"],
    "batch_sizes": [8],
    "precisions": ["fp32"],
    "runs": [1, 2],
    "replicas": [1, 8],
    "compile": [False],
    "device": "cpu",
    "warmup_steps": 4,
    "rounds": 2,
    "seconds": 0.05,
    "outputs": "outputs/bench",
}
SMALL = [f"{key}={value}".replace(" ", "") for key, value in SETTINGS.items()]
FACTS = {
    "threads": 1,
    "startup_seconds": 3.0,
    "peak_memory_bytes": 7 << 20,
    "kernels_per_step": None,
}


def config(**settings):
    return bench.BenchConfig.parse(SETTINGS | settings)


def test_ratios_are_medians_of_rounds_within_a_precision():
    plain, engine = Candidate("plain", "fp32"), Candidate("eager", "fp32", 2)
    slow, bf16 = Candidate("plain", "bf16"), Candidate("eager", "bf16")
    rates = {
        plain: [10.0, 5.0, 10.0],  # the machine was slow in the second round
        slow: [5.0, 4.0, 5.0],
        engine: [30.0, 20.0, 50.0],
        bf16: [10.0, 10.0, 10.0],
        **{"fp32": [100.0, 50.0, 100.0], "bf16": [50.0, 50.0, 50.0], "copy": [400.0, 80.0, 400.0]},
    }
    facts = dict.fromkeys((plain, slow, engine, bf16), FACTS)
    rows = compare(4, facts, rates, flops=MATMUL_FLOPS, copies=2)
    first, _, second, third = rows
    assert first["speedup"] == first["speedup_min"] == first["speedup_max"] == 1
    assert (second["speedup_min"], second["speedup"], second["speedup_max"]) == (3, 4, 5)
    assert (third["speedup"], third["speedup_overall"]) == (2, 1)
    assert second["images_per_second"] == 120
    assert second["ms_per_step"] == pytest.approx(1000 / 30)
    assert second["limit_ms_per_step"] == pytest.approx(10)  # 10, 25 (two copies) and 10 ms
    assert second["limit_fraction"] == pytest.approx(0.5)  # of 0.3, 0.5 and 0.5
    assert second["limit_in_turn_ms_per_step"] == pytest.approx(15)  # 10 + 5, 20 + 25, 10 + 5 ms
    assert second["limit_in_turn_fraction"] == pytest.approx(0.75)  # of 0.45, 0.9 and 0.75
    assert third["limit_ms_per_step"] == pytest.approx(20)
    lines = table(rows).splitlines()
    assert "× plain fp32" in lines[0]
    assert lines[3].split()[:7] == ["eager", "fp32", "×2", "1", "120", "33.33", "4.00"]
    figure = draw_speed(
        pd.DataFrame(
            {"dataset": "d", "model": "m", "norm": "n", "batch_size": 4, **row} for row in rows
        ),
        "cpu",
    )
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[:4] == [row["who"] for row in rows]
    assert labels[4:] == ["the hardware's limit, fp32", "the limit if nothing overlaps"]


def test_on_a_gpu_the_limit_may_be_the_chain_of_kernels():
    plain, graph = Candidate("plain", "fp32"), Candidate("graph", "fp32")
    side_by_side = Candidate("graph", "fp32", replicas=8)
    facts = {
        plain: FACTS,
        graph: FACTS | {"kernels_per_step": 90.0},
        side_by_side: FACTS | {"kernels_per_step": 80.0},
    }
    # A thousand kernels a millisecond: 80 take 0.08 ms, longer than the product and the copy.
    rates = {plain: [500.0], graph: [6250.0], side_by_side: [25000.0]}
    rates |= {"fp32": [50e3], "copy": [20e3], "chain": [1e6 / LINKS]}
    rows = compare(2, facts, rates, flops=MATMUL_FLOPS, copies=1)
    assert [row["limit_ms_per_step"] for row in rows] == pytest.approx([0.08, 0.08, 0.05])
    assert [row["limit_fraction"] for row in rows] == pytest.approx([0.04, 0.5, 1.25])
    in_turn = [row["limit_in_turn_ms_per_step"] for row in rows]
    assert in_turn == pytest.approx([0.08, 0.08, 0.07])  # 0.02 + 0.05


def test_everyone_has_a_turn_in_every_round(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    turns = []

    def player(name):
        return lambda seconds: turns.append((name, seconds)) or len(turns)

    rates = take_turns({"a": player("a"), "b": player("b")}, 3, 0.5, lambda text: None)
    assert [sorted(turns[i : i + 2]) for i in (0, 2, 4)] == [[("a", 0.5), ("b", 0.5)]] * 3
    assert sorted(rates["a"] + rates["b"]) == [1, 2, 3, 4, 5, 6]


def test_the_hardware_works_until_the_time_is_over(monkeypatch):
    """A product that takes long is done once."""
    clock = [0.0]
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def rate(cost):
        def work():
            clock[0] += cost

        return limit.rate(work, torch.device("cpu"), 1.0)

    began = clock[0]
    assert rate(72.0) == pytest.approx(1 / 72)
    assert clock[0] - began == 72
    assert rate(0.1) == pytest.approx(10)


def test_engines_on_a_gpu_are_timed_with_replicas_too():
    settings = config(precisions=["fp32", "bf16"])
    assert list(map(str, bench.candidates(settings, on_gpu=False))) == [
        *("plain fp32", "plain bf16", "plain flushed fp32", "plain flushed bf16"),
        *("eager fp32", "eager fp32 ×2", "eager bf16", "eager bf16 ×2"),
    ]
    assert list(map(str, bench.candidates(config(), on_gpu=True))) == [
        *("plain fp32", "plain deterministic fp32", "eager fp32", "eager fp32 ×2"),
        *("graph fp32", "graph fp32 8 replicas", "graph fp32 ×2"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        *(("rounds", 0, "rounds=0"), ("seconds", 0, "seconds=0"), ("norms", [], "norms=")),
        *(("runs", [1, 1], "runs="), ("norms", ["gm"], "norm/gm"), ("outputs", "", "outputs=")),
        *(("precisions", ["fp8"], "fp8"), ("precisions", ["tf32"], "precision=tf32")),
        *(("replicas", [17], "17"), ("batch_sizes", [0], "=0")),
    ],
)
def test_bad_input_is_refused_by_name(key, value, named):
    with pytest.raises(ConfigError, match=named):
        bench.check(config(**{key: value}))


@pytest.mark.parametrize("lacking", ["bf16", "tf32"])
def test_a_precision_that_the_device_has_not_is_left_out(monkeypatch, capsys, lacking):
    monkeypatch.setattr(devices, "has_native_bf16", lambda device: False)
    _, everyone = bench.check(config(precisions=[lacking, "fp32"]))
    assert {candidate.precision for candidate in everyone} == {"fp32"}
    [line] = capsys.readouterr().err.splitlines()
    assert lacking in line


def test_products_in_tf32_are_timed_by_torch_s_setting(monkeypatch):
    seen, matmul = [], torch.backends.cuda.matmul

    def rate(work, device, seconds):
        work()
        seen.append(matmul.fp32_precision)
        return 1.0

    monkeypatch.setattr(limit, "rate", rate)
    run = compose(*tiny.OVERRIDES)
    players = limit.hardware(run, ["fp32", "tf32"])
    assert set(players) == {"fp32", "tf32", "copy"}
    for name in ("fp32", "tf32", "fp32"):
        players[name](0.1)
    assert seen == ["ieee", "tf32", "ieee"]


def own_norm(folder):
    """Write a norm of a user's own; return the folder for --config-dir."""
    (folder / "own" / "norm").mkdir(parents=True)
    text = "_target_: torch.nn.BatchNorm2d\n_partial_: true\nname: mine\n"
    (folder / "own" / "norm" / "mine.yaml").write_text(text)
    return str(folder / "own")


def test_a_norm_of_ones_own_is_found(tmp_path):
    [run] = bench.check(config(norms=["mine"]), [own_norm(tmp_path)])[0].values()
    assert run.norm.name == "mine"


@pytest.mark.parametrize("settings", [tiny.OVERRIDES, tiny.COLOURS], ids=["gray", "colours"])
def test_the_plain_loop_sees_the_pixels_that_an_engine_sees(settings):
    """Some of them mirrored."""
    run = compose(*settings, "dataset.augmentation=flip")
    [training] = EngineLoop(run).trainings

    def pixels(images):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (run.dataset.mean, run.dataset.std))
        return (255 * (images * std + mean)).round().to(torch.uint8)

    stored = pixels(training.train.chunk(0, len(training.train))[0])
    known = [*stored, *stored.flip(3)]
    images, _ = next(PlainLoop(run).batches)
    assert len(images) == 8
    for image in pixels(images):
        assert any(torch.equal(image, other) for other in known)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_engine_continues_what_the_plain_loop_began(tmp_path):
    """And moves as far in a step: the same optimizer and schedule."""
    run = compose(*tiny.OVERRIDES, "norm=bn", "epochs=5")
    engine, plain = EngineLoop(run), PlainLoop(run)
    plain.take(9)
    plain.save(tmp_path / "state.pt")
    engine.load(tmp_path / "state.pt")
    before = weights(plain.model)
    model = engine.trainings[0].engine.model
    assert torch.equal(weights(model), before)
    assert engine.take(1) == plain.take(1) == 1
    moved = [float((weights(one) - before).abs().sum()) for one in (model, plain.model)]
    assert moved[0] == pytest.approx(moved[1], rel=0.5)  # another batch
    assert 0 < plain.wrong < 10 * 8
    assert plain.loss_sum > 0


def test_a_training_that_ends_is_said_to_end():
    loop = EngineLoop(compose(*tiny.OVERRIDES, "norm=none", "optimizer=sgd", "optimizer.lr=1e9"))
    with pytest.raises(CandidateError, match="diverged"):
        loop.take(100)


def profiled(monkeypatch, profile):
    """Return the kernels of a step, by the profiler."""
    monkeypatch.setattr(torch.profiler, "profile", profile)
    loop = EngineLoop(compose(*tiny.OVERRIDES, "norm=bn", "batch_size=2", "epochs=50"))
    loop.device = torch.device("cuda", 0)
    return loop.kernels()


def test_without_a_profiler_there_is_no_count_but_a_row(monkeypatch, capsys):
    """On a GPU a profiler may refuse to begin once graphs have been captured."""

    def profile(activities):
        raise RuntimeError("CUPTI_ERROR_NOT_COMPATIBLE")

    assert profiled(monkeypatch, profile) == []
    assert "CUPTI_ERROR" in capsys.readouterr().err


def test_the_kernels_of_a_step_are_counted_and_timed(monkeypatch):
    def event(name, microseconds, device="CUDA"):
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        device_type = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=device_type, time_range=time_range)

    @contextmanager
    def profile(activities):
        taken = [event("add", 2.0), event("convolution", 30.0), event("add", 1.0)]
        taken.append(event("launch", 100.0, "CPU"))
        yield SimpleNamespace(events=lambda: taken * worker.COUNTED_STEPS)

    assert profiled(monkeypatch, profile) == [
        {"kernel": "convolution", "per_step": 1.0, "microseconds_per_step": 30.0},
        {"kernel": "add", "per_step": 2.0, "microseconds_per_step": 3.0},
    ]


@pytest.mark.slow
def test_replicas_are_timed_in_step_once_their_graphs_are_recorded(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "recorder", lambda device: recorder)
    small = ("model.channels=[4,8,8]", "model.hidden=16")
    run = compose(*tiny.OVERRIDES, *small, "norm=bn", "batch_size=2", "epochs=50")  # 16 + 8 steps
    plain, loop = PlainLoop(run), EngineLoop(run, replicas=2)
    plain.take(3)
    plain.save(tmp_path / "state.pt")
    loop.load(tmp_path / "state.pt")
    loop.pass_epoch_ends()
    recorded = recorder.recorded
    assert recorded == 2 + 2  # sixteen steps, one, and the evaluation of each
    assert loop.take(48) == 2 * 48
    loop.wait()
    assert recorder.recorded == recorded
    assert recorder.replays[2] > 0
    assert len({weights(training.engine.model).sum().item() for training in loop.trainings}) == 2
    record = recorder.record

    def not_together(work):
        if work.branches > 1:
            raise RuntimeError("not captured")
        return record(work)

    recorder.record = not_together
    loop.load(tmp_path / "state.pt")
    with pytest.raises(CandidateError, match="one by one"):
        loop.pass_epoch_ends()


def test_a_chain_is_as_many_kernels_one_after_another():
    calls = []
    recorder = Recorder(lambda branches, kernels: calls.extend(kernels.calls))
    launch = limit.chain(recorder, torch.device("cpu"))
    launch()
    launch()
    [token] = {id(call[1][0]): call[1][0] for call in calls}.values()
    assert token.item() == 4 * LINKS  # warmed up, recorded, and twice


def test_flops_are_those_of_hand_arithmetic():
    """Multiply-adds of each layer; backwards twice those, but for the input of the first."""
    run = compose("dataset=cifar10", "norm=bn", "batch_size=4")
    layers = [
        *(32 * 32 * 9 * 3 * 32, 32 * 32 * 9 * 32 * 32, 16 * 16 * 9 * 32 * 64),
        *(16 * 16 * 9 * 64 * 64, 8 * 8 * 9 * 64 * 128, 8 * 8 * 9 * 128 * 128),
        *(2048 * 1024, 1024 * 10),
    ]
    assert limit.count_flops(run) == 2 * 4 * (3 * sum(layers) - layers[0])


def test_bytes_are_those_of_hand_arithmetic():
    """Of AdamW 67 million, the gradient 10, the fully connected weights read twice 17."""
    run = compose("dataset=cifar10", "norm=bn", "batch_size=4")
    parameters, linear = 2_396_330, (2048 + 1) * 1024 + (1024 + 1) * 10
    moved, copied = limit.count_bytes(run)
    assert moved == 28 * parameters + 4 * parameters + 8 * linear
    assert moved == pytest.approx(94e6, rel=0.01)
    assert copied == 4 * limit.copying(run, torch.device("cpu"))().numel() * 2


def test_quick_is_a_smaller_benchmark_whose_settings_can_be_overridden(cli):
    done = cli("--quick", "--cfg", "job", "rounds=7", module="gnbench.bench", check=0)
    assert "datasets:\n- fashion_mini" in done.stdout
    assert "rounds: 7" in done.stdout


@pytest.mark.slow
def test_every_candidate_is_timed_and_compared(cli, tmp_path):
    settings = [*SMALL, "norms=[mine]", "runs=[2]"]
    own = ("--config-dir", own_norm(tmp_path))
    done = cli(*own, *settings, module="gnbench.bench", check=0)
    folder = tmp_path / "outputs" / "bench"
    rows = pd.read_csv(folder / "bench.csv")
    who = ["plain fp32", "plain flushed fp32", "eager fp32 ×2"]
    assert list(rows["who"]) == who
    throughput = 1000 * rows["batch_size"] / rows["ms_per_step"]
    assert throughput.tolist() == pytest.approx(rows["images_per_second"].tolist())
    assert (rows["peak_memory_bytes"] > 50 * 2**20).all()
    rounds = pd.read_csv(folder / "bench_rounds.csv")
    assert rounds.groupby("who")["round"].apply(list).to_dict() == {
        one: [1, 2] for one in [*who, "fp32", "copy"]
    }
    medians = rounds.groupby("who")["per_second"].median()
    assert 8 * medians["eager fp32 ×2"] == pytest.approx(rows["images_per_second"][2])
    about = json.loads((folder / "bench.json").read_text())
    assert about["command"] == f"python -m gnbench.bench {' '.join(settings)}"
    assert "fashion_mini, simplenetv2 mine, batch size 8" in done.stdout
    assert (folder / "bench.png").stat().st_size > 10_000
    assert (folder / "bench.svg").exists()


@pytest.mark.slow
def test_a_candidate_that_dies_or_cannot_be_built_is_named():
    run = compose(*tiny.OVERRIDES, "epochs=1000000")  # or a fast machine would come to its end
    candidate = Candidate("eager", "fp32", 2)
    team = [worker.Processes(candidate, run, threads=1)]
    try:
        assert team[0].turn(0.01) > 0
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(CandidateError, match="eager fp32 ×2: its process died"):
                team[0].turn(0.01)
        broken = run.with_(dataset=run.dataset.plain() | {"classes": 5})
        with pytest.raises(CandidateError, match=r"plain fp32: .*classes"):
            worker.Processes(Candidate("plain", "fp32"), broken, threads=1)
    finally:
        worker.end(team)
    assert multiprocessing.active_children() == []


def first_candidate(process):
    """Return the number of a process that the command has started."""
    while process.poll() is None:
        time.sleep(0.05)
        command = ["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="]
        listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        if found := [int(line.split()[0]) for line in listed if "spawn_main" in line]:
            return found[0]
    raise AssertionError(process.communicate())


def wait_for_the_end(*chosen):
    """Wait until none of the processes that ``ps`` finds so is there, zombies aside."""
    while True:
        command = ["ps", *chosen, "-o", "stat="]
        states = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in states):
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_data_workers_that_notice_nothing_end_with_their_candidate():
    run = compose(*tiny.OVERRIDES, "epochs=1000000")
    team = [worker.Processes(Candidate("plain", "fp32"), run, threads=1)]
    [candidate] = multiprocessing.active_children()
    try:
        command = ["ps", "--ppid", str(candidate.pid), "-o", "pid="]
        data_workers = subprocess.run(command, capture_output=True, text=True).stdout.split()
        assert data_workers
        for pid in data_workers:
            os.kill(int(pid), signal.SIGSTOP)
    finally:
        worker.end(team)
    wait_for_the_end("--pid", ",".join(data_workers))


@pytest.mark.slow
def test_a_case_that_fails_does_not_stop_the_others(tmp_path):
    process = started(tmp_path, "gnbench.bench", *SMALL, "batch_sizes=[8,4]", "runs=[1]")
    os.kill(first_candidate(process), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1, err
    [line] = err.splitlines()
    assert line.startswith("gnbench: ")
    assert line.endswith("simplenetv2 gn, batch size 8: left out: plain fp32: its process died")
    assert set(pd.read_csv(tmp_path / "outputs" / "bench" / "bench.csv")["batch_size"]) == {4}


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_what_was_measured(tmp_path):
    settings = (*SMALL, "batch_sizes=[8,4]", "runs=[1]")
    process = started(tmp_path, "gnbench.bench", *settings, start_new_session=True)
    results = tmp_path / "outputs" / "bench" / "bench.csv"
    while not results.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(2)  # into the start of the next case
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "")
    assert set(pd.read_csv(results)["batch_size"]) == {8}
    wait_for_the_end("--sid", str(process.pid))


@pytest.mark.slow
def test_no_process_outlives_a_command_that_is_killed(tmp_path):
    process = started(tmp_path, "gnbench.bench", *SMALL, start_new_session=True)
    first_candidate(process)
    process.kill()
    process.communicate()
    wait_for_the_end("--sid", str(process.pid))


IDLE = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from gnbench.bench import worker
spawn = multiprocessing.get_context("spawn")
executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=worker.lead)
print(executor.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_that_has_no_work_yet_ends_with_the_command(tmp_path):
    command = [sys.executable, "-c", IDLE]
    env = environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, timeout=100)
    assert done.returncode == -signal.SIGKILL
    wait_for_the_end("--pid", done.stdout.decode())
