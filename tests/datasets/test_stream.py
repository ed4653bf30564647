import tarfile
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import png, write_shards, write_tar

from mlflow_ssl.datasets.sources.shards import ShardSource
from mlflow_ssl.datasets.stream import ShardStream, StreamLoader, rows_by_shard
from mlflow_ssl.datasets.tables import column
from mlflow_ssl.errors import InputError

BYTES = {png(number): number for number in range(100)}


def number_of(data, key):
    """Return the number of the image that bytes are of, and the epoch of its key; the row has to be right too."""
    number = BYTES[data]
    assert ROWS[key[1]] == number
    return number, key[0]


ROWS: list[int] = []


def stream(folder, keep=None, make=number_of, **options):
    """Return a stream of the images of a folder, or of those of these numbers."""
    source = ShardSource(str(folder))
    table = source.scan().table
    numbers = [int(path[-9:-4]) for path in table["path"].to_pylist()]
    rows = [row for row, number in enumerate(numbers) if keep is None or number in keep]
    ROWS[:] = [numbers[row] for row in rows]
    defaults = {"seed": 1, "batch_size": 4, "shuffle_buffer": 5}
    return ShardStream(source.root, column(table.take(rows), "path"), make, **defaults | options)


def batches(dataset, epoch):
    loader = StreamLoader(dataset, epoch=lambda: epoch, collate_fn=list)
    loaded = list(loader)
    assert len(loaded) == len(loader)  # or a schedule would be wrong
    return loaded


def numbers(loaded):
    return [number for batch in loaded for number, _ in batch]


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path, [8] * 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_an_epoch_in_another_order_each_time(folder, workers):
    dataset = stream(folder, num_workers=workers)
    first, second = batches(dataset, 0), batches(dataset, 1)
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(48))
    assert numbers(first) != numbers(second)
    assert {epoch for batch in second for _, epoch in batch} == {1}
    assert all(len(batch) == 4 for batch in first)
    assert numbers(batches(stream(folder, num_workers=workers), 0)) == numbers(first)
    assert numbers(batches(stream(folder, num_workers=workers, seed=2), 0)) != numbers(first)


def test_a_worker_that_lives_on_learns_of_the_next_epoch(folder):
    epochs = iter([0, 1, 2])
    dataset = stream(folder, num_workers=2)
    loader = StreamLoader(dataset, epoch=lambda: next(epochs), collate_fn=list, persistent_workers=True)
    assert [{epoch for batch in loader for _, epoch in batch} for _ in range(3)] == [{0}, {1}, {2}]


def epoch_of(_, key):
    return key[0]


def test_a_worker_that_shares_nothing_but_the_stream_learns_of_it_too(folder):
    epochs = iter([5, 6])
    dataset = stream(folder, make=epoch_of, num_workers=1)
    loader = StreamLoader(
        dataset, epoch=lambda: next(epochs), collate_fn=set, persistent_workers=True, multiprocessing_context="spawn"
    )
    assert [set.union(*loader) for _ in range(2)] == [{5}, {6}]


def test_only_the_images_of_the_table_come(folder):
    keep = set(range(0, 48, 2))
    assert set(numbers(batches(stream(folder, keep), 0))) == keep


