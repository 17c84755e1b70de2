"""A folder of pictures, a folder a class: listed, split, decoded once."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from gnbench.config import DatasetSettings
from gnbench.datasets import Dataset, balanced_subset, cache, hold_out
from gnbench.errors import ConfigError, DataError, one_line

log = logging.getLogger(__name__)

# Those of torchvision's ImageFolder, in small letters or capitals.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAIN, TEST = "train", ("test", "val", "valid", "validation")  # the first that has classes counts
DECODING = 1  # goes up when the same picture is to give other pixels
NAMED = 5  # of a list in a message; the log names all unreadable pictures
SECONDS_A_LINE = 10.0
GONE = (None, errno.ENOENT, errno.ELOOP)  # no failure of reading, or a link to nothing
CHUNK = 16  # pictures that a thread takes at a time


class Picture(NamedTuple):
    """A file: name below the root, class, size, time of change (ns), SHA-256 of its bytes."""

    name: str
    label: int
    size: int
    mtime: int
    checksum: bytes = b""


@dataclass(frozen=True)
class Listing:
    """What a folder holds, without what is skipped. ``content`` is a checksum of names and bytes.

    ``notes`` are what a reader of the log should know.
    """

    classes: Sequence[str]
    train: Sequence[Picture]
    test: Sequence[Picture]
    split: dict[str, Any]  # how the test pictures were found
    skipped: Sequence[str]
    content: str
    notes: Sequence[str]


def describe(settings: DatasetSettings) -> dict[str, Any]:
    """Return what a folder tells of its pictures: classes, numbers, ``content``.

    Every file is read once for its checksum, and again only if its size or time of change differs;
    with ``unreadable=skip`` it is decoded as well.

    Raises:
        ConfigError: if the folder cannot be trained on.
    """
    if settings.image[0] not in (1, 3):
        raise ConfigError(
            f"dataset.image={settings.image}: pictures have 3 channels, or 1 for gray ones"
        )
    needed = ("test_fraction", "split_seed", "unreadable", "cache")
    for key in needed:
        if getattr(settings, key) is None:
            raise ConfigError(f"dataset.{key} is missing: give it a value")
    listing = _list(*(getattr(settings, key) for key in ("root", *needed)))
    return {
        "classes": len(listing.classes),
        "train_images": len(listing.train),
        "test_images": len(listing.test),
        "content": listing.content,
    }


def load(
    root: str,
    image: Sequence[int],
    train_size: int | None,
    validation_size: int | None,
    test_fraction: float,
    split_seed: int,
    unreadable: str,
    content: str,
    cache: str,
) -> Dataset:
    """Return the pictures of a folder, scaled and cropped to ``image`` (channels, height, width).

    They are scaled by the shorter side (bilinear, with antialiasing) and cropped to the middle, as
    by torchvision's Resize and CenterCrop; decoded once and kept in ``cache``.

    Raises:
        DataError: if a picture cannot be decoded, or they are no longer those of ``content``.
        ConfigError: if a class has too few images.
    """
    listing = _list(root, test_fraction, split_seed, unreadable, cache)
    if listing.content != content:
        raise DataError(
            f"dataset.root={root} holds other pictures than the run was set up with (content "
            f"{listing.content}, not {content}): bring them back, or repeat the command for a new "
            "run"
        )
    train, held = _chosen(listing.train, train_size, validation_size)
    # Mixed: a norm may take its statistics over test images that follow each other.
    test = _shuffled(listing.test)
    pictures = [*train, *held, *test]
    decoded = _decoded(Path(root).expanduser(), pictures, image, content, Path(cache))
    sizes = [len(train), len(held), len(test)]
    images = torch.from_numpy(decoded).split(sizes)  # type: ignore[no-untyped-call]
    labels = torch.tensor([picture.label for picture in pictures]).split(sizes)  # type: ignore[no-untyped-call]
    log.info(
        "%s: %d classes, %s training and %s test pictures (%s)",
        root,
        len(listing.classes),
        f"{len(listing.train):,}",
        f"{len(listing.test):,}",
        " ".join(f"{key}={value}" for key, value in listing.split.items()),
    )
    for note in listing.notes:
        log.info("%s: %s", root, note)
    return Dataset(
        images[0],
        labels[0],
        images[2],
        labels[2],
        images[1] if held else None,
        labels[1] if held else None,
        facts=_facts(listing),
    )


def _facts(listing: Listing) -> dict[str, Any]:
    """Return what ``run.json`` says of the pictures."""
    halves = {"train": listing.train, "test": listing.test}
    counts = {half: Counter(p.label for p in pictures) for half, pictures in halves.items()}
    names = b"\n".join(_bytes(picture.name) for picture in listing.test)
    return {
        "class_names": list(listing.classes),
        "pictures": {half: [n[i] for i in sorted(n)] for half, n in counts.items()},
        "split": listing.split,
        "test_files_sha256": hashlib.sha256(names).hexdigest(),
        "skipped": list(listing.skipped),
    }


def _chosen(
    pictures: Sequence[Picture], train_size: int | None, validation_size: int | None
) -> tuple[list[Picture], list[Picture]]:
    """Return the training and validation pictures that the two sizes leave, before any is decoded.

    Those that `balanced_subset` and `hold_out` choose, here among the numbers of the pictures.
    """
    labels = torch.tensor([picture.label for picture in pictures])
    numbers = Dataset(torch.arange(len(pictures)), labels, torch.empty(0), torch.empty(0))
    if validation_size is not None:
        numbers = hold_out(numbers, validation_size)
    if train_size is not None:
        numbers = balanced_subset(numbers, train_size)
    held = [] if numbers.validation_images is None else numbers.validation_images.tolist()
    return [pictures[i] for i in numbers.train_images.tolist()], [pictures[i] for i in held]


# Listing.


def _list(
    root: str | None, test_fraction: float, split_seed: int, unreadable: str, cache: str
) -> Listing:
    """List a folder, read what is new in it, and split it.

    Raises:
        ConfigError: if it cannot be trained on.
    """
    if root is None:
        raise ConfigError("dataset.root is not set: name the folder of pictures: dataset.root=DIR")
    top = Path(root).expanduser().absolute()
    halves, unused = _halves(top, root)
    counts = Counter[str]()
    classes = {half: _folders(folder) for half, folder in halves.items()}
    _check_classes(root, classes)
    names = next(iter(classes.values()))
    found = {
        half: [
            picture
            for label, name in enumerate(names)
            for picture in _pictures(folder / name, label, top, root, counts)
        ]
        for half, folder in halves.items()
    }
    for half, pictures in found.items():
        _check_filled(root, half, names, pictures, "pictures")
    listed = [picture for pictures in found.values() for picture in pictures]
    checksums = _inspected(top, root, listed, unreadable, Path(cache))
    found = {
        half: [Picture(*p[:4], checksums[p.name]) for p in pictures if p.name in checksums]
        for half, pictures in found.items()
    }
    for half, pictures in found.items():
        _check_filled(root, half, names, pictures, "readable pictures")
    content = hashlib.sha256()
    for picture in itertools.chain(*found.values()):
        content.update(_bytes(picture.name) + b"\0" + picture.checksum)
    if len(found) > 1:
        train, test = found.values()
        split: dict[str, Any] = {"folders": ",".join(folder.name for folder in halves.values())}
    else:
        [everything] = found.values()
        train, test = _split(root, names, everything, test_fraction, split_seed)
        split = {"test_fraction": test_fraction, "split_seed": split_seed}
    skipped = [picture.name for picture in listed if picture.name not in checksums]
    lists = {"not used": unused, "skipped, unreadable (run.json names all)": skipped}
    notes = [f"{what}: {_named(these)}" for what, these in lists.items() if these]
    notes += [f"{what}: {count:,}" for what, count in sorted(counts.items())]
    return Listing(names, train, test, split, skipped, content.hexdigest()[:16], notes)


def _halves(top: Path, root: str) -> tuple[dict[str, Path], list[str]]:
    """Find the folders that hold the class folders: of training and test, or one for both.

    Beside two, name those that are not used.
    """
    if not top.is_dir():
        what = "is not a folder" if top.exists() else "there is no such folder"
        raise ConfigError(f"dataset.root={root}: {what}; name the one that holds the class folders")
    folders = _folders(top)
    tests = [name for name in TEST if name in folders]
    if TRAIN in folders and tests:
        test = next((name for name in tests if _folders(top / name)), tests[0])
        return {TRAIN: top / TRAIN, test: top / test}, sorted({*folders} - {TRAIN, test})
    if folders and {*folders} <= {TRAIN, *TEST}:
        raise ConfigError(
            f"dataset.root={root} holds {', '.join(folders)}: give it train and test (or val), or "
            f"name the folder of the class folders, which is split: dataset.root={top / folders[0]}"
        )
    return {"": top}, []


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(e.name for e in found if e.is_dir() and e.name[0] != ".")
    except OSError as error:
        _refuse(error)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # a name need not be text


def _check_classes(root: str, classes: dict[str, list[str]]) -> None:
    """Refuse class folders that are too few, or not the same in both halves."""
    if len(classes) > 1:
        (train, trained), (test, tested) = classes.items()
        lacking = [
            f"{half} lacks {_named(sorted(missing))}"
            for half, missing in ((train, {*tested} - {*trained}), (test, {*trained} - {*tested}))
            if missing
        ]
        if lacking:
            raise ConfigError(
                f"dataset.root={root}: the class folders of {train} and {test} differ: "
                f"{'; '.join(lacking)}; make them the same"
            )
    names = next(iter(classes.values()))
    if not names:
        raise ConfigError(
            f"dataset.root={root}: no class folders; put the pictures of each class into a folder "
            "of its own"
        )
    if len(names) == 1:
        raise ConfigError(
            f"dataset.root={root} holds a single class, {names[0]}: two are needed (if the classes "
            "lie deeper, name that folder)"
        )


def _pictures(
    folder: Path, label: int, top: Path, root: str, counts: Counter[str]
) -> Iterator[Picture]:
    """Yield the pictures of a class in ImageFolder's order, those in folders below it included.

    Hidden files and folders are not looked at; a link to a folder above itself is not followed.
    ``counts`` are of what a reader of the log should know.
    """
    if halves := {TRAIN, *TEST} & {*_folders(folder)}:
        raise ConfigError(
            f"dataset.root={root}: {folder.name} holds {', '.join(sorted(halves))}; put train and "
            "test above the class folders"
        )
    above = len(str(top / "x")) - 1  # characters of a path that are not part of the name
    for here, files in sorted(_walk(folder)):
        below = here != str(folder)
        for file in files:
            if not file.name.lower().endswith(EXTENSIONS):
                counts["files that are not read, no pictures by their names"] += 1
                continue
            if below:
                counts["pictures in folders below a class folder"] += 1
            try:
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):  # to read from a pipe is to wait
                    counts["pipes, sockets and devices, which are not read"] += 1
                    continue
                size, mtime = status.st_size, status.st_mtime_ns
            except OSError:  # a link to nothing: it is going to be unreadable
                size = mtime = 0
            yield Picture(file.path[above:].replace(os.sep, "/"), label, size, mtime)


def _walk(folder: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield a folder and those below it, each with its files, sorted by name."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        _refuse(error)
    yield str(folder), [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            lower = Path(entry.path)
            if not (entry.is_symlink() and folder.resolve().is_relative_to(lower.resolve())):
                yield from _walk(lower)


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(f"dataset.root: {error.filename} cannot be read: {error.strerror}") from error


def _inspected(
    top: Path, root: str, pictures: Sequence[Picture], unreadable: str, folder: Path
) -> dict[str, bytes]:
    """Return the SHA-256 of every file by its name, from the cache; of those to be skipped none.

    Raises:
        ConfigError: if one cannot be read, unless these are skipped.
    """

    def make(path: Path) -> cache.Arrays:
        checksums = np.zeros((len(pictures), 32), np.uint8)
        readable = np.zeros(len(pictures), np.uint8)

        def inspect(i: int, data: bytes) -> None:
            checksums[i] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            if unreadable == "skip":
                _opened(data)
            readable[i] = 1

        failures = _done(top, pictures, "files read", inspect)
        if failures and unreadable == "refuse":
            raise ConfigError(_unreadable(root, pictures, failures))
        return {"checksums": checksums, "readable": readable}

    stamps = [(picture.name, picture.size, picture.mtime) for picture in pictures]
    arrays = _kept("checksums", [stamps, unreadable], folder, make)
    rows = zip(pictures, arrays["checksums"], arrays["readable"], strict=True)
    return {picture.name: checksum.tobytes() for picture, checksum, readable in rows if readable}


def _check_filled(
    root: str, half: str, classes: Sequence[str], pictures: Sequence[Picture], what: str
) -> None:
    """Refuse a class without pictures."""
    where = f"dataset.root={root}" + (f": {half}" if half else "")
    if not pictures:
        raise ConfigError(f"{where}: no {what} ({' '.join(EXTENSIONS)}); name a folder of some")
    filled = {picture.label for picture in pictures}
    if empty := [name for label, name in enumerate(classes) if label not in filled]:
        raise ConfigError(
            f"{where}: no {what} of {_named(empty)}: fill or remove "
            + ("the folder" if len(empty) == 1 else f"these {len(empty)} folders")
        )


def _split(
    root: str, classes: Sequence[str], pictures: Sequence[Picture], fraction: float, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """Draw ``fraction`` of the pictures of every class for the test, one at least."""
    of_class: list[list[Picture]] = [[] for _ in classes]
    for picture in pictures:
        of_class[picture.label].append(picture)
    test: set[Picture] = set()
    for label, own in enumerate(of_class):
        if len(own) < 2:
            raise ConfigError(
                f"dataset.root={root}: {classes[label]} has a single picture, which cannot be in "
                "training and test; add some, or make folders train and test"
            )
        count = min(max(round(fraction * len(own)), 1), len(own) - 1)
        test.update(_shuffled(own, seed)[:count])
    return [p for p in pictures if p not in test], [p for p in pictures if p in test]


def _shuffled(pictures: Sequence[Picture], seed: int = 0) -> list[Picture]:
    """Put pictures into the order of the SHA-256 of seed and name.

    No library that draws numbers can change it, and what is added moves none of the others.
    """
    return sorted(pictures, key=lambda p: hashlib.sha256(b"%d " % seed + _bytes(p.name)).digest())


# Decoding.


def _decoded(
    top: Path, pictures: Sequence[Picture], image: Sequence[int], content: str, folder: Path
) -> npt.NDArray[np.uint8]:
    """Return the pictures as N,H,W,C, from the cache.

    Raises:
        DataError: if one cannot be decoded.
    """
    channels, height, width = image

    def make(path: Path) -> cache.Arrays:
        images = np.empty((len(pictures), height, width, channels), np.uint8)

        def decode(i: int, data: bytes) -> None:
            if hashlib.sha256(data).digest() != pictures[i].checksum:
                raise ValueError("changed, though neither its size nor its time says so: touch it")
            images[i] = _fitted(_opened(data), image)

        failures = _done(top, pictures, "pictures decoded", decode)
        if failures:
            raise DataError(_unreadable(str(top), pictures, failures))
        return {"images": images}

    names = [picture.name for picture in pictures]
    return _kept("pictures", [DECODING, content, list(image), names], folder, make)["images"]


def _opened(data: bytes) -> Image.Image:
    """Decode a picture to 8 bits of gray (mode L) or of red, green and blue (RGB).

    Turned as its EXIF orientation says; what is transparent lies on white; of several frames the
    first. 16 bits become 8 by rounding.

    Raises:
        Exception: Pillow raises many kinds for a file that it cannot decode.
    """
    with Image.open(io.BytesIO(data)) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode.startswith("I"):  # 16 bits of gray, which older Pillows open as 32
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers of 32 bits, of which it is not known what is white")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257
    if picture.mode == "F":
        raise ValueError("floating-point numbers, of which it is not known what is white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _fitted(picture: Image.Image, image: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Scale a picture until its shorter side fits, crop the middle, return H,W,C."""
    channels, height, width = image
    w, h = picture.size
    wider = w * height >= h * width
    size = (int(height * w / h), height) if wider else (width, int(width * h / w))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(
        height, width, channels
    )


