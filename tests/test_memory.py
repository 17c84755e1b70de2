"""Bytes held for the backward pass: by hand, by device, and as the command reports them."""

import gc
import weakref

import pandas as pd
import pytest
import torch

from gnbench.memory import MemoryConfig, largest_batch, measure, memory
from gnbench.runs.runner import run
from tests import tiny
from tests.trainings import NORMS, training

N = 8


def held(norm, count=N, **settings):
    one = training(norm, **settings)
    return one.engine.activation_bytes(*one.train.chunk(0, count))


def test_what_batch_norm_adds_by_hand():
    """Each keeps its input, the convolution's output (n·16·8·8 and n·16·4·4 float32), which
    nothing else does, since ReLU keeps what it returns; and mean and deviation of 16 channels.
    """
    inputs = 4 * N * 16 * (8 * 8 + 4 * 4)
    statistics = 4 * 2 * 16
    assert held("bn") - held("none") == inputs + 2 * statistics


def test_the_network_without_a_norm_by_hand():
    images, labels = 4 * N * 64, 8 * N
    relu1, places1, pooled1 = 4 * N * 16 * 64, 8 * N * 16 * 16, 4 * N * 16 * 16
    relu2, places2, pooled2 = 4 * N * 16 * 16, 8 * N * 16 * 4, 4 * N * 16 * 4
    log_softmax, total_weight = 4 * N * 4, 4
    blocks = relu1 + places1 + pooled1 + relu2 + places2 + pooled2
    assert held("none") == images + blocks + log_softmax + labels + total_weight


def test_looking_keeps_nothing_of_the_graph():
    """A node that is kept also keeps its stream, and no step could be captured on another."""
    one = training("bn")
    parameters = [*one.engine.model.parameters()]
    one.activation_bytes()

    def node(parameter):
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    for parameter in parameters:
        node(parameter).metadata["seen"] = True
    gc.collect()
    assert not any("seen" in node(parameter).metadata for parameter in parameters)


def test_the_peak_holds_nothing_of_the_network_before(tiny_config, monkeypatch):
    """The parametrizations of weight standardization are circles, which only a collector ends."""
    import gnbench.build

    networks, alive, build = [], [], gnbench.build.build_model

    def noted(config):
        networks.append(weakref.ref(next((model := build(config)).parameters())))
        return model

    monkeypatch.setattr("gnbench.build.build_model", noted)
    monkeypatch.setattr(
        "gnbench.train.devices.reset_peak_memory",
        lambda device: alive.append([one() is not None for one in networks]),
    )
    configs = [tiny_config("norm=gn8_ws"), tiny_config("norm=bn")]
    gc.collect()
    networks.clear()
    gc.disable()
    try:
        for config in configs:
            measure(config)
    finally:
        gc.enable()
    assert alive == [[True], [False, True]]


def test_in_bf16_weights_are_no_activations_either():
    """A convolution's bf16 weights are copies of the moment; its inputs are kept in bf16."""
    one, more = (held("none", count, precision="bf16") for count in (16, 32))
    assert more == 2 * one - 4 * 1  # the sum of the class weights of the loss stays


@pytest.mark.parametrize("norm", NORMS)
def test_activations_grow_by_the_same_bytes_an_image(norm):
    sizes = [held(norm, count) for count in (16, 32, 48)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_looking_changes_nothing():
    """Neither statistics nor the random numbers of dropout; gradients stay away, too."""
    looked, other = training("bn", dropout=0.5), training("bn", dropout=0.5)
    torch.manual_seed(1)
    looked.activation_bytes()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    for name, value in looked.engine.model.state_dict().items():
        torch.testing.assert_close(value, other.engine.model.state_dict()[name], rtol=0, atol=0)
    assert all(p.grad is None for p in looked.engine.model.parameters())


def test_a_run_records_the_bytes_of_one_forward_pass(tiny_config):
    whole = run(tiny_config("batch_size=8"))["activation_bytes"]
    parts = run(tiny_config("batch_size=4", "batch.accumulate=2"))["activation_bytes"]
    assert parts < 0.6 * whole
    assert measure(tiny_config("batch_size=8"))["activation_bytes"] == whole


def settings(outputs, **more):
    given = {
        "dataset": "fashion_mini",
        "model": "simplenetv2",
        "optimizer": "adamw",
        "norms": ["bn", "gn"],
        "batch_sizes": [2, 8],
        "precision": "fp32",
        "gibibytes": 1.0,
        "device": "cpu",
        "outputs": str(outputs),
    }
    return MemoryConfig.parse(given | more)


@pytest.mark.slow
def test_the_command_names_the_largest_batch_that_fits(tmp_path, capsys):
    table = memory(settings(tmp_path / "memory", gibibytes=0.0625))
    said = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "memory").iterdir()} == {"memory.csv", "memory.png"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "memory" / "memory.csv"), table)
    for norm, rows in table.groupby("norm"):
        largest = largest_batch(rows, 2**26)
        assert f"{norm} " in said
        assert str(largest) in said
        for size, fits in ((largest, True), (largest + 1, False)):
            one = measured(norm, size)
            assert (one <= 2**26) is fits, (norm, size)


def test_a_variant_has_a_line_of_its_own(tmp_path, capsys):
    table = memory(settings(tmp_path / "memory", norms=["gn", "gn8", "gn"], batch_sizes=[2]))
    assert table["norm"].tolist() == ["gn", "gn8"]
    assert "gn8 " in capsys.readouterr().out


def measured(norm, size):
    """What a batch of that size holds, by its own forward pass in place of a straight line."""
    from gnbench.check import compose

    row = measure(compose("dataset=fashion_mini", f"norm={norm}", f"batch_size={size}"))
    return row["activation_bytes"] + row["state_bytes"]


def test_the_state_by_hand(tiny_config):
    """AdamW: weights, gradients and two moments, and a step counter a tensor; BN's statistics."""
    config = tiny_config(*tiny.SMALL, "norm=bn")
    model = training("bn").engine.model  # only for the kinds of buffers
    assert {name.rpartition(".")[2] for name, _ in model.named_buffers()} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    convolutions = 16 * 9 + 16 + 5 * (16 * 16 * 9 + 16)
    norms, statistics = 6 * 2 * 16, 6 * (4 * 2 * 16 + 8)
    head = 16 * 16 + 16 + 16 * 4 + 4
    tensors = 6 * 4 + 4
    weights = convolutions + norms + head
    assert measure(config)["state_bytes"] == 4 * 4 * weights + statistics + 4 * tensors


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["norms=[nothing]"], "nothing"),
        (["batch_sizes=[0]"], "batch_sizes[0]=0: must be at least 1"),
        (["gibibytes=0"], "gibibytes=0: must be more than 0"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line(cli, tmp_path, more, words):
    done = cli(*more, module="gnbench.memory", check=2)
    [line] = done.stderr.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []
