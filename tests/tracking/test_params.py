"""A config as parameters that MLflow takes."""

import pytest

from mlflow_ssl.tracking.params import LONGEST_VALUE, loggable_params


def test_leaves_have_dotted_keys_and_lists_of_parts_are_numbered():
    config = {"a": {"b": True, "c": None}, "d": [0.1, 2], "e": [{"f": "x"}], "g": {}, "h": []}
    expected = {"a.b": "true", "a.c": "null", "d": "[0.1, 2]", "e.0.f": "x", "g": "{}", "h": "[]"}
    assert loggable_params(config, known={}) == expected


def test_a_long_value_is_cut_and_says_where_it_is_whole():
    value = loggable_params({"a": "x" * 7000}, known={})["a"]
    assert len(value) == LONGEST_VALUE
    assert value.endswith("(whole in config/config_resolved.yaml)")


@pytest.mark.parametrize(
    ("given", "is_"), [("1e-3", 0.001), ("false", False), ("'[x,y]'", ["x", "y"]), ("'two words'", "two words")]
)
def test_a_parameter_of_the_launcher_is_left_and_not_remarked_on(given, is_, caplog):
    assert loggable_params({"a": is_}, known={"a": given}) == {}
    assert caplog.records == []


def test_a_parameter_of_the_launcher_that_means_something_else_is_remarked_on(caplog):
    assert loggable_params({"a": 2}, known={"a": "3"}) == {}
    assert [record.message for record in caplog.records] == ["parameter a was given as 3 and is 2"]
