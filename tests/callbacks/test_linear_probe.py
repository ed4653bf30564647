import copy

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningDataModule
from tiny import Batches, fit, quiet_trainer, tiny_method
from torch import nn

from mlflow_ssl.callbacks import LastCheckpoint, LinearProbe
from mlflow_ssl.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def coloured(num_batches, batch_size=12, seed=0, unlabelled=False):
    """Return batches of pairs of views whose class is the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        labels = torch.arange(batch_size) % 3
        views = 0.1 * torch.randn(2, batch_size, 3, 6, 6, generator=generator)
        views[:, torch.arange(batch_size), labels] += 1
        batches.append((tuple(views), labels - 3 * unlabelled))
    return batches


def clean(batches):
    return Batches([(views[0], labels) for views, labels in batches])


class Images(LightningDataModule):
    """Batches, and how many classes there are."""

    def __init__(self, batches, *, num_classes=3):
        super().__init__()
        self.batches = batches
        self.classes = ["x"] * num_classes

    def train_dataloader(self):
        return Batches(self.batches)

    def val_dataloader(self):
        return [clean(coloured(2, seed=7)), clean(coloured(2, seed=8))]


def train(probe, images, method=None, *, epochs=3, callbacks=(), **options):
    method = tiny_method() if method is None else method
    return fit(method, images, max_epochs=epochs, callbacks=[probe, *callbacks], **options)


def test_it_learns_what_the_embeddings_know():
    trainer = train(LinearProbe(), Images(coloured(20)), epochs=4)
    assert trainer.callback_metrics["val_acc_linear"] > 0.9


def test_a_step_is_sgd_on_the_embeddings_of_both_views():
    probe, batches = LinearProbe(0.5), coloured(1)
    method = tiny_method(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    before = copy.deepcopy(method).train()
    train(probe, Images(batches), method, epochs=1, limit_val_batches=0)
    (views, labels) = batches[0]
    with torch.no_grad():
        embeddings = torch.cat([before.online.backbone(view) for view in views])
    classifier = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    F.cross_entropy(classifier(embeddings), labels.repeat(2)).backward()
    stored = probe.state_dict()["classifier"]
    torch.testing.assert_close(stored["1.weight"], -0.5 * classifier[1].weight.grad)
    torch.testing.assert_close(stored["1.bias"], -0.5 * classifier[1].bias.grad)


def test_the_network_does_not_notice():
    alone, watched = tiny_method(), tiny_method()
    torch.manual_seed(0)
    train(Callback(), Images(coloured(5)), alone)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    train(LinearProbe(), Images(coloured(5)), watched)
    assert torch.get_rng_state().equal(state)
    for mine, theirs in zip(alone.parameters(), watched.parameters(), strict=True):
        assert mine.equal(theirs)
    assert not watched.online.backbone._forward_hooks


def test_images_without_a_class_teach_nothing():
    probe = LinearProbe()
    train(probe, Images(coloured(3, unlabelled=True)), limit_val_batches=0)
    assert not probe.state_dict()["classifier"]["1.weight"].any()


@pytest.mark.parametrize("count", [0, 1])
def test_without_classes_there_is_none(count):
    probe = LinearProbe()
    trainer = train(probe, Images(coloured(2), num_classes=count))
    assert "val_acc_linear" not in trainer.callback_metrics
    assert probe.state_dict() == {}


class StoppedError(Exception):
    pass


class StopsAfter(Callback):
    def __init__(self, checkpoint, epochs):
        self.checkpoint, self.epochs = checkpoint, epochs

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epochs:
            self.checkpoint.save(trainer)
            raise StoppedError


def test_it_goes_on_where_it_was(tmp_path):
    whole, before, after = LinearProbe(), LinearProbe(), LinearProbe()
    images, options = Images(coloured(4)), {"plugins": [AtomicCheckpointIO()], "limit_val_batches": 0}
    train(whole, images, **options)
    checkpoint = LastCheckpoint(str(tmp_path))
    with pytest.raises(StoppedError):
        train(before, images, callbacks=[StopsAfter(checkpoint, 2)], **options)
    trainer = quiet_trainer(max_epochs=3, callbacks=[after, LastCheckpoint(str(tmp_path))], **options)
    trainer.fit(tiny_method(), images, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, value in whole.state_dict()["classifier"].items():
        assert after.state_dict()["classifier"][name].equal(value), name


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^learning_rate must be above 0, got 0$"):
        LinearProbe(0)
