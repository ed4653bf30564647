"""Pictures of a training, over its steps: what the network sees, what it finds similar, what it mistakes."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from mlflow_ssl.callbacks.embeddings import Evaluated
from mlflow_ssl.callbacks.knn import KNNEvaluation
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import ImageDataset
from mlflow_ssl.evaluation.knn import nearest
from mlflow_ssl.pictures import (
    confusion_matrix,
    neighbours,
    per_class_csv,
    per_class_table,
    project,
    projection_html,
    projection_png,
    thumbnail,
    view_pairs,
)
from mlflow_ssl.pictures.gallery import gallery_html, read_pictures
from mlflow_ssl.pictures.painter import Painter
from mlflow_ssl.pictures.projection import METHODS, Points, chosen_method, umap_installed
from mlflow_ssl.pictures.style import load_libraries

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

PAGE = "pictures/projection.html"
STEPS = "pictures/steps.html"
TABLE = "evaluation/per_class.csv"
MOST_WAITING = 4
"""Pictures that may wait to be drawn; a training that validates faster than that skips some."""

GRACE_SECONDS = 3.0
"""How long a training that fails waits for its last pictures."""


@dataclass(frozen=True)
class _Sender:
    """Where pictures of one moment go."""

    run: Any
    step: int

    def picture(self, picture: "Image.Image", *, key: str) -> None:
        self.run.log_picture(picture, key=key, step=self.step)

    def text(self, text: str, file: str) -> None:
        self.run.log_text(text, file)

    def gallery(self) -> None:
        self.text(gallery_html(read_pictures(self.run.picture_folder)), STEPS)


@dataclass(frozen=True)
class _Images:
    """What is drawn of a datamodule, with transforms of its own: those of a loader cannot be shared by two threads."""

    views: Any
    shown: list[int]
    bank: ImageDataset
    queries: ImageDataset
    query_paths: "pa.Array"
    classes: list[str]

    @classmethod
    def copied_from(cls, datamodule: SSLDataModule, *, num_pairs: int) -> "_Images":
        return cls(
            views=datamodule.drawn_views(),
            shown=spread(torch.tensor(datamodule.index.split("train").labels), num_pairs),
            bank=datamodule.evaluated_images("bank"),
            queries=datamodule.evaluated_images("val"),
            query_paths=datamodule.queries.column("path"),
            classes=datamodule.classes,
        )


@dataclass(frozen=True)
class _Sample:
    """The validation images that a projection shows: numbers ``(P,)``, embeddings ``(P, D)`` and classes ``(P,)``."""

    rows: list[int]
    embeddings: Tensor
    labels: Tensor
    class_names: list[str]


class Pictures(Callback):
    """Log pictures before training, at each validation and at the test.

    - ``views/pairs``: views of the same few training images, as the network is trained on them in this epoch. They
      come with every ``check_val_every_n_epoch`` too where there is nothing to validate.
    - ``embedding/neighbours``: the same few validation images, and what the bank holds nearest to them.
    - ``embedding/projection``: validation embeddings in the plane, and ``pictures/projection.html``, where hovering
      over a point shows its image.
    - ``pictures/steps.html``: all of these with a slider over the steps.
    - ``evaluation/confusion_matrix`` and ``evaluation/per_class.csv``, of the test.

    They are made of what `KNNEvaluation` has gathered, drawn in a thread beside the training and handed to the run of
    the trainer's logger. No picture is worth a training: what goes wrong here is a line in the log. Without such a run
    nothing is drawn.

    Args:
        mean: that images are normalized by, of each channel.
        std: likewise.
        num_pairs: training images whose views are shown.
        num_queries: validation images whose neighbours are shown.
        num_neighbours: neighbours of each.
        max_points: most points of a projection.
        projection: ``pca``, ``umap``, or ``auto``: PCA, whose pictures can be compared from step to step, but UMAP for
            the page of the last validation where ``umap-learn`` is installed.

    Raises:
        ValueError: if ``projection`` is none of the three, or ``umap`` without ``umap-learn``, or a number is below 1.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        num_pairs: int = 8,
        num_queries: int = 8,
        num_neighbours: int = 8,
        max_points: int = 1000,
        projection: str = "auto",
    ) -> None:
        if projection not in METHODS:
            raise ValueError(f"projection must be one of {', '.join(METHODS)}, got {projection!r}")
        if projection == "umap" and not umap_installed():
            raise ValueError("projection must be pca or auto without the package umap-learn, got 'umap'; install it")
        counts = {
            "num_pairs": num_pairs,
            "num_queries": num_queries,
            "num_neighbours": num_neighbours,
            "max_points": max_points,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.normalized: Any = {"mean": list(mean), "std": list(std)}
        self.num_pairs = num_pairs
        self.num_queries = num_queries
        self.num_neighbours = num_neighbours
        self.max_points = max_points
        self.projection = projection
        self._painter: Painter | None = None
        self._images: _Images | None = None
        self._thumbnails: dict[int, str] = {}
        self._points: Points | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw only in the first process, and only where somebody takes the pictures."""
        takes_pictures = hasattr(getattr(trainer.logger, "run", None), "log_picture")
        if self._painter is None and trainer.is_global_zero and takes_pictures:
            self._painter = Painter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the views of the first epoch; a resumed training has shown them."""
        if trainer.global_step == 0:
            self._show(self._show_views, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the views of this epoch, if it is one that is validated."""
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0 or _is_last_epoch(trainer):
            self._show(self._show_views, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show neighbours and projection."""
        self._show(self._show_embeddings, trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show which classes are taken for which."""
        self._show(self._show_confusions, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the last picture; those of the validation before training are drawn while it begins."""
        if self._painter and stage != "validate":
            self._painter.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw to its end what is being drawn, for a moment at most."""
        painter, self._painter = self._painter, None
        if painter:
            painter.give_up(GRACE_SECONDS)

    # in the training's thread: gather, copy and hand over

    def _show(self, show: Callable[[Painter, Trainer], None], trainer: Trainer) -> None:
        if self._painter:
            with self._painter.forgiving():
                load_libraries()
                show(self._painter, trainer)

    def _show_views(self, painter: Painter, trainer: Trainer) -> None:
        images = self._find_images(trainer)
        if images and (painter.waiting < MOST_WAITING or _is_last_epoch(trainer)):
            painter.paint(self._draw_views, _sender(trainer), images, trainer.current_epoch)

    def _show_embeddings(self, painter: Painter, trainer: Trainer) -> None:
        evaluated, images = _find_evaluated(trainer), self._find_images(trainer)
        last = trainer.state.fn == TrainerFn.FITTING and _is_last_epoch(trainer)
        if evaluated is None or (painter.waiting >= MOST_WAITING and not last):
            return
        with_page = last or not painter.waiting
        if images:
            painter.paint(self._draw_neighbours, _sender(trainer), images, evaluated)
        rows = spread(evaluated.truth, self.max_points)
        sample = _Sample(  # without the bank, which is large
            evaluated.query_rows[rows].tolist(),
            evaluated.queries[rows],
            evaluated.truth[rows],
            _class_names(images, evaluated.truth),
        )
        painter.paint(self._draw_projection, _sender(trainer), images, sample, with_page=with_page, last=last)

    def _show_confusions(self, painter: Painter, trainer: Trainer) -> None:
        evaluated, images = _find_evaluated(trainer), self._find_images(trainer)
        if evaluated is not None:
            painter.paint(self._draw_confusions, _sender(trainer), _class_names(images, evaluated.truth), evaluated)

    def _find_images(self, trainer: Trainer) -> _Images | None:
        datamodule = getattr(trainer, "datamodule", None)
        if self._images is None and isinstance(datamodule, SSLDataModule):
            self._images = _Images.copied_from(datamodule, num_pairs=self.num_pairs)
        return self._images

    # in the painter's thread

    def _draw_views(self, send: _Sender, images: _Images, epoch: int) -> None:
        drawn = [images.views[(epoch, number)] for number in images.shown]
        pairs = [sample[0] for sample in drawn if sample is not None]
        view_1, view_2 = (torch.stack(views) for views in zip(*pairs, strict=True))
        send.picture(view_pairs(view_1, view_2, **self.normalized), key="views/pairs")
        send.gallery()

    def _draw_neighbours(self, send: _Sender, images: _Images, evaluated: Evaluated) -> None:
        rows = spread(evaluated.truth, self.num_queries)
        num_neighbours = min(self.num_neighbours, len(evaluated.bank))
        found = nearest(evaluated.queries[rows], evaluated.bank, num_neighbours).indices
        truth, labels = evaluated.truth[rows], evaluated.labels[found]
        names = _class_names(images, torch.cat([truth, labels.flatten()]))
        picture = neighbours(
            torch.stack([images.queries[row][0] for row in evaluated.query_rows[rows].tolist()]),
            torch.stack(
                [torch.stack([images.bank[row][0] for row in places]) for places in evaluated.bank_rows[found].tolist()]
            ),
            labels == truth[:, None],
            query_names=[names[label] for label in truth.tolist()],
            neighbour_names=[[names[label] for label in row] for row in labels.tolist()],
            **self.normalized,
        )
        send.picture(picture, key="embedding/neighbours")

    def _draw_projection(
        self, send: _Sender, images: _Images | None, sample: _Sample, *, with_page: bool, last: bool
    ) -> None:
        auto, num_points = self.projection == "auto", len(sample.rows)
        method = chosen_method("pca" if auto else self.projection, num_points)
        points = self._points = project(sample.embeddings, method=method, like=self._points)
        title = f"Validation embeddings, step {send.step:,} ({method.upper()})"
        picture = projection_png(points, sample.labels, sample.class_names, title=title)
        send.picture(picture, key="embedding/projection")
        send.gallery()
        if not with_page:
            return
        if last and auto and (best := chosen_method("auto", num_points)) != method:
            points = project(sample.embeddings, method=best)
            title = f"Validation embeddings, step {send.step:,} ({best.upper()})"
        page = projection_html(
            points,
            sample.labels,
            sample.class_names,
            self._find_thumbnails(images, sample.rows),
            paths=None if images is None else [images.query_paths[row].as_py() for row in sample.rows],
            title=title,
        )
        send.text(page, PAGE)

    def _draw_confusions(self, send: _Sender, classes: Sequence[str], evaluated: Evaluated) -> None:
        truth, predicted = evaluated.truth, evaluated.predicted
        send.text(per_class_csv(per_class_table(truth, predicted, classes)), TABLE)
        send.picture(confusion_matrix(truth, predicted, classes), key="evaluation/confusion_matrix")

    def _find_thumbnails(self, images: _Images | None, rows: Sequence[int]) -> list[str] | None:
        """Return a thumbnail of each row; they are made once."""
        if images is None:
            return None
        for row in rows:
            if self._painter is None:  # the training has failed
                raise CancelledError
            if row not in self._thumbnails:
                self._thumbnails[row] = thumbnail(images.queries[row][0], **self.normalized)
        return [self._thumbnails[row] for row in rows]


def spread(labels: Tensor, count: int) -> list[int]:
    """Return the places of at most ``count`` images, spread over the classes in proportion; always the same.

    Args:
        labels: class of each image, shape ``(N,)``.
        count: how many, 1 or more.

    Example:
        >>> spread(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2)
        [2, 6]
    """
    by_class = labels.argsort(stable=True)
    count = min(count, len(labels))
    middles = (2 * torch.arange(count) + 1) * len(labels) // (2 * count)
    return by_class[middles].tolist()


def _is_last_epoch(trainer: Trainer) -> bool:
    return trainer.current_epoch + 1 == trainer.max_epochs


def _sender(trainer: Trainer) -> _Sender:
    logger: Any = trainer.logger
    return _Sender(logger.run, trainer.global_step)


def _find_evaluated(trainer: Trainer) -> Evaluated | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.evaluated for callback in callbacks if isinstance(callback, KNNEvaluation)), None)


def _class_names(images: _Images | None, labels: Tensor) -> list[str]:
    """Return the names of the classes, or their numbers where they have none."""
    return (images.classes if images else []) or [str(label) for label in range(int(labels.max()) + 1)]
