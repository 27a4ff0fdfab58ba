"""The report of a training run and what else is made of its log."""

import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest

from crossenc.card import CrossEncoderModelCardData, LogRow, ModelFacts, render_card
from crossenc.loop.lists import LabelStatistics
from pipelines.checkpoints import LogPoint
from pipelines.progress import visible
from pipelines.train_logs import card_logs, one_a_step
from pipelines.train_report import DataSummary, TrainSummary, figure, flat, headline, render
from tests.pipelines.pages import ODD_TEXTS, Page, tiles

MINUS, UNKNOWN = "\N{MINUS SIGN}", "\N{EN DASH}"
SPEED = {"pairs_per_second": 100.0, "tokens_per_second": 12_000.0}
LOGS = (
    LogPoint(0, 0.0, {"validation_loss": 0.6931, "nDCG@10": 0.5213, "RR@10": 0.4711}),
    LogPoint(100, 0.5, {"loss": 0.5748, "learning_rate": 5e-5, "gradient_norm": 2.0, **SPEED}),
    LogPoint(200, 1.0, {"loss": 0.1423, "learning_rate": 4e-5, "gradient_norm": 1.5, **SPEED}),
    LogPoint(200, 1.0, {"validation_loss": 0.125, "nDCG@10": 0.8264, "RR@10": 0.8}),
    LogPoint(300, 1.5, {"loss": 0.0652, "learning_rate": 2e-5, "gradient_norm": 1.0, **SPEED}),
    LogPoint(400, 2.0, {"loss": 0.0542, "learning_rate": 0.0, "gradient_norm": 0.5, "pairs_per_second": 200.0}),
    LogPoint(400, 2.0, {"validation_loss": 0.15, "nDCG@10": 0.81, "RR@10": 0.4}),
)
SUMMARY = TrainSummary(
    model_name="owner/model@abc",
    output="s3://models/new",
    num_steps=400,
    num_epochs=2,
    best_step=200,
    measure="nDCG@10",
    logs=LOGS,
    settings={"workers": {"count": 2, "gpus": 0}, "epochs": 2, "dtype": "float32", "lora": None, "resumed": True},
    loss_name="lambda_loss",
    loss_parameters={"k": 10, "weighting": {"scheme": "ndcg"}},
    forward_kind="padded: packing is switched off",
    warnings=("only one label",),
    num_workers=2,
    seconds=125.0,
    train=DataSummary(
        num_rows=1_000,
        num_lists=500,
        num_pairs=4_000,
        num_tokens=480_000,
        refused={"document_null": 1, "query_too_long": 9},
        statistics=LabelStatistics(0.0, 2.0, -0.5, 10, 967, 500, 5),
    ),
    validation=DataSummary(
        num_rows=100,
        num_lists=50,
        num_pairs=0,
        num_tokens=0,
        refused={"document_null": 2},
        statistics=LabelStatistics(nan, nan, nan, 0, 0, 50, 0),
    ),
    lineage={"model parent": "sha256:aa", "train data": "sha256:bb"},
)
#: Pages without figures, which take most of the time.
NO_LOG = replace(SUMMARY, logs=())
UNVALIDATED = replace(
    SUMMARY,
    logs=tuple(point for point in LOGS if "loss" in point.values),
    measure="",
    best_step=400,
    validation=None,
)


@pytest.fixture(scope="module")
def html():
    return render(SUMMARY)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def rows(html, heading):
    """The texts of a table's rows under a heading."""
    body = html.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    return [Page(f"<table>{row}</tr></table>").text for row in re.findall(r"<tr.*?(?=</tr>)", body, re.DOTALL)]


