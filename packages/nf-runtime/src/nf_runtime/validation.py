"""What can be said about a request before an engine sees it."""

from nf_runtime.engine_types import EngineInfo
from nf_runtime.errors import ContextLengthExceededError, InvalidRequestError
from nf_runtime.sampling_params import SamplingParams


def validate_request(prompt_token_ids: list[int], params: SamplingParams, info: EngineInfo) -> None:
    """Check a request against the model.

    Raises:
        ContextLengthExceededError: The prompt leaves no room for one token.
        InvalidRequestError: An empty prompt, or a token id that the model does not have.
    """
    if not prompt_token_ids:
        raise InvalidRequestError(
            "the prompt is empty; expected at least one token", param="prompt"
        )
    room = min(info.max_model_len, info.num_pages * info.page_size)
    if len(prompt_token_ids) >= room:
        raise ContextLengthExceededError(len(prompt_token_ids), room)
    for name, ids in (
        ("prompt", prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("logit_bias", params.logit_bias or ()),
    ):
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < info.vocab_size:
                raise InvalidRequestError(
                    f"{name} has token id {token!r}; expected 0 to {info.vocab_size - 1}",
                    param=name,
                )
