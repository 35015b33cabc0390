"""Seeds of a request's answers."""

import hashlib

from nf_runtime.sampling_params import SamplingParams


def choice_seeds(params: SamplingParams, engine_seed: int, number: int) -> list[int]:
    """A seed in [0, 2**64) for each of `params.n` answers.

    Args:
        params: Its `seed`, where there is one, decides alone.
        engine_seed: Seed of the engine, for requests without one.
        number: Which request of the engine, for requests without a seed.
    """
    root = f"{params.seed}" if params.seed is not None else f"{engine_seed}/{number}"
    return [
        int.from_bytes(hashlib.blake2b(f"{root}/{i}".encode(), digest_size=8).digest(), "little")
        for i in range(params.n)
    ]
