"""JSON logs: whole lines, of a run, without secrets."""

import io
import json
import logging
import subprocess
import sys

import pytest

from jobs import runtime
from pipelines import logs, stages
from pipelines.progress import announce
from tests.pipelines.thin import refused, scored, thin_rows

SECRET = "option/secret+of/the+job0123456789"
KEY = "AKIAIOSFODNN7EXAMPLE"


@pytest.fixture(autouse=True)
def as_before():
    before = logs.current()
    yield
    logs.begin(before)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_when_and_of_which_run_and_hides_secrets_wherever_they_stand():
    logs.begin(logs.Logs(is_json=True))
    logs.bind("abc", {"secret": SECRET, "client_kwargs": {"aws_session_token": "0123456789"}})
    stream = io.StringIO()
    event = {
        "event": "message",
        "text": f"Authorization: Bearer x {SECRET}",
        "n": 3,
        "none": None,
        "of": [KEY, "0123456789"],
    }
    logs.write(stream, {**event, "in": {"deep": f"s3://{KEY}:word@bucket/x"}})
    assert stream.getvalue().endswith("}\n")
    line = json.loads(stream.getvalue())
    assert (line["run"], line["level"], line["n"], line["none"]) == ("abc", "INFO", 3, None)
    assert line["time"].endswith("+00:00")
    for secret in (SECRET, KEY, "0123456789", "Bearer", "word"):
        assert secret not in stream.getvalue()


def test_without_being_asked_lines_stay_as_they_are_and_secrets_are_hidden_all_the_same():
    stream = io.StringIO()
    announce(stream, f"a message with {KEY}")
    assert json.loads(stream.getvalue()) == {"event": "message", "text": "a message with ***"}


def test_on_a_terminal_json_is_written_where_it_is_asked_for():
    stream = Terminal()
    announce(stream, "for people")
    assert stream.getvalue() == "for people\n"
    logs.begin(logs.Logs(is_json=True))
    announce(stream, "for machines")
    assert json.loads(stream.getvalue().splitlines()[1])["text"] == "for machines"


def test_refused_candidates_are_named_with_their_query_and_reason(caplog):
    rows = thin_rows(
        scored("q1", "d1", 0.5), *[refused("q2", f"d{i}", "document_missing") for i in range(logs.NAMED_REFUSALS + 5)]
    )
    stages._note_refusals("s1", rows)
    assert caplog.records == []
    with caplog.at_level(logging.INFO, "pipelines"):
        stages._note_refusals("s1", rows)
    fields = [record.fields for record in caplog.records]
    assert len(fields) == logs.NAMED_REFUSALS
    assert fields[0] == {"stage": "score", "shard": "s1", "query": "q2", "document": "d0", "reason": "document_missing"}


def test_loggers_write_whole_lines_with_their_errors():
    code = (
        "import logging; from pipelines import logs; logs.begin(logs.Logs(is_json=True)); logs.bind('abc', {})\n"
        "logging.getLogger('other').warning('two\\nlines of %s', 'AKIAIOSFODNN7EXAMPLE')\n"
        "logs.note(logging.getLogger('pipelines.stages'), 'scored', stage='score', shard='s1')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('other').exception('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    warning, event, error = map(json.loads, done.stderr.splitlines())
    assert (warning["text"], warning["level"], warning["logger"]) == ("two\nlines of ***", "WARNING", "other")
    assert (event["stage"], event["shard"], event["run"]) == ("score", "s1", "abc")
    assert "ZeroDivisionError" in error["text"] and error["level"] == "ERROR"


def test_an_error_that_ends_a_job_is_a_line_too_and_an_unknown_format_is_refused(monkeypatch, capsys):
    def fails(stop):
        raise runtime.InputError(f"nothing at {KEY}")

    monkeypatch.setenv(logs.VARIABLE, "json")
    assert runtime.run(fails) == 2
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["exit_code"]) == ("error", "ERROR", 2) and line[
        "text"
    ] == "nothing at ***"
    logs.begin(logs.Logs())
    monkeypatch.setenv(logs.VARIABLE, "xml")
    assert runtime.run(fails) == 2
    assert "set it to text or json" in capsys.readouterr().err
