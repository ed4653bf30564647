"""``mlflow run`` with a backend of ours, on the project itself and a training of seconds."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from training import SMALL

ROOT = Path(__file__).parents[2]


def small_words(data, folder, *, epochs, words=()):
    """Return the words of a training of seconds that writes to ``folder/out``; each key may be given once."""
    given = [
        *SMALL,
        f"data_path={data}",
        f"core.output_dir={folder / 'out'}",
        f"trainer.max_epochs={epochs}",
        f"trainer.check_val_every_n_epoch={epochs}",
        "callbacks.last_checkpoint.every_seconds=1",
        "callbacks.pictures=null",
        *words,
    ]
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]


@contextlib.contextmanager
def launched(backend, config, data, folder, *, epochs, words=()):
    """Start a training that logs to ``folder/log`` and writes to ``folder/out``, and end it with the context."""
    (folder / "config.json").write_text(json.dumps(config))
    words = small_words(data, folder, epochs=epochs, words=words)
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "run",
        str(ROOT),
        "--backend",
        backend,
        "--backend-config",
        "config.json",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *(part for word in words for part in ("-P", word))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def assert_one_whole_run(store, run, *, backend, steps):
    """Check that a run finished, registered one version, and has each of its steps once."""
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.project.backend"] == backend
    assert [int(version.version) for version in store.search_model_versions("name='byol'")] == [1]
    losses = [point.step for point in store.get_metric_history(run.info.run_id, "train/loss")]
    assert losses == list(range(1, losses[-1] + 1))
    assert losses[-1] >= steps
