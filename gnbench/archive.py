"""``python -m gnbench.archive``: a study in one ``.zip``, to be shared."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from gnbench import cli, files, zipped
from gnbench.config import Folder, Settings, conf_dir
from gnbench.config import Study as StudyName
from gnbench.errors import ConfigError
from gnbench.identity import LATER_IN_EXECUTION, all_settings, run_id
from gnbench.runs.directory import read_record
from gnbench.runs.lock import read_heartbeat
from gnbench.sweep.plan import find_studies, plan_of, read_plans

if TYPE_CHECKING:  # pandas is not for --help
    from gnbench.aggregate.study import Study

OF_A_RUN = ("metrics.csv", "correct.npy", "as_published.csv")  # beside run.json
OF_A_STUDY = ("evaluations.csv",)  # beside the plans of its sweeps
CACHE = "~/.cache/gnbench"  # where datasets lie unless one says so
# What a record says in a vocabulary of its own, not in free text.
VOCABULARY = ("status", "seed", "result", "versions", "engine", "started", "seconds")
ROOT = r"(?:~?/|[A-Za-z]:[\\/]|\\\\)"  # what an absolute path begins with
PLACES = (
    re.compile(r"\b[A-Za-z][\w+.-]*://[^\s'\"]+"),
    re.compile(rf"(?P<quote>['\"]){ROOT}.*?(?P=quote)"),
    re.compile(rf"(?<![\w.\\/~]){ROOT}[^\s'\",;:()<>\[\]]+"),
)


class ArchiveConfig(Settings):
    """What ``conf/archive.yaml`` holds."""

    outputs: Folder
    study: StudyName | None
    file: Folder | None


def archive(config: ArchiveConfig) -> Path:
    """Write the archive of a study, say what is in it and what is not, and return its path.

    The same study gives the same bytes.

    Raises:
        ConfigError: before anything is written.
        WriteError: if it cannot be written.
    """
    from gnbench.aggregate.study import read_study

    if config.study is None:
        names = ", ".join(folder.name for folder in find_studies(config.outputs))
        raise ConfigError(f"study=null: an archive holds one study; choose one of {names}")
    [folder] = find_studies(config.outputs, config.study)
    target = Path(config.file or Path(config.outputs, f"{config.study}{zipped.SUFFIX}"))
    if target.suffix != zipped.SUFFIX:
        raise ConfigError(f"file={config.file}: an archive is a .zip; choose NAME{zipped.SUFFIX}")
    if target.is_dir():
        raise ConfigError(f"file={target}: is a folder; choose another name")
    study = read_study(folder)
    members = dict(_members(study))
    cli.composed()
    files.make_folder(target.parent)
    files.replace(target, _zipped(members))
    print(f"{target}: {len(study.runs)} runs, {target.stat().st_size:,} bytes")
    for title, lines in (("left out", study.problems), ("missing", study.missing)):
        if lines:
            print("\n  ".join([f"{title}:", *lines]))
    return target


def _members(study: Study) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a study as an archive holds them: name and contents."""
    name, hosts = study.path.name, _hosts(study)
    for directory, run in zip(
        map(Path, study.runs["directory"]), study.runs["run_id"], strict=True
    ):
        record = neutral(read_record(directory / "run.json"), hosts)
        yield f"{name}/{run}/run.json", (json.dumps(record, indent=2) + "\n").encode()
        for file in OF_A_RUN:
            yield from _copied(directory / file, f"{name}/{run}/{file}", study.problems)
    for file in OF_A_STUDY:
        yield from _copied(study.path / file, f"{name}/{file}", study.problems)
    if cells := read_plans(study.path):
        file, data = plan_of(cells)
        yield f"{name}/{file}", data


def _copied(path: Path, name: str, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield a file as it is, if there is one; note in ``problems`` one that cannot be read."""
    try:
        yield name, path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path}: {error}; left out")


def _hosts(study: Study) -> set[str]:
    """Return the names of this machine and of those whose heartbeat a run still has."""
    beats = (read_heartbeat(Path(directory)) for directory in study.runs["directory"])
    return {socket.gethostname(), *(beat.host for beat in beats if beat is not None)}


def neutral(record: Mapping[str, Any], hosts: Collection[str] = ()) -> dict[str, Any]:
    """Return a record that tells of no place: no path, no address, none of ``hosts``.

    The run keeps its name; of an error only its type is told.

    Raises:
        ConfigError: if a setting that makes the run what it is names a place.
    """
    config, identity = record["config"], all_settings(record["config"])
    for key, value in _texts(identity):
        if any(form.search(value) for form in PLACES):
            raise ConfigError(
                f"{key}={value} of {run_id(config)} names a place and is part of what the run is: "
                "it cannot be archived; train it with a relative path"
            )
    known = [config.get("outputs"), *(config["dataset"].get(key) for key in ("root", "cache"))]
    paths = [str(Path(path).expanduser()) for path in known if path and len(Path(path).parts) > 1]
    dataset = {
        k: CACHE if k in ("root", "cache") and v else v for k, v in config["dataset"].items()
    }
    own = {"outputs": "outputs", "dataset": dataset, "tracker": LATER_IN_EXECUTION["tracker"]}
    hidden = [*paths, str(Path.home()), *hosts]
    settings = {
        key: own[key] if key in own else value if key in identity else _cleaned(value, hidden)
        for key, value in config.items()
    }
    told = {k: v if k in VOCABULARY else _cleaned(v, hidden) for k, v in record.items()}
    if isinstance(error := record.get("error"), str):
        kind = error.partition(":")[0]  # the rest may name whatever it likes
        told["error"] = f"{kind}: …" if kind.isidentifier() else "…"
    return {key: settings if key == "config" else told[key] for key in told}


def _texts(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in settings, with its dotted name."""
    for key, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield from _texts(one, f"{prefix}{key}.")
            elif isinstance(one, str):
                yield f"{prefix}{key}", one


def _cleaned(value: Any, hidden: Collection[str]) -> Any:
    """Replace in every text what names a place."""
    if isinstance(value, Mapping):
        return {key: _cleaned(inner, hidden) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, hidden) for inner in value]
    if not isinstance(value, str):
        return value
    for form in PLACES:
        value = form.sub("…", value)
    for name in sorted(hidden, key=len, reverse=True):
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", value)
    return value


def _zipped(members: Mapping[str, bytes]) -> bytes:
    """Return an archive of ``members``, by name, that depends on nothing else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in sorted(members.items()):
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix
            opened.writestr(entry, data)
    return buffer.getvalue()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="archive")
def app(config: DictConfig) -> None:
    """Archive as ``conf/archive.yaml`` says."""
    try:
        archive(ArchiveConfig.parse(config))
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
