import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mlflow_ssl.evaluation.few_label import few_label_accuracy, few_label_rows


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels)


def test_each_class_gives_as_many_and_each_seed_others():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    rows = few_label_rows(labels, per_class=5, seed=0)
    assert np.bincount(labels[rows]).tolist() == [5, 5, 3]
    assert len(set(rows.tolist())) == 13
    assert few_label_rows(labels, per_class=5, seed=0).tolist() == rows.tolist()
    assert few_label_rows(labels, per_class=5, seed=1).tolist() != rows.tolist()


def test_a_share_keeps_the_balance_and_at_least_one():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    assert np.bincount(labels[few_label_rows(labels, share=0.1, seed=0)]).tolist() == [10, 5, 1]


@pytest.mark.parametrize(
    "drawn", [{}, {"per_class": 1, "share": 0.5}, {"per_class": 0}, {"share": 0.0}, {"share": 1.1}]
)
def test_what_cannot_be_meant_is_refused(drawn):
    with pytest.raises(ValueError, match=r"per_class"):
        few_label_rows(torch.tensor([0, 1]), seed=0, **drawn)


def test_more_labels_are_better_and_the_interval_holds_the_draws(digits):
    points, labels = digits
    parts = points[:1200], labels[:1200], points[1200:], labels[1200:]
    one, ten = (few_label_accuracy(*parts, per_class=count) for count in (1, 10))
    everything = few_label_accuracy(*parts, share=1.0)
    assert one.low < one.value < one.high < ten.low
    assert ten.value < everything.value
    assert everything.low == pytest.approx(everything.high)  # every draw is the same
