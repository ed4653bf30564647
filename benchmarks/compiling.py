"""Whether `torch.compile` pays: ``python benchmarks/compiling.py [--rounds 5] [--only WORDS] [--modes default ...]``.

Forward and backward of a step's networks, plain and compiled, in one process and in turns: what compiling takes once,
what it saves a step, and after how many steps it has paid for itself. On a GPU at the sizes that it is for.
"""

import argparse
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

from floor import Case, bare_step, cases, config_of, least, seconds_of_call, spread


def measure(case: Case, mode: str, rounds: int, folder: Path) -> str:
    """Return a row of the table."""
    plain, _ = bare_step(config_of(case, folder, 1, []), case)
    compiled, _ = bare_step(config_of(case, folder, 1, [f"model.compile={mode}"]), case)
    began = time.perf_counter()
    compiled()
    first = time.perf_counter() - began
    pairs = [(seconds_of_call(plain), seconds_of_call(compiled)) for _ in range(rounds + 2)][2:]
    befores, afters = ([1000 * seconds for seconds in side] for side in zip(*pairs, strict=True))
    saved = sorted(before - after for before, after in zip(befores, afters, strict=True))[rounds // 2]
    steps = f"{1000 * first / saved:.0f}" if saved > 0 else "never"
    gains = spread([before / after for before, after in pairs])
    return f"| {case} | {mode} | {least(befores)} | {least(afters)} | {gains} | {first:.0f} | {steps} |"


def main() -> None:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--modes", nargs="*", default=["default"])
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print("\n| networks | mode | plain, ms | compiled, ms | plain / compiled | compiling, s | paid after steps |")
    print("|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch, "kernels"))  # as on a machine that has none yet
        for case in (case for case in cases() if asked.only in str(case)):
            for mode in asked.modes:
                print(measure(case, mode, asked.rounds, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
