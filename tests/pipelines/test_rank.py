"""Ranking thin rows: order, ties, duplicates, counts, id types and the three tables."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rank import first_stage_ranks, rank_rows
from pipelines.schemas import QUARANTINE_SCHEMA, completeness_schema, results_schema
from tests.pipelines.thin import SETTINGS, refused, scored, thin_rows

NO_RANK = np.iinfo(np.int64).max


def ranking(rows: pa.Table, settings=SETTINGS) -> list[tuple]:
    columns = rank_rows(rows, settings).results.select(["query_id", "doc_id", "rank"]).to_pydict().values()
    return list(zip(*columns, strict=True))


def test_documents_are_ordered_by_score_and_queries_by_their_first_row():
    rows = thin_rows(scored("z", "a", 0.1), scored("z", "b", 0.9), scored("y", "c", 0.5), scored("z", "d", 0.4))
    assert ranking(rows) == [("z", "b", 1), ("z", "d", 2), ("z", "a", 3), ("y", "c", 1)]


def test_equal_scores_keep_first_stage_order():
    rows = thin_rows(scored("q", "a", 0.5, rank=3), scored("q", "b", 0.5, rank=1), scored("q", "c", 0.5, rank=2))
    assert ranking(rows) == [("q", "b", 1), ("q", "c", 2), ("q", "a", 3)]


def test_top_k_keeps_the_best_of_each_query_and_counts_the_rest_as_scored():
    rows = thin_rows(*(scored(q, f"d{i}", i / 10) for q in "pq" for i in range(4)), scored("r", "d0", 0.1))
    ranked = rank_rows(rows, replace(SETTINGS, top_k=2))
    assert ranked.results.column("doc_id").to_pylist() == ["d3", "d2", "d3", "d2", "d0"]
    assert ranked.num_scored == 9
    assert ranked.completeness.to_pylist()[0] == {
        "query_id": "p",
        "num_candidates": 4,
        "num_scored": 4,
        "num_refused": 0,
        "num_results": 2,
    }


def test_a_repeated_document_counts_once_at_its_best_first_stage_rank():
    rows = thin_rows(
        scored("q", "a", 0.9, rank=5),
        scored("q", "a", 0.2, rank=1),
        scored("q", "b", 0.5, rank=2),
        scored("p", "a", 0.3, rank=1),
    )
    ranked = rank_rows(rows, SETTINGS)
    assert ranking(rows) == [("q", "b", 1), ("q", "a", 2), ("p", "a", 1)]
    assert ranked.results.column("score").to_pylist()[1] == pytest.approx(0.2)
    assert ranked.refused == {"duplicate_document": 1}
    assert ranked.quarantine.column("row").to_pylist() == [0]


def test_a_repeat_of_a_refused_document_is_no_duplicate():
    rows = thin_rows(refused("q", "a", "document_empty", stage_rank=1), scored("q", "a", 0.9, rank=2))
    assert rank_rows(rows, SETTINGS).refused == {"document_empty": 1}


def test_refused_candidates_go_to_the_quarantine_with_their_place_and_reason():
    rows = thin_rows(
        scored("q", "a", 0.9),
        refused("q", "b", "document_empty", file=1, row=70, item=4),
        refused("q", None, "doc_id_missing"),
        refused(None, "c", "query_id_missing", detail="at byte 3"),
    )
    quarantine = rank_rows(rows, SETTINGS).quarantine
    assert quarantine.schema == QUARANTINE_SCHEMA
    assert [tuple(row.values()) for row in quarantine.to_pylist()] == [
        ("q", "b", "document_empty", None, "file:///in/b", 70, 4),
        ("q", None, "doc_id_missing", None, "file:///in/a", 2, None),
        (None, "c", "query_id_missing", "at byte 3", "file:///in/a", 3, None),
    ]


def test_rows_without_a_query_count_as_candidates_but_not_as_a_query():
    rows = thin_rows(refused(None, "a", "query_id_missing"), scored("q", "b", 0.5), refused(None, None, "unreadable"))
    ranked = rank_rows(rows, SETTINGS)
    assert (ranked.num_queries, ranked.num_candidates, ranked.num_scored) == (1, 3, 1)
    assert ranked.refused == {"query_id_missing": 1, "unreadable": 1}
    assert ranked.completeness.num_rows == 1


def test_a_query_whose_candidates_are_all_refused_is_accounted_for():
    ranked = rank_rows(thin_rows(refused("q", "a", "document_empty"), refused("q", "b", "document_empty")), SETTINGS)
    assert ranked.results.num_rows == 0
    assert list(ranked.completeness.to_pylist()[0].values()) == ["q", 2, 0, 2, 0]


@pytest.mark.parametrize("weight", [None, 0.4])
def test_an_empty_shard_gives_empty_tables_of_the_right_schemas(weight):
    field = pa.field("pass:lang", pa.string())
    settings = replace(SETTINGS, weight=weight, query_id_type="uint64", doc_id_type="int32")
    ranked = rank_rows(thin_rows(pass_through=[field]), settings)
    lang = [pa.field("lang", pa.string())]
    assert ranked.results.schema == results_schema(pa.uint64(), pa.int32(), lang, weight is not None)
    assert ranked.completeness.schema == completeness_schema(pa.uint64())
    assert ranked.quarantine.schema == QUARANTINE_SCHEMA
    assert (ranked.results.num_rows, ranked.num_queries, ranked.refused) == (0, 0, {})


@pytest.mark.parametrize(
    ("kind", "ids"),
    [("int64", [2**53 + 1, -(2**63)]), ("uint64", [2**64 - 1, 2**63 + 1]), ("int32", [7, 8]), ("string", ["007", "7"])],
)
def test_ids_come_out_exactly_and_in_their_own_type(kind, ids):
    rows = thin_rows(*(scored(str(id_), str(id_), 0.5) for id_ in ids))
    ranked = rank_rows(rows, replace(SETTINGS, query_id_type=kind, doc_id_type=kind))
    assert ranked.results.column("query_id").to_pylist() == ids
    assert ranked.results.column("doc_id").to_pylist() == ids
    assert ranked.completeness.column("query_id").to_pylist() == ids
    assert str(ranked.results.schema.field("doc_id").type) == kind


def test_columns_passed_through_stay_with_their_document():
    fields = [pa.field("pass:lang", pa.string()), pa.field("pass:price", pa.float64())]
    rows = thin_rows(
        scored("q", "a", 0.1, **{"pass:lang": "de", "pass:price": 1.5}),
        scored("q", "b", 0.9, **{"pass:lang": None, "pass:price": 2.5}),
        pass_through=fields,
    )
    results = rank_rows(rows, SETTINGS).results
    assert results.column_names[-2:] == ["lang", "price"]
    assert results.select(["doc_id", "lang", "price"]).to_pylist() == [
        {"doc_id": "b", "lang": None, "price": 2.5},
        {"doc_id": "a", "lang": "de", "price": 1.5},
    ]


def test_interpolated_scores_mix_both_and_the_models_own_is_kept():
    rows = thin_rows(
        scored("q", "a", 0.0, stage_score=30.0),
        scored("q", "b", 0.5, stage_score=20.0),
        scored("q", "c", 1.0, stage_score=10.0),
    )
    results = rank_rows(rows, replace(SETTINGS, weight=0.25)).results
    # z-normalised: -1.2247, 0, 1.2247 for the model and the reverse for the first stage.
    assert results.column("doc_id").to_pylist() == ["a", "b", "c"]
    np.testing.assert_allclose(results.column("score").to_numpy(), [0.5 * 1.224745, 0, -0.5 * 1.224745], atol=1e-6)
    assert results.column("model_score").to_pylist() == [0.0, 0.5, 1.0]
    assert results.column("first_stage_score").to_pylist() == [30.0, 20.0, 10.0]


def test_duplicates_do_not_move_the_interpolation():
    once = [scored("q", "a", 0.2, stage_score=3.0), scored("q", "b", 0.7, stage_score=1.0)]
    settings = replace(SETTINGS, weight=0.5)
    twice = [*once, scored("q", "a", 0.9, stage_score=0.5)]
    assert rank_rows(thin_rows(*twice), settings).results.equals(rank_rows(thin_rows(*once), settings).results)


def stage(ranks=None, scores=None, groups=None) -> list[int]:
    size = len(ranks if ranks is not None else scores)
    ranks = [NO_RANK if r is None else r for r in (ranks or [None] * size)]
    scores = [np.nan if s is None else s for s in (scores or [None] * size)]
    given_groups = np.array(groups or [0] * size, dtype=np.int64)
    return first_stage_ranks(given_groups, np.array(ranks, np.int64), np.array(scores, np.float64)).tolist()


def test_first_stage_ranks_count_from_one_whatever_the_ranks_given():
    assert stage([0, 1, 2]) == [1, 2, 3]
    assert stage([30, 10, 20]) == [3, 1, 2]
    assert stage([-1, -5]) == [2, 1]


def test_equal_first_stage_ranks_are_ordered_by_score_then_by_position():
    assert stage([1, 1, 1], [2.0, 9.0, 2.0]) == [2, 1, 3]


def test_without_first_stage_ranks_the_scores_decide_and_missing_ones_come_last():
    assert stage(scores=[1.0, None, 3.0, float("inf"), None]) == [3, 4, 2, 1, 5]


def test_candidates_without_a_first_stage_rank_come_after_those_with_one():
    assert stage([None, 7, None, 3], [9.0, 1.0, 10.0, 1.0]) == [4, 2, 3, 1]


def test_without_ranks_and_scores_the_position_is_the_rank():
    assert stage([None] * 4, groups=[0, 1, 0, 1]) == [1, 1, 2, 2]


def test_no_candidates_have_no_first_stage_ranks():
    assert stage([]) == []


candidates = st.lists(
    st.fixed_dictionaries(
        {
            "query_id": st.sampled_from(["q1", "q2", "ü", None]),
            "doc_id": st.sampled_from(["a", "b", "c", "d", None]),
            "stage_rank": st.none() | st.integers(-3, 9),
            "stage_score": st.floats(-5, 5),
            "model_score": st.none() | st.sampled_from([0.0, 0.25, 0.5]) | st.floats(0, 1, width=32),
        }
    ),
    max_size=40,
)


def table(drawn: list[dict]) -> pa.Table:
    """The drawn rows, with a reason where something is missing."""
    good = [None not in (row["query_id"], row["doc_id"], row["model_score"]) for row in drawn]
    rows = [
        row if ok else row | {"model_score": None, "reason": "unreadable"} for row, ok in zip(drawn, good, strict=True)
    ]
    return thin_rows(*rows)


@given(candidates, st.none() | st.integers(1, 5), st.none() | st.floats(0, 1))
def test_every_candidate_is_ranked_refused_or_cut_and_ranks_have_no_gaps(drawn, top_k, weight):
    ranked = rank_rows(table(drawn), replace(SETTINGS, top_k=top_k, weight=weight))
    assert ranked.num_candidates == len(drawn) == ranked.num_scored + sum(ranked.refused.values())
    assert ranked.quarantine.num_rows == sum(ranked.refused.values())
    results = ranked.results.to_pandas()
    for row in ranked.completeness.to_pylist():
        own = [r for r in drawn if r["query_id"] == row["query_id"]]
        assert row["num_candidates"] == len(own) == row["num_scored"] + row["num_refused"]
        of_query = results[results.query_id == row["query_id"]]
        assert row["num_results"] == len(of_query) == min(row["num_scored"], top_k or 99)
        assert of_query["rank"].tolist() == list(range(1, len(of_query) + 1))
        assert of_query.score.is_monotonic_decreasing
        assert of_query.doc_id.is_unique
    assert ranked.completeness.column("query_id").to_pylist() == list(
        dict.fromkeys(r["query_id"] for r in drawn if r["query_id"] is not None)
    )


@given(candidates, st.randoms(use_true_random=False), st.sampled_from([None, 0.3]))
def test_the_order_of_rows_changes_nothing_where_first_stage_ranks_differ(drawn, random, weight):
    for number, row in enumerate(drawn):
        row["stage_rank"] = number
    shuffled = list(drawn)
    random.shuffle(shuffled)
    sorting = [("query_id", "ascending"), ("rank", "ascending")]
    first, second = (
        rank_rows(table(rows), replace(SETTINGS, weight=weight)).results.sort_by(sorting) for rows in (drawn, shuffled)
    )
    assert first.equals(second)
