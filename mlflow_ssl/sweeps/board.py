"""What a sweep shows of its trainings: a table for people, one for programs, and the words around it."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from mlflow_ssl.sweeps.space import shown
from mlflow_ssl.sweeps.study import State, Trial

LONGEST_NOTE = 7500
"""Of the 8000 letters that MLflow keeps of a description."""
ORDER: tuple[State, ...] = ("finished", "running", "pruned", "killed", "failed", "waiting")
LONGEST_REASON = 120


def counted(trials: Sequence[Trial]) -> dict[State, int]:
    """Return how many trials are in each state; those that were tried again are left out."""
    counts = Counter(trial.state for trial in trials if not trial.retried)
    return {state: counts[state] for state in ORDER if counts[state]}


def as_csv(trials: Sequence[Trial], keys: Sequence[str], monitor: str) -> str:
    """Return every trial as a line of CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", monitor, *keys, "seconds", "run_id", "reason"])
    for trial in trials:
        result = "" if trial.result is None else repr(trial.result)
        values = [trial.values[key] for key in keys]
        table.writerow(
            [trial.number, trial.state, result, *values, _seconds(trial), trial.run_id or "", _line(trial.reason)]
        )
    return text.getvalue()


def as_note(
    trials: Sequence[Trial],
    keys: Sequence[str],
    *,
    monitor: str,
    highest: bool,
    experiment_id: str,
    run_id: str,
    ending: str = "",
    registered: str = "",
) -> str:
    """Return a sweep's description: what it searches, how it stands, its trials, the best first.

    Args:
        trials: all of them.
        keys: what is swept.
        monitor: what they are compared by.
        highest: whether higher is better.
        experiment_id: of the runs.
        run_id: of the sweep.
        ending: why it was stopped or failed, in Markdown.
        registered: how the best network is loaded, in Markdown.
    """
    counts = ", ".join(f"{count} {state}" for state, count in counted(trials).items())
    swept = ", ".join(f"`{key}`" for key in keys)
    lines = [f"**Sweep** of {swept}: {counts or 'nothing begun'}; best by `{monitor}` first.", ""]
    lines += [ending] if ending else []
    after = [
        "",
        *([registered] if registered else []),
        "Every value: artifact `sweep/children.csv`; as lines: `sweep/parallel_coordinates.html`.",
        "",
        *("Go on with what is missing:", "```bash", f"mlflow run . -P resume={run_id}", "```"),
    ]
    head = ["trial", "state", f"`{monitor}`", *(f"`{key}`" for key in keys), "minutes", ""]
    lines += [_row(head), _row(["---"] * len(head))]
    ranked = sorted(trials, key=lambda trial: _rank(trial, highest=highest))
    room = LONGEST_NOTE - len("\n".join([*lines, *after]))
    for position, trial in enumerate(ranked):
        row = _row(_cells(trial, keys, experiment_id))
        room -= len(row) + 1
        if room < 0:
            lines.append(f"\n… and {len(ranked) - position} more")
            break
        lines.append(row)
    return "\n".join([*lines, *after])


def _rank(trial: Trial, *, highest: bool) -> tuple[int, float, int]:
    result = float("inf") if trial.result is None else trial.result * (-1 if highest else 1)
    return ORDER.index(trial.state), result, trial.number


def _cells(trial: Trial, keys: Sequence[str], experiment_id: str) -> list[str]:
    name = str(trial.number)
    linked = f"[{name}](#/experiments/{experiment_id}/runs/{trial.run_id})" if trial.run_id else name
    result = "" if trial.result is None else f"{trial.result:.4f}"
    if trial.state == "finished":
        result = f"**{result}**"
    seconds = _seconds(trial)
    minutes = f"{float(seconds) / 60:.1f}" if seconds else ""
    reason = _line(trial.reason)
    return [
        linked,
        trial.state,
        result,
        *(f"`{shown(trial.values[key])}`" for key in keys),
        minutes,
        reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…",
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _seconds(trial: Trial) -> str:
    if trial.began is None or trial.state in ("running", "waiting", "killed"):
        return ""
    return f"{((trial.ended or datetime.now()) - trial.began).total_seconds():.0f}"


def _line(text: str) -> str:
    return " ".join(text.split())
