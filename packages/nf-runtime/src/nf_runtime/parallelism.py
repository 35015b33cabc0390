"""Which part of a model a rank has: heads, columns, experts and rows of the vocabulary. Torch-free.

Under tensor parallelism every rank has a part of each weight and of the KV cache, and all ranks
work on the same batch (Shoeybi et al., arXiv 1909.08053). The residual stream, the norms, the
embedding and the router are whole on every rank.
"""

from dataclasses import dataclass, replace

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import ModelConfig

OUTPUTS = ("all_reduce", "all_gather")
"""How the attention output becomes whole: parts of each sum are added up, or heads are gathered
before a product of which each rank has some columns, which are gathered in turn."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one rank has.

    All ranges are empty or ascending, have a step of 1, and together with those of the other ranks
    cover everything once; but for KV heads, which several ranks share where there are fewer.

    Attributes:
        rank: Number of the rank, from 0 to size - 1.
        size: Number of ranks.
        expert_parallel: A rank has some experts whole, instead of a part of each.
        output: One of `OUTPUTS`.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: bool = False
    output: str = OUTPUTS[0]

    def check(self, model: ModelConfig) -> None:
        """Refuse a model that cannot be divided so.

        Raises:
            ModelLoadError: A size is not divisible; the message says which, and what would do.
        """
        size = self.size
        if size == 1:
            return
        divided = {"attention heads": model.num_heads}
        if self.output == "all_gather":
            divided["elements of the hidden state"] = model.hidden_size
        if len(model.sparse_layers) < model.num_layers:
            divided["columns of the feed-forward"] = model.intermediate_size
        if model.sparse_layers and self.expert_parallel:
            divided["experts"] = model.experts
        elif model.sparse_layers:
            divided["columns of an expert"] = model.expert_intermediate_size
        for name, count in divided.items():
            if count % size:
                raise ModelLoadError(
                    f"tensor_parallel_size is {size}; it must divide the model's {count} {name}: "
                    f"{self._proposal(model)}"
                )
        if model.num_kv_heads % size and size % model.num_kv_heads:
            raise ModelLoadError(
                f"tensor_parallel_size is {size}; it must divide the model's {model.num_kv_heads} "
                f"KV heads or be a multiple of them: {self._proposal(model)}"
            )
        if self.expert_parallel and not model.sparse_layers:
            raise ModelLoadError(
                f"expert_parallel is set, and {model.architecture} has no experts; leave it out"
            )

    def _proposal(self, model: ModelConfig) -> str:
        """The largest number of ranks below this one that would do."""
        for size in range(self.size - 1, 1, -1):
            try:
                replace(self, rank=0, size=size).check(model)
            except ModelLoadError:
                continue
            return f"set it to {size}, or to 1"
        return "set it to 1"

    def local(self, model: ModelConfig) -> ModelConfig:
        """The model with the sizes that this rank computes with; the router keeps all experts.

        Raises:
            ModelLoadError: As `check`.
        """
        self.check(model)
        return replace(
            model,
            num_heads=len(self.heads(model)),
            num_kv_heads=len(self.kv_heads(model)),
            intermediate_size=len(self.inner(model)),
            expert_intermediate_size=len(self.expert_inner(model)),
        )

    def heads(self, model: ModelConfig) -> range:
        """Query heads."""
        return self._part(model.num_heads)

    def kv_heads(self, model: ModelConfig) -> range:
        """KV heads, those that the query heads look at."""
        if self.size <= model.num_kv_heads:
            return self._part(model.num_kv_heads)
        head = self.rank * model.num_kv_heads // self.size
        return range(head, head + 1)

    def inner(self, model: ModelConfig) -> range:
        """Columns of a dense feed-forward."""
        return self._part(model.intermediate_size)

    def experts(self, model: ModelConfig) -> range:
        """Experts, of which it has `expert_inner`."""
        return self._part(model.experts) if self.expert_parallel else range(model.experts)

    def expert_inner(self, model: ModelConfig) -> range:
        """Columns of each of its experts."""
        whole = range(model.expert_intermediate_size)
        return whole if self.expert_parallel else self._part(len(whole))

    def output_columns(self, model: ModelConfig) -> range:
        """Columns of the attention output that it computes when these are gathered."""
        return self._part(model.hidden_size)

    def vocabulary(self, model: ModelConfig) -> range:
        """Rows of the head. The last ranks may have fewer than `vocabulary_size`, or none."""
        first = self.rank * self.vocabulary_size(model)
        last = min(model.vocab_size, first + self.vocabulary_size(model))
        return range(min(first, last), last)

    def vocabulary_size(self, model: ModelConfig) -> int:
        """Logits that every rank computes: its part of a vocabulary filled up to a multiple."""
        return -(-model.vocab_size // self.size)

    def _part(self, count: int) -> range:
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


WHOLE = Shard()
"""A rank alone has everything."""
