"""``python -m gnbench.show``: samples of a dataset with their labels, and a network layer by layer.

Figures 1 and 2 of the report, of any dataset and any network.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field
from tabulate import tabulate

from gnbench import cli, files
from gnbench.config import Folder, RunConfig, Settings, conf_dir

if TYPE_CHECKING:  # not for --help
    from matplotlib.figure import Figure

    from gnbench.show.layers import Layer

OF_NETWORK = ("model", "norm")
OF_RUN = (*OF_NETWORK, "dataset", "batch_size")
HEADS = ("layer", "what", "output", "parameters")


class ShowConfig(Settings):
    """What ``conf/show.yaml`` holds besides a network and a dataset."""

    samples: Annotated[int, Field(ge=1, le=100)]
    outputs: Folder


def show_dataset(run: RunConfig, settings: ShowConfig) -> None:
    """Say what the dataset of a run is, and draw some of its training images.

    Raises:
        DataError: if no source has it.
        WriteError: if the figure cannot be written.
    """
    from gnbench.build import load_dataset
    from gnbench.datasets.names import class_names
    from gnbench.show.draw import draw_samples

    dataset = load_dataset(run)
    names = class_names(run.dataset, dataset)
    labels = dataset.train_labels.tolist()
    chosen = choose(labels, settings.samples)
    images = [dataset.train_images[i].numpy() for i in chosen]
    title = [names[labels[i]] for i in chosen]
    sizes = f"{len(labels):,} training and {len(dataset.test_labels):,} test images"
    shape = "×".join(map(str, run.dataset.image))
    print(f"{run.dataset.name}: {sizes} of {shape}, {len(names)} classes: {', '.join(names)}\n")
    rows = [[i, labels[i], names[labels[i]]] for i in chosen]
    print(tabulate(rows, ["training image", "label", "class"], "plain", disable_numparse=True))
    _save(draw_samples(images, title), Path(settings.outputs), run.dataset.name)


def choose(labels: Sequence[int], count: int) -> list[int]:
    """Return the first positions of different classes; after all classes, again of all."""
    chosen: list[int] = []
    while len(chosen) < min(count, len(labels)):
        seen: set[int] = set()
        taken = set(chosen)
        for position, label in enumerate(labels):
            if position not in taken and label not in seen and len(chosen) < count:
                seen.add(label)
                chosen.append(position)
    return chosen


def show_network(run: RunConfig, settings: ShowConfig) -> None:
    """Print the layers of the network of a run, draw them, and write them as CSV.

    Raises:
        WriteError: if that cannot be written.
    """
    from gnbench.show.draw import draw_network
    from gnbench.show.layers import layers

    found = layers(run)
    total = sum(layer.parameters for layer in found)
    shape = "×".join(map(str, run.dataset.image))
    names = f"{run.model.name}, {run.norm.name}"
    title = f"{names}, {run.dataset.name} {shape}: {total:,} parameters"
    print(f"{title}\n{table(found)}")
    folder = Path(settings.outputs)
    name = f"{run.model.name}-{run.norm.name}-{run.dataset.name}"
    _save(draw_network(found, run.dataset.image, title), folder, name)
    text = io.StringIO()
    rows = [[one.name, one.text, _shape(one), one.parameters] for one in found]
    csv.writer(text, lineterminator="\n").writerows([HEADS, *rows])
    files.replace(folder / f"{name}.csv", text.getvalue().encode())


def table(found: Sequence[Layer]) -> str:
    """Return the table of a network: a row a layer."""
    rows = [[one.name, one.text, _shape(one), f"{one.parameters:,}"] for one in found]
    aligned = ("left", "left", "right", "right")
    return tabulate(rows, HEADS, "plain", disable_numparse=True, colalign=aligned)


def _shape(layer: Layer) -> str:
    return "×".join(map(str, layer.output))


def _save(figure: Figure, folder: Path, name: str) -> None:
    from gnbench.aggregate.figure import save

    files.make_folder(folder)
    for suffix in ("png", "svg"):
        save(figure, folder / f"{name}.{suffix}")
    print(f"\ndrawn in {folder / name}.png and .svg\n")


def _part(override: str) -> str:
    """Return the first part of the key of an override."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="show")
def app(config: DictConfig) -> None:
    """Show what ``conf/show.yaml`` says, the part that the command line names, else both."""
    try:
        from gnbench.check import compose, config_dirs  # imports torch: not for --help

        settings = ShowConfig.parse({key: config[key] for key in ShowConfig.model_fields})
        chosen = [o for o in HydraConfig.get().overrides.task if _part(o) in OF_RUN]
        run = compose(*chosen, config_dirs=config_dirs())
        cli.composed()
        parts = {_part(override) for override in chosen}
        network, dataset = bool(parts & {*OF_NETWORK}), "dataset" in parts
        if network or not dataset:  # first: it needs no data
            show_network(run, settings)
        if dataset or not network:
            show_dataset(run, settings)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
