"""What can go wrong, and what a command says and returns then."""

from __future__ import annotations

import signal

from hydra.errors import HydraException, OverrideParseException

EXTRAS = (
    "timm",
    "tensorboard",
    "mlflow",
    "wandb",
)  # packages that an extra of the same name installs

# Exit codes. A signal ends a command with 128 + its number.
DONE, FAILED, BAD_INPUT, AT_WORK, INTERRUPTED = 0, 1, 2, 3, 130


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what to do."""


class DataError(OSError):
    """No source has the dataset; the message lists what was tried and what to do by hand."""


class DamagedError(ValueError):
    """A file that cannot be read, or is not what it should be."""


class WriteError(OSError):
    """A file that cannot be written; the message says which, why, and what to do."""


class BusyError(OSError):
    """Others hold a device or its memory, so that it takes no work now; the message says which."""


class LockedError(OSError):
    """Another process is at work on this run; the message says which."""


class TakenOverError(LockedError):
    """Another process has taken this run over meanwhile; the message says which."""


class RecordingError(RuntimeError):
    """Work cannot be replayed as a graph; the message says why. It has not been done."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, which can be resumed. ``exit_code`` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """Let a worker hand it to the command that launched it."""
        return type(self), (self.exit_code - 128,)


def one_line(error: BaseException) -> str:
    """Put into one line what an exception says, that of Hydra or OmegaConf with its cause."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in EXTRAS:
            return f"{package} is not installed: pip install 'gnbench[{package}]'"
    texts = [str(error).strip() or type(error).__name__]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        texts.append(str(error.__cause__))
    if isinstance(error, ConfigError):
        return texts[0]
    lines = []
    for text in texts:
        message = text.partition("Config search path:")[0]
        lines += [line.strip() for line in message.splitlines() if line.strip()]
    noise = ("full_key:", "object_type=", "reference_type=", "To append to your config use")
    kept = [line.removesuffix(".") for line in lines if not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept)).replace(":;", ":")


def _unreadable(override: str) -> str:
    """Say how to write a setting that Hydra's grammar refuses, on one line whatever is in it."""
    override = "".join(c if c.isprintable() else repr(c)[1:-1] for c in override)
    key, assigned, value = override.partition("=")
    if not assigned:
        return f"{override}: this is no setting: write KEY=VALUE"
    return (
        f"{override}: Hydra cannot read this value; put it in quotes, and all in quotes of the "
        f"shell: '{key}=\"{value}\"'"
    )
