"""`generate` of transformers with a PrefixCache: the same tokens as without, and less computing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from tiny_models import CONFIGS, PAGE_BYTES, generate, make_model, make_prompt

from nf_kvcache.disk.errors import CacheInUse
from nf_kvcache.integrations.transformers import PrefixCache, PrefixStore

SMALL = {"device_bytes": 32 * PAGE_BYTES, "host_bytes": 64 * PAGE_BYTES}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@contextmanager
def tokens_computed(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward pass computes."""
    lengths: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    hook.remove()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_second_call_computes_the_rest_alone(family: str) -> None:
    model, prompt = make_model(family), make_prompt(50)
    expected = generate(model, prompt)
    assert len(set(expected[0, 50:].tolist())) > 5  # a mistake would show
    with PrefixStore(model, **SMALL) as store:
        for hits, computed in (({}, 50), ({"device": 48}, 2)):
            with tokens_computed(model) as lengths, store.cache(prompt) as cache:
                assert torch.equal(generate(model, prompt, past_key_values=cache), expected)
            assert cache.hit_tokens_by_tier == hits
            assert lengths == [computed] + 23 * [1]
        stats = store.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (98, 48)
    assert stats.hit_tokens_by_tier == {"device": 48, "host": 0, "disk": 0}
    assert not model._forward_pre_hooks


def test_wrong_numbers_in_a_page_show(model: Any) -> None:
    """The negative control of all tests here: the tokens do depend on what is kept."""
    prompt = make_prompt(50)
    with PrefixStore(model, **SMALL) as store:
        with store.cache(prompt) as cache:
            expected = generate(model, prompt, past_key_values=cache)
        for keys, _ in store._cache.layers:
            keys.neg_()
        with store.cache(prompt) as cache:
            assert not torch.equal(generate(model, prompt, past_key_values=cache), expected)


def test_the_next_turn_finds_what_was_generated(model: Any) -> None:
    with PrefixStore(model, **SMALL) as store:
        prompt = make_prompt(30)
        with store.cache(prompt) as cache:
            answer = generate(model, prompt, 40, past_key_values=cache)
        prompt = torch.cat((answer, make_prompt(10, seed=1)), dim=1)
        with store.cache(prompt) as cache:
            assert cache.hit_tokens_by_tier == {"device": 64}  # of 69 whose K and V exist
            out = generate(model, prompt, past_key_values=cache)
    assert torch.equal(out, generate(model, prompt))


def test_the_host_keeps_what_the_device_has_no_room_for(model: Any) -> None:
    prompts = [make_prompt(50, seed=seed) for seed in range(3)]
    with PrefixStore(model, device_bytes=6 * PAGE_BYTES, host_bytes=2**20) as store:
        for turn in range(2):
            for prompt in prompts:
                with store.cache(prompt) as cache:
                    out = generate(model, prompt, past_key_values=cache)
                assert torch.equal(out, generate(model, prompt))
                if turn:
                    assert cache.hit_tokens_by_tier["host"] > 0
                    assert cache.hit_tokens == 48
        store._cache.check_integrity()


def test_the_next_process_finds_it_on_disk(tmp_path: Path) -> None:
    command = [sys.executable, tiny_models.__file__, "qwen3", str(tmp_path)]
    expected = generate(make_model("qwen3"), make_prompt(50)).tolist()
    for hits in [{}, {"disk": 48}]:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == {"hits": hits, "tokens": expected}


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["weights", "rope"],
)
def test_another_model_in_the_same_directory_finds_nothing(
    model: Any, other: dict[str, Any], tmp_path: Path
) -> None:
    prompt, disk = make_prompt(50), {"disk_directory": tmp_path, "disk_bytes": 2**24}
    with PrefixStore(model, **disk, **SMALL) as store, store.cache(prompt) as cache:
        generate(model, prompt, past_key_values=cache)
    other_model = make_model(**other)
    with PrefixStore(other_model, **disk, **SMALL) as store, store.cache(prompt) as cache:
        assert cache.hit_tokens == 0
        out = generate(other_model, prompt, past_key_values=cache)
    assert torch.equal(out, generate(other_model, prompt))
    with PrefixStore(model, **disk, **SMALL) as store, store.cache(prompt) as cache:
        assert cache.hit_tokens_by_tier == {"disk": 48}


