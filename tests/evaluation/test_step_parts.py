"""Where the time of steps went."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_ssl.evaluation.step_parts import REST, Operator, Part, Span, innermost, part_of, parts_table, step_parts


@st.composite
def nested_spans(draw, begin=0, end=40, depth=0):
    spans, now = [], begin
    while depth < 4 and now < end and draw(st.booleans()):
        start = draw(st.integers(now, end - 1))
        stop = draw(st.integers(start + 1, end))
        spans += [Span(f"{depth}-{start}", start, stop), *draw(nested_spans(start, stop, depth + 1))]
        now = stop
    return spans


@given(nested_spans(), st.integers(0, 20), st.integers(21, 45))
def test_each_moment_is_the_innermost_spans(spans, begin, end):
    divided = innermost(spans, begin=begin, end=end)
    found = [span.name for span in divided for _ in range(int(span.end - span.start))]
    expected = []
    for moment in range(begin, end):
        covering = [span for span in spans if span.start <= moment < span.end]
        expected.append(covering[-1].name if covering else "")  # the deepest comes last
    assert found == expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("[_TrainingEpochLoop].train_dataloader_next", "waiting for data"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "to the device"),
        ("[LightningModule]BYOL.on_after_batch_transfer", "to the device"),
        ("forward target", "forward target"),
        ("[Strategy]DDPStrategy.training_step", "loss"),
        ("[Strategy]DDPStrategy.backward", "backward"),
        ("[Callback]Health.on_before_backward", "callbacks"),
        ("[LightningModule]BYOL.on_before_backward", "callbacks"),
        ("[Callback]Health.on_before_optimizer_step", "callbacks"),
        ("Optimizer.step#LARS.step", "optimizer"),
        ("[LightningModule]BYOL.optimizer_step", "optimizer"),
        ("target update", "target update"),
        ("[LightningModule]BYOL.on_train_batch_end", "callbacks"),
        ("run_training_batch", REST),
        ("", REST),
    ],
)
def test_a_name_of_lightnings_is_a_part_of_a_step(name, part):
    assert part_of(name) == part


def test_what_a_device_does_is_counted_where_it_was_asked_for():
    divided = [Span("forward online", 0, 10), Span("[Strategy]S.backward", 10, 30), Span("", 30, 35)]
    kernels = [(0, 100.0), (9.9, 50.0), (10, 7.0), (35, 1000.0)]
    assert step_parts(divided, kernels) == [
        Part("backward", 20, 7.0),
        Part("forward online", 10, 150.0),
        Part(REST, 5, 0),
    ]


def test_the_table_has_a_steps_share_and_mean():
    text = parts_table(
        [9000, 11000], [Part("backward", 15000, 0), Part("loss", 5000, 0)], [Operator("mm", 6, 10000, 0)]
    )
    assert "A step takes 10.00 ms, the mean of 2 steps of 9.00 to 11.00 ms" in text
    assert "| backward | 7.500 | 75.0% |\n| loss | 2.500 | 25.0% |" in text
    assert "| `mm` | 3 | 5.000 | 50.0% |" in text


def test_the_table_has_the_device_where_it_has_worked():
    text = parts_table([10000], [Part("backward", 6000, 3000), Part("loss", 4000, 1000)], [Operator("mm", 1, 10, 1000)])
    assert "| part of a step | host, ms | share | device, ms | share |\n| --- | --- | --- | --- | --- |" in text
    assert "| backward | 6.000 | 60.0% | 3.000 | 75.0% |" in text
    assert "| `mm` | 1 | 0.010 | 0.1% | 1.000 | 25.0% |" in text
