import os
import re
import subprocess
import sys
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest

from pipelines.progress import visible
from pipelines.records import (
    LENGTH_EDGES,
    SCORE_BINS,
    Agreement,
    MeasureComparison,
    RefusedExample,
    RunSummary,
    ShardCounts,
    StageSeconds,
)
from pipelines.report import render, sentence, verdict
from tests.pipelines.pages import ODD_TEXTS, Page, tiles

MINUS = "\N{MINUS SIGN}"
COUNTS = ShardCounts(
    num_queries=1_200,
    num_candidates=120_000,
    num_scored=119_990,
    num_results=60_000,
    refused={"document_null": 7, "duplicate_doc_id": 3},
    num_tokens=12_000_000,
    num_padded_tokens=12_500_000,
    num_truncated=600,
    score_histogram=(119_000, *[0] * (SCORE_BINS - 2), 990),
    length_histogram=(0, 0, 10, 50_000, 50_000, 10_000, 9_980, *[0] * (len(LENGTH_EDGES) - 6)),
)
NDCG = MeasureComparison(
    measure="nDCG@10",
    num_queries=92,
    before=0.502,
    after=0.826,
    low=0.291,
    high=0.357,
    p_t=1e-12,
    p_randomisation=1e-4,
    num_better=80,
    num_worse=12,
)
SUMMARY = RunSummary(
    output="s3://bucket/reranked",
    candidates=("s3://bucket/candidates",),
    model="owner/model@abc",
    top_k=50,
    counts=COUNTS,
    num_shards=4,
    num_shards_timed=4,
    elapsed_seconds=100.0,
    seconds=StageSeconds(read=10.0, tokenise=20.0, score=160.0, write=10.0),
    throughput=((1030.0, 30_000), (1060.0, 30_000), (1080.0, 30_000), (1100.0, 29_990)),
    score_range=(0.0, 1.0),
    evaluation=(NDCG,),
    evaluation_note="All 92 judged queries were compared.",
    cost=12.5,
    versions={"crossenc": "0.1.0", "torch": "2.13.0"},
)
NOTHING_SCORED = replace(
    SUMMARY,
    counts=ShardCounts(
        num_queries=1,
        num_candidates=2,
        num_scored=0,
        num_results=0,
        refused={"document_null": 2},
        num_tokens=0,
        num_padded_tokens=0,
        num_truncated=0,
        score_histogram=(0,) * SCORE_BINS,
        length_histogram=(0,) * (len(LENGTH_EDGES) + 1),
    ),
    num_shards=1,
    num_shards_timed=0,
    seconds=StageSeconds(),
    throughput=(),
    evaluation=(),
    evaluation_note="",
    cost=None,
)
#: A page without figures, which take most of the time.
PLAIN = replace(
    SUMMARY,
    counts=replace(
        COUNTS,
        score_histogram=NOTHING_SCORED.counts.score_histogram,
        length_histogram=NOTHING_SCORED.counts.length_histogram,
    ),
    throughput=(),
)


@pytest.fixture(scope="module")
def full_page():
    return render(SUMMARY)


def test_the_agreement_with_float32_is_shown_where_it_was_measured():
    assert "Agreement with float32" not in render(SUMMARY)
    measured = Agreement(
        num_queries=200, num_pairs=5000, num_other_documents=3, num_other_order=40, max_difference=0.02
    )
    page = render(replace(SUMMARY, agreement=measured))
    assert "200 queries of one shard, with 5,000 pairs, were scored" in page
    assert "3 (1.5 %)" in page.replace("\N{NO-BREAK SPACE}", " ").replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "Not measured: it was cut short." in render(
        replace(SUMMARY, agreement=Agreement(note="not measured: it was cut short"))
    )


def test_how_the_model_was_called_is_shown_with_the_number_of_pairs():
    kinds = {"packed, varlen kernel": 100_000, "padded: it is compiled, or has hooks": 19_990}
    page = Page(render(replace(PLAIN, counts=replace(PLAIN.counts, forward_kinds=kinds))))
    for words in (
        "Scored packed, varlen kernel 100,000 pairs",
        "Scored padded: it is compiled, or has hooks 19,990 pairs",
    ):
        assert words in page.text


