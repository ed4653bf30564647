"""What `docs/scale.md` calculates with: the formulas, and the simulation of an input pipeline against their limits."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _found():
    """Import from the folder for this file only: its names are ordinary words."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def formulas(_found):
    return importlib.import_module("scale_formulas")


@pytest.fixture(scope="module")
def simulation(_found):
    return importlib.import_module("pipeline_simulation")


def test_the_examples_of_the_formulas_run(formulas):
    found = doctest.testmod(formulas)
    assert found.attempted >= 10
    assert found.failed == 0


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_ring_sends_what_the_formula_says(formulas, processes):
    """Each step sends a part of n; n - 1 steps sum, and n - 1 spread."""
    own = [torch.full((processes,), float(rank + 1)) for rank in range(processes)]
    sent = 0
    for step in range(2 * (processes - 1)):
        moved = [(rank, (rank - step) % processes) for rank in range(processes)]
        values = [own[rank][part].clone() for rank, part in moved]
        for (rank, part), value in zip(moved, values, strict=True):
            after = own[(rank + 1) % processes]
            after[part] = after[part] + value if step < processes - 1 else value
        sent += 1
    assert all(torch.equal(part, torch.full((processes,), sum(range(processes + 1)))) for part in own)
    assert formulas.ring_all_reduce_bytes(4 * processes, processes) == pytest.approx(4 * sent)


@given(step=st.floats(0.01, 10), processes=st.integers(1, 512))
def test_the_ideal_has_an_efficiency_of_one(step, processes):
    efficiency = importlib.import_module("scale_formulas").efficiency
    assert efficiency(step, step, processes=processes, strong=False) == 1
    assert efficiency(step, step / processes, processes=processes, strong=True) == pytest.approx(1)


# the simulation, where a formula says what must come of it

ENDLESS = 1e15


def limited(simulation, **changed):
    """Return a pipeline of which nothing limits the GPUs but what is changed."""
    free = {
        "gpus": 1,
        "demand": ENDLESS,
        "workers": 4,
        "image_seconds": 0.0,
        "latency": 0.0,
        "latency_spread": 0.0,
        "connection_rate": ENDLESS,
        "node_rate": ENDLESS,
        "shard_bytes": 80 * 110e3,
    }
    return simulation.Pipeline(**free | changed)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("read_ahead", [0, 8e6])
def test_workers_are_the_limit_where_nothing_else_is(simulation, formulas, workers, read_ahead):
    pipeline = limited(simulation, workers=workers, image_seconds=0.002, read_ahead=read_ahead)
    expected = formulas.worker_bound(workers, 0.002)
    outcome = simulation.simulate(pipeline, seconds=30, warm_up=5)
    assert outcome.rate == pytest.approx(expected, rel=0.02)
    assert outcome.waiting > 0.99


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 4), (2, 2)])
def test_a_nodes_line_is_shared_by_its_gpus(simulation, formulas, nodes, gpus):
    pipeline = limited(simulation, nodes=nodes, gpus=gpus, node_rate=100e6, read_ahead=0)
    expected = formulas.network_bound(100e6, pipeline.image_bytes) / gpus
    assert simulation.simulate(pipeline, seconds=200, warm_up=20).rate == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_few_connections_wait_for_first_bytes(simulation, formulas, spread):
    pipeline = limited(simulation, latency=0.1, latency_spread=spread, connection_rate=88e6, read_ahead=0)
    mean = 0.1 * 2.718281828 ** (spread**2 / 2)  # of a lognormal
    expected = formulas.latency_bound(
        4, latency=mean, read_bytes=80 * 110e3, image_bytes=110e3, connection_rate=pipeline.connection_rate
    )
    found = simulation.simulate(pipeline, seconds=300, warm_up=20).rate
    # the loader takes the workers' batches in turn: none is faster than the slowest, which chance makes slower
    assert expected * (0.98 if spread == 0 else 0.85) <= found <= expected * 1.02


def test_reading_ahead_hides_the_shorter_of_reading_and_making(simulation):
    slow = {"workers": 1, "image_seconds": 0.002, "connection_rate": 110e3 / 0.003}
    serial = simulation.simulate(limited(simulation, **slow, read_ahead=0), seconds=60).rate
    ahead = simulation.simulate(limited(simulation, **slow, read_ahead=8e6), seconds=60).rate
    assert serial == pytest.approx(1 / 0.005, rel=0.02)
    assert ahead == pytest.approx(1 / 0.003, rel=0.02)


def test_gpus_that_are_fed_do_not_wait(simulation):
    outcome = simulation.simulate(limited(simulation, demand=500.0), seconds=30)
    assert outcome == (pytest.approx(0, abs=1e-9), pytest.approx(500))


def test_a_worker_makes_no_more_batches_than_it_may(simulation):
    """One that waits long for each shard has made its next batches meanwhile, if it may."""
    waits = {"demand": 400.0, "workers": 2, "latency": 0.4, "read_ahead": 0, "shard_bytes": 320 * 110e3}
    found = [
        simulation.simulate(limited(simulation, **waits, prefetch=prefetch), seconds=100).waiting for prefetch in (1, 4)
    ]
    assert found[1] < 0.01 < 0.05 < found[0]


def test_gpus_that_step_together_wait_for_the_slowest(simulation):
    drawn = {"demand": 1000.0, "prefetch": 1, "latency": 0.05, "latency_spread": 1.0, "read_ahead": 0}
    found = [simulation.simulate(limited(simulation, **drawn, gpus=gpus), seconds=30).waiting for gpus in (1, 16)]
    assert found[1] > 1.5 * found[0] > 0


def test_the_bandwidth_looked_for_is_the_least_that_feeds_the_gpus(simulation, formulas):
    pipeline = limited(simulation, gpus=2, demand=500.0, read_ahead=8e6)
    demand = formulas.bandwidth_needed(500.0, pipeline.image_bytes)
    found = simulation.bandwidth_for(pipeline, seconds=60)
    assert 0.98 * demand < found < 1.1 * demand
    too_few = limited(simulation, demand=500.0, workers=1, image_seconds=0.01)
    assert simulation.bandwidth_for(too_few, seconds=30) is None


def test_a_seed_says_what_happens(simulation):
    pipeline = simulation.Pipeline(gpus=1, workers=2, demand=2000.0)
    first, again, other = (simulation.simulate(pipeline, seconds=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("batch", "image_bytes", "piece"), [(64, 110e3, 8), (64, 10e3, 64), (60, 110e3, 6), (7, 1e9, 1)]
)
def test_images_that_travel_together_divide_a_batch(simulation, batch, image_bytes, piece):
    assert simulation.Pipeline(batch=batch, image_bytes=image_bytes).piece == piece
