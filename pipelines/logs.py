"""What a run writes for machines: one JSON object a line, from the driver and, on request, from every worker.

With JSON logs on, each line says when, how grave and of which run it is; workers add what they do with each shard, with
stage, reason and query where there is one. Nothing that looks like a credential is ever written. It knows no run.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TextIO

from pipelines.storage import redact

#: The environment variable that asks for JSON logs.
VARIABLE = "CROSSENC_LOG_FORMAT"
#: Refused candidates that a worker names for each shard; all of them are in quarantine.
NAMED_REFUSALS = 10


@dataclass(frozen=True, slots=True)
class Logs:
    """How this process logs. `fields` stand on every line, the values of secret `options` on none."""

    is_json: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


_current = Logs()


def current() -> Logs:
    """How this process logs."""
    return _current


def begin(logs: Logs) -> None:
    """Makes this process log like `logs`. For the entry point of a process: libraries only use loggers."""
    global _current
    _current = logs
    logging.getLogger("pipelines").setLevel(logging.INFO if logs.is_json else logging.NOTSET)
    if logs.is_json:
        handler = logging.StreamHandler()
        handler.setFormatter(_JsonFormatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])


@contextlib.contextmanager
def about(run: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block lines are about this run, whose storage options may be secret; then about the run around it.

    The last run of a process has none around it: the error that ends the process is a line about that run.
    """
    outer = _current
    begin(replace(_current, fields={**_current.fields, "run": run}, options={**_current.options, **options}))
    try:
        yield
    finally:
        if "run" in outer.fields:
            begin(outer)


def is_display(stream: TextIO) -> bool:
    """Whether people look at `stream`: a terminal, and nobody asked for JSON."""
    return stream.isatty() and not _current.is_json


def write(stream: TextIO, event: Mapping[str, Any]) -> None:
    """Writes an event of the driver as a line."""
    stream.write(_line(event, "INFO") + "\n")
    stream.flush()


def note(logger: logging.Logger, text: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs something that happened, with what it happened to: stage, shard, query, reason, counts."""
    logger.log(level, text, extra={"fields": fields})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        fields = getattr(record, "fields", {})
        return _line({"event": "log", "text": text, **fields, "logger": record.name}, record.levelname)


def _line(event: Mapping[str, Any], level: str) -> str:
    if _current.is_json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"time": now, "level": level, **_current.fields, **event}
    return json.dumps(_clean(event))


def _clean(value: Any) -> Any:
    """`value` without credentials, whatever it is made of."""
    if isinstance(value, str):
        return redact(value, _current.options)
    if isinstance(value, Mapping):
        return {name: _clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value if isinstance(value, int | float | None) else redact(str(value), _current.options)
