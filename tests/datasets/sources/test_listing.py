import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images

from mlflow_ssl.datasets.sources import ListSource, open_source
from mlflow_ssl.errors import InputError


@pytest.fixture
def listed(tmp_path):
    """Write images ``pictures/a/000.png`` to ``b/001.png`` and a list of the text given; return its source."""
    write_images(tmp_path / "pictures", {"a": 2, "b": 2}, size=4)

    def write(text, name="list.csv", **options):
        (tmp_path / name).write_text(text)
        return ListSource(tmp_path / name, **options)

    return write


def rows(source):
    table = source.scan().table.select(["path", "class_name", "split"])
    return [tuple(row.values()) for row in table.to_pylist()]


def test_a_list_names_images_with_class_and_split(listed):
    source = listed("path,label,split\npictures/b/001.png,dog,val\npictures/a/000.png,cat,train\n")
    assert rows(source) == [("pictures/a/000.png", "cat", "train"), ("pictures/b/001.png", "dog", "val")]


def test_the_bytes_are_those_of_the_file(listed, tmp_path):
    source = listed("path\npictures/b/001.png\npictures/a/000.png\n")
    found = source.scan()
    assert source.reader(found.table)[1] == (tmp_path / "pictures/b/001.png").read_bytes()
    assert found.table["size"].to_pylist()[1] == len(source.reader(found.table)[1])


def test_only_the_paths_are_needed(listed):
    assert rows(listed("path\n./pictures/a/000.png\n")) == [("pictures/a/000.png", "", "")]


def test_a_class_is_text_and_may_be_missing(listed):
    source = listed('path,label\npictures/a/000.png,007\npictures/a/001.png,\npictures/b/000.png,"a, b"\n')
    assert [name for _, name, _ in rows(source)] == ["007", "", "a, b"]


def test_columns_may_have_other_names(listed):
    columns = {"path": "file", "label": "species"}
    source = listed("id,species,file\n1,dog,pictures/b/000.png\n", columns=columns)
    assert rows(source) == [("pictures/b/000.png", "dog", "")]


def test_tabs_separate_a_tsv(listed):
    assert rows(listed("path\tlabel\npictures/a/000.png\ta,b\n", name="list.tsv")) == [
        ("pictures/a/000.png", "a,b", "")
    ]


def test_a_parquet_list_is_read_too(listed, tmp_path):
    table = {"path": ["pictures/a/000.png", "pictures/b/000.png"], "label": [3, 11]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    assert rows(ListSource(tmp_path / "list.parquet")) == [
        ("pictures/a/000.png", "3", ""),
        ("pictures/b/000.png", "11", ""),
    ]


def test_paths_may_be_absolute_below_the_folder(listed, tmp_path):
    text = f"path\n{tmp_path}/pictures/a/000.png\nb/001.png\n"
    source = listed(text, folder=tmp_path / "pictures")
    assert [path for path, _, _ in rows(source)] == ["a/000.png", "b/001.png"]


def test_filters_and_labels_mean_what_they_mean_for_a_folder(listed):
    text = "path,label\npictures/a/000.png,cat\npictures/b/000.png,dog\n"
    assert rows(listed(text, include=["/a/"], labels="none")) == [("pictures/a/000.png", "", "")]


def test_a_file_that_is_missing_is_a_bad_image(listed):
    found = listed("path\npictures/a/000.png\npictures/gone.png\n").scan()
    assert len(found.table) == 1
    assert [(image.path, image.reason) for image in found.bad] == [
        ("pictures/gone.png", "cannot be looked at: No such file or directory")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\nx.png\n", r"^list\.csv must have a column 'path', has file; .*list_columns"),
        ("path\n../x.png\n", r"^list\.csv must name files below .*, got '\.\./x\.png' in row 1; .*list_folder$"),
        ("path\na.png\n/etc/passwd\n", r"got '/etc/passwd' in row 2"),
        ("path\na.png\na.png\n", r"^list\.csv must name each image once, got a\.png more than once$"),
        ("path,split\na.png,dev\n", r"must have only the splits train, val, test or none, got 'dev'$"),
        ("path,label\na.png,1,2,3\n", r"^datamodule\.data_path cannot be read as a list: .*list\.csv: "),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_in_one_line(listed, text, message):
    with pytest.raises(InputError, match=message) as caught:
        listed(text).scan()
    assert "\n" not in str(caught.value)


def test_a_column_that_was_named_has_to_be_there(listed):
    with pytest.raises(InputError, match=r"must have a column 'species'"):
        listed("path\na.png\n", columns={"label": "species"}).scan()


def test_what_the_path_looks_like_decides_on_the_source(tmp_path):
    assert isinstance(open_source(str(tmp_path / "list.CSV")), ListSource)
    with pytest.raises(InputError, match=r"list_columns and list_folder are for a data_path that ends in \.csv"):
        open_source(str(tmp_path), list_folder="x")
