import base64
import csv
import io
import json
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from mlflow_ssl import pictures
from mlflow_ssl.pictures import grids, projection
from mlflow_ssl.pictures.confusion import count_confusions
from mlflow_ssl.pictures.coordinates import Axis, parallel_coordinates_html
from mlflow_ssl.pictures.gallery import MOST_STEPS, gallery_html, read_pictures, thinned
from mlflow_ssl.pictures.projection import chosen_method, umap_installed
from mlflow_ssl.pictures.style import RIGHT, WRONG

NORMALIZED = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
HOSTILE = '<script>alert("x")</script>'


def normalized(pixels):
    """Return bytes ``(..., H, W, 3)`` as the network sees them, in float64."""
    shares = torch.from_numpy(pixels).double().movedim(-1, -3) / 255
    mean, std = (torch.tensor(NORMALIZED[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    return (shares - mean) / std


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def pixels_at(image, x, y, width, height):
    return np.asarray(image.crop((x, y, x + width, y + height)))


# grids


def test_the_network_sees_what_the_view_pairs_show():
    pixels = noise(2, 3, 64, 80)  # two views of three images
    picture = pictures.view_pairs(*normalized(pixels), **NORMALIZED)
    # two pairs in the first row, one in the second
    for number, (column, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
        x = grids.PAIR_GAP + column * (2 * 80 + grids.VIEW_GAP + grids.PAIR_GAP)
        y = grids.PAIR_GAP + row * (64 + grids.PAIR_GAP)
        for view in range(2):
            seen = pixels_at(picture, x + view * (80 + grids.VIEW_GAP), y, 80, 64)
            np.testing.assert_array_equal(seen, pixels[view, number])
    assert picture.size == (2 * (160 + grids.VIEW_GAP) + 3 * grids.PAIR_GAP, 2 * 64 + 3 * grids.PAIR_GAP)


def test_small_images_are_enlarged_without_blur():
    pixels = noise(2, 1, 10, 10)
    picture = pictures.view_pairs(*normalized(pixels), **NORMALIZED)
    seen = pixels_at(picture, grids.PAIR_GAP, grids.PAIR_GAP, 70, 70)
    np.testing.assert_array_equal(seen, pixels[0, 0].repeat(7, axis=0).repeat(7, axis=1))


def test_large_images_are_reduced_and_keep_their_shape():
    view = torch.zeros(1, 3, 200, 400)
    picture = pictures.view_pairs(view, view, **NORMALIZED)
    assert picture.size == (2 * 160 + grids.VIEW_GAP + 2 * grids.PAIR_GAP, 80 + 2 * grids.PAIR_GAP)


@pytest.mark.parametrize(("first", "second"), [((2, 3, 8, 8), (1, 3, 8, 8)), ((0, 3, 8, 8), (0, 3, 8, 8))])
def test_views_must_be_pairs(first, second):
    with pytest.raises(ValueError, match="view_1 and view_2 must be images of one shape, got"):
        pictures.view_pairs(torch.zeros(first), torch.zeros(second), **NORMALIZED)


def colour(name):
    return tuple(bytes.fromhex(name[1:]))


def tile_of(picture, row, column):
    """Return the tile of a neighbour, of images of 64 px without captions."""
    side = 64 + 2 * grids.FRAME
    x = grids.TILE_GAP + side + grids.QUERY_GAP + column * (side + grids.TILE_GAP)
    y = grids.HEADER + row * (side + grids.TILE_GAP)
    return picture.crop((x, y, x + side, y + side))


def test_neighbours_of_the_class_are_framed_thin_and_green_others_thick_and_red_with_a_cross():
    pixels = noise(2, 1 + 3, 64, 64)
    right = torch.tensor([[True, False, True], [False, False, True]])
    images = normalized(pixels)
    picture = pictures.neighbours(images[:, 0], images[:, 1:], right, **NORMALIZED)
    for row, column in np.ndindex(2, 3):
        tile = tile_of(picture, row, column)
        edge = [tile.getpixel((x, 40)) for x in range(grids.FRAME)]
        thickness = grids.THIN if right[row, column] else grids.THICK
        frame = [colour(RIGHT if right[row, column] else WRONG)] * thickness
        assert edge == [(255, 255, 255)] * (grids.FRAME - thickness) + frame
        seen = pixels_at(tile, grids.FRAME, grids.FRAME, 64, 64)
        shown = (seen == pixels[row, 1 + column]).all(axis=-1)
        assert shown[:, :45].all()
        assert shown[:15, -10:].all() == bool(right[row, column])  # else a cross is there


def test_queries_stand_at_the_left_without_a_frame():
    pixels = noise(2, 1 + 1, 64, 64)
    images = normalized(pixels)
    picture = pictures.neighbours(images[:, 0], images[:, 1:], torch.ones(2, 1, dtype=bool), **NORMALIZED)
    for row in range(2):
        x, y = grids.TILE_GAP, grids.HEADER + row * (64 + 2 * grids.FRAME + grids.TILE_GAP)
        seen = pixels_at(picture, x + grids.FRAME, y + grids.FRAME, 64, 64)
        np.testing.assert_array_equal(seen, pixels[row, 0])
        assert {picture.getpixel((x + left, y + 40)) for left in range(grids.FRAME)} == {(255, 255, 255)}


def test_names_are_written_below_and_shortened_to_their_image():
    images = torch.zeros(1, 1, 3, 64, 64)
    right = torch.ones(1, 1, dtype=torch.bool)

    def draw(name):
        names = {"query_names": [name], "neighbour_names": [[name]]}
        return pictures.neighbours(images[:, 0], images, right, **NORMALIZED, **names)

    assert draw("cat") != draw("dog")
    assert draw("a very long name indeed, of a cat") == draw("a very long name indeed, of a dog")
    assert draw("cat").height == pictures.neighbours(images[:, 0], images, right, **NORMALIZED).height + grids.CAPTION


def test_neighbours_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be of shape \(Q, \.\.\.\), \(Q, K, \.\.\.\) and \(Q, K\), got"):
        pictures.neighbours(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 3, 8, 8), torch.zeros(2, 3), **NORMALIZED)


@pytest.mark.parametrize(("side", "kind", "thumb"), [(24, "png", 24), (300, "jpeg", 64)])
def test_a_thumbnail_holds_the_image(side, kind, thumb):
    pixels = np.broadcast_to(noise(1, 1), (side, side, 3)).copy()
    address = pictures.thumbnail(normalized(pixels), **NORMALIZED)
    start, _, code = address.partition(",")
    assert start == f"data:image/{kind};base64"
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    assert image.size == (thumb, thumb)
    np.testing.assert_allclose(np.asarray(image)[0, 0].astype(int), pixels[0, 0].astype(int), atol=3)


# projection


def embeddings(num=40, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator) * torch.arange(1, dim + 1)


@pytest.mark.parametrize(("num", "dim"), [(40, 7), (5, 30), (2, 2)])
def test_pca_is_scikit_learns(num, dim):
    data = embeddings(num, dim)
    expected = PCA(2, svd_solver="full").fit_transform(data.double().numpy())
    np.testing.assert_allclose(np.abs(pictures.project(data, method="pca")), np.abs(expected), atol=1e-8)


def test_pca_is_turned_to_where_it_was_before():
    before = pictures.project(embeddings(), method="pca")
    mirrored = before * [-1, 1]
    np.testing.assert_array_equal(pictures.project(embeddings(), method="pca", like=mirrored), mirrored)


def test_pca_puts_the_farthest_point_on_the_plus_side():
    points = pictures.project(embeddings(), method="pca")
    for axis in points.T:
        assert axis.max() == np.abs(axis).max()
    np.testing.assert_allclose(pictures.project(-embeddings(), method="pca"), points, atol=1e-12)


@pytest.mark.parametrize("data", [torch.ones(1, 5), torch.tensor([[1.0], [3.0]]), torch.ones(6, 3)])
def test_pca_of_next_to_nothing_has_two_axes(data):
    points = pictures.project(data, method="pca")
    assert points.shape == (len(data), 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize(
    ("method", "installed", "chosen"), [("auto", True, "umap"), ("auto", False, "pca"), ("pca", True, "pca")]
)
def test_auto_is_umap_where_it_is_installed(method, installed, chosen, monkeypatch):
    monkeypatch.setattr(projection, "umap_installed", lambda: installed)
    assert chosen_method(method, 100) == chosen
    assert chosen_method(method, 99) == "pca"


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="projection must be one of auto, pca, umap, got 'tsne'"):
        pictures.project(embeddings(), method="tsne")


@pytest.mark.slow
@pytest.mark.skipif(not umap_installed(), reason="umap-learn is optional")
def test_umap_keeps_groups_together_and_leaves_random_numbers_alone(capfd):
    data = torch.cat([embeddings(60, 8, seed=1) * 0.05 + shift for shift in torch.eye(8)[:2] * 50])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    points = pictures.project(data, method="umap")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002
    first, second = points[:60], points[60:]
    apart = np.linalg.norm(first.mean(0) - second.mean(0))
    assert apart > 2 * max(np.linalg.norm(group - group.mean(0), axis=1).max() for group in (first, second))
    assert capfd.readouterr() == ("", "")


def test_a_failing_umap_says_why(monkeypatch):
    monkeypatch.setattr(projection, "umap_installed", lambda: True)
    monkeypatch.setattr(projection, "_UMAP", "raise SystemExit('no numba here')")
    with pytest.raises(RuntimeError, match="UMAP ended with code 1: no numba here"):
        pictures.project(embeddings(100), method="umap")


@pytest.mark.parametrize("num_classes", [1, 20, 21])
def test_a_projection_is_drawn_of_any_number_of_classes(num_classes):
    points, labels = np.zeros((4, 2)), torch.zeros(4, dtype=torch.long)
    names = [f"class {number}" for number in range(num_classes)]
    others = [f"{name}!" for name in names]
    legend = pictures.projection_png(points, labels, names) != pictures.projection_png(points, labels, others)
    assert legend == (num_classes <= 20)


def test_a_name_with_dollars_is_no_formula():
    image = pictures.projection_png(np.zeros((1, 2)), torch.zeros(1, dtype=torch.long), [r"$\frac{$"], title=r"$\x$")
    assert image.mode == "RGB"


def page(classes=("cat", "dog"), **kwargs):
    points, labels = np.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])
    return pictures.projection_html(points, labels, list(classes), **kwargs)


THUMBNAILS = [f"data:image/png;base64,AAA{number}" for number in range(3)]


def test_the_page_loads_nothing_from_anywhere():
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page(thumbnails=THUMBNAILS), flags=re.DOTALL)
    assert "<script" in markup
    assert re.findall(r"\b(?:src|href)\s*=", markup) == []
    assert "@import" not in markup
    assert re.findall(r"https?://", markup) == []


