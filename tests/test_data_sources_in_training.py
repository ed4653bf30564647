"""Whole trainings of two epochs on data as people have them."""

import joblib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images
from shards import write_shards
from training import only_output, only_run, train

pytestmark = pytest.mark.slow


def history(client, run, metric):
    return [entry.value for entry in client.get_metric_history(run.info.run_id, metric)]


def trained(client, data_path, *words):
    """Train, and return the run."""
    assert train(data_path, *words) == 0
    run = only_run(client)
    assert run.info.status == "FINISHED"
    return run


def test_a_flat_folder_without_labels_is_judged_by_the_rank_of_its_embeddings(store, tmp_path, caplog):
    write_images(tmp_path / "flat", {"": 40})
    run = trained(store, tmp_path / "flat")
    assert "val_acc" not in run.data.metrics
    ranks = history(store, run, "embedding/rankme")
    assert len(ranks) == 2  # before the training, and at its end
    assert all(1 <= rank <= 12 for rank in ranks)
    assert "the best checkpoint is the one with the highest embedding/rankme" in caplog.text
    assert (only_output() / "checkpoints" / "best.ckpt").exists()


def test_nested_folders_without_labels_have_no_classes(store, tmp_path):
    write_images(tmp_path / "nested", {"2025/monday": 20, "2026/tuesday": 20})
    run = trained(store, tmp_path / "nested", "datamodule.labels=none")
    assert "val_acc" not in run.data.metrics
    assert run.data.metrics["embedding/rankme"] >= 1


def test_a_training_without_labels_stops_when_the_rank_has_ceased_to_rise(store, tmp_path):
    write_images(tmp_path / "flat", {"": 40})
    stop = "{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: embedding/rankme, mode: max, patience: 1"
    words = ["trainer.max_epochs=6", "trainer.check_val_every_n_epoch=1", "callbacks.pictures=null"]
    run = trained(store, tmp_path / "flat", *words, f"+callbacks.early_stop={stop}, min_delta: 1000}}")
    assert len(history(store, run, "embedding/rankme")) == 3  # before the training, the first, and one not better


def test_a_list_with_labels_and_splits(store, tmp_path):
    write_images(tmp_path / "pictures", {"x": 20, "y": 20})
    split = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    lines = [f"{name}/{n:03d}.png,{name}s,{split[n]}" for name in "xy" for n in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["file,species,split", *lines]))
    run = trained(
        store,
        tmp_path / "list.csv",
        "datamodule.list_folder=" + str(tmp_path / "pictures"),
        "datamodule.list_columns={path: file, label: species}",
    )
    assert 0 <= run.data.metrics["val_acc"] <= 1
    index = pq.read_table(only_output() / "data" / "index.parquet")
    assert sorted(index["split"].to_pylist()) == sorted(split * 2)
    assert set(index["class_name"].to_pylist()) == {"xs", "ys"}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_streamed(store, tmp_path, workers):
    write_shards(tmp_path / "shards", [20] * 4)
    run = trained(
        store,
        tmp_path / "shards" / "shard-{000..003}.tar",
        f"datamodule.num_workers={workers}",
        "datamodule.val_size=0.2",
    )
    assert len(history(store, run, "train/loss")) >= 8
    assert 0 <= run.data.metrics["val_acc"] <= 1
    assert 0 <= run.data.metrics["train/data_wait_share"] <= 1


def test_a_saved_data_set(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    from shards import png

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(60)], "label": [n % 2 for n in range(60)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    assert 0 <= trained(store, tmp_path / "set").data.metrics["val_acc"] <= 1


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_cached_images_are_decoded_once_for_all_epochs_and_runs(store, tmp_path, monkeypatch, kind):
    from mlflow_ssl.datasets import image

    write_images(tmp_path / "pictures", {"x": 20, "y": 20}, size=40)
    decoded = []
    decode = image.decode
    monkeypatch.setattr(image, "decode", lambda data, **options: decoded.append(data) or decode(data, **options))
    words = (f"datamodule.cache={kind}", "callbacks.pictures=null", "datamodule.cache_shorter_side=20")
    run = trained(store, tmp_path / "pictures", *words)
    assert len(decoded) == len(set(decoded)) == 40
    decoded.clear()
    if kind == "disk":  # one in memory ends with its run
        assert train(tmp_path / "pictures", *words) == 0
        assert not decoded
        losses = [history(store, each, "train/loss") for each in store.search_runs([run.info.experiment_id])]
        assert losses[0] == losses[1]


def test_views_finished_on_the_device(store, tmp_path):
    write_images(tmp_path / "pictures", {"x": 20, "y": 20}, size=40)
    words = ("experiment=base/ssl/byol", "transforms=byol_device", "backbone=timm", "backbone.model_name=resnet10t")
    run = trained(
        store, tmp_path / "pictures", *words, "scheduler.warmup_epochs=1", "trainer.check_val_every_n_epoch=1"
    )
    assert 0 <= run.data.metrics["val_acc"] <= 1
    assert all(0 <= loss <= 8 for loss in history(store, run, "train/loss"))
    assert (only_output() / "images").exists()


def test_more_images_without_labels_are_trained_on_and_not_measured_by(store, tmp_path):
    write_images(tmp_path / "labelled", {"x": 20, "y": 20})
    write_images(tmp_path / "more", {"z": 30}, seed=5)
    run = trained(store, tmp_path / "labelled", f"datamodule.unlabelled_path={tmp_path / 'more'}")
    assert run.data.metrics["data/images"] == 70
    datamodule = joblib.load(only_output() / "data" / "datamodule.joblib")
    train_images = datamodule.index.split("train")
    assert len(train_images) == len(datamodule.bank) + 30
    assert datamodule.classes == ["x", "y"]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_images_that_break_during_the_training_are_listed_and_counted(store, tmp_path, policy, caplog):
    write_images(tmp_path / "pictures", {"x": 24, "y": 24})
    (tmp_path / "pictures" / "x" / "000.png").write_bytes(b"")
    words = (f"datamodule.on_bad_image={policy}", "datamodule.verify=none", "datamodule.test_size=0.2")
    run = trained(store, tmp_path / "pictures", *words)
    (line,) = (only_output() / "data" / "bad_images.csv").read_text().splitlines()[1:]
    assert line == "x/000.png,is empty"
    assert history(store, run, "data/bad_images")[-1] == 1
    assert "can no longer be read" in caplog.text


def test_the_index_of_a_run_is_a_table_that_anybody_reads(store, tmp_path):
    write_images(tmp_path / "pictures", {"x": 20, "y": 20})
    run = trained(store, tmp_path / "pictures")
    file = store.download_artifacts(run.info.run_id, "data/index.parquet", str(tmp_path))
    table = pq.read_table(file)
    assert len(table) == 40
    assert {"path", "class_name", "split", "size", "mtime_ns", "digest"} <= set(table.column_names)
    assert isinstance(table, pa.Table)
