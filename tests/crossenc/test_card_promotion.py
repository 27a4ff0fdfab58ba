"""The section of a card about a promotion: its figures, its place, and texts of data that stay texts."""

import yaml

from crossenc.card.promotion import Promotion, with_promotion
from crossenc.evaluation.comparison import Collection, System, evaluate, values_of
from crossenc.evaluation.gate import Gate, decide

CARD = "---\ntags:\n- reranker\nlibrary_name: sentence-transformers\n---\n\n# A model\n\n## Training Details\n\nMuch.\n"
EVIL = "<script>alert(1)</script> | {{ 7*7 }} `x`"


def promotion(lineage: dict[str, str]) -> Promotion:
    queries = [f"q{number}" for number in range(40)]
    first, better = {q: ["a", "b"] for q in queries}, {q: ["b", "a"] for q in queries}
    collection = Collection(
        name="clicks",
        qrels={q: {"b": 1} for q in queries},
        first_stage=first,
        systems=(System(name="v2", kind="model", source="v2", run=better, pairs_per_second=50.0),),
        segments={"market": {q: EVIL if n % 2 else "fr" for n, q in enumerate(queries)}},
        digests={},
        notes=(),
    )
    values = {"clicks": values_of(collection, ["nDCG@10", "Judged@10"])}
    found = evaluate([collection], values, depths=(2,), baseline="first_stage", seed=0)
    return Promotion(
        name="reranker",
        version="v2",
        decision=decide(Gate(), found, "v2"),
        evaluation=found,
        scoring={"clicks": "50 pairs a second"},
        training="3 min on one worker",
        lineage=lineage,
    )


def test_the_card_shows_figures_significance_segments_and_lineage_before_training():
    card = with_promotion(CARD, promotion({"Parent version": "v1", "Training data": "abc123"}))
    gain = 1 - 0.6309
    interval, unknown = f"[{gain:.4f}, {gain:.4f}]", "\N{EN DASH}"
    assert f"| **nDCG@10** | 1.0000 | [1.0000, 1.0000] | 0.6309 | +{gain:.4f} | {interval} | < 0.001" in card
    assert f"| Judged@10 | 0.5000 | [0.5000, 0.5000] | 0.5000 | {f'{unknown} | ' * 5}" in card
    assert f"| 2 | 1.0000 | +{gain:.4f} |" in card and "| market: fr | 20 | 1.0000 |" in card
    assert "promoted over the first stage" in card and "one&#45;sided" not in card
    assert "- Parent version: <code>v1</code>" in card and "50 pairs a second" in card
    assert card.index("## Evaluation") < card.index("### Where It Comes From") < card.index("## Training Details")
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["reranker"] and front["metrics"] == ["ndcg@10"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.0
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in table)


def test_texts_of_data_stay_texts_and_a_card_without_headings_gets_the_section_at_its_end():
    card = with_promotion("# Short\n", promotion({EVIL: EVIL}))
    assert "<script" not in card and "{{" not in card and "`x`" not in card and "49" not in card.split("market")[1]
    assert card.index("# Short") < card.index("## Evaluation")
