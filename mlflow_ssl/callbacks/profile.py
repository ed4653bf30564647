"""Where a step's time goes: a trace to look at, and a table."""

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.profilers import Profiler
from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as TorchProfiler

from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation.step_parts import Operator, Span, innermost, parts_table, step_parts

log = logging.getLogger(__name__)

WARMUP_STEPS = 2
"""Steps that are traced and forgotten: the first ones pay for the tracing."""
TOP_OPERATORS = 15
STEP_MARK = "ProfilerStep"


class Profile(Callback):
    """Trace some steps of the first process, and write where their time went.

    ``profile/trace.json.gz`` opens in ui.perfetto.dev and chrome://tracing; ``profile/steps.md`` has a table of the
    parts of a step and one of the operators. Both are written into the output folder and the run. An epoch's end or a
    validation ends the trace early. When it is done, or if not ``enabled``, the training goes on as without it.

    Args:
        enabled: whether to.
        skip_steps: batches before the trace begins, in which caches are filled and kernels are chosen.
        steps: batches that are traced.

    Raises:
        InputError: if ``enabled`` is neither true nor false, or a number is too small.
    """

    def __init__(self, *, enabled: bool = False, skip_steps: int = 5, steps: int = 10) -> None:
        if not isinstance(enabled, bool):
            raise InputError(f"profile must be true or false, got {enabled!r}")
        for name, number, least in (("skip_steps", skip_steps, 0), ("steps", steps, 1)):
            if number < least:
                raise InputError(f"callbacks.profile.{name} must be at least {least}, got {number}")
        self.enabled = enabled
        self.skip_steps = skip_steps
        self.steps = steps
        self._profiler: TorchProfiler | None = None
        self._begun = 0
        self._hooks: list[Any] = []
        self._profiler_before: Any = None
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the parts of a step, and get ready."""
        if not self.enabled or not trainer.is_global_zero:
            return
        self._trainer = trainer
        self._begun = 0
        self._profiler_before, trainer.profiler = trainer.profiler, _Marks()  # type: ignore[attr-defined]
        self._hooks = [hook for name, module in pl_module.named_children() for hook in _mark_forward(name, module)]
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = TorchProfiler(
            activities=activities,
            schedule=schedule(wait=self.skip_steps, warmup=WARMUP_STEPS, active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count; the trace begins and ends between two batches, so that each step has all its parts."""
        if self._profiler is None:
            return
        if self._begun:
            self._profiler.step()
        self._begun += 1
        if self._begun > self.skip_steps + WARMUP_STEPS + self.steps:
            self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the trace if it has begun: a validation is no step."""
        if self._profiler is not None and self._begun > self.skip_steps + WARMUP_STEPS:
            self._profiler.stop()
            self._leave()

    on_train_epoch_end = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if it came to no trace."""
        if self._profiler is not None:
            needed = self.skip_steps + WARMUP_STEPS + 1
            log.warning(
                "profile: nothing is traced in %d batches, %d are needed; lower callbacks.profile.skip_steps or train "
                "for longer",
                self._begun,
                needed,
            )
            self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no mark behind."""
        self._leave()

    def _leave(self) -> None:
        if self._trainer is not None:
            self._trainer.profiler = self._profiler_before  # type: ignore[attr-defined]
        for hook in self._hooks:
            hook.remove()
        profiler, self._profiler, self._trainer, self._hooks = self._profiler, None, None, []
        if profiler is not None:
            profiler.on_trace_ready = None
            profiler.stop()

    def _write(self, profiler: TorchProfiler) -> None:
        """Write trace and tables into the output folder, and from there into the run."""
        trainer = self._trainer
        assert trainer is not None
        folder = Path(trainer.default_root_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / "trace.json.gz", folder / "steps.md"
        profiler.export_chrome_trace(str(files[0]))
        files[1].write_text(summarized(profiler))
        run: Any = getattr(trainer.logger, "run", None)
        if hasattr(run, "log_file"):
            for file in files:
                run.log_file(file, "profile")
        log.info("profile: %s opens in https://ui.perfetto.dev; where a step's time went, in %s:", *files)
        log.info("%s", files[1].read_text().partition("\n\n| operator")[0])


def summarized(profiler: TorchProfiler) -> str:
    """Return the tables of a trace whose steps and parts are marked."""
    traced: Any = profiler  # its methods have no types
    events = traced.events()
    marks = [event for event in events if event.is_user_annotation and event.device_type == DeviceType.CPU]
    steps = [event for event in marks if event.name.startswith(STEP_MARK)]
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in marks
        if event.thread == steps[0].thread and not event.name.startswith(STEP_MARK)
    ]
    divided = innermost(
        spans,
        begin=min(step.time_range.start for step in steps),
        end=max(step.time_range.end for step in steps),
    )
    kernels = [(event.time_range.start, event.self_device_time_total) for event in events]
    operators = [
        Operator(each.key, each.count, each.self_cpu_time_total, each.self_device_time_total)
        for each in traced.key_averages()
        if not each.is_user_annotation and each.device_type == DeviceType.CPU
    ]
    operators.sort(key=lambda each: (each.device, each.host), reverse=True)
    durations = [step.time_range.end - step.time_range.start for step in steps]
    return parts_table(durations, step_parts(divided, kernels), operators[:TOP_OPERATORS])


class _Marks(Profiler):
    """Mark in a trace what Lightning does when."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, record_function] = {}

    def start(self, action_name: str) -> None:
        """Begin a mark."""
        self._open[action_name] = mark = record_function(action_name)
        mark.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, action_name: str) -> None:
        """End it."""
        mark = self._open.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)


def _mark_forward(name: str, module: nn.Module) -> list[Any]:
    """Mark each call of a module, and return the hooks that do so."""
    marks: list[record_function] = []

    def begin(*_: Any) -> None:
        marks.append(record_function(f"forward {name}"))
        marks[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
