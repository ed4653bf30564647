"""What 2 and 4 processes make of the same global batches is what one makes of them."""

import pytest
import torch
from conftest import write_images
from scripts import run_script
from several_processes import LOGGED_EVERY, MEAN, STD, layers, method

from mlflow_ssl.export import DeploymentNetwork, load_torchscript

pytestmark = pytest.mark.slow

NUM_STEPS = 10


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Return where the script has written: 40 images train, in 5 steps of 8 an epoch, 12 validate, 6 test."""
    folder, images = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("images")
    for split, counts in {"train": (14, 13, 13), "val": (4, 4, 4), "test": (2, 2, 2)}.items():
        for number, count in enumerate(counts):  # one class alone is not brighter than another
            write_images(images / split, {"abc"[number]: count}, size=10, seed=10 * count + number)
    run_script("several_processes.py", images, folder)
    return folder


@pytest.fixture(scope="module")
def alone(out):
    return torch.load(out / "1_0.pt", weights_only=True)


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, out):
    """Return what each of some processes has found."""
    return [torch.load(out / f"{request.param}_{rank}.pt", weights_only=True) for rank in range(request.param)]


def close(found, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def near(found, expected, share=5e-5):
    """Check that tensors differ by rounding: by a small share of the largest value."""
    difference = (found.double() - expected.double()).abs().max()
    assert difference <= share * expected.double().abs().max().clamp(min=1e-2), difference


def test_the_first_batch_has_the_same_views(alone, processes):
    for shared, whole in zip(processes[0]["views"], alone["views"], strict=True):
        # those of the first process come first: it has the first image, and each so many after it
        dealt = [whole[rank :: len(processes)] for rank in range(len(processes))]
        close(shared, torch.cat(dealt))


def test_each_step_has_the_same_loss(alone, processes):
    assert len(alone["own"][0]) == NUM_STEPS
    assert alone["own"].std() > 0.1
    for found in processes:
        close(found["own"].mean(0), alone["own"][0], rtol=1e-5, atol=0)


def test_the_mean_over_processes_is_logged_where_it_is_written_and_at_the_end_of_an_epoch(processes):
    for rank, found in enumerate(processes):
        for step, logged in enumerate(found["logged"]):
            written = (step + 1) % LOGGED_EVERY == 0 or (step + 1) % (NUM_STEPS // 2) == 0
            close(logged, found["own"][:, step].mean() if written else found["own"][rank, step])
            assert not logged.isclose(found["own"][rank - 1, step])


def test_online_target_and_their_statistics_are_the_same(alone, processes):
    for found in processes:
        assert list(found["weights"]) == list(alone["weights"])  # so that any number of processes may go on
        for name, value in alone["weights"].items():
            near(found["weights"][name], value)
            assert found["weights"][name].equal(processes[0]["weights"][name]), name
    start = method().state_dict()
    for name in ("online.backbone.stem.weight", "target.backbone.stem.weight", "target.backbone.norm_act.running_var"):
        assert (alone["weights"][name] - start[name]).abs().max() > 0.01, name


def test_neighbours_embeddings_and_all_metrics_are_the_same(alone, processes):
    names = {"train/loss", "val_acc", "val_acc_weighted", "val_acc_linear", "embedding/agreement", "embedding/rankme"}
    assert names <= set(alone["metrics"])
    assert 0 < alone["metrics"]["val_acc"] < 1
    for found in processes:
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-3)
        assert found["reading"] == pytest.approx(alone["reading"], rel=1e-3)
        for name, expected in alone["probe"].items():
            near(found["probe"][name], expected)
    for name, expected in alone["evaluated"].items():
        near(processes[0]["evaluated"][name], expected)


def test_batchnorm_is_shared_while_a_training_lasts_and_plain_after_it(alone, processes):
    assert all(found["shared"] for found in processes)
    classes = [type(module).__name__ for module in method().modules()]
    for found in (alone, *processes):
        assert found["classes"] == classes


def test_what_is_exported_after_it_is_the_plain_network(out, alone, processes):
    network = method()
    network.load_state_dict(processes[0]["weights"])
    expected = DeploymentNetwork(network.online.backbone, MEAN, STD)
    exported = load_torchscript(out / f"{len(processes)}_0.ts")
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(exported(images), expected(images))
    assert not [module.original_name for module in exported.modules() if module.original_name.startswith("Shared")]


@pytest.mark.parametrize("number", [2, 4])
def test_a_classifier_learns_and_is_measured_the_same(number, out):
    alone = torch.load(out / "classifier_1_0.pt", weights_only=True)
    assert 1 / 3 < alone["metrics"]["val_acc"] < 1
    for rank in range(number):
        found = torch.load(out / f"classifier_{number}_{rank}.pt", weights_only=True)
        close(found["own"].mean(0), alone["own"][0], rtol=1e-5, atol=0)
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert {"baseline_acc_knn", "baseline_acc_linear"} < found["baseline"].keys()
        assert found["baseline"] == pytest.approx(alone["baseline"], rel=1e-4)
        for part in ("weights", "evaluated"):
            assert list(found[part]) == list(alone[part])
            for name, expected in alone[part].items():
                near(found[part][name], expected)


@pytest.mark.parametrize("name", list(layers()))
def test_a_layer_does_with_shares_of_5_and_3_what_a_plain_one_does_with_8(name, out):
    shares = [torch.load(out / f"layers_{rank}.pt", weights_only=True)[name] for rank in range(2)]
    layer, batches = layers()[name]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    for number, (images, weights) in enumerate(batches):
        images.requires_grad_()
        values = layer(images)
        (values * weights).sum().backward()
        close(torch.cat([share["values"][number] for share in shares]), values.detach(), **tolerance)
        close(torch.cat([share["gradients"][number] for share in shares]), images.grad, **tolerance)
        assert shares[0]["values"][number].stride()[1:] == values.stride()[1:]
    for number, parameter in enumerate(layer.parameters()):
        close(sum(share["parameters"][number] for share in shares), parameter.grad, **tolerance)
    for share in shares:
        assert share["buffers"].keys() == dict(layer.named_buffers()).keys()
        for buffer, value in layer.named_buffers():
            close(share["buffers"][buffer], value)
