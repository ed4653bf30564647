"""All that a run can say without a training, and whether MLflow holds it.

``python saying.py URI FOLDER PROCESSES``: as many runs at once, in folders of their own, each in a process of its own.
``python saying.py URI FOLDER 0``: one run, which says half of it and then waits to be killed.
"""

import importlib
import math
import os
import sys
import time
from pathlib import Path

from PIL import Image

from mlflow_ssl.tracking.lifecycle import tracked_run

STEPS = 500
TEXT = "<p>élan</p>"


def config(uri, **tracking):
    """Return as much of a config as a run needs."""
    return {
        "core": {"name": "mine", "tag": "run"},
        "backbone": {"model_name": "resnet18"},
        "tracking": {"uri": uri, "system_metrics": False, "wait_at_end_seconds": 60} | tracking,
    }


def values(step):
    """Return what is measured at a step."""
    return {"train/loss": 1 / step, "train/tau": math.nan if step == 7 else 1 - 1 / step, "epoch": step // 100}


def say_metrics(run, steps):
    """Say what is measured at each of the steps."""
    for step in steps:
        run.log_metrics(values(step), step)


def say(run, steps=STEPS):
    """Say something of every kind, the metrics at steps 1, 2, ..."""
    run.log_params({"optimizer": {"lr": 0.1}, "words": [f"w{number}" for number in range(5)], "seed": 42})
    for step in range(1, steps + 1):
        say_metrics(run, [step])
        if step % 100 == 0:
            run.set_tags({"progress": str(step)})
            run.log_picture(Image.new("RGB", (300, 20), (step % 256, 0, 0)), key="views/pairs", step=step)
            checkpoint = run.output / "checkpoints" / "last.ckpt"
            checkpoint.parent.mkdir(exist_ok=True)
            scratch = checkpoint.with_suffix(".part")
            scratch.write_bytes(bytes([step % 256]) * 100_000)
            scratch.replace(checkpoint)
            run.log_checkpoints()
    run.log_text(TEXT, "pictures/projection.html")
    (run.output / "main.log").write_text("said it all")


def assert_holds(client, run_id, *, steps=STEPS, folder):
    """Assert that MLflow holds all that `say` said, once, and in order."""
    stored = client.get_run(run_id)
    assert_holds_metrics(client, run_id, steps)
    assert stored.data.params == {"optimizer.lr": "0.1", "words": '["w0", "w1", "w2", "w3", "w4"]', "seed": "42"}
    assert stored.data.tags["progress"] == str(steps - steps % 100)
    for name, content in {
        "main.log": b"said it all",
        "pictures/projection.html": TEXT.encode(),
        "checkpoints/last.ckpt": bytes([(steps - steps % 100) % 256]) * 100_000,
    }.items():
        assert Path(client.download_artifacts(run_id, name, str(folder))).read_bytes() == content, name
    pictures = Path(client.download_artifacts(run_id, "images", str(folder)))
    names = sorted(file.name for file in pictures.iterdir())
    assert len([name for name in names if name.endswith(".png")]) == steps // 100
    assert len(names) == 2 * (steps // 100)


def assert_holds_metrics(client, run_id, steps=STEPS):
    """Assert that MLflow holds each metric at each step, once, at times in order."""
    for key in values(1):
        points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.step)
        assert [point.step for point in points] == list(range(1, steps + 1)), key
        assert same([point.value for point in points], [values(step)[key] for step in range(1, steps + 1)])
        times = [point.timestamp for point in points]
        assert times == sorted(times), key


def same(found, expected):
    """Return whether two lists are equal, not-a-number included."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


def _run_at_once(uri, folder, number):
    children = []
    for index in range(number):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with tracked_run(config(uri), output=folder / str(index)) as run:
                    say_metrics(run, range(1, 201))
                    time.sleep(1)  # so that all of them are sending
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes))


def _wait_to_be_killed(uri, folder):
    with tracked_run(config(uri), output=folder) as run:
        say_metrics(run, range(1, STEPS // 2 + 1))
        (folder / "said").touch()
        time.sleep(600)


if __name__ == "__main__":
    for name in ("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"):
        importlib.import_module(name)  # once for all
    uri, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if number:
        _run_at_once(uri, folder, number)
    else:
        _wait_to_be_killed(uri, folder)
