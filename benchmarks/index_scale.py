"""What a data set costs before its first image is read, from 10 thousand to 1 million files.

``python benchmarks/index_scale.py [FOLDER]`` writes that many small files below FOLDER (by default a temporary one; a
million take 4 GB of inodes and directories on ext4), and prints, side by side in one run:

- ``find`` with size and times of every file, and our scan of the same folder, imports not counted: seconds,
  microseconds a file, and the ratio. Each is the least of three, taken in turns, so that both find the folder in the
  kernel's memory;
- the whole index (scan, splits, classes) and the peak memory of the process that builds it, which imports no torch;
- the joblib dump of the datamodule: its size, and the seconds to load it;
- what a loader worker takes for itself when it has read every path.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (10_000, 100_000, 1_000_000)
PER_FOLDER = 1000
ROUNDS = 3

SCAN = """
import json, sys, time
from pathlib import Path
from mlflow_ssl.datasets.walk import find_images
find_images(Path(sys.argv[1], "class_000", "part_0"))  # pyarrow imports pandas at its first array: 0.7 s
began = time.perf_counter()
found, bad = find_images(Path(sys.argv[1]))
seconds = time.perf_counter() - began
assert not bad
print(json.dumps({"count": len(found), "seconds": seconds}))
"""

INDEX = """
import json, resource, sys, time
from mlflow_ssl.datasets.assembly import Assembly
from mlflow_ssl.datasets.sources.folder import FolderSource
from pathlib import Path
began = time.perf_counter()
index = Assembly(FolderSource(Path(sys.argv[1])), None, split_files={}, filtered=False, seed=0, val_size=0.1,
    test_size=0.1, class_to_idx=None, on_bad_image="error", verify="none", max_pixels=None).build()
digest = index.digest
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"count": len(index), "seconds": seconds, "peak_mib": peak}))
"""

DUMP = """
import sys, joblib
from mlflow_ssl.datamodules import ClassificationDataModule
module = ClassificationDataModule(sys.argv[1], verify="none")
_ = module.index
joblib.dump(module, sys.argv[2])
"""

LOAD = """
import json, os, sys, time, joblib
import mlflow_ssl.datamodules
began = time.perf_counter()
module = joblib.load(sys.argv[1])
count = len(module.index)
seconds = time.perf_counter() - began
module.setup()
dataset = module._datasets["train"]

def private():
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return sum(int(lines[key].split()[0]) for key in ("Private_Dirty", "Private_Clean", "Swap")) / 1024

read, write = os.pipe()
if os.fork() == 0:  # a loader worker
    before = private()
    for row in range(len(dataset)):
        dataset._paths[row].as_py(), dataset._labels[row]
    os.write(write, json.dumps(private() - before).encode())
    os._exit(0)
print(json.dumps({"count": count, "seconds": seconds, "worker_mib": json.loads(os.read(read, 100))}))
"""


def write_files(root: Path, count: int) -> None:
    """Write ``count`` files, a byte each, 1,000 a folder, ten folders a class."""
    for folder in range(count // PER_FOLDER):
        below = root / f"class_{folder // 10:03d}" / f"part_{folder % 10}"
        below.mkdir(parents=True, exist_ok=True)
        for number in range(PER_FOLDER):
            (below / f"image_{folder:04d}_{number:04d}.jpg").write_bytes(b"x")


def run(code: str, *arguments: str) -> dict[str, float]:
    """Run some Python in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else {}


def find(root: Path) -> float:
    """Return the seconds that ``find`` takes for path, size and times of every file."""
    began = time.perf_counter()
    command = ["find", str(root), "-type", "f", "-printf", r"%s %T@ %C@ %P\n"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(root: Path, count: int) -> str:
    """Return one row of the table."""
    rounds = [(find(root), run(SCAN, str(root))["seconds"]) for _ in range(ROUNDS)]
    found, scanned = (min(times) for times in zip(*rounds, strict=True))
    index = run(INDEX, str(root))
    assert index["count"] == count
    dump = root.parent / "datamodule.joblib"
    run(DUMP, str(root), str(dump))
    loaded = run(LOAD, str(dump))
    cells = [
        f"{count:,}",
        f"{found:.2f} s",
        f"{scanned:.2f} s",
        f"{1e6 * scanned / count:.1f} µs",
        f"{scanned / found:.2f}",
        f"{index['seconds']:.1f} s",
        f"{index['peak_mib']:.0f} MiB",
        f"{dump.stat().st_size / 1e6:.1f} MB",
        f"{loaded['seconds']:.2f} s",
        f"{loaded['worker_mib']:.1f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        heads = "files|find|our scan|a file|ratio|whole index|its peak memory|joblib|loaded in|a worker more"
        print(f"| {heads.replace('|', ' | ')} |")
        print(f"|{' --- |' * (heads.count('|') + 1)}")
        for count in COUNTS:
            root = Path(folder, "images")
            write_files(root, count)  # more beside those that are there
            print(measure(root, count), flush=True)


if __name__ == "__main__":
    main()
