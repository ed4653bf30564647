import numpy as np
import pyarrow as pa
import pytest

from mlflow_ssl.datasets.tables import column, nulls, sort_by_path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int8(), pa.int32(), pa.int64()])
@pytest.mark.parametrize("length", [0, 1, 1000])
def test_nulls_are_those_of_arrow_and_take_none_of_its_memory(kind, length):
    before = pa.total_allocated_bytes()
    found = nulls(length, kind)
    assert pa.total_allocated_bytes() == before
    found.validate(full=True)
    assert found.equals(pa.nulls(length, kind))
    assert found.null_count == length


def test_a_column_that_is_one_array_is_not_copied():
    numbers = pa.array(np.arange(3))
    assert column(pa.table({"number": numbers}), "number").buffers()[1].address == numbers.buffers()[1].address
    parts = pa.table({"number": pa.chunked_array([[1], [2, 3]])})
    assert column(parts, "number").to_pylist() == [1, 2, 3]
    assert column(parts.slice(0, 0), "number").to_pylist() == []


@pytest.mark.parametrize("paths", [[], ["a"], ["a", "a/b", "b"], ["b", "a"], ["a", "ä", "a/b"], ["Z", "a"], ["a", "Z"]])
def test_rows_are_sorted_by_path_and_left_where_they_are_if_they_are_already(paths):
    table = pa.table({"path": pa.array(paths, pa.large_string()), "number": np.arange(len(paths))})
    found = sort_by_path(table)
    assert found["path"].to_pylist() == sorted(paths, key=str.encode)
    assert [paths[number] for number in found["number"].to_pylist()] == found["path"].to_pylist()
    in_order = paths == sorted(paths, key=str.encode)
    addresses = {column(part, "number").buffers()[-1].address for part in (table, found)}
    assert len(addresses) == (1 if in_order or not paths else 2)
