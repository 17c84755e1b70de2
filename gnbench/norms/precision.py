"""Where the arithmetic of a norm is not to be trusted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST_BATCH_MEAN = 50.0  # standard deviations
LARGEST_INSTANCE_MEAN = 3000.0  # likewise


def imprecise_statistics(model: nn.Module, images: Tensor) -> str | None:
    """Name a norm of ``model`` whose mean is too large beside its deviation, with the ratio.

    On a CPU torch's batch norm adds up the values of a channel one by one and computes
    x·scale + shift, so that the error grows with the ratio and with the values: with 131,072 of a
    channel, channels last, it is 1e-3 at a ratio of 100 and 0.2 at 500. Its ratio is that of the
    running statistics. Instance norm is right to 1e-3 up to several thousand; its ratio is that of
    a few ``images`` (N,C,H,W), which change nothing.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            assert layer.running_var is not None
            ratio = (layer.running_mean.abs() / (layer.running_var + layer.eps).sqrt()).max().item()
            if ratio > LARGEST_BATCH_MEAN:
                return f"{name}: a mean of {ratio:.0f} standard deviations"
    ratios: dict[str, float] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.InstanceNorm2d):

            def look(
                module: nn.InstanceNorm2d, inputs: tuple[Tensor], _: object, name: str = name
            ) -> None:
                variance, mean = torch.var_mean(inputs[0].double(), (2, 3), correction=0)
                ratios[name] = (mean.abs() / (variance + module.eps).sqrt()).max().item()

            hooks.append(layer.register_forward_hook(look))
    if hooks:
        training = model.training
        with torch.inference_mode():
            model.eval()(images)
        model.train(training)
    for hook in hooks:
        hook.remove()
    for name, ratio in ratios.items():
        if ratio > LARGEST_INSTANCE_MEAN:
            return f"{name}: a mean of {ratio:.0f} standard deviations"
    return None
