"""The parts of a model that ranks have: together everything, once; read from slices alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_kernels.cost import Category
from nf_runtime import EngineConfig, NanoFlowError
from nf_runtime.checkpoint import Checkpoint
from nf_runtime.dataflow import flows, steps
from nf_runtime.device import DeviceMemory
from nf_runtime.errors import ModelLoadError
from nf_runtime.memory_plan import plan_memory, weight_bytes
from nf_runtime.model_config import ConfigReader, ModelConfig
from nf_runtime.models import FAMILIES, decoder_graph, find_family, layer_weights, model_weights
from nf_runtime.models import read_config as read_model_config
from nf_runtime.parallelism import OUTPUTS, Shard
from nf_runtime.weights import ModelWeights, load_weights, make_weights

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")


def model(architecture: str = "LlamaForCausalLM", **values: Any) -> ModelConfig:
    defaults = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    reader = ConfigReader(defaults | values, Path("config.json"))
    return FAMILIES[architecture].read_config(reader, {})


def ranks(size: int, **options: Any) -> list[Shard]:
    return [Shard(rank, size, **options) for rank in range(size)]


# Shards


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3000), st.data())
def test_ranks_have_everything_once(
    size: int, heads_each: int, inner_each: int, vocab: int, data: st.DataObject
) -> None:
    heads = size * heads_each
    kv_heads = data.draw(
        st.sampled_from(
            [g for g in range(1, heads + 1) if not heads % g and (not g % size or not size % g)]
        )
    )
    config = replace(
        model("MixtralForCausalLM"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=size * inner_each,
        expert_intermediate_size=size * inner_each,
        experts=2 * size,
        vocab_size=vocab,
        hidden_size=size * 8,
    )
    for expert_parallel in (False, True):
        shards = ranks(size, expert_parallel=expert_parallel, output="all_gather")
        for whole, parts in (
            (heads, [s.heads(config) for s in shards]),
            (vocab, [s.vocabulary(config) for s in shards]),
            (size * inner_each, [s.inner(config) for s in shards]),
            (size * 8, [s.output_columns(config) for s in shards]),
        ):
            assert [i for part in parts for i in part] == list(range(whole))
        experts = [
            (e, i) for s in shards for e in s.experts(config) for i in s.expert_inner(config)
        ]
        assert len(experts) == 2 * size * size * inner_each == len(set(experts))
        group = heads // kv_heads
        for shard in shards:
            # The heads of a rank look at its own KV heads, in the same proportion as in the whole.
            own = shard.kv_heads(config)
            assert {head // group for head in shard.heads(config)} == set(own)
            assert len(shard.heads(config)) % len(own) == 0
            assert len(shard.vocabulary(config)) <= shard.vocabulary_size(config)
        assert shards[0].vocabulary_size(config) * size < vocab + size


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"size": 3}, {}, "divide the model's 8 attention heads: set it to 2, or to 1"),
        (
            {"size": 6},
            {"num_attention_heads": 12, "hidden_size": 96},
            "divide the model's 4 KV heads or be a multiple of them: set it to 4, or to 1",
        ),
        ({"size": 4}, {"intermediate_size": 98}, "divide the model's 98 columns of the feed-f"),
        (
            {"size": 8, "expert_parallel": True},
            {"architecture": "MixtralForCausalLM"},
            "divide the model's 4 experts: set it to 4, or to 1",
        ),
        (
            {"size": 4},
            {"architecture": "MixtralForCausalLM", "intermediate_size": 50},
            "divide the model's 50 columns of an expert: set it to 2, or to 1",
        ),
        ({"size": 2, "expert_parallel": True}, {}, "LlamaForCausalLM has no experts; leave it"),
        (
            {"size": 4, "output": "all_gather"},
            {"hidden_size": 66, "head_dim": 8},
            "divide the model's 66 elements of the hidden state: set it to 2, or to 1",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    options: dict[str, Any], values: dict[str, Any], expected: str
) -> None:
    shard = Shard(**options)
    config = model(**values)
    with pytest.raises(ModelLoadError, match=expected) as error:
        decoder_graph(config, shard)
    if not shard.expert_parallel or config.experts:
        assert str(error.value).startswith(f"tensor_parallel_size is {shard.size}; it must")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; expected a positive integer"),
        ({"tensor_parallel_output": "x"}, "'x'; expected one of all_reduce, all_gather"),
        ({"expert_parallel": True}, "tensor_parallel_size is 1, which has all experts on one"),
        (
            {"tensor_parallel_size": 2, "kv_host_bytes": 1 << 20},
            "tensor_parallel_size is 2 and kv_host_bytes is set, but KV of several ranks is kept",
        ),
        ({"tensor_parallel_size": 2, "kv_ssd_dir": "x"}, "is 2 and kv_ssd_dir is set"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "'cuda:1', which is one GPU"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(NanoFlowError, match=expected):
        EngineConfig(model="m", **options)


# Weights


def joined(parts: list[ModelWeights], name: str, dim: int) -> torch.Tensor:
    return torch.cat([weights.layers[1][name] for weights in parts], dim)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("family", ["llama-biased", "qwen2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("source", ["checkpoint", "dummy"])
def test_the_parts_of_all_ranks_are_the_weights(
    family: str, output: str, source: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    path = tiny_checkpoint(family, vocab_size=201)
    config = read_model_config(path)
    kind = find_family(config.architecture)

    def load(shard: Shard) -> ModelWeights:
        if source == "dummy":
            options = {"dtype": torch.float32, "device": CPU, "seed": 3, "shard": shard}
            return make_weights(config, kind, **options)
        files = Checkpoint(path)
        return load_weights(config, kind, files, dtype=torch.float32, device=CPU, shard=shard)

    whole, parts = load(Shard()), [load(shard) for shard in ranks(2, output=output)]
    layer = whole.layers[1]
    for shard, part in zip(ranks(2, output=output), parts, strict=True):
        assert part.num_bytes == weight_bytes(config, torch.float32, shard)
        assert torch.equal(part.model["embedding"], whole.model["embedding"])
        assert torch.equal(part.layers[1]["input_norm"], layer["input_norm"])
    head = torch.cat([part.model["head"] for part in parts])
    name = "embedding" if config.tied_embeddings else "head"
    assert torch.equal(head[:201], whole.model[name])
    assert not head[201:].any()
    q, kv = config.q_size, config.num_kv_heads * config.head_dim
    for name in ("qkv", "qkv_bias") if config.qkv_bias else ("qkv",):
        blocks = [part.layers[1][name].split([q // 2, kv // 2, kv // 2]) for part in parts]
        expected = layer[name].split([q, kv, kv])
        for i, block in enumerate(expected):
            assert torch.equal(torch.cat([blocks[0][i], blocks[1][i]]), block)
    assert torch.equal(joined(parts, "output", int(output == "all_reduce")), layer["output"])
    if config.output_bias:
        biases = [part.layers[1]["output_bias"] for part in parts]
        total = sum(biases) if output == "all_reduce" else torch.cat(biases)
        assert torch.equal(total, layer["output_bias"])
    if config.sparse_layers:
        assert torch.equal(parts[1].layers[1]["router"], layer["router"])
        assert torch.equal(joined(parts, "experts_down", 2), layer["experts_down"])
        blocks = [part.layers[1]["experts_gate_up"].chunk(2, dim=1) for part in parts]
        rows = [torch.cat([blocks[0][i], blocks[1][i]], 1) for i in (0, 1)]
        assert torch.equal(torch.cat(rows, 1), layer["experts_gate_up"])
        shards = ranks(2, output=output, expert_parallel=True)
        parts = [load(shard) for shard in shards]
        for name in ("experts_gate_up", "experts_down"):
            assert torch.equal(joined(parts, name, 0), layer[name])
    else:
        assert torch.equal(joined(parts, "down", 1), layer["down"])
    if config.mlp_bias:
        assert torch.equal(sum(p.layers[1]["down_bias"] for p in parts), layer["down_bias"])


def test_a_rank_reads_its_slices_alone(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("llama3")
    config = read_model_config(path)
    read: dict[str, int] = {}

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self._name, self._inner = name, inner

        def get_shape(self) -> Any:
            return self._inner.get_shape()

        def __getitem__(self, index: Any) -> torch.Tensor:
            part: torch.Tensor = self._inner[index]
            read[self._name] = read.get(self._name, 0) + part.numel()
            return part

    class File:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._inner = safetensors.safe_open(*arguments, **options)

        def __enter__(self) -> File:
            self._inner.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._inner.__exit__(*error)

        def keys(self) -> Any:
            return self._inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._inner.get_slice(name))

    monkeypatch.setattr("nf_runtime.checkpoint.safe_open", File)
    files, kind = Checkpoint(path), find_family(config.architecture)
    shard = Shard(1, 2)
    load_weights(config, kind, files, dtype=torch.float32, device=CPU, shard=shard)
    whole = {"model.embed_tokens.weight", "model.norm.weight"}
    for name, count in read.items():
        size = torch.Size(files.shape(name)).numel()
        assert count == size if name in whole or name.endswith("layernorm.weight") else size // 2
    assert 4 * sum(read.values()) == weight_bytes(config, torch.float32, shard)


# Graph


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_graph_of_a_rank(architecture: str, output: str) -> None:
    config = model(architecture, decoder_sparse_step=2)
    expert_parallel = bool(config.sparse_layers)
    made = [decoder_graph(config, s) for s in ranks(4, output=output)]
    if expert_parallel:
        made += [decoder_graph(config, s) for s in ranks(4, output=output, expert_parallel=True)]
    kind = FAMILIES[architecture]
    for graph in made:
        assert [op.kind for step in steps(graph) if (op := step.operation)] == [
            op.kind for step in steps(made[0]) if (op := step.operation)
        ]
        network = [s.operation for s in steps(graph) if s.operation.category is Category.NETWORK]
        assert len(network) == (4 if output == "all_reduce" else 6) + 1
        for operation in network:
            assert graph.edges[operation.reads["x"]].contiguous
        flow = {(f.source.layer, f.source.operation.name, f.target.operation.name, f.data)
                for f in flows(graph)}  # fmt: skip
        ends = ["experts" if i in config.sparse_layers else "down" for i in (0, 1)]
        assert (0, f"{ends[0]}_all_reduce", "input_norm", "partial") in flow
        assert (0, "post_attention_norm", "input_norm", "hidden") in flow
        assert (1, f"{ends[1]}_all_reduce", "select_partial", "partial") in flow
        assert (2, "logits", "logits_all_gather", "local_logits") in flow
        for i, layer in enumerate(graph.layers):
            shard = Shard(0, 4, output=output)
            used = {weight for operation in layer for weight in operation.weights.values()}
            assert used == {spec.name for spec in layer_weights(config, kind, i, shard)}
        outside = {w for op in (*graph.prologue, *graph.epilogue) for w in op.weights.values()}
        assert outside == {spec.name for spec in model_weights(config, Shard(0, 4))}


def test_one_rank_has_the_graph_that_it_had() -> None:
    graph = decoder_graph(model())
    assert [operation.name for operation in graph.layers[1]] == [
        *("input_norm", "qkv_proj", "rope_append", "decode_attention", "prefill_attention"),
        *("output_proj", "post_attention_norm", "gate_up_proj", "swiglu", "down_proj"),
    ]
    assert not any(edge.contiguous for edge in graph.edges.values())
    assert {step.operation.category for step in steps(graph)} == {"compute", "memory"}


# Memory


def test_the_memory_of_a_rank(tiny_checkpoint: MakeCheckpoint) -> None:
    config = read_model_config(tiny_checkpoint("llama3"))
    gpu = DeviceMemory("cuda:0", "cuda", 8 << 30, 8 << 30)
    cpu = DeviceMemory("cpu", "cpu", 8 << 30, 8 << 30)

    def plan(memory: DeviceMemory, size: int) -> Any:
        options = {"tensor_parallel_size": size, "kv_cache_tokens": 1024}
        return plan_memory(EngineConfig(model="m", **options), config, memory, torch.float32)

    assert plan(gpu, 2).page_bytes == plan(gpu, 1).page_bytes // 2
    assert plan(gpu, 4).page_bytes == plan(gpu, 2).page_bytes  # they share the two KV heads
    assert plan(gpu, 2).weight_bytes < plan(gpu, 1).weight_bytes
    assert plan(gpu, 2).free_bytes == 8 << 30
    assert plan(cpu, 2).free_bytes == 4 << 30


def test_unused_tensors_are_told_once(
    tiny_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """What other ranks have is no tensor that nobody uses."""
    path = tiny_checkpoint("mixtral")
    config = read_model_config(path)
    for shard in ranks(2, expert_parallel=True):
        load_weights(
            config,
            find_family(config.architecture),
            Checkpoint(path),
            dtype=torch.float32,
            device=CPU,
            shard=shard,
        )
    assert not caplog.records
