"""The engine on a CUDA device gives the tokens that it gives on the CPU."""

import json
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
def test_tokens_equal_those_of_the_cpu(tmp_path: Path, sampling: dict[str, float]) -> None:
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
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers[device] = [output.outputs[0].token_ids for output in outputs]
    assert answers["cuda"] == answers["cpu"]


def checkpoint(directory: Path) -> Path:
    """Random weights for `LLAMA`, written once."""
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
