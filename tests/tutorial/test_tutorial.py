"""Quadra's BYOL tutorial, with the package's name changed and nothing else, composes, builds and trains."""

from pathlib import Path

import pytest

from mlflow_ssl.cli import main
from mlflow_ssl.config import compose_config, config_folder, resolve

# whole trainings earn Lightning's advice on loaders and MLflow's on type hints; warnings are errors in unit tests
pytestmark = pytest.mark.filterwarnings("default")

HERE = Path(__file__).parent
EXPERIMENTS = ["byol", "byol_bf16", "byol_transforms"]


@pytest.fixture
def tutorial(store, monkeypatch):
    (Path.cwd() / "configs").symlink_to(HERE / "configs")
    return store


def test_the_base_experiment_is_the_tutorials():
    shipped = config_folder() / "experiment" / "base" / "ssl" / "byol.yaml"
    assert shipped.read_text() == (HERE / "base_ssl_byol.yaml").read_text()


@pytest.mark.usefixtures("tutorial")
def test_the_custom_experiment_composes_as_it_stands():
    config = resolve(compose_config(["experiment=custom_experiment/byol"]))
    assert config.backbone.model_name == "vit_tiny_patch16_224"
    assert (config.trainer.precision, list(config.trainer.devices)) == ("16-mixed", [2])
    assert (config.trainer.max_epochs, config.datamodule.data_path) == (1000, "/path/to/the/dataset")
    assert (config.datamodule.batch_size, config.optimizer.lr) == (256, 0.4)


@pytest.mark.usefixtures("tutorial")
def test_the_bf16_variant_has_the_bf16_trainer():
    config = resolve(compose_config(["experiment=custom_experiment/byol_bf16"]))
    assert config.trainer.precision == "bf16-mixed"


@pytest.mark.usefixtures("tutorial")
def test_the_old_spelling_of_the_crop_gives_crops_of_that_size():
    config = resolve(compose_config(["experiment=custom_experiment/byol_transforms", "transforms.input_width=96"]))
    crop = config.datamodule.augmentation_dataset.transform[0].transforms[0]
    assert list(crop["size"]) == [224, 96]
    assert "height" not in crop


@pytest.mark.usefixtures("tutorial")
def test_a_gpu_trainer_without_a_gpu_names_the_trainer_to_use(image_folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["experiment=custom_experiment/byol", f"data_path={image_folder({'a': 2})}"]) == 2
    assert "use trainer=lightning_cpu" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_tutorials_experiments_train_on_a_cpu(tutorial, image_folder, experiment):
    words = [
        f"experiment=custom_experiment/{experiment}",
        f"data_path={image_folder({'a': 16, 'b': 16})}",
        "trainer=lightning_cpu",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "datamodule.batch_size=4",
        "datamodule.num_workers=0",
        "callbacks.knn.num_neighbours=3",
        "tracking.system_metrics=false",
    ]
    assert main(words) == 0
    (run,) = tutorial.search_runs([tutorial.get_experiment_by_name("byol_ssl").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"val_acc", "test_acc", "test_acc_linear"} <= run.data.metrics.keys()
    losses = tutorial.get_metric_history(run.info.run_id, "val_acc")
    assert [point.step for point in losses] == [0, 2]
