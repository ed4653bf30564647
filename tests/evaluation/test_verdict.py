import math
import subprocess
import sys
from dataclasses import replace

import pytest

from mlflow_ssl.evaluation.verdict import Reading, judge

UNTRAINED = Reading(0, 0, rankme=5.3, deviation=0.041, mean_cosine=0.997, dimensions=512, num_images=359, monitor=0.86)


def readings(*rows):
    """Return readings of the untrained network and of ``(step, rankme, deviation, loss, projection, val_acc)``."""
    return [UNTRAINED] + [
        Reading(
            step,
            step // 20,
            rankme=rank,
            deviation=deviation,
            mean_cosine=0.6,
            dimensions=512,
            num_images=359,
            loss=loss,
            agreement=1 - loss / 4,
            projection_deviation=projection,
            monitor=val_acc,
        )
        for step, rank, deviation, loss, projection, val_acc in rows
    ]


def states(history, start_loss=4.0, **options):
    return [judge(history[: n + 1], start_loss=start_loss, **options).state for n in range(len(history))]


# measured on the embedded digits with resnet10t, as experiment=byol trains it
HEALTHY = {
    "first steps": readings(
        (3, 15.9, 0.095, 3.81, 0.096, 0.858),
        (6, 24.0, 0.123, 3.66, 0.152, 0.866),
        (9, 44.1, 0.179, 3.39, 0.242, 0.886),
        (18, 120.9, 0.406, 2.72, 0.539, 0.891),
    ),
    "first epochs": readings(
        (20, 157.6, 0.544, 2.93, 0.652, 0.905),
        (40, 132.3, 0.489, 1.61, 0.568, 0.925),
        (60, 147.0, 0.573, 1.46, 0.726, 0.936),
        (80, 144.7, 0.571, 1.38, 0.739, 0.922),
        (100, 151.1, 0.598, 1.36, 0.783, 0.928),
    ),
    "thirty epochs": readings(
        (100, 139.0, 0.561, 1.178, 0.766, 0.939),
        (200, 149.1, 0.715, 0.583, 0.886, 0.942),
        (300, 144.9, 0.725, 0.363, 0.896, 0.955),
        (400, 145.4, 0.744, 0.265, 0.920, 0.967),
        (500, 145.6, 0.744, 0.235, 0.911, 0.961),
        (600, 146.6, 0.749, 0.225, 0.916, 0.961),
    ),
    "no predictor, but a slow target": readings(
        (20, 156.0, 0.548, 1.67, 0.360, 0.922),
        (60, 152.9, 0.596, 0.67, 0.321, 0.939),
        (100, 155.5, 0.615, 0.48, 0.321, 0.939),
    ),
}
COLLAPSED = {
    "no predictor, gradient through both": readings(
        (20, 133.9, 0.483, 1.112, 0.249, 0.880),
        (40, 122.6, 0.496, 0.085, 0.103, 0.903),
        (100, 116.8, 0.511, 0.011, 0.065, 0.905),
    ),
    "no predictor, target equal to online": readings(
        (20, 151.1, 0.545, 1.113, 0.286, 0.905),
        (40, 121.3, 0.493, 0.086, 0.105, 0.897),
        (100, 116.6, 0.510, 0.012, 0.067, 0.900),
    ),
    "gradient through both": readings(
        (20, 123.1, 0.422, 2.322, 0.295, 0.891),
        (40, 104.6, 0.408, 0.196, 0.134, 0.861),
        (100, 100.6, 0.435, 0.020, 0.095, 0.864),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_is_never_flagged(name):
    assert set(states(HEALTHY[name])) <= {"improving", "plateau"}


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_is_caught_at_the_second_epoch_and_stays_one(name):
    assert states(COLLAPSED[name]) == ["improving", "improving", "collapsing", "collapsing"]


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_is_caught_at_the_first_validation_of_the_demonstration(name):
    verdict = judge([UNTRAINED, COLLAPSED[name][-1]], start_loss=2.1)
    assert verdict.state == "collapsing"
    assert "all projections are nearly one" in verdict.reason
    assert "model.base_tau" in verdict.advice
    assert "\n" not in str(verdict)


def test_synchronized_batchnorm_is_advised_only_where_there_is_some_to_synchronize():
    collapsed = COLLAPSED["gradient through both"]
    assert "sync_batchnorm" not in judge(collapsed).advice
    assert judge(collapsed, separate_batchnorm=True).advice.startswith("set trainer.sync_batchnorm=true")
    assert judge([UNTRAINED], separate_batchnorm=True).advice == ""


def test_without_the_untrained_reading_a_collapse_is_caught_too():
    assert judge(COLLAPSED["gradient through both"][-1:]).state == "collapsing"


def test_an_untrained_network_is_healthy():
    assert judge([UNTRAINED]).state == "improving"
    assert judge([replace(UNTRAINED, deviation=0.0, rankme=1.0, agreement=1.0, loss=0.0)]).state == "improving"


def spread(step, deviation, **values):
    return replace(UNTRAINED, step=step, deviation=deviation, rankme=5.0, **values)


def test_embeddings_that_are_one_are_a_collapse_where_views_agree():
    assert judge([UNTRAINED, spread(20, 0.004, agreement=0.96)]).state == "collapsing"
    assert judge([UNTRAINED, spread(20, 0.004, agreement=0.94)]).state == "improving"
    assert judge([UNTRAINED, spread(20, 0.006, agreement=0.96)]).state == "improving"


def test_embeddings_are_one_by_what_they_were_untrained():
    before = replace(UNTRAINED, deviation=0.5)
    assert judge([before, spread(20, 0.04, agreement=0.96)]).state == "collapsing"
    assert judge([before, spread(20, 0.06, agreement=0.96)]).state == "improving"


def test_where_nothing_is_known_of_the_views_two_readings_decide():
    assert states([UNTRAINED, spread(20, 0.001), spread(40, 0.001)]) == ["improving", "improving", "collapsing"]


def test_a_few_images_tell_nothing():
    assert judge([UNTRAINED, spread(20, 0.0, agreement=1.0, num_images=7)]).state == "improving"
    assert judge([UNTRAINED, spread(20, 0.0, agreement=1.0, num_images=8)]).state == "collapsing"


def ranked(*ranks, monitor=None):
    return [
        replace(UNTRAINED, step=20 * n, rankme=rank, deviation=0.5, monitor=monitor and monitor[n])
        for n, rank in enumerate(ranks)
    ]


def test_a_rank_that_falls_to_a_tenth_and_stays_there_is_a_collapse():
    assert states(ranked(5, 101, 10.9, 10.9)) == ["improving"] * 3 + ["collapsing"]
    assert states(ranked(5, 101, 11.1, 10.9)) == ["improving"] * 4
    assert states(ranked(5, 101, 10.9, 50)) == ["improving"] * 4


def test_a_rank_far_below_the_untrained_ones_is_a_collapse():
    assert states(ranked(101, 9, 9)) == ["improving", "improving", "collapsing"]
    assert states(ranked(1.5, 1.0, 1.0)) == ["improving"] * 3  # one direction from the beginning


def test_a_low_rank_is_no_collapse_where_the_monitor_is_at_its_best():
    assert judge(ranked(5, 101, 9, 9, monitor=[0.8, 0.85, 0.9, 0.91])).state == "improving"
    assert judge(ranked(5, 101, 9, 9, monitor=[0.8, 0.85, 0.6, 0.6])).state == "collapsing"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_diverges(loss):
    verdict = judge([UNTRAINED, spread(20, 0.5, loss=loss)])
    assert verdict.state == "diverging"
    assert "optimizer.lr" in verdict.advice


def test_a_loss_that_doubles_diverges():
    assert judge([UNTRAINED, spread(20, 0.5, loss=4.1)], start_loss=2.0).state == "diverging"
    assert judge([UNTRAINED, spread(20, 0.5, loss=3.9)], start_loss=2.0).state == "improving"


# measured likewise, with optimizer.lr=1
TOO_HIGH = readings(
    (20, 1.5, 0.007, 2.598, 0.002, 0.415),
    (40, 1.8, 0.016, 0.953, 0.009, 0.685),
    (60, 5.3, 0.093, 0.423, 0.092, 0.652),
    (80, 8.9, 0.194, 0.317, 0.399, 0.518),
    (100, 10.0, 0.251, 0.270, 0.473, 0.538),
    (120, 8.4, 0.237, 0.242, 0.517, 0.515),
)


def test_a_network_that_stays_worse_than_untrained_diverges():
    assert states(TOO_HIGH, start_loss=2.79) == ["improving"] * 5 + ["diverging"] * 2
    verdict = judge(TOO_HIGH)
    assert verdict.reason == "the best of the last 5 validations, 0.6850, is below the untrained network's 0.8600"
    assert "optimizer.lr" in verdict.advice


def test_worse_than_untrained_is_a_matter_of_noise():
    # a share of 0.8 of 400 images has an error of 0.02
    assert judge(monitored(0.8, 0.75, 0.7), patience=2).state == "diverging"
    assert judge(monitored(0.8, 0.765, 0.7), patience=2).state == "improving"
    assert judge(monitored(0.8, 0.75), patience=2).state == "improving"
    assert judge(monitored(0.8, 0.75, 0.7)[1:], patience=2).state == "improving"  # nothing is known of the untrained


def monitored(*values, num_images=400):
    return [
        replace(UNTRAINED, step=20 * n, deviation=0.5, monitor=value, num_images=num_images)
        for n, value in enumerate(values)
    ]


def test_a_plateau_is_no_improvement_beyond_noise_in_so_many_validations():
    # the untrained network's is none of them; a share of 0.8 of 400 images has an error of 0.02
    assert states(monitored(0.1, 0.8, 0.81, 0.82), patience=2) == ["improving"] * 3 + ["plateau"]
    assert judge(monitored(0.1, 0.8, 0.81, 0.821), patience=2).state == "improving"
    assert judge(monitored(0.1, 0.8, 0.81, 0.82, num_images=1600), patience=2).state == "improving"


def test_a_monitor_that_is_no_share_has_a_noise_of_a_hundredth():
    assert judge(monitored(5, 100, 101), patience=1).state == "plateau"
    assert judge(monitored(5, 100, 101.1), patience=1).state == "improving"


def test_nothing_to_judge_is_refused():
    with pytest.raises(ValueError, match=r"^history must hold a reading, got none$"):
        judge([])
    with pytest.raises(ValueError, match=r"^patience must be at least 1, got 0$"):
        judge([UNTRAINED], patience=0)


def test_the_decision_names_only_keys_that_there_are():
    from mlflow_ssl.config import compose_config
    from mlflow_ssl.evaluation import verdict

    config = compose_config(["experiment=byol"])
    advice = " ".join(value for name, value in vars(verdict).items() if name.endswith("_ADVICE"))
    keys = {word.strip(",;").partition("=")[0] for word in advice.split() if "." in word.strip(",;")}
    assert len(keys) > 6
    for key in keys - {"optimizer.lr"}:  # an alias, see config.py
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part] if part in node and node._get_node(part)._value() is not None else {}


def test_the_decision_takes_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    path = sys.modules[Reading.__module__].__file__
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0
