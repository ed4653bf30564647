"""How a training fares, by what was measured at its validations: a decision in plain numbers.

An untrained network looks collapsed: its BatchNorm statistics are not the images' yet, all its embeddings point one way
(a mean cosine of 0.997, a deviation of 0.04 and a rank of 5 for a ResNet on the digits) and so do its projections. What
tells a collapsed network from it is that views agree, which an untrained predictor's do not. And BatchNorm keeps the
embeddings of a collapsed network apart; it is the projections that fall together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["improving", "plateau", "collapsing", "diverging"]

AGREED = 0.95
"""Agreement of views below which nothing has collapsed, as of a network that is new.

Digits that collapse have more from the second epoch on; healthy ones come close to it at their end, spread out.
"""
ONE_PROJECTION = 0.2
"""Deviation of projections below which all are one: on the digits 0.07 to 0.13 collapsed, 0.55 to 0.92 healthy."""
ONE_EMBEDDING = 0.005
"""Deviation of embeddings below which all are one, whatever the untrained network's was."""
ONE_EMBEDDING_SHARE = 0.1
"""Share of the untrained network's deviation below which all embeddings are one."""
RANK_SHARE = 0.1
"""Share of the highest rank so far, both above 1, below which dimensions have collapsed; digits keep 0.8 and more."""
LOSS_GROWTH = 2.0
"""Times the loss of the first steps above which a training diverges."""
FEWEST_IMAGES = 8
"""Images below which embeddings tell nothing."""

COLLAPSE_ADVICE = (
    "check that model.predictor is an MLP and the target receives no gradient; raise model.base_tau, lower "
    "optimizer.lr, or raise datamodule.batch_size"
)
SYNC_ADVICE = "set trainer.sync_batchnorm=true, as each process normalizes by its own batch; "
DIMENSIONS_ADVICE = (
    "lower optimizer.lr, raise model.base_tau or datamodule.batch_size, or strengthen transforms.augmentation1 and 2"
)
DIVERGENCE_ADVICE = "lower optimizer.lr, raise scheduler.warmup_epochs, or set trainer.gradient_clip_val"
PLATEAU_ADVICE = "stop here, or start anew with another optimizer.lr, model.base_tau or backbone"


@dataclass(frozen=True)
class Reading:
    """What one validation measured.

    Attributes:
        step: optimizer steps done; 0 is the untrained network.
        epoch: number of the epoch, from 0.
        rankme: effective rank of the embeddings.
        deviation: their deviation per dimension, about 1 where uniform, see `mlflow_ssl.evaluation.health`.
        mean_cosine: their mean cosine.
        dimensions: of an embedding.
        num_images: that were embedded.
        loss: mean of the last training steps; None before the first.
        agreement: mean cosine of prediction and target projection in those steps; None where the loss does not say.
        projection_deviation: deviation per dimension of the online projections; None without a projector.
        monitor: the metric to improve, higher is better; None without one.
    """

    step: int
    epoch: int
    rankme: float
    deviation: float
    mean_cosine: float
    dimensions: int
    num_images: int
    loss: float | None = None
    agreement: float | None = None
    projection_deviation: float | None = None
    monitor: float | None = None


@dataclass(frozen=True)
class Verdict:
    """How a training fares, why, and in one line what to change; the last is empty where nothing is to be changed."""

    state: State
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.state}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


def judge(
    history: Sequence[Reading],
    *,
    start_loss: float | None = None,
    patience: int = 5,
    separate_batchnorm: bool = False,
) -> Verdict:
    """Return how a training fares at its last validation.

    It diverges where the loss is not finite or twice what it was in the first steps, or where the last ``patience``
    validations have left the monitor below the untrained network's by more than noise. It collapses where all
    projections, or all embeddings, are one while views agree; or where the rank has fallen to a tenth of the highest so
    far, twice in a row, and the monitor is not at its best. It is on a plateau where the last ``patience`` validations
    have not raised the monitor by more than its noise. The untrained network is never judged by its embeddings.

    Args:
        history: readings by step, that of the untrained network first where there is one.
        start_loss: mean loss of the first training steps; None where it is not known.
        patience: validations without improvement, 1 or more.
        separate_batchnorm: whether several processes normalize each by a batch of its own; the advice then says so.

    Raises:
        ValueError: if there is no reading, or ``patience`` is below 1.

    Example:
        >>> untrained = Reading(0, 0, rankme=5.3, deviation=0.04, mean_cosine=0.997, dimensions=512, num_images=359)
        >>> judge([untrained]).state
        'improving'
        >>> told = {"loss": 0.03, "agreement": 0.99, "projection_deviation": 0.1}
        >>> fallen = Reading(40, 1, rankme=122, deviation=0.5, mean_cosine=0.7, dimensions=512, num_images=359, **told)
        >>> judge([untrained, fallen]).state
        'collapsing'
    """
    if not history:
        raise ValueError("history must hold a reading, got none")
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    trained = [reading for reading in history if reading.step > 0]
    verdict = (
        _diverging(history[-1], start_loss)
        or _complete_collapse(history)
        or _dimensional_collapse(history)
        or _worse_than_untrained(history, patience)
        or _plateau(trained, patience)
        or _improving(trained)
    )
    if verdict.state == "collapsing" and separate_batchnorm:
        return replace(verdict, advice=SYNC_ADVICE + verdict.advice)
    return verdict


