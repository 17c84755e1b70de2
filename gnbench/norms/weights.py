"""Weight standardization, on the convolutions of any network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class StandardizedWeight(nn.Module):
    """Weight standardization (Qiao et al. 2019, section 3): each filter to mean 0, deviation 1."""

    EPS = 1e-6  # of the variance, as in timm

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize each filter of ``weight`` (C_out, …)."""
        over = tuple(range(1, weight.ndim))
        variance, mean = torch.var_mean(weight, over, correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt(variance + self.EPS)


def standardize_weights(model: nn.Module) -> None:
    """Have every convolution of ``model`` use its standardized weights, in place.

    What is learnt stays the plain weights (``torch.nn.utils.parametrize``).

    Raises:
        ValueError: if there is no convolution, or one whose filters hold a single weight.
    """
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ValueError("standardize_weights=true: the network has no Conv2d")
    for name, layer in convolutions.items():
        if layer.weight[0].numel() == 1:
            raise ValueError(
                f"standardize_weights=true: the filters of {name} hold a single weight"
            )
        parametrize.register_parametrization(layer, "weight", StandardizedWeight())
