"""Training steps that went through torch.compile, beside those that did not."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from gnbench.runs.runner import run
from tests.test_graphs import NORMS
from tests.test_training import assert_same_state, rows, start

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler on this machine"
)
# To compile takes so long that only these are tested unless GNBENCH_COMPILE is set.
CASES = [("bn", "simplenetv2"), ("gn", "simplenetv2")]
if os.environ.get("GNBENCH_COMPILE"):
    CASES = [(n, m) for n in NORMS for m in ("simplenet", "simplenetv2", "resnet18")]
    CASES.remove(("in", "resnet18"))  # of such small images it leaves one pixel


def gradients(training, images=8):
    inputs, labels = training.train.chunk(0, images)
    engine = training.engine
    engine._differentiate(inputs, labels)
    found = {name: p.grad.clone() for name, p in engine.model.named_parameters()}
    engine.optimizer.zero_grad()
    return found


@pytest.mark.parametrize(("norm", "model"), CASES)
def test_compiled_steps_are_the_eager_ones_to_rounding(tiny_config, norm, model):
    """Sums in another order: gradients within 1e-4 of the largest one of their tensor.

    After nine steps of SGD, whose steps are linear in the gradient, losses within 1 %: batch norm
    over the sixteen values that a ResNet leaves of a batch amplifies rounding most.
    """
    recipe = ["optimizer=sgd", "optimizer.lr=0.001", "epochs=3", "batch_size=16"]
    recipe += [] if model == "resnet18" else ["model.dropout=0"]  # whose draws are others
    configs = [
        tiny_config(f"norm={norm}", f"model={model}", *recipe, f"compile={compiled}")
        for compiled in ("false", "true")
    ]
    eager, compiled = map(start, configs)
    expected, found = gradients(eager), gradients(compiled)
    largest = max(one.abs().max() for one in expected.values())
    for (name, one), other in zip(expected.items(), found.values(), strict=True):
        # A bias in front of a norm has no gradient but the rounding of all others.
        bound = 1e-4 * one.abs().max() + 1e-6 * largest
        assert (one - other).abs().max() <= bound, name
    for one, other in zip(rows(eager), rows(compiled), strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=0.01)
        assert other.test_loss == pytest.approx(one.test_loss, rel=0.01)
    assert compiled.engine.name == "eager compiled"


def test_compiled_bf16_has_the_gradients_of_fp32_within_its_rounding(tiny_config):
    """With the bound of the eager path: tests/test_training.py."""
    plain = start(tiny_config("norm=gn"))
    compiled = start(tiny_config("norm=gn", "compile=true", "precision=bf16"))
    one, other = (
        torch.cat([g.flatten() for g in gradients(t, images=32).values()])
        for t in (plain, compiled)
    )
    assert compiled.engine.name == "eager compiled"
    assert F.cosine_similarity(one, other, dim=0) > 0.9
    assert (other.norm() / one.norm()).item() == pytest.approx(1, abs=0.1)


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_many_compiled_runs_in_one_process_are_all_compiled(tiny_config):
    """torch silently stops to compile after so many versions of the same code."""
    for seed in range(3):
        record = run(tiny_config("norm=gn", "epochs=1", "compile=true", f"seed={seed}"))
        assert (record["status"], record["engine"]) == ("completed", "eager compiled")


def test_without_a_compiler_the_run_goes_on_uncompiled(tiny_config, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    expected = rows(start(tiny_config("norm=bn")))
    training = start(tiny_config("norm=bn", "compile=true"))
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert rows(training) == expected
    assert training.engine.name == "eager"
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith("compile=true: ")
    assert "/nowhere/g++" in line
    assert line.endswith("; going on without")


class FailingBackwards(torch.autograd.Function):
    """What cannot be compiled backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no kernel for that")


def test_what_fails_backwards_leaves_no_trace(tiny_config, caplog):
    """After a forward pass that moved running statistics and drew from the generator."""
    config = tiny_config("norm=bn", "model.dropout=0.3")
    expected = start(config)
    rows(expected)
    training = start(config)
    model = training.engine.model
    training.engine._compiled = lambda inputs: FailingBackwards.apply(model(inputs))
    rows(training)
    assert training.engine.name == "eager"
    assert_same_state(training, expected)
    assert "compile=true: no kernel for that; going on without" in caplog.text
