"""Overrides → the composed configuration of a run, as the command line composes it; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from gnbench.config import conf_dir
from gnbench.errors import ConfigError, one_line


def composed(*overrides: str, config_dirs: Sequence[str] = ()) -> DictConfig:
    """Compose a run, with ``hydra``, what is Hydra's own; nothing is checked yet.

    Raises:
        ConfigError: for a key that does not exist.
    """
    urls = (d if "://" in d else f"file://{Path(d).absolute()}" for d in config_dirs)
    places = ",".join(f"'{url}'" for url in urls)
    searched = [f"hydra.searchpath=[{places}]"] if config_dirs else []
    surrounding = GlobalHydra.instance()
    application, surrounding.hydra = surrounding.hydra, None  # of the caller, if it is one
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra_compose("config", [*overrides, *searched], return_hydra_config=True)
    except Exception as error:
        raise ConfigError(one_line(error)) from error
    finally:
        surrounding.hydra = application
        GlobalHydra.set_instance(surrounding)  # initialize_config_dir has left a copy
