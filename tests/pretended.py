"""A training of a second: a package `mlflow_ssl` that a sweep's processes find in the current folder before ours.

It takes over its run, writes what a training writes, and does what ``behaviour.json`` says of its words, such as
``{"core.seed=2": "fail"}``: ``fail`` before it opens its run, ``crash`` after, ``kill`` itself at its first
validation, ``wait`` there for a signal; both of these not once it is resumed. ``values`` in the file are those of its
validations, by words likewise.
"""

import json
from pathlib import Path

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from filelock import FileLock

words = sys.argv[1:]
given = dict(word.lstrip("+").split("=", 1) for word in words)
plan = json.loads(Path("behaviour.json").read_text())
with open("calls.txt", "a") as calls:
    calls.write(" ".join(words) + "\\n")

def said(what, default):
    return next((value for word, value in plan.get(what, {}).items() if word in words), default)

does = said("does", "")
if does == "fail":
    sys.exit("error: core.seed must be another")
output = Path(given["core.output_dir"].strip("'"))
(output / "tracking").mkdir(parents=True, exist_ok=True)
lock = FileLock(output / "tracking" / "lock")
lock.acquire(timeout=0)
resumed = "resume" in given
run_id = given.get("resume") or os.environ["MLFLOW_RUN_ID"]
from mlflow import MlflowClient
client = MlflowClient()
client.set_tag(run_id, "mlflow_ssl.output_dir", str(output))
client.update_run(run_id, "RUNNING")
names = ("OMP_NUM_THREADS", "MLFLOW_SSL_OUTPUT_DIR", "MLFLOW_HTTP_REQUEST_TIMEOUT")
environment = {key: os.environ.get(key) for key in names}
client.set_tag(run_id, "environment", json.dumps(environment))

def record(status):
    entry = {"run_id": run_id, "experiment_id": client.get_run(run_id).info.experiment_id, "status": status,
             "tracking_uri": os.environ["MLFLOW_TRACKING_URI"], "end_time": int(time.time() * 1000)}
    (output / "tracking" / "run.json").write_text(json.dumps(entry))
    if status:
        client.set_terminated(run_id, status)

def stop(number, _):
    client.set_tag(run_id, "mlflow_ssl.reason", "stopped by " + signal.Signals(number).name)
    record("KILLED")
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
record(None)
journal = (output / "tracking" / "records.jsonl").open("a")
for name in ("files.jsonl", "files.sent", "records.sent"):
    (output / "tracking" / name).touch()
values = said("values", [0.1, 0.5, 0.4])
for step in [0, *range(1, len(values) + 1)]:
    value = 0.99 if step == 0 else values[step - 1]  # the untrained network's counts for nothing
    journal.write(json.dumps({"kind": "metrics", "metrics": [[plan.get("metric", "val_acc"), value, 1, step]]}) + "\\n")
    journal.flush()
    # with the journal's own time, as a training does: what is sent again counts once
    client.log_metric(run_id, plan.get("metric", "val_acc"), value, timestamp=1, step=step)
    if step == 1 and does == "crash":
        record("FAILED")
        client.set_tag(run_id, "mlflow_ssl.reason", "ValueError: no such thing")
        sys.exit(1)
    if step == 1 and does == "kill" and not resumed:
        os.kill(os.getpid(), signal.SIGKILL)
    while step == 1 and does == "wait" and not resumed:
        Path("waiting").touch()
        time.sleep(0.05)
    time.sleep(plan.get("pause", 0))
record("FINISHED")
"""


def pretend(folder: Path, **behaviour):
    """Put the package, and what it does, into a folder."""
    package = folder / "mlflow_ssl"
    package.mkdir(exist_ok=True)
    (package / "__main__.py").write_text(PROGRAM)
    (package / "__init__.py").touch()
    (folder / "behaviour.json").write_text(json.dumps(behaviour))


def calls(folder: Path) -> list[dict[str, str]]:
    """Return the words of every training that was begun, in order."""
    lines = (folder / "calls.txt").read_text().splitlines()
    return [dict(word.lstrip("+").split("=", 1) for word in line.split()) for line in lines]
