"""Packed batches give the scores of padded ones, and leave the model as it was."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from crossenc import CrossEncoder, attention, packing, scoring
from crossenc.attention import MAX_PRODUCT_TOKENS, Sequences, _products, attend, packed_attention
from crossenc.engine import Engine
from crossenc.float32_layers import keep_in_float32
from crossenc.modules import POOLING_MODES, Dense, LayerNorm, LogitScore, Pooling, Transformer
from crossenc.packing import PackedForward, kernel_of, why_padded
from crossenc.quiet import quiet_transformers
from crossenc.records import TokenizedPairs
from crossenc.testing import tiny_checkpoint

TOLERANCE = 1e-5
PADDING_ID = 1
NUM_WORDS = 50
MAX_LENGTH = 40

SIZES = {
    "vocab_size": NUM_WORDS,
    "pad_token_id": PADDING_ID,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH + PADDING_ID + 1,
    "initializer_range": 0.2,
}
MODERNBERT = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "num_hidden_layers": 4}
PACKED: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 2},
    "xlm-roberta": {"type_vocab_size": 2},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert cls": MODERNBERT | {"local_attention": 8, "classifier_pooling": "cls"},
    "modernbert mean": MODERNBERT | {"local_attention": 8, "classifier_pooling": "mean"},
    "mpnet": {},
}
PADDED: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


def tiny_model(name: str, loader: Any = AutoModelForSequenceClassification, **more: Any) -> nn.Module:
    config = AutoConfig.for_model(name.partition(" ")[0], **(SIZES | (PACKED | PADDED).get(name, {}) | more))
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        return loader.from_config(config).eval()


def modular(mode: str | list[str], family: str = "bert") -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        width = 32 * (1 if isinstance(mode, str) else len(mode))
        return [
            Transformer(tiny_model(family, AutoModel)),
            Pooling(32, mode),
            Dense(width, 16),
            LayerNorm(16),
            Dense(16, 2, activation_function=nn.Identity(), module_output_name="scores"),
        ]


def engine_of(*parts: nn.Module, num_labels: int = 2, max_batch_tokens: int = 100) -> Engine:
    return Engine(
        network=nn.Sequential(*parts).eval(),
        num_labels=num_labels,
        pad_token_id=PADDING_ID,
        padding_side="right",
        activation=nn.Identity(),
        device=torch.device("cpu"),
        max_batch_tokens=max_batch_tokens,
    )


def classify(model: nn.Module) -> Transformer:
    return Transformer(model, transformer_task="sequence-classification")


def classifier(name: str, **more: Any) -> Engine:
    return engine_of(classify(tiny_model(name, **more)))


def random_pairs(lengths: list[int], seed: int = 0, with_types: bool = True, smallest_id: int = 2) -> TokenizedPairs:
    """Random ids, of which `smallest_id` is the smallest: the padding id may stand in a text."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ids = rng.integers(smallest_id, NUM_WORDS, offsets[-1]).astype(np.int32)
    types = rng.integers(0, 2, offsets[-1]).astype(np.uint8) if with_types else None
    return TokenizedPairs(ids, offsets, types, np.zeros(len(lengths), bool))


PACKED_ENGINES: dict[str, Callable[[], Engine]] = {
    **{name: (lambda name=name: classifier(name)) for name in PACKED},
    **{f"pooling by {mode}": (lambda mode=mode: engine_of(*modular(mode))) for mode in POOLING_MODES},
    "mpnet pooled": lambda: engine_of(*modular("mean", "mpnet")),
    "pooling by three": lambda: engine_of(*modular(["mean", "cls", "max"], "modernbert mean")),
}


@pytest.fixture(scope="module", params=list(PACKED_ENGINES))
def packed(request: pytest.FixtureRequest) -> Engine:
    return PACKED_ENGINES[request.param]()


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=14),
    max_batch_tokens=st.integers(1, 300),
    seed=st.integers(0, 99),
    with_types=st.booleans(),
)
def test_packed_scores_equal_padded_ones(
    packed: Engine, lengths: list[int], max_batch_tokens: int, seed: int, with_types: bool
) -> None:
    is_typed = packed.network[0].model.config.model_type in ("bert", "roberta", "xlm-roberta", "electra")
    pairs = random_pairs(lengths, seed, with_types and is_typed, smallest_id=PADDING_ID)
    engine = replace(packed, max_batch_tokens=max_batch_tokens)
    assert engine.forward_kind == "packed, SDPA by groups of equal length"
    np.testing.assert_allclose(engine.score(pairs), replace(packed, may_pack=False).score(pairs), atol=TOLERANCE)


