"""Teachers' scores to one, and lists drawn from all levels: by hand, and by properties."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.distillation import (
    RULES,
    SampleQuery,
    SampleSettings,
    ensemble,
    merge_scales,
    sample,
    scale_of,
    strata_of,
)


def query(scores, positives=(), texts=None, ranks=None, query_id="q") -> SampleQuery:
    num = len(scores)
    return SampleQuery(
        query_id=query_id,
        doc_ids=[f"d{i}" for i in range(num)],
        text_keys=[str(text).encode() for text in (texts or range(num))],
        ranks=np.array(ranks or range(1, num + 1), dtype=np.int64),
        scores=np.array(scores, dtype=np.float64),
        positive_ids=set(positives),
    )


def test_one_teacher_keeps_its_logits_to_the_last_bit():
    scores = np.array([[0.1, -7.3, np.nan]])
    np.testing.assert_array_equal(ensemble(scores, [scale_of(np.array([1.0, 2.0]))]), scores[0])


def test_teachers_count_alike_on_the_scale_of_the_first():
    # Means 2 and 100, deviations 2 and 50: standardised -1, 1 and 1, 0.
    scales = [scale_of(np.array([0.0, 4.0])), scale_of(np.array([50.0, 150.0]))]
    scores = np.array([[0.0, 4.0, 2.0], [150.0, 100.0, np.nan]])
    np.testing.assert_allclose(ensemble(scores, scales), [2.0, 2 + 2 * 0.5, np.nan])


def test_a_teacher_that_scores_everything_alike_has_no_say_in_the_order():
    scales = [scale_of(np.array([0.0, 4.0])), scale_of(np.array([3.0, 3.0]))]
    np.testing.assert_allclose(ensemble(np.array([[0.0, 4.0], [3.0, 3.0]]), scales), [1.0, 3.0])


def test_scales_of_parts_are_the_scale_of_the_whole():
    scores = np.random.default_rng(0).normal(1e4, 2.0, 1000).astype(np.float32)
    merged = merge_scales([scale_of(scores[:0]), scale_of(scores[:3]), scale_of(scores[3:700]), scale_of(scores[700:])])
    assert merged.num_scores == 1000
    assert merged.mean == pytest.approx(scores.astype(np.float64).mean(), rel=1e-12)
    assert merged.deviation == pytest.approx(scores.astype(np.float64).std(), rel=1e-9)
    assert merge_scales([]).deviation == 0.0


def test_strata_are_of_equal_width_from_the_best_score_down():
    assert strata_of(np.array([8.0, 6.1, 6.0, 4.0, 0.0, 1.9]), 4).tolist() == [0, 0, 1, 2, 3, 3]
    assert strata_of(np.array([5.0, 5.0]), 4).tolist() == [0, 0]


def test_a_list_takes_as_many_from_each_level_as_there_are():
    # Two at the top, one in the middle, twelve at the bottom: three levels of a third of [0, 9].
    scores = [9.0, 8.0, 5.0, *(i / 10 for i in range(12))]
    drawn = sample(query(scores), SampleSettings(documents=6, strata=3))
    assert drawn.chosen[:3].tolist() == [0, 1, 2]
    assert Counter(strata_of(np.array(scores), 3)[drawn.chosen].tolist()) == {0: 2, 1: 1, 2: 3}
    assert drawn.excluded == {"not_drawn": 9} and drawn.left_out is None


def test_the_best_documents_are_always_there_and_come_first():
    scores = np.linspace(0, 10, 50)
    for seed in range(20):
        drawn = sample(query(scores), SampleSettings(documents=5, keep_top=3, seed=seed))
        assert drawn.chosen[:3].tolist() == [49, 48, 47]
        assert (np.diff(scores[drawn.chosen]) < 0).all()


def test_judged_positives_are_kept_and_come_first_though_the_teacher_thinks_little_of_them():
    scores = [9.0, 8.0, 7.0, 6.0, -1.0, -2.0]
    drawn = sample(query(scores, positives=["d5", "d3", "absent"]), SampleSettings(documents=3, strata=2))
    assert drawn.chosen.tolist() == [3, 5, 0]
    crowded = sample(query(scores, positives=["d5", "d4", "d3"]), SampleSettings(documents=2))
    assert crowded.chosen.tolist() == [3, 4]


def test_a_text_comes_once_and_a_positive_is_what_is_kept_of_equal_ones():
    drawn = sample(query([5.0, 4.0, 3.0, 4.0], texts=["a", "b", "a", "b"]), SampleSettings())
    assert drawn.chosen.tolist() == [0, 1] and drawn.excluded == {"repeated_text": 2}
    judged = sample(query([5.0, 4.0, 3.0], texts=["a", "b", "a"], positives=["d2"]), SampleSettings())
    assert judged.chosen.tolist() == [2, 1] and judged.excluded == {"repeated_text": 1}


def test_a_query_with_nothing_to_compare_is_left_out_and_its_documents_counted():
    single = sample(query([5.0, np.nan, 5.0], texts=["a", "b", "a"]), SampleSettings())
    assert single.left_out == "too_few_documents" and len(single.chosen) == 0
    assert single.excluded == {"no_score": 1, "repeated_text": 1, "query_left_out": 1}
    assert sample(query([]), SampleSettings()).left_out == "no_candidates"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"documents": 1}, "documents is 1"), ({"strata": 0}, "strata is 0"), ({"keep_top": 9}, "keep_top is 9")],
)
def test_settings_that_give_no_list_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleSettings(**settings)


_SCORES = st.lists(st.one_of(st.floats(-20, 20), st.just(float("nan")), st.sampled_from([0.0, 1.0])), max_size=40)
_SETTINGS = st.builds(
    SampleSettings,
    documents=st.integers(2, 12),
    strata=st.integers(1, 6),
    keep_top=st.integers(0, 2),
    seed=st.integers(0, 3),
)


@given(_SCORES, _SETTINGS, st.randoms(use_true_random=False), st.data())
def test_the_list_is_a_function_of_the_documents_and_not_of_their_order(scores, settings, random, data):
    num = len(scores)
    texts = data.draw(st.lists(st.integers(0, 50), min_size=num, max_size=num))
    positives = data.draw(st.sets(st.sampled_from([f"d{i}" for i in range(num)]))) if num else set()
    whole = query(scores, positives, texts)
    drawn = sample(whole, settings)
    assert len(drawn.chosen) + sum(drawn.excluded.values()) == num
    assert set(drawn.excluded) <= set(RULES)
    usable = len({texts[i] for i in range(num) if np.isfinite(scores[i])})
    assert len(drawn.chosen) == (min(settings.documents, usable) if usable > 1 else 0)
    assert len({texts[i] for i in drawn.chosen}) == len(drawn.chosen)
    by = list(range(num))
    random.shuffle(by)
    mixed = SampleQuery(
        query_id="q",
        doc_ids=[whole.doc_ids[i] for i in by],
        text_keys=[whole.text_keys[i] for i in by],
        ranks=whole.ranks[by],
        scores=whole.scores[by],
        positive_ids=positives,
    )
    again = sample(mixed, settings)
    assert [by[i] for i in again.chosen] == drawn.chosen.tolist() and again.excluded == drawn.excluded


@given(_SCORES, _SETTINGS)
def test_no_level_has_two_documents_more_than_one_that_was_not_used_up(scores, settings):
    drawn = sample(query(scores), SampleSettings(documents=settings.documents, strata=settings.strata, keep_top=1))
    finite = np.array([score for score in scores if np.isfinite(score)])
    if drawn.left_out is None:
        all_strata = strata_of(finite, settings.strata)
        held = Counter(strata_of_one(finite, np.array(scores)[drawn.chosen], settings.strata))
        for stratum, num_there in Counter(all_strata.tolist()).items():
            if held[stratum] < num_there:
                assert max(held.values()) - held[stratum] <= 1


def strata_of_one(every, some, num_strata) -> list[int]:
    """The strata of some scores, cut by the range of them all."""
    return strata_of(np.concatenate([some, every]), num_strata)[: len(some)].tolist()


def test_other_queries_and_seeds_draw_other_documents():
    scores = np.linspace(0, 10, 200)
    settings = [SampleSettings(seed=0), SampleSettings(seed=1)]
    lists = [sample(query(scores, query_id=name), one).chosen.tolist() for name in "ab" for one in settings]
    assert len({tuple(chosen) for chosen in lists}) == 4
