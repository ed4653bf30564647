"""This package beside its peers, in one run and in turns: ``python benchmarks/peers.py [--rounds 3] [--size 224]``.

lightly and Quadra each get an environment of their own (see `peer_environments`); one that cannot be had is named and
left out. All get the same JPEG files, ResNet-18, heads, batch, views (the paper's), LARS and number of loader workers,
and a CPU. In each round each candidate is a process of its own. Printed are the medians of the rounds with least and
most, and how many times as good as lightly's they are, round by round: above 1 is ahead.

- views: images per second of one processor, decoded and two views drawn;
- command to first step: seconds until the first batch is there;
- whole training: images per second of ``python -m mlflow_ssl``, lightly's example and ``quadra``, from the end of the
  first step to the end of the last, with loading, logging and callbacks;
- step alone: seconds of one on a batch that is there, by Lightning's Trainer without callbacks;
- peak memory: of the training and its workers, what several hold counted once, of a training of its own: to ask for it
  slows a process down;
- kNN: seconds for the votes of the 20 nearest.

What only one side does is not left out: before its first step this package has opened its run, indexed and digested the
images, and measured the untrained network. What it does after its last step, test, export and register, is not
measured: each training is ended there.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from peer_environments import LIGHTLY, QUADRA, NotInstalledError, peer_python

SCRIPTS = Path(__file__).parent / "peer_scripts"

BATCHES = {64: 64, 224: 32}
"""Images of a batch, by the pixels of their sides."""
CLASSES = 4
BATCHES_AN_EPOCH, OTHERS = 10, 64  # of images to train on; images to validate, and to test
STEPS, WARM_UP = 5, 1  # of the step alone
SECONDS = 2.0  # of views
KNN = ("2000", "50000", "512", "20", "10")  # queries, entries, dimensions, neighbours, classes
WORKERS = max((os.cpu_count() or 1) // 2, 1)

MEASURES = {
    "views": ("views, images per CPU-second", True),
    "first": ("command to first step, s", False),
    "training": ("whole training, images/s", True),
    "step": ("step alone, s", False),
    "memory": ("peak memory, MiB", False),
    "knn": ("kNN, s", False),
}
"""What is measured, and whether more is better."""


VERSIONS = (
    "import platform, torch, pytorch_lightning; "
    "print(platform.python_version(), torch.__version__, pytorch_lightning.__version__)"
)


@dataclass
class Images:
    """What all train on.

    Attributes:
        folder: has them twice, see `write_images`.
        size: pixels of a view's sides.
    """

    folder: Path
    size: int

    @property
    def batch(self) -> int:
        """Return how many a batch has."""
        return BATCHES[self.size]

    @property
    def count(self) -> int:
        """Return how many are trained on."""
        return self.batch * BATCHES_AN_EPOCH


@dataclass
class Candidate:
    """One that is measured.

    Attributes:
        name: in the table.
        python: its interpreter.
        script: of `SCRIPTS`, with the parts; None where only the whole training is measured.
        training: words of the command that trains.
        precision: of the step alone.
        found: what each round gave, by measure.
    """

    name: str
    python: str
    script: str | None
    training: list[str]
    precision: str = "32-true"
    parts: tuple[str, ...] = ("views", "step", "knn")
    found: dict[str, list[float]] = field(default_factory=lambda: {measure: [] for measure in MEASURES})


def write_images(images: Images) -> None:
    """Write JPEG files of 256 px twice: split, with folders ``train``, ``val`` and ``test``, and all in one."""
    from views import write_images as write_some

    folder, counts = images.folder, {"train": images.count, "val": OTHERS, "test": OTHERS}
    for split, count in counts.items():
        for label in range(CLASSES):
            place = folder / "split" / split / f"class_{label}"
            place.mkdir(parents=True)
            all_of_class = folder / "all" / f"class_{label}"
            all_of_class.mkdir(parents=True, exist_ok=True)
            for path in write_some(place, count // CLASSES, seed=len(list(folder.rglob("*.jpg")))):
                os.link(path, all_of_class / f"{split}_{path.name}")


def candidates(images: Images, without: Sequence[str]) -> list[Candidate]:
    """Return lightly, ours twice, and Quadra where it can be had."""
    found = []
    for peer, make in ((LIGHTLY, lightly), (QUADRA, quadra)):
        if peer.name.partition(" ")[0] in without:
            continue
        try:
            found.append(make(peer_python(peer), images))
        except NotInstalledError as reason:
            print(f"{peer.name} is left out: {reason}", flush=True)
    place = 1 if found and found[0].name.startswith("lightly") else 0
    return [*found[:place], *ours(images), *found[place:]]


def lightly(python: str, images: Images) -> Candidate:
    """Return lightly, with the defaults of its example."""
    script = str(SCRIPTS / "lightly_byol.py")
    sizes = (str(images.folder / "split" / "train"), str(images.size), str(images.batch))
    words = [python, "-W", "ignore", script, "train", *sizes, "1", str(WORKERS), "32-true"]
    return Candidate(LIGHTLY.name, python, script, words)


def ours(images: Images) -> list[Candidate]:
    """Return this package in float32, and as it is by default."""
    words = [
        *(sys.executable, "-W", "ignore", "-m", "mlflow_ssl", "experiment=base/ssl/byol", "trainer=auto"),
        *(f"data_path={images.folder / 'split'}", f"datamodule.batch_size={images.batch}"),
        *(f"datamodule.num_workers={WORKERS}", "backbone.small_stem=false"),
        *(f"transforms.input_height={images.size}", f"transforms.input_width={images.size}"),
        *("trainer.accelerator=cpu", "trainer.max_epochs=1", "callbacks.pictures.projection=pca"),
        "+callbacks.stopwatch._target_=stopwatch.Stopwatch",
    ]
    script = str(SCRIPTS / "ours.py")
    return [
        Candidate(
            "mlflow_ssl, float32", sys.executable, script, [*words, "trainer.precision=32-true"], parts=("step",)
        ),
        Candidate("mlflow_ssl, by default", sys.executable, script, words, "auto"),
    ]


def quadra(python: str, images: Images) -> Candidate:
    """Return Quadra by its command line, with its own defaults but for the sizes; it starts without weights."""
    share = OTHERS / (images.count + 2 * OTHERS)
    words = [
        *(str(Path(python).parent / "quadra"), "experiment=base/ssl/byol", "trainer=lightning_cpu", "logger=csv"),
        *(f"datamodule.data_path={images.folder / 'all'}", f"datamodule.batch_size={images.batch}"),
        *(f"datamodule.num_workers={WORKERS}", f"datamodule.val_size={share}", f"datamodule.test_size={share}"),
        *(f"transforms.input_height={images.size}", f"transforms.input_width={images.size}"),
        *("backbone.model.pretrained=false", "trainer.max_epochs=1", "trainer.devices=1", "export.types=[]"),
        "+callbacks.stopwatch._target_=stopwatch.Stopwatch",
    ]
    return Candidate(QUADRA.name, python, None, words, parts=())


def run(
    words: list[str], folder: Path, *, until: Path | None = None, weighed: bool = False
) -> tuple[float, float, str]:
    """Run a command in an empty folder and return when it began, its peak memory in MiB, and what it printed.

    Args:
        words: of the command.
        folder: made here.
        until: file after which the command is killed: the rest is not measured.
        weighed: whether to look for the memory, which takes the process time.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    folder.mkdir()
    scratch = folder.parent
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPTS),
        "STOPWATCH": str(folder / "stopwatch.json"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SSL_CACHE": str(scratch / "cache"),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        began = time.time()
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            peak = watch(process, until, weighed=weighed)
        finally:  # its workers too, also if this is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode and not (until and until.exists()):
        said = [(folder / name).read_text()[-2000:] for name in ("out", "err")]
        raise RuntimeError(f"{' '.join(words)} failed:\n" + "\n".join(said))
    return began, peak, (folder / "out").read_text()


def watch(process: subprocess.Popen[bytes], until: Path | None, *, weighed: bool) -> float:
    """Wait for a process, or a file, and return the most memory that it and its children held at once, MiB.

    Of what several of them hold, each counts a share.
    """
    peak = 0.0
    while process.poll() is None and not (until and until.exists()):
        if weighed:
            peak = max(peak, memory_of(process.pid))
        time.sleep(0.2)
    return peak


def memory_of(pid: int) -> float:
    """Return what a process and its children hold, MiB; 0 where one has just ended."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        return sum(one.memory_full_info().pss / 2**20 for one in (first, *first.children(recursive=True)))
    return 0.0


def measure_training(candidate: Candidate, folder: Path, batch: int) -> dict[str, float]:
    """Run a whole training twice and return what it gives."""
    weighing = folder.with_name(f"{folder.name}-weighed")
    _, peak, _ = run(candidate.training, weighing, until=weighing / "stopwatch.json", weighed=True)
    began, _, _ = run(candidate.training, folder, until=folder / "stopwatch.json")
    noted = json.loads((folder / "stopwatch.json").read_text())
    ends = noted["ends"][:BATCHES_AN_EPOCH]  # Quadra deals itself, and may have a small batch more
    return {
        "first": noted["first_batch"] - began,
        "training": batch * (len(ends) - 1) / (ends[-1] - ends[0]),
        "memory": peak,
    }


def measure_part(candidate: Candidate, part: str, folder: Path, images: Images) -> float:
    """Run one part and return its number."""
    arguments = {
        "views": (str(images.folder / "split" / "train"), str(images.size), str(SECONDS)),
        "step": (str(images.size), str(images.batch), str(STEPS), candidate.precision),
        "knn": KNN,
    }
    _, _, printed = run([candidate.python, "-W", "ignore", str(candidate.script), part, *arguments[part]], folder)
    if part != "step":
        return float(printed.split()[-1])
    ends = json.loads((folder / "stopwatch.json").read_text())["ends"]
    return float(np.diff(ends)[WARM_UP - 1 :].min())


def one_round(every: Sequence[Candidate], number: int, scratch: Path, images: Images) -> None:
    """Measure all candidates once; every other round the other way round, so that a drift of the machine cancels."""
    turn = list(every) if number % 2 == 0 else list(reversed(every))
    for candidate in turn:
        folder = f"{number}-{every.index(candidate)}"
        for measure, value in measure_training(candidate, scratch / folder, images.batch).items():
            candidate.found[measure].append(value)
    for part in ("views", "step", "knn"):
        for candidate in turn:
            if part in candidate.parts:
                place = scratch / f"{number}-{every.index(candidate)}-{part}"
                candidate.found[part].append(measure_part(candidate, part, place, images))


def spread(values: Sequence[float]) -> str:
    """Return median, least and most."""
    if not values:
        return ""
    middle, least, most = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in _ends(values))
    return f"{middle} ({least} to {most})"


def _ends(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def print_tables(every: Sequence[Candidate]) -> None:
    """Print what was found, and how many times as good as the first candidate's it is."""
    header = "| | " + " | ".join(candidate.name for candidate in every) + " |"
    line = "|" + " --- |" * (len(every) + 1)
    print(f"\n{header}\n{line}")
    for measure, (title, _) in MEASURES.items():
        print(f"| {title} | " + " | ".join(spread(candidate.found[measure]) for candidate in every) + " |")
    first, *others = every
    header = f"| times as good as {first.name} | " + " | ".join(candidate.name for candidate in others) + " |"
    print(f"\n{header}\n{line[:-6]}")
    for measure, (title, more_is_better) in MEASURES.items():
        cells = []
        for candidate in others:
            pairs = zip(candidate.found[measure], first.found[measure], strict=False)
            cells.append(spread([mine / theirs if more_is_better else theirs / mine for mine, theirs in pairs]))
        print(f"| {title.partition(',')[0]} | " + " | ".join(cells) + " |")


def describe(every: Sequence[Candidate], images: Images) -> None:
    """Print the machine, and the versions of each candidate."""
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores; {images.count} images, {images.size} px, batch {images.batch}")
    for name, python in {candidate.name: candidate.python for candidate in every}.items():
        versions = subprocess.run([python, "-W", "ignore", "-c", VERSIONS], capture_output=True, text=True, check=True)
        print("{}: Python {}, torch {}, Lightning {}".format(name, *versions.stdout.split()), flush=True)


def open_store(scratch: Path) -> None:
    """Set up the tracking store of all trainings, which takes seconds, once for a user."""
    words = "import mlflow, sys; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    store = f"sqlite:///{scratch}/mlflow.db"
    subprocess.run([sys.executable, "-c", words, store], cwd=scratch, check=True, capture_output=True)


def main() -> None:
    """Measure and print."""
    parser: Any = argparse.ArgumentParser(description="This package beside its peers.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, choices=BATCHES, help="pixels of a view's sides")
    parser.add_argument("--without", nargs="*", default=[], choices=["lightly", "quadra"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images = Images(Path(scratch, "images"), asked.size)
        write_images(images)
        every = candidates(images, asked.without)
        describe(every, images)  # imports torch in each environment: compiles what the first round would have to
        open_store(Path(scratch))
        for number in range(asked.rounds):
            began = time.time()
            one_round(every, number, Path(scratch), images)
            print(f"round {number + 1} of {asked.rounds}: {time.time() - began:.0f} s", flush=True)
        print_tables(every)


if __name__ == "__main__":
    main()