def test_packed_scores_tell_pairs_apart(packed: Engine) -> None:
    assert packed.score(random_pairs([5, 9, 9, 30])).std(axis=0).min() > 1e-3


@pytest.fixture
def seen_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Shapes of the token ids that any BERT embeds."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    shapes: list[tuple[int, int]] = []
    embed = BertEmbeddings.forward

    def spy(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return embed(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertEmbeddings, "forward", spy)
    yield shapes


def test_a_packed_batch_holds_tokens_and_no_padding(seen_shapes: list[tuple[int, int]]) -> None:
    classifier("bert").score(random_pairs([40, 3, 38, 20, 1, 30]))
    assert seen_shapes == [(1, 78), (1, 54)]  # 40 + 38 and 30 + 20 + 3 + 1 of 100


def test_the_last_layer_feeds_forward_first_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertIntermediate

    shapes: list[tuple[int, ...]] = []
    forward = BertIntermediate.forward

    def spy(self: Any, states: torch.Tensor) -> Any:
        shapes.append(tuple(states.shape[:2]))
        return forward(self, states)

    monkeypatch.setattr(BertIntermediate, "forward", spy)
    classifier("bert").score(random_pairs([40, 3, 38]))
    assert shapes == [(1, 81), (1, 3)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deberta-v2", "DebertaV2ForSequenceClassification is not known"),
        ("qwen3", "Qwen3ForSequenceClassification is not known"),
    ],
)
def test_other_families_are_padded_and_say_so(name: str, reason: str) -> None:
    engine = classifier(name)
    assert not engine.is_packed
    assert engine.forward_kind.startswith(f"padded: {reason}")
    pairs = random_pairs([5, 30, 12], with_types=False)
    alone = [engine.score(random_slice(pairs, i)) for i in range(3)]
    np.testing.assert_allclose(engine.score(pairs), np.concatenate(alone), atol=TOLERANCE)


def random_slice(pairs: TokenizedPairs, i: int) -> TokenizedPairs:
    start, end = pairs.offsets[i], pairs.offsets[i + 1]
    return TokenizedPairs(pairs.input_ids[start:end], np.array([0, end - start]), None, np.zeros(1, bool))


def spoil_by_hook(network: nn.Sequential) -> None:
    network[0].model.bert.encoder.register_forward_hook(lambda *_: None)


def spoil_by_compiling(network: nn.Sequential) -> None:
    network[0].model.bert.encoder.compile(backend="eager")


def spoil_by_attention(network: nn.Sequential) -> None:
    network[0].model.set_attn_implementation("eager")


def spoil_by_output(network: nn.Sequential) -> None:
    network[0].model.set_attn_implementation("eager")
    network[0].model.config.output_attentions = True


def spoil_by_forward(network: nn.Sequential) -> None:
    model = network[0].model
    model.forward = model.forward


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_by_hook, "compiled, or has hooks"),
        (spoil_by_compiling, "compiled, or has hooks"),
        (spoil_by_forward, "compiled, or has hooks"),
        (spoil_by_attention, "attention is set to eager"),
        (spoil_by_output, "return attentions"),
    ],
)
def test_a_model_that_somebody_altered_is_padded(spoil: Callable[[nn.Sequential], None], reason: str) -> None:
    engine = classifier("bert")
    pairs = random_pairs([5, 30, 12])
    expected = engine.score(pairs)
    spoil(engine.network)
    assert reason in engine.forward_kind
    np.testing.assert_allclose(engine.score(pairs), expected, atol=TOLERANCE)


