"""Embeddings in the plane: as a picture, and as a page that shows the image under the mouse."""

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mlflow_ssl.pictures.style import COLOURS, INK, PALE_INK, draw, new_axes, plain_text, shorten

Points = npt.NDArray[np.float64]

METHODS = ("auto", "pca", "umap")
MIN_UMAP_POINTS = 100
"""A graph of neighbours needs some."""

MAX_LEGEND = 20
MARKERS = {"o": "circle", "^": "triangle", "s": "square"}
"""matplotlib's and Bokeh's: where the colours are used up, they begin again with another shape."""

MANY_CLASSES = "viridis"

# In a process of its own: importing umap draws from Python's shared random numbers, which a training must not see, and
# compiling it holds the interpreter lock for many seconds, which a training would wait for.
_UMAP = """
import io, sys
import numpy as np
from umap import UMAP
embeddings = np.load(io.BytesIO(sys.stdin.buffer.read()))
umap = UMAP(metric="cosine", init="pca", random_state=int(sys.argv[1]), n_jobs=1)
buffer = io.BytesIO()
np.save(buffer, umap.fit_transform(embeddings))
sys.stdout.buffer.write(buffer.getvalue())
"""
_UMAP_SECONDS = 300


def umap_installed() -> bool:
    """Return whether ``umap-learn``, an optional dependency, is there."""
    return importlib.util.find_spec("umap") is not None


def chosen_method(method: str, num_points: int) -> str:
    """Return ``pca`` or ``umap``: what `project` does with so many points.

    Raises:
        ValueError: if ``method`` is not ``auto``, ``pca`` or ``umap``.

    Example:
        >>> chosen_method("umap", 99), chosen_method("umap", 100)
        ('pca', 'umap')
    """
    if method not in METHODS:
        raise ValueError(f"projection must be one of {', '.join(METHODS)}, got {method!r}")
    wanted = method == "umap" or (method == "auto" and umap_installed())
    return "umap" if wanted and num_points >= MIN_UMAP_POINTS else "pca"


def project(embeddings: Tensor, *, method: str = "auto", seed: int = 0, like: Points | None = None) -> Points:
    """Return a point in the plane for each embedding.

    Args:
        embeddings: shape ``(N, D)``.
        method: ``pca``, ``umap``, or ``auto``: ``umap`` where it is installed. Below 100 points, all are ``pca``.
        seed: of UMAP; PCA draws nothing.
        like: former points of the same images, shape ``(N, 2)``. Both ends of an axis of a PCA are as good; it is
            turned to where it was before.

    Returns:
        Shape ``(N, 2)``; of a PCA, the axis with the larger variance comes first.

    Raises:
        ValueError: if ``method`` is not one of these.
        RuntimeError: if UMAP fails.
    """
    umap = chosen_method(method, len(embeddings)) == "umap"
    return _umap(embeddings, seed) if umap else _pca(embeddings, like)


def _pca(embeddings: Tensor, like: Points | None) -> Points:
    centred = embeddings.double() - embeddings.double().mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(embeddings), 2))
    found: Points = (left * scale)[:, :2].numpy()
    points[:, : found.shape[1]] = found  # one embedding, or one dimension, has one axis
    if like is None or like.shape != points.shape:  # scikit-learn's rule: the farthest point is on the plus side
        like = (np.abs(points) == np.abs(points).max(0)).astype(np.float64)
    signs: Points = np.where((points * like).sum(0) < 0, -1.0, 1.0)
    return points * signs


def _umap(embeddings: Tensor, seed: int) -> Points:
    buffer = io.BytesIO()
    np.save(buffer, embeddings.float().numpy())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _UMAP, str(seed)],
        input=buffer.getvalue(),
        capture_output=True,
        timeout=_UMAP_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RuntimeError(f"UMAP ended with code {done.returncode}: {lines[-1]}")
    points: Points = np.load(io.BytesIO(done.stdout)).astype(np.float64)
    return points


def projection_png(points: Points, labels: Tensor, classes: Sequence[str], *, title: str = "") -> Image.Image:
    """Draw embeddings in the plane, coloured by class.

    Args:
        points: shape ``(N, 2)``.
        labels: class of each point, shape ``(N,)``, integers from 0.
        classes: name of each class; up to 20 have a legend.
        title: written above.
    """
    figure, axes = new_axes(8, 6)
    if len(classes) > MAX_LEGEND:
        dots = axes.scatter(
            points[:, 0], points[:, 1], c=labels.numpy(), cmap=MANY_CLASSES, s=16, linewidths=0, alpha=0.8
        )
        figure.colorbar(dots, label=f"number of the class, of {len(classes)}", pad=0.02)
    else:
        for label, name in enumerate(classes):
            colour, marker = _look(label)
            members = points[labels.numpy() == label]
            words = plain_text(_short(name))
            axes.scatter(
                members[:, 0], members[:, 1], c=colour, marker=marker, s=22, linewidths=0, alpha=0.75, label=words
            )
        figure.legend(loc="outside right upper", frameon=False, fontsize=10, markerscale=1.5, labelcolor=INK)
    axes.set_title(plain_text(title), loc="left", fontsize=12, color=INK)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#dddddd")
    axes.margins(0.04)
    return draw(figure)


