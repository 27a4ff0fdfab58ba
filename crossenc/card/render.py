"""The card as markdown: made offline, the same for the same facts, and safe whatever the data holds.

Text from data is data: in a table every character that markdown, HTML or a template could act on is written as a
character reference, and in the code example every text is a Python literal.
"""

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from crossenc.card.data import CrossEncoderModelCardData, LogRow, ModelFacts, number

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("template.md.jinja")
_MAX_CHARACTERS, _MAX_ELEMENTS = 1000, 5
_MAX_OPEN_LOG_ROWS, _MAX_OPEN_DATASETS = 100, 3
#: What may act in markdown or HTML inside a line.
_ACTIVE = frozenset("\\`*_{}[]<>#|~$&!^=@:\"'")
_PACKAGES = ("sentence-transformers", "transformers", "torch", "accelerate", "datasets", "tokenizers")
_EXAMPLE_PAIRS = (
    ("what is a shard", "A shard is the unit of work and of commit."),
    ("what is a shard", "A kind of whale."),
)


def markdown_environment() -> jinja2.Environment:
    """For templates of cards. What comes from data goes through a filter, as `inline`, that escapes it."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the filters escape for markdown and HTML both
    )
    environment.filters["inline"] = inline
    return environment


def render_card(data: CrossEncoderModelCardData, facts: ModelFacts) -> str:
    """The card of a model: front matter in YAML, then markdown."""
    environment = markdown_environment()
    environment.filters.update(cell=cell, json=_json, figure=_figure)
    pairs = _example_pairs(data)
    body = environment.from_string(_TEMPLATE.read_text()).render(
        data=data,
        facts=facts,
        name=data.model_name or (f"CrossEncoder based on {facts.base_model}" if facts.base_model else "CrossEncoder"),
        model_id=data.model_id or "path/to/this-model",
        pairs=[(repr(query), repr(document)) for query, document in pairs],
        languages=[data.language] if isinstance(data.language, str) else list(data.language or ()),
        dataset_names=_dataset_names(data),
        log_columns=_log_columns(data.logs),
        log_rows=data.logs,
        folds_logs=len(data.logs) > _MAX_OPEN_LOG_ROWS,
        folds_datasets=len(data.training) > _MAX_OPEN_DATASETS,
        emission_lines=_emission_lines(data.emissions),
        versions=_versions(),
    )
    return f"---\n{_front_matter(data, facts)}---\n\n{body}"


def write_card(folder: Path, data: CrossEncoderModelCardData, facts: ModelFacts) -> None:
    """Write README.md into `folder`. Whatever fails in making it is logged; a short card is written then."""
    try:
        card = render_card(data, facts).encode()
    except Exception:  # a card must never cost a model
        logger.warning("the model card could not be made; a short one is saved", exc_info=True)
        card = b"---\nlibrary_name: sentence-transformers\npipeline_tag: text-ranking\n---\n\n# CrossEncoder\n"
    (folder / "README.md").write_bytes(card)


def inline(text: object) -> str:
    """`text` on one line, with nothing in it that markdown or HTML acts on."""
    shown = " ".join(str(text).split())
    return "".join(f"&#{ord(c)};" if c in _ACTIVE or not c.isprintable() else c for c in shown)


def cell(value: object) -> str:
    """A value of a dataset in a table: long texts and lists are cut."""
    if isinstance(value, list | tuple):
        shown = ", ".join(cell(item) for item in value[:_MAX_ELEMENTS])
        return f"{shown}, …" if len(value) > _MAX_ELEMENTS else shown
    text = str(value)
    return f"<code>{inline(text[:_MAX_CHARACTERS])}{'…' if len(text) > _MAX_CHARACTERS else ''}</code>"


def _figure(measure: float | str) -> str:
    """A measure as it is shown: a text as it is, a number with four digits."""
    return inline(measure) if isinstance(measure, str) else f"{measure:.4f}"


def _json(value: object) -> str:
    """Settings as indented JSON that cannot end the block of code it stands in."""
    return json.dumps(value, indent=4, default=str, sort_keys=True, ensure_ascii=False).replace("`", "\\u0060")


def _example_pairs(data: CrossEncoderModelCardData) -> Sequence[tuple[str, str]]:
    """The first pairs of texts in the validation data, else the training data, else made up."""
    for dataset in [*data.validation, *data.training]:
        pairs = [pair for row in dataset.samples if (pair := _pair(row)) is not None]
        if pairs:
            return pairs
    return _EXAMPLE_PAIRS


def _dataset_names(data: CrossEncoderModelCardData) -> list[str]:
    named = [str(dataset.get("name") or dataset.get("id")) for dataset in data.train_datasets]
    return named or [dataset.dataset_id or dataset.name for dataset in data.training]


def _dataset_ids(data: CrossEncoderModelCardData) -> list[str]:
    stated = [dataset["id"] for dataset in data.train_datasets if dataset.get("id")]
    return list(dict.fromkeys([*stated, *(dataset.dataset_id for dataset in data.training if dataset.dataset_id)]))


def _emission_lines(emissions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was emitted, in words: the names that codecarbon gives are put plainly, others stay."""
    if not emissions:
        return []
    known = {
        "energy_consumed": ("Energy consumed", "{:.4g} kWh"),
        "emissions": ("Carbon emitted", "{:.4g} g of CO2"),
        "on_cloud": ("In a cloud", "{}"),
        "hardware_used": ("GPU", "{}"),
        "cpu_model": ("CPU", "{}"),
        "ram_total_size": ("Memory", "{:.2f} GB"),
        "training_type": ("Kind of training", "{}"),
    }
    return [
        (known[name][0], known[name][1].format(value)) if name in known and value is not None else (name, str(value))
        for name, value in emissions.items()
        if name != "source"
    ]


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    texts = [value for value in row.values() if isinstance(value, str)]
    lists = [value for value in row.values() if isinstance(value, list | tuple) and value and isinstance(value[0], str)]
    if len(texts) >= 2:
        return texts[0], texts[1]
    return (texts[0], lists[0][0]) if texts and lists else None


