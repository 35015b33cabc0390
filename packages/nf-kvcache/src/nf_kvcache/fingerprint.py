"""What KV has to agree in before one process may read what another one wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The model, and the form in which its KV is kept.

    Attributes:
        weights: digest of the weights.
        dtype: of the KV, such as "bfloat16".
        page_size: token slots in a page.
        num_layers: attention layers on this rank.
        num_kv_heads: heads of K, and of V, on this rank.
        head_dim: numbers per head.
        rope: digest or description of the rotary embedding that K has been through.
        numerics: what else decides the last bits of the KV, such as the kernels that computed it.
        parallelism: how the model is divided, such as "tp1".
        layout: axes of a page, outermost first.

    Raises:
        ValueError: a size is below 1, or a text is empty.
    """

    weights: str
    dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str
    numerics: str = "any"
    parallelism: str = "tp1"
    layout: str = "layer,kv,head,token,dim"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                if not isinstance(value, int) or value < 1:
                    raise ValueError(
                        f"{field.name} is {value!r}; expected a whole number of at least 1."
                    )
            elif not isinstance(value, str) or not value:
                raise ValueError(f"{field.name} is {value!r}; expected a text that is not empty.")

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the JSON of `to_dict`, keys sorted, without spaces."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, str | int]:
        """All attributes, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, str | int]) -> Fingerprint:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an attribute is missing, unknown, or has a wrong value.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"A fingerprint lacks, or does not know: {wrong}.")
        return cls(**values)  # type: ignore[arg-type]