def test_unknown_parts_and_devices_are_padded() -> None:
    class Shifted(Transformer):
        def forward(self, features: Any) -> Any:
            features = super().forward(features)
            return {**features, "scores": features["scores"] + 1}

    model = tiny_model("bert")
    shifted = Shifted(model, transformer_task="sequence-classification")
    assert "part that is not known" in str(why_padded(nn.Sequential(shifted), torch.device("cpu")))
    assert "no packed attention on mps" in str(why_padded(nn.Sequential(classify(model)), torch.device("mps")))
    assert "not a plain sequence" in str(why_padded(model, torch.device("cpu")))
    pairs = random_pairs([5, 30])
    plain = engine_of(classify(model)).score(pairs)
    np.testing.assert_allclose(engine_of(shifted).score(pairs), plain + 1, atol=TOLERANCE)


def test_packing_leaves_the_model_as_it_was(packed: Engine) -> None:
    model = packed.network[0].model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [id(module) for module in packed.network.modules()]
    configuration = copy.deepcopy(vars(model.config))
    packed.score(random_pairs([5, 9, 30]))
    assert vars(model.config) == configuration
    assert [id(module) for module in packed.network.modules()] == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_packed_model_can_be_called_copied_trained_and_saved(tmp_path: Any) -> None:
    model = CrossEncoder(tiny_checkpoint(tmp_path / "in"), device="cpu")
    pairs = [("what", "the water of the river"), ("how", "stone")]
    scores = model.predict(pairs)
    assert model.engine.is_packed
    np.testing.assert_allclose(torch.sigmoid(model.logits(pairs).detach())[:, 0], scores, atol=TOLERANCE)
    np.testing.assert_allclose(copy.deepcopy(model).predict(pairs), scores, atol=TOLERANCE)
    model.save_pretrained(str(tmp_path / "out"))
    np.testing.assert_allclose(CrossEncoder(tmp_path / "out", device="cpu").predict(pairs), scores, atol=TOLERANCE)
    model.logits(pairs).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    changed = model.predict(pairs)
    assert abs(changed - scores).max() > 1e-3
    np.testing.assert_allclose(torch.sigmoid(model.logits(pairs).detach())[:, 0], changed, atol=TOLERANCE)


def test_an_error_in_a_packed_batch_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = classifier("bert")
    pairs = random_pairs([5, 9])
    expected = engine.score(pairs)
    bad = replace(pairs, input_ids=pairs.input_ids + NUM_WORDS)
    with pytest.raises(IndexError):
        engine.score(bad)
    assert engine.network[0].model.config._attn_implementation == "sdpa"
    assert engine.score(pairs).tobytes() == expected.tobytes()


@pytest.mark.parametrize("in_another_thread", [False, True])
def test_a_padded_call_amid_a_packed_one_is_not_disturbed(in_another_thread: bool) -> None:
    engine = classifier("modernbert mean")
    model = engine.network[0].model
    ids = torch.randint(2, NUM_WORDS, (2, MAX_LENGTH))
    mask = torch.arange(MAX_LENGTH).expand(2, -1) < torch.tensor([[MAX_LENGTH], [20]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    found = []

    def call() -> None:
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask).logits)

    def amid() -> None:
        if in_another_thread:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        else:
            call()

    pairs = random_pairs([3, 5], with_types=False)
    packed = engine.score(pairs)
    forward = PackedForward(engine.network, engine.device)
    with torch.no_grad(), packed_attention(Sequences(np.array([3]), torch.tensor([0, 3]))):
        amid()
        np.testing.assert_allclose(forward(pairs, np.arange(2)), packed, atol=TOLERANCE)
        amid()
    for logits in found:
        torch.testing.assert_close(logits, expected)


def test_threads_that_share_a_model_get_their_own_scores() -> None:
    engine = classifier("bert")
    inputs = [random_pairs([3 + i, 20, 9, 31 - i], seed=i) for i in range(4)]
    expected = [engine.score(pairs) for pairs in inputs]
    found: dict[int, list[np.ndarray]] = {}

    def work(i: int) -> None:
        found[i] = [engine.score(inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(scores.tobytes() == expected[i].tobytes() for i in range(4) for scores in found[i])


def test_two_models_are_packed_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its forward pass until the other has come there, too."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    engines = [classifier("bert"), classifier("bert", hidden_act="relu")]
    pairs = random_pairs([5, 9, 30])
    expected = [engine.score(pairs) for engine in engines]
    both = threading.Barrier(2, timeout=20)
    embed = BertEmbeddings.forward

    def meet(self: Any, **inputs: Any) -> Any:
        both.wait()
        return embed(self, **inputs)

    monkeypatch.setattr(BertEmbeddings, "forward", meet)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda engine: engine.score(pairs), engines))
    assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [120, 60, 40])
