"""Scoring on several devices of one machine."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from crossenc import CrossEncoder
from crossenc import pool as pools
from crossenc.errors import ConfigError, InputError
from crossenc.pool import Pool
from crossenc.testing import WORDS, tiny_checkpoint

PAIRS = [(WORDS[i % 10], " ".join(WORDS[(i + k) % 20] for k in range(i % 13))) for i in range(50)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(tiny_checkpoint(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def pool(model: CrossEncoder) -> Iterator[Pool]:
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    yield pool
    model.stop_multi_process_pool(pool)


def test_a_pool_gives_what_the_model_gives_in_the_same_order(model: CrossEncoder, pool: Pool) -> None:
    for options in ({}, {"chunk_size": 7}, {"activation_fn": torch.nn.Identity()}, {"prompt": "the city "}):
        expected = model.predict(PAIRS, **{k: v for k, v in options.items() if k != "chunk_size"})
        np.testing.assert_allclose(model.predict(PAIRS, pool=pool, **options), expected, atol=1e-5)
    assert model.predict([], pool=pool).shape == (0,)
    assert model.predict(PAIRS[3], pool=pool) == pytest.approx(model.predict(PAIRS[3]), abs=1e-5)
    documents = [document for _, document in PAIRS[:9]]
    ranked, expected = model.rank("water", documents, pool=pool), model.rank("water", documents)
    assert [result["corpus_id"] for result in ranked] == [result["corpus_id"] for result in expected]


def test_an_error_of_a_process_reaches_the_caller_and_the_pool_works_on(model: CrossEncoder, pool: Pool) -> None:
    with pytest.raises(InputError, match="document 2 is a int"):
        model.predict([*PAIRS[:2], ("a", 1)], pool=pool, chunk_size=3)
    assert len(model.predict(PAIRS, pool=pool)) == 50


def test_a_pools_models_have_the_batch_size_of_theirs_and_are_compiled_like_it(
    model: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SameProcess:
        def __init__(self, _: int, *, initializer: Callable[..., None], initargs: tuple[Any, ...], **__: Any) -> None:
            pickle.loads(pickle.dumps(initializer))(*pickle.loads(pickle.dumps(initargs)))

        def shutdown(self, **_: Any) -> None:
            pass

    monkeypatch.setattr(pools, "ProcessPoolExecutor", SameProcess)
    model.save_pretrained(str(tmp_path))
    for max_batch_tokens in (None, 77):
        parent = CrossEncoder(tmp_path, device="cpu", max_batch_tokens=max_batch_tokens)
        with Pool(parent, ["cpu"]):
            child = pools._model
        assert child.engine.max_batch_tokens == parent.engine.max_batch_tokens
        assert child.compile_settings is None and child.engine.is_packed
    parent.compile(backend="eager")
    with Pool(parent, ["cpu"]):
        child = pools._model
    assert child.compile_settings == {"backend": "eager"}
    assert child.engine.forward_kind == parent.engine.forward_kind == "padded: it is compiled, or has hooks"


def test_a_list_of_devices_makes_a_pool_for_one_call(model: CrossEncoder) -> None:
    np.testing.assert_allclose(model.predict(PAIRS, device=["cpu"]), model.predict(PAIRS), atol=1e-5)
    with pytest.raises(ConfigError, match="at least one device"):
        model.predict(PAIRS, device=[])


def test_devices_may_be_torchs_and_chunks_have_pairs(model: CrossEncoder) -> None:
    pool = model.start_multi_process_pool([torch.device("cpu")])  # its process starts with the first chunk
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"chunk_size is {size}: give a number of pairs"):
            model.predict(PAIRS, pool=pool, chunk_size=size)
    with pytest.raises(InputError, match="document 30 is a int"):
        model.predict([*PAIRS[:30], ("a", 1)], pool=pool, chunk_size=3)
    pool.close()


def test_a_pool_does_not_use_adapters_that_are_disabled(tmp_path: Path) -> None:
    model = CrossEncoder(tiny_checkpoint(tmp_path / "model"), device="cpu")
    model.add_adapter(LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    Pool(model, ["cpu"]).close()
    model.disable_adapters()
    with pytest.raises(ConfigError, match="would use the adapters, which are disabled"):
        Pool(model, ["cpu"])
    model.enable_adapters()
    Pool(model, ["cpu"]).close()
