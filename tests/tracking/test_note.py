"""What stands on a run's page."""

from pathlib import Path

import pytest

from mlflow_ssl.tracking.note import failure_note, finished_note, running_note

CONFIG = {
    "model": {"_target_": "mlflow_ssl.methods.BYOL"},
    "backbone": {"model_name": "resnet18"},
    "trainer": {"max_epochs": 30},
    "datamodule": {"batch_size": 64},
}
METRICS = {
    "val_acc_untrained": 0.75,
    "val_acc": 0.96875,
    "baseline_acc_pixels": 0.9,
    "test_acc": 0.95,
    "test_acc_linear": 0.96,
}


def finished(metrics=METRICS, version="3"):
    return finished_note(
        CONFIG,
        run_id="abc",
        metrics=metrics,
        data="1,797 images",
        steps=12345,
        name="digits",
        version=version,
        look="Look at `steps.html`.",
    )


def blocks(note):
    """Return the code blocks of a Markdown text, by language."""
    parts = note.split("```")[1::2]
    return [tuple(part.split("\n", 1)) for part in parts]


def test_a_finished_run_says_what_was_trained_on_what():
    assert finished().splitlines()[0] == (
        "**BYOL**, `resnet18`, 30 epochs (12,345 steps of 64 images per device) on 1,797 images."
    )


def test_a_finished_run_shows_its_accuracies_as_a_table():
    table = [line for line in finished().splitlines() if line.startswith("|")]
    assert table == [
        "| | untrained → trained |",
        "|---|---|",
        "| val_acc | 0.750 → **0.969** |",
        "| raw pixels | 0.900 |",
        "| test_acc | **0.950** |",
        "| test_acc, linear classifier | 0.960 |",
    ]


def test_a_finetuned_run_shows_what_there_was_before_and_a_mean_of_the_classes():
    metrics = {"val_acc": 0.9, "val_acc_untrained": 0.1, "baseline_acc_knn": 0.7, "baseline_acc_linear": 0.8}
    table = [line for line in finished(metrics | {"test_acc": 0.9, "test_f1": 0.85}).splitlines() if "|" in line][3:]
    assert table == [
        "| neighbours, backbone as it was | 0.700 |",
        "| linear classifier, backbone as it was | 0.800 |",
        "| test_acc | **0.900** |",
        "| test_f1, mean of the classes | 0.850 |",
    ]


def test_a_finished_run_says_where_to_look():
    assert "\nLook at `steps.html`.\n" in finished()


def test_without_classes_there_is_no_table():
    note = finished(metrics={})
    assert "The images have no classes: there is no accuracy." in note
    assert "|" not in note


def test_a_finished_run_says_how_to_load_go_on_and_reproduce():
    assert blocks(finished()) == [
        ("python", 'import mlflow\n\nnetwork = mlflow.pytorch.load_model("models:/digits/3")\n'),
        ("bash", "mlflow run . -P resume=abc -P trainer.max_epochs=MORE\n"),
        ("bash", "mlflow run . -e reproduce -P run_id=abc\n"),
    ]


def test_a_network_that_is_still_to_be_registered_says_so():
    (_, loading), *_ = blocks(finished(version=None))
    assert loading == "# not registered yet: python -m mlflow_ssl sync OUTPUT_FOLDER\n"
    compile(loading, "note", "exec")


def test_a_running_run_says_how_to_resume_it_should_its_machine_be_gone():
    note = running_note(run_id="abc", data="1,797 images")
    assert note.startswith("Training on 1,797 images.\n")
    assert blocks(note) == [("bash", "mlflow run . -P resume=abc\n")]


@pytest.mark.parametrize(("status", "word"), [("FAILED", "Failed"), ("KILLED", "Stopped")])
def test_a_run_that_ended_early_says_why_and_how_to_go_on(status, word):
    note = failure_note("abc", status=status, reason="disk full", output=Path("/out"), resumable=True)
    assert note.startswith(f"**{word}**: `disk full`\n")
    assert blocks(note) == [("bash", "mlflow run . -P resume=abc\n")]
    assert note.endswith("Log: artifact `main.log`; output folder `/out`.")


def test_a_run_without_a_checkpoint_is_not_said_to_go_on():
    note = failure_note("abc", status="FAILED", reason="x", output=Path("/out"), resumable=False)
    assert blocks(note) == []
    assert "start it again" in note


def test_a_reason_cannot_break_out_of_its_place():
    note = failure_note("abc", status="FAILED", reason="`a`" + "b" * 5000, output=Path("/out"), resumable=False)
    first = note.splitlines()[0]
    assert first.count("`") == 2
    assert len(first) < 1100


def test_what_is_not_to_be_registered_is_not_promised():
    config = CONFIG | {"registry": {"register": False}}
    note = finished_note(config, run_id="a", metrics=METRICS, data="", steps=1, name="digits", version=None, look="")
    assert "registry.register is false" in note
    assert "sync" not in note
