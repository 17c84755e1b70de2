"""The loop that a person would write: torchvision's transforms, DataLoader, eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from multiprocessing import get_all_start_methods
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from gnbench.build import build_model, drops_last, load_dataset, make_deterministic
from gnbench.config import RunConfig
from gnbench.datasets import Dataset, normalization
from gnbench.train.devices import choose_device, set_float32_products

DATA_WORKERS = 2  # but no more than there are threads
PREFETCH = 2  # batches that each of them holds ready


class PlainLoop:
    """A training of ``config`` without anything of gnbench but the network and the dataset.

    On a GPU in the same precision as an engine, and if ``deterministic`` by such kernels, too.
    """

    def __init__(self, config: RunConfig, deterministic: bool = False) -> None:
        self.device = choose_device(config.device)
        if self.device.type == "cuda":
            (make_deterministic if deterministic else set_float32_products)(config.precision)
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(self.device)
        factory = instantiate(config.optimizer.arguments(), _convert_="all")
        self.optimizer: torch.optim.Optimizer = factory(self.model.parameters())
        self.bf16 = config.precision == "bf16"
        loader = DataLoader(
            _Pictures(load_dataset(config), config),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=drops_last(config),
            num_workers=min(DATA_WORKERS, torch.get_num_threads()),
            prefetch_factor=PREFETCH,
            persistent_workers=True,
            # What a program of its own has on Linux; here the default is that of our parent.
            multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
            pin_memory=self.device.type == "cuda",
        )
        steps = config.epochs * len(loader)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches: Iterator[list[Tensor]] = chain.from_iterable(repeat(loader))
        self.loss_sum, self.wrong = 0.0, 0

    def take(self, count: int) -> int:
        """Take ``count`` optimizer steps."""
        for _ in range(count):
            images, labels = next(self.batches)
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
            self.loss_sum += loss.item() * len(labels)
            self.wrong += int((logits.argmax(dim=1) != labels).sum().item())
        return count

    def wait(self) -> None:
        """Need nothing: every step has waited for its loss."""

    def save(self, path: str | Path) -> None:
        """Write weights and moments."""
        moments = self.optimizer.state_dict()["state"]
        torch.save({"model": self.model.state_dict(), "moments": moments}, path)

    def load(self, path: str | Path) -> None:
        """Continue with weights and moments that a plain loop saved."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": saved["moments"]})


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images and labels as torchvision's own datasets give them: PIL images, then transforms."""

    def __init__(self, dataset: Dataset, config: RunConfig) -> None:
        images = dataset.train_images.numpy()
        self.images = images[..., 0] if images.shape[-1] == 1 else images  # PIL's form of gray
        self.labels = dataset.train_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*normalization(dataset, config.dataset)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]
