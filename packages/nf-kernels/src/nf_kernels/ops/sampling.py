"""Sampling of one token per row, all rows at once."""

import torch
from torch import Tensor

_CANDIDATES = 256


def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """Draw one token per row by inverting the distribution function at `uniform`.

    A row of the result depends on that row alone. The filters apply one after the other, as if
    each renormalized: top_k, then top_p, then min_p.

    Args:
        logits: float32 [S, V]; minus infinity forbids a token.
        temperature: float32 [S]; 0 takes the largest logit.
        top_k: int64 [S]; keep the k most likely tokens, 0 keeps all.
        top_p: float32 [S] in (0, 1]; keep the fewest most likely tokens with this probability.
        min_p: float32 [S] in [0, 1]; drop tokens below this share of the most likely one's.
        uniform: float32 [S] in [0, 1).
        out: int64 [S].
        scratch: Memory that other implementations work in.
    """
    torch.argmax(logits, dim=-1, out=out)
    drawn = temperature > 0
    filtered = drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    for rows, draw in (
        ((drawn & ~filtered).nonzero().squeeze(1), _draw),
        (filtered.nonzero().squeeze(1), _draw_filtered),
    ):
        if rows.numel() == 0:
            continue
        chosen = logits[rows]
        # The largest logit becomes 0 first: no temperature, however small, makes infinities.
        chosen -= chosen.amax(dim=-1, keepdim=True)
        probabilities = (chosen / temperature[rows].unsqueeze(1)).softmax(dim=-1)
        out[rows] = draw(probabilities, top_k[rows], top_p[rows], min_p[rows], uniform[rows])


def feed_sampled(*, token_ids: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
    """Write the token that its slot sampled last in place of every token that is not known.

    Args:
        token_ids: int64 [T]; those below 0 are not known, and are written.
        slots: int64 [T], of the request of each row.
        last_sampled: int64 [slots].
    """
    token_ids.copy_(torch.where(token_ids < 0, last_sampled[slots], token_ids))


def keep_sampled(*, sampled: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
    """Write what some slots have sampled to where `feed_sampled` reads it.

    Args:
        sampled: int64 [S].
        slots: int64 [S], each once.
        last_sampled: int64 [slots].
    """
    last_sampled[slots] = sampled


def _draw(
    probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Draw from all tokens; the filters are off."""
    return _invert(probabilities, uniform).squeeze(1)


def _draw_filtered(
    probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Draw from what the filters keep.

    Filters mostly keep a few of many tokens, and the largest few are found ten times faster than
    all are sorted. Whether they are enough is a question that each row answers for itself.
    """
    few, tokens = probabilities.topk(min(_CANDIDATES, probabilities.shape[1]), dim=-1)
    enough = (
        ((top_k > 0) & (top_k <= _CANDIDATES))
        | ((top_k == 0) & (few.cumsum(dim=-1)[:, -1] >= top_p) & (top_p < 1))
        | ((top_p >= 1) & (few[:, -1] < min_p * few[:, 0]))
    )
    kept = _filter(few, top_k, top_p, min_p)
    result = tokens.gather(1, _invert(kept, uniform)).squeeze(1)
    rest = (~enough).nonzero().squeeze(1)
    if rest.numel():
        ordered, tokens = probabilities[rest].sort(dim=-1, descending=True, stable=True)
        kept = _filter(ordered, top_k[rest], top_p[rest], min_p[rest])
        result[rest] = tokens.gather(1, _invert(kept, uniform[rest])).squeeze(1)
    return result


def _filter(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what the filters drop from the largest probabilities [S, n] in descending order."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    limited = (top_k > 0).unsqueeze(1)
    kept = ordered * (~limited | (rank < top_k.unsqueeze(1)))
    # What stands before a token, in units of what top_k left. The order of a sum over the row
    # would depend on the number of rows; that of a cumulative one does not.
    cumulative = kept.cumsum(dim=-1)
    total = torch.where(limited, cumulative[:, -1:], 1.0)
    before = cumulative - kept
    kept = kept * ((before < top_p.unsqueeze(1) * total) | (top_p.unsqueeze(1) >= 1))
    return kept * (kept >= min_p.unsqueeze(1) * kept[:, :1])


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index [S, 1] of the first token whose cumulative probability exceeds `uniform` of the sum."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # Strictly below the sum, whatever the rounding: a token of probability 0 is never drawn.
    target = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    # A row of NaN has no distribution; its token is at least one of the vocabulary.
    return index.clamp_(max=probabilities.shape[1] - 1)
