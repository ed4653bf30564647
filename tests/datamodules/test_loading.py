import pytest
import torch

from mlflow_ssl.datamodules import loading
from mlflow_ssl.datamodules.loading import collate, nbytes, plan_loading

GIB = 2**30


def plan(num_workers="auto", **given):
    machine = {"cores": 8, "processes": 1, "gpu": False, "batch_bytes": 2**20, "free_bytes": 64 * GIB}
    return plan_loading(num_workers, **machine | given)


@pytest.mark.parametrize(
    ("machine", "workers"),
    [
        ({"gpu": True}, 7),
        ({"gpu": False}, 4),
        ({"gpu": True, "processes": 4}, 1),
        ({"gpu": False, "cores": 1}, 1),
        ({"gpu": True, "cores": 128}, loading.MOST_WORKERS),
    ],
)
def test_auto_leaves_the_network_what_it_needs(machine, workers):
    assert plan(**machine).workers == workers


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 6), ("250000 100000", 3), ("1000 100000", 1), ("900000 100000", 6), ("", 6)]
)
def test_a_container_has_the_cores_that_its_share_of_time_comes_to(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    (tmp_path / "cpu.max").write_text(quota)
    assert loading.usable_cores(tmp_path / "cpu.max") == cores
    assert loading.usable_cores(tmp_path / "none") == 6


@pytest.mark.parametrize(("asked", "got"), [(0, 0), (3, 3), (64, 8)])
def test_a_number_is_kept_up_to_the_cores(asked, got):
    assert plan(asked).workers == got


def test_no_workers_keep_nothing_ready():
    assert (plan(0).prefetch, str(plan(0))) == (None, "in the main process")


def test_batches_that_wait_fill_a_tenth_of_the_free_memory_at_most():
    large = plan(8, batch_bytes=GIB // 2, free_bytes=40 * GIB)
    assert large.workers * large.prefetch * GIB // 2 <= 4 * GIB
    assert plan(8, batch_bytes=100 * GIB).workers == 1  # one is loaded all the same


def test_only_a_gpu_wants_pinned_memory():
    assert plan(gpu=True).pinned
    assert not plan(gpu=False).pinned


def test_the_bytes_of_a_sample_are_those_of_its_tensors():
    views = (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert nbytes((views, 7)) == 3 * 16 * 4 + 3 * 16


def test_skipped_images_are_missing_in_their_batch():
    images, labels = collate([(torch.ones(2), 1), None, (torch.zeros(2), 0)])
    assert labels.tolist() == [1, 0]
    assert images.tolist() == [[1, 1], [0, 0]]


def test_a_batch_of_one_of_many_is_refused():
    with pytest.raises(RuntimeError, match=r"^2 of the 3 images of a batch cannot be read; is the disk there\?"):
        collate([None, (torch.ones(2), 1), None])


def test_a_batch_of_one_of_one_is_what_was_asked_for():
    assert collate([(torch.ones(2), 1)])[1].tolist() == [1]


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_lie_in_their_batch_as_each_of_them_lies(channels_last):
    pictures = [torch.arange(60).view(4, 5, 3).permute(2, 0, 1) + number for number in range(3)]
    samples = [((image if channels_last else image.contiguous(), torch.ones(2)), 7) for image in pictures]
    (images, others), labels = collate(samples)
    assert images.equal(torch.stack(pictures))
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert (others.shape, labels.tolist()) == ((3, 2), [7, 7, 7])
