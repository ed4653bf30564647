"""Where the time of training steps went, from the spans of a trace."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

REST = "Lightning's loop and logging"
PARTS = (
    ("train_dataloader_next", "waiting for data"),
    ("batch_transfer", "to the device"),
    ("transfer_batch_to_device", "to the device"),
    ("batch_to_device", "to the device"),
    ("forward ", ""),
    (".training_step", "loss"),
    (".backward", "backward"),
    ("target update", ""),  # so the methods name it
    ("Optimizer.", "optimizer"),
    ("optimizer_zero_grad", "optimizer"),
    (".optimizer_step", "optimizer"),
    ("configure_gradient_clipping", "optimizer"),
    ("lr_scheduler_step", "optimizer"),
    ("[Callback]", "callbacks"),
    ("[LightningModule]", "callbacks"),
    ("[Strategy]", "callbacks"),
)
"""What the name of a span contains, and the part of a step that it is, the first that fits; "" for the name itself."""


class Span(NamedTuple):
    """Something that took from ``start`` to ``end``, in microseconds."""

    name: str
    start: float
    end: float


class Part(NamedTuple):
    """A part of the steps: microseconds of the host, and of the device that it has put to work, of all steps."""

    name: str
    host: float
    device: float


def part_of(name: str) -> str:
    """Return the part of a step that a span belongs to.

    Example:
        >>> part_of("[Strategy]SingleDeviceStrategy.backward"), part_of("forward online")
        ('backward', 'forward online')
    """
    return next((part or name for word, part in PARTS if word in name), REST)


def innermost(spans: Iterable[Span], *, begin: float, end: float) -> list[Span]:
    """Divide the time from ``begin`` to ``end`` among nested spans of one thread: each moment is the innermost one's.

    Returns:
        Spans that follow each other without gaps, in order; what no span covers is named "".

    Example:
        >>> spans = [Span("outer", 0, 10), Span("inner", 2, 5), Span("inner", 6, 7)]
        >>> [(span.name, span.end) for span in innermost(spans, begin=0, end=11)]
        [('outer', 2), ('inner', 5), ('outer', 6), ('inner', 7), ('outer', 10), ('', 11)]
    """
    divided: list[Span] = []
    open_spans = [Span("", begin, end)]
    now = begin

    def advance(until: float) -> None:
        nonlocal now
        until = min(max(until, now), end)
        if until > now:
            divided.append(Span(open_spans[-1].name, now, until))
            now = until

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while len(open_spans) > 1 and open_spans[-1].end <= span.start:
            advance(open_spans[-1].end)
            open_spans.pop()
        advance(span.start)
        open_spans.append(span)
    while open_spans:
        advance(open_spans[-1].end)
        open_spans.pop()
    return divided


def step_parts(divided: Sequence[Span], kernels: Iterable[tuple[float, float]] = ()) -> list[Part]:
    """Return the parts of the steps, the longest first.

    Args:
        divided: the time of the steps, see `innermost`.
        kernels: when something was put to work on a device, and how long the device took for it. The device may do so
            later: it is counted where it was asked for.
    """
    host: Counter[str] = Counter()
    device: Counter[str] = Counter()
    for span in divided:
        host[part_of(span.name)] += span.end - span.start  # type: ignore[assignment]
    starts = [span.start for span in divided]
    for asked, took in kernels:
        place = bisect_right(starts, asked) - 1
        if place >= 0 and asked < divided[place].end:
            device[part_of(divided[place].name)] += took  # type: ignore[assignment]
    parts = [Part(name, host[name], device[name]) for name in host]
    return sorted(parts, key=lambda part: (part.host, part.device), reverse=True)


class Operator(NamedTuple):
    """An operator: calls, and microseconds of its own on host and device, of all steps."""

    name: str
    calls: int
    host: float
    device: float


def parts_table(steps: Sequence[float], parts: Sequence[Part], operators: Sequence[Operator]) -> str:
    """Return where the time went as Markdown.

    Args:
        steps: microseconds of each step.
        parts: see `step_parts`.
        operators: those to be listed, in order.
    """
    count, total = len(steps), sum(part.host for part in parts)
    on_device = any(part.device for part in parts)
    head, line = ("| device, ms | share ", "| --- | --- ") if on_device else ("", "")
    shortest, longest = min(steps) / 1000, max(steps) / 1000
    rows = [
        f"A step takes {total / count / 1000:.2f} ms, the mean of {count} steps of {shortest:.2f} to {longest:.2f} ms; "
        "a trace makes each a little longer.",
        "",
        f"| part of a step | host, ms | share {head}|",
        f"| --- | --- | --- {line}|",
    ]
    total_device = sum(part.device for part in parts)
    for part in parts:
        device = f"| {part.device / count / 1000:.3f} | {part.device / total_device:.1%} " if on_device else ""
        rows.append(f"| {part.name} | {part.host / count / 1000:.3f} | {part.host / total:.1%} {device}|")
    rows += ["", f"| operator | calls | host, ms | share {head}|", f"| --- | --- | --- | --- {line}|"]
    for each in operators:
        device = f"| {each.device / count / 1000:.3f} | {each.device / total_device:.1%} " if on_device else ""
        numbers = f"{each.calls / count:g} | {each.host / count / 1000:.3f} | {each.host / total:.1%}"
        rows.append(f"| `{each.name}` | {numbers} {device}|")
    return "\n".join(rows) + "\n"
