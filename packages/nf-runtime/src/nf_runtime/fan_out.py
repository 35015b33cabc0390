"""From a prompt to the sequences that answer it. Torch-free."""

from dataclasses import replace

from nf_runtime.engine_types import EngineRequest, RequestOptions
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.seeds import choice_seeds


def fan_out(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    options: RequestOptions,
    *,
    engine_seed: int,
    number: int,
) -> list[EngineRequest]:
    """One engine request for each of `params.n` answers; all but the first share its prompt's KV.

    Args:
        request_id: Of the request; the answers are named after it.
        prompt_token_ids: The prompt.
        params: How tokens are chosen.
        options: When and next to whom it runs.
        engine_seed: Seed of the engine, for requests without one.
        number: Which request of the engine, for requests without a seed.
    """
    seeds = choice_seeds(params, engine_seed, number)
    first = EngineRequest(f"{request_id}.0", prompt_token_ids, params, seeds[0], options)
    # What is asked of the prompt is answered once.
    of_others = replace(params, prompt_logprobs=None)
    return [first] + [
        EngineRequest(
            f"{request_id}.{index}", prompt_token_ids, of_others, seed, options, first.request_id
        )
        for index, seed in enumerate(seeds[1:], start=1)
    ]