def test_the_page_holds_each_thumbnail_and_path_once():
    text = page(thumbnails=THUMBNAILS, paths=["a/0.png", "b/1.png", "b/2.png"])
    for held in [*THUMBNAILS, "a/0.png", "b/1.png", "b/2.png"]:
        assert text.count(f'"{held}"') == 1


@pytest.mark.parametrize("classes", [(HOSTILE, "dog"), [HOSTILE] * 21])
def test_no_name_path_or_title_is_markup(classes):
    text = page(classes, thumbnails=THUMBNAILS, paths=[f"{HOSTILE}/{n}.png" for n in range(3)], title=HOSTILE)
    assert HOSTILE not in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_only_the_images_address_is_put_in_as_it_is():
    (tooltip,) = re.findall(r'"tooltips":("(?:[^"\\]|\\.)*")', page(thumbnails=THUMBNAILS, paths=["a"] * 3))
    assert re.findall(r"@(\w+)(\{safe\})?", json.loads(tooltip)) == [
        ("thumbnail", "{safe}"),
        ("name", ""),
        ("path", ""),
    ]


# confusion


def some_predictions(num=200, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, (2, num), generator=generator)


def test_confusions_are_counted():
    truth, predicted = some_predictions()
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    expected = [[pairs.count((row, column)) for column in range(5)] for row in range(5)]
    assert count_confusions(truth, predicted, 5).tolist() == expected


