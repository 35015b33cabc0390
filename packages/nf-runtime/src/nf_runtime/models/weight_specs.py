"""Which checkpoint tensors make the weights that operations use."""

from dataclasses import dataclass

from nf_runtime.model_config import ModelConfig
from nf_runtime.models.family import ExpertNames, Family
from nf_runtime.parallelism import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class Source:
    """The part of a checkpoint tensor that goes into a weight.

    Attributes:
        name: Of the tensor in the checkpoint.
        shape: Of the whole tensor.
        rows: Its rows that are taken.
        columns: Its columns; None takes all, and is the only choice for a vector.
    """

    name: str
    shape: tuple[int, ...]
    rows: range
    columns: range | None = None


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of a layer (or of the model) and the checkpoint tensors it is made of.

    Attributes:
        name: As operations call it.
        shape: Of the weight, as this rank has it.
        sources: What fills it, one after the other along the rows (of all experts). Rows behind
            them are zero.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def model_weights(config: ModelConfig, shard: Shard = WHOLE) -> tuple[WeightSpec, ...]:
    """Weights outside the layers. Several ranks have a head of their own, tied or not."""
    table = (config.vocab_size, config.hidden_size)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    specs = [
        _spec("embedding", _whole(embedding, table)),
        _spec("final_norm", _whole("model.norm.weight", table[1:])),
    ]
    if not config.tied_embeddings or shard.size > 1:
        name = embedding if config.tied_embeddings else head
        rows = Source(name, table, shard.vocabulary(config))
        shape = (shard.vocabulary_size(config), config.hidden_size)
        specs.append(WeightSpec("head", shape, (rows,)))
    return tuple(specs)


def layer_weights(
    config: ModelConfig, family: Family, layer: int, shard: Shard = WHOLE
) -> tuple[WeightSpec, ...]:
    """Weights of one layer, by the names that its operations use."""
    prefix = f"model.layers.{layer}."
    hidden = (config.hidden_size,)
    norms = ("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")
    specs = [_spec(name, _whole(f"{prefix}{source}.weight", hidden)) for name, source in norms]
    specs += _attention(config, prefix + "self_attn.", shard)
    if layer in config.sparse_layers and family.expert_names:
        specs += _experts(config, family.expert_names, layer, shard)
    else:
        specs += _feed_forward(config, prefix + "mlp.", shard)
    return tuple(specs)


def _attention(config: ModelConfig, prefix: str, shard: Shard) -> list[WeightSpec]:
    hidden, size = config.hidden_size, config.head_dim
    parts = {"q": (config.num_heads, shard.heads(config))}
    parts |= dict.fromkeys("kv", (config.num_kv_heads, shard.kv_heads(config)))
    qkv = [
        (f"{prefix}{name}_proj", count * size, _scaled(heads, size))
        for name, (count, heads) in parts.items()
    ]
    specs = [_spec("qkv", *(Source(f"{n}.weight", (c, hidden), rows) for n, c, rows in qkv))]
    if config.qkv_bias:
        specs.append(_spec("qkv_bias", *(Source(f"{n}.bias", (c,), rows) for n, c, rows in qkv)))
    shape = (hidden, config.q_size)
    if shard.output == "all_gather" and shard.size > 1:
        rows = shard.output_columns(config)
        specs.append(_spec("output", Source(prefix + "o_proj.weight", shape, rows)))
        if config.output_bias:
            specs.append(_spec("output_bias", Source(prefix + "o_proj.bias", (hidden,), rows)))
    else:
        columns = _scaled(shard.heads(config), size)
        specs.append(
            _spec("output", Source(prefix + "o_proj.weight", shape, range(hidden), columns))
        )
        if config.output_bias:
            specs.append(_bias_of_sum("output_bias", prefix + "o_proj.bias", hidden, shard))
    if config.qk_norm:
        specs += [_spec(f"{x}_norm", _whole(f"{prefix}{x}_norm.weight", (size,))) for x in "qk"]
    return specs


def _feed_forward(config: ModelConfig, prefix: str, shard: Shard) -> list[WeightSpec]:
    hidden, count, inner = config.hidden_size, config.intermediate_size, shard.inner(config)
    names = [prefix + "gate_proj", prefix + "up_proj"]
    down = Source(prefix + "down_proj.weight", (hidden, count), range(hidden), inner)
    specs = [
        _spec("gate_up", *(Source(f"{n}.weight", (count, hidden), inner) for n in names)),
        _spec("down", down),
    ]
    if config.mlp_bias:
        specs += [
            _spec("gate_up_bias", *(Source(f"{n}.bias", (count,), inner) for n in names)),
            _bias_of_sum("down_bias", prefix + "down_proj.bias", hidden, shard),
        ]
    return specs


def _experts(
    config: ModelConfig, names: ExpertNames, layer: int, shard: Shard
) -> list[WeightSpec]:
    hidden, count = config.hidden_size, config.expert_intermediate_size
    experts, inner = shard.experts(config), shard.expert_inner(config)
    gate_up = [
        Source(name.format(layer=layer, expert=expert), (count, hidden), inner)
        for expert in experts
        for name in (names.gate, names.up)
    ]
    down = [
        Source(names.down.format(layer=layer, expert=e), (hidden, count), range(hidden), inner)
        for e in experts
    ]
    router = _whole(names.router.format(layer=layer), (config.experts, hidden))
    return [
        _spec("router", router),
        WeightSpec("experts_gate_up", (len(experts), 2 * len(inner), hidden), tuple(gate_up)),
        WeightSpec("experts_down", (len(experts), hidden, len(inner)), tuple(down)),
    ]


def _whole(name: str, shape: tuple[int, ...]) -> Source:
    return Source(name, shape, range(shape[0]))


def _spec(name: str, *sources: Source) -> WeightSpec:
    """A weight that its sources fill."""
    columns = sources[0].columns
    width = sources[0].shape[1:] if columns is None else (len(columns),)
    return WeightSpec(name, (sum(len(source.rows) for source in sources), *width), sources)


def _bias_of_sum(name: str, source: str, size: int, shard: Shard) -> WeightSpec:
    """The bias of a product of which each rank has a part of the sum: one of them adds it."""
    return WeightSpec(name, (size,), (_whole(source, (size,)),) if shard.rank == 0 else ())


def _scaled(heads: range, head_dim: int) -> range:
    """The elements of some heads."""
    return range(heads.start * head_dim, heads.stop * head_dim)
