import subprocess
import sys

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


CONCAT = """
import pyarrow as pa, pyarrow.compute as pc
from mlflow_ssl.datasets.tables import concat
column = pa.array([1] * 10_000)
parts = [pa.table({name: pc.add(column, part) for name in "abcdefgh"}) for part in range(8)]
schema, held = parts[0].schema, pa.total_allocated_bytes()
whole = concat((parts.pop(0) for _ in range(8)), schema)
assert whole["h"].to_pylist() == [part + 1 for part in range(8) for _ in range(10_000)]
print(pa.default_memory_pool().max_memory() / held)
"""


def test_tables_that_are_let_go_of_are_put_together_in_the_memory_of_one_column_more():
    done = subprocess.run([sys.executable, "-c", CONCAT], check=True, capture_output=True, text=True)
    assert 1 < float(done.stdout) < 1.2


@pytest.mark.parametrize("paths", [[], ["a"], ["a", "a/b", "b"], ["b", "a"], ["a", "ä", "a/b"], ["Z", "a"], ["a", "Z"]])
def test_rows_are_sorted_by_path_and_left_where_they_are_if_they_are_already(paths):
    table = pa.table({"path": pa.array(paths, pa.large_string()), "number": np.arange(len(paths))})
    found = sort_by_path(table)
    assert found["path"].to_pylist() == sorted(paths, key=str.encode)
    assert [paths[number] for number in found["number"].to_pylist()] == found["path"].to_pylist()
    in_order = paths == sorted(paths, key=str.encode)
    addresses = {column(part, "number").buffers()[-1].address for part in (table, found)}
    assert len(addresses) == (1 if in_order or not paths else 2)
