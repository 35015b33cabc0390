"""What the HTTP side of the server is configured with."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Default limit on a request body, in bytes."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of the HTTP side; the engine has its own `EngineConfig`.

    Attributes:
        model_names: The names the model answers to, at least one. The first is the default, for
            requests without `model`, and is the one in metrics and logs.
        use_generation_config: Take default sampling parameters from the model's
            `generation_config.json`. When False the defaults of the API apply.
        max_body_bytes: A longer request body is refused with HTTP 413.
        ping_seconds: A stream that has been silent for so long gets an SSE comment, so that
            proxies do not close it.
    """

    model_names: tuple[str, ...]
    use_generation_config: bool = True
    max_body_bytes: int = MAX_BODY_BYTES
    ping_seconds: float = 15.0

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("model_names is empty: the model needs at least one name")

    @property
    def model_name(self) -> str:
        """The primary name of the model."""
        return self.model_names[0]
