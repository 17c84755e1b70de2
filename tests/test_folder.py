"""Folders of pictures: what is read, how it is decoded, split, kept and named, what is refused."""

import csv
import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional

import gnbench
from gnbench import datasets
from gnbench.check import check_machine
from gnbench.config import RunConfig
from gnbench.datasets import balanced_subset, folder, hold_out, measured
from gnbench.errors import ConfigError, DataError
from gnbench.evaluate import EvaluateConfig, evaluate
from gnbench.train.devices import free_memory_bytes
from tests import tiny
from tests.pictures import config, plain, tree

BOTH = ("train", "test")


def loaded(root, *overrides):
    return datasets.load(config(root, *overrides).dataset)


def grays(images):
    """Return the one value of each picture of `tree`."""
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def pixels(path, *, image=(3, 8, 8)):
    """Return a single picture, decoded (H,W,C)."""
    return folder._fitted(folder._opened(path.read_bytes()), image)


# What is read.


def test_pictures_classes_and_order_are_those_of_torchvision(tmp_path):
    root = tree(tmp_path / "pictures", {"b": 3, "a": 2, "C": 2}, BOTH)
    (root / "train" / "a" / "below").mkdir()
    for name in ("below/1.PNG", "~.jpg", "A.bmp", "note.txt"):
        source = root / "train" / "a" / "000.png"
        shutil.copy(source, root / "train" / "a" / name)
    dataset = loaded(root)
    for half in BOTH:
        theirs = ImageFolder(root / half)
        images, labels = getattr(dataset, f"{half}_images"), getattr(dataset, f"{half}_labels")
        ours = [*zip(labels.tolist(), grays(images), strict=True)]
        assert (sorted(ours) if half == "test" else ours) == [
            (label, image.getpixel((0, 0))[0]) for image, label in theirs
        ]
    assert dataset.facts["class_names"] == theirs.classes == ["C", "a", "b"]
    assert dataset.facts["pictures"] == {"train": [2, 5, 3], "test": [2, 2, 3]}
    assert dataset.facts["split"] == {"folders": "train,test"}
    assert set(folder.EXTENSIONS) == set(IMG_EXTENSIONS)


def test_links_are_followed_but_not_in_circles_and_what_is_hidden_is_left_alone(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 2, "b": 2}, BOTH)
    (tmp_path / "elsewhere").mkdir()
    plain(tmp_path / "elsewhere" / "z.png", (200,) * 3)
    (root / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "b" / "y.png").symlink_to(tmp_path / "elsewhere" / "z.png")
    (root / "train" / "b" / "circle").symlink_to(root / "train")
    plain(root / "train" / ".hidden" / "x.png", 0)
    plain(root / "train" / "a" / ".hidden" / "x.png", 0)
    plain(root / "train" / "a" / "._x.png", 0)
    plain(root / "extra" / "a" / "x.png", 0)
    dataset = loaded(root)
    assert grays(dataset.train_images) == [0, 1, 200, 2, 3, 200]
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_val_is_the_test_where_there_is_no_other_and_what_is_left_out_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    root = tree(tmp_path / "pictures", {"a": 2, "b": 2}, ("train", "val"))
    assert sorted(grays(loaded(root).test_images)) == [4, 5, 6, 7]
    (root / "test").mkdir()
    plain(root / "test" / "unlabelled.png", 0)
    assert sorted(grays(loaded(root).test_images)) == [4, 5, 6, 7]
    tree(root, {"a": 1, "b": 1}, ["test"])
    plain(root / "train" / "a" / "below" / "x.png", 0)
    (root / "train" / "a" / "note.txt").touch()
    caplog.clear()
    assert grays(loaded(root).test_images) == [0, 1]
    own = [r.getMessage() for r in caplog.records if r.name == folder.log.name]
    assert [line.partition(": ")[2] for line in own[-4:]] == [
        "2 classes, 5 training and 2 test pictures (folders=train,test)",
        "not used: val",
        "files that are not read, no pictures by their names: 1",
        "pictures in folders below a class folder: 1",
    ]


