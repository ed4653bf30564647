"""The ways in which a run ends early without being our fault."""

import signal


class InputError(ValueError):
    """A mistake in what the user gave: shown as one line, exit code 2, no traceback."""


class MachineError(RuntimeError):
    """Something that the machine refuses, such as a full disk: shown as one line, exit code 1, no traceback."""


class ProcessError(MachineError):
    """Another process of a training has failed, which this one cannot go on without."""


class NotSynced(RuntimeError):  # noqa: N818 nothing went wrong
    """The training is done, and not all of it is in MLflow yet: shown in two lines, exit code 3."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, raised where the program stands so that every ``finally`` still runs.

    A ``BaseException``, as ``KeyboardInterrupt`` is, so that no ``except Exception`` swallows it.
    """

    def __init__(self, signum: int) -> None:
        """Remember which signal it was."""
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
