"""Folders of pictures, made with Pillow."""

import copy
import functools

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from gnbench.composition import composed
from gnbench.config import RunConfig


def plain(path, colour, mode="RGB", size=(8, 8), **options):
    """Write a picture of one colour, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def tree(root, counts, halves=("",)):
    """Write ``counts`` (by class) pictures of different grays into every half; return the root."""
    gray = 0
    for half in halves:
        for name, count in counts.items():
            for number in range(count):
                plain(root / half / name / f"{number:03d}.png", (gray % 256,) * 3)
                gray += 1
    return root


@functools.cache
def _composed():  # Hydra is slow
    return composed("dataset=folder", "dataset.image=[3,8,8]", "batch_size=2", "device=cpu")


def config(root, *overrides):
    """Return a run on the pictures below ``root``, whose cache lies beside it; not yet checked."""
    settings = copy.deepcopy(_composed())
    given = (f"dataset.root={root}", f"dataset.cache={root.parent / 'cache'}")
    for override in OverridesParser.create().parse_overrides([*given, *overrides]):
        OmegaConf.update(settings, override.key_or_group, override.value())
    return RunConfig.parse(settings)
