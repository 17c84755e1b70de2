"""What an epoch did: a row of ``metrics.csv``. Readers of that file need no torch for it."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Row:
    """An epoch in numbers. Errors in percent, times in seconds.

    ``epoch`` counts from 1, ``step`` is the number of steps taken since the start, ``lr`` is that
    of the last one. Training loss and error are means over the images as they were trained on.
    ``images_per_second`` counts training only, ``seconds`` the evaluation too. Of replicas side by
    side both count what the others do meanwhile.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    test_wrong: int
    test_total: int
    images_per_second: float
    seconds: float


METRICS = tuple(field.name for field in fields(Row))  # the columns of metrics.csv