@pytest.mark.parametrize(("workers", "each"), [(0, 24), (2, 16)])  # with four workers, a shard each; two are left over
def test_processes_share_an_epoch_without_a_copy(folder, workers, each):
    parts = [
        numbers(batches(stream(folder, num_workers=workers, rank=rank, world_size=2, batch_size=2), 0))
        for rank in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1]) == each
    assert len(set(parts[0] + parts[1])) == 2 * each


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 5, 8])
def test_a_resumed_epoch_goes_on_where_it_was(folder, workers, done):
    whole = batches(stream(folder, num_workers=workers), 3)
    rest = stream(folder, num_workers=workers, start=(3, done * 4))
    resumed = list(StreamLoader(rest, epoch=lambda: 3, collate_fn=list))
    assert resumed == whole[done:]
    assert numbers(batches(rest, 4)) == numbers(batches(stream(folder, num_workers=workers), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_process_of_several_goes_on_where_it_was(tmp_path, workers):
    folder = write_shards(tmp_path, [4, 9, 13, 10])
    options = {"num_workers": workers, "rank": 1, "world_size": 2, "batch_size": 2}
    whole = batches(stream(folder, **options), 3)
    resumed = StreamLoader(stream(folder, start=(3, 1 * 2 * 2), **options), epoch=lambda: 3, collate_fn=list)
    assert list(resumed) == whole[1:] != []


def test_shards_of_different_sizes_give_each_worker_what_the_smallest_hold(tmp_path, caplog):
    dataset = stream(write_shards(tmp_path, [4, 9, 13, 10]), num_workers=2)
    for epoch in range(4):
        loaded = batches(dataset, epoch)
        assert all(len(batch) == 4 for batch in loaded)
        assert len(set(numbers(loaded))) == len(dataset) == 24
    assert "an epoch has 24 of the 36 images" in caplog.text


def test_a_skipped_image_is_made_up_for_by_another(folder):
    def skipping(data, key):
        number, epoch = number_of(data, key)
        return None if number in (3, 17) else (number, epoch)

    loaded = numbers(batches(stream(folder, make=skipping), 0))
    counts = Counter(loaded)
    assert len(loaded) == 48
    assert set(counts) == set(range(48)) - {3, 17}
    assert max(counts.values()) == 2


def test_a_resumed_epoch_is_as_long_where_images_are_skipped(folder):
    def skipping(data, key):
        number, epoch = number_of(data, key)
        return None if number % 3 else (number, epoch)

    assert len(list(stream(folder, make=skipping, start=(0, 44)))) == 4


def test_an_image_that_is_gone_comes_as_an_empty_file(folder, caplog):
    dataset = stream(folder, make=lambda data, key: (BYTES.get(data), ROWS[key[1]]))
    shard = folder / "shard-001.tar"  # images 8 to 15
    with tarfile.open(shard) as tar:
        shard.write_bytes(shard.read_bytes()[: tar.getmember("00013.png").offset_data + 10])
    (folder / "shard-003.tar").unlink()  # 24 to 31
    found = sorted(dataset, key=lambda image: image[1])
    gone = {13, 14, 15, *range(24, 32)}
    assert found == [(None if number in gone else number, number) for number in range(48)]
    assert "shard-001.tar was readable at the start and breaks off now" in caplog.text


def test_of_two_members_of_one_name_the_first_comes(tmp_path):
    write_tar(tmp_path / "x.tar", [("00000.png", png(0)), ("00001.png", png(1)), ("00000.png", png(2))])
    for seed in range(8):
        assert sorted(numbers([list(stream(tmp_path, batch_size=1, seed=seed))])) == [0, 1]


def test_where_nothing_can_be_read_the_training_ends(folder):
    with pytest.raises(RuntimeError, match="too few images of these shards can be read"):
        list(stream(folder, make=lambda *_: None))


def test_there_are_no_more_workers_than_shards(folder):
    assert stream(folder, num_workers=16, batch_size=2).num_workers == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 7}, r"a shard for each of the 7 processes at least, got 6$"),
        ({"batch_size": 49}, r"^datamodule\.batch_size must be at most what the smallest shards hold .*, got 49"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        stream(folder, **options)


@given(sizes=st.lists(st.integers(1, 9), max_size=6))
def test_the_rows_of_a_shard_are_those_that_name_it(sizes):
    named = [f"{number}.tar" for number, size in enumerate(sizes) for _ in range(size)]
    found = rows_by_shard(pa.array([f"{name}/{row}.tar/x.png" for row, name in enumerate(named)], pa.string()))
    assert {name: list(rows) for name, rows in found.items()} == {
        name: [row for row, other in enumerate(named) if other == name] for name in sorted(set(named))
    }


class CountedPaths:
    """Paths of so many images in so many shards, made when they are asked for."""

    def __init__(self, images, shards):
        self.images, self.shards, self.asked = images, shards, 0

    def __len__(self):
        return self.images

    def __getitem__(self, row):
        self.asked += 1
        return pa.scalar(f"{row * self.shards // self.images:05d}.tar/{row:09d}.jpg")


def test_the_shards_of_a_hundred_million_images_are_found_by_few_looks():
    paths = CountedPaths(10**8, 100)
    found = rows_by_shard(paths)
    assert set(map(len, found.values())) == {10**6}
    assert paths.asked <= 100 * 30
