from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_ssl.datasets import splits
from mlflow_ssl.datasets.splits import SPLITS
from mlflow_ssl.datasets.tables import encode
from mlflow_ssl.errors import InputError

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1)
SIZES = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).filter(lambda sizes: sum(sizes) < 0.99)


def named(paths, numbers):
    """Return path to split, of those that are in one."""
    return {path: SPLITS[number] for path, number in zip(paths, numbers.tolist(), strict=True) if number >= 0}


def array(paths):
    return pa.array(list(paths), pa.large_string())


def draw_splits(classes, **options):
    return named(classes, splits.draw_splits(array(classes), encode(list(classes.values())), **options))


def deal(paths, shares, **options):
    return named(paths, splits.deal(array(paths), shares, **options))


def read_split_files(root, files, *, known, **options):
    return named(known, splits.read_split_files(root, files, known=array(known), **options))


def images(counts):
    return {f"{name}/{number:03d}.png": name for name, count in counts.items() for number in range(count)}


def by_class(drawn, classes):
    groups = defaultdict(Counter)
    for path, split in drawn.items():
        groups[classes[path]][split] += 1
    return groups


@settings(deadline=None)
@given(counts=COUNTS, sizes=SIZES, seed=SEEDS)
def test_draw_puts_every_image_in_exactly_one_split(counts, sizes, seed):
    classes = images(counts)
    drawn = draw_splits(classes, seed=seed, val_size=sizes[0], test_size=sizes[1])
    assert drawn.keys() == classes.keys()
    assert set(drawn.values()) <= {"train", "val", "test"}


@settings(deadline=None)
@given(counts=COUNTS, sizes=SIZES, seed=SEEDS)
def test_draw_keeps_each_class_within_one_image_of_its_share_or_gives_it_to_training(counts, sizes, seed):
    classes = images(counts)
    shares = {"val": sizes[0], "test": sizes[1], "train": 1 - sum(sizes)}
    drawn = draw_splits(classes, seed=seed, val_size=sizes[0], test_size=sizes[1])
    for name, got in by_class(drawn, classes).items():
        total = counts[name]
        if got == {"train": total}:  # too few for one of the splits, by the rounding below
            assert any(share * total < 1.01 for share in shares.values() if share > 0) or sizes == (0, 0)
        else:
            assert all(abs(got[split] - share * total) <= 1 + 1e-9 for split, share in shares.items())
            assert all(got[split] >= 1 for split, share in shares.items() if share > 0)


@settings(deadline=None)
@given(counts=COUNTS, sizes=SIZES, seed=SEEDS, data=st.data())
def test_draw_does_not_depend_on_the_order_of_the_images(counts, sizes, seed, data):
    classes = images(counts)
    shuffled = dict(data.draw(st.permutations(list(classes.items()))))
    options = {"seed": seed, "val_size": sizes[0], "test_size": sizes[1]}
    assert draw_splits(shuffled, **options) == draw_splits(classes, **options)


@settings(deadline=None)
@given(counts=COUNTS, sizes=SIZES, seed=SEEDS, name=st.sampled_from("abcdef"))
def test_a_new_image_moves_no_image_of_another_class(counts, sizes, seed, name):
    classes = images(counts)
    options = {"seed": seed, "val_size": sizes[0], "test_size": sizes[1]}
    before, after = draw_splits(classes, **options), draw_splits(classes | {f"{name}/new.png": name}, **options)
    assert {path for path in before if before[path] != after[path]} <= {p for p in before if classes[p] == name}


def test_a_new_image_moves_few_images_of_its_class():
    classes = images({"a": 200})
    options = {"seed": 0, "val_size": 0.2, "test_size": 0.2}
    before, after = draw_splits(classes, **options), draw_splits(classes | {"a/new.png": "a"}, **options)
    assert sum(before[path] != after[path] for path in before) <= 2


@settings(max_examples=30, deadline=None)
@given(first=SEEDS, second=SEEDS)
def test_another_seed_is_another_draw(first, second):
    classes = images({"a": 60, "b": 60})
    draws = [draw_splits(classes, seed=seed, val_size=0.3, test_size=0.2) for seed in (first, second)]
    assert (draws[0] == draws[1]) == (first == second)


