"""What the commands share: one clear line for bad input, and exit codes that scripts can use."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from gnbench.errors import (
    AT_WORK,
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    ConfigError,
    LockedError,
    one_line,
)
from gnbench.train import distributed

# Flags of Hydra's that take the next word for their value.
VALUED = ["--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"]
VALUED += ["--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun"]

_composed = False
_wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"


def composed() -> None:
    """Note that the command line was composed and checked: what fails from now on is not input."""
    global _composed
    _composed = True


def is_config_fault(error: BaseException) -> bool:
    """Tell whether ``error`` is about the configuration, whoever raised it."""
    return isinstance(error, ConfigError | OmegaConfBaseException | HydraException)


def is_explained(error: BaseException) -> bool:
    """Tell a fault that its message explains (bad input, no data, full disk) from a bug."""
    of_cluster = type(error).__module__.startswith("submitit.")  # such as what sbatch refuses
    return is_config_fault(error) or isinstance(error, OSError) or of_cluster


def with_names(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a command line in which the first bare words are settings: ``x`` as ``a="x"``."""
    written, left = [], list(names)
    for before, word in zip(["", *arguments], arguments, strict=False):
        bare = "=" not in word and not word.startswith("-") and before not in VALUED
        if bare and left:
            # Hydra's grammar: a backslash counts where a quote follows; OmegaConf's: \${ is no ${.
            text = re.sub(r'(\\*)("|$)', r"\1\1\2", word).replace('"', '\\"')
            word = f'{left.pop(0)}="{text}"'.replace("${", r"\${")
        written.append(word)
    return written


def report(error: BaseException) -> int:
    """Print what is wrong on one line of stderr, or a traceback for a bug; return the exit code."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (or Python complains at exit)
        return FAILED
    bad_input = is_config_fault(error) or not _composed
    if _wants_traceback or not (bad_input or is_explained(error)):
        traceback.print_exception(error)
    elif distributed.rank() == 0 or not bad_input:  # all processes of a run found the same fault
        print(f"gnbench: {one_line(error)}", file=sys.stderr)
    if isinstance(error, LockedError):
        return AT_WORK
    return BAD_INPUT if bad_input else FAILED


def call(app: Callable[[], None]) -> int:
    """Call a Hydra application, or what may end as one does, and return the exit code.

    HYDRA_FULL_ERROR=1 shows tracebacks. A Hydra application itself exits by `report`: what it
    raises Hydra would announce in its own words.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise, not print over several lines
    for stream in (sys.stdout, sys.stderr):  # a console that has no γ or – shows a question mark
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does: there lie the user's own parts
    try:
        app()
    except KeyboardInterrupt as interrupted:
        return int(getattr(interrupted, "exit_code", INTERRUPTED))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else DONE
    except Exception as error:
        return report(error)
    return DONE