def test_the_table_counts_images_and_right_answers_of_each_class():
    truth, predicted = some_predictions()
    table = pictures.per_class_table(truth, predicted, ["a", "b", "c", "d", "none"])
    for label, row in enumerate(table[:4]):
        answers = [p for t, p in zip(truth.tolist(), predicted.tolist(), strict=True) if t == label]
        assert row == ("abcd"[label], len(answers), answers.count(label), answers.count(label) / len(answers))
    assert table[4] == ("none", 0, 0, None)


def test_the_csv_gives_the_table_back():
    rows = [pictures.ClassResult('a, "b"\n', 3, 2, 2 / 3), pictures.ClassResult("none", 0, 0, None)]
    header, *read = csv.reader(io.StringIO(pictures.per_class_csv(rows)))
    assert header == ["class", "images", "right", "accuracy"]
    assert read == [['a, "b"\n', "3", "2", "0.666667"], ["none", "0", "0", ""]]


@pytest.mark.parametrize(("num_classes", "named"), [(2, True), (50, True), (51, False)])
def test_the_confusion_matrix_names_up_to_50_classes(num_classes, named):
    truth, predicted = some_predictions(num_classes=num_classes)
    names = [f"class {number}" for number in range(num_classes)]
    other = pictures.confusion_matrix(truth, predicted, [f"{name}!" for name in names])
    assert (pictures.confusion_matrix(truth, predicted, names) != other) == named


