"""The driver of a training on Ray: it spreads the words of ``python -m mlflow_ssl`` over the workers of Ray Train.

A worker that is lost takes the others with it; all are started again, and go on in the same run.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from mlflow_ssl.launch.ray_jobs import RaySettings, read_workers

ENVIRONMENT = "++trainer.plugins=[{_target_: ray.train.lightning.RayLightningEnvironment}]"
"""What makes Lightning take the numbers of its processes from Ray."""
HANG_SECONDS = 1800
"""How long a worker waits for the others where `mlflow_ssl.watch` does not find that one of them hangs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the words of a command line, and return the exit code."""
    settings, words = read_workers(), list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as scratch:
        return _train(words, settings, storage=settings.storage_path or scratch)


def _train(words: list[str], settings: RaySettings, *, storage: str) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": settings.cpus_per_worker} | settings.resources_per_worker
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    trainer = TorchTrainer(
        _work,
        train_loop_config={"words": words, "folder": os.environ.get("MLFLOW_SSL_FOLDER")},
        torch_config=TorchConfig(timeout_s=HANG_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers, use_gpu=bool(settings.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=os.environ.get("MLFLOW_RUN_ID", "mlflow_ssl"),
            storage_path=storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # Ray's names for it differ from version to version
        logging.getLogger(__name__).debug("the training failed", exc_info=error)
        sys.stderr.write(f"error: the training failed on Ray: {str(error).strip().splitlines()[-1]}\n")
        return 1
    return int((result.metrics or {}).get("exit_code", 1))


def _work(loop: dict[str, Any]) -> None:
    """Train, as one of the workers."""
    import ray.train
    from pytorch_lightning.utilities import rank_zero_only

    from mlflow_ssl.cli import main as command

    context = ray.train.get_context()
    rank_zero_only.rank = context.get_world_rank()  # type: ignore[attr-defined]
    if loop["folder"]:
        os.chdir(loop["folder"])
    logging.getLogger().handlers.clear()  # Ray's would say everything a second time
    spread = [ENVIRONMENT] if context.get_world_size() > 1 else []
    code = command([*loop["words"], *spread])
    ray.train.report({"exit_code": code})


if __name__ == "__main__":
    sys.exit(main())
