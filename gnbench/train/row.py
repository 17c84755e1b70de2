"""What an epoch did: a row of ``metrics.csv``. Readers of that file need no torch for it."""

from dataclasses import dataclass, fields

LAST_EPOCHS = 5  # the reported error is the median of those of the last five (Wu & He 2018, 4.1)


@dataclass(frozen=True)
class Row:
    """An epoch in numbers. Errors in percent, times in seconds.

    ``epoch`` counts from 1, ``step`` is the number of steps taken since the start, ``lr`` is that
    of the last one. Training loss and error are means over the images as they were trained on.
    ``images_per_second`` counts training only, ``seconds`` the evaluation too. Of replicas side by
    side both count what the others do meanwhile. What was not evaluated is None; the columns of the
    validation are there only if there is one.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    test_loss: float | None
    test_error: float | None
    test_wrong: int | None
    test_total: int | None
    images_per_second: float
    seconds: float
    val_loss: float | None = None
    val_error: float | None = None
    val_wrong: int | None = None
    val_total: int | None = None


COLUMNS = tuple(field.name for field in fields(Row))
METRICS = tuple(name for name in COLUMNS if not name.startswith("val_"))  # of every metrics.csv
VALIDATION = COLUMNS[len(METRICS) :]  # of one with a validation
