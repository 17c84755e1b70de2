"""Training steps that went through torch.compile, beside those that did not."""

import os
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F

from gnbench.build import build_training, load_dataset
from gnbench.runs.runner import run
from gnbench.train.engine import _compile
from tests.trainings import NORMS, assert_same_weights, rows, training

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler on this machine"
)
# To compile takes so long that only these are tested unless GNBENCH_COMPILE is set.
CASES = [("bn", "small"), ("gn", "small")]
if os.environ.get("GNBENCH_COMPILE"):
    CASES = [(n, m) for n in NORMS for m in ("simplenet", "simplenetv2", "resnet18")]
    CASES.remove(("in", "resnet18"))  # of such small images it leaves one pixel


def gradients(training):
    """Return the gradients of a step on 16 images, with a learning rate too small to learn."""
    engine = training.engine
    engine.train_step(*training.train.chunk(0, 16), lr=1e-30)
    return {name: p.grad.clone() for name, p in engine.model.named_parameters()}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("norm", "model"), CASES)
def test_compiled_steps_are_the_eager_ones_to_rounding(tiny_config, norm, model):
    """Sums in another order: gradients within 1e-4 of the largest one of their tensor.

    After nine steps of SGD, whose steps are linear in the gradient, losses within 1 %: batch norm
    over the sixteen values that a ResNet leaves of a batch amplifies rounding most.
    """
    recipe = ["optimizer=sgd", "optimizer.lr=0.001", "epochs=3", "batch_size=16"]
    recipe += [] if model == "resnet18" else ["model.dropout=0"]  # whose draws are others
    recipe += ["model._target_=tests.trainings.small" if model == "small" else f"model={model}"]
    trained = []
    for compile in ("false", "true"):
        config = tiny_config(f"norm={norm}", *recipe, f"compile={compile}")
        one = build_training(config, load_dataset(config))
        trained.append((one, gradients(one), rows(one)))
    (_, expected, plain_rows), (compiled, found, compiled_rows) = trained
    assert compiled.engine.name == "eager compiled"
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias in front of a norm has no gradient but the rounding of all others.
        bound = 1e-4 * gradient.abs().max() + 1e-6 * largest
        assert (gradient - found[name]).abs().max() <= bound, name
    for one, other in zip(plain_rows, compiled_rows, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=0.01)
        assert other.test_loss == pytest.approx(one.test_loss, rel=0.01)


@pytest.mark.slow
@needs_compiler
def test_compiled_bf16_has_the_gradients_of_fp32_within_its_rounding():
    """With the bound of the eager path: tests/test_training.py."""
    plain = training("gn", optimizer="sgd")
    compiled = training("gn", optimizer="sgd", precision="bf16", compiled=True)
    one, other = (
        torch.cat([gradient.flatten() for gradient in gradients(t).values()])
        for t in (plain, compiled)
    )
    assert compiled.engine.name == "eager compiled"
    assert F.cosine_similarity(one, other, dim=0) > 0.9
    assert (other.norm() / one.norm()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@needs_compiler
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_many_compiled_runs_in_one_process_are_all_compiled(tiny_config):
    """torch silently stops to compile after so many versions of the same code."""
    settings = ("model._target_=tests.trainings.small", "norm=gn", "epochs=1", "compile=true")
    for seed in range(3):
        record = run(tiny_config(*settings, f"seed={seed}"))
        assert (record["status"], record["engine"]) == ("completed", "eager compiled")


@pytest.mark.slow
def test_without_a_compiler_the_run_goes_on_uncompiled(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    expected = rows(training())
    one = training(compiled=True)
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert rows(one) == expected
    assert one.engine.name == "eager"
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith("compile=true: ")
    assert line.endswith("; going on without")


def test_advice_to_compute_in_less_precision_ends_nothing():
    with warnings.catch_warnings(action="error"):
        _compile(torch.nn.Identity())
        warnings.warn("TensorFloat32 tensor cores for float32 are not enabled", stacklevel=1)


class FailingBackwards(torch.autograd.Function):
    """What cannot be compiled backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no kernel for that")


def test_what_fails_backwards_leaves_no_trace(caplog):
    """After a forward pass that moved running statistics and drew from the generator."""
    expected = training("bn", dropout=0.3)
    rows(expected)
    one = training("bn", dropout=0.3)
    model = one.engine.model
    one.engine._compiled = lambda inputs: FailingBackwards.apply(model(inputs))
    rows(one)
    assert one.engine.name == "eager"
    assert_same_weights(one, expected)
    assert "compile=true: no kernel for that; going on without" in caplog.text
