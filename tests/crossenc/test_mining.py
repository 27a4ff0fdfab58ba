"""The rules for negatives: each by hand, and what holds for all of them together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.mining import LEFT_OUT, RULES, MineQuery, MineSettings, Others, mine, text_key

NAN = float("nan")


def query(
    scores: list[float] | None = None,
    texts: list[str] | None = None,
    positives: tuple[str, ...] = ("a",),
    keys: tuple[str, ...] = ("text of a",),
    query_id: str = "q",
) -> MineQuery:
    """Documents a, b, c, … at ranks 1, 2, 3, …; a is the positive unless said otherwise."""
    num = len(scores or texts or [])
    doc_ids = [chr(ord("a") + i) for i in range(num)]
    return MineQuery(
        query_id=query_id,
        doc_ids=doc_ids,
        text_keys=[text_key(text) for text in texts or [f"text of {doc_id}" for doc_id in doc_ids]],
        ranks=np.arange(1, num + 1),
        scores=np.array(scores if scores is not None else [NAN] * num),
        positive_ids=set(positives),
        positive_keys={text_key(key) for key in keys},
    )


def chosen(candidates: MineQuery, others: Others | None = None, **settings) -> str:
    """The ids of the negatives, in their order."""
    mined = mine(candidates, MineSettings(**settings), others)
    ids = [candidates.doc_ids[i] for i in mined.negatives]
    return "".join(ids + [others.doc_ids[i] for i in mined.others] if others else ids)


def excluded(candidates: MineQuery, **settings) -> dict[str, int]:
    return dict(mine(candidates, MineSettings(**settings)).excluded)


def test_without_scores_the_first_ranks_come_first():
    assert chosen(query(texts=list("pqrst"), keys=("p",)), num_negatives=2) == "bc"


def test_with_scores_the_best_scored_come_first_and_ties_keep_the_first_stage_order():
    assert chosen(query([9.0, 1.0, 3.0, 3.0, 2.0]), num_negatives=3) == "cde"


def test_documents_without_a_score_come_last_by_rank():
    assert chosen(query([9.0, NAN, 1.0, NAN, 2.0]), num_negatives=4) == "ecbd"


def test_ranks_outside_the_range_are_left_out():
    candidates = query([9.0, 8.0, 7.0, 6.0, 5.0])
    assert chosen(candidates, min_rank=3, max_rank=4) == "cd"
    assert excluded(candidates, min_rank=3, max_rank=4) == {"positive": 1, "min_rank": 1, "max_rank": 1}


def test_score_limits_keep_the_limits_themselves():
    candidates = query([9.0, 4.0, 3.0, 2.0, 1.0])
    assert chosen(candidates, max_score=3.0, min_score=2.0) == "cd"
    assert excluded(candidates, max_score=3.0, min_score=2.0) == {"positive": 1, "max_score": 1, "min_score": 1}


def test_the_absolute_margin_is_a_distance_below_the_lowest_positive():
    candidates = query([9.0, 4.0, 3.5, 2.9, 3.0], positives=("a", "b"))
    assert chosen(candidates, absolute_margin=1.0) == "d"  # 3.0 is not below 4 - 1
    assert excluded(candidates, absolute_margin=1.0) == {"positive": 2, "absolute_margin": 2}


@pytest.mark.parametrize(("positive", "limit"), [(10.0, 8.0), (-10.0, -12.0)])
def test_the_relative_margin_is_a_part_of_the_positive_s_size_whatever_its_sign(positive, limit):
    candidates = query([positive, limit + 0.01, limit, limit - 0.01])
    assert chosen(candidates, relative_margin=0.2) == "d"
    assert excluded(candidates, relative_margin=0.2) == {"positive": 1, "relative_margin": 2}


def test_the_percentile_keeps_what_lies_below_that_share_of_the_positive():
    candidates = query([8.0, 7.7, 7.5, 0.0])
    assert chosen(candidates, positive_percentile=0.95) == "cd"  # 0.95 * 8 = 7.6
    assert excluded(candidates, positive_percentile=0.95) == {"positive": 1, "positive_percentile": 1}


def test_a_positive_without_a_score_does_not_set_the_margin():
    candidates = query([NAN, 4.0, 3.5, 2.0], positives=("a", "b"))
    assert chosen(candidates, absolute_margin=1.0) == "d"


def test_a_margin_without_any_scored_positive_leaves_the_query_out():
    mined = mine(query([NAN, 4.0, 3.5]), MineSettings(absolute_margin=1.0))
    assert (mined.left_out, dict(mined.excluded)) == ("positive_without_score", {"query_left_out": 3})
    assert chosen(query([NAN, 4.0, 3.5]), max_score=3.9) == "c"  # this rule needs no positive


def test_a_rule_about_scores_excludes_documents_that_have_none():
    candidates = query([9.0, NAN, float("inf"), 1.0])
    assert chosen(candidates, max_score=5.0) == "d"
    assert excluded(candidates, require_scores=True) == {"positive": 1, "no_score": 2}


def test_a_text_equal_to_a_positive_s_but_for_case_and_white_space_is_no_negative():
    candidates = query(
        texts=["The Answer", " the\n answer\t", "ANSWER, the", "STRASSE", "straße"], keys=("the answer",)
    )
    assert chosen(candidates) == "cd"
    assert excluded(candidates) == {"positive": 1, "equals_positive": 1, "repeated_text": 1}


def test_the_best_of_equal_texts_is_taken():
    candidates = query([9.0, 1.0, 2.0], texts=["p", "same", "Same"], keys=("p",))
    assert chosen(candidates) == "c"


def test_what_is_known_to_be_right_is_no_negative_and_gives_no_query_its_positive():
    candidates = query([9.0, 6.0, 5.0, 4.0], texts=["p", "x", "Known", "z"], keys=("p",))
    candidates = replace(candidates, known_ids={"b"}, known_keys={text_key("known")})
    assert chosen(candidates) == "d"
    assert excluded(candidates) == {"positive": 2, "equals_positive": 1}
    assert excluded(candidates, absolute_margin=2.5)["absolute_margin"] == 1, "6.0 is the lowest-scored that is right"
    others = Others(["b", "m", "n"], [text_key("other"), text_key("KNOWN"), text_key("new")])
    assert chosen(candidates, others, num_negatives=3, random_share=0.7) == "dn"
    assert mine(replace(candidates, positive_ids=()), MineSettings()).left_out == "no_positive"
    assert mine(replace(candidates, positive_keys=()), MineSettings()).left_out == "positive_without_text"
    unscored = replace(candidates, scores=np.array([NAN, 6.0, 5.0, 4.0]))
    assert mine(unscored, MineSettings(require_scores=True)).left_out == "positive_without_score"


def test_a_positive_whose_text_comes_from_elsewhere_is_kept_out_as_well():
    candidates = query(texts=["x", "the positive", "y"], positives=("absent",), keys=("The  positive",))
    assert chosen(candidates) == "ac"


@pytest.mark.parametrize(
    ("candidates", "settings", "reason"),
    [
        (query([1.0, 2.0], positives=()), {}, "no_positive"),
        (query([1.0, 2.0], keys=()), {}, "positive_without_text"),
        (query([1.0, NAN], positives=("b",)), {"require_scores": True}, "positive_without_score"),
        (query([5.0, 2.0, 1.0]), {"min_negatives": 3}, "too_few_negatives"),
        (query([5.0]), {}, "too_few_negatives"),
    ],
)
def test_a_query_that_gives_nothing_says_why(candidates, settings, reason):
    mined = mine(candidates, MineSettings(**settings))
    assert mined.left_out == reason and not len(mined.negatives)
    assert sum(mined.excluded.values()) == len(candidates.doc_ids)
    assert reason in LEFT_OUT


def test_the_random_share_is_drawn_from_what_is_left_after_the_hard_ones():
    candidates = query([26.0 - i for i in range(26)])
    picks = {chosen(replace(candidates, query_id=f"q{i}"), num_negatives=4, random_share=0.5) for i in range(20)}
    assert all(pick[:2] == "bc" and "d" <= pick[2] < pick[3] for pick in picks)
    assert len(picks) > 15


def test_drawing_depends_on_the_seed_and_the_query_and_reaches_every_document():
    candidates = query([26.0 - i for i in range(26)])
    draw = {"num_negatives": 5, "sampling": "random"}
    picks = [chosen(replace(candidates, query_id=f"q{i}"), **draw) for i in range(60)]
    assert set("".join(picks)) == {*"bcdefghijklmnopqrstuvwxyz"}
    assert chosen(candidates, **draw) == chosen(candidates, **draw) != chosen(candidates, **draw, seed=1)
    assert list(picks[0]) == sorted(picks[0])  # still the hardest first


def test_others_are_no_positives_no_candidates_and_no_repeated_texts():
    texts = {"a": "text of a", "b": "x", "p": "Text of A", "r": "y", "s": "Y", "t": "text of b", "u": "z"}
    others = Others(list(texts), [text_key(text) for text in texts.values()])
    candidates = query([3.0, 2.0, 1.0], positives=("a", "u"))
    picks = {
        chosen(replace(candidates, query_id=f"q{i}"), others, num_negatives=5, random_share=0.6) for i in range(30)
    }
    assert picks == {"bcr", "bcs"}


def test_a_copy_of_a_candidate_that_a_rule_left_out_is_not_drawn_from_others():
    candidates = query([9.0, 8.9, 1.0], texts=["p", "probably right", "z"], keys=("p",))
    others = Others(["m", "n"], [text_key("Probably  right"), text_key("new")])
    assert chosen(candidates, others, num_negatives=3, random_share=0.7, relative_margin=0.05) == "cn"


def test_a_share_that_others_cannot_fill_is_short_and_not_made_up_from_the_candidates():
    candidates = query([3.0, 2.0, 1.0, 0.0])
    assert chosen(candidates, Others([], []), num_negatives=2, random_share=0.5) == "b"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_negatives": 0},
        {"min_negatives": 6},
        {"min_rank": 0},
        {"min_rank": 5, "max_rank": 4},
        {"min_score": 2.0, "max_score": 1.0},
        {"random_share": 1.5},
        {"positive_percentile": 95},
        {"absolute_margin": -1.0},
        {"relative_margin": -0.1},
    ],
)
def test_settings_that_no_query_could_meet_are_refused(settings):
    with pytest.raises(ValueError, match="|".join(settings) + "|no rank|no score"):
        MineSettings(**settings)


def test_every_rule_has_its_sentence():
    assert len({*RULES.values()}) == len(RULES) and len({*LEFT_OUT.values()}) == len(LEFT_OUT)


numbers = st.sampled_from([NAN, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
maybe = st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])


@st.composite
def queries(draw) -> MineQuery:
    num = draw(st.integers(0, 12))
    texts = [draw(st.sampled_from(["one", "One ", "two", "three", "four", "five", "six"])) for _ in range(num)]
    doc_ids = [f"d{i}" for i in range(num)]
    positives = draw(st.sets(st.sampled_from([*doc_ids, "absent"]), max_size=3))
    keys = {text_key(text) for doc_id, text in zip(doc_ids, texts, strict=True) if doc_id in positives}
    return MineQuery(
        query_id=draw(st.sampled_from(["q1", "q2"])),
        doc_ids=doc_ids,
        text_keys=[text_key(text) for text in texts],
        ranks=np.array(draw(st.permutations(range(1, num + 1))), dtype=np.int64),
        scores=np.array([draw(numbers) for _ in range(num)], dtype=np.float64),
        positive_ids=positives,
        positive_keys=keys | ({text_key("six")} if "absent" in positives and draw(st.booleans()) else set()),
    )


@st.composite
def rules(draw) -> MineSettings:
    return MineSettings(
        num_negatives=draw(st.integers(1, 6)),
        min_rank=draw(st.integers(1, 3)),
        max_rank=draw(st.none() | st.integers(3, 12)),
        max_score=draw(st.none() | st.just(2.0)),
        min_score=draw(st.none() | st.just(-1.0)),
        absolute_margin=draw(maybe),
        relative_margin=draw(maybe),
        positive_percentile=draw(st.none() | st.sampled_from([0.5, 0.95, 1.0])),
        sampling=draw(st.sampled_from(["top", "random"])),
        random_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 3)),
        require_scores=draw(st.booleans()),
    )


@given(queries(), rules())
def test_no_positive_no_equal_text_and_every_candidate_is_accounted_for(candidates, settings):
    mined = mine(candidates, settings)
    ids = [candidates.doc_ids[i] for i in mined.negatives]
    keys = [candidates.text_keys[i] for i in mined.negatives]
    assert not set(ids) & set(candidates.positive_ids) and not set(keys) & set(candidates.positive_keys)
    assert len(set(keys)) == len(set(ids)) == len(ids) <= settings.num_negatives
    assert len(ids) + sum(mined.excluded.values()) == len(candidates.doc_ids)
    assert set(mined.excluded) <= set(RULES) and all(number > 0 for number in mined.excluded.values())
    assert (mined.left_out is None) == (len(ids) >= 1)
    for i in mined.negatives:
        assert settings.min_rank <= candidates.ranks[i] <= (settings.max_rank or 99)
        assert np.isfinite(candidates.scores[i]) or not settings.needs_scores


@given(queries(), rules(), st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_changes_nothing(candidates, settings, random):
    order = list(range(len(candidates.doc_ids)))
    random.shuffle(order)
    mixed = replace(
        candidates,
        doc_ids=[candidates.doc_ids[i] for i in order],
        text_keys=[candidates.text_keys[i] for i in order],
        ranks=candidates.ranks[order],
        scores=candidates.scores[order],
    )
    one, other = mine(candidates, settings), mine(mixed, settings)
    assert [candidates.doc_ids[i] for i in one.negatives] == [mixed.doc_ids[i] for i in other.negatives]
    assert (one.excluded, one.left_out) == (other.excluded, other.left_out)