def test_a_split_takes_its_share_of_every_class_and_follows_from_its_seed(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 20, "b": 10, "c": 2})
    dataset = loaded(root)
    assert dataset.facts["pictures"] == {"train": [16, 8, 1], "test": [4, 2, 1]}
    both = [*grays(dataset.train_images), *grays(dataset.test_images)]
    assert sorted(both) == list(range(32))
    assert both != list(range(32))
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        assert labels.tolist() == [(gray >= 20) + (gray >= 30) for gray in grays(images)]
    again, other = loaded(root), loaded(root, "dataset.split_seed=1")
    assert torch.equal(again.test_images, dataset.test_images)
    assert not torch.equal(other.test_images, dataset.test_images)
    assert dataset.facts["split"] == {"test_fraction": 0.2, "split_seed": 0}
    assert again.facts["test_files_sha256"] == dataset.facts["test_files_sha256"]
    assert other.facts["test_files_sha256"] != dataset.facts["test_files_sha256"]
    half = loaded(root, "dataset.test_fraction=0.5")
    assert half.facts["pictures"] == {"train": [10, 5, 1], "test": [10, 5, 1]}


def test_a_split_is_that_of_the_names_whatever_library_draws_numbers(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 10, "b": 10})
    before = {gray % 10 for gray in grays(loaded(root).test_images) if gray < 10}
    order = sorted(range(10), key=lambda i: hashlib.sha256(b"0 a/%03d.png" % i).digest())
    assert before == {*order[:2]}
    shutil.rmtree(root / "b")
    tree(root, {"b": 5})
    assert set(grays(loaded(root).test_images)) >= before  # what is in b moves none of a


def test_the_test_pictures_are_not_sorted_by_class(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 100, "b": 100})
    labels = loaded(root).test_labels.tolist()
    assert sorted(labels) == [0] * 20 + [1] * 20
    assert 5 < sum(labels[:20]) < 15
    assert labels == loaded(root).test_labels.tolist()


# How it is decoded.

CLEAR = {"transparency": 1}  # the palette's second colour


def paletted(path, **options):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, **options)


def sixteen_bits(value, dtype=np.uint16):
    return lambda path: Image.fromarray(np.full((8, 8), value, dtype)).save(path)


