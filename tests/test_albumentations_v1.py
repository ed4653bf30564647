import copy

import pytest
from hydra.utils import instantiate

from mlflow_ssl.albumentations_v1 import modernize

# configs/transforms of the tutorial, in its own words
TUTORIAL = {
    "_target_": "albumentations.Compose",
    "transforms": [
        {"_target_": "albumentations.RandomResizedCrop", "height": 24, "width": 32, "scale": [0.08, 1.0]},
        {"_target_": "albumentations.HorizontalFlip", "always_apply": False, "p": 0.5},
        {"_target_": "albumentations.Normalize", "always_apply": True},
    ],
}


def test_modernize_gives_what_albumentations_builds_without_a_warning():
    import numpy as np

    transform = instantiate(modernize(TUTORIAL), _convert_="all")
    assert transform(image=np.zeros((50, 50, 3), np.uint8))["image"].shape == (24, 32, 3)
    assert transform.transforms[0].scale == (0.08, 1.0)
    assert [step.p for step in transform.transforms] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("crop", ["RandomResizedCrop", "RandomSizedCrop"])
def test_height_and_width_of_resizing_crops_become_size(crop):
    node = {"_target_": f"albumentations.{crop}", "height": 32, "width": 48, "p": 0.5}
    assert modernize(node) == {"_target_": f"albumentations.{crop}", "size": [32, 48], "p": 0.5}


@pytest.mark.parametrize("name", ["Resize", "RandomCrop", "CenterCrop"])
def test_height_and_width_stay_where_albumentations_still_takes_them(name):
    node = {"_target_": f"albumentations.{name}", "height": 32, "width": 48}
    assert modernize(node) == node


def test_todays_spelling_stays():
    node = {"_target_": "albumentations.RandomResizedCrop", "size": [32, 48]}
    assert modernize(node) == node


@pytest.mark.parametrize(("value", "expected"), [(True, {"p": 1.0}), (False, {"p": 0.3})])
def test_always_apply_becomes_certainty(value, expected):
    node = {"_target_": "albumentations.Blur", "always_apply": value, "p": 0.3}
    assert modernize(node) == {"_target_": "albumentations.Blur"} | expected


def test_other_peoples_arguments_are_left_alone():
    node = {"_target_": "torchvision.transforms.v2.RandomResizedCrop", "height": 1, "width": 2, "always_apply": True}
    assert modernize(node) == node


@pytest.mark.parametrize("leaf", [None, 3, 0.5, "text", True, [], {}, [1, [2, {"a": None}]]])
def test_modernize_leaves_other_values(leaf):
    assert modernize(leaf) == leaf


def test_modernize_leaves_its_argument_alone():
    before = copy.deepcopy(TUTORIAL)
    assert modernize(TUTORIAL) != before
    assert before == TUTORIAL
