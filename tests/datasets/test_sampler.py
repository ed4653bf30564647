import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from mlflow_ssl.datasets.sampler import DealtBatches, EpochSampler


@settings(deadline=None)
@given(num_images=st.integers(0, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_has_every_image_once_with_its_epoch(num_images, seed, epoch):
    sampler = EpochSampler(num_images, seed=seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert sorted(keys) == [(epoch, index) for index in range(num_images)]
    assert len(sampler) == num_images
    assert all(type(index) is int for _, index in keys)


def order(seed, epoch):
    sampler = EpochSampler(50, seed=seed)
    sampler.set_epoch(epoch)
    return [index for _, index in sampler]


def test_the_order_depends_on_seed_and_epoch():
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for number, a in enumerate(orders) for b in orders[:number])
    assert order(0, 1) == orders[1]
    assert list(range(50)) not in orders


def test_the_order_depends_on_nothing_drawn_elsewhere():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    np.random.default_rng(0).random()
    assert list(sampler) == first


@pytest.mark.parametrize(("num_images", "world_size"), [(12, 3), (13, 3), (14, 3), (5, 8)])
def test_processes_share_an_epoch_in_equal_disjoint_parts(num_images, world_size):
    parts = [list(EpochSampler(num_images, seed=7, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {num_images // world_size}
    assert {len(EpochSampler(num_images, seed=7, world_size=world_size))} == {num_images // world_size}
    together = [key for part in parts for key in part]
    assert len(set(together)) == len(together) == num_images // world_size * world_size


@given(num_batches=st.integers(1, 5), share=st.integers(1, 4), world_size=st.integers(1, 5), seen=st.integers(0, 3))
def test_a_batch_of_all_processes_holds_the_images_of_one_process_in_its_order(num_batches, share, world_size, seen):
    batch_size, start = share * world_size, (0, min(seen, num_batches) * share * world_size)
    alone = list(EpochSampler(num_batches * batch_size, seed=3, start=start))
    for number in range(len(alone) // batch_size):
        whole = alone[number * batch_size : (number + 1) * batch_size]
        for rank in range(world_size):
            sampler = EpochSampler(num_batches * batch_size, seed=3, rank=rank, world_size=world_size, start=start)
            assert list(sampler)[number * share : (number + 1) * share] == whole[rank::world_size]


@pytest.mark.parametrize("num_images", [1, 50, 4097])
def test_the_order_is_numpys_permutation_by_seed_and_epoch(num_images):
    """Trainings that were begun with it go on with it."""
    permutation = np.random.default_rng((3, 2)).permutation(num_images)
    np.testing.assert_array_equal(EpochSampler(num_images, seed=3).order(2), permutation)


def test_of_an_epoch_a_process_keeps_its_own_share_alone():
    part = EpochSampler(1000, seed=0, rank=3, world_size=10).order(0)
    assert part.base is None
    assert part.nbytes == 4 * 100


def test_what_is_left_over_changes_from_epoch_to_epoch():
    dropped = set()
    for epoch in range(20):
        samplers = [EpochSampler(7, seed=0, rank=rank, world_size=2) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        dropped |= set(range(7)) - {index for sampler in samplers for _, index in sampler}
    assert len(dropped) > 3


def test_an_epoch_that_was_begun_keeps_its_number():
    sampler = EpochSampler(10, seed=0)
    keys = iter(sampler)
    next(keys)
    sampler.set_epoch(1)
    assert {epoch for epoch, _ in keys} == {0}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_batches", [0, 1, 4])
def test_a_resumed_epoch_goes_on_where_it_was_left_and_the_next_is_whole(world_size, num_batches):
    batch_size = 3
    for rank in range(world_size):
        sharing = {"seed": 5, "rank": rank, "world_size": world_size}
        whole = EpochSampler(40, **sharing)
        resumed = EpochSampler(40, **sharing, start=(2, num_batches * batch_size * world_size))
        for epoch in (2, 3):
            whole.set_epoch(epoch)
            resumed.set_epoch(epoch)
            expected = list(whole)
            assert list(resumed) == (expected[num_batches * batch_size :] if epoch == 2 else expected)


def test_a_resumed_epoch_has_its_number_before_it_is_told():
    assert {epoch for epoch, _ in EpochSampler(10, seed=0, start=(4, 2))} == {4}


def test_a_resumed_sampler_is_as_long_as_ever():
    """Lightning takes the length for that of an epoch."""
    assert len(EpochSampler(10, seed=0, start=(4, 2))) == 10


def test_batches_of_keys_are_lists_of_pairs():
    batches = list(BatchSampler(EpochSampler(5, seed=0), batch_size=2, drop_last=False))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(isinstance(key, tuple) for batch in batches for key in batch)


@given(num_images=st.integers(1, 60), batch_size=st.integers(1, 9), world_size=st.integers(1, 5))
def test_an_evaluation_has_each_image_once_in_the_batches_of_one_process(num_images, batch_size, world_size):
    alone = DealtBatches(num_images, batch_size)
    assert [row for batch in alone for row in batch] == list(range(num_images))
    shares = [DealtBatches(num_images, batch_size, rank, world_size) for rank in range(world_size)]
    dealt = [batch for share in shares if not share.borrowed for batch in share]
    assert sorted(dealt) == list(alone)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        assert share.num_batches == len(alone)
        assert 1 <= len(share) == len(list(share))
        assert list(share) == [share.rows(number) for number in range(len(share))]
        assert not share.borrowed or next(iter(share)) in list(alone)
