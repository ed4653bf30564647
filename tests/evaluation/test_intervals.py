import numpy as np
import pytest
import scipy.stats
import torch

from mlflow_ssl.evaluation.intervals import bootstrap_accuracy, bootstrap_difference, bootstrap_mean, student_interval


def values(count=200, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).beta(5, 2, count))


def test_the_bootstrap_is_scipys():
    ours = bootstrap_mean(values())
    theirs = scipy.stats.bootstrap((values().numpy(),), np.mean, n_resamples=9999, method="percentile", rng=1)
    assert ours.value == pytest.approx(values().mean().item())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=1e-3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=1e-3)


def test_of_an_accuracy_it_is_the_binomial_one():
    labels = torch.zeros(500, dtype=torch.long)
    predicted = (torch.arange(500) % 5 == 0).long()  # 80 % right
    interval = bootstrap_accuracy(predicted, labels)
    margin = 1.96 * (0.8 * 0.2 / 500) ** 0.5
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.8 - margin, abs=0.004)
    assert interval.high == pytest.approx(0.8 + margin, abs=0.004)


def test_it_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for number in range(300):
        right = torch.from_numpy((rng.random(150) < 0.7).astype(np.float64))
        _, low, high = bootstrap_mean(right, confidence=0.9, num_resamples=500, seed=number)
        held += low <= 0.7 <= high
    assert 0.85 < held / 300 < 0.95


def test_it_depends_on_its_seed_alone_and_not_on_the_memory_it_may_take():
    assert bootstrap_mean(values(), seed=3) == bootstrap_mean(values(), seed=3)
    assert bootstrap_mean(values(), seed=3) != bootstrap_mean(values(), seed=4)
    small = bootstrap_mean(values(), chunk_size=300)
    assert small.low == pytest.approx(bootstrap_mean(values()).low, abs=2e-3)


def test_what_is_hard_for_both_models_cancels_out():
    hard = torch.from_numpy(np.random.default_rng(0).random(400))
    first, second = hard, hard - 0.01
    paired = bootstrap_difference(first, second)
    assert paired.value == pytest.approx(0.01)
    assert paired.high - paired.low < 1e-6 < bootstrap_mean(first).high - bootstrap_mean(first).low


def test_noise_is_taken_for_a_difference_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    told_apart = 0
    for number in range(200):
        one, other = (torch.from_numpy((rng.random(150) < 0.8).astype(float)) for _ in range(2))
        _, low, high = bootstrap_difference(one, other, num_resamples=500, seed=number)
        told_apart += not low <= 0 <= high
    assert told_apart / 200 < 0.1


def test_students_is_scipys():
    draws = torch.tensor([0.71, 0.74, 0.69, 0.73, 0.70])
    ours = student_interval(draws, confidence=0.9)
    theirs = scipy.stats.ttest_1samp(draws.double().numpy(), 0).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: student_interval(torch.ones(1)),
            r"^values must be at least 2 to know their spread, got 1; add seeds$",
        ),
        (lambda: bootstrap_mean(torch.ones(0)), r"^values must have the shape \(Q,\), got \(0,\)$"),
        (lambda: bootstrap_mean(torch.tensor([1.0, torch.nan])), r"^values must be finite, got 1 that are not$"),
        (lambda: bootstrap_mean(torch.ones(3), confidence=1.0), r"^confidence must be between 0 and 1, got 1.0$"),
        (lambda: bootstrap_accuracy(torch.ones(3), torch.ones(2)), r"^predicted and labels must have one shape"),
        (lambda: bootstrap_difference(torch.ones(3), torch.ones(2)), r"^first and second must have one shape"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
