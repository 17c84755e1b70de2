"""The balanced error: from a run's last epoch to the tables of its study."""

import json

import numpy as np
import pytest

from gnbench.aggregate.statistics import summarize
from gnbench.aggregate.study import read_study
from gnbench.datasets import Dataset
from gnbench.runs.directory import balanced_error, read_correct
from gnbench.runs.runner import run
from tests import tiny


def test_against_hand_arithmetic():
    labels = np.array([0, 0, 0, 0, 2, 2, 5])
    correct = np.array([1, 1, 1, 0, 0, 1, 0], bool)
    # 1/4, 1/2 and 1/1 are wrong; there is no class 1, 3 or 4.
    assert balanced_error(correct, labels) == pytest.approx(100 * (0.25 + 0.5 + 1) / 3)
    assert balanced_error(np.ones(7, bool), labels) == 0
    assert balanced_error(np.zeros(7, bool), labels) == 100


def test_of_classes_of_one_size_it_is_the_error_to_the_bit():
    rng = np.random.default_rng(0)
    for classes, each in ((10, 1000), (7, 13), (3, 100)):
        labels = rng.permutation(np.repeat(np.arange(classes), each))
        correct = rng.random(classes * each) < 0.7
        wrong = int((~correct).sum())
        assert balanced_error(correct, labels) == 100 * wrong / len(labels)


def skewed(root=None):
    """Return the tiny dataset with 14, 4, 1 and 1 test images of the four classes."""
    whole = tiny.dataset()
    labels = whole.test_labels.clone()
    labels[:] = 0
    labels[10:14], labels[14], labels[15] = 1, 2, 3
    return Dataset(whole.train_images, whole.train_labels, whole.test_images, labels)


def test_a_run_records_it_and_a_study_averages_it(tiny_config, tmp_path):
    own = f"dataset._target_={__name__}.skewed"
    records = []
    for seed in (0, 1):
        config = tiny_config(own, f"seed={seed}", "study=skewed", *tiny.SMALL)
        record = run(config)
        correct = read_correct(config.run_dir / "correct.npy", 20)
        labels = skewed().test_labels.numpy()
        rates = [100 * (1 - correct[labels == label].mean()) for label in range(4)]
        assert record["result"]["balanced_test_error"] == pytest.approx(np.mean(rates))
        records.append(record["result"]["balanced_test_error"])
    balanced = run(tiny_config("study=even", *tiny.SMALL))["result"]
    assert balanced["balanced_test_error"] == balanced["test_error_final"]
    runs = read_study(tmp_path / "outputs" / "skewed").runs
    assert sorted(runs["balanced_test_error"]) == sorted(records)
    means = summarize(runs)["balanced_test_error_mean"]
    assert means.tolist() == pytest.approx([np.mean(records)])


def test_runs_of_earlier_versions_have_none(tiny_config, tmp_path):
    config = tiny_config(*tiny.SMALL)
    run(config)
    path = config.run_dir / "run.json"
    record = json.loads(path.read_text())
    del record["result"]["balanced_test_error"]
    path.write_text(json.dumps(record))
    runs = read_study(tmp_path / "outputs" / "default").runs
    assert "balanced_test_error" not in runs
    assert "balanced_test_error_mean" not in summarize(runs)
