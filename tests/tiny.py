"""A dataset of 48 + 20 images of 8×8 pixels, for tests in which the data do not matter."""

import torch

from gnbench.datasets import Dataset
from gnbench.models import SimpleNetV2

OVERRIDES = (
    "dataset=fashion_mini",
    "dataset._target_=tests.tiny.dataset",
    "dataset.name=tiny",
    "dataset.image=[1,8,8]",
    "dataset.classes=4",
    "dataset.train_images=48",
    "dataset.test_images=20",
    "batch_size=8",
    "epochs=2",
    "device=cpu",
    "progress=lines",
)

# With 8,000 weights in place of 300,000: for tests that train for long or save often.
SMALL = ("model.channels=[16,16,16]", "model.hidden=16")

COLOURS = (
    "dataset=cifar10",
    "dataset._target_=tests.tiny.colours",
    "dataset.image=[3,8,8]",
    *OVERRIDES[4:],
)


def dataset(root=None, channels=1):
    generator = torch.Generator().manual_seed(0)

    def images(count):
        shape = (count, 8, 8, channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return Dataset(images(48), torch.arange(48) % 4, images(20), torch.arange(20) % 4)


def colours(root=None):
    return dataset(channels=3)


class Greedy(SimpleNetV2):
    """A network that wants 16 GiB."""

    def forward(self, x):
        return super().forward(x) + torch.ones(2**32, device=x.device).mean()