def test_draw_is_the_same_on_every_machine():
    # the draw of the day it was written: a change here changes every user's splits
    drawn = draw_splits(images({"a": 10}), seed=42, val_size=0.2, test_size=0.2)
    assert {path for path in drawn if drawn[path] == "test"} == {"a/005.png", "a/009.png"}
    assert {path for path in drawn if drawn[path] == "val"} == {"a/006.png", "a/008.png"}


@pytest.mark.parametrize(
    ("total", "val_size", "test_size", "expected"),
    [
        (10, 0.2, 0.2, {"train": 6, "val": 2, "test": 2}),
        (10, 0.25, 0.1, {"train": 6, "val": 3, "test": 1}),  # halves are rounded up
        (3, 0.2, 0.2, {"train": 1, "val": 1, "test": 1}),
        (2, 0.2, 0.2, {"train": 2}),
        (10, 0, 0.2, {"train": 8, "test": 2}),
        (10, 0.2, 0, {"train": 8, "val": 2}),
        (10, 0, 0, {"train": 10}),
        (1, 0, 0, {"train": 1}),
    ],
)
def test_draw_counts(total, val_size, test_size, expected):
    drawn = draw_splits(images({"a": total}), seed=1, val_size=val_size, test_size=test_size)
    assert Counter(drawn.values()) == expected


def test_classes_too_small_for_every_split_go_to_training_whole_with_one_warning(caplog):
    classes = images({"big": 10, "small": 2, "tiny": 1})
    drawn = by_class(draw_splits(classes, seed=0, val_size=0.2, test_size=0.2), classes)
    assert drawn == {"big": {"train": 6, "val": 2, "test": 2}, "small": {"train": 2}, "tiny": {"train": 1}}
    assert [record.getMessage() for record in caplog.records] == [
        "classes with too few images for every split go to training whole: small, tiny"
    ]


def test_small_classes_are_no_warning_where_nothing_else_is_drawn(caplog):
    draw_splits(images({"a": 1}), seed=0, val_size=0, test_size=0)
    assert not caplog.records


def test_small_classes_are_no_warning_where_training_is_given(caplog):
    drawn = draw_splits(images({"a": 1}), seed=0, val_size=0.2, test_size=0.2, given=["train"])
    assert set(drawn.values()) <= {"val", "test"}
    assert not caplog.records


@pytest.mark.parametrize(
    ("given_splits", "val_size", "test_size", "expected"),
    [
        (["train"], 0.2, 0.2, {"val": 10, "test": 10}),
        (["train"], 0.3, 0.1, {"val": 15, "test": 5}),
        (["train"], 0.2, 0, {"val": 20}),
        (["train"], 0, 0, {}),
        (["val"], 0.2, 0.2, {"train": 16, "test": 4}),
        (["test"], 0.2, 0.2, {"train": 16, "val": 4}),
        (["train", "test"], 0.2, 0.2, {"val": 20}),
        (["train", "test"], 0, 0.2, {}),
        (["val", "test"], 0.2, 0.2, {"train": 20}),
        (["train", "val", "test"], 0.2, 0.2, {}),
    ],
)
def test_nothing_is_drawn_into_given_splits(given_splits, val_size, test_size, expected):
    drawn = draw_splits(images({"a": 20}), seed=0, val_size=val_size, test_size=test_size, given=given_splits)
    assert Counter(drawn.values()) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val_size": -0.1, "test_size": 0}, r"^datamodule\.val_size must be in \[0, 1\), got -0\.1$"),
        ({"val_size": 0.1, "test_size": 1.0}, r"^datamodule\.test_size must be in \[0, 1\), got 1\.0$"),
        ({"val_size": 0.5, "test_size": 0.5}, r"val_size \+ test_size must leave images to train on, got 0\.5 \+ 0\.5"),
        ({"val_size": float("nan"), "test_size": 0}, r"val_size must be in \[0, 1\), got nan"),
    ],
)
def test_draw_refuses_sizes_out_of_range(sizes, message):
    with pytest.raises(InputError, match=message):
        draw_splits(images({"a": 3}), seed=0, **sizes)


