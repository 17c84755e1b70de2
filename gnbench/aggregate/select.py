"""Settings chosen on validation images, so that the test images are looked at once."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gnbench.aggregate.statistics import differing
from gnbench.aggregate.study import CELL
from gnbench.errors import ConfigError
from gnbench.identity import GROUPS
from gnbench.runs.directory import FINISHED

TOP_LEVEL = ("epochs", "precision")  # settings that stand in no group


def select_on_validation(
    runs: pd.DataFrame, names: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep of ``runs`` in every cell those whose values of ``names`` validated best.

    The validation error of a combination of values is the median over its seeds; of equal ones the
    first is taken. One that diverged with a seed, or has fewer seeds than another, comes after all
    others. Returns the finished runs that are kept, without the columns ``names``, and what
    was chosen: a row a cell, with ``val_error`` and the number of combinations it was the best of.

    Raises:
        ConfigError: if there is no such setting, or a run has no validation error.
    """
    runs = runs[runs["status"].isin(FINISHED)]
    for name in names:
        group, dot, _ = name.partition(".")
        component = group in GROUPS and dot and name in runs.columns
        if not component and name not in TOP_LEVEL:
            known = ", ".join(differing(runs)) or "nothing"
            raise ConfigError(f"select={name}: no such setting; what differs is {known}")
    lacking = runs[runs["val_error"].isna()]
    if not lacking.empty:
        raise ConfigError(
            f"select={','.join(names)}: {lacking['run_id'].iloc[0]} has no validation error; train "
            "with dataset.validation_size=N"
        )
    cells = [*CELL, *(name for name in differing(runs) if name not in names)]
    kept, chosen = [], []
    for _, own in runs.groupby(cells, dropna=False):
        combinations = own.groupby(list(names), dropna=False, sort=False)
        ranks = pd.DataFrame(
            {
                "diverged": combinations["status"].transform(lambda s: (s == "diverged").any()),
                "seeds": -combinations["seed"].transform("size"),
                "val_error": combinations["val_error"].transform("median"),
            }
        )
        numbers = combinations.ngroup().to_numpy()
        first = (
            ranks.reset_index(drop=True).sort_values(["diverged", "seeds", "val_error"]).index[0]
        )
        best = own[numbers == numbers[first]]
        kept.append(best)
        values = best.iloc[0][[*cells, *names]].to_dict()
        validated = ranks["val_error"].iloc[first]
        chosen.append({**values, "val_error": validated, "combinations": combinations.ngroups})
    table = pd.concat(kept) if kept else runs
    columns = [*cells, *names, "val_error", "combinations"]
    # A component that was chosen brings all its settings.
    dropped = [
        column
        for column in table.columns
        if column in names
        or any(n.endswith(".name") and column.startswith(n.removesuffix("name")) for n in names)
    ]
    return table.drop(columns=dropped).sort_index(), pd.DataFrame(chosen, columns=columns)
