"""config.json is read in every spelling; what cannot be run is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from nf_runtime import ModelLoadError
from nf_runtime.model_config import ModelConfig
from nf_runtime.models import FAMILIES, decoder_graph, layer_weights, model_weights, read_config
from nf_runtime.rope import cos_sin_table

MISTRAL = {"architectures": ["MistralForCausalLM"]}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": 48,
}


def write(folder: Path, values: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, generation: Any = None, **values: Any) -> ModelConfig:
    return read_config(write(folder, LLAMA | values, generation))


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.q_size, config.qkv_size) == (
        4,
        16,
        64,
        192,
    )
    assert config.rope.theta == 10000.0
    assert config.rope.kind == "default"
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()
    assert not config.tied_embeddings


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="'MambaForCausalLM' is not supported") as caught:
        read(tmp_path, architectures=["MambaForCausalLM"])
    for architecture in FAMILIES:
        assert repr(architecture) in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json does not exist"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"/{name} (cannot be read as JSON|holds a )"):
        read_config(tmp_path)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", ["A", "B"], {}, [3], [["a"]]])
def test_architectures_that_are_no_list_of_one_name(tmp_path: Path, names: Any) -> None:
    with pytest.raises(ModelLoadError, match="architecture"):
        read(tmp_path, architectures=names)


@pytest.mark.parametrize("name", [n for n in LLAMA if n != "architectures"])
def test_a_missing_size_is_named(tmp_path: Path, name: str) -> None:
    values = {k: v for k, v in LLAMA.items() if k != name}
    with pytest.raises(ModelLoadError, match=rf"config\.json: {name} is None; expected a positive"):
        read_config(write(tmp_path, values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 20}, "head_dim is 20.*multiple of 8"),
        ({"hidden_size": 80}, "head_dim is 20.*multiple of 8"),
        ({"num_attention_heads": 128}, "head_dim is 0"),
        ({"num_key_value_heads": 3}, "4 heads and 3 KV heads.*divide"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized; supported: bfloat16"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        (MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types is"),
        (
            MISTRAL | {"sliding_window": 8, "layer_types": ["linear_attention"] * 4},
            "layer_types is",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=rf"config\.json.*({message})"):
        read(tmp_path, **values)


WRONG: tuple[Any, ...] = (None, "x", -1, 0, 1.5, True, [], ["x"], {}, {"a": None})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_wrong_value_never_ends_in_another_error(tmp_path: Path, architecture: str) -> None:
    """Each key in turn holds nonsense: the model is either described in full or refused."""
    base = LLAMA | EXPERTS | {"architectures": [architecture]}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    optional = {
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("rope_parameters", "max_position_embeddings", "sliding_window", "layer_types"),
        *("use_sliding_window", "max_window_layers", "attention_bias", "tie_word_embeddings"),
        *("num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step", "norm_topk_prob"),
        *("eos_token_id", "dtype", "torch_dtype", "hidden_act"),
    }
    cases = [base | {key: value} for key in {*base, *optional} for value in WRONG]
    for scaling in (rope, yarn):
        cases += [
            base | {"rope_parameters": scaling | {key: value}} for key in scaling for value in WRONG
        ]
        cases += [
            base | {"rope_scaling": {k: v for k, v in scaling.items() if k != key}}
            for key in scaling
        ]
    refused = 0
    for values in cases:
        try:
            config = read_config(write(tmp_path, values))
        except ModelLoadError:
            refused += 1
            continue
        graph = decoder_graph(config)
        layer = layer_weights(config, FAMILIES[architecture], 0)
        assert all(size > 0 for spec in (*model_weights(config), *layer) for size in spec.shape)
        assert all(edge.width > 0 for edge in graph.edges.values())
        assert cos_sin_table(config, 8).isfinite().all()
    assert len(cases) > refused > 100


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (None, None, ()),
        (2, None, (2,)),
        (2, 2, (2,)),
        (2, [3, 2], (2, 3)),
        ([5, 6], 7, (5, 6, 7)),
        (None, 0, (0,)),
    ],
)
def test_end_of_sequence_ids_of_both_files(
    tmp_path: Path, config_eos: Any, generation_eos: Any, expected: tuple[int, ...]
) -> None:
    config = read(tmp_path, {"eos_token_id": generation_eos}, eos_token_id=config_eos)
    assert config.eos_token_ids == expected


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_dtype_in_every_spelling(tmp_path: Path, name: str, value: str) -> None:
    assert read(tmp_path, **{name: value}).dtype == "bfloat16"


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_in_every_spelling(tmp_path: Path, spelling: str, kind: str) -> None:
    scaling: dict[str, Any] = {kind: "linear", "factor": 2.0}
    if spelling == "rope_scaling":
        config = read(tmp_path, rope_theta=5e5, rope_scaling=scaling)
    else:
        config = read(tmp_path, rope_parameters=scaling | {"rope_theta": 5e5})
    assert (config.rope.kind, config.rope.theta) == ("linear", 5e5)
    assert config.rope.parameters["factor"] == 2.0


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (transformers.MistralConfig, {}),
        (transformers.MistralConfig, {"sliding_window": None}),
        (transformers.MistralConfig, {"sliding_window": 100}),
        (transformers.MixtralConfig, {"sliding_window": 64}),
        (transformers.Qwen2Config, {"use_sliding_window": False, "sliding_window": 64}),
        (
            transformers.Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        ),
        (transformers.Qwen3Config, {"use_sliding_window": True, "sliding_window": 8}),
        (transformers.Qwen3MoeConfig, {"use_sliding_window": True, "sliding_window": 8}),
        (transformers.LlamaConfig, {}),
    ],
)
def test_windows_are_those_of_transformers(
    tmp_path: Path, config_class: Any, values: dict[str, Any]
) -> None:
    theirs = config_class(num_hidden_layers=5, **values)
    theirs.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None) or 0
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * 5
    expected = tuple(window if t == "sliding_attention" else 0 for t in types)
    assert read_config(tmp_path).windows == expected


def test_a_window_of_old_files_without_layer_types(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    assert read(tmp_path, **qwen, use_sliding_window=True).windows == (0, 64, 64, 64)
    assert read(tmp_path, **qwen, use_sliding_window=False).windows == (0, 0, 0, 0)
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, **mistral).windows == (4096,) * 4
    assert read(tmp_path, **mistral, sliding_window=None).windows == (0,) * 4


def test_which_layers_have_experts(tmp_path: Path) -> None:
    moe = EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"]}
    assert read(tmp_path, **moe).sparse_layers == {0, 1, 2, 3}
    assert read(tmp_path, **moe, decoder_sparse_step=2).sparse_layers == {1, 3}
    assert read(tmp_path, **moe, mlp_only_layers=[1, 2]).sparse_layers == {0, 3}
    assert read(tmp_path).sparse_layers == set()


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, 0),
        ("MistralForCausalLM", {}, 4096),
        ("MistralForCausalLM", {"sliding_window": None}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, 0),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
            8,
        ),
        ("Qwen3ForCausalLM", {"sliding_window": 8, "use_sliding_window": True}, 0),
    ],
)
def test_which_layers_have_a_window(
    architecture: str, keys: dict[str, object], expected: int, tmp_path: Path
) -> None:
    """The defaults of transformers, for keys that a config leaves out."""
    values = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | keys))
    assert read_config(tmp_path).windows == (expected, expected)
    theirs = transformers.AutoConfig.for_model(
        {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}[
            architecture.removesuffix("ForCausalLM")
        ],
        **(values | keys),
    )
    if architecture != "LlamaForCausalLM":  # which keeps the key, and does not look at it
        types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
        windows = [(theirs.sliding_window or 0) if "sliding" in t else 0 for t in types]
        assert windows == [expected, expected]