def test_a_confusion_matrix_of_right_answers_is_dark_on_its_diagonal():
    truth = torch.tensor([0, 1])
    good, bad = (pictures.confusion_matrix(truth, answer, ["a", "b"]) for answer in (truth, 1 - truth))
    assert good != bad


# all pictures of a run on one page


def test_the_gallery_holds_what_the_folder_holds_by_key_and_step(tmp_path):
    for step in (0, 40):
        Image.new("RGB", (4, 4)).save(tmp_path / f"views~pairs+step+{step}+timestamp+1+abc+compressed.webp")
    Image.new("RGB", (4, 4)).save(tmp_path / "views~pairs+step+0+timestamp+1+abc.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    found = read_pictures(tmp_path)
    assert {key: list(by_step) for key, by_step in found.items()} == {"views/pairs": [0, 40]}
    page = gallery_html(found)
    assert "const steps = [0, 40]" in page
    assert page.count(base64.b64encode(found["views/pairs"][0]).decode()) >= 1
    assert not re.search(r"(src|href)=.?https?:", page)


def test_a_gallery_of_nothing_is_refused():
    with pytest.raises(ValueError, match="pictures must hold at least one"):
        gallery_html({})


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=200))
def test_a_gallery_is_thinned_evenly_to_what_a_page_can_hold(steps):
    kept = thinned(sorted(steps))
    assert len(kept) == min(len(steps), MOST_STEPS)
    assert set(kept) <= steps
    assert (kept[0], kept[-1]) == (min(steps), max(steps))


def test_trainings_are_lines_across_the_axes_of_their_values():
    axes = [Axis("lr", [1e-4, 1e-2, 1.0], log=True), Axis("net", ["a", "b", "a"]), Axis("epochs", [5, 5, 5])]
    assert [axis.heights for axis in axes] == [[0.0, 0.5, 1.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5]]
    assert [text for _, text in axes[0].ticks] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert axes[1].ticks == [(0.0, "a"), (1.0, "b")]
    assert axes[2].ticks == [(0.5, "5")]
    results = Axis("val_acc", [0.5, 0.75, 0.6])
    page = parallel_coordinates_html(axes, results, names=["one", "two", "three"], whole=[True, True, False])
    assert all(word in page for word in ("three", "val_acc", "0.0001"))
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=", page)  # nothing is loaded from elsewhere
