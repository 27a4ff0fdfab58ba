"""CrossEncoder: a checkpoint that scores texts, with the calls that users of sentence-transformers know.

It joins the parts of a model, their tokenizer and the engine, and knows neither files of queries nor clusters.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from crossenc.activations import make_activation
from crossenc.adapters import AdapterMixin, has_adapters
from crossenc.card import CrossEncoderModelCardData
from crossenc.chat import ChatTokenizer
from crossenc.checkpoint import fetch, fetch_base
from crossenc.compiling import compile_backbone
from crossenc.deprecation import accepts_old_arguments
from crossenc.engine import Activation, Engine, default_batch_tokens, default_device
from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.fitting import FitMixin
from crossenc.float32_layers import keep_in_float32
from crossenc.layout import default_kind, load_config
from crossenc.loading import num_labels_of, resolve_activation
from crossenc.merging import merge_models
from crossenc.modules import Features, Transformer
from crossenc.old_names import OldNamesMixin
from crossenc.onnx.backend import OnnxSettings, load_network
from crossenc.pairs import Pair, is_one_pair, split_pairs
from crossenc.pool import Pool, default_devices
from crossenc.precision import resolve_dtype
from crossenc.records import TokenizedPairs
from crossenc.saving import SaveMixin
from crossenc.scoring import ScoreSettings, check_activation, ranked, score_inputs, score_pairs, score_text
from crossenc.source import ModelSource, source_of_folder, source_of_modules, split_dtype
from crossenc.tokenizer import PairTokenizer, position_limit, wrap_tokenizer

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from crossenc.onnx.session import OnnxNetwork

Scores = NDArray[np.float32] | np.float32 | Tensor | list[Tensor]

_OLD_INIT_NAMES: Mapping[str, str | None] = {
    "model_name": "model_name_or_path",
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
    "default_activation_function": "activation_fn",
    "classifier_dropout": "config_kwargs.classifier_dropout",
}
_OLD_SCORE_NAMES: Mapping[str, str | None] = {"activation_fct": "activation_fn", "num_workers": None}
_OLD_PREDICT_NAMES = {**_OLD_SCORE_NAMES, "sentences": "inputs"}
_OLD_RANK_NAMES = {**_OLD_SCORE_NAMES, "apply_softmax": None, "convert_to_numpy": None, "convert_to_tensor": None}


class CrossEncoder(nn.Sequential, AdapterMixin, FitMixin, OldNamesMixin, SaveMixin):
    """A cross-encoder from a folder, a URI or the hub, in eval mode; its items are the parts of crossenc.modules."""

    prompts: dict[str, str]
    model_card_data: CrossEncoderModelCardData
    keep_in_fp32_modules: list[str]
    _new_head_is_allowed = False
    _source: ModelSource
    _tokenizer: PairTokenizer | ChatTokenizer
    _activation: Activation
    _default_prompt_name: str | None
    _max_batch_tokens: int | None

    @accepts_old_arguments(_OLD_INIT_NAMES, positional=("num_labels", "max_length", "activation_fn", "device"))
    def __init__(  # noqa: PLR0913 - one flat, keyword-only list is what users of this class's namesake expect
        self,
        model_name_or_path: str | Path | None = None,
        *,
        modules: Iterable[nn.Module] | Mapping[str, nn.Module] | None = None,
        device: str | torch.device | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | Path | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        model_card_data: CrossEncoderModelCardData | None = None,
        backend: str = "torch",
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Activation | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch_tokens: int | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Load `model_name_or_path`.

        `max_length` is in tokens; `dtype` a torch dtype, its name (float32 when None) or "auto", which is bfloat16
        where the device is fast at it; `device` the fastest that the machine has when None. `activation_fn` maps
        float32 logits [B, L] to scores and `num_labels` is L; both are the checkpoint's own when None. `prompts` are
        texts by name to put before queries, `default_prompt_name` the one used unless a call names another.
        `keep_in_fp32_modules` are paths of linear layers that compute in float32 whatever `dtype` is, the checkpoint's
        own when None. `max_batch_tokens` bounds a batch's tokens, padding included. `model_kwargs`,
        `processor_kwargs`, `config_kwargs` and `token` go to transformers and the hub, `storage_options` to a URI's
        file system. With `backend` "onnx" an ONNX file of the checkpoint scores: `model_kwargs` may name it
        (`file_name`) and onnxruntime's `provider`; it is exported where there is none, or always with `export`. A
        backbone without a head gets a new one, to be trained; it gives no scores before that.
        Raises InputError, CheckpointError or StorageError as `crossenc.checkpoint.fetch` does, ConfigError for a
        setting that does not fit the checkpoint or is not supported, TypeError for an unknown argument.
        """
        check_activation(activation_fn)
        _check_supported(trust_remote_code, backend)
        if (model_name_or_path is None) == (modules is None):
            raise ConfigError("give CrossEncoder either a folder, a URI or a hub id, or its modules")
        stated_dtype, model_settings = split_dtype(model_kwargs or {})
        onnx_settings = OnnxSettings.taken_from(model_settings) if backend == "onnx" else None
        config_settings, processor_settings = dict(config_kwargs or {}), dict(processor_kwargs or {})
        folder: Path | None = None
        stated_labels = config_settings.pop("num_labels", None)
        stated_length = processor_settings.pop("model_max_length", None)
        chosen_device = _home(backend) if device is None else torch.device(device)
        if modules is not None:
            source = source_of_modules(modules)
        else:
            places: dict[str, Any] = {"cache_dir": cache_folder, "storage_options": storage_options}
            places |= {"token": token, "local_files_only": local_files_only}
            folder = fetch(
                model_name_or_path,  # type: ignore[arg-type]  # one of the two is given
                revision=revision,
                adapter_allowed=True,
                also=None if onnx_settings is None else onnx_settings.path,
                **places,
            )
            base = fetch_base(folder, **places)
            source = source_of_folder(
                folder,
                str(model_name_or_path),
                revision,
                base=base,
                num_labels=stated_labels if num_labels is None else num_labels,
                dtype=_dtype_of(base or folder, stated_dtype, dtype, chosen_device),
                config_settings=config_settings,
                model_settings=model_settings,
                processor_settings=processor_settings,
            )
        super().__init__(OrderedDict((str(i), part) for i, part in enumerate(source.parts)))
        self._source = source
        self._max_batch_tokens = max_batch_tokens
        self.model_card_data = model_card_data or CrossEncoderModelCardData()
        if self.model_card_data.base_model is None:
            self.model_card_data.base_model = source.name
            self.model_card_data.base_revision = revision
        self.prompts = {**source.layout.prompts, **(prompts or {})}
        self.activation_fn = activation_fn or self.checkpoint_activation()
        self.default_prompt_name = default_prompt_name or source.layout.default_prompt_name
        self.max_length = stated_length if max_length is None else max_length
        self.set_keep_in_fp32_modules(
            source.layout.fp32_modules if keep_in_fp32_modules is None else keep_in_fp32_modules
        )
        self.to(chosen_device)
        self.eval()
        if onnx_settings is not None:
            if self.dtype != torch.float32:
                raise ConfigError(f"an ONNX file has a precision of its own: leave dtype {self.dtype} out")
            self._source = replace(source, network=load_network(self, folder, onnx_settings))
        self._engine()  # its limits are checked now

    # --- what the model is

    @property
    def engine(self) -> Engine:
        """The Scorer inside, for pairs that are already tokenised. Raises CheckpointError while the head is new."""
        if self.head_is_new and not self._new_head_is_allowed:
            raise CheckpointError(
                f"the head of {self._source.name} is new and random, so its scores would mean nothing: train it first"
            )
        return self._engine()

    @property
    def training_engine(self) -> Engine:
        """The same for a model in training, whose head may be new."""
        return self._engine()

    @contextmanager
    def new_head_allowed(self) -> Iterator[None]:
        """Let a random head give scores inside of the block, with a warning: for a measurement before training."""
        if self.head_is_new:
            logger.warning("the head of %s is new and random: its scores mean nothing yet", self._source.name)
        self._new_head_is_allowed = True
        try:
            yield
        finally:
            self._new_head_is_allowed = False

    def _engine(self) -> Engine:
        limit = self._max_batch_tokens
        return Engine(
            network=self._source.network or self,
            num_labels=self.num_labels,
            pad_token_id=self._tokenizer.pad_token_id,
            padding_side=self._tokenizer.padding_side,
            activation=self._activation,
            device=self.device,
            max_batch_tokens=default_batch_tokens(self.device) if limit is None else limit,
        )

    def compile(self, **settings: Any) -> None:
        """Let torch.compile compute the backbone from now on; `settings` are its own, with defaults that fit.

        Batches are padded then, to a few widths and numbers of rows, and the first call takes a minute more. For the
        CPU, where batches without padding are faster, it is not worth while. CUDA graphs, which the defaults record on
        CUDA, belong to the thread that recorded them: score in one thread, the same from the first call on, or pass
        mode="default", which does without them.
        """
        compile_backbone(self.model, **settings)
        self.__dict__["_compile_settings"] = settings

    @property
    def compile_settings(self) -> dict[str, Any] | None:
        """What `compile` was called with; None where it was not."""
        settings: dict[str, Any] | None = self.__dict__.get("_compile_settings")
        return settings

    @property
    def max_batch_tokens(self) -> int | None:
        """Tokens that a batch holds at most, as they were set; None where the device decides."""
        return self._max_batch_tokens

    def get_backend(self) -> str:
        """What scores: "torch" or "onnx"."""
        return "torch" if self._source.network is None else "onnx"

    @property
    def onnx_network(self) -> "OnnxNetwork | None":
        """The ONNX file that scores, None with the backend torch."""
        return self._source.network

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or back. Raises ConfigError with the backend onnx, which has no gradients."""
        if mode and self.get_backend() != "torch":
            raise ConfigError("a model with backend='onnx' only scores: load it with backend='torch' to train it")
        return super().train(mode)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside."""
        first = self[0]
        assert isinstance(first, Transformer)
        model: PreTrainedModel = first.model
        return model

    @property
    def transformers_model(self) -> PreTrainedModel:
        """The same as `model`."""
        return self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._tokenizer.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Put another fast tokenizer in its place; the limit of tokens stays."""
        max_length = self.max_length
        self._source = replace(self._source, tokenizer=tokenizer)
        self.max_length = max_length

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def processor(self) -> PreTrainedTokenizerFast:
        """The same as `tokenizer`."""
        return self.tokenizer

    @processor.setter
    def processor(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    @property
    def max_length(self) -> int:
        """Tokens that a pair may have; set beyond the model's positions it is what they hold, with a warning."""
        return self._tokenizer.max_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        limit = position_limit(self.config)
        if value is not None and limit is not None and value > limit:
            logger.warning("max_length is %d, but the model has positions for %d tokens: it is %d", value, limit, limit)
            value = limit
        source = self._source
        self._tokenizer = wrap_tokenizer(source.tokenizer, self.config, source.layout, value)
        self._source.tokenizer.model_max_length = self._tokenizer.max_length

    def pair_tokenizer(self, processing_kwargs: Mapping[str, Any] | None = None) -> PairTokenizer | ChatTokenizer:
        """The tokenizer of pairs, with other settings where there are any: {"text": {…}}, as `predict` explains."""
        if not processing_kwargs:
            return self._tokenizer
        unknown = set(processing_kwargs) - {"text"}
        if unknown:
            raise ConfigError(f"processing_kwargs has {sorted(unknown)[0]!r}: only 'text' can be set for a call")
        source, settings = self._source, processing_kwargs["text"]
        max_length = settings.get("max_length", self.max_length)
        return wrap_tokenizer(source.tokenizer, self.config, source.layout, max_length, text_settings=settings)

    @property
    def head_is_new(self) -> bool:
        """Whether the head is still random: true of a backbone that became a cross-encoder and was not trained yet."""
        first = self[0]
        assert isinstance(first, Transformer)
        return first.head_is_new

    @property
    def base_lacks_head(self) -> bool:
        """Whether only an adapter holds the head that was trained."""
        first = self[0]
        assert isinstance(first, Transformer)
        return first.base_lacks_head

    @property
    def base_location(self) -> tuple[str, str | None] | None:
        """Where the transformers model came from, and its revision on the hub; None once its own weights changed."""
        return self._source.location

    def mark_merged(self) -> None:
        """Say that the adapters became part of the model's own weights: called by whoever merged them."""
        first = self[0]
        assert isinstance(first, Transformer)
        first.base_lacks_head = False
        self._source = replace(self._source, location=None)

    def forget_origin(self) -> None:
        """Say that the weights are of no checkpoint: neither its card nor what was measured with it is theirs."""
        self._source = replace(self._source, location=None, readme=None)
        card = self.model_card_data
        self.model_card_data = CrossEncoderModelCardData(base_model=card.base_model, base_revision=card.base_revision)

    @property
    def readme(self) -> str | None:
        """The model card that the checkpoint came with, where it was a local folder with one."""
        return self._source.readme

    @property
    def processing_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """How the checkpoint wants texts and chat templates to be processed, where it says so."""
        layout = self._source.layout
        text = dict(layout.text_settings)
        if "max_length" in text:
            text["max_length"] = self.max_length
        settings = {"text": text, "chat_template": layout.template_settings}
        return {name: dict(values) for name, values in settings.items() if values}

    @property
    def num_labels(self) -> int:
        return num_labels_of(list(self))

    def checkpoint_activation(self) -> nn.Module:
        """What the checkpoint's scores go through; what suits the number of labels where it names what is not known."""
        try:
            return resolve_activation(self._source.layout, self.num_labels)
        except CheckpointError:
            logger.warning(
                "Activation function path %r is not trusted, using default activation function instead. "
                "Pass activation_fn to have another one",
                self._source.layout.activation,
            )
            return make_activation(default_kind(self.num_labels))

    @property
    def activation_fn(self) -> Activation:
        return self._activation

    @activation_fn.setter
    def activation_fn(self, value: Activation) -> None:
        check_activation(value)
        self.__dict__["_activation"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an activation that is a Module out of nn.Module's registry: it is no part of the network."""
        if name == "activation_fn":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that is used unless a call names another."""
        return self._default_prompt_name

    @default_prompt_name.setter
    def default_prompt_name(self, name: str | None) -> None:
        if name is not None:
            _named_prompt(self.prompts, name)
        self._default_prompt_name = name

    def forward(self, features: Features) -> Features:
        """`features` with more in it, logits [B, L] under "scores"; raw, before the activation."""
        if self._source.network is not None:
            return {**features, **self._source.network(features)}
        for part in self:
            features = part(features)
        return features

    def logits(self, pairs: Sequence[Pair], prompt: str | None = None) -> Tensor:
        """Raw scores [P, L] of pairs in one batch, with gradients where they are enabled: what training needs."""
        scores: Tensor = self(self.preprocess(pairs, prompt))["scores"]
        return scores

    def preprocess(self, inputs: Sequence[Pair], prompt: str | None = None, task: str | None = None) -> Features:
        """Pairs as model inputs: a dict of int64 tensors [P, W] on the model's device.

        `prompt` comes before the queries, the default prompt where it is None. `task` would name one of several routes
        through a model; there is one here, so it changes nothing.
        """
        queries, documents = split_pairs(inputs)
        pairs = self._tokenizer.encode(queries, documents, self._prompt(prompt, None))
        return self.batch_inputs(pairs, np.arange(len(pairs)))

    def batch_inputs(self, pairs: TokenizedPairs, batch: NDArray[np.int64]) -> Features:
        """The tokenised pairs at `batch` as model inputs: a dict of int64 tensors [B, W] on the model's device."""
        return self._engine().batch_inputs(pairs, batch)

    def is_singular_input(self, inputs: object) -> bool:
        """Whether `predict` takes `inputs` for one pair or text, and gives one score, rather than several."""
        return isinstance(inputs, str) or is_one_pair(inputs)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, uncut and without special ones."""
        return self._tokenizer.count_tokens(texts)

    # --- scores

    @accepts_old_arguments(_OLD_PREDICT_NAMES, batch_size_at=2)
    def predict(  # noqa: PLR0913
        self,
        inputs: str | Pair | Iterable[Pair] | NDArray[Any],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | list[str | torch.device] | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        *,
        processing_kwargs: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Score (query, document) pairs, in the order given; or a text alone, or some among pairs.

        Returns float32 [n], or [n, L] for L > 1 labels; without the first dimension for a single pair. It is
        a numpy array, or a tensor on the model's device with `convert_to_tensor`, or a list of n tensors when
        both flags are off. `apply_softmax` normalises over the labels, where there are several. `batch_size`
        caps the pairs of a batch beside the token budget. `prompt`, or the one named `prompt_name`, goes before
        every query. `device` moves the model there first; several devices are used together, as those of a `pool`
        are (see `start_multi_process_pool`), in chunks of `chunk_size` pairs. `processing_kwargs` may set this call's
        {"text": {"max_length": tokens, "truncation": "longest_first", "only_first" or "only_second"}}.
        Raises InputError naming the first input that is not a pair of texts, CheckpointError while the head is new.
        """
        settings = ScoreSettings(
            self._prompt(prompt, prompt_name),
            activation_fn,
            batch_size,
            bool(show_progress_bar),
            processing_kwargs or {},
        )
        is_single = self.is_singular_input(inputs)
        if isinstance(inputs, str):
            scores = torch.from_numpy(score_text(self, inputs, settings))
        else:
            scores = torch.from_numpy(score_inputs(self, inputs, settings, device, pool, chunk_size))
        if apply_softmax and scores.ndim > 1:
            scores = torch.softmax(scores, dim=1)
        if convert_to_tensor:
            on_device = scores.to(self.device)
            return on_device[0] if is_single else on_device
        if convert_to_numpy:
            array: NDArray[np.float32] = scores.numpy()
            return array[0] if is_single else array
        tensors = list(scores.to(self.device))
        return tensors[0] if is_single else tensors

    @accepts_old_arguments(_OLD_RANK_NAMES, batch_size_at=5)
    def rank(  # noqa: PLR0913
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: str | torch.device | list[str | torch.device] | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Order `documents` for `query`, best first; documents with equal scores keep their order.

        Each result holds `corpus_id` (the position in `documents`), `score`, and `text` with
        `return_documents`. `top_k` keeps the first so many. The other arguments are those of `predict`.
        Raises InputError for a model with several labels, a negative `top_k` or a document that is not a text,
        ScoreError when a score is not finite, CheckpointError while the head is new.
        """
        rankings = self.rank_many(
            [query],
            [documents],
            top_k=top_k,
            return_documents=return_documents,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
        )
        return rankings[0]

    def rank_many(  # noqa: PLR0913
        self,
        queries: Iterable[str],
        documents: Iterable[Iterable[str]],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: str | torch.device | list[str | torch.device] | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """`rank` for many queries at once: the pairs of all of them share batches.

        `documents` holds one list a query. Returns one list of results a query.
        """
        if self.num_labels != 1:
            raise InputError(
                "CrossEncoder.rank() only works for models with num_labels=1. "
                f"Consider using CrossEncoder.predict() with input pairs instead. (This model has {self.num_labels}.)"
            )
        if top_k is not None and top_k < 0:
            raise InputError(f"top_k is {top_k}: give the number of documents to keep, or None to keep all")
        asked, lists = list(queries), [_several(texts) for texts in documents]
        if len(asked) != len(lists):
            raise InputError(f"there are {len(asked)} queries and {len(lists)} lists of documents: give one a query")
        scores = score_pairs(
            self,
            [query for query, texts in zip(asked, lists, strict=True) for _ in texts],
            [text for texts in lists for text in texts],
            ScoreSettings(self._prompt(prompt, prompt_name), activation_fn, batch_size, bool(show_progress_bar)),
            device,
            pool,
            chunk_size,
        )
        starts = np.cumsum([0, *map(len, lists)])
        return [
            ranked(scores[start : start + len(texts)], texts, top_k, return_documents)
            for start, texts in zip(starts, lists, strict=False)
        ]

    def start_multi_process_pool(self, target_devices: list[str | torch.device] | None = None) -> Pool:
        """Start a process for each of `target_devices` (all CUDA devices, or four times the CPU), to score with."""
        return Pool(self, default_devices() if target_devices is None else target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """End the processes of a pool."""
        pool.close()

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text before a query: given, else named, else named by default, else nothing."""
        if prompt is not None:
            return prompt
        name = prompt_name or self.default_prompt_name
        return "" if name is None else _named_prompt(self.prompts, name)

    def set_keep_in_fp32_modules(self, module_names: Sequence[str]) -> None:
        """Let these linear layers, such as "0.model.classifier", compute in float32, and no others.

        The names are saved with the model. Raises ConfigError for what is not a linear layer of the model.
        """
        keep_in_float32(self, module_names)
        self.keep_in_fp32_modules = list(module_names)

    @classmethod
    def merge(
        cls,
        models: "Sequence[CrossEncoder | str | Path]",
        method: str = "linear",
        *,
        parameters: Mapping[str, Any] | None = None,
        **load_settings: Any,
    ) -> "CrossEncoder":
        """A new model with weights between those of `models`, otherwise like the first; see crossenc.merging.

        What is not a model yet is loaded with `load_settings`.
        """
        loaded = [model if isinstance(model, CrossEncoder) else cls(model, **load_settings) for model in models]
        return merge_models(loaded, method, parameters or {})

    def mark_trained(self) -> None:
        """Say that the head is not random any more: called by whoever trained it."""
        first = self[0]
        assert isinstance(first, Transformer)
        first.new_weights = {}
        if not has_adapters(self.model):
            first.base_lacks_head = False
            self._source = replace(self._source, location=None)

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | None = None) -> Any:
        """What `evaluator(model, output_path)` returns."""
        if output_path is not None:
            Path(output_path).mkdir(parents=True, exist_ok=True)
        return evaluator(self, output_path)


def _several(documents: Iterable[str]) -> list[str]:
    if isinstance(documents, str):
        raise InputError(f"the documents of a query are the text {documents[:40]!r}: give a list of texts")
    return list(documents)


def _named_prompt(prompts: Mapping[str, str], name: str) -> str:
    if name not in prompts:
        raise ConfigError(f"there is no prompt {name!r}: the model has {', '.join(sorted(prompts)) or 'none'}")
    return prompts[name]


def _check_supported(trust_remote_code: bool, backend: str) -> None:
    if trust_remote_code:
        raise ConfigError("trust_remote_code is not supported: code that comes with a checkpoint is never run")
    if backend not in ("torch", "onnx"):
        raise ConfigError(f"backend is {backend!r}: choose torch or onnx")


def _dtype_of(
    folder: Path, stated: str | torch.dtype | None, dtype: str | torch.dtype | None, device: torch.device
) -> torch.dtype:
    """The dtype to compute in: the one given, or else that of `model_kwargs`, whose "auto" is the checkpoint's own."""
    if dtype is None and stated == "auto":
        dtype = getattr(load_config(folder), "dtype", None)
    return resolve_dtype(stated if dtype is None else dtype, device)


def _home(backend: str) -> torch.device:
    """Where a model is put unless its user says otherwise."""
    return default_device() if backend == "torch" else torch.device("cpu")
