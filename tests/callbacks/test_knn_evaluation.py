import math

import albumentations as A
import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from tiny import fit, labelled, pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import KNNEvaluation
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.evaluation import linear_accuracy

K, TEMPERATURE = 5, 0.001  # so low that the nearest alone decides


def embedded(method, loader):
    """Return clean embeddings and labels of a loader."""
    method.eval()
    with torch.no_grad():
        parts = [(method.online.backbone(images), labels) for images, labels in loader]
    return torch.cat([e for e, _ in parts]), torch.cat([label for _, label in parts])


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def accuracies_by_hand(method, bank, queries):
    """Return the accuracy by majority and by weighted vote, in plain Python."""
    (bank, labels), (queries, truth) = embedded(method, bank), embedded(method, queries)
    right = [0, 0]
    for query, true in zip(queries.tolist(), truth.tolist(), strict=True):
        near = sorted((-cosine(query, entry), c) for entry, c in zip(bank.tolist(), labels.tolist(), strict=True))[:K]
        for number, vote in enumerate((lambda s: 1, lambda s: math.exp((s - 1) / TEMPERATURE))):
            votes = [sum(vote(-s) for s, c in near if c == which) for which in range(3)]
            right[number] += votes.index(max(votes)) == true
    return [count / len(truth) for count in right]


@pytest.fixture
def loaders():
    return labelled(5, seed=1), labelled(4, seed=2)


def evaluation():
    return KNNEvaluation(num_neighbours=K, temperature=TEMPERATURE)


def test_val_acc_is_the_accuracy_by_hand(loaders):
    method = tiny_method()
    (metrics, *_) = quiet_trainer(callbacks=[evaluation()]).validate(method, list(loaders), verbose=False)
    majority, weighted = accuracies_by_hand(method, *loaders)
    assert 0 < majority < 1
    assert majority != weighted
    assert metrics["val_acc"] == pytest.approx(majority)
    assert metrics["val_acc_weighted"] == pytest.approx(weighted)


def test_val_acc_after_a_training_is_of_the_trained_backbone_in_evaluation_mode(loaders):
    method = tiny_method()
    trainer = fit(method, pairs(4), list(loaders), max_epochs=1, callbacks=[evaluation()])
    majority, weighted = accuracies_by_hand(method, *loaders)
    assert trainer.callback_metrics["val_acc"].item() == pytest.approx(majority)
    assert trainer.callback_metrics["val_acc_weighted"].item() == pytest.approx(weighted)


def test_bf16_training_is_validated(loaders):
    trainer = fit(
        tiny_method(), pairs(2), list(loaders), max_epochs=1, precision="bf16-mixed", callbacks=[evaluation()]
    )
    assert 0 <= trainer.callback_metrics["val_acc"] <= 1


def test_the_test_gives_neighbours_and_linear_classifier(loaders):
    method = tiny_method()
    (metrics, *_) = quiet_trainer(callbacks=[evaluation()]).test(method, list(loaders), verbose=False)
    majority, weighted = accuracies_by_hand(method, *loaders)
    linear = linear_accuracy(*embedded(method, loaders[0]), *embedded(method, loaders[1]))
    assert metrics == pytest.approx({"test_acc": majority, "test_acc_weighted": weighted, "test_acc_linear": linear})


def test_each_validation_begins_anew(loaders):
    trainer = quiet_trainer(callbacks=[evaluation()])
    method = tiny_method()
    first, second = (trainer.validate(method, list(loaders), verbose=False) for _ in range(2))
    assert first == second


class Validations(Callback):
    def __init__(self):
        self.epochs = []

    def on_validation_start(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch + 1)


@pytest.mark.parametrize(("every", "validated"), [(2, [2, 4, 5]), (5, [5]), (10, [5]), (1, [1, 2, 3, 4, 5])])
def test_the_last_epoch_is_validated_whatever_the_interval_divides(every, validated, loaders):
    validations = Validations()
    fit(
        tiny_method(),
        pairs(1),
        list(loaders),
        max_epochs=5,
        check_val_every_n_epoch=every,
        callbacks=[evaluation(), validations],
    )
    assert validations.epochs == validated


