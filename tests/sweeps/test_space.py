"""What is searched, and what is found there."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mlflow_ssl.config import Swept, compose_config, read_swept
from mlflow_ssl.errors import InputError
from mlflow_ssl.sweeps.space import as_words, distributions, grid


@pytest.mark.parametrize(
    ("word", "choices"),
    [
        ("a.b=1,2", ("1", "2")),
        ("+a.b=x,'two words'", ("x", "'two words'")),
        ("a.b=range(1,4)", ("1", "2", "3")),
        ("a.b=choice([1,2],[3])", ("[1,2]", "[3]")),
        ("a.b=null,true", ("null", "True")),
        ("backbone=glob(vit*)", ("vit16_base", "vit16_small", "vit16_tiny")),
    ],
)
def test_values_are_those_of_hydras_own_grammar(word, choices):
    swept = read_swept(word)
    assert swept.choices == choices
    assert distributions([swept]) == {word.partition("=")[0]: CategoricalDistribution(choices)}


@pytest.mark.parametrize(
    ("word", "distribution"),
    [
        ("a=interval(0.5,2)", FloatDistribution(0.5, 2.0)),
        ("a=tag(log,interval(1e-4,1))", FloatDistribution(1e-4, 1.0, log=True)),
        ("a=int(interval(1,9))", IntDistribution(1, 9)),
        ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_an_interval_is_drawn_from(word, distribution):
    assert distributions([read_swept(word)]) == {"a": distribution}


@pytest.mark.parametrize("word", ["a=1", "a='1,2'", "a=[1,2]", "~a", "+a={b:1}"])
def test_one_value_is_no_sweep(word):
    assert read_swept(word) is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=interval(2,1)", r"a must be swept between ends in rising order, got interval\(2,1\)"),
        ("a=tag(log,interval(0,1))", "a must be swept between ends in rising order above 0"),
        ("backbone=glob(nothing*)", r"backbone must have values to choose from, got glob\(nothing\*\), which matches"),
        ("a=1,[", "cannot read the override 'a=1,\\['"),
    ],
)
def test_a_word_that_leaves_nothing_to_choose_is_named(word, message):
    with pytest.raises(InputError, match=message) as caught:
        read_swept(word)
    assert "\n" not in str(caught.value)


def test_a_short_key_is_known_by_what_it_leads_to():
    assert read_swept("optimizer.lr=1,2").name == read_swept("++scheduler.init_lr=3,4").name == "scheduler.init_lr"


def test_a_grid_is_every_combination_and_the_last_key_changes_first():
    points = grid([Swept("a", ("1", "2")), Swept("b", ("x", "y", "z"))])
    assert [as_words(point) for point in points[:4]] == [["a=1", "b=x"], ["a=1", "b=y"], ["a=1", "b=z"], ["a=2", "b=x"]]
    assert len(points) == 6


@pytest.mark.parametrize("value", [1e-05, 0.1, 3.3e-07, 12, "[1,2]"])
def test_what_is_drawn_comes_back_from_the_config_as_it_was(value):
    (word,) = as_words({"optimizer.lr": value})
    expected = [1, 2] if value == "[1,2]" else value
    assert compose_config([word]).scheduler.init_lr == expected