def projection_html(
    points: Points,
    labels: Tensor,
    classes: Sequence[str],
    thumbnails: Sequence[str] | None = None,
    *,
    paths: Sequence[str] | None = None,
    title: str = "",
) -> str:
    """Return a page that needs nothing else: hover shows an image, a click in the legend hides a class.

    Args:
        points: shape ``(N, 2)``.
        labels: class of each point, shape ``(N,)``, integers from 0.
        classes: name of each class; up to 20 have a legend.
        thumbnails: address of each image that holds its bytes, see `thumbnail`.
        paths: file of each image.
        title: written above.
    """
    from bokeh.embed import file_html
    from bokeh.models import HoverTool
    from bokeh.models.annotations import Legend
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    plot = figure(
        title=title,
        sizing_mode="stretch_both",
        min_height=420,
        tools="pan,wheel_zoom,box_zoom,reset,save",
        active_scroll="wheel_zoom",
        toolbar_location="above",
    )
    items = _scatter(plot, _columns(points, labels, classes, thumbnails, paths), classes)
    tooltip = _tooltip(with_image=thumbnails is not None, with_path=paths is not None)
    plot.add_tools(HoverTool(tooltips=tooltip, point_policy="follow_mouse"))
    if items:
        plot.add_layout(Legend(items=items, click_policy="hide", title="click to hide"), "right")
    _tidy(plot)
    return str(file_html(plot, INLINE, title="Embeddings"))


def _look(label: int) -> tuple[str, str]:
    """Return colour and marker of a class: two cues, so that 20 classes can be told apart."""
    return COLOURS[label % len(COLOURS)], list(MARKERS)[label // len(COLOURS)]


def _short(name: str) -> str:
    return shorten(name, lambda text: len(text) <= 24)


def _columns(
    points: Points,
    labels: Tensor,
    classes: Sequence[str],
    thumbnails: Sequence[str] | None,
    paths: Sequence[str] | None,
) -> dict[str, npt.NDArray[Any]]:
    columns = {
        "x": points[:, 0],
        "y": points[:, 1],
        "label": labels.numpy(),
        "name": np.array([classes[label] for label in labels.tolist()], dtype=object),
    }
    optional = {"thumbnail": thumbnails, "path": paths}
    given = {name: np.array(values, dtype=object) for name, values in optional.items() if values is not None}
    return columns | given


def _scatter(plot: Any, columns: dict[str, npt.NDArray[Any]], classes: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """Draw the points and return the items of the legend; each class is drawn by itself where it can be hidden."""
    from bokeh.transform import linear_cmap

    look = {"size": 8, "fill_alpha": 0.75, "line_color": None}
    if len(classes) > MAX_LEGEND:
        by_label = linear_cmap("label", f"{MANY_CLASSES.capitalize()}256", 0, len(classes) - 1)
        plot.scatter("x", "y", source=columns, fill_color=by_label, **look)
        return []
    items = []
    for label, name in enumerate(classes):
        colour, marker = _look(label)
        members = {key: values[columns["label"] == label] for key, values in columns.items()}
        dots = plot.scatter("x", "y", source=members, fill_color=colour, marker=MARKERS[marker], **look)
        items.append((_short(name), [dots]))
    return items


def _tooltip(*, with_image: bool, with_path: bool) -> str:
    """Return what hovers over a point; Bokeh escapes every value but the image's address, which is ours."""
    image = '<img src="@thumbnail{safe}" alt="" style="width:96px;image-rendering:pixelated;border-radius:3px">'
    path = f'<div style="color:{PALE_INK};font-size:11px;overflow-wrap:anywhere">@path</div>'
    words = f'<div style="font-weight:600;font-size:13px;color:{INK}">@name</div>{path if with_path else ""}'
    return (
        '<div style="display:flex;gap:10px;align-items:center;max-width:340px;padding:3px">'
        f"{image if with_image else ''}<div>{words}</div></div>"
    )


def _tidy(plot: Any) -> None:
    plot.axis.visible = False
    plot.grid.visible = False
    plot.outline_line_color = "#dddddd"
    plot.toolbar.logo = None
    plot.title.text_color = INK
    plot.title.text_font_size = "15px"
    plot.title.text_font_style = "normal"
    if plot.legend:
        plot.legend.border_line_color = None
        plot.legend.label_text_color = INK
        plot.legend.label_text_font_size = "13px"
        plot.legend.title_text_color = PALE_INK
        plot.legend.title_text_font_style = "normal"
        plot.legend.title_text_font_size = "12px"
