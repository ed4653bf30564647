"""Arithmetic of large trainings: bytes that travel, and the limits of an input pipeline.

Pure functions, which the benchmarks beside them and ``docs/scale.md`` calculate with. Sizes are bytes, times seconds.
"""

import math


def ring_all_reduce_bytes(nbytes: float, processes: int) -> float:
    """Return what each process sends to sum ``nbytes`` over all of them in a ring; it receives as much.

    A process sends 1/n of the numbers n - 1 times to be summed, and again to be spread: 2 (n - 1) / n of all.

    Args:
        nbytes: of what is summed.
        processes: in the ring.

    Example:
        >>> ring_all_reduce_bytes(100.0, 1), ring_all_reduce_bytes(100.0, 2), ring_all_reduce_bytes(100.0, 4)
        (0.0, 100.0, 150.0)

    References:
        Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations.
    """
    return 2 * nbytes * (processes - 1) / processes


def all_gather_bytes(nbytes: float, processes: int) -> float:
    """Return what each process receives when each gives ``nbytes`` to all.

    Example:
        >>> all_gather_bytes(10.0, 4)
        30.0
    """
    return nbytes * (processes - 1)


def sync_batchnorm_bytes(channels: float, processes: int, *, backward: bool) -> float:
    """Return what each process receives for one pass through synchronized BatchNorm layers in float32.

    Forward each process gives mean, inverse deviation and count to all, 2 C + 1 numbers; backward two sums of C
    numbers are reduced, as `torch.nn.modules._functions.SyncBatchNorm` does.

    Args:
        channels: ``C`` of all layers together; the counts, a number a layer, are left out.
        processes: that share the statistics.
        backward: whether gradients come back.

    Example:
        >>> sync_batchnorm_bytes(64, 2, backward=False)
        512.0
        >>> sync_batchnorm_bytes(64, 2, backward=True)
        1024.0
    """
    forward = all_gather_bytes(2 * channels * 4.0, processes)
    return forward + (ring_all_reduce_bytes(2 * channels * 4.0, processes) if backward else 0.0)


def seconds_at(nbytes: float, gigabits: float) -> float:
    """Return how long bytes take on a line of so many gigabits a second.

    Example:
        >>> seconds_at(1e9, 8)
        1.0
    """
    return nbytes * 8 / (gigabits * 1e9)


def efficiency(one: float, many: float, *, processes: int, strong: bool) -> float:
    """Return how much of the ideal speed many processes have.

    Args:
        one: seconds of a step of one process.
        many: seconds of a step of all of them.
        processes: how many.
        strong: whether they share the batch of the one; otherwise each has such a batch of its own.

    Example:
        >>> efficiency(1.0, 0.5, processes=2, strong=True), efficiency(1.0, 1.25, processes=2, strong=False)
        (1.0, 0.8)
    """
    return one / (many * processes) if strong else one / many


# the limits of an input pipeline, images per second


def worker_bound(workers: float, image_seconds: float) -> float:
    """Return what workers make, each ``image_seconds`` of a processor for an image.

    Example:
        >>> worker_bound(8, 0.002)
        4000.0
    """
    return workers / image_seconds


def network_bound(bytes_per_second: float, image_bytes: float) -> float:
    """Return what a line carries.

    Example:
        >>> network_bound(1e9, 1e5)
        10000.0
    """
    return bytes_per_second / image_bytes


def latency_bound(
    connections: int, *, latency: float, read_bytes: float, image_bytes: float, connection_rate: float = math.inf
) -> float:
    """Return what connections fetch that do nothing else: each waits for the first byte, then reads, and asks again.

    Args:
        connections: open at a time.
        latency: mean seconds from a request to its first byte.
        read_bytes: of a request.
        image_bytes: of an image.
        connection_rate: bytes a second of one connection.

    Example:
        >>> latency_bound(10, latency=0.1, read_bytes=1e5, image_bytes=1e5)
        100.0
        >>> latency_bound(10, latency=0.1, read_bytes=1e8, image_bytes=1e5, connection_rate=1e8)  # a whole shard
        9090.90909090909
    """
    seconds = latency + read_bytes / connection_rate
    return connections * read_bytes / seconds / image_bytes


def bandwidth_needed(images_per_second: float, image_bytes: float) -> float:
    """Return the bytes a second that a GPU's images are.

    Example:
        >>> bandwidth_needed(1000, 110e3)
        110000000.0
    """
    return images_per_second * image_bytes