def test_the_headline_says_which_step_is_best_and_by_how_much(html, page):
    words = "Best: step 200 of 400, epoch 1.00 of 2, nDCG@10 .521 → .826, +.305: better"
    assert headline(SUMMARY) == words
    assert words in page.text and "better than before training" in page.text
    assert rows(html, "Did training help?") == [
        "Measure Before training Best Difference Last",
        "nDCG@10 .521 .826 +.305 .810",
        "MRR@10 .471 .800 +.329 .400",
        f"Validation loss 0.6931 0.1250 {MINUS}0.5681 0.1500",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"measure": "validation loss"},
            f"Best: step 200 of 400, epoch 1.00 of 2, validation loss 0.6931 → 0.1250, {MINUS}0.5681: better",
        ),
        (
            {"measure": "RR@10", "best_step": 400},
            f"Best: step 400 of 400, epoch 2.00 of 2, MRR@10 .471 → .400, {MINUS}.071: worse",
        ),
        ({"best_step": 0}, "Best: step 0 of 400, epoch 0.00 of 2, nDCG@10 .521 → .521, .000: the same"),
        (
            {"logs": LOGS[1:]},
            "Best: step 200 of 400, epoch 1.00 of 2, nDCG@10 .826; before training was not measured",
        ),
        ({"logs": (LOGS[0],)}, f"Best: step 200 of 400, nDCG@10 .521 → {UNKNOWN}"),
        (
            {"logs": (LogPoint(0, 0, {"nDCG@10": nan}), LogPoint(200, 1.0, {"nDCG@10": 0.5}))},
            "Best: step 200 of 400, epoch 1.00 of 2, nDCG@10 NaN → .500",
        ),
        (
            {"measure": ""},
            "Kept: step 200 of 400, epoch 1.00 of 2, the last one, as nothing was validated; "
            "training loss 0.5748 → 0.0542",
        ),
        ({"measure": "", "logs": ()}, "Kept: step 200 of 400, the last one, as nothing was validated"),
    ],
)
def test_the_headline_suits_what_was_measured(change, words):
    assert headline(replace(SUMMARY, **change)) == words


def test_the_table_of_validations_marks_the_best_one(html):
    assert rows(html, "Validations") == [
        "Epoch Step Training loss Validation loss nDCG@10 MRR@10",
        f"0.00 0 {UNKNOWN} 0.6931 .521 .471 before training",
        "1.00 200 0.1423 0.1250 .826 .800 best",
        "2.00 400 0.0542 0.1500 .810 .400",
    ]
    assert len(re.findall(r'<tr class="best">', html)) == 1


def test_a_validation_shows_the_newest_training_loss():
    logs = (LogPoint(1, 0.1, {"loss": 0.5}), LogPoint(3, 0.3, {"nDCG@10": 0.7}), LogPoint(4, 0.4, {"loss": 0.4}))
    assert rows(render(replace(SUMMARY, logs=logs)), "Validations")[1:] == ["0.30 3 0.5000 .700"]


def test_the_page_has_every_part(html, page):
    assert page.tags.count("svg") == 7
    assert tiles(html) == {
        "Steps": "400",
        "Best step": "200",
        "Training pairs": "4,000",
        "Pairs per second": "125",  # of 100, 100, 100 and 200
        "Tokens per second": "12,000",
        "Training time": "2 min 05 s",
    }
    assert rows(html, "Data") == [
        "Training Validation",
        "Rows 1,000 100",
        "Lists 500 50",
        "Pairs 4,000 0",
        "Tokens 480,000 0",
        "Pairs in a list, mean 8.0 0.0",
        f"Tokens in a pair, mean 120.0 {UNKNOWN}",
        f"Labels 0 to 2, mean {MINUS}0.5 {UNKNOWN}",
        f"Distinct labels 10 or more {UNKNOWN}",
        f"Pairs with a label above 0 967 (24.2 %) {UNKNOWN}",
        f"Lists whose labels are all equal 5 (1.0 %) {UNKNOWN}",
        "Reason Training Validation",
        "query_too_long 9 0",
        "document_null 1 2",
    ]
    for words in (
        "Warnings only one label",
        "Name lambda_loss k 10 weighting.scheme ndcg",
        "Forward pass padded: packing is switched off Workers 2",
        "dtype float32 epochs 2 lora null resumed true workers.count 2 workers.gpus 0",
        "model parent sha256:aa train data sha256:bb",
    ):
        assert words in page.text


