"""A job's settings are checked when they are read, and tell which of them change results."""

import pytest
from pydantic import ValidationError

from pipelines.config import InterpolateConfig, RerankConfig
from pipelines.model import from_config

NEEDED = {"candidates": "c.parquet", "model": "m", "output": "o"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"candidates": ()}, "candidates is empty"),
        ({"candidates": ""}, "candidates is empty"),
        ({"candidates": ("a", "")}, "candidates is empty"),
        ({"model": ""}, "model"),
        ({"output": ""}, "output"),
        ({"topk": 5}, "topk"),
        ({"scoring": {"gpus": 1}}, "gpus"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": "many"}, "top_k"),
        ({"scoring": {"actors": 0}}, "actors"),
        ({"scoring": {"dtype": "int8"}}, "dtype"),
        ({"scoring": {"max_length": 0}}, "max_length"),
        ({"shard_candidates": 0}, "shard_candidates"),
        ({"max_text_bytes": 0}, "max_text_bytes"),
        ({"price_per_hour": -1}, "price_per_hour"),
        ({"queries": "q"}, "queries and corpus go together"),
        ({"corpus": "c"}, "queries and corpus go together"),
        ({"layout": "pairs", "queries": "q", "corpus": "c"}, "layout pairs holds its own texts"),
        ({"layout": "flat"}, "layout"),
        ({"interpolate": {}}, "give either weight"),
        ({"interpolate": {"weight": 0.5, "fit": "qrels"}}, "give either weight"),
        ({"interpolate": {"weight": 1.5}}, "weight"),
        ({"pass_through": ("a", "b", "a")}, "'a' twice"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name(settings, says):
    with pytest.raises(ValidationError, match=says):
        RerankConfig.model_validate(NEEDED | settings)


def test_one_place_and_a_list_of_places_are_both_candidates():
    assert RerankConfig.model_validate(NEEDED).candidate_uris == ("c.parquet",)
    several = RerankConfig.model_validate(NEEDED | {"candidates": ["a", "b"]})
    assert several.candidate_uris == ("a", "b")


def test_settings_cannot_be_changed_after_they_were_read():
    with pytest.raises(ValidationError, match="frozen"):
        RerankConfig.model_validate(NEEDED).top_k = 5


def test_credentials_do_not_show_when_a_job_is_printed():
    config = RerankConfig.model_validate(NEEDED | {"storage_options": {"secret": "my-secret-key"}})
    assert "my-secret-key" not in repr(config)


def test_a_job_may_compile_its_model_but_not_the_exact_one_nor_an_onnx_file():
    model = from_config(RerankConfig.model_validate(NEEDED | {"scoring": {"compile": True, "dtype": "bfloat16"}}))
    assert model.compiles and not model.exact().compiles
    with pytest.raises(ValidationError, match="compile goes with backend: torch"):
        RerankConfig.model_validate(NEEDED | {"scoring": {"compile": True, "backend": "onnx"}})


CHANGES_RESULTS = [
    {"layout": "pairs"},
    {"columns": {"text": "body"}},
    {"pass_through": ["lang"]},
    {"top_k": 3},
    {"interpolate": {"weight": 0.5}},
    {"max_text_bytes": 9},
    {"skip_bad_files": True},
    {"trec_run": True},
    {"scoring": {"dtype": "bfloat16"}},
    {"scoring": {"dtype": "auto"}},
    {"scoring": {"max_batch_tokens": 99}},
    {"scoring": {"max_length": 99}},
    {"scoring": {"compile": True}},
    {"scoring": {"activation": "identity"}},
]
CHANGES_NOTHING = [
    {"scoring": {"actors": 3, "gpus_per_actor": 1, "cpus_per_actor": 2}},
    {"cpus_per_tokeniser": 2},
    {"qrels": "q.parquet"},
    {"price_per_hour": 3.5},
    {"storage_options": {"anon": True}},
    {"drain_seconds": 1},
    {"ray_address": "auto"},
]


def _options(settings: dict[str, object]) -> dict[str, object]:
    return RerankConfig.model_validate(NEEDED | settings).result_options()


@pytest.mark.parametrize("settings", CHANGES_RESULTS, ids=str)
def test_a_setting_that_changes_results_is_part_of_the_fingerprint(settings):
    assert _options(settings) != _options({})


@pytest.mark.parametrize("settings", CHANGES_NOTHING, ids=str)
def test_a_setting_that_changes_no_result_can_differ_when_a_run_is_resumed(settings):
    assert _options(settings) == _options({})


def test_an_activation_that_is_not_mentioned_leaves_the_fingerprint_of_older_runs():
    assert "activation" not in _options({}) and _options({}) == _options({"scoring": {"activation": "checkpoint"}})


def test_interpolation_takes_a_weight_or_judgements_to_fit_it_on():
    assert InterpolateConfig(weight=0.25).weight == 0.25
    assert InterpolateConfig(fit="qrels.parquet").weight is None
