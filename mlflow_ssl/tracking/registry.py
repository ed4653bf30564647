"""Packages of `mlflow_ssl.tracking.packaging` in MLflow's model registry, and which version is the champion."""

import json
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mlflow_ssl.errors import InputError
from mlflow_ssl.export import load_torchscript
from mlflow_ssl.tracking.packaging import MODEL, Registration

log = logging.getLogger(__name__)

CHAMPION = "champion"
"""Alias of the version to deploy."""
PACKAGE_TAG = "mlflow_ssl.package"
PROMOTION_TAG = "promotion"
"""Says why a version became the champion, or not."""
DIGEST_TAG = "data.digest"
VERSIONS_TAG = "mlflow.modelVersions"
"""MLflow's own: from it a logged model's page knows its versions."""


def register_package(client: MlflowClient, run_id: str, folder: Path) -> str:
    """Upload a package as a model of a run, register it, and return its version.

    It may be repeated at any time and by any process, as after a failure half-way: what is done already is found by the
    package's tag and not done again. Two processes must not do it at once, since MLflow has no lock.

    Args:
        client: of the tracking store and the registry.
        run_id: of the run that the network is of.
        folder: what `package_network` wrote.

    Raises:
        MlflowException: whatever the client raises.
    """
    registration = Registration.read(folder)
    model = _find_model(client, run_id, registration) or _create_model(client, run_id, registration)
    if model.status != LoggedModelStatus.READY:
        _upload(client, run_id, model, folder / MODEL)
    version = _find_version(client, run_id, registration) or _create_version(client, run_id, registration, model)
    _complete(client, model, version, registration)
    if PROMOTION_TAG not in version.tags:
        _promote(client, version, registration)
    return str(version.version)


def _find_model(client: MlflowClient, run_id: str, registration: Registration) -> LoggedModel | None:
    experiment = client.get_run(run_id).info.experiment_id
    known = client.search_logged_models(
        [experiment],
        filter_string=f"source_run_id = '{run_id}' AND tags.`{PACKAGE_TAG}` = '{registration.package}'",
    )
    return known[0] if known else None


def _create_model(client: MlflowClient, run_id: str, registration: Registration) -> LoggedModel:
    return client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name="model",
        source_run_id=run_id,
        tags={**registration.tags, PACKAGE_TAG: registration.package},
    )


def _upload(client: MlflowClient, run_id: str, model: LoggedModel, folder: Path) -> None:
    client.log_model_artifacts(model.model_id, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        _stamped(Model.load(folder), run_id, model).save(Path(scratch) / "MLmodel")
        client.log_model_artifacts(model.model_id, scratch)
    outputs = client.get_run(run_id).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs else set()
    if model.model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _stamped(description: Model, run_id: str, model: LoggedModel) -> Model:
    """Return a package's MLmodel as MLflow writes one itself: it knows its run and its logged model."""
    description.run_id = run_id
    description.model_id = description.model_uuid = model.model_id
    description.artifact_path = model.artifact_location
    return description


def _find_version(client: MlflowClient, run_id: str, registration: Registration) -> ModelVersion | None:
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == registration.name and version.tags.get(PACKAGE_TAG) == registration.package:
            return version
    return None


def _create_version(client: MlflowClient, run_id: str, registration: Registration, model: LoggedModel) -> ModelVersion:
    _ensure_registered(client, registration.name)
    created = client.create_model_version(
        registration.name,
        # not "models:/...", which a local store looks up in the current tracking store instead of the client's
        source=model.artifact_location,
        run_id=run_id,
        model_id=model.model_id,
        tags={**registration.tags, PACKAGE_TAG: registration.package},
    )
    log.info("registered %s version %s", created.name, created.version)
    return created


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _complete(client: MlflowClient, model: LoggedModel, version: ModelVersion, registration: Registration) -> None:
    """Give a version its description, and its logged model a link to it, where they are missing."""
    if not version.description:
        uri = f"models:/{version.name}/"
        text = registration.description.replace(f"{uri}VERSION", f"{uri}{version.version}")
        client.update_model_version(version.name, str(version.version), text)
    links = json.loads(client.get_logged_model(model.model_id).tags.get(VERSIONS_TAG, "[]"))
    if not any(link["name"] == version.name and str(link["version"]) == str(version.version) for link in links):
        links.append({"name": version.name, "version": str(version.version)})
        client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps(links)})


