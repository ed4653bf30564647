import pytest
import torch
from tiny import fit, labelled, pairs, tiny_method

from mlflow_ssl.callbacks import EmbeddingRank
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.evaluation.health import deviation_per_dimension, mean_cosine, rankme, uniformity


def logged(validation, **options):
    trainer = fit(tiny_method(), pairs(1), validation, max_epochs=1, callbacks=[EmbeddingRank(**options)])
    return trainer.lightning_module, trainer.callback_metrics.get("embedding/rankme")


def embedded(method, batches):
    method.eval()
    with torch.no_grad():
        return [method.embed(images) for images, _ in batches]


def test_the_rank_is_of_all_validation_images():
    queries = labelled(3)
    method, rank = logged([queries])
    assert rank.item() == pytest.approx(rankme(torch.cat(embedded(method, queries))), rel=1e-5)


def test_beside_a_bank_it_is_that_of_the_queries():
    bank, queries = labelled(2, seed=1), labelled(3, seed=2)
    method, rank = logged([bank, queries])
    assert rank.item() == pytest.approx(rankme(torch.cat(embedded(method, queries))), rel=1e-5)


def test_of_many_images_it_is_that_of_some_of_each_batch():
    queries = labelled(3)
    method, rank = logged([queries], max_images=6)
    some = torch.cat([batch[:2] for batch in embedded(method, queries)])
    assert rank.item() == pytest.approx(rankme(some), rel=1e-5)


def test_images_that_could_not_be_read_do_not_count():
    queries = labelled(2)
    queries.batches[0][1][1] = BAD_LABEL
    method, rank = logged([queries])
    first, second = embedded(method, queries)
    good = torch.cat([first[[0, 2, 3]], second])
    assert rank.item() == pytest.approx(rankme(good), rel=1e-5)


def test_the_spread_is_that_of_the_same_images():
    queries = labelled(3)
    trainer = fit(tiny_method(), pairs(1), [queries], max_epochs=1, callbacks=[EmbeddingRank()])
    embeddings = torch.cat(embedded(trainer.lightning_module, queries))
    for measure in (deviation_per_dimension, mean_cosine, uniformity):
        name = measure.__name__.removesuffix("_per_dimension")
        assert trainer.callback_metrics[f"embedding/{name}"].item() == pytest.approx(measure(embeddings), rel=1e-4)


def test_one_image_has_a_rank_and_no_spread():
    trainer = fit(tiny_method(), pairs(1), [labelled(1)], max_epochs=1, callbacks=[EmbeddingRank(max_images=1)])
    assert "embedding/rankme" in trainer.callback_metrics
    assert "embedding/deviation" not in trainer.callback_metrics


def test_without_validation_there_is_none():
    assert logged(None)[1] is None


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"^max_images must be at least 1, got 0$"):
        EmbeddingRank(max_images=0)