def test_the_headline_counts_are_the_summary_s(full_page):
    assert tiles(full_page) == {
        "Queries": "1,200",
        "Candidates": "120,000",
        "Scored": "119,990",
        "Refused": "10",
        "Results": "60,000",
        "Shards": "4",
        "Pairs per second": "1,200",  # 119,990 pairs in 100 s
        "Tokens per second": "120,000",
        "Padding": "4.0 %",
        "Truncated": "0.5 %",
        "Elapsed": "1 min 40 s",
        "Cost": "12.50",
    }


def test_speed_leaves_out_what_an_earlier_process_did():
    resumed = replace(SUMMARY, throughput=((-9000.0, 110_000), (1060.0, 5_000), (1100.0, 4_990)))
    assert tiles(render(resumed))["Pairs per second"] == "99.9"  # 9,990 pairs in 100 s


def test_a_page_has_every_section_and_its_figures(full_page):
    page = Page(full_page)
    assert page.tags.count("svg") == 3
    for words in (
        "120,000 candidates = 119,990 scored + 10 refused: none is unaccounted for.",
        "document_null 7 < 0.1 % duplicate_doc_id 3 < 0.1 %",
        "Read 10.0 s 5.0 % Tokenise 20.0 s 10.0 % Score 2 min 40 s 80.0 % Write 10.0 s 5.0 %",
        "All 92 judged queries were compared.",
        "Model owner/model@abc Output s3://bucket/reranked",
        "crossenc 0.1.0 torch 2.13.0",
        "seconds since the start",
    ):
        assert words in page.text


def test_the_length_figure_shows_the_filled_bins_with_their_edges(full_page):
    page = Page(full_page)
    assert "32 64 96 128 192 tokens in the pair, up to" in page.text


def test_a_page_loads_nothing_and_runs_nothing(full_page):
    page = Page(full_page)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full_page))
    assert "@import" not in full_page


