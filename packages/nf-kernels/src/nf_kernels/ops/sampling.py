"""Sampling of one token per row, all rows at once."""

import torch
from torch import Tensor


def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
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
    """
    torch.argmax(logits, dim=-1, out=out)
    drawn = temperature > 0
    filtered = drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    for rows, ordered in (
        ((drawn & ~filtered).nonzero().squeeze(1), False),
        (filtered.nonzero().squeeze(1), True),
    ):
        if rows.numel() == 0:
            continue
        scaled = logits[rows] / temperature[rows].unsqueeze(1)
        probabilities = scaled.softmax(dim=-1)
        if ordered:
            probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            probabilities = _filter(probabilities, top_k[rows], top_p[rows], min_p[rows])
            out[rows] = tokens.gather(1, _invert(probabilities, uniform[rows])).squeeze(1)
        else:
            out[rows] = _invert(probabilities, uniform[rows]).squeeze(1)


def _filter(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what the filters drop from probabilities [S, V] in descending order."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    limit = torch.where(top_k > 0, top_k, ordered.shape[1]).unsqueeze(1)
    kept = ordered * (rank < limit)
    # What stands before a token, in units of what top_k left.
    total = kept.sum(dim=-1, keepdim=True)
    before = kept.cumsum(dim=-1) - kept
    kept = kept * ((before < top_p.unsqueeze(1) * total) | (top_p.unsqueeze(1) >= 1))
    return kept * (kept >= min_p.unsqueeze(1) * kept[:, :1])


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index [S, 1] of the first token whose cumulative probability exceeds `uniform` of the sum."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # Strictly below the sum, whatever the rounding: a token of probability 0 is never drawn.
    target = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)