def test_what_was_evaluated_is_kept_until_the_next_stage_begins(loaders):
    method, knn = tiny_method(), evaluation()
    assert knn.evaluated is None
    (metrics, *_) = quiet_trainer(callbacks=[knn]).validate(method, list(loaders), verbose=False)
    (bank, labels), (queries, truth) = embedded(method, loaders[0]), embedded(method, loaders[1])
    for kept, expected in ((knn.evaluated.bank, bank), (knn.evaluated.queries, queries)):
        torch.testing.assert_close(kept, expected)
    assert knn.evaluated.labels.equal(labels)
    assert knn.evaluated.truth.equal(truth)
    assert (knn.evaluated.predicted == truth).double().mean() == pytest.approx(metrics["val_acc"])
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, *_):
            seen.append(("train", knn.evaluated))

        def on_validation_batch_start(self, *_):
            seen.append(("validate", knn.evaluated))

        def on_test_batch_start(self, *_):
            seen.append(("test", knn.evaluated))

    method = tiny_method()
    trainer = fit(method, pairs(1), list(loaders), max_epochs=2, callbacks=[knn, Look()])
    trainer.test(method, list(loaders), verbose=False)
    assert {stage for stage, _ in seen} == {"train", "validate", "test"}
    assert [stage for stage, evaluated in seen if evaluated is not None] == []


def test_a_bank_smaller_than_the_neighbours_is_refused():
    with pytest.raises(ValueError, match=r"^max_bank must be at least num_neighbours 20, got 19"):
        KNNEvaluation(max_bank=19)


class Run(Logger):
    """A logger whose run takes tags."""

    name, version = "run", "0"

    def __init__(self):
        super().__init__()
        self.run, self.tags = self, {}

    def set_tags(self, tags):
        self.tags |= tags

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


def test_the_run_says_which_images_a_bounded_bank_has_and_neighbours_are_among_them(image_folder, caplog):
    clean = A.Compose([A.Resize(6, 6), A.Normalize()])
    module = SSLDataModule(
        str(image_folder({"a": 12, "b": 12, "c": 12}, size=6)),
        augmentation_dataset=TwoAugmentationDataset([clean, clean]),
        val_transform=clean,
        test_transform=clean,
        num_workers=0,
        batch_size=5,
    )
    method, knn, run = tiny_method(), KNNEvaluation(K, TEMPERATURE, max_bank=9), Run()
    with caplog.at_level("INFO"):
        trainer = quiet_trainer(callbacks=[knn], logger=run)
        (metrics, *_) = trainer.validate(method, module, verbose=False)
        trainer.test(method, module, verbose=False)
    words = "9 of 24 labelled images, drawn by class with seed 42"
    assert run.tags == {"data.bank": words}
    assert [record.message for record in caplog.records if "neighbours" in record.message] == [
        f"neighbours are looked for among {words}"
    ]
    bank, queries = module.val_dataloader()
    assert sum(len(labels) for _, labels in bank) == 9
    majority, _ = accuracies_by_hand(method, bank, queries)
    assert metrics["val_acc"] == pytest.approx(majority)
    shown = module.evaluated_images("bank")
    for row, embedding in zip(knn.evaluated.bank_rows.tolist(), knn.evaluated.bank, strict=True):
        torch.testing.assert_close(method.embed(shown[row][0][None])[0], embedding, rtol=0, atol=1e-6)


def test_a_sanity_check_is_no_evaluation(loaders):
    knn = evaluation()
    at_start = []

    class Look(Callback):
        def on_sanity_check_end(self, *_):
            at_start.append(knn.evaluated)

    fit(tiny_method(), pairs(1), list(loaders), max_epochs=1, num_sanity_val_steps=1, callbacks=[knn, Look()])
    assert at_start == [None]
