"""Event files are read back by TensorBoard's own reader."""

import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.checkpoints import LogPoint
from pipelines.train_events import event_file

LOGS = (
    LogPoint(0, 0.0, {"validation_loss": 0.5, "nDCG@10": 0.25}),
    LogPoint(10, 0.5, {"loss": 0.75, "learning_rate": 1e-5, "seconds": 4.0}),
    LogPoint(20, 1.0, {"loss": math.nan, "gradient_norm": math.inf, "seconds": 9.5}),
    LogPoint(20, 1.0, {"validation_loss": 0.125, "nDCG@10": 0.5}),
    LogPoint(30, 1.5, {"loss": 1e300}),
)


def read(folder, logs, started=1_700_000_000.25):
    name, content = event_file(logs, started)
    (folder / name).write_bytes(content)
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(found, tag):
    return [(event.step, event.wall_time - 1_700_000_000.25, event.value) for event in found.Scalars(tag)]


def test_tensorboard_reads_every_figure_at_its_step_and_time(tmp_path):
    found = read(tmp_path, LOGS)
    assert sorted(found.Tags()["scalars"]) == [
        "train/gradient_norm",
        "train/learning_rate",
        "train/loss",
        "validation/loss",
        "validation/nDCG@10",
    ]
    assert scalars(found, "validation/loss") == [(0, 0.0, 0.5), (20, 9.5, 0.125)]
    assert scalars(found, "validation/nDCG@10") == [(0, 0.0, 0.25), (20, 9.5, 0.5)]
    assert scalars(found, "train/loss") == [
        (10, 4.0, 0.75),
        (20, 9.5, pytest.approx(math.nan, nan_ok=True)),
        (30, 9.5, math.inf),
    ]
    assert scalars(found, "train/learning_rate") == [(10, 4.0, pytest.approx(1e-5, rel=1e-6))]  # float32
    assert scalars(found, "train/gradient_norm") == [(20, 9.5, math.inf)]


def test_the_name_and_the_bytes_depend_on_the_log_alone():
    name, content = event_file(LOGS, 1_700_000_000.25)
    assert name == "events.out.tfevents.1700000000.crossenc"
    turned = [LogPoint(point.step, point.epoch, dict(reversed(point.values.items()))) for point in LOGS]
    assert event_file(turned, 1_700_000_000.25) == (name, content)
    shorter = event_file(LOGS[:-1], 1_700_000_000.25)[1]
    assert content.startswith(shorter) and len(content) > len(shorter)


def test_a_run_without_points_has_an_empty_event_file(tmp_path):
    assert read(tmp_path, ()).Tags()["scalars"] == []


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(ImportError, match=r"pip install 'crossenc\[train\]'"):
        event_file(LOGS, 0.0)