def test_the_best_step_is_marked_on_what_it_depends_on(html):
    marked = [figure for figure in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "best: step 200" in figure]
    assert [re.search('aria-label="(.*?)"', figure)[1] for figure in marked] == [
        "training loss over steps",
        "nDCG@10 and MRR@10 over steps",
        "validation loss over steps",
    ]


def test_the_page_loads_nothing_and_runs_nothing(html, page):
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_equal_summaries_give_equal_pages(html):
    def turned(mapping):
        return dict(reversed(mapping.items()))

    reordered = replace(
        SUMMARY,
        logs=tuple(LogPoint(point.step, point.epoch, turned(point.values)) for point in LOGS),
        settings=turned(SUMMARY.settings),
        loss_parameters=turned(SUMMARY.loss_parameters),
        train=replace(SUMMARY.train, refused=turned(SUMMARY.train.refused)),
        lineage=turned(SUMMARY.lineage),
    )
    assert reordered == SUMMARY and render(reordered) == html


def page_of(text):
    """A page that has a text wherever a page may have one."""
    data = replace(SUMMARY.train, refused={text: 1})
    return Page(
        render(
            replace(
                SUMMARY,
                model_name=text,
                output=text,
                measure=text,
                logs=(LogPoint(200, 1.0, {text: 0.5}),),
                settings={text: {text: text}},
                loss_name=text,
                loss_parameters={text: [text]},
                forward_kind=text,
                warnings=(text,),
                train=data,
                validation=data,
                lineage={text: text},
            )
        )
    )


@pytest.fixture(scope="module")
def plain_page():
    return page_of("x")


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_what_comes_from_data_and_settings_stays_text(odd, plain_page):
    page = page_of(odd)
    assert page.text.count(visible(odd)) >= 18
    assert sorted(page.tags) == sorted(plain_page.tags)
    assert sorted(name for name, _ in page.attributes) == sorted(name for name, _ in plain_page.attributes)


@pytest.mark.parametrize("names", [("$x", "$"), ("_a", "__"), ("a\\1", "\\g<0>")])
def test_names_of_measures_are_drawn_as_they_are(names):
    logs = tuple(LogPoint(step, 1.0, dict.fromkeys(names, step / 9)) for step in (1, 2))
    html = render(replace(SUMMARY, logs=logs, measure=names[0]))
    legend = Page("".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))).texts
    assert [text for text in legend if text in names] == list(names)


def test_a_run_without_validation_has_a_page_that_says_so():
    html = render(UNVALIDATED)
    page = Page(html)
    assert "Give validation to choose the best step" in page.text
    assert page.tags.count("svg") == 5
    assert "best" not in page.text.replace("the best step", "")
    assert "<h2>Validation" not in html
    assert tiles(html)["Kept step"] == "400"
    assert rows(html, "Data")[0] == "Training"


def test_a_run_without_any_point_has_a_page_that_says_so():
    empty = DataSummary(num_rows=0, num_lists=0, num_pairs=0, num_tokens=0, refused={}, statistics=None)
    summary = replace(
        NO_LOG, num_steps=0, best_step=0, warnings=(), settings={}, loss_parameters={}, lineage={}, train=empty
    )
    for nothing in (summary, replace(summary, measure="", validation=None)):
        html = render(nothing)
        page = Page(html)
        assert "svg" not in page.tags and "There is no point to draw." in page.text
        assert "Warnings" not in page.text and "Lineage" not in page.text
        assert tiles(html)["Pairs per second"] == UNKNOWN
    assert "No row and no document was refused." in page.text