def test_a_sequence_larger_than_the_host_goes_through_it(model: Any, tmp_path: Path) -> None:
    prompt = make_prompt(320)
    options: dict[str, Any] = SMALL | {"host_bytes": 4 * PAGE_BYTES}
    options |= {"disk_directory": tmp_path, "disk_bytes": 2**24}
    with PrefixStore(model, **options) as store, store.cache(prompt) as cache:
        out = generate(model, prompt, past_key_values=cache)
    with PrefixStore(model, **options) as store, store.cache(prompt) as cache:
        assert cache.hit_tokens_by_tier == {"disk": 304}
        assert torch.equal(generate(model, prompt, past_key_values=cache), out)


def test_of_a_sequence_larger_than_the_device_the_beginning_is_kept(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = make_prompt(100)
    with PrefixStore(model, device_bytes=4 * PAGE_BYTES, host_bytes=2**20) as store:
        for hits in (0, 64):
            with store.cache(prompt) as cache:
                assert cache.hit_tokens == hits
                out = generate(model, prompt, past_key_values=cache)
            assert torch.equal(out, generate(model, prompt))
    assert "64 of 112 tokens are kept; raise device_bytes" in caplog.text


def test_rows_of_a_batch_go_on_from_what_all_of_them_have(model: Any) -> None:
    prompt = make_prompt(60, rows=3)
    prompt[:2, :40] = prompt[2, :40]
    expected = generate(model, prompt)
    with PrefixStore(model, **SMALL) as store:
        for rows, hits in (([0, 1], 0), ([1, 2], 2 * 32), ([0, 2], 2 * 48)):
            with store.cache(prompt[rows]) as cache:
                out = generate(model, prompt[rows], past_key_values=cache)
            assert torch.equal(out, expected[rows])
            assert cache.hit_tokens == hits
        store._cache.check_integrity()


def test_a_prompt_can_be_computed_in_chunks(model: Any) -> None:
    prompt = make_prompt(90)
    with PrefixStore(model, **SMALL) as store:
        for first in (prompt[:, :40], prompt):
            with tokens_computed(model) as lengths, store.cache(first) as cache:
                out = generate(model, first, 1, past_key_values=cache, prefill_chunk_size=20)
            assert torch.equal(out, generate(model, first, 1))
    assert lengths == [20, 20, 18]  # 32 were found


def test_what_an_interrupted_call_has_computed_is_kept(model: Any) -> None:
    prompt = make_prompt(50)
    passes = 0

    def interrupt(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 20:
            raise KeyboardInterrupt

    with PrefixStore(model, **SMALL) as store:
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), store.cache(prompt) as cache:
            generate(model, prompt, past_key_values=cache)
        hook.remove()
        longer = generate(model, prompt)
        with store.cache(longer) as cache:
            assert cache.hit_tokens == 64  # 50 + 18 tokens were complete in all layers
            assert torch.equal(
                generate(model, longer, past_key_values=cache), generate(model, longer)
            )
        store._cache.check_integrity()


def test_a_loop_of_ones_own_works_too(model: Any) -> None:
    prompt = make_prompt(50)
    expected = generate(model, prompt, 8)
    with PrefixStore(model, **SMALL) as store, torch.no_grad():
        for hits in (0, 48):
            with store.cache(prompt) as cache:
                assert cache.hit_tokens == hits
                tokens, new = prompt, prompt[:, hits:]
                for _ in range(8):
                    new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
                    tokens = torch.cat((tokens, new), dim=1)
            assert torch.equal(tokens, expected)


# What is refused


@pytest.fixture
def store(model: Any) -> Iterator[PrefixStore]:
    with PrefixStore(model, **SMALL) as store:
        yield store
        store._cache.check_integrity()


def test_a_cache_serves_one_call(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    with store.cache(prompt) as cache:
        longer = torch.cat((generate(model, prompt, past_key_values=cache), prompt), dim=1)
        with pytest.raises(ValueError, match=r"tokens 73 to 123\. They are not those"):
            generate(model, longer, past_key_values=cache)
    with pytest.raises(ValueError, match="This PrefixCache is closed"):
        generate(model, prompt, past_key_values=cache)


def test_another_prompt_is_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    for other in (make_prompt(50, seed=1), prompt[:, :40], prompt.repeat(2, 1)):
        with store.cache(prompt) as cache, pytest.raises(ValueError, match="The model was called"):
            generate(model, other, past_key_values=cache)


def test_padding_is_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50, rows=2)
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    with store.cache(prompt) as cache, pytest.raises(ValueError, match="cannot have padding"):
        generate(model, prompt, past_key_values=cache, attention_mask=mask)


def test_positions_out_of_order_are_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    positions = torch.arange(50)[None] + 1
    with store.cache(prompt) as cache, pytest.raises(ValueError, match="position_ids are not 0 to"):
        model(prompt, past_key_values=cache, position_ids=positions)


def test_what_is_not_told_by_tokens_is_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    embeddings = model.get_input_embeddings()(prompt)
    with store.cache(prompt) as cache:
        with pytest.raises(ValueError, match="called with inputs_embeds"):
            model(inputs_embeds=embeddings, past_key_values=cache)
        with pytest.raises(ValueError, match="called without input_ids"):
            model(past_key_values=cache)


def test_training_is_refused(model: Any, store: PrefixStore) -> None:
    model.train()
    try:
        with store.cache(make_prompt(5)) as cache, pytest.raises(ValueError, match="training mode"):
            model(make_prompt(5), past_key_values=cache)
    finally:
        model.eval()


def test_another_model_is_refused(store: PrefixStore) -> None:
    prompt = make_prompt(50)
    with (
        store.cache(prompt) as cache,
        pytest.raises(ValueError, match="expected that model itself"),
    ):
        generate(make_model(seed=1), prompt, past_key_values=cache)


def test_another_type_is_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    with (
        store.cache(prompt) as cache,
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"V in torch\.bfloat16; expected torch\.float32"),
    ):
        generate(model, prompt, past_key_values=cache)


