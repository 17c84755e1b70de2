"""The benchmark's arithmetic and bookkeeping; never its times."""

import json
import os
import signal
from contextlib import ExitStack
from multiprocessing import active_children

import pandas as pd
import pytest
import torch

from gnbench.bench import Contender, ContenderError, Processes
from gnbench.contenders import EngineLoop, PlainLoop, count_flops
from gnbench.experiment import compose
from gnbench.figure import draw_speed
from tests import tiny

SMALL = (
    *("norms=[gn]", "batch_sizes=[8]", "precisions=[fp32]", "datasets=[fashion_mini]"),
    *("warmup_steps=4", "rounds=2", "seconds=0.05", "device=cpu"),
)


def test_every_contender_is_timed_and_compared(cli, tmp_path):
    done = cli(*SMALL, module="gnbench.bench", check=0)
    rows = pd.read_csv(tmp_path / "outputs" / "bench" / "bench.csv")
    assert list(zip(rows["engine"], rows["runs"], strict=True)) == [
        *(("plain", 1), ("eager", 1), ("eager", 2)),
    ]
    plain = rows.iloc[0]
    assert plain["speedup"] == 1
    assert (rows["images_per_second"] > 0).all()
    # With two rounds a median is a mean: that of ratios differs from the ratio of means.
    assert rows["speedup"].tolist() == pytest.approx(
        (rows["images_per_second"] / plain["images_per_second"]).tolist(), rel=0.5
    )
    throughput = 1000 * rows["batch_size"] * rows["runs"] / rows["ms_per_step"]
    assert throughput.tolist() == pytest.approx(rows["images_per_second"].tolist())
    assert rows["limit_fraction"].between(0, 1).all()
    assert (rows["peak_memory_bytes"] > 50 * 2**20).all()
    assert (rows[["startup_seconds", "first_step_seconds"]] > 0).all().all()
    about = json.loads((tmp_path / "outputs" / "bench" / "bench.json").read_text())
    assert about["command"] == f"python -m gnbench.bench {' '.join(SMALL)}"
    assert about["device"].startswith("cpu (")
    assert "fashion_mini, simplenetv2 gn, batch size 8" in done.stdout
    assert "eager fp32 ×2" in done.stdout
    assert (tmp_path / "outputs" / "bench" / "bench.png").stat().st_size > 10_000
    assert (tmp_path / "outputs" / "bench" / "bench.svg").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("rounds=0", "rounds=0: must be an integer >= 1"),
        ("seconds=0", "seconds=0.0: must be a number over 0"),
        ("norms=[]", "norms=[]: name at least one"),
        ("norms=[gm]", "In 'config': Could not find 'norm/gm'"),
        ("precisions=[fp8]", "precisions=fp8: choose from fp32, bf16"),
        ("runs=[2]", "runs=[2]: 1 must be among them"),
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
        team = Processes(Contender("eager", "fp32", 2), tiny.OVERRIDES, 2, stack)
        assert team.threads == 1
        assert team.ask("take", 3) == [3, 3]
        os.kill(active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(ContenderError, match="its process died"):
            team.ask("take", 3)
    assert active_children() == []
    broken = (*tiny.OVERRIDES, "dataset.classes=5")
    with ExitStack() as stack, pytest.raises(ContenderError, match=r"dataset\.classes=5: the"):
        Processes(Contender("eager", "fp32"), broken, 1, stack)


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


def test_the_plain_loop_continues_what_an_engine_began(tmp_path):
    """And moves as far in a step: the same optimizer and schedule."""
    config = compose(*tiny.OVERRIDES, "norm=bn", "epochs=5")
    engine, plain = EngineLoop(config), PlainLoop(config)
    engine.take(9)
    engine.save(tmp_path / "state.pt")
    plain.load(tmp_path / "state.pt")
    before = weights(plain.model)
    assert torch.equal(weights(engine.training.engine.model), before)
    assert engine.take(1) == plain.take(1) == 1
    moved = [
        float((weights(model) - before).abs().sum())
        for model in (engine.training.engine.model, plain.model)
    ]
    assert moved[0] == pytest.approx(moved[1], rel=0.5)  # another batch
    assert plain.optimizer.param_groups[0]["fused"] is None
    assert 0 <= plain.wrong <= 8
    assert plain.loss_sum > 0


def test_the_figure_has_a_line_for_every_contender():
    rows = pd.DataFrame(
        {
            "dataset": "cifar10", "model": "simplenetv2", "norm": norm, "batch_size": size,
            "engine": engine, "precision": "fp32", "runs": runs,
            "speedup": 2.0, "limit_fraction": 0.5,
        }
        for norm in ("bn", "gn")
        for size in (2, 64)
        for engine, runs in (("plain", 1), ("eager", 1), ("eager", 2))
    )  # fmt: skip
    panels = draw_speed(rows, "cpu").axes
    assert [axis.get_title() for axis in panels] == [
        "cifar10, simplenetv2, bn",
        "cifar10, simplenetv2, gn",
    ]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == [
        *("plain fp32", "eager fp32", "eager fp32, 2 at once", "the hardware's limit, fp32"),
    ]
