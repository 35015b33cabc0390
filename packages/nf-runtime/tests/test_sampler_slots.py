"""Parameters belong to a request, not to the slot or the name it had before."""

import numpy as np
import torch

from nf_kernels import ops
from nf_runtime import SamplingParams
from nf_runtime.device_stream import InlineStream
from nf_runtime.sampler import RequestSampling, Sampler
from nf_runtime.staging import StagingBuffer
from nf_scheduler import Batch


def request(temperature: float) -> RequestSampling:
    params = SamplingParams(temperature=temperature, max_tokens=4)
    return RequestSampling(params, 7, np.array([1], dtype=np.int32), frozenset())


def one_decode(name: str, slot: int, position: int) -> Batch:
    """A batch in which one request samples the token at a position."""
    return Batch(
        iteration=0,
        request_ids=[name],
        slots=np.array([slot], dtype=np.int32),
        num_decodes=1,
        query_start=np.array([0, 1], dtype=np.int32),
        context_lens=np.array([position - 1], dtype=np.int32),
        token_ids=np.array([1], dtype=np.int32),
        samples=np.array([True]),
    )


def draw(sampler: Sampler, name: str, slot: int) -> set[int]:
    drawn = set()
    for position in range(1, 61):
        logits = torch.zeros(1, 50)
        logits[0, 3] = 1.0  # what temperature 0 takes, always
        plan = sampler.plan(one_decode(name, slot, position))
        staged = StagingBuffer(torch.device("cpu"))
        staged.fill(plan.arrays)
        out, _ = sampler.sample(logits, plan, staged, InlineStream())
        drawn.add(int(out[0]))
    return drawn


def test_a_name_used_again_in_a_slot_it_had_before_a_preemption() -> None:
    sampler = Sampler(ops.REFERENCE, vocab_size=50, max_requests=2, device=torch.device("cpu"))
    sampler.add("a", request(temperature=0.0))
    assert draw(sampler, "a", slot=0) == {3}
    assert draw(sampler, "a", slot=1) == {3}  # preempted meanwhile
    sampler.remove("a")
    sampler.add("a", request(temperature=1.0))
    assert len(draw(sampler, "a", slot=0)) > 10
