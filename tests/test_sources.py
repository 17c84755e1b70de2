"""CIFAR-100 and SVHN: small files in the official formats, read as torchvision does."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import scipy.io
import torchvision

from gnbench import datasets
from gnbench.datasets import cache, sources
from gnbench.errors import DataError

# Row, column, channel tell where a value of the files must come out.
ROW, COLUMN, CHANNEL = np.meshgrid(range(32), range(32), range(3), indexing="ij")
IMAGE = (7 * ROW + 3 * COLUMN + 80 * CHANNEL) % 256


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(cache, "_unavailable", {})


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Lay down an archive of 3 + 2 images, whose sums torchvision takes for the official ones."""

    def entry(labels):
        # 3072 bytes an image: the red plane by rows, then green, then blue.
        planes = np.stack([(IMAGE.transpose(2, 0, 1) + i) % 256 for i in range(len(labels))])
        coarse = [label // 5 for label in labels]
        data = planes.astype(np.uint8).reshape(len(labels), 3072)
        return pickle.dumps({"data": data, "fine_labels": labels, "coarse_labels": coarse})

    members = {
        "train": entry([99, 0, 42]),
        "test": entry([7, 99]),
        "meta": pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}),
    }
    archive = tmp_path / sources.CIFAR100_ARCHIVE
    with tarfile.open(archive, "w:gz") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    theirs = torchvision.datasets.CIFAR100
    monkeypatch.setattr(theirs, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(theirs, "train_list", [["train", md5(members["train"])]])
    monkeypatch.setattr(theirs, "test_list", [["test", md5(members["test"])]])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": md5(members["meta"])})
    return archive


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Lay down the two files with 4 + 3 images, likewise."""
    digits = {"train": [10, 1, 9, 10], "test": [3, 10, 5]}
    split_list = {}
    for split, (url, name, _) in torchvision.datasets.SVHN.split_list.items():
        if split in digits:
            images = np.stack([(IMAGE + i) % 256 for i in range(len(digits[split]))], axis=-1)
            labels = np.array(digits[split], np.uint8)[:, None]
            scipy.io.savemat(tmp_path / name, {"X": images.astype(np.uint8), "y": labels})
            split_list[split] = [url, name, md5((tmp_path / name).read_bytes())]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
    return tmp_path / sources.SVHN_FILES["test"]


def check(dataset, train, test):
    for images, labels, wanted in (
        (dataset.train_images, dataset.train_labels, train),
        (dataset.test_images, dataset.test_labels, test),
    ):
        assert labels.tolist() == wanted
        for i, image in enumerate(images):
            assert np.array_equal(image, (IMAGE + i) % 256)


def test_cifar100_is_read_with_its_fine_labels(tmp_path, cifar100):
    check(datasets.cifar100(tmp_path), [99, 0, 42], [7, 99])


def test_svhn_is_read_with_0_for_10(tmp_path, svhn):
    check(datasets.svhn(tmp_path), [0, 1, 9, 0], [3, 0, 5])


@pytest.mark.parametrize("name", ["cifar100", "svhn"])
def test_what_is_cached_is_held_against_its_own_checksum(tmp_path, name, request, caplog):
    laid_down = request.getfixturevalue(name)
    load = getattr(datasets, name)
    first = load(tmp_path)
    laid_down.rename(tmp_path / "aside")
    assert np.array_equal(load(tmp_path).train_images, first.train_images)  # from the cache
    path = tmp_path / f"{name}.npz"
    with np.load(path) as archive:
        arrays = {key: archive[key].copy() for key in archive.files}
    arrays["test_labels"][0] += 1
    np.savez(path, **arrays)
    (tmp_path / "aside").rename(laid_down)
    assert np.array_equal(load(tmp_path).test_labels, first.test_labels)
    assert f"{path} is damaged: it differs from what was written" in caplog.text


@pytest.mark.parametrize(
    ("known", "by_hand", "said"),
    [
        ("CIFAR100", "cifar100_by_hand", r"no whole cifar-100-python\.tar\.gz"),
        ("SVHN", "svhn_by_hand", r"no whole test_32x32\.mat"),
    ],
)
def test_other_files_than_the_official_are_refused_and_what_to_lay_down_is_said(
    tmp_path, known, by_hand, said, request
):
    laid_down = request.getfixturevalue(known.lower())
    laid_down.write_bytes(laid_down.read_bytes() + b"more")
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError, match=said):
        getattr(sources, by_hand)(tmp_path, tmp_path / "work")
    # Without the network, as where none of the sources answers.
    alone = getattr(sources, known)
    alone = cache.Known(alone.name, alone.checksums, alone.sources[:1], alone.by_hand)
    with pytest.raises(DataError, match=f"{said}.* By hand: put .*{laid_down.name}.* {tmp_path}$"):
        cache.load(alone, tmp_path)


def test_the_official_files_are_those_of_torchvision():
    theirs = torchvision.datasets
    assert theirs.CIFAR100.filename == sources.CIFAR100_ARCHIVE
    names = {split: theirs.SVHN.split_list[split][1] for split in ("train", "test")}
    assert names == sources.SVHN_FILES
