"""The learning rate of every step, as a factor that depends on the step alone.

Each schedule is called with the length of the training and returns a function from the step
(0, 1, …) to the factor on the base learning rate. Having no state, it needs no resuming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def cosine(
    total_steps: int, steps_per_epoch: int, per: str = "step", warmup_epochs: float = 0
) -> Schedule:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, equation 5, without restarts).

    ``per="epoch"`` holds the factor through each epoch, as the report's code does.

    Raises:
        ValueError: if ``per`` is neither "step" nor "epoch", or the warm-up is no part of the
            training.
    """
    if per not in ("step", "epoch"):
        raise ValueError(f"per={per}: choose step or epoch")
    stride = steps_per_epoch if per == "epoch" else 1

    def factor(step: int, start: int) -> float:
        held = max(step // stride * stride, start)
        return 0.5 * (1 + math.cos(math.pi * (held - start) / max(1, total_steps - start)))

    return _after_warmup(factor, total_steps, steps_per_epoch, warmup_epochs)


def constant(total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0) -> Schedule:
    """Return the factor 1 throughout. Errors: see `cosine`."""
    return _after_warmup(lambda step, start: 1.0, total_steps, steps_per_epoch, warmup_epochs)


def multistep(
    total_steps: int,
    steps_per_epoch: int,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_epochs: float = 0,
) -> Schedule:
    """Multiply by ``gamma`` at each milestone, given as a fraction of the training in (0, 1).

    Raises:
        ValueError: if a milestone is not a fraction, or the warm-up is no part of the training.
    """
    if any(not 0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"milestones={list(milestones)}: give fractions of the training in (0, 1)")
    steps = [round(milestone * total_steps) for milestone in milestones]

    def factor(step: int, start: int) -> float:
        return gamma ** sum(step >= milestone for milestone in steps)

    return _after_warmup(factor, total_steps, steps_per_epoch, warmup_epochs)


def _after_warmup(
    factor: Callable[[int, int], float],
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float,
) -> Schedule:
    """Put a linear ramp before ``factor(step, end of ramp)`` (Goyal et al. 2017, 2.2)."""
    warmup = round(warmup_epochs * steps_per_epoch)
    if not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup_epochs={warmup_epochs}: must be less than the "
            f"{total_steps / steps_per_epoch:.4g} epochs of the training"
        )

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return factor(step, warmup)

    return schedule
