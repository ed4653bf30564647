import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mlflow_ssl.evaluation.probe import STRENGTHS, fit_linear, linear_probe


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_the_fit_is_sklearns(digits, strength):
    points, labels = (part[:600] for part in digits)
    ours = fit_linear(points, labels, strength=strength)
    scaler = StandardScaler().fit(points)
    theirs = LogisticRegression(C=strength, max_iter=10_000, tol=1e-8).fit(scaler.transform(points), labels)
    probabilities = ours.logits(digits[0]).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(scaler.transform(digits[0])), atol=2e-3)
    assert (ours.predict(digits[0]).numpy() == theirs.predict(scaler.transform(digits[0]))).mean() > 0.998


def test_the_regularization_is_the_one_that_validation_likes_best(digits):
    points, labels = digits
    noisy = torch.cat(
        [points, 8 * torch.randn(len(points), 400, generator=torch.Generator().manual_seed(0)).double()], dim=1
    )
    parts = noisy[:300], labels[:300], noisy[300:900], labels[300:900]
    probe = linear_probe(*parts)
    scaler = StandardScaler().fit(parts[0])
    accuracies = {}
    for strength in STRENGTHS:
        theirs = LogisticRegression(C=strength, max_iter=10_000).fit(scaler.transform(parts[0]), parts[1])
        accuracies[strength] = theirs.score(scaler.transform(parts[2]), parts[3])
    assert probe.val_accuracy == pytest.approx(max(accuracies.values()), abs=0.005)
    assert accuracies[probe.strength] == pytest.approx(max(accuracies.values()), abs=0.005)
    assert probe.val_accuracy > accuracies[100.0]


def test_of_equally_good_ones_the_strongest_regularization_is_taken():
    points = torch.cat([torch.full((20, 2), -1.0), torch.full((20, 2), 1.0)])
    labels = torch.arange(40) // 20
    assert linear_probe(points, labels, points, labels).strength == min(STRENGTHS)


def test_dimensions_that_do_not_vary_do_no_harm():
    points = torch.tensor([[5.0, -1.0], [5.0, 1.0]]).repeat(10, 1)
    labels = torch.tensor([0, 1]).repeat(10)
    assert fit_linear(points, labels).predict(points).equal(labels)


def test_classes_that_only_the_validation_has_are_counted_as_mistakes():
    points, labels = torch.randn(30, 4), torch.arange(30) % 2
    assert linear_probe(points, labels, points, torch.full((30,), 5)).val_accuracy == 0


def test_what_cannot_be_fitted_is_refused():
    nothing = torch.empty(0, 2), torch.empty(0, dtype=torch.long)
    with pytest.raises(ValueError, match="there must be embeddings"):
        fit_linear(*nothing)
    with pytest.raises(ValueError, match="strength above 0"):
        fit_linear(torch.ones(2, 2), torch.tensor([0, 1]), strength=0)
    with pytest.raises(ValueError, match=r"^val_embeddings must be at least one"):
        linear_probe(torch.ones(2, 2), torch.tensor([0, 1]), *nothing)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_of_more_dimensions_than_points_the_fit_is_sklearns_too(digits, strength):
    pixels, labels = (part[:300] for part in digits)
    points = pixels @ torch.randn(64, 400, generator=torch.Generator().manual_seed(0)).double()
    ours = fit_linear(points[:200], labels[:200], strength=strength)
    scaler = StandardScaler().fit(points[:200])
    theirs = LogisticRegression(C=strength, max_iter=10_000, tol=1e-8).fit(scaler.transform(points[:200]), labels[:200])
    probabilities = ours.logits(points).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(scaler.transform(points)), atol=2e-3)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-3)


def test_a_start_saves_the_way_in_the_space_that_the_points_span(digits):
    pixels, labels = (part[:100] for part in digits)
    points = torch.cat([pixels, pixels], dim=1)
    whole = fit_linear(points, labels)
    again = fit_linear(points, labels, start=whole, max_iterations=1)
    torch.testing.assert_close(again.weight, whole.weight, atol=1e-3, rtol=0)
    assert not fit_linear(points, labels, max_iterations=1).weight.allclose(whole.weight, atol=1e-2)
