"""How Lightning starts the other processes of a machine, and how all of them come to be watched."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from pytorch_lightning import Trainer
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mlflow_ssl.processes import launched
from mlflow_ssl.tasks.output import process_folder
from mlflow_ssl.tracking.lifecycle import end_lost_run, end_unopened_run
from mlflow_ssl.watch import watch


@contextlib.contextmanager
def watched(output: Path, *, seconds: float | None) -> Iterator[None]:
    """Watch the processes of the training in the context; see `mlflow_ssl.watch`.

    Args:
        output: the output folder.
        seconds: how long one may stand still or be silent; None for ever.
    """
    ends = end_unopened_run, functools.partial(end_lost_run, output)
    with watch.over(process_folder(output), seconds=seconds, ends=ends):
        watch.begin(*launched())
        yield


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, without its observer: that kills all processes where one fails, the first with its open run too."""

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        children, self.procs = self.procs, []  # the observer looks after none
        first = self.cluster_environment.node_rank() * self.num_processes + 1
        watch.children = dict(enumerate(children, start=first))

    def kill(self, signum: int) -> None:
        """Send a signal to the processes that were started."""
        for child in watch.children.values():
            child.send_signal(signum)


def watch_processes(trainer: Trainer) -> None:
    """Have the processes that a trainer starts watched; those of other launchers are from the beginning."""
    launcher = trainer.strategy.launcher
    if type(launcher) is not _SubprocessScriptLauncher:
        return
    trainer.strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    watch.begin(trainer.global_rank, trainer.world_size)
