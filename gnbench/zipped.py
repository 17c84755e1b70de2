"""Read files and folders, also those that lie in a ``.zip``: ``shared/figure3.zip/figure3/…``."""

from __future__ import annotations

import errno
import functools
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gnbench.errors import ConfigError

SUFFIX = ".zip"
LARGEST = 2**28  # bytes of a file in an archive; those of a run are far smaller


def archive_of(path: Path) -> Path | None:
    """Return the archive that ``path`` is, or lies in; None if it is none."""
    if SUFFIX in str(path):  # of a path without one nothing is asked of the disk
        for place in (path, *path.parents):
            if place.suffix == SUFFIX and place.is_file():
                return place
    return None


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: if it cannot be read, be it for a damaged place in an archive.
        ConfigError: if its archive is none.
    """
    archive = archive_of(path)
    if archive is None:
        return path.read_bytes()
    opened, name = _opened(archive), path.relative_to(archive).as_posix()
    try:
        if opened.getinfo(name).file_size > LARGEST:
            raise OSError(errno.EFBIG, "is too large for a file of a run", str(path))
        return opened.read(name)
    except KeyError:
        raise FileNotFoundError(errno.ENOENT, "is not in the archive", str(path)) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise OSError(errno.EIO, f"is damaged in its archive ({error})", str(path)) from error


def glob(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield what lies below a folder and fits a pattern without ``**``, as `Path.glob` does."""
    archive = archive_of(folder)
    if archive is None:
        yield from folder.glob(pattern)
        return
    inside = PurePosixPath(folder.relative_to(archive).as_posix())
    depth = len(inside.parts) + len(PurePosixPath(pattern).parts)
    for entry in _entries(_opened(archive)):
        if len(entry.parts) == depth and inside in entry.parents:
            below = entry.relative_to(inside)
            if below.match(pattern):
                yield archive / entry


def folders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without those whose names begin with a dot.

    Raises:
        OSError: if it cannot be read.
    """
    archive = archive_of(path)
    if archive is None:
        found = [entry for entry in path.iterdir() if entry.is_dir()]
    else:
        files = {PurePosixPath(name) for name in _opened(archive).namelist() if name[-1] != "/"}
        found = [p for p in glob(path, "*") if PurePosixPath(p.relative_to(archive)) not in files]
    return sorted(p for p in found if not p.name.startswith("."))


def written_beside(path: Path) -> Path:
    """Return where results of a study go: into it, of one in ``a.zip`` into ``a.tables`` beside."""
    archive = archive_of(path)
    if archive is None:
        return path
    return archive.with_suffix(".tables") / path.relative_to(archive)


def _opened(archive: Path) -> zipfile.ZipFile:
    state = archive.stat()
    return _read(archive, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(archive: Path, changed: int, size: int) -> zipfile.ZipFile:
    """Return an archive, of the time and size that it has now, from memory."""
    try:
        return zipfile.ZipFile(io.BytesIO(archive.read_bytes()))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ConfigError(f"{archive}: not a whole archive ({error}); fetch it again") from error


@functools.lru_cache(maxsize=4)
def _entries(opened: zipfile.ZipFile) -> tuple[PurePosixPath, ...]:
    """Return the files of an archive and the folders above them, sorted."""
    files = [PurePosixPath(name) for name in opened.namelist()]
    paths = {place for file in files for place in (file, *file.parents)}
    return tuple(sorted(paths - {PurePosixPath(".")}))