def test_ids_in_a_page_are_unique(full_page):
    ids = [value for name, value in Page(full_page).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_equal_summaries_give_equal_pages_in_any_process():
    program = (
        "import hashlib; from tests.pipelines.test_report import SUMMARY, render;"
        "print(hashlib.sha256(render(SUMMARY).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_what_comes_from_data_stays_text(odd):
    example = RefusedExample(reason=odd, query_id=odd, doc_id=odd, file=odd, row=12_345, detail=odd)
    summary = replace(
        PLAIN,
        output=odd,
        candidates=(odd,),
        model=odd,
        counts=replace(PLAIN.counts, refused={odd: 10}),
        refused_examples=(example,),
        evaluation=(replace(NDCG, measure=odd),),
        evaluation_note=odd,
        interpolation=odd,
        versions={odd: odd},
    )
    plain = replace(summary, output="x", candidates=("x",), model="x", counts=PLAIN.counts, versions={"x": "x"})
    page, plain_page = Page(render(summary)), Page(render(plain))
    assert page.text.count(visible(odd)) >= 12
    assert sorted(set(page.tags)) == sorted(set(plain_page.tags))
    assert {name for name, _ in page.attributes} == {name for name, _ in plain_page.attributes}
    render(summary).encode("utf-8")


def test_a_run_that_scored_nothing_has_a_page_that_says_so():
    html = render(NOTHING_SCORED)
    page = Page(html)
    assert "svg" not in page.tags
    assert page.text.count("No pair was scored.") == 2
    assert "No shard was timed." in page.text
    assert "This run had no judgements" in page.text
    shown = tiles(html)
    assert shown["Pairs per second"] == shown["Padding"] == shown["Truncated"] == "\N{EN DASH}"
    assert "Cost" not in shown


def test_judgements_that_compare_nothing_are_not_called_missing():
    note = "none of the 5 judged queries is among the candidates"
    page = Page(render(replace(NOTHING_SCORED, evaluation_note=note)))
    assert f"This page cannot tell: {note}" in page.text
    assert "no judgements" not in page.text


def test_a_single_shard_has_no_curve():
    single = replace(SUMMARY, num_shards=1, num_shards_timed=1, throughput=((1100.0, 119_990),))
    page = Page(render(single))
    assert page.tags.count("svg") == 2
    assert "there is no curve to draw" in page.text


def test_lost_timings_are_mentioned():
    assert "The timing of 1 of 4 shards is unknown" in Page(render(replace(PLAIN, num_shards_timed=3))).text
    assert "is unknown" not in Page(render(PLAIN)).text


def test_counts_that_do_not_add_up_are_shown_as_such():
    broken = replace(PLAIN, counts=replace(PLAIN.counts, num_scored=119_989))
    assert "the counts do not add up" in Page(render(broken)).text


@pytest.mark.parametrize(
    ("change", "words", "judgement"),
    [
        (
            {},
            "nDCG@10 .502 → .826, +.324 [.291, .357], better on 80 queries, worse on 12, p < .001: better",
            "better",
        ),
        (
            {"before": 0.9, "after": 0.87, "low": -0.05, "high": -0.01, "p_randomisation": 0.0052},
            f"nDCG@10 .900 → .870, {MINUS}.030 [{MINUS}.050, {MINUS}.010], better on 80 queries, "
            "worse on 12, p = .005: worse",
            "worse",
        ),
        (
            {"measure": "RR@10", "after": 0.511, "low": -0.012, "high": 0.035, "p_randomisation": 0.05},
            f"MRR@10 .502 → .511, +.009 [{MINUS}.012, .035], better on 80 queries, worse on 12, p = .050: "
            "no significant difference",
            "no significant difference",
        ),
        (
            {
                "before": 1.0,
                "after": 1.0,
                "low": 0.0,
                "high": 0.0,
                "p_randomisation": 1.0,
                "num_better": 1_234,
            },
            "nDCG@10 1.000 → 1.000, .000 [.000, .000], better on 1,234 queries, worse on 12, p > .999: "
            "no significant difference",
            "no significant difference",
        ),
        (
            {"low": nan, "high": nan, "p_randomisation": nan, "p_t": nan, "num_better": 1, "num_worse": 0},
            "nDCG@10 .502 → .826, +.324, better on 1 query, worse on 0: too few queries to tell",
            "too few queries to tell",
        ),
    ],
)
def test_a_comparison_is_said_in_plain_words(change, words, judgement):
    comparison = replace(NDCG, **change)
    assert sentence(comparison) == words
    assert verdict(comparison) == judgement
    page = Page(render(replace(PLAIN, evaluation=(comparison,))))
    assert words in page.text


def test_the_difference_lies_inside_its_interval_on_the_track():
    html = render(replace(PLAIN, evaluation=(NDCG, replace(NDCG, before=0.9, after=0.87, low=-0.05, high=-0.01))))
    tracks = re.findall(r'zero" style="left:(\S+)%".*?left:(\S+)%;width:(\S+)%".*?mean" style="left:(\S+)%', html)
    (zero_1, low_1, width_1, mean_1), (zero_2, low_2, width_2, mean_2) = [map(float, t) for t in tracks]
    assert zero_1 == zero_2
    assert zero_1 < low_1 < mean_1 < low_1 + width_1 <= 96
    assert 4 <= low_2 < mean_2 < low_2 + width_2 < zero_2


@pytest.mark.parametrize(("scored", "share"), [(120_000, "100.0 %"), (119_999, "&gt; 99.9 %"), (1, "&lt; 0.1 %")])
def test_a_share_never_rounds_something_away(scored, share):
    summary = replace(PLAIN, counts=replace(PLAIN.counts, num_scored=scored))
    assert f'Scored</div><div class="value">{scored:,}</div><div class="extra">{share} of candidates' in render(summary)