def _diverging(last: Reading, start_loss: float | None) -> Verdict | None:
    if last.loss is None:
        return None
    if not math.isfinite(last.loss):
        return Verdict("diverging", f"the loss is {last.loss}", DIVERGENCE_ADVICE)
    if start_loss is not None and last.loss > LOSS_GROWTH * start_loss > 0:
        return Verdict("diverging", f"the loss grew from {start_loss:.3g} to {last.loss:.3g}", DIVERGENCE_ADVICE)
    return None


def _complete_collapse(history: Sequence[Reading]) -> Verdict | None:
    last = history[-1]
    if last.step == 0 or last.num_images < FEWEST_IMAGES:
        return None
    if last.agreement is None:  # half of the evidence: wait for a second reading
        twice = [reading for reading in history[-2:] if reading.step > 0]
        if len(twice) < 2 or not all(_is_one_embedding(reading, history[0]) for reading in twice):
            return None
        return Verdict("collapsing", f"all embeddings are nearly one, {_spread(last)}", COLLAPSE_ADVICE)
    if last.agreement <= AGREED:
        return None
    if last.projection_deviation is not None and last.projection_deviation < ONE_PROJECTION:
        reason = (
            f"all projections are nearly one: their deviation is {last.projection_deviation:.3f}, and views agree by "
            f"{last.agreement:.3f}"
        )
        return Verdict("collapsing", reason, COLLAPSE_ADVICE)
    if _is_one_embedding(last, history[0]):
        return Verdict("collapsing", f"all embeddings are nearly one, {_spread(last)}", COLLAPSE_ADVICE)
    return None


def _is_one_embedding(reading: Reading, first: Reading) -> bool:
    untrained = first.deviation if first.step == 0 else 0.0
    return reading.deviation < max(ONE_EMBEDDING, ONE_EMBEDDING_SHARE * untrained)


def _spread(reading: Reading) -> str:
    return f"deviation {reading.deviation:.4f} and mean cosine {reading.mean_cosine:.4f}"


def _dimensional_collapse(history: Sequence[Reading]) -> Verdict | None:
    """Look at the rank above 1, which is that of one direction; a good monitor forgives a low rank."""
    last_two = [reading for reading in history[-2:] if reading.step > 0]
    highest = max(reading.rankme for reading in history)
    low = 1 + RANK_SHARE * (highest - 1)
    if len(last_two) < 2 or highest <= 2 or any(reading.rankme >= low for reading in last_two):
        return None
    last = last_two[-1]
    monitors = [reading.monitor for reading in history if reading.monitor is not None]
    if last.num_images < FEWEST_IMAGES or (last.monitor is not None and last.monitor >= max(monitors) - _noise(last)):
        return None
    reason = f"the embeddings' rank fell from {highest:.1f} to {last.rankme:.1f} of {last.dimensions} dimensions"
    return Verdict("collapsing", reason, DIMENSIONS_ADVICE)


def _worse_than_untrained(history: Sequence[Reading], patience: int) -> Verdict | None:
    """Look at what a bounded loss cannot say: it hardly doubles, and falls while too high a rate ruins the network."""
    untrained, since = history[0], history[1:][-patience:]
    if untrained.step > 0 or untrained.monitor is None or len(since) < patience:
        return None
    best = max(map(_monitor, since))
    if not -math.inf < best < untrained.monitor - 2 * _noise(untrained):
        return None
    reason = (
        f"the best of the last {patience} validations, {best:.4f}, is below the untrained network's "
        f"{untrained.monitor:.4f}"
    )
    return Verdict("diverging", reason, DIVERGENCE_ADVICE)


def _plateau(trained: Sequence[Reading], patience: int) -> Verdict | None:
    monitored = [reading for reading in trained if reading.monitor is not None]
    if len(monitored) <= patience:
        return None
    before = max(monitored[:-patience], key=_monitor)
    since = max(map(_monitor, monitored[-patience:]))
    if since > _monitor(before) + _noise(before):
        return None
    reason = (
        f"the best of the last {patience} validations, {since:.4f}, is not above {_monitor(before):.4f} of step "
        f"{before.step} by more than its noise, {_noise(before):.4f}"
    )
    return Verdict("plateau", reason, PLATEAU_ADVICE)


def _improving(trained: Sequence[Reading]) -> Verdict:
    if not trained:
        return Verdict("improving", "the network is untrained")
    last = trained[-1]
    monitor = "" if last.monitor is None else f", monitor {last.monitor:.4f}"
    return Verdict("improving", f"rank {last.rankme:.1f} of {last.dimensions} dimensions{monitor}")


def _monitor(reading: Reading) -> float:
    return -math.inf if reading.monitor is None else reading.monitor


def _noise(reading: Reading) -> float:
    """Return the standard error of a share of images; a hundredth of what is no share."""
    value = _monitor(reading)
    if 0 <= value <= 1:
        return math.sqrt(value * (1 - value) / max(reading.num_images, 1))
    return 0.01 * abs(value)