# the champion


@dataclass(frozen=True)
class Judged:
    """A version as the champion is chosen by.

    Args:
        version: its number.
        value: the deciding figure; None where it was not measured.
        digest: of the data that it was measured on.
    """

    version: str
    value: float | None
    digest: str | None

    @classmethod
    def by_tags(cls, version: ModelVersion, metric: str) -> "Judged":
        """Return what a version's tags say."""
        return cls(str(version.version), _number(version.tags.get(metric)), version.tags.get(DIGEST_TAG))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:  # somebody has written into the tag
        return None
    return value if math.isfinite(value) else None


def decide(new: Judged, champion: Judged | None, *, metric: str, promote: str) -> tuple[bool, str]:
    """Return whether a version becomes the champion, and why or why not.

    Args:
        new: the version.
        champion: the present one, if there is one.
        metric: name of the deciding figure; higher is better.
        promote: ``auto``, or ``never``.

    Example:
        >>> new, old = Judged("4", 0.972, "d"), Judged("3", 0.961, "d")
        >>> decide(new, old, metric="test_acc", promote="auto")
        (True, 'champion: test_acc 0.9720 > 0.9610 of version 3')
    """
    if promote != "auto":
        return False, f"not promoted: registry.promote is {promote}"
    if champion is None:
        return True, "champion: there was none"
    obstacle = _obstacle(new, champion, metric)
    if obstacle or new.value is None or champion.value is None:
        return False, f"not promoted: {obstacle}"
    shown, shown_champion = _told_apart(new.value, champion.value)
    if new.value > champion.value:
        return True, f"champion: {metric} {shown} > {shown_champion} of version {champion.version}"
    return False, f"not promoted: {metric} of version {champion.version} is {shown_champion} >= {shown}"


def _obstacle(new: Judged, champion: Judged, metric: str) -> str | None:
    """Return what keeps two versions from being compared, or None."""
    if new.value is None:
        return f"no {metric}"
    if champion.value is None:
        return f"version {champion.version} has no {metric}"
    if new.digest != champion.digest:
        return f"version {champion.version} was measured on other data (digest {champion.digest})"
    return None


def _told_apart(*values: float) -> list[str]:
    """Return figures with four digits, or more where they differ later."""
    digits = 4 if len({f"{value:.4f}" for value in values}) == len(set(values)) else 6
    return [f"{value:.{digits}f}" for value in values]


def _promote(client: MlflowClient, version: ModelVersion, registration: Registration) -> None:
    """Move the alias if the version deserves it, then write down why.

    The tag comes last: where it is, nobody touches the alias again, whoever it has gone to since.
    """
    number = str(version.version)
    alias = client.get_registered_model(version.name).aliases.get(CHAMPION)
    if str(alias) == number:
        reason = f"champion: {registration.metric} {registration.tags.get(registration.metric)}, after an interruption"
    else:
        champion = None if alias is None else client.get_model_version(version.name, str(alias))
        metric = registration.metric
        promoted, reason = decide(
            Judged.by_tags(version, metric),
            None if champion is None else Judged.by_tags(champion, metric),
            metric=metric,
            promote=registration.promote,
        )
        if promoted:
            client.set_registered_model_alias(version.name, CHAMPION, number)
    client.set_model_version_tag(version.name, number, PROMOTION_TAG, reason)
    log.info("%s version %s: %s", version.name, number, reason)


# loading


def load_backbone_weights(model_uri: str) -> dict[str, torch.Tensor]:
    """Return the backbone's state dict of a network that was registered here.

    Raises:
        InputError: if there is no such model, or it is not one of ours.
    """
    try:
        folder = Path(mlflow.artifacts.download_artifacts(model_uri))
    except MlflowException as error:
        raise InputError(f"backbone.checkpoint_path: no registered model at {model_uri}: {error.message}") from error
    file = folder / "data" / "model.pth"
    try:
        network: Any = load_torchscript(file)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"backbone.checkpoint_path: {model_uri} is not a TorchScript network") from error
    prefix = "backbone."
    return {key.removeprefix(prefix): value for key, value in network.state_dict().items() if key.startswith(prefix)}
