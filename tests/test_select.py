"""Settings chosen on validation images: by hand, and never by the test error."""

import pandas as pd
import pytest

from gnbench.aggregate.__main__ import write_studies
from gnbench.aggregate.select import select_on_validation
from gnbench.aggregate.statistics import differing
from gnbench.errors import ConfigError


def runs(*rows):
    """Return runs from norm, batch size, rate, seed, validation and test error."""
    names = ["norm", "batch_size", "optimizer.lr", "seed", "val_error", "test_error"]
    table = pd.DataFrame(rows, columns=names)
    table["run_id"] = [f"run{i}" for i in range(len(table))]
    return table.assign(dataset="d", model="m", status="completed")


GRID = runs(
    ("bn", 2, 0.1, 0, 30.0, 1.0),  # the better test error counts for nothing
    ("bn", 2, 0.1, 1, 32.0, 1.0),
    ("bn", 2, 0.2, 0, 29.0, 33.0),
    ("bn", 2, 0.2, 1, 31.0, 35.0),
    ("bn", 64, 0.1, 0, 20.0, 21.0),
    ("bn", 64, 0.2, 0, 25.0, 20.0),
    ("gn", 2, 0.1, 0, 26.0, 27.0),
    ("gn", 2, 0.2, 0, 26.0, 25.0),  # as good: the first stays
)


def test_the_lowest_median_validation_error_chooses():
    kept, chosen = select_on_validation(GRID, ["optimizer.lr"])
    assert kept["run_id"].tolist() == ["run2", "run3", "run4", "run6"]
    assert "optimizer.lr" not in kept
    assert chosen.to_numpy().tolist() == [
        ["d", "m", "bn", 2, 0.2, 30.0, 2],
        ["d", "m", "bn", 64, 0.1, 20.0, 2],
        ["d", "m", "gn", 2, 0.1, 26.0, 2],
    ]
    assert list(chosen)[-3:] == ["optimizer.lr", "val_error", "combinations"]


def test_settings_that_differ_besides_have_a_choice_of_their_own():
    decayed = GRID.assign(run_id=GRID["run_id"] + "x", val_error=-GRID["val_error"])
    table = pd.concat([GRID.assign(decay=0.0), decayed.assign(decay=0.1)], ignore_index=True)
    kept, chosen = select_on_validation(table, ["optimizer.lr"])
    assert len(chosen) == 6
    assert set(kept.loc[kept["decay"] == 0.1, "run_id"]) == {"run0x", "run1x", "run5x", "run6x"}


def test_runs_without_a_result_are_not_chosen():
    kept, _ = select_on_validation(
        GRID.assign(status=["failed"] * 4 + ["completed"] * 4), ["optimizer.lr"]
    )
    assert set(kept["run_id"]) == {"run4", "run6"}


def test_rates_that_diverge_or_lack_seeds_come_last():
    table = runs(
        ("bn", 2, 0.1, 0, 30.0, 1.0),
        ("bn", 2, 0.1, 1, 30.0, 1.0),
        ("bn", 2, 0.2, 0, 20.0, 1.0),
        ("bn", 2, 0.2, 1, 20.0, 1.0),
        ("bn", 2, 0.3, 0, 10.0, 1.0),  # one seed of two
    )
    table.loc[3, "status"] = "diverged"
    kept, _ = select_on_validation(table, ["optimizer.lr"])
    assert kept["run_id"].tolist() == ["run0", "run1"]


def test_a_component_that_is_chosen_brings_its_settings():
    names = GRID["optimizer.lr"].map({0.1: "adamw", 0.2: "sgd"})
    kept, _ = select_on_validation(GRID.assign(**{"optimizer.name": names}), ["optimizer.name"])
    assert differing(kept) == []
    assert not [column for column in kept if column.startswith("optimizer.")]


@pytest.mark.parametrize(
    ("table", "names", "words"),
    [
        (GRID, ["seed"], "select=seed: no such setting"),
        (GRID, ["norm"], "select=norm: no such setting"),
        (GRID, ["val_error"], "select=val_error: no such setting"),
        (GRID, ["optimizer.rate"], "no such setting; what differs is optimizer.lr"),
        (GRID.assign(val_error=float("nan")), ["optimizer.lr"], "run0 has no validation error"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(table, names, words):
    with pytest.raises(ConfigError, match=words):
        select_on_validation(table, names)


@pytest.mark.slow
def test_a_study_is_drawn_by_what_was_chosen(tiny_config, tmp_path, capsys):
    from gnbench.runs.runner import run

    for rate in ("0.0001", "0.01"):
        for size in ("8", "16"):
            small = ("model.channels=[16,16,16]", "model.hidden=16", "dataset.validation_size=8")
            run(tiny_config(*small, f"batch_size={size}", f"optimizer.lr={rate}"))
    write_studies(tmp_path / "outputs", select="optimizer.lr")
    said = capsys.readouterr().out
    folder = tmp_path / "outputs" / "default"
    assert len(pd.read_csv(folder / "results.csv")) == 4
    assert len(pd.read_csv(folder / "selected.csv")) == 2
    assert pd.read_csv(folder / "summary.csv")["n_seeds"].tolist() == [1, 1]
    assert "optimizer.lr: of each cell the value with the lowest validation error" in said
    with pytest.raises(ConfigError, match="select=nothing: no such setting"):
        write_studies(tmp_path / "outputs", "default", select="nothing")
    # Of all studies those without a validation are passed over, and that is said.
    run(tiny_config("study=other"))
    write_studies(tmp_path / "outputs", select="optimizer.lr")
    said = capsys.readouterr().out
    assert "nothing was selected: select=optimizer.lr: tiny-" in said
    assert "optimizer.lr: of each cell" in said