def _done(
    top: Path, pictures: Sequence[Picture], done: str, work: Callable[[int, bytes], None]
) -> dict[int, str]:
    """Have threads do ``work`` on the number and the bytes of every file; return what failed, why.

    A bar on a terminal, elsewhere a line now and then. Reading, decoding and scaling leave Python's
    lock to others.

    Raises:
        DataError: if a file cannot be read for a reason that lies in the machine.
    """
    failures: dict[int, str] = {}
    passing: dict[int, str] = {}  # of these what may be over tomorrow, and says nothing of the file

    def do(numbers: range) -> int:
        for i in numbers:
            try:
                work(i, (top / pictures[i].name).read_bytes())
            except UnidentifiedImageError:
                failures[i] = "no picture that Pillow knows"
            except Exception as error:
                failures[i] = getattr(error, "strerror", None) or one_line(error)
                if isinstance(error, MemoryError) or getattr(error, "errno", None) not in GONE:
                    passing[i] = failures[i]
        return len(numbers)

    total, so_far = len(pictures), 0
    chunks = [range(total)[start : start + CHUNK] for start in range(0, total, CHUNK)]
    began = said = time.monotonic()
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_cores()) as pool,
        tqdm(total=total, desc=done, unit="", disable=None, leave=False) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's, of files that it reads all the same
        for count in pool.map(do, chunks):
            so_far += count
            bar.update(count)
            if bar.disable and time.monotonic() - said > SECONDS_A_LINE:
                said = time.monotonic()
                left = (said - began) / so_far * (total - so_far)
                log.info("%s of %s %s, %.0f s left", f"{so_far:,}", f"{total:,}", done, left)
    log.info("%s %s in %.1f s", f"{total:,}", done, time.monotonic() - began)
    for i in sorted(failures):
        log.warning("%s: %s", top / pictures[i].name, failures[i])
    if passing:
        named = _named([f"{pictures[i].name} ({passing[i]})" for i in sorted(passing)])
        raise DataError(f"{top}: pictures cannot be read now: {named}; mend that and try again")
    return dict(sorted(failures.items()))


def _unreadable(root: str, pictures: Sequence[Picture], failures: dict[int, str]) -> str:
    """Name the first pictures that cannot be read, and say what can be done."""
    named = _named([f"{pictures[i].name} ({why})" for i, why in failures.items()])
    return (
        f"dataset.root={root}: {len(failures)} of {len(pictures)} pictures cannot be read: "
        f"{named}; mend or remove them, or leave them out with dataset.unreadable=skip"
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _kept(kind: str, key: Any, folder: Path, make: Callable[[Path], cache.Arrays]) -> cache.Arrays:
    """Return arrays of the cache, made if they are not there; their name follows from ``key``."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache.keep(f"{kind}-{digest}", folder, make, setting="dataset.cache")


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
