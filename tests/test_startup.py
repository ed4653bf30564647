"""What makes a training start sooner, and keeps its mistakes clear."""

import gc
import threading

import pytest
from training import SMALL, train

from mlflow_ssl.cli import main
from mlflow_ssl.startup import Ahead, collect_again, collector_at_rest


def test_a_call_ahead_goes_on_beside_its_caller():
    done = threading.Event()
    ahead = Ahead(lambda: done.wait(10))
    done.set()  # only reached if nobody waits for the call
    assert ahead.result() is True


def test_a_call_ahead_raises_where_its_result_is_asked_for():
    ahead = Ahead(lambda: 1 // 0)
    for ask in (ahead.result, lambda: ahead.glance(10)):
        with pytest.raises(ZeroDivisionError):
            ask()


def test_a_glance_does_not_wait_for_the_end():
    done = threading.Event()
    ahead = Ahead(lambda: done.wait(10))
    ahead.glance(0.01)
    done.set()
    assert ahead.result() is True


def test_the_collector_rests_until_it_is_told_to_work_or_the_end():
    with collector_at_rest():
        assert not gc.isenabled()
        collect_again()
        assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_at_rest():
        1 // 0  # noqa: B018
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backbone.model_name=resnet5"], "backbone.model_name must be a timm model name, got 'resnet5'"),
        (["model.channels_first=true"], "no config key is named 'model.channels_first'"),
        (["datamodule.val_size=2"], "datamodule.val_size"),
        (["datamodule.batch_size=100"], "datamodule.batch_size must be at most"),
    ],
)
def test_a_mistake_in_config_or_data_opens_no_run(store, image_folder, capsys, words, said):
    assert train(image_folder({"a": 12, "b": 12}), *words) == 2
    line, *more = capsys.readouterr().err.splitlines()[-1:]
    assert not more
    assert said in line
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    assert store.search_runs(experiments) == []


def test_a_wrong_path_is_said_before_any_store_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert main([*SMALL, f"data_path={tmp_path / 'nonsense'}"]) == 2
    assert "datamodule.data_path must be an existing folder" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_a_wrong_backbone_is_said_though_the_images_are_still_being_read(store, image_folder, monkeypatch, capsys):
    from mlflow_ssl.datamodules import SSLDataModule

    never, read = threading.Event(), []
    monkeypatch.setattr(SSLDataModule, "prepare_data", lambda self: read.append(never.wait(60)))
    monkeypatch.setattr(Ahead, "glance", lambda self, seconds: None)
    assert train(image_folder({"a": 12, "b": 12}), "backbone.model_name=resnet5") == 2
    assert "backbone.model_name must be a timm model name" in capsys.readouterr().err
    assert not read  # it was said meanwhile
    never.set()
