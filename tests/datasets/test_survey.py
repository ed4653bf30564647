import pyarrow as pa
from test_index import table

from mlflow_ssl.datasets.survey import by_class, copies, differing, oddest


def test_copies_are_the_images_that_share_their_content():
    index = table(digest=["03", "01", "02", "01"], split=["train", "val", "train", "train"])
    found = copies(index)
    assert found["path"].to_pylist() == ["a/1.png", "a/3.png"]
    assert len(copies(table(digest=["01", "02"]))) == 0


def test_copies_that_differ_are_leaks_or_contradictions():
    found = copies(
        table(
            digest=["01", "01", "02", "02"],
            split=["train", "test", "val", "val"],
            class_name=["a", "a", "a", "b"],
        )
    )
    assert differing(found, "split")["digest"].to_pylist() == ["01", "01"]
    assert differing(found, "class_name")["digest"].to_pylist() == ["02", "02"]


def test_classes_are_counted_in_each_split():
    index = table(class_name=["b", "a", "b", "b"], split=["train", "train", "val", "test"])
    assert by_class(index).to_pylist() == [
        {"class_name": "b", "images": 3, "train": 1, "val": 1, "test": 1},
        {"class_name": "a", "images": 1, "train": 1, "val": 0, "test": 0},
    ]


def test_the_oddest_images_come_first_with_the_reason():
    sizes = {"width": [100] * 20 + [900, 100], "height": [80] * 21 + [5], "size": [8000] * 20 + [72000, 400]}
    found = oddest(table(**sizes))
    assert [image["path"] for image in found] == ["a/21.png", "a/20.png"]
    assert found[0]["why"] == "unusually wide for its height: 100 x 5 px, 400 bytes"
    assert found[1]["why"].startswith("unusually wide")
    assert found[0]["deviations"] > found[1]["deviations"] > 6


def test_bytes_may_be_what_is_odd():
    (found,) = oddest(table(width=[100] * 20, height=[80] * 20, size=[8000] * 19 + [20]))
    assert "unusually few bytes for its size: 100 x 80 px, 20 bytes" in found["why"]


def test_images_that_are_alike_are_not_odd():
    assert oddest(table(width=[100, 110, 90], height=[80, 80, 81], size=[8000, 8100, 7900])) == []


def test_no_more_are_named_than_asked_for():
    widths = [100] * 50 + [10_000 + n for n in range(20)]
    assert len(oddest(table(width=widths, height=[80] * 70, size=[8000] * 70), count=10)) == 10
    assert isinstance(copies(table(digest=["01"])), pa.Table)
