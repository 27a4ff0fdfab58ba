"""TensorBoard's event file of a training run, as bytes: the same for the same log.

The records are made by the package tensorboard, which is needed for nothing else. Knows no storage and no training.
"""

import io
from collections.abc import Sequence

from pipelines.checkpoints import LogPoint
from pipelines.train_logs import TRAINING_FIGURES, one_a_step


def event_file(logs: Sequence[LogPoint], started: float) -> tuple[str, bytes]:
    """The name and the content of an event file with all points as scalars.

    Figures of steps are called `train/loss` and so on, what validation found `validation/nDCG@10`. `started` is the
    run's start in seconds since 1970. A point's time is that plus its "seconds"; without them it is the time of the
    point before. Raises ImportError where tensorboard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise ImportError(
            "event files need the package tensorboard, which is not installed: pip install 'crossenc[train]'"
        ) from error
    seconds = 0.0
    events = [Event(wall_time=started, file_version="brain.Event:2")]
    for point in one_a_step(logs):
        seconds = point.values.get("seconds", seconds)
        scalars = [
            Summary.Value(tag=_tag(name), simple_value=value)
            for name, value in sorted(point.values.items())
            if name != "seconds"
        ]
        events.append(Event(wall_time=started + seconds, step=point.step, summary=Summary(value=scalars)))
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString(deterministic=True))
    return f"events.out.tfevents.{int(started):010d}.crossenc", buffer.getvalue()


def _tag(name: str) -> str:
    """The name in TensorBoard, which groups by what stands before the slash."""
    short = name.removeprefix("validation_")
    return f"train/{name}" if name in TRAINING_FIGURES else f"validation/{short}"
