"""Which checkpoint tensors make the weights that operations use."""

from dataclasses import dataclass

from nf_runtime.model_config import ModelConfig
from nf_runtime.models.family import ExpertNames, Family


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of a layer (or of the model) and the checkpoint tensors it is made of.

    Attributes:
        name: As operations call it.
        shape: Of the whole weight.
        sources: Checkpoint names, put one after the other along the rows; `{layer}` is the number
            of the layer.
        rows: Rows of each source; equal parts when empty.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: tuple[int, ...] = ()


def model_weights(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Weights outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    specs = [
        WeightSpec("embedding", table, ("model.embed_tokens.weight",)),
        WeightSpec("final_norm", (config.hidden_size,), ("model.norm.weight",)),
    ]
    if not config.tied_embeddings:
        specs.append(WeightSpec("head", table, ("lm_head.weight",)))
    return tuple(specs)


def layer_weights(config: ModelConfig, family: Family, layer: int) -> tuple[WeightSpec, ...]:
    """Weights of one layer, by the names that its operations use."""
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = tuple(f"{attention}{x}_proj" for x in "qkv")
    kv_size = config.num_kv_heads * config.head_dim
    qkv_rows = (config.q_size, kv_size, kv_size)
    specs = [
        WeightSpec("input_norm", (hidden,), (prefix + "input_layernorm.weight",)),
        WeightSpec("qkv", (config.qkv_size, hidden), tuple(f"{x}.weight" for x in qkv), qkv_rows),
        WeightSpec("output", (hidden, config.q_size), (attention + "o_proj.weight",)),
        WeightSpec("post_attention_norm", (hidden,), (prefix + "post_attention_layernorm.weight",)),
    ]
    if config.qkv_bias:
        sources = tuple(f"{x}.bias" for x in qkv)
        specs.append(WeightSpec("qkv_bias", (config.qkv_size,), sources, qkv_rows))
    if config.output_bias:
        specs.append(WeightSpec("output_bias", (hidden,), (attention + "o_proj.bias",)))
    if config.qk_norm:
        specs += [
            WeightSpec(f"{x}_norm", (config.head_dim,), (f"{attention}{x}_norm.weight",))
            for x in "qk"
        ]
    if layer in config.sparse_layers and family.expert_names:
        return (*specs, *_expert_weights(config, family.expert_names, layer))
    gate_up = (mlp + "gate_proj", mlp + "up_proj")
    specs += [
        WeightSpec("gate_up", (2 * inner, hidden), tuple(f"{x}.weight" for x in gate_up)),
        WeightSpec("down", (hidden, inner), (mlp + "down_proj.weight",)),
    ]
    if config.mlp_bias:
        specs += [
            WeightSpec("gate_up_bias", (2 * inner,), tuple(f"{x}.bias" for x in gate_up)),
            WeightSpec("down_bias", (hidden,), (mlp + "down_proj.bias",)),
        ]
    return tuple(specs)


def _expert_weights(config: ModelConfig, names: ExpertNames, layer: int) -> tuple[WeightSpec, ...]:
    count, hidden, inner = config.experts, config.hidden_size, config.expert_intermediate_size
    gate_up = [
        name.format(layer=layer, expert=expert)
        for expert in range(count)
        for name in (names.gate, names.up)
    ]
    down = [names.down.format(layer=layer, expert=expert) for expert in range(count)]
    return (
        WeightSpec("router", (count, hidden), (names.router.format(layer=layer),)),
        WeightSpec("experts_gate_up", (count, 2 * inner, hidden), tuple(gate_up)),
        WeightSpec("experts_down", (count, hidden, inner), tuple(down)),
    )
