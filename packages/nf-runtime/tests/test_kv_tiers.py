"""KV that comes back from the host or the SSD changes how much is computed, and no token."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_kvcache import IterationOffload
from nf_kvcache.disk import BlockRequest, ThreadIO
from nf_runtime import LLM, ModelLoadError, NanoFlowError, RequestOutput, SamplingParams

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE = 200
LAYERS = 3
MIB = 1 << 20
GREEDY = SamplingParams(temperature=0, max_tokens=12)
# Each alone nearly fills the small device pool below.
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB_SIZE, 150).tolist() for i in range(6)]
SMALL = {"kv_cache_tokens": 256, "max_model_len": 224, "max_num_batched_tokens": 64}


@pytest.fixture
def load(tiny_checkpoint: MakeCheckpoint) -> Iterator[Callable[..., LLM]]:
    """Give `load(family, **options) -> LLM`; what is not shut down at the end is."""
    llms: list[LLM] = []

    def make(family: str = "llama3", **options: Any) -> LLM:
        path = str(tiny_checkpoint(family))
        llms.append(LLM(path, skip_tokenizer_init=True, **(SMALL | options)))
        return llms[-1]

    yield make
    for llm in llms:
        llm.shutdown()


def answer(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[RequestOutput]:
    """Answers to prompts, one after the other."""
    outputs = []
    for prompt in prompts:
        outputs += llm.generate({"prompt_token_ids": prompt}, params)
        llm.engine.scheduler.check_integrity()
        llm.engine.kv_cache.check_integrity()
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def cached(outputs: list[RequestOutput], tier: str) -> int:
    """Prompt tokens that were found in a tier."""
    ledgers = [output.outputs[0].ledger for output in outputs]
    return sum(ledger.cached_tokens_by_tier.get(tier, 0) for ledger in ledgers if ledger)


def flush(llm: LLM) -> None:
    """Until all KV is where it is kept."""
    assert llm.engine.kv_cache.flush(10)


FORMS = [
    ("llama3", {}),
    ("llama3", {"dtype": "bfloat16", "deterministic": True}),
    ("llama3", {"native_kernels": False}),
    ("mistral", {}),
    ("qwen3", {}),
    ("mixtral", {}),
]


@pytest.mark.parametrize(("family", "options"), FORMS)
def test_hits_in_the_host_change_no_token(
    load: Callable[..., LLM], family: str, options: dict[str, Any]
) -> None:
    expected = tokens(answer(load(family, enable_prefix_caching=False, **options), PROMPTS))
    llm = load(family, kv_host_bytes=4 * MIB, **options)
    first = answer(llm, PROMPTS)
    flush(llm)
    again = answer(llm, PROMPTS)
    assert tokens(first) == tokens(again) == expected
    assert cached(first, "host") == 0
    assert cached(again, "host") > 100 * len(PROMPTS) / 2
    lower = llm.engine.stats.lower_tiers
    assert lower is not None
    assert lower.uploaded_bytes > 0
    assert lower.restores_cut == 0


@pytest.mark.parametrize(("family", "options"), FORMS)
def test_hits_on_the_ssd_change_no_token_after_a_restart(
    load: Callable[..., LLM], family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    expected = tokens(answer(load(family, enable_prefix_caching=False, **options), PROMPTS))
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB, "kv_host_bytes": MIB}
    with load(family, **ssd, **options) as llm:
        assert tokens(answer(llm, PROMPTS)) == expected
    with load(family, **ssd, **options) as llm:
        again = answer(llm, PROMPTS)
        lower = llm.engine.stats.lower_tiers
    assert tokens(again) == expected
    assert cached(again, "disk") > 100 * len(PROMPTS) / 2
    assert lower is not None
    assert lower.disk is not None
    assert lower.disk.pages_found > 0
    assert lower.disk.pages_damaged == 0


@pytest.mark.parametrize("form", [{}, {"dtype": "bfloat16", "deterministic": True}])
def test_a_sequence_that_gives_way_returns_without_recomputation(
    load: Callable[..., LLM], form: dict[str, Any]
) -> None:
    """Ten requests that grow to 70 to 106 tokens each, on a device for 160."""
    generator = np.random.default_rng(3)
    prompts = [
        {"prompt_token_ids": generator.integers(0, VOCAB_SIZE, n).tolist()}
        for n in range(20, 60, 4)
    ]
    params = SamplingParams(temperature=0, max_tokens=50)
    expected = tokens(load(kv_cache_tokens=4096, **form).generate(prompts, params))
    options: dict[str, Any] = {
        **{"kv_cache_tokens": 160, "max_model_len": 128, "admission": "greedy"},
        **form,
    }
    plain, tiered = load(**options), load(kv_host_bytes=4 * MIB, **options)
    assert tokens(plain.generate(prompts, params)) == expected
    outputs = tiered.generate(prompts, params)
    assert tokens(outputs) == expected
    assert tiered.engine.stats.preemptions > 0
    tiered.engine.kv_cache.check_integrity()
    ledgers = [output.outputs[0].ledger for output in outputs]
    assert sum(ledger.restored_tokens for ledger in ledgers if ledger) > 0
    computed = tiered.engine.stats.iteration_tokens
    # Every token once, but those on their way to a host that had not yet got them.
    assert computed < 1.1 * sum(len(p["prompt_token_ids"]) + 49 for p in prompts)
    assert computed < 0.9 * plain.engine.stats.iteration_tokens


def test_salts_share_nothing(load: Callable[..., LLM]) -> None:
    llm = load(kv_host_bytes=4 * MIB)

    def hits(salt: str) -> int:
        prompt = {"prompt_token_ids": PROMPTS[0], "cache_salt": salt}
        ledger = llm.generate(prompt, GREEDY)[0].outputs[0].ledger
        assert ledger is not None
        return ledger.cached_tokens

    assert [hits(salt) for salt in ("", "a", "b", "a", "")] == [0, 0, 0, 144, 144]


def test_a_damaged_page_is_computed_again(load: Callable[..., LLM], tmp_path: Path) -> None:
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB}
    with load(**ssd) as llm:
        expected = tokens(answer(llm, PROMPTS))
    (segment,) = tmp_path.rglob("segment-*.kv")
    flip_bits(segment)
    with load(**ssd) as llm:
        outputs = answer(llm, PROMPTS)
        lower = llm.engine.stats.lower_tiers
    assert tokens(outputs) == expected
    assert lower is not None
    assert lower.disk is not None
    assert lower.disk.pages_damaged > 0
    assert lower.restores_cut > 0


def flip_bits(path: Path) -> None:
    """Change a bit in every second block."""
    with open(path, "r+b") as file:
        for offset in range(100, path.stat().st_size, 8192):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 4]))


def test_a_disk_that_stands_still_holds_up_no_request(
    load: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one write ends: requests go on, and what finds no time is dropped and counted."""
    gate = threading.Event()

    class Stalled(ThreadIO):
        def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
            gate.wait(60)
            return super().write_many(requests)

    expected = tokens(answer(load(), PROMPTS))
    monkeypatch.setattr("nf_kvcache.disk.tier.default_block_io", Stalled)
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB}
    llm = load(kv_host_bytes=20 * 24576, **ssd)  # twenty pages
    started = time.monotonic()
    assert tokens(answer(llm, PROMPTS * 2)) == expected * 2
    assert time.monotonic() - started < 30
    lower = llm.engine.stats.lower_tiers
    assert lower is not None
    assert lower.disk is not None
    assert lower.disk.pages_stored == 0
    assert lower.disk.pages_queued > 0
    assert lower.unwritten_pages + lower.skipped_pages > 0
    gate.set()


