"""The offline API: a model in this process, prompts in, answers out."""

import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

from tqdm import tqdm

from nf_runtime.choice import Choice, ChoiceDelta, describe_logprobs
from nf_runtime.config import EngineConfig
from nf_runtime.engine import Engine
from nf_runtime.engine_types import RequestOptions, TokenOutput
from nf_runtime.errors import InvalidRequestError, NanoFlowError
from nf_runtime.fan_out import fan_out
from nf_runtime.interrupts import interrupts_held_back
from nf_runtime.model_source import find_model
from nf_runtime.outputs import CompletionOutput, RequestOutput
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.tokenizer import Tokenizer
from nf_runtime.validation import validate_request

Prompt = str | Mapping[str, Any]
"""A text, or `{"prompt_token_ids": [...]}`, or `{"prompt": text}`.

The mappings may have the fields of `RequestOptions`, such as a `cache_salt`: prompts share KV only
with prompts of the same salt.
"""

_OPTIONS = tuple(field.name for field in fields(RequestOptions))

Message = Mapping[str, Any]
"""A chat message with `role` and `content`."""


class LLM:
    """A model to generate with, by vLLM's names. Not thread-safe.

    Args:
        model: Directory in the Hugging Face layout, or a hub id.
        skip_tokenizer_init: Take and give token ids only.
        options: Fields of `EngineConfig`, such as `dtype`, `device`, `max_model_len`,
            `load_format`, `seed`.

    Raises:
        ModelLoadError: The model cannot be loaded.
        TypeError: An option that `EngineConfig` does not have.
    """

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, **options: Any) -> None:
        config = EngineConfig(model=str(model), **options)
        self.tokenizer = (
            None if skip_tokenizer_init else Tokenizer(find_model(config.tokenizer or config.model))
        )
        self._engine: Engine | None = Engine(config)
        # At the latest when the program ends: KV that was computed is brought to where it is kept.
        self._close_engine = weakref.finalize(self, self._engine.close)
        self._seed = config.seed
        self._numbers = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine underneath.

        Raises:
            NanoFlowError: After `shutdown`.
        """
        if self._engine is None:
            raise NanoFlowError("this LLM was shut down; make a new one")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, all of them in one continuous batch.

        Args:
            prompts: One or more.
            sampling_params: For all prompts, or one each.
            use_tqdm: Show progress on a terminal.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequestError: A prompt or parameter that the model cannot run; nothing was run.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequestError(
                f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts; "
                f"expected one for all, or one each",
                param="sampling_params",
            )
        work = [
            self._prepare(prompt, params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        return self._run(work, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several.

        Raises:
            InvalidRequestError: As `generate`; or the model has no chat template.
        """
        if self.tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer; drop skip_tokenizer_init")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def shutdown(self) -> None:
        """Keep what KV is to be kept, and free the model. Calling it twice does no harm."""
        self._close_engine()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> "_Work":
        given: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise InvalidRequestError(
                    f"a prompt is {prompt!r:.200}; expected a string or prompt_token_ids",
                    param="prompt",
                )
            if self.tokenizer is None:
                raise InvalidRequestError(
                    "a prompt is text, but there is no tokenizer; give prompt_token_ids",
                    param="prompt",
                )
            ids = self.tokenizer.encode(text)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError(
                "stop needs a tokenizer; use stop_token_ids, or drop skip_tokenizer_init",
                param="stop",
            )
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise InvalidRequestError(
                f"prompt_token_ids is {ids!r:.200}; expected a list of integers", param="prompt"
            ) from error
        validate_request(ids, params, self.engine.info)
        options = RequestOptions(**{n: given[n] for n in _OPTIONS if n in given})
        return _Work(str(next(self._numbers)), text, ids, options, params, self.tokenizer)

    def _run(self, work: list["_Work"], use_tqdm: bool) -> list[RequestOutput]:
        engine = self.engine
        waiting: dict[str, tuple[_Work, Choice]] = {}
        total = sum(item.params.n for item in work)
        with (
            interrupts_held_back() as raise_interrupt,
            tqdm(total=total, disable=None if use_tqdm else True, unit="answer") as bar,
        ):
            try:
                for item in work:
                    requests = fan_out(
                        item.output.request_id,
                        item.output.prompt_token_ids,
                        item.params,
                        item.options,
                        engine_seed=self._seed,
                        number=item.number,
                    )
                    for choice, request in zip(item.choices, requests, strict=True):
                        waiting[request.request_id] = (item, choice)
                        engine.add(request)
                while engine.has_work:
                    raise_interrupt()
                    for output in engine.step():
                        item, choice = waiting[output.request_id]
                        if self._take(item, choice, output):
                            bar.update()
            finally:
                # An interrupted call must leave nothing behind for the next one.
                for name in waiting:
                    engine.abort(name)
                while engine.has_work:
                    engine.step()
        return [item.output for item in work]

    def _take(self, item: "_Work", choice: Choice, output: TokenOutput) -> bool:
        """Add an engine output to its answer; true when that ended the answer."""
        if output.prompt_logprobs is not None:
            item.output.prompt_logprobs = [
                None,
                *(describe_logprobs(row, self.tokenizer) for row in output.prompt_logprobs),
            ]
        delta = choice.accept(output)
        item.output.outputs[choice.index].ledger = choice.ledger
        if delta is None:
            return False
        item.add(delta)
        if choice.finished and output.finish_reason is None:
            self.engine.abort(output.request_id)
        return choice.finished


class _Work:
    """A prompt, its answers in the making, and the output they end up in."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        options: RequestOptions,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.number = int(request_id)
        self.options = options
        self.params = params
        self.choices = [Choice(i, prompt_token_ids, params, tokenizer) for i in range(params.n)]
        self.output = RequestOutput(
            request_id, prompt, prompt_token_ids, [CompletionOutput(i) for i in range(params.n)]
        )

    def add(self, delta: ChoiceDelta) -> None:
        answer = self.output.outputs[delta.index]
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + delta.logprobs
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + sum(
                next(iter(row.values())).logprob for row in delta.logprobs
            )