def test_deal_gives_each_split_its_share():
    dealt = deal([f"{number}.png" for number in range(10)], {"val": 0.3, "train": 0.7}, seed=0)
    assert Counter(dealt.values()) == {"val": 3, "train": 7}


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data(), st.integers(0, 99))
def test_a_sample_has_of_each_class_its_share_within_one_image(counts, data, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    paths = pa.array([f"{number}.png" for number in range(len(labels))])
    count = data.draw(st.integers(1, len(labels)))
    rows = splits.sample(paths, labels, count, seed=seed)
    assert len(set(rows.tolist())) == count
    assert rows.tolist() == sorted(rows.tolist())
    chosen = np.bincount(labels[rows], minlength=len(counts))
    shares = np.array(counts) * count / len(labels)
    assert (np.abs(chosen - shares) < 1 + 1e-9).all()


def test_a_sample_does_not_depend_on_the_order_of_the_images():
    paths, labels = np.array([f"{number}.png" for number in range(50)]), np.arange(50) % 3
    shuffled = np.random.default_rng(0).permutation(50)
    chosen = paths[splits.sample(pa.array(paths), labels, 20, seed=3)]
    again = paths[shuffled][splits.sample(pa.array(paths[shuffled]), labels[shuffled], 20, seed=3)]
    assert set(chosen) == set(again)


@pytest.fixture
def split_files(tmp_path):
    """Write files ``a/1.png`` to ``b/2.png`` and the split files asked for; read the latter."""
    known = ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    for path in [*known, "a/notes.txt"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()

    def read(*, filtered=False, left_out=(), **texts):
        files = {split: tmp_path / f"{split}.txt" for split in texts}
        for split, text in texts.items():
            files[split].write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        images = dict.fromkeys(path for path in known if path not in left_out)
        return read_split_files(tmp_path, files, known=images, filtered=filtered)

    return read


def test_split_files_name_one_relative_path_a_line(split_files):
    assert split_files(train="a/1.png\nb/1.png\n", val="a/2.png") == {
        "a/1.png": "train",
        "b/1.png": "train",
        "a/2.png": "val",
    }


def test_split_files_may_have_blank_lines_carriage_returns_a_byte_order_mark_and_leading_dots(split_files):
    assert split_files(train="\ufeffa/1.png\r\n\r\n  ./b/1.png  \r\n") == {"a/1.png": "train", "b/1.png": "train"}


def test_split_files_may_name_an_image_twice_for_one_split(split_files):
    assert split_files(train="a/1.png\na/1.png\n") == {"a/1.png": "train"}


def test_split_files_skip_what_the_filters_left_out(split_files):
    text = "a/1.png\nb/1.png\n"
    assert split_files(train=text, left_out=["b/1.png"], filtered=True) == {"a/1.png": "train"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"train": "a/1.png\na/9.png"}, r"^train\.txt names a missing file: a/9\.png; looked in /"),
        ({"val": "../a/1.png"}, r"^val\.txt names a file outside the data folder: \.\./a/1\.png; give paths relative"),
        ({"val": "a/../../x.png"}, r"^val\.txt names a file outside the data folder: a/\.\./\.\./x\.png"),
        ({"test": "/etc/passwd"}, r"^test\.txt names a file outside the data folder: /etc/passwd"),
        ({"train": "a/notes.txt"}, r"^train\.txt names a file that is not an image of the data set: a/notes\.txt$"),
        ({"train": "a"}, r"^train\.txt names a missing file: a; looked in /"),
        ({"train": "a/1.png", "test": "a/2.png\na/1.png"}, r"must not share an image: a/1\.png is in train and in te"),
        ({"train": " \n\n"}, r"^train split file names no image: /"),
        ({"train": b"a/caf\xe9.png"}, r"^train\.txt names a missing file: a/caf.\.png"),
    ],
)
def test_split_files_are_refused_in_one_line(split_files, texts, message):
    with pytest.raises(InputError, match=message) as caught:
        split_files(**texts)
    assert "\n" not in str(caught.value)


def test_a_split_file_outside_the_folder_is_refused_under_filters_too(split_files):
    with pytest.raises(InputError, match="outside the data folder"):
        split_files(train="../x.png", filtered=True)


def test_a_missing_split_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^datamodule\.val_split_file must be an existing file, got .*/val\.txt$"):
        read_split_files(tmp_path, {"val": tmp_path / "val.txt"}, known={})
