"""Texts to token ids for language models that are asked about a pair: by the checkpoint's chat template.

A pair becomes a conversation of a "query" and a "document" message, with a prompt before them as the "system"
message. What a pair is cut by comes out of its texts, never out of what the template puts after them: the answer
is read off the last token. Knows no model, device or batch.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import CheckpointError, ConfigError
from crossenc.records import TokenizedPairs
from crossenc.tokenizer import check_texts, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatTokenizer:
    """A language model's tokenizer with its chat template, for pairs of at most `max_length` tokens.

    `prompt` is the system message where a call gives none; `template_settings` go to the template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int,
        prompt: str = "",
        template_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises CheckpointError when nothing can pad."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise CheckpointError("the tokenizer cannot pad: set pad_token in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = int(pad)
        self.padding_side = str(tokenizer.padding_side)
        self.prompt = prompt
        self._template_settings = dict(template_settings or {})
        self._checked_template: object = None

    def encode(self, queries: Sequence[str], documents: Sequence[str], prompt: str | None = None) -> TokenizedPairs:
        """Tokenise pair p = (queries[p], documents[p]) as a conversation; there are no token types.

        Raises InputError for a text that is not a str or holds a lone surrogate, CheckpointError where the template
        leaves a text out, ConfigError where the template alone exceeds `max_length`, ValueError when the arguments
        differ in length.
        """
        if len(queries) != len(documents):
            raise ValueError(f"encode needs pairs, got {len(queries)} queries and {len(documents)} documents")
        check_texts(queries, "query")
        check_texts(documents, "document")
        self.check_template()
        prompt = self.prompt if prompt is None else prompt
        return self._encode([self._render(*pair, prompt) for pair in zip(queries, documents, strict=True)], prompt)

    def encode_text(self, text: str, prompt: str | None = None) -> TokenizedPairs:
        """Tokenise one text without a document, as a message of the user; otherwise as `encode`."""
        check_texts([text], "text")
        prompt = self.prompt if prompt is None else prompt
        return self._encode([self._render_messages([{"role": "user", "content": text}], prompt)], prompt)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, uncut and without special ones."""
        return [len(row) for row in token_ids(self.tokenizer, texts)]

    def _encode(self, conversations: Sequence[str], prompt: str) -> TokenizedPairs:
        rows = token_ids(self.tokenizer, conversations)
        truncated = np.array([len(row) > self.max_length for row in rows], dtype=bool)
        if truncated.any():
            ending = self._ending(prompt)
            if len(ending) >= self.max_length:
                raise ConfigError(
                    f"max_length is {self.max_length}, but the chat template ends in {len(ending)} tokens"
                )
            kept = self.max_length - len(ending)
            rows = [
                np.concatenate([row[:kept], ending]) if cut else row for row, cut in zip(rows, truncated, strict=True)
            ]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return TokenizedPairs(np.concatenate([np.empty(0, np.int32), *rows]), offsets, None, truncated)

    def _render(self, query: str, document: str, prompt: str) -> str:
        return self._render_messages(
            [{"role": "query", "content": query}, {"role": "document", "content": document}], prompt
        )

    def _render_messages(self, messages: list[dict[str, str]], prompt: str) -> str:
        messages = [*([{"role": "system", "content": prompt}] if prompt else []), *messages]
        rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **self._template_settings)
        return rendered

    def _ending(self, prompt: str) -> NDArray[np.int32]:
        """The tokens that the template puts after the texts: those that two different pairs end in alike."""
        first, second = token_ids(
            self.tokenizer, [self._render("0", "0", prompt), self._render("1 2 3 4", "1 2 3 4", prompt)]
        )
        width = min(len(first), len(second))
        differs = np.flatnonzero(first[::-1][:width] != second[::-1][:width])
        return first[len(first) - int(differs[0]) :] if len(differs) else first[:0]

    def check_template(self) -> None:
        """Raise CheckpointError where the template leaves the query or the document of a pair out."""
        if self._checked_template == self.tokenizer.chat_template:
            return
        remedy = "give the tokenizer a chat_template that puts the content of both roles into the text"
        try:
            same, other_query, other_document = (
                self._render(*pair, self.prompt) for pair in (("a", "b"), ("c", "b"), ("a", "c"))
            )
        except Exception as error:  # a template can raise anything
            raise CheckpointError(
                f"the chat template cannot carry a 'query'/'document' pair, it fails with {error}: {remedy}"
            ) from error
        for role, rendered in (("query", other_query), ("document", other_document)):
            if rendered == same:
                raise CheckpointError(
                    f"the chat template cannot carry a 'query'/'document' pair, it leaves the {role} out: {remedy}"
                )
        self._checked_template = self.tokenizer.chat_template