def test_other_weights_find_nothing(load: Callable[..., LLM], tmp_path: Path) -> None:
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB, "load_format": "dummy"}
    for seed, hits in ((1, False), (2, False), (1, True)):
        with load(seed=seed, **ssd) as llm:
            assert bool(cached(answer(llm, PROMPTS[:1]), "disk")) == hits


@pytest.mark.parametrize(
    "difference",
    [{"page_size": 8}, {"dtype": "bfloat16"}, {"native_kernels": False}, {"deterministic": True}],
)
def test_kv_of_another_form_is_not_found(
    load: Callable[..., LLM], tmp_path: Path, difference: dict[str, Any]
) -> None:
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB}
    with load(**ssd) as llm:
        answer(llm, PROMPTS[:1])
    with load(**ssd, **difference) as llm:
        assert cached(answer(llm, PROMPTS[:1]), "disk") == 0


def test_what_was_computed_is_kept_without_a_shutdown(
    load: Callable[..., LLM], tmp_path: Path
) -> None:
    """As a process does that has nothing else to do for a while."""
    ssd = {"kv_ssd_dir": str(tmp_path), "kv_ssd_max_bytes": 16 * MIB}
    llm = load(**ssd)
    answer(llm, PROMPTS[:1])
    deadline = time.monotonic() + 10
    while llm.engine.settle():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lower = llm.engine.stats.lower_tiers
    assert lower is not None
    assert lower.disk is not None
    assert lower.disk.pages_stored == 10


