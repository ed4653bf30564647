import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from tiny import fit, labelled, pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import PixelBaseline


def pixels(loader):
    images = torch.cat([images for images, _ in loader]).flatten(1)
    return images.numpy(), torch.cat([labels for _, labels in loader]).numpy()


def test_the_baseline_is_the_vote_on_raw_pixels():
    bank, queries = labelled(6, seed=1), labelled(5, seed=2)
    trainer = quiet_trainer(callbacks=[PixelBaseline(num_neighbours=3)])
    (metrics, *_) = trainer.validate(tiny_method(), [bank, queries], verbose=False)
    peer = KNeighborsClassifier(3, metric="cosine", algorithm="brute").fit(*pixels(bank))
    expected = peer.score(*pixels(queries))
    assert 0 < expected < 1
    assert metrics["baseline_acc_pixels"] == pytest.approx(expected)


def test_the_baseline_is_not_measured_again_during_training():
    trainer = fit(tiny_method(), pairs(1), [labelled(1), labelled(1)], max_epochs=1, callbacks=[PixelBaseline(1)])
    assert "baseline_acc_pixels" not in trainer.callback_metrics
