"""Seconds and extra memory of the exact nearest neighbours: this package beside faiss, in one run and in turns.

``python benchmarks/knn.py [ROUNDS]`` asks 10,000 queries for the 20 nearest of 50,000 entries in 512 dimensions. Each
round of each candidate is a process of its own, whose peak memory above that of its data is measured. faiss
(``pip install faiss-cpu``) has its ``IndexFlatIP`` filled beforehand, and the time to fill it is not counted.

``python benchmarks/knn.py large`` asks 1,000 queries for the 20 nearest of a million entries in half precision, and
prints how far the memory rises above the bank's own.
"""

import resource
import statistics
import subprocess
import sys
import time

QUERIES, ENTRIES, SIZE, NEIGHBOURS = 10_000, 50_000, 512, 20
CANDIDATES = ("mlflow_ssl", "faiss", "torch in one piece")


def peak() -> float:
    """Return the peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(candidate: str) -> tuple[float, float, float, float]:
    """Return seconds, processor seconds, extra memory in MiB, and a checksum of what was found."""
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator().manual_seed(0)
    queries, bank = (normalize(torch.randn(count, SIZE, generator=generator), dim=1) for count in (QUERIES, ENTRIES))
    if candidate == "faiss":
        import faiss

        index = faiss.IndexFlatIP(SIZE)
        index.add(bank.numpy())

        def search() -> torch.Tensor:
            return torch.from_numpy(index.search(queries.numpy(), NEIGHBOURS)[1])

    elif candidate == "mlflow_ssl":
        from mlflow_ssl.evaluation.knn import nearest

        def search() -> torch.Tensor:
            return nearest(queries, bank, NEIGHBOURS).indices

    else:

        def search() -> torch.Tensor:
            return (queries @ bank.T).topk(NEIGHBOURS, dim=1).indices

    if candidate == "mlflow_ssl":
        nearest(queries[:64], bank[:64], NEIGHBOURS)  # imports faiss
    before, began, processor = peak(), time.perf_counter(), time.process_time()
    found = search()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    return seconds, processor, peak() - before, float(found.sort(1).values.double().mean())


def large() -> None:
    """Print seconds and extra memory for a bank of a million."""
    import torch

    from mlflow_ssl.evaluation.knn import nearest

    bank = torch.empty(1_000_000, SIZE, dtype=torch.half)
    for part in torch.split(bank, 1000):
        part.copy_(torch.randn(part.shape))
    queries = bank[torch.arange(0, len(bank), 1000)]
    nearest(queries[:64], bank[:64], NEIGHBOURS)  # what the first product sets up is no memory of this one
    before, began, processor = peak(), time.perf_counter(), time.process_time()
    found = nearest(queries, bank, NEIGHBOURS)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    itself = int((found.indices[:, 0] == torch.arange(0, len(bank), 1000)).sum())
    print(f"a bank of {bank.nbytes / 2**20:,.0f} MiB: {seconds:.1f} s, {processor:.1f} processor seconds,")
    print(f"{peak() - before:.0f} MiB more; {itself:,} of {len(queries):,} queries found themselves")


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["one"]:
        print(*one(sys.argv[2]))
        return
    if sys.argv[1:2] == ["large"]:
        large()
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    measured: dict[str, list[list[float]]] = {candidate: [] for candidate in CANDIDATES}
    for _ in range(rounds):
        for candidate in CANDIDATES:
            command = [sys.executable, __file__, "one", candidate]
            words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            measured[candidate].append([float(word) for word in words])
    print("| | seconds | least to most | ratio to faiss | processor seconds | extra MiB | checksum |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for candidate, figures in measured.items():
        seconds, processor, extra, checksum = (list(column) for column in zip(*figures, strict=True))
        ratios = [mine / theirs[0] for mine, theirs in zip(seconds, measured["faiss"], strict=True)]
        print(
            f"| {candidate} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
            f"{statistics.median(ratios):.2f} | {statistics.median(processor):.2f} | {statistics.median(extra):.0f} | "
            f"{checksum[0]:.3f} |"
        )


if __name__ == "__main__":
    main()
