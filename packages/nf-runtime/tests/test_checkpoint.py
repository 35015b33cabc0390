"""Checkpoints load exactly, and every kind of damage is named before anything is served."""

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nf_runtime import LLM, ModelLoadError, SamplingParams
from nf_runtime.checkpoint import Checkpoint
from nf_runtime.model_source import find_model
from nf_runtime.models import find_family, read_config
from nf_runtime.weights import ModelWeights, load_weights, make_weights

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def llama(tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama3"), tmp_path / "model"))


def load(path: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    config = read_config(path)
    family = find_family(config.architecture)
    return load_weights(config, family, Checkpoint(path), dtype=dtype, device=CPU)


def flat(weights: ModelWeights) -> dict[str, Tensor]:
    groups = enumerate([weights.model, *weights.layers])
    return {f"{i}.{name}": tensor for i, group in groups for name, tensor in group.items()}


def assert_same(one: ModelWeights, other: ModelWeights) -> None:
    expected = flat(other)
    assert flat(one).keys() == expected.keys()
    for name, tensor in flat(one).items():
        assert torch.equal(tensor, expected[name]), name


def change(path: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of a checkpoint (`.` is written `__`); None removes one."""
    values = load_file(path / WEIGHTS)
    for name, tensor in tensors.items():
        values.pop(name.replace("__", "."), None)
        if tensor is not None:
            values[name.replace("__", ".")] = tensor
    save_file(values, path / WEIGHTS)


def change_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def split(path: Path, count: int) -> None:
    """Turn a single file into shards, dealing the tensors out in turn."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::count]}
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# What loads


@pytest.mark.parametrize("family", ["llama3", "qwen2", "mixtral"])
def test_shards_give_the_same_weights(
    family: str, tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    single = tiny_checkpoint(family)
    sharded = Path(shutil.copytree(single, tmp_path / "sharded"))
    split(sharded, 3)
    assert_same(load(sharded), load(single))


def test_large_tensors_are_copied_whole(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read some rows at a time: here, one row and a few rows."""
    expected = load(llama)
    for size in (1, 1000):
        monkeypatch.setattr("nf_runtime.checkpoint._MAPPED_BYTES", size)
        assert_same(load(llama), expected)


def test_fused_weights_are_the_parts_in_order(llama: Path) -> None:
    tensors = load_file(llama / WEIGHTS)
    layer = load(llama).layers[1]
    prefix = "model.layers.1."
    parts = [tensors[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(layer["qkv"], torch.cat(parts))
    parts = [tensors[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(layer["gate_up"], torch.cat(parts))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_conversion(llama: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {k: v.to(stored) for k, v in load_file(llama / WEIGHTS).items()}
    save_file(tensors, llama / WEIGHTS)
    weights = load(llama, wanted)
    assert {tensor.dtype for tensor in flat(weights).values()} == {wanted}
    assert torch.equal(weights.model["embedding"], tensors["model.embed_tokens.weight"].to(wanted))
    assert weights.num_bytes == sum(t.numel() for t in tensors.values()) * wanted.itemsize


@pytest.mark.parametrize(
    ("dtype", "option", "expected"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtype_auto_is_that_of_the_config(
    llama: Path, dtype: str, option: str, expected: str
) -> None:
    change_config(llama, dtype=dtype)
    llm = LLM(str(llama), skip_tokenizer_init=True, dtype=option, kv_cache_tokens=256)
    assert llm.engine.info.dtype == expected


def test_a_dtype_that_no_model_runs_in_is_refused(llama: Path) -> None:
    change_config(llama, dtype="float8_e4m3fn")
    with pytest.raises(ModelLoadError, match=r"float8_e4m3fn.*choose one of bfloat16"):
        LLM(str(llama), skip_tokenizer_init=True)


@pytest.mark.parametrize("has_head", [False, True])
def test_tied_embeddings_need_no_head(
    has_head: bool,
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model"))
    names = load_file(path / WEIGHTS)
    assert "lm_head.weight" not in names
    expected = load(path)
    if has_head:  # some checkpoints carry a copy
        change(path, lm_head__weight=names["model.embed_tokens.weight"].clone())
    weights = load(path)
    assert_same(weights, expected)
    assert "head" not in weights.model
    assert not caplog.records


def test_untied_embeddings_need_a_head(llama: Path) -> None:
    change(llama, lm_head__weight=None)
    with pytest.raises(ModelLoadError, match=r"no tensor 'lm_head\.weight'; it is incomplete"):
        load(llama)


def test_unused_tensors_are_told_once(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"extra_{i}": torch.ones(2) for i in range(7)}
    change(llama, **extra, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    with caplog.at_level(logging.WARNING):
        load(llama)
    (record,) = caplog.records
    assert "7 tensors that the model does not use: extra_0, extra_1" in record.getMessage()
    assert "inv_freq" not in record.getMessage()


def test_random_weights_follow_from_the_seed(llama: Path) -> None:
    config = read_config(llama)
    family = find_family(config.architecture)

    def make(seed: int) -> ModelWeights:
        return make_weights(config, family, dtype=torch.float32, device=CPU, seed=seed)

    assert_same(make(3), make(3))
    one, other = make(3), make(4)
    assert not torch.equal(one.layers[0]["qkv"], other.layers[0]["qkv"])
    assert not torch.equal(one.layers[0]["qkv"], one.layers[1]["qkv"])
    assert one.model["final_norm"].eq(1).all()
    assert 0.019 < one.model["embedding"].std() < 0.021


def test_dummy_needs_a_config_alone(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    prompt = {"prompt_token_ids": [1, 2, 3]}

    def tokens(seed: int) -> list[int]:
        llm = LLM(str(llama), skip_tokenizer_init=True, load_format="dummy", seed=seed)
        params = SamplingParams(temperature=0, max_tokens=8)
        return llm.generate(prompt, params)[0].outputs[0].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors"):
        LLM(str(llama), skip_tokenizer_init=True)


# What does not load


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(llama: Path, keep: int) -> None:
    content = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated or corrupt"):
        load(llama)


def test_a_file_that_is_too_long_is_named(llama: Path) -> None:
    with (llama / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated or corrupt"):
        load(llama)


@pytest.mark.parametrize("position", [0, 7, 8, 9, 40, 200])
def test_a_flipped_header_is_named(llama: Path, position: int) -> None:
    """The first eight bytes are the header's length, the header is JSON."""
    content = bytearray((llama / WEIGHTS).read_bytes())
    content[position] ^= 0x80
    (llama / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load(llama)


def test_tensors_that_overlap_are_refused(llama: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated or corrupt"):
        load(llama)


def test_missing_shards_are_named(llama: Path) -> None:
    split(llama, 3)
    (llama / "model-00002-of-00003.safetensors").unlink()
    message = r"index\.json names shards that are not there: model-00002-of-00003\.safetensors"
    with pytest.raises(ModelLoadError, match=message):
        load(llama)


def test_a_truncated_shard_is_named(llama: Path) -> None:
    split(llama, 3)
    shard = llama / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=r"model-00003-of-00003\.safetensors is truncated"):
        load(llama)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(llama: Path, content: str) -> None:
    split(llama, 2)
    (llama / INDEX).write_text(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors\.index\.json"):
        load(llama)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(llama: Path, name: str) -> None:
    change(llama, **{name.replace(".", "__"): None})
    with pytest.raises(ModelLoadError, match=f"no tensor '{name}'; it is incomplete"):
        load(llama)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (32,)),
        ("model.norm.weight", (64, 1)),
        ("model.layers.0.mlp.down_proj.weight", (96, 64)),
        ("model.layers.0.self_attn.k_proj.weight", (48, 64)),
        ("model.layers.0.self_attn.k_proj.weight", (32, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (32,)),
        ("model.layers.0.self_attn.k_proj.weight", ()),
    ],
)
def test_a_wrong_shape_is_named(llama: Path, name: str, shape: tuple[int, ...]) -> None:
    change(llama, **{name.replace(".", "__"): torch.zeros(shape)})
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: .*{name}.*config\.json makes"):
        load(llama)


def test_parts_that_fit_only_together_are_refused(llama: Path) -> None:
    """As many rows in sum, but they are not the heads that config.json says."""
    change(
        llama,
        model__layers__0__self_attn__q_proj__weight=torch.zeros(48, 64),
        model__layers__0__self_attn__k_proj__weight=torch.zeros(48, 64),
    )
    with pytest.raises(ModelLoadError, match=r"q_proj\.weight.*config\.json makes"):
        load(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_checkpoint_is_refused_with_the_reason(llama: Path, name: str) -> None:
    (llama / WEIGHTS).rename(llama / name)
    with pytest.raises(ModelLoadError, match=f"{name} .*a pickle checkpoint can run code.*convert"):
        load(llama)


def test_a_directory_without_weights_is_refused(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    with pytest.raises(ModelLoadError, match=r"has no model\.safetensors; expected a safetensors"):
        load(llama)


# Where a model is looked for


def test_a_missing_tokenizer_names_the_option(llama: Path) -> None:
    with pytest.raises(
        ModelLoadError, match="no usable tokenizer; name another directory with tokenizer"
    ):
        LLM(str(llama))


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json"])
def test_a_damaged_tokenizer_is_an_error_of_loading(llama: Path, content: str) -> None:
    (llama / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match="no usable tokenizer"):
        LLM(str(llama))


def test_a_file_is_no_model(llama: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors' is a file; expected a directory"
    ):
        find_model(str(llama / WEIGHTS))


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "./no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"model '{name}' is no directory here"):
        find_model(name)


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="'nobody/nothing' is no directory here, and the hub"):
        LLM("nobody/nothing")
