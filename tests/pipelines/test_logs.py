"""JSON logs: whole lines, of a run, without secrets."""

import io
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from crossenc.testing import tiny_checkpoint
from jobs import runtime
from pipelines import distill, evaluation, logs, metrics, mine, retrain, stages, train
from pipelines import plan as plans
from pipelines.distill_config import DistillConfig
from pipelines.evaluation_config import EvaluateConfig
from pipelines.mine_config import MineConfig
from pipelines.progress import announce
from pipelines.rankings import trec_run
from pipelines.storage import locate
from pipelines.train_board import Ending
from pipelines.train_config import TrainConfig
from tests.pipelines import test_mine, test_train
from tests.pipelines.thin import refused, scored, thin_rows
from tests.support.collections import make_collection
from tests.support.retraining import quick_world

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
    stream = io.StringIO()
    event = {
        "event": "message",
        "text": f"Authorization: Bearer x {SECRET}",
        "n": 3,
        "none": None,
        "of": [KEY, "0123456789"],
    }
    with logs.about("abc", {"secret": SECRET, "client_kwargs": {"aws_session_token": "0123456789"}}):
        logs.write(stream, {**event, "in": {"deep": f"s3://{KEY}:word@bucket/x"}})
    assert stream.getvalue().endswith("}\n")
    line = json.loads(stream.getvalue())
    assert (line["run"], line["level"], line["n"], line["none"]) == ("abc", "INFO", 3, None)
    assert line["time"].endswith("+00:00")
    for secret in (SECRET, KEY, "0123456789", "Bearer", "word"):
        assert secret not in stream.getvalue()


def test_a_run_inside_another_gives_the_outer_one_back_and_the_outermost_stays_for_the_error_that_ends_it():
    logs.begin(logs.Logs(is_json=True))
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), logs.about("outer", {"secret": SECRET}):
        with logs.about("inner", {"token": "0123456789"}):
            announce(stream, f"{SECRET} 0123456789")
        announce(stream, f"{SECRET} 0123456789")
        raise ZeroDivisionError
    announce(stream, "the error")
    told = [(line["run"], line["text"]) for line in map(json.loads, stream.getvalue().splitlines())]
    assert told == [("inner", "*** ***"), ("outer", "*** 0123456789"), ("outer", "the error")]


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
        "import logging; from pipelines import logs; logs.begin(logs.Logs(is_json=True, fields={'run': 'abc'}))\n"
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
    monkeypatch.setenv(logs.VARIABLE, "text")

    def fails_at_work(stop):
        with logs.about("abc", {"secret": SECRET}):
            raise runtime.InputError(f"nothing at {SECRET}")

    assert runtime.run(fails_at_work) == 2
    assert capsys.readouterr().err == "error: nothing at ***\n"
    monkeypatch.setenv(logs.VARIABLE, "xml")
    assert runtime.run(fails) == 2
    assert "set it to text or json" in capsys.readouterr().err


# Which run lines are about, for each job


class Lines(io.StringIO):
    """What a job writes, as events."""

    def __init__(self) -> None:
        super().__init__()
        logs.begin(logs.Logs(is_json=True))

    def runs(self) -> list[str | None]:
        return [json.loads(line).get("run") for line in self.getvalue().splitlines()]


@pytest.fixture
def lines(monkeypatch, tmp_path) -> Lines:
    monkeypatch.setenv("CROSSENC_CACHE", str(tmp_path / "cache"))
    return Lines()


def test_lines_of_mining_are_about_its_run(lines, tmp_path):
    collection = make_collection(tmp_path / "in", num_queries=4)
    settings = {"qrels": test_mine.write_qrels(collection), **collection.write("pairs"), "shard_candidates": 20}
    mine.mine(MineConfig.model_validate({"output": str(tmp_path / "out"), **settings}), stream=lines)
    plan = plans.load(locate(str(tmp_path / "out")))
    assert plan is not None and {*lines.runs()} == {metrics.run_tag(plan.fingerprint)}


def test_lines_of_an_evaluation_are_about_it(lines, tmp_path):
    collection = make_collection(tmp_path / "in", num_queries=4)
    (tmp_path / "qrels.txt").write_text("".join(f"{q} 0 {d} 1\n" for q, d in first_documents(collection.pairs)))
    (tmp_path / "a.run").write_bytes(trec_run({q: [d] for q, d in first_documents(collection.pairs)}))
    judged = {"name": "made-up", "qrels": str(tmp_path / "qrels.txt"), **collection.write("pairs")}
    systems = [{"name": "a", "ranking": str(tmp_path / "a.run")}]
    config = EvaluateConfig(collections=[judged], systems=systems, output=str(tmp_path / "out"))
    evaluation.evaluate(config, connect=lambda _: 2, stream=lines)
    assert {*lines.runs()} == {metrics.run_tag(plans.fingerprint(evaluation.resolve(config).parts))}


def first_documents(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    return [(query, docs.doc_id.iloc[0]) for query, docs in pairs.groupby("query_id")]


def test_lines_of_a_retraining_bear_its_key_but_for_those_of_a_step(lines, tmp_path, monkeypatch):
    world = quick_world(tmp_path, monkeypatch)
    world.week(1)
    outcome = retrain.retrain(world.config(), connect=lambda: 2, stream=lines)
    assert outcome.folder is not None
    key, runs = outcome.folder.name, [run for run in lines.runs() if run is not None]
    assert runs[0] == runs[-1] == key  # it trains before it evaluates, and promotes after it
    assert len({*runs}) == 2


def test_lines_of_a_distillation_and_of_its_teachers_are_told_apart(lines, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "teacher")
    make_collection(tmp_path / "in", num_queries=2).pairs.to_parquet(tmp_path / "pairs.parquet", index=False)

    def scored(config, *, stream, **_):
        with logs.about(config.model, {}):
            announce(stream, "scoring")
        return SimpleNamespace(output=locate(config.output), state="done")

    monkeypatch.setattr(distill.reranking, "rerank", scored)
    monkeypatch.setattr(distill, "list_job", lambda *_: None)
    monkeypatch.setattr(distill.units, "run", lambda *_, **__: SimpleNamespace(state="stopped"))
    teacher = str(tmp_path / "teacher")
    settings = {"teachers": teacher, "candidates": str(tmp_path / "pairs.parquet"), "student_layers": 1}
    config = DistillConfig.model_validate({**settings, "output": str(tmp_path / "out")})
    assert distill.distill(config, connect=lambda: 2, stream=lines).state == "stopped"
    own, inner, again = lines.runs()
    assert own == again is not None and inner == teacher


def test_lines_of_training_are_about_it_once_its_data_is_known(lines, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "model")
    settings = {"train": test_train.write_lists(tmp_path / "train.parquet", 8), "model": str(tmp_path / "model")}
    config = TrainConfig.model_validate({**settings, "output": str(tmp_path / "out")})

    def fit(run, cores, display, should_stop):
        display.say("training")
        return Ending("stopped")

    monkeypatch.setattr(train, "_prepared", lambda *_: SimpleNamespace(fingerprint="0123456789abcdef"))
    monkeypatch.setattr(train, "_fit", fit)
    train.train(config, connect=lambda: 2, stream=lines)
    assert "0123456789ab" in lines.runs()
