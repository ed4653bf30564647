import math

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from tiny import Backbone, Batches, labelled, quiet_trainer
from torch.optim import SGD

from mlflow_ssl.callbacks import BestCheckpoint, ClassificationEvaluation
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.evaluation.confusion import macro_f1
from mlflow_ssl.methods import Classifier


def method():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Classifier(Backbone(), num_classes=3, optimizer=SGD)
        torch.nn.init.normal_(made.head.linear.weight)
    return made


def logits_of(classifier, batches):
    classifier.eval()
    with torch.no_grad():
        return torch.cat([classifier.classify(classifier.embed(images)) for images, _ in batches])


@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
def test_accuracy_mean_f1_and_loss_are_those_of_sklearn():
    batches, evaluation, classifier = labelled(5), ClassificationEvaluation(), method()
    (metrics,) = quiet_trainer(callbacks=[evaluation]).validate(classifier, batches, verbose=False)
    logits, truth = logits_of(classifier, batches), torch.cat([labels for _, labels in batches])
    assert metrics["val_acc"] == pytest.approx(accuracy_score(truth, logits.argmax(1)))
    assert metrics["val_f1"] == pytest.approx(f1_score(truth, logits.argmax(1), average="macro"))
    assert metrics["val_loss"] == pytest.approx(log_loss(truth, logits.double().softmax(1), labels=[0, 1, 2]), rel=1e-5)
    assert evaluation.evaluated.predicted.equal(logits.argmax(1))
    assert evaluation.state_dict() == {"val_acc": pytest.approx(metrics["val_acc"])}


def test_images_that_cannot_be_read_do_not_count():
    batches, evaluation, classifier = list(labelled(3)), ClassificationEvaluation(), method()
    images, labels = batches[1]
    batches[1] = (images, torch.full_like(labels, BAD_LABEL))
    quiet_trainer(callbacks=[evaluation]).test(classifier, Batches(batches), verbose=False)
    assert evaluation.evaluated.rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert evaluation.evaluated.predicted.equal(logits_of(classifier, [batches[0], batches[2]]).argmax(1))


def test_a_class_that_neither_occurs_nor_is_said_does_not_count():
    truth, predicted = [0, 0, 1, 1], [0, 1, 1, 1]
    confusion = torch.zeros(4, 4, dtype=torch.long)
    for row, column in zip(truth, predicted, strict=True):
        confusion[row, column] += 1
    assert macro_f1(confusion) == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert math.isnan(macro_f1(torch.zeros(2, 2, dtype=torch.long)))


@pytest.mark.parametrize(
    ("values", "kept"), [([0.5, 0.9, 0.9, 0.7], 2), ([0.5, 0.9, 0.8, 0.7], 1), ([0.5, 0.6, 0.7, 0.7], 3)]
)
def test_of_equally_good_checkpoints_the_last_is_kept(tmp_path, values, kept):
    classifier, callback = (
        method(),
        BestCheckpoint(dirpath=tmp_path, filename="best", monitor="val_acc", mode="max", enable_version_counter=False),
    )
    classifier.on_validation_epoch_end = lambda: classifier.log("val_acc", values[classifier.current_epoch])
    trainer = quiet_trainer(callbacks=[callback], enable_checkpointing=True, max_epochs=4)
    trainer.fit(classifier, labelled(2), labelled(1))
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == kept