def test_beams_and_assistants_are_refused(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    with (
        store.cache(prompt.repeat(2, 1)) as cache,
        pytest.raises(ValueError, match="without beams"),
    ):
        generate(model, prompt, past_key_values=cache, num_beams=2)
    with store.cache(prompt) as cache, pytest.raises(ValueError, match="not those of the prompt"):
        generate(model, prompt, past_key_values=cache, prompt_lookup_num_tokens=3)
    with store.cache(prompt) as cache, pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_several_answers_to_a_prompt_are_several_rows(model: Any, store: PrefixStore) -> None:
    prompt = make_prompt(50)
    with store.cache(prompt.repeat(3, 1)) as cache:
        out = model.generate(
            prompt, max_new_tokens=9, do_sample=True, num_return_sequences=3, past_key_values=cache
        )
    with store.cache(out) as cache:
        assert cache.hit_tokens == 3 * 48


@pytest.mark.parametrize(
    "input_ids", [torch.zeros(5, dtype=torch.int64), torch.zeros(1, 5), make_prompt(0)]
)
def test_prompts_of_another_form_are_refused(store: PrefixStore, input_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids is torch"):
        store.cache(input_ids)


def test_a_closed_store_is_refused(model: Any) -> None:
    prompt = make_prompt(50)
    store = PrefixStore(model, **SMALL)
    cache = store.cache(prompt)
    generate(model, prompt, past_key_values=cache)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="This PrefixStore is closed"):
        cache.close()
    with pytest.raises(ValueError, match="This PrefixStore is closed"):
        store.cache(prompt)


UNSUPPORTED = {
    "DynamicSlidingWindowLayer": transformers.MistralConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=40, sliding_window=8
    ),
    "LinearAttentionLayer": transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "rope_type 'dynamic'": transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "of these forms": transformers.DeepseekV3Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=40,
        first_k_dense_replace=1,
    ),
    "from tokens after it": transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        initializer_range=0.2,
    ),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_models_without_prefixes_to_keep_are_refused(reason: str) -> None:
    config = UNSUPPORTED[reason]
    config.vocab_size = 50
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=reason):
        PrefixStore(model, **SMALL)
    assert not model._forward_pre_hooks


def test_encoders_and_other_modules_are_refused() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=2, vocab_size=50
    )
    with pytest.raises(ValueError, match="has an encoder"):
        PrefixStore(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match="model is a Linear; expected a PreTrainedModel"):
        PrefixStore(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_sizes_are_checked(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk_bytes is None; expected both or neither"):
        PrefixStore(model, disk_directory=tmp_path)
    with pytest.raises(ValueError, match=f"a page takes {PAGE_BYTES}; expected room for one"):
        PrefixStore(model, device_bytes=PAGE_BYTES - 1)
    disk = {"disk_directory": tmp_path, "disk_bytes": 2**24}
    with pytest.raises(ValueError, match="host_bytes is 0, and there is a disk tier"):
        PrefixStore(model, host_bytes=0, **disk)
    with PrefixStore(model, **disk, **SMALL):  # what was refused has let go of the directory
        with pytest.raises(CacheInUse):
            PrefixStore(model, **disk, **SMALL)
        assert len(model._forward_pre_hooks) == 1


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = PrefixCache.__module__.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'nf-kvcache\[transformers\]'"):
        importlib.import_module(name)
