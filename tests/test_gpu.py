"""The engine on a CUDA device gives the tokens that it gives on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nf_runtime import LLM, SamplingParams

pytestmark = pytest.mark.gpu

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_tokens_equal_those_of_the_cpu(
    tmp_path: Path, sampling: dict[str, float], record_property: Callable[[str, object], None]
) -> None:
    record_property("function", "iterations/streams")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    prompts = [{"prompt_token_ids": [i + 1] * (7 * i + 1)} for i in range(12)]
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True, logprobs=3, **sampling)
    answers = {}
    for device in ("cpu", "cuda"):
        # Random weights are drawn by each device's own generator; these are made on the CPU.
        llm = LLM(
            str(checkpoint(tmp_path)),
            skip_tokenizer_init=True,
            device=device,
            kv_cache_tokens=4096,
            max_num_batched_tokens=64,
            cuda_graphs=False,
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers[device] = [output.outputs[0].token_ids for output in outputs]
    assert answers["cuda"] == answers["cpu"]


@pytest.mark.parametrize("overlap", ["off", "nanoflow", "co-resident"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_compute_what_streams_do(
    tmp_path: Path,
    dtype: str,
    overlap: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("function", "iterations/graphs")
    monkeypatch.setattr("nf_runtime.device_graphs._LEAST_GAIN", 0.0)
    # Heads of 64 are what FlashInfer takes.
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | shape))
    prompts = [{"prompt_token_ids": [i + 1] * (7 * i + 1)} for i in range(12)]
    params = [
        SamplingParams(max_tokens=10 + 3 * i, temperature=0.0, ignore_eos=True) for i in range(12)
    ]
    answers = []
    for cuda_graphs in (False, True):
        llm = LLM(
            str(checkpoint(tmp_path)),
            skip_tokenizer_init=True,
            device="cuda",
            dtype=dtype,
            overlap=overlap,
            kv_cache_tokens=4096,
            max_num_seqs=12,
            cuda_graphs=cuda_graphs,
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
        assert (llm.engine.stats.cuda_graph_steps > 20) == cuda_graphs
        llm.shutdown()
    # With 16 bits a filled-up batch rounds otherwise, and that graph and streams give the same
    # logits of it was looked at when it was captured.
    assert dtype == "bfloat16" or answers[0] == answers[1]


def checkpoint(directory: Path) -> Path:
    """Random weights for the config in a directory, written once."""
    import torch
    from safetensors.torch import save_file

    from nf_runtime.models import find_family, layer_weights, model_weights, read_config

    path = directory / "model.safetensors"
    if path.exists():
        return directory
    config = read_config(directory)
    family = find_family(config.architecture)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for specs in (
        model_weights(config),
        *(layer_weights(config, family, i) for i in range(config.num_layers)),
    ):
        for spec in specs:
            for source in spec.sources:
                tensors[source.name] = (
                    torch.ones(source.shape)
                    if spec.name.endswith("norm")
                    else torch.randn(source.shape, generator=generator) * 0.1
                )
    save_file(tensors, path)
    return directory
