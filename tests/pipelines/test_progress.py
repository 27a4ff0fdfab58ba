import io
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.progress import Progress, visible
from pipelines.records import LENGTH_EDGES, SCORE_BINS, ShardCounts, ShardRecord, StageSeconds


class Clock:
    def __init__(self):
        self.now = 5000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def counts(scored=90, refused=10, tokens=9_000):
    return ShardCounts(
        num_queries=1,
        num_candidates=scored + refused,
        num_scored=scored,
        num_results=scored,
        refused={"document_null": refused} if refused else {},
        num_tokens=tokens,
        num_padded_tokens=tokens,
        num_truncated=0,
        score_histogram=(0,) * SCORE_BINS,
        length_histogram=(0,) * (len(LENGTH_EDGES) + 1),
    )


def shard(**changes):
    return ShardRecord(
        shard_id="s",
        path="results/part-s.parquet",
        num_bytes=1,
        sha256="0",
        counts=counts(**changes),
        seconds=StageSeconds(),
        finished_at=0.0,
    )


@pytest.fixture
def clock():
    return Clock()


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_run_without_a_terminal_writes_json_lines_at_the_start_in_between_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress(10, 1_000, stream, clock=clock) as progress:
        for _ in range(10):
            clock.now += 4
            progress.update(shard())
    assert lines(stream) == [
        {
            "event": "progress",
            "shards": shards,
            "shards_total": 10,
            "pairs": 90 * shards,
            "pairs_per_second": 22.5 if shards else 0.0,
            "tokens_per_second": 2250.0 if shards else 0.0,
            "refused": 10 * shards,
            "eta_seconds": 4.0 * (10 - shards) if shards else None,
        }
        # at the start, whenever 10 seconds have passed, and at the end
        for shards in (0, 3, 6, 9, 10)
    ]


def test_the_last_line_is_written_even_when_the_run_fails(clock):
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="stop"), Progress(2, 200, stream, clock=clock) as progress:
        progress.update(shard())
        raise RuntimeError("stop")
    assert [line["shards"] for line in lines(stream)] == [0, 1]


def test_what_was_committed_earlier_counts_as_done_but_not_as_speed(clock):
    done = counts(scored=700, refused=100, tokens=70_000)
    progress = Progress(10, 1_000, io.StringIO(), num_shards_done=8, counts_done=done, clock=clock)
    with progress:
        assert progress.snapshot() == {
            "shards": 8,
            "shards_total": 10,
            "pairs": 700,
            "pairs_per_second": 0.0,
            "tokens_per_second": 0.0,
            "refused": 100,
            "eta_seconds": None,
        }
        clock.now += 10
        progress.update(shard())
        now = progress.snapshot()
    assert (now["shards"], now["pairs"], now["refused"]) == (9, 790, 110)
    assert (now["pairs_per_second"], now["tokens_per_second"]) == (9.0, 900.0)
    assert now["eta_seconds"] == 10.0  # 100 candidates left at 10 a second


def test_rates_are_those_of_the_last_minute(clock):
    progress = Progress(1_000, 100_000, io.StringIO(), clock=clock)
    with progress:
        for _ in range(100):  # 10 candidates a second for 1,000 seconds
            clock.now += 10
            progress.update(shard())
        for _ in range(60):  # 100 candidates a second for a minute
            clock.now += 1
            progress.update(shard())
        now = progress.snapshot()
    assert now["pairs_per_second"] == 90.0
    assert now["eta_seconds"] == (100_000 - 16_000) / 100


def test_shards_rarer_than_one_a_minute_still_have_a_rate(clock):
    progress = Progress(10, 1_000, io.StringIO(), clock=clock)
    with progress:
        for _ in range(3):
            clock.now += 300
            progress.update(shard())
            assert progress.snapshot()["pairs_per_second"] == 90 / 300
        clock.now += 300  # nothing arrives: the rate falls instead of staying
        assert progress.snapshot()["pairs_per_second"] == 90 / 600


def test_a_run_with_nothing_left_has_no_time_left(clock):
    with Progress(0, 0, io.StringIO(), clock=clock) as progress:
        assert progress.snapshot()["eta_seconds"] == 0.0


def test_a_refused_shard_counts_towards_the_time_left(clock):
    with Progress(2, 200, io.StringIO(), clock=clock) as progress:
        clock.now += 10
        progress.update(shard(scored=0, refused=100, tokens=0))
        now = progress.snapshot()
    assert (now["pairs_per_second"], now["refused"], now["eta_seconds"]) == (0.0, 100, 10.0)


def test_a_message_is_one_json_line(clock):
    stream = io.StringIO()
    with Progress(1, 1, stream, clock=clock) as progress:
        progress.message("query \x1b[31m'q\n1'")
    assert lines(stream)[1] == {"event": "message", "text": "query \\x1b[31m'q\\n1'"}
    assert len(stream.getvalue().splitlines()) == 3


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_a_terminal_gets_a_live_display_with_every_number(clock, terminal):
    with Progress(1_234, 4_000_000, terminal, clock=clock) as progress:
        clock.now += 10
        progress.update(shard(scored=123_400, refused=1_600, tokens=20_000_000))
    shown = terminal.getvalue()
    assert "1 of 1,234 shards" in shown
    assert "123,400 pairs · 12,340 pairs/s · 2,000,000 tokens/s · 1,600 refused · 0:05:10 left" in shown
    assert "{" not in shown


def test_the_live_display_says_when_the_time_left_is_unknown(clock, terminal):
    with Progress(2, 200, terminal, clock=clock):
        pass
    assert "time left unknown" in terminal.getvalue()


def test_a_message_cannot_drive_the_terminal(clock, terminal):
    with Progress(1, 1, terminal, clock=clock) as progress:
        progress.message("doc [bold red]x[/] \x1b]0;title\x07\x9b31m\u202e\ud800 end")
    assert r"doc [bold red]x[/] \x1b]0;title\x07\x9b31m\u202e\ud800 end" in terminal.getvalue()
    assert "\x1b]0" not in terminal.getvalue()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_prints_as_itself_and_plain_text_is_unchanged(text):
    shown = visible(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_updates_from_several_threads_are_all_counted(clock):
    stream = io.StringIO()
    with Progress(400, 40_000, stream, interval_seconds=0, clock=clock) as progress:
        threads = [threading.Thread(target=lambda: [progress.update(shard()) for _ in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert progress.snapshot()["shards"] == 400
    assert [line["shards"] for line in lines(stream)] == sorted(line["shards"] for line in lines(stream))
