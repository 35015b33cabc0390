"""What can go wrong, as a user sees it. Every message names the value and says what to do."""


class NanoFlowError(Exception):
    """Base of every error that NanoFlow raises on purpose."""


class InvalidRequestError(NanoFlowError, ValueError):
    """A request that cannot be run as it is.

    Attributes:
        param: The parameter at fault, or None.
        code: Machine-readable reason, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthExceededError(InvalidRequestError):
    """The prompt does not leave room for one token in the model's context."""

    def __init__(self, prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{prompt_tokens} tokens and at least one must be left for the answer. "
            f"Shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )


class OverloadedError(NanoFlowError):
    """There are too many requests already; later there may be room."""


class ModelLoadError(NanoFlowError):
    """A model, tokenizer or configuration that cannot be loaded."""


class EngineDeadError(NanoFlowError):
    """The engine process has ended; no request can be answered any more."""
