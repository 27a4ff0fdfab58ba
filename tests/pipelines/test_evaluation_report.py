"""The page of an evaluation: what it says, that it loads nothing, and that what comes from data stays text."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from crossenc.evaluation.comparison import Collection, System, evaluate, values_of
from crossenc.evaluation.results import Evaluation
from pipelines.evaluation_losses import Loss, MovedDocument, moved, with_texts, worst_losses
from pipelines.evaluation_report import Page, depth_words, render, sentence, verdict
from pipelines.evaluation_texts import Texts

MINUS = "\N{MINUS SIGN}"
HOSTILE = "<script>alert(1)</script>\x1b[31m & \u202e"


def judged(name: str = "medquad", num_queries: int = 40, seed: int = 0) -> Collection:
    """A first stage with the relevant document at ranks 1 to 5, a model that finds it, and one that hides it."""
    qrels = {f"q{q}": {"a": 1, "b": 0} for q in range(num_queries)}
    rng = np.random.default_rng(seed)
    others = ["b", "c", "d", "e"]
    places = {query: int(rng.integers(0, 5)) for query in qrels}
    first = {query: [*others[:place], "a", *others[place:]] for query, place in places.items()}
    good = {query: ["a", *others] for query in qrels}
    bad = {query: [*others, "a"] for query in qrels}
    systems = (
        System(name="good", kind="model", source="m/good@1", run=good, pairs_per_second=123.4),
        System(name="bad", kind="ranking", source="bad.run", run=bad, notes=("a note",)),
    )
    kinds = {query: "even" if int(query[1:]) % 2 == 0 else "odd" for query in qrels}
    return Collection(
        name=name,
        qrels=qrels,
        first_stage=first,
        systems=systems,
        segments={"kind": kinds},
        digests={"qrels": "0123456789abcdef0123"},
        notes=("3 judged queries have no candidates and count as 0",),
    )


def page_of(*collections: Collection, **settings) -> Page:
    measures = ["nDCG@10", "RR@10", "Judged@10"]
    values = {one.name: values_of(one, measures) for one in collections}
    found = evaluate(collections, values, depths=(2, 3, 5), **settings)
    losses = [
        loss for one in collections for loss in worst_losses(one, values[one.name], measures[0], found.baseline, most=3)
    ]
    differences = {
        one.name: {
            name: tuple(of["nDCG@10"][q] - values[one.name][found.baseline]["nDCG@10"][q] for q in one.qrels)
            for name, of in values[one.name].items()
        }
        for one in collections
    }
    inputs = {one.name: ("s3://bucket/qrels.parquet",) for one in collections}
    return Page(
        evaluation=found,
        differences=differences,
        losses=tuple(losses),
        output="s3://bucket/evaluation",
        inputs=inputs,
        versions={"crossenc": "0.1.0"},
    )


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; closing tags must match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts, self.open_tags = [], [], [], []
        self.feed(html)
        assert not self.open_tags
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "use", "path", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] not in ("style", "script"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return page_of(judged())


@pytest.fixture(scope="module")
def html(page) -> str:
    return render(page)


def system_of(evaluation: Evaluation, name: str):
    return evaluation.collections[0].system(name)


def test_the_page_says_who_is_better_by_how_much_and_where_not(page, html):
    text = Parsed(html).text
    good, bad = (system_of(page.evaluation, name) for name in ("good", "bad"))
    first = system_of(page.evaluation, "first_stage")
    assert sentence("nDCG@10", good, first) in text and ": better on" in sentence("nDCG@10", good, first)
    assert sentence("nDCG@10", good, first).endswith("queries, better")
    assert sentence("nDCG@10", bad, first).endswith("queries, worse")
    assert "good beats the first stage at every depth" in text
    assert "bad is below the first stage when it orders the top 2, 3, 5" in text
    assert "3 judged queries have no candidates and count as 0." in text and "bad: a note." in text
    assert "123" in text and "kind even" in text and "0123456789abcdef" in text
    assert "Worst losses of bad" in text and "Worst losses of good" not in text
    assert "MRR@10" in text and "Judged@10" in text


def test_the_page_loads_and_runs_nothing(html):
    parsed = Parsed(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "xlink:href", "src"))
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert parsed.tags.count("svg") == 3 and "#10101" not in html.split("</style>")[1]


def test_texts_and_ids_of_the_data_stay_text(page):
    document = MovedDocument(doc_id=HOSTILE, grade=None, rank_before=None, rank_after=1, text=HOSTILE)
    loss = Loss(
        collection="medquad",
        system="bad",
        query_id=HOSTILE,
        before=1.0,
        after=0.0,
        risen=(document,),
        fallen=(),
        query=HOSTILE,
    )
    html = render(replace(page, losses=(loss,), output=HOSTILE, inputs={"medquad": (HOSTILE,)}))
    assert "script" not in Parsed(html).tags and "\x1b" not in html and "\u202e" not in html
    assert Parsed(html).text.count("<script>alert(1)</script>\\x1b[31m & \\u202e") >= 5
    assert f"{MINUS}1.000" in Parsed(html).text and "unjudged" in Parsed(html).text


def test_equal_evaluations_give_equal_pages(page, html):
    assert render(page_of(judged())) == html


def test_several_collections_are_shown_together_and_one_by_one():
    text = Parsed(render(page_of(judged(), judged("scifact", seed=1)))).text
    assert "All collections" in text and text.index("medquad") < text.index("scifact")
    assert text.count("Which system is best?") == 2


def test_the_first_stage_alone_makes_a_page_and_any_system_can_be_the_baseline():
    alone = Parsed(render(page_of(replace(judged(), systems=(), segments={})))).text
    assert "No system here can be looked at by depths." in alone and "Every comparison" not in alone
    text = Parsed(render(page_of(judged(), baseline="good"))).text
    assert "compared with good" in text and "Worst losses of the first stage" in text


def test_words_about_depths_name_the_best_one(page):
    good = system_of(page.evaluation, "good")
    top, *_, deepest = good.depths
    worse = replace(deepest, mean=top.mean - 0.01)
    words = depth_words(replace(good, depths=(replace(top, mean=0.9), replace(worse, mean=0.85))))
    assert words == "beats the first stage at every depth; best at the top 2, and .050 lower at the deepest"


def test_a_single_query_is_too_few_to_tell():
    good = system_of(page_of(judged(num_queries=1)).evaluation, "good")
    assert verdict(good.figures[0].difference) == "too few queries to tell" and verdict(None) == ""


def test_losses_are_the_largest_first_and_queries_that_lost_nothing_are_none():
    one = judged()
    values = values_of(one, ["nDCG@10"])
    losses = worst_losses(one, values, "nDCG@10", "first_stage", most=5)
    assert {loss.system for loss in losses} == {"bad"} and len(losses) == 5
    changes = [loss.after - loss.before for loss in losses]
    assert changes == sorted(changes) and changes[-1] < 0
    assert [d.doc_id for d in losses[0].fallen] == ["a"] and losses[0].fallen[0].grade == 1
    assert worst_losses(one, values, "nDCG@10", "bad", most=5) == []


def test_documents_move_by_rank_and_relevant_ones_come_first_among_the_fallen():
    before = [f"d{i}" for i in range(20)]
    after = ["new", "d11", *[d for d in before if d not in ("d11", "d3", "d15")], "d15", "d3"]
    risen, fallen = moved(before, after, {"d3": 1, "d15": 2, "d11": 0})
    assert [(d.doc_id, d.rank_before, d.rank_after, d.grade) for d in risen] == [
        ("new", None, 1, None),
        ("d11", 12, 2, 0),
    ]
    assert [(d.doc_id, d.rank_after) for d in fallen[:2]] == [("d15", 20), ("d3", 21)]
    gone = moved(["a", "b"], ["b"], {"a": 1})
    assert gone[1][0].rank_after is None and gone[0][0].doc_id == "b"


def test_a_loss_keeps_what_texts_there_are():
    loss = worst_losses(judged(), values_of(judged(), ["RR@10"]), "RR@10", "first_stage", most=1)[0]
    told = with_texts(loss, Texts({loss.query_id: "a query"}, {(loss.query_id, "a"): "an answer"}))
    assert told.query == "a query" and told.fallen[0].text == "an answer" and told.risen[0].text == ""
    assert with_texts(told, Texts({}, {})) == loss
