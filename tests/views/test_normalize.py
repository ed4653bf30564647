import albumentations as A
import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from test_operations import picture
from test_view_transforms import MEAN, STD
from tiny import fit, tiny_method

from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.transforms import to_tensor
from mlflow_ssl.views import Normalize


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_normalized_and_lie_as_convolutions_like_them(memory_format):
    images = [picture(), 255 - picture()]
    expected = torch.stack([to_tensor(A.Normalize(MEAN, STD)(image=image)["image"]) for image in images])
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    before = batch.clone()
    normalized = Normalize(mean=MEAN, std=STD)(batch)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, expected)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert batch.equal(before)


def test_what_is_no_bytes_has_been_normalized():
    images = torch.rand(2, 3, 4, 4)
    assert Normalize(mean=MEAN, std=STD)(images) is images


class FirstBatch(Callback):
    """Keep the views that the first step is given."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.views = batch[0]


def first_views(folder, augmentation, **options):
    """Return the first batch as the workers hand it over, and as the network gets it."""
    normalize = Normalize(mean=MEAN, std=STD)
    datamodule = SSLDataModule(
        str(folder),
        TwoAugmentationDataset([augmentation, augmentation]),
        device_transforms=[normalize, normalize],
        batch_size=4,
        val_size=0.0,
        test_size=0.0,
        **options,
    )
    seen = FirstBatch()
    fit(tiny_method(), datamodule, max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[seen])
    return next(iter(datamodule.train_dataloader()))[0], seen.views


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_hand_over_bytes_and_the_network_gets_what_the_workers_would_have_normalized(image_folder, num_workers):
    folder, crop = image_folder({"a": 4, "b": 4}), A.RandomCrop(8, 8)
    handed, bytes_first = first_views(folder, A.Compose([crop]), num_workers=num_workers)
    whole, float_first = first_views(folder, A.Compose([crop, A.Normalize(MEAN, STD)]), num_workers=num_workers)
    assert {(view.dtype, view.is_contiguous(memory_format=torch.channels_last)) for view in handed} == {
        (torch.uint8, True)
    }
    assert {view.dtype for view in whole} == {torch.float32}
    for ours, theirs in zip(bytes_first, float_first, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)  # and not normalized twice