def _log_columns(logs: Sequence[LogRow]) -> list[str]:
    """Columns of the table of logs: losses first, then measures in order of appearance."""
    names = list(dict.fromkeys(name for row in logs for name in row.values))
    first = [name for name in ("Training Loss", "Validation Loss") if name in names]
    return [*first, *(name for name in names if name not in first)]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("crossenc", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _front_matter(data: CrossEncoderModelCardData, facts: ModelFacts) -> str:
    tags = list(data.tags)
    if data.was_trained:
        tags.append("generated_from_trainer")
        if num_rows := sum(dataset.num_rows or 0 for dataset in data.training):
            tags.append(f"dataset_size:{num_rows}")
        tags += dict.fromkeys(f"loss:{name}" for name, _ in data.losses)
    results = _eval_results(data)
    fields: dict[str, Any] = {
        "language": data.language if isinstance(data.language, str | None) else list(data.language),
        "license": data.license,
        "tags": tags,
        "base_model": facts.base_model if facts.base_is_on_hub else None,
        "datasets": _dataset_ids(data) or None,
        "pipeline_tag": "text-ranking" if facts.num_labels == 1 else "text-classification",
        "library_name": "sentence-transformers",
        "co2_eq_emissions": dict(data.emissions) or None,
        "metrics": sorted({result.metric_type for result in results}) or None,
        "model-index": eval_results_to_model_index(data.model_name or "CrossEncoder", results) if results else None,
    }
    return str(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}, sort_keys=False, allow_unicode=True))


def _eval_results(data: CrossEncoderModelCardData) -> list[EvalResult]:
    task = "text-ranking" if data.task_name == "text reranking" else data.task_name
    return [
        EvalResult(
            task_type=task,
            task_name=data.task_name,
            dataset_type=evaluation.name or "unknown",
            dataset_name=evaluation.name or "Unknown",
            metric_type=measure.removeprefix(f"{evaluation.name}_"),
            metric_name=measure.removeprefix(f"{evaluation.name}_").replace("_", " ").capitalize(),
            metric_value=number(value),
        )
        for evaluation in data.evaluations
        for measure, value in evaluation.measures.items()
    ]