class Order:
    """In which order layers ended, and the copies of their KV were ordered.

    Attributes:
        calls: ("layer", number) and ("copy", number), as they happened.
    """

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, *, late: bool) -> None:
        self.calls: list[tuple[str, int]] = []
        order = IterationOffload.after_append
        put_off: list[tuple[IterationOffload, int]] = []

        def after_append(offload: IterationOffload, layer: int) -> None:
            """Copy at once, or everything at the end of the iteration."""
            put_off.append((offload, layer))
            if not late:
                copy_all()

        def copy_all() -> None:
            for offload, layer in put_off:
                order(offload, layer)
                self.calls.append(("copy", layer))
            put_off.clear()

        def after_layer(layer: int, edges: object) -> None:
            self.calls.append(("layer", layer))
            if layer == LAYERS - 1:
                copy_all()

        monkeypatch.setattr(IterationOffload, "after_append", after_append)
        llm.engine.executor.after_layer.append(after_layer)

    @property
    def is_eager(self) -> bool:
        """Whether each layer's copy was ordered before the second layer after it had ended."""
        return all(
            self.calls.index(("copy", layer)) < self.calls.index(("layer", layer + 2))
            for layer in range(LAYERS - 2)
        )


@pytest.mark.parametrize("late", [False, True])
def test_each_layer_is_copied_while_later_ones_are_computed(
    load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """And the check notices if all layers are copied in the end."""
    llm = load(kv_host_bytes=4 * MIB)
    order = Order(llm, monkeypatch, late=late)
    answer(llm, [PROMPTS[0][:32]], SamplingParams(temperature=0, max_tokens=1))
    assert sorted(order.calls) == [(name, i) for name in ("copy", "layer") for i in range(LAYERS)]
    assert order.is_eager != late


def test_the_directory_is_refused_with_a_reason(load: Callable[..., LLM], tmp_path: Path) -> None:
    ssd = {"kv_ssd_dir": str(tmp_path)}
    with load(**ssd), pytest.raises(ModelLoadError, match=f"in use by process {os.getpid()}"):
        load(**ssd)
    with pytest.raises(ModelLoadError, match=r"kv_ssd_max_bytes is too small.*at least"):
        load(**ssd, kv_ssd_max_bytes=4096)
    with pytest.raises(ModelLoadError, match=r"kv_host_bytes is too small.*room for one page"):
        load(**ssd, kv_host_bytes=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match=os.strerror(errno.EEXIST)):
        load(kv_ssd_dir=str(tmp_path / "file"))
    load(**ssd).shutdown()  # none of them has kept it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_ssd_max_bytes": 1}, "set kv_ssd_dir as well"),
        ({"kv_host_bytes": 0}, "kv_host_bytes is 0; expected a positive integer"),
        ({"kv_host_bytes": MIB, "enable_prefix_caching": False}, "enable prefix caching"),
        ({"kv_ssd_dir": "x", "enable_prefix_caching": False}, "enable prefix caching"),
    ],
)
def test_options_that_contradict_each_other(
    load: Callable[..., LLM], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NanoFlowError, match=message):
        load(**options)