def test_a_single_point_is_drawn():
    html = render(replace(SUMMARY, logs=(LogPoint(0, 0.0, {"loss": 0.5}),), num_steps=0, best_step=0))
    assert Page(html).tags.count("svg") == 1


def test_figures_that_are_not_finite_are_told_and_not_drawn():
    strange = {"loss": nan, "gradient_norm": inf, "learning_rate": 1e300, "validation_loss": -inf, "nDCG@10": nan}
    html = render(replace(SUMMARY, logs=(LogPoint(200, 1.0, strange), LogPoint(300, 1.5, {"loss": 0.5}))))
    page = Page(html)
    assert page.tags.count("svg") == 1
    assert page.text.count("1 point is not finite, or too large to draw.") == 5
    assert rows(html, "Validations")[1] == f"1.00 200 NaN {MINUS}∞ NaN best"
    paths = [value for name, value in page.attributes if name == "d"]
    assert not [path for path in paths if "nan" in path or "inf" in path]


def test_long_curves_are_drawn_by_means_and_long_tables_are_folded():
    logs = tuple(LogPoint(step, step / 1000, {"loss": 1 / step, "nDCG@10": 0.5}) for step in range(1, 1501))
    html = render(replace(SUMMARY, logs=logs))
    curves = html.split("<h2>Validations</h2>")[0]
    assert len(curves) < 100_000
    assert "<details><summary>1,500 validations</summary>" in html
    assert Page(html).tags.count("details") == 1


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("loss", 0.12345, "0.1235"),
        ("loss", -0.5, f"{MINUS}0.5000"),
        ("loss", 1.5e-7, f"1.5e{MINUS}07"),
        ("loss", 123456.0, "1.23e+05"),
        ("loss", 0.0, "0.0000"),
        ("validation_loss", inf, "∞"),
        ("nDCG@10", 0.52, ".520"),
        ("nDCG@10", None, UNKNOWN),
    ],
)
def test_figures_are_short(key, value, text):
    assert figure(key, value) == text


def test_settings_are_named_as_on_the_command_line():
    settings = {"b": {"d": {"e": 1e-5}, "c": [1, "x"]}, "a": "", "f": {}, "g": Path("x")}
    assert flat(settings) == [("a", '""'), ("b.c", '[1, "x"]'), ("b.d.e", "1e-05"), ("f", "{}"), ("g", '"x"')]


def test_points_of_a_step_are_one_and_the_later_figure_counts():
    assert one_a_step([LogPoint(2, 1.0, {"a": 1}), LogPoint(1, 0.5, {"a": 0}), LogPoint(2, 1.0, {"a": 2, "b": 3})]) == [
        LogPoint(1, 0.5, {"a": 0}),
        LogPoint(2, 1.0, {"a": 2, "b": 3}),
    ]


def test_the_card_s_table_has_losses_and_measures():
    found = card_logs([*LOGS, LogPoint(450, 2.2, SPEED)])
    assert found[:3] == [
        LogRow(0.0, 0, {"Validation Loss": 0.6931, "nDCG@10": 0.5213, "MRR@10": 0.4711}),
        LogRow(0.5, 100, {"Training Loss": 0.5748}),
        LogRow(1.0, 200, {"Training Loss": 0.1423, "Validation Loss": 0.125, "nDCG@10": 0.8264, "MRR@10": 0.8}),
    ]
    assert [row.step for row in found] == [0, 100, 200, 300, 400]
    data = CrossEncoderModelCardData(logs=found, best_step=200)
    card = render_card(data, ModelFacts("me/base", "abc", 128, 1, "Sigmoid", "CrossEncoder(...)"))
    assert "| Epoch | Step | Training Loss | Validation Loss | nDCG&#64;10 | MRR&#64;10 |" in card
    assert "| **1.0000** | **200** | **0.1423** | **0.1250** | **0.8264** | **0.8000** |" in card
