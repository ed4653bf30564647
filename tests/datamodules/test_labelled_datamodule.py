import pytest

from mlflow_ssl.datamodules import LabelledDataModule
from mlflow_ssl.errors import InputError


def module(folder, **kwargs):
    return LabelledDataModule(str(folder), num_workers=0, batch_size=4, **kwargs)


@pytest.mark.parametrize(
    ("counts", "settings", "found"),
    [({"only": 12}, {}, r"got 1 \(only\)"), ({"a": 9, "b": 9}, {"labels": "none"}, r"got 0 \(none\)")],
)
def test_less_than_two_classes_are_one_line(image_folder, counts, settings, found):
    with pytest.raises(InputError, match=rf"training images of at least two classes, {found}: .*class folders"):
        _ = module(image_folder(counts), **settings).index


def test_images_without_a_class_are_left_out_of_every_loader(image_folder):
    folder = image_folder({"a": 12, "b": 12})
    extra = image_folder({"x": 5}, name="extra", seed=1)
    datamodule = module(folder, unlabelled_path=str(extra))
    assert len(datamodule.index.split("train")) == len(datamodule.images_of("train")) + 5
    datamodule.setup()
    loaders = (datamodule.train_dataloader(), datamodule.clean_train_dataloader(), datamodule.val_dataloader())
    counts = [sum(len(labels) for _, labels in loader) for loader in loaders]
    assert counts[1:] == [len(datamodule.images_of(split)) for split in ("train", "val")]
    assert all(label >= 0 for loader in loaders for _, labels in loader for label in labels.tolist())