@pytest.mark.parametrize(
    ("file", "save", "expected"),
    [
        ("gray.png", ("L", 77), (77, 77, 77)),
        ("gray.tif", ("L", 77), (77, 77, 77)),
        ("bits.png", ("1", 1), (255, 255, 255)),
        ("colour.bmp", ("RGB", (10, 20, 30)), (10, 20, 30)),
        ("colour.ppm", ("RGB", (10, 20, 30)), (10, 20, 30)),
        ("opaque.png", ("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
        ("clear.png", ("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        ("half.png", ("RGBA", (0, 0, 0, 51)), (204, 204, 204)),  # a fifth of black on white
        ("half.webp", ("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
        ("half_gray.png", ("LA", (0, 51)), (204, 204, 204)),
        ("palette.png", paletted, (10, 20, 30)),
        ("clear_palette.png", lambda path: paletted(path, **CLEAR), (255, 255, 255)),
        ("ink.tif", ("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        ("black.tif", ("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        ("deep.png", sixteen_bits(65535), (255, 255, 255)),
        ("deep.tif", sixteen_bits(257 * 100 + 128), (100, 100, 100)),
        ("deep.png", sixteen_bits(257 * 100 + 129), (101, 101, 101)),
        ("deep_big.tif", sixteen_bits(257 * 100, ">u2"), (100, 100, 100)),
        ("deeper.tif", sixteen_bits(257 * 100, np.int32), (100, 100, 100)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_colour_is_what_it_is_in_every_mode(tmp_path, file, save, expected):
    path = tmp_path / file
    if callable(save):
        save(path)
    else:
        plain(path, save[1], save[0], **({"lossless": True} if file.endswith("webp") else {}))
    found = pixels(path, image=(3, 5, 7))
    assert found.shape == (5, 7, 3)
    assert (found == expected).all()
    red, green, blue = expected
    gray = pixels(path, image=(1, 4, 4))
    assert gray.shape == (4, 4, 1)
    assert (gray == round(0.299 * red + 0.587 * green + 0.114 * blue)).all()  # ITU-R BT.601


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_photograph_is_heeded(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    # As the camera lay (EXIF 2.3, 4.6.4): where the first row and the first column are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "x.png"), upright)


@pytest.mark.parametrize("size", [(8, 8), (40, 13), (9, 31), (100, 100), (5, 3), (641, 479)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_size_and_crop_are_those_of_torchvision(tmp_path, size, mode):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    image.save(tmp_path / "x.png")
    theirs = functional.center_crop(functional.resize(image, 16), 16)
    assert np.array_equal(pixels(tmp_path / "x.png", image=(3, 16, 16)), theirs.convert("RGB"))
    if mode == "L":
        assert np.array_equal(pixels(tmp_path / "x.png", image=(1, 16, 16))[..., 0], theirs)


@pytest.mark.parametrize("size", [(16, 8), (20, 20), (9, 31), (60, 10)])
def test_an_oblong_picture_is_covered(tmp_path, size):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    image.save(tmp_path / "x.png")
    width, height = size
    # To 8 high and 16 wide: the larger of the two factors makes it large enough.
    factor = max(8 / height, 16 / width)
    scaled = [int(height * factor + 1e-9), int(width * factor + 1e-9)]
    theirs = functional.center_crop(functional.resize(image, scaled), [8, 16])
    assert np.array_equal(pixels(tmp_path / "x.png", image=(3, 8, 16)), theirs)


# What cannot be read.


def damage(root):
    """Put pictures that cannot be read among ten good ones; return their names."""
    tree(root, {"a": 5, "b": 5}, BOTH)
    here = root / "train" / "a"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(here / "cut.png")
    data = (here / "cut.png").read_bytes()
    (here / "cut.png").write_bytes(data[: len(data) // 2])
    (here / "text.jpg").write_text("not a picture")
    (here / "empty.bmp").touch()
    Image.fromarray(np.ones((8, 8), np.float32)).save(here / "float.tif")
    Image.fromarray(np.full((8, 8), 2**30, np.int32)).save(here / "deep.tif")
    return [
        f"train/a/{name}" for name in ("cut.png", "deep.tif", "empty.bmp", "float.tif", "text.jpg")
    ]


def test_a_pipe_is_no_picture(tmp_path, caplog):
    root = tree(tmp_path / "pictures", {"a": 3, "b": 3})
    os.mkfifo(root / "a" / "pipe.png")
    with caplog.at_level("INFO", "gnbench"):
        assert len(loaded(root).train_images) == 4
    assert "pipes, sockets and devices, which are not read: 1" in caplog.text


def test_unreadable_pictures_are_named_and_refused(tmp_path, caplog):
    root = tmp_path / "pictures"
    names = damage(root)
    with pytest.raises(DataError) as caught:
        loaded(root)
    message = str(caught.value)
    assert message.startswith(f"dataset.root={root}: 5 of 25 pictures cannot be read: ")
    assert message.endswith("leave them out with dataset.unreadable=skip")
    assert "\n" not in message
    for name in names:
        assert f"{name} (" in message
        assert f"{root / name}: " in caplog.text
    assert "text.jpg (no picture that Pillow knows)" in message
    assert not list((tmp_path / "cache").glob("pictures-*.npz"))
    (root / "train" / "b" / "gone.png").symlink_to(root / "nowhere")
    with pytest.raises(ConfigError, match=r"1 of 26 .* train/b/gone\.png \(No such file"):
        config(root)


def test_unreadable_pictures_are_skipped_where_asked(tmp_path, caplog):
    root = tmp_path / "pictures"
    names = damage(root)
    (root / "train" / "b" / "gone.png").symlink_to(root / "nowhere")
    caplog.set_level("INFO")
    dataset = loaded(root, "dataset.unreadable=skip")
    assert dataset.facts["skipped"] == [*names, "train/b/gone.png"]
    assert "skipped, unreadable (run.json names all): train/a/cut.png" in caplog.text
    assert grays(dataset.train_images) == list(range(10))
    skipping = config(root, "dataset.unreadable=skip")
    for name in dataset.facts["skipped"]:
        (root / name).unlink()
    # Without those the same pictures are left.
    assert config(root).run_id == skipping.run_id == config(root, "dataset.unreadable=skip").run_id
    assert torch.equal(loaded(root).train_images, dataset.train_images)


def test_a_disk_that_fails_is_no_unreadable_picture(tmp_path, monkeypatch):
    root = tree(tmp_path / "pictures", {"a": 4, "b": 4})
    whole = loaded(root, "dataset.unreadable=skip").facts
    for path in (tmp_path / "cache").glob("*.npz"):
        path.unlink()

    def failing(path):
        if path.parent.name == "b":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return reading(path)

    reading = Path.read_bytes
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", failing)
        with pytest.raises(DataError, match=r"cannot be read now: b/.* \(Input/output error\)"):
            config(root, "dataset.unreadable=skip")
    assert loaded(root, "dataset.unreadable=skip").facts == whole


def test_a_class_of_which_nothing_can_be_read_is_refused_even_then(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 2, "b": 2}, BOTH)
    for path in (root / "test" / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r": test: no readable pictures of b: fill or remove"):
        config(root, "dataset.unreadable=skip")


# What is refused.


def lay(*names):
    """Return what lays down small pictures, and empty folders for names that end in /."""

    def make(root):
        for name in names:
            path = root / name
            if name.endswith("/"):
                path.mkdir(parents=True)
            else:
                plain(path, 0)

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    {
        "nothing": (lambda root: None, "there is no such folder; name"),
        "a file": (lambda root: root.touch(), "is not a folder; name"),
        "empty": (lay("./"), "no class folders; put the pictures of each class into a folder of"),
        "flat": (lay("x.png", "y.png"), "no class folders; put"),
        "no pictures": (lay("a/", "b/"), r"no pictures \(\.jpg .*; name a folder of some"),
        "an empty class": (lay("a/x.png", "b/x.png", "c/"), "no pictures of c: fill or remove the"),
        "a single class": (lay("a/x.png", "a/y.png"), "holds a single class, a: two are needed"),
        "too high": (lay("data/a/x.png", "data/b/x.png"), "class, data: .* name that folder"),
        "a single picture": (lay("a/x.png", "b/x.png", "b/y.png"), "a has a single picture, which"),
        "train alone": (lay("train/a/x.png", "train/b/x.png"),
            r"holds train: give it train and test .* split: dataset\.root=.*/train$"),
        "no train": (lay("test/a/x.png", "val/a/x.png"), "holds test, val: give it train and test"),
        "other classes": (
            lay("train/a/x.png", "train/b/x.png", "test/b/x.png", "test/c/x.png", "test/d/x.png"),
            "of train and test differ: train lacks c, d; test lacks a; make them the same"),
        "no test classes": (lay("train/a/x.png", "train/b/x.png", "test/x.png"), "test lacks a, b"),
        "an empty half": (lay("train/a/x.png", "train/b/x.png", "test/a/", "test/b/"),
            "test: no pictures "),
        "upside down": (lay("a/train/x.png", "a/test/x.png", "b/train/x.png", "b/test/x.png"),
            "a holds test, train; put train and test above the class folders"),
    }.values(),
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_on_is_refused_in_a_line(tmp_path, make, said):
    make(tmp_path / "pictures")
    with pytest.raises(ConfigError, match=rf"^dataset\.root={tmp_path}/pictures.*{said}") as caught:
        config(tmp_path / "pictures")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    {
        "dataset.root=null": "dataset.root is not set: name the folder of pictures: dataset.root=D",
        "dataset.image=[4,8,8]": r"dataset.image=\[4, 8, 8\]: pictures have 3 channels, or 1",
        "dataset.image=[3,0,8]": r"dataset.image\[1\]=0: must be at least 1",
        "dataset.unreadable=ignore": "dataset.unreadable=ignore: choose one of refuse, skip",
        "dataset.test_fraction=1": "dataset.test_fraction=1: must be less than 1",
        "dataset.test_fraction=null": "dataset.test_fraction is missing: give it a value",
        "dataset.split_seed=-1": "dataset.split_seed=-1: must be at least 0",
        "dataset._describe_=nowhere.at_all": "dataset._describe_=nowhere.at_all: No module",
        "dataset.mean=[0.5]": r"dataset.mean=\[0.5\]: must be a list of one number per channel \(3",
    }.items(),
)
def test_a_setting_that_cannot_work_is_refused_in_a_line(tmp_path, override, said):
    root = tree(tmp_path / "pictures", {"a": 3, "b": 3})
    with pytest.raises(ConfigError, match=f"^{said}") as caught:
        config(root, override)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(free_memory_bytes() is None, reason="this system does not tell")
def test_more_than_the_memory_holds_is_refused_before_anything_is_decoded(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 3, "b": 3})
    with pytest.raises(ConfigError) as caught:
        check_machine(config(root, "dataset.image=[3,10000000,10000000]"))
    message = str(caught.value)
    assert "6 images of [3, 10000000, 10000000] take 1,800,000,000,000,000 bytes" in message
    assert message.endswith("choose a smaller dataset.image or dataset.train_size")
    check_machine(config(root))


# The cache and the name of a run.


def test_pictures_are_decoded_once_and_what_changed_anew(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 3, "b": 3}, BOTH)
    path = root / "train" / "a" / "-.bmp"  # the first, of a size that does not tell its colour
    plain(path, (100, 0, 0))
    first = loaded(root)
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(loaded(root).train_images, first.train_images)  # the file is not looked into
    plain(path, (200, 0, 0))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    second = loaded(root)
    assert second.train_images[0, 0, 0].tolist() == [200, 0, 0]
    assert torch.equal(second.train_images[1:], first.train_images[1:])
    assert loaded(root, "dataset.image=[1,4,6]").train_images.shape == (7, 4, 6, 1)


@pytest.mark.parametrize("kind", ["pictures", "checksums"])
def test_a_damaged_cache_is_said_and_made_again(tmp_path, caplog, kind):
    root = tree(tmp_path / "pictures", {"a": 3, "b": 3}, BOTH)
    first = loaded(root)
    [path] = (tmp_path / "cache").glob(f"{kind}-*.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    arrays[{"pictures": "images", "checksums": "checksums"}[kind]][0] ^= 1
    np.savez(path, **arrays)  # whole again by the checksums of zip
    datasets._shared.cache_clear()  # another process
    assert torch.equal(loaded(root).train_images, first.train_images)
    assert f"{path} is damaged: it differs from what was written; set aside as" in caplog.text


def test_runs_at_once_decode_once(tmp_path, caplog):
    root = tree(tmp_path / "pictures", {"a": 30, "b": 30}, BOTH)
    caplog.set_level("INFO")
    settings = config(root).dataset
    with ThreadPoolExecutor() as several:
        found = list(several.map(lambda _: datasets.load(settings), range(4)))
    assert all(torch.equal(one.train_images, found[0].train_images) for one in found)
    assert caplog.text.count("pictures decoded in") == 1


def test_a_run_is_named_after_its_pictures_wherever_they_lie(tmp_path):
    here = tree(tmp_path / "here" / "pictures", {"a": 4, "b": 4})
    there = tmp_path / "there" / "images"
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # with other times
    run = config(here)
    assert (run.dataset.classes, run.dataset.train_images, run.dataset.test_images) == (2, 6, 2)
    assert run.run_id == config(there).run_id == config(here, f"dataset.cache={tmp_path}").run_id
    for other in ("dataset.split_seed=1", "dataset.test_fraction=0.5", "dataset.image=[1,8,8]"):
        assert config(here, other).run_id != run.run_id
    # Another picture of the same name and to the byte the same size.
    for root, colour in ((here, (0, 0, 1)), (there, (0, 0, 2))):
        plain(root / "a" / "new.bmp", colour)
    sizes = {root: (root / "a" / "new.bmp").stat().st_size for root in (here, there)}
    assert sizes[here] == sizes[there]
    assert len({run.run_id, config(here).run_id, config(there).run_id}) == 3
    before = config(here)
    (here / "a" / "new.bmp").rename(here / "b" / "!new.bmp")  # of another class, in the same order
    after = config(here)
    assert after.dataset.train_images == before.dataset.train_images
    assert after.run_id != before.run_id


def test_the_runs_of_a_process_share_their_pictures(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 4, "b": 4})
    one, other = (datasets.load(config(root, f"batch_size={size}").dataset) for size in (1, 2))
    assert one.train_images.data_ptr() == other.train_images.data_ptr()
    tree(root, {"a": 5})
    assert len(loaded(root).train_images) == 7


def test_a_record_tells_where_its_pictures_lay(tmp_path, monkeypatch):
    root = tree(tmp_path / "pictures", {"a": 4, "b": 4})
    monkeypatch.chdir(tmp_path)
    assert config(root, "dataset.root=pictures").plain()["dataset"]["root"] == str(root)


def test_a_record_tells_the_run_without_its_pictures(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 4, "b": 4})
    run = config(root)
    stored = json.loads(json.dumps(run.plain()))
    tree(root, {"c": 4})
    with pytest.raises(
        DataError, match=r"holds other pictures than the run was set up with .*cont"
    ):
        datasets.load(run.dataset)
    shutil.rmtree(root)
    again = RunConfig.parse(stored)
    assert again.run_id == gnbench.run_id(stored) == run.run_id
    assert again == run == run.with_(seed=0)


# Subsets, mean and std.


def test_only_what_is_asked_for_is_decoded_and_it_is_what_a_whole_dataset_gives(tmp_path):
    root = tree(tmp_path / "pictures", {"a": 9, "b": 7}, BOTH)
    whole = loaded(root)
    wanted = balanced_subset(hold_out(whole, 4), 6)
    (root / "train" / "a" / "004.png").write_text("between the first three and the last two")
    found = loaded(root, "dataset.train_size=6", "dataset.validation_size=4")
    for name in ("train", "validation", "test"):
        for part in ("images", "labels"):
            name_of_part = f"{name}_{part}"
            assert torch.equal(getattr(found, name_of_part), getattr(wanted, name_of_part))
    with pytest.raises(
        ConfigError, match=r"train_size=16 takes 8 images of each class, but class 1"
    ):
        loaded(root, "dataset.train_size=16")
    with pytest.raises(ConfigError, match=r"train_size=17: must be from 2 to 16"):
        loaded(root, "dataset.train_size=17")


def test_mean_and_std_are_measured_on_the_training_images_unless_given(tmp_path):
    root = tmp_path / "pictures"
    for half, blacks, whites in (("train", 3, 1), ("test", 2, 0)):
        for name in ("a", "b"):
            for number in range(blacks + whites):
                plain(root / half / name / f"{number}.png", (255 * (number >= blacks), 51, 0))
    with pytest.raises(
        ConfigError, match=r"standard deviation of .*: give a dataset\.std without z"
    ):
        loaded(root)
    dataset = loaded(root, "dataset.std=[0.5,0.5,1]")
    assert dataset.mean == [0.25, 0.2, 0.0]
    assert dataset.facts["std"] == [0.5, 0.5, 1.0]
    assert measured(dataset.train_images)[1] == pytest.approx([3**0.5 / 4, 0.0, 0.0])
    half = config(root, "dataset.std=[0.5,0.5,1]").dataset
    assert datasets.normalization(dataset, half) == ([0.25, 0.2, 0.0], [0.5, 0.5, 1.0])
    given = config(root, "dataset.mean=[1,2,3]", "dataset.std=[4,5,6]").dataset
    dataset = datasets.load(given)
    assert datasets.normalization(dataset, given) == ([1, 2, 3], [4, 5, 6])
    assert "mean" not in dataset.facts
    few = loaded(root, "dataset.std=[1,1,1]", "dataset.train_size=2")  # both black
    assert few.mean == [0.0, 0.2, 0.0]


def test_measured_is_what_float64_gives():
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2100, 3, 5, 3), dtype=np.uint8)
    )
    values = images.double().div(255).flatten(0, 2)
    mean, std = measured(images)
    torch.testing.assert_close(torch.tensor(mean).double(), values.mean(0))
    torch.testing.assert_close(torch.tensor(std).double(), values.std(0, correction=0))


# The command.


@pytest.mark.slow
def test_the_command_trains_on_a_folder(cli, tmp_path, capsys):
    root = tree(tmp_path / "pictures", {"a": 12, "b": 6})
    (root / "b" / "broken.jpg").write_text("not a picture")
    choices = ("dataset=folder", "dataset.root=pictures", "dataset.image=[3,8,8]", "norm=bn")
    choices += ("model=simplenetv2", *tiny.SMALL, "dataset.name=grays", "batch_size=4", "epochs=1")
    cache = {"GNBENCH_DATA": str(tmp_path / "data")}
    done = cli(*choices, "device=cpu", "dataset.unreadable=skip", env=cache, check=0)
    said = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert "2 classes, 15 training and 3 test pictures (test_fraction=0.2 split_seed=0)" in said
    [path] = (tmp_path / "outputs").glob("default/grays-simplenetv2-bn-bs4-seed0-*/run.json")
    record = json.loads(path.read_text())
    facts = record["dataset"]
    assert facts["class_names"] == ["a", "b"]
    assert facts["pictures"] == {"train": [10, 5], "test": [2, 1]}
    assert facts["skipped"] == ["b/broken.jpg"]
    assert len(facts["mean"]) == len(facts["std"]) == 3
    # Its network is evaluated on the pictures where they lie, in any cache.
    config = {"outputs": str(tmp_path / "outputs"), "study": None, "statistics": ["ema"]}
    config |= {"images": [2], "device": "cpu", "root": str(tmp_path / "other"), "pictures": None}
    root.rename(tmp_path / "moved")
    assert not evaluate(EvaluateConfig.parse(config))
    assert (
        f"its pictures are not in {root}: say where, with pictures=DIR" in capsys.readouterr().out
    )
    assert evaluate(EvaluateConfig.parse(config | {"pictures": str(tmp_path / "moved")}))
    [row] = csv.DictReader((path.parents[1] / "evaluations.csv").read_text().splitlines())
    assert float(row["test_error"]) == record["result"]["test_error_final"]
