"""``python -m gnbench.memory``: what a training step holds, by norm and batch size."""

from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import hydra
import pandas as pd
from omegaconf import DictConfig
from pydantic import Field
from tabulate import tabulate
from tqdm import tqdm

from gnbench import cli, files
from gnbench.config import Count, Device, Folder, Positive, Precision, RunConfig, Settings, conf_dir

COLUMNS = ["dataset", "model", "norm", "batch_size", "precision", "optimizer", "device"]
COLUMNS += ["activation_bytes", "state_bytes", "peak_bytes"]
MIB, GIB = 2**20, 2**30


class MemoryConfig(Settings):
    """What ``conf/memory.yaml`` holds."""

    dataset: str
    model: str
    optimizer: str
    norms: Annotated[list[str], Field(min_length=1)]
    batch_sizes: Annotated[list[Count], Field(min_length=1)]
    precision: Precision
    gibibytes: Positive
    device: Device
    outputs: Folder


def measure(run: RunConfig) -> dict[str, Any]:
    """Return a row of ``memory.csv`` for the training step of a run, taken once on noise.

    ``activation_bytes`` as in ``run.json``; ``state_bytes`` of weights, buffers, gradients and
    moments; ``peak_bytes`` is what a GPU had allocated at most, NaN elsewhere.
    """
    import torch

    from gnbench.build import build_model, build_optimizer, make_deterministic
    from gnbench.train.devices import choose_device, peak_memory_bytes, reset_peak_memory
    from gnbench.train.engine import EagerEngine
    from gnbench.train.layout import place

    device = choose_device(run.device)
    if device.type == "cuda":
        make_deterministic(run.precision)  # as in a training
    torch.manual_seed(run.seed)
    model = build_model(run).train()
    channels_last = place(model, device)
    optimizer = build_optimizer(run, model)
    engine = EagerEngine(model, optimizer, run.optimizer.lr, lambda _: 1.0, run.precision, device)
    channels, height, width = run.dataset.image
    # Noise, since a norm may treat constant images otherwise; in memory as in a training.
    inputs = torch.randn(run.batch_size, height, width, channels).to(device).permute(0, 3, 1, 2)
    if not channels_last:
        inputs = inputs.contiguous()
    labels = torch.zeros(run.batch_size, dtype=torch.int64, device=device)
    activations = engine.activation_bytes(inputs, labels)
    gc.collect()  # the network measured before: parametrizations, as of gn_ws, are circles
    reset_peak_memory(device)
    engine.train_step(inputs, labels, run.optimizer.lr)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), *moments]
    held = {t.data_ptr(): t for t in tensors if isinstance(t, torch.Tensor)}
    return {
        "dataset": run.dataset.name,
        "model": run.model.name,
        "norm": run.norm.name,
        "batch_size": run.batch_size,
        "precision": run.precision,
        "optimizer": run.optimizer.name,
        "device": device.type,
        "activation_bytes": activations,
        "state_bytes": sum(t.numel() * t.element_size() for t in held.values()),
        "peak_bytes": peak_memory_bytes(device) if device.type == "cuda" else math.nan,
    }


def largest_batch(rows: pd.DataFrame, available: float) -> int:
    """Return the largest batch of a norm whose state and activations fit into ``available`` bytes.

    Activations grow by the same number of bytes an image, which the rows tell.
    """
    rows = rows.sort_values("batch_size")
    size, held = int(rows["batch_size"].iloc[-1]), int(rows["activation_bytes"].iloc[-1])
    less, held_by_less = (
        (0, 0)
        if len(rows) == 1
        else (int(rows["batch_size"].iloc[0]), int(rows["activation_bytes"].iloc[0]))
    )
    an_image = (held - held_by_less) / (size - less)
    besides = held - size * an_image
    state = int(rows["state_bytes"].iloc[-1])
    return max(0, math.floor((available - state - besides) / an_image))


def check(config: MemoryConfig, folders: Sequence[str] = ()) -> list[tuple[str, RunConfig]]:
    """Return the runs whose steps are measured, a norm at a time, with the norm as it was typed.

    Raises:
        ConfigError: for a setting that cannot work.
    """
    from gnbench.check import compose

    found = []
    for norm, size in itertools.product(
        dict.fromkeys(config.norms), sorted(set(config.batch_sizes))
    ):
        run = compose(
            f"dataset={config.dataset}",
            f"model={config.model}",
            f"optimizer={config.optimizer}",
            f"norm={norm}",
            f"batch_size={size}",
            f"precision={config.precision}",
            f"device={config.device}",
            config_dirs=folders,
        )
        found.append((norm, run))
    return found


def memory(config: MemoryConfig, folders: Sequence[str] = ()) -> pd.DataFrame:
    """Measure all steps; print a table, write ``memory.csv`` and ``memory.png``.

    Raises:
        ConfigError: for a setting that cannot work, before anything is measured or written.
        WriteError: if the results cannot be written.
    """
    runs = check(config, folders)
    cli.composed()
    bar = tqdm(runs, "memory", disable=None, leave=False)
    rows = [measure(run) | {"norm": norm} for norm, run in bar]  # gn8 is a gn otherwise
    table = pd.DataFrame(rows, columns=COLUMNS)
    folder = Path(config.outputs)
    files.make_folder(folder)
    files.replace(folder / "memory.csv", table.to_csv(index=False).encode())
    from gnbench.aggregate.figure import draw_memory, save

    save(draw_memory(table), folder / "memory.png")
    print(_described(table, config.gibibytes))
    print(f"\nwritten to {folder}")
    return table


def _described(table: pd.DataFrame, gibibytes: float) -> str:
    sizes = sorted(table["batch_size"].unique())
    gpu = table["peak_bytes"].notna().all()
    lines = []
    for norm, rows in table.groupby("norm", sort=False):
        by_size = rows.set_index("batch_size")
        peak = [f"{by_size['peak_bytes'].iloc[-1] / MIB:.1f}"] if gpu else []
        lines.append(
            [
                norm,
                *(f"{by_size['activation_bytes'][size] / MIB:.2f}" for size in sizes),
                f"{by_size['state_bytes'].iloc[-1] / MIB:.1f}",
                *peak,
                largest_batch(rows, gibibytes * GIB),
            ]
        )
    last = [f"peak at {sizes[-1]}"] if gpu else []
    heads = ["batch size", *map(str, sizes), "state", *last, f"largest in {gibibytes:g} GiB"]
    first = table.iloc[0]
    title = "{dataset}, {model}, {precision}, {optimizer}, {device}: ".format(**first)
    drawn = tabulate(lines, heads, "plain", disable_numparse=True, colalign=("left",))
    return f"{title}MiB of activations held for the backward pass\n{drawn}"


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="memory")
def app(config: DictConfig) -> None:
    """Measure what ``conf/memory.yaml`` says."""
    from gnbench.check import config_dirs

    try:
        memory(MemoryConfig.parse(config), config_dirs())
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
