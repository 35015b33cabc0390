"""Text to token ids and back, and chat templates."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nf_runtime.errors import InvalidRequestError, ModelLoadError


class Tokenizer:
    """The tokenizer of a model directory.

    Safe to use from several threads.

    Attributes:
        backend: The `tokenizers.Tokenizer` underneath.
        eos_token_id: End-of-sequence token, or None.

    Raises:
        ModelLoadError: The directory has no tokenizer, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        # Late, because transformers takes seconds to import.
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory))
            self.backend = self._tokenizer.backend_tokenizer
        except Exception as error:  # the loader raises many kinds, all of which mean "unusable"
            raise ModelLoadError(
                f"{directory} has no usable tokenizer; name another directory with tokenizer. "
                f"The reason: {error}"
            ) from error
        # Some checkpoints ship with truncation or padding switched on, which would change prompts.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be turned into a prompt."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects around it."""
        # Unlike `encode`, which takes seconds for megabytes, this lets other threads run meanwhile.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ids = list(token_ids)
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own; an incomplete character shows as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: With `role` and `content`.
            add_generation_prompt: End where the assistant's answer begins.
            variables: Passed to the template.

        Raises:
            InvalidRequestError: There is no template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template; send the text as a completion", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template can raise anything
            raise InvalidRequestError(
                f"the chat template refuses these messages: {error!s:.500}", param="messages"
            ) from error
        return self.encode(str(text), add_special_tokens=False)