def test_out_of_memory_halves_packed_batches(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertEmbeddings

    engine = classifier("bert")
    pairs = random_pairs([40, 3, 38, 20, 1, 30, 30, 17, 5])
    expected = engine.score(pairs)
    embed, tried = BertEmbeddings.forward, []

    def cramped(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        tried.append(input_ids.shape[1])
        if input_ids.shape[1] > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertEmbeddings, "forward", cramped)
    counts: list[int] = []
    scores = replace(engine, max_batch_tokens=1000).score(pairs, counts.append)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
    assert sum(counts) == len(pairs)
    failed = [tokens for tokens in tried if tokens > num_tokens]
    assert failed[0] == pairs.num_tokens
    assert all(later <= earlier / 2 for earlier, later in pairwise(failed))
    assert sum(tokens for tokens in tried if tokens <= num_tokens) == pairs.num_tokens  # none was computed twice


def test_one_prediction_remembers_what_did_not_fit_and_each_call_of_the_engine_begins_anew(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertEmbeddings

    model = CrossEncoder(tiny_checkpoint(tmp_path), device="cpu", max_batch_tokens=1000)
    pairs = [("what", "the water of the river")] * 24
    tokens = model.pair_tokenizer().encode(["what"] * 8, ["the water of the river"] * 8)
    embed, failed = BertEmbeddings.forward, []

    def cramped(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if input_ids.shape[1] >= tokens.num_tokens:
            failed.append(input_ids.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertEmbeddings, "forward", cramped)
    monkeypatch.setattr(scoring, "PAIRS_AHEAD", 8)
    assert len(model.predict(pairs)) == 24
    assert failed == [tokens.num_tokens]
    model.engine.score(tokens)
    model.engine.score(tokens)
    assert failed == [tokens.num_tokens] * 3


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_the_head_of_a_narrow_model_is_computed_in_float32(name: str) -> None:
    engine = classifier(name)
    pairs = random_pairs([5, 30, 12, 12], with_types=False)
    expected = engine.score(pairs)
    engine.network.bfloat16()
    scores = engine.score(pairs)
    assert all(parameter.dtype == torch.bfloat16 for parameter in engine.network.parameters())
    # A logit of 8 bits of mantissa would be its own rounding to bfloat16.
    assert not np.array_equal(torch.from_numpy(scores).bfloat16().float().numpy(), scores)
    np.testing.assert_allclose(scores, expected, atol=0.15 * max(1, abs(expected).max()))
    np.testing.assert_allclose(
        replace(engine, may_pack=False).score(pairs), scores, atol=0.1 * max(1, abs(expected).max())
    )


def test_a_modular_head_of_a_narrow_model_is_computed_in_float32() -> None:
    engine = engine_of(*modular("mean"))
    pairs = random_pairs([5, 30, 12, 12])
    expected = engine.score(pairs)
    engine.network.bfloat16()
    scores = engine.score(pairs)
    assert not np.array_equal(torch.from_numpy(scores).bfloat16().float().numpy(), scores)
    np.testing.assert_allclose(scores, expected, atol=0.15 * max(1, abs(expected).max()))


ASKED: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3 untied": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
    "phi": {},  # its head has a bias
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 2.0},
}


def asked(name: str, false_token_id: int | None = 9) -> Engine:
    """A language model of bfloat16 with logits around 20."""
    model = tiny_model(name, AutoModelForCausalLM, **ASKED[name])
    with torch.no_grad():
        norm = getattr(model.base_model, "norm", None) or model.base_model.final_layernorm
        norm.weight.fill_(25.0)
    transformer = Transformer(model.bfloat16(), transformer_task="text-generation")
    return engine_of(transformer, LogitScore(7, false_token_id), num_labels=1)


@pytest.mark.parametrize("name", list(ASKED))
@pytest.mark.parametrize("false_token_id", [9, None])
def test_a_narrow_language_model_computes_its_yes_and_no_in_float32(name: str, false_token_id: int | None) -> None:
    engine = asked(name, false_token_id)
    assert engine.forward_kind.startswith("padded") and "float32" not in engine.forward_kind
    pairs = random_pairs([12] * 60, with_types=False)
    scores = engine.score(pairs)
    assert abs(scores).mean() > 5
    assert len(set(scores.tolist())) == 60  # bfloat16 has 32 numbers between 8 and 16
    reference = copy.deepcopy(engine.network)
    keep_in_float32(reference, ["0.model.lm_head"])
    with torch.no_grad():
        expected = reference(engine.batch_inputs(pairs, np.arange(60)))["scores"][:, 0]
    np.testing.assert_allclose(scores, expected, atol=0.05)  # other batches round hidden states differently
    assert engine.network[0].model.lm_head.weight.dtype == torch.bfloat16


def test_a_language_model_with_another_head_says_that_it_stays_narrow() -> None:
    class Head(nn.Linear):
        pass

    engine = asked("qwen3 untied")
    engine.network[0].model.lm_head.__class__ = Head
    assert engine.forward_kind.endswith("yes and no are not computed in float32")
    assert engine.score(random_pairs([5], with_types=False)).shape == (1,)


@pytest.mark.parametrize("length", [1, 7, MAX_PRODUCT_TOKENS])
def test_the_products_equal_the_fused_kernel(length: int) -> None:
    query, key, value = torch.randn(3, 2, 4, length, 8).unbind()
    fused = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(_products(query, key, value, 0.3, 0.0), fused, atol=1e-5, rtol=1e-5)


def test_sequences_see_themselves_alone_and_in_a_window_their_neighbours() -> None:
    lengths = np.array([9, 4, 4, 1])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    query, key, value = torch.randn(3, starts[-1], 2, 8).unbind()
    places = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    owner = torch.from_numpy(np.repeat(np.arange(4), lengths))
    together = owner[:, None] == owner[None, :]
    for window in (None, 3, 0):
        near = together if window is None else together & ((places[:, None] - places[None, :]).abs() <= window)
        weights = torch.einsum("thd,shd->hts", query, key).mul(0.5).masked_fill(~near, -torch.inf).softmax(-1)
        found = attend(query, key, value, 0.5, Sequences(lengths, torch.from_numpy(starts)), window)
        expected = torch.einsum("hts,shd->thd", weights, value)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        first = attend(query, key, value, 0.5, Sequences(lengths, torch.from_numpy(starts)), window, first_only=True)
        expected[places > 0] = 0
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_a_bias_is_handed_on_with_four_dimensions_which_the_fast_kernel_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths, shapes = np.array([9, 4, 4]), []
    query, key, value = torch.randn(3, 17, 2, 8).unbind()
    bias, kernel = torch.randn(2, 9, 9), nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        shapes.append(tuple(attn_mask.shape))
        return kernel(*args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    sequences = Sequences(lengths, torch.tensor([0, 9, 13, 17]))
    states = attend(query, key, value, 0.5, sequences, bias=bias)
    assert shapes == [(1, 2, 9, 9), (1, 2, 4, 4)]
    weights = (torch.einsum("thd,shd->hts", query[9:13], key[9:13]) * 0.5 + bias[:, :4, :4]).softmax(-1)
    expected = torch.einsum("hts,shd->thd", weights, value[9:13])
    torch.testing.assert_close(states[9:13], expected, atol=1e-5, rtol=1e-5)


def test_the_mask_of_a_window_takes_a_byte_for_two_tokens_and_no_more() -> None:
    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            self.num_bytes = max(self.num_bytes, made.nbytes)
            return made

    with Largest() as largest:
        mask = Sequences(np.array([50]), torch.tensor([0, 50])).window_mask(50, 3)
    assert largest.num_bytes == 50 * 50
    assert mask.tolist() == [[abs(i - j) <= 3 for j in range(50)] for i in range(50)]


@pytest.mark.parametrize(("window", "first_only"), [(None, False), (3, False), (None, True)])
def test_torchs_kernel_is_asked_for_what_the_groups_compute(
    window: int | None, first_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs on CUDA alone: what it is documented to compute stands in for it."""

    def documented(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        max_query: int,
        max_key: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        assert query_starts.dtype == key_starts.dtype == torch.int32
        assert (query_starts.diff().max(), key_starts.diff().max()) == (max_query, max_key)
        parts = []
        for q, k, v in zip(
            query.tensor_split(query_starts[1:-1].long()),
            key.tensor_split(key_starts[1:-1].long()),
            value.tensor_split(key_starts[1:-1].long()),
            strict=True,
        ):
            distance = torch.arange(len(k))[None, :] - torch.arange(len(q))[:, None]
            left, right = (len(k) if side == -1 else side for side in window_size)
            seen = (distance >= -left) & (distance <= right)
            weights = torch.einsum("thd,shd->hts", q, k).mul(scale).masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hts,shd->thd", weights, v))
        return torch.cat(parts)

    lengths = np.array([9, 4, 4, 1])
    starts = torch.tensor([0, 9, 13, 17, 18], dtype=torch.int32)
    query, key, value = torch.randn(3, 18, 2, 8).unbind()
    settings = {"scale": 0.5, "sequences": Sequences(lengths, starts), "window": window, "first_only": first_only}
    expected = attend(query, key, value, **settings)
    monkeypatch.setattr(attention, "takes_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", documented)
    torch.testing.assert_close(attend(query, key, value, **settings), expected, atol=1e-5, rtol=1e-5)


def test_this_version_of_torch_has_a_kernel_with_windows() -> None:
    assert attention.varlen_has_settings()


def test_a_kernel_that_takes_no_settings_is_asked_for_what_it_does_of_its_own_accord(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def old(q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, max_q: int, max_k: int, *, is_causal: bool = False):  # type: ignore[no-untyped-def]
        calls.append(max_q)
        return q

    monkeypatch.setattr(attention, "takes_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", old)
    attention.varlen_has_settings.cache_clear()
    try:
        query = torch.randn(4, 2, 8)
        sequences = Sequences(np.array([3, 1]), torch.tensor([0, 3, 4], dtype=torch.int32))
        assert attend(query, query, query, 8**-0.5, sequences) is query
        attend(query, query, query, 0.5, sequences)
        attend(query, query, query, 8**-0.5, sequences, window=1)
        assert calls == [3]
    finally:
        attention.varlen_has_settings.cache_clear()


def test_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda, groups = torch.device("cuda"), "SDPA by groups of equal length"
    narrow = {name: classifier(name).network.bfloat16() for name in ("bert", "mpnet")}
    assert [kernel_of(network, cuda) for network in narrow.values()] == ["varlen kernel", groups]
    assert kernel_of(classifier("bert").network, cuda) == groups
    assert kernel_of(narrow["bert"], torch.device("cpu")) == groups
    modernbert = classifier("modernbert").network.bfloat16()
    assert kernel_of(modernbert, cuda) == "varlen kernel"
    monkeypatch.setattr(packing, "varlen_has_settings", lambda: False)
    assert kernel_of(modernbert, cuda) == f"varlen kernel, {groups} within windows"
    assert kernel_of(narrow["bert"], cuda) == "varlen kernel"


def test_dropout_leaves_out_its_share_of_the_weights_keeps_their_mean_and_repeats_by_the_seed() -> None:
    lengths = np.array([40, 40, 7])
    starts = torch.tensor([0, 40, 80, 87], dtype=torch.int32)
    query, key = torch.zeros(2, 87, 2, 4).unbind()  # all weights of a sequence are alike
    value = torch.ones(87, 2, 4)

    def states(seed: int, dropout: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return attend(query, key, value, 0.5, Sequences(lengths, starts), dropout=dropout)

    torch.testing.assert_close(states(0, 0.0), value)
    kept = states(0, 0.25)[:80] * 0.75 * 40  # how many of 40 weights are left
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert kept.mean().item() == pytest.approx(30, abs=1) and kept.min() < 30 < kept.max()
    assert torch.equal(states(0, 0.25), states(0, 0.25)) and not torch.equal(states(0, 0.25), states(1, 0.25))
    assert not states(0, 1.0).any()
