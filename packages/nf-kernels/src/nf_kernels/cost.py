"""What an operation asks of a device, as functions of its shapes. Imports without torch.

Costs are those of one device: under tensor parallelism the shapes are those of its shard. They
are exact integers and follow these conventions.

- *FLOPs*: an addition, multiplication, division, exponential or root of an element is one; a
  product of matrices [m, k] and [k, n] is 2·m·k·n. Not counted: comparisons, indices, and what is
  computed once per row or head (its mean square, its maximum). Attention counts its two products
  alone, as is customary: no softmax, scale or soft cap.
- *Bytes moved*: the traffic with device memory that no implementation can avoid: each operand is
  read once and each result written once. What a fused operation keeps to itself moves nothing.
  Of a table only the rows in use are read, of a KV cache only the tokens that are seen.
- *Bytes sent*: what the busiest rank sends over its link, one way, in a bandwidth-optimal
  collective (a ring; Patarasuk and Yuan, 2009): (N−1)/N of the whole tensor for all-gather and
  reduce-scatter, twice that for all-reduce. Over N ranks and L layers with two all-reduces each
  that is 4·(N−1)·B·D·S·L, for B tokens of D elements of S bytes (NanoFlow, arXiv 2408.12757).

`rows` are tokens; `element_bytes` is the size of an element of activations, weights and KV cache.
Indices are int64 and what is always float32 has 4 bytes, as in `nf_kernels.ops.reference`. An
operation on zero rows is legal, reads no weights either, and costs nothing. Every function raises
ValueError for a size that is negative, and for a zero where an operation cannot have one.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec


class Category(StrEnum):
    """The resource an operation saturates when it runs alone."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


CATEGORIES: dict[str, Category] = {
    "embedding": Category.MEMORY,
    "rms_norm": Category.MEMORY,
    "linear": Category.COMPUTE,
    "rope_append": Category.MEMORY,
    "prefill_attention": Category.COMPUTE,
    "decode_attention": Category.MEMORY,
    "merge_attention": Category.MEMORY,
    "swiglu": Category.MEMORY,
    "moe_route": Category.MEMORY,
    "moe_experts": Category.COMPUTE,
    "gather_rows": Category.MEMORY,
    "sample": Category.MEMORY,
    "feed_sampled": Category.MEMORY,
    "keep_sampled": Category.MEMORY,
    "all_reduce": Category.NETWORK,
    "all_gather": Category.NETWORK,
    "reduce_scatter": Category.NETWORK,
}
"""Category of every operation by its name: those in `nf_kernels.ops`, and the collectives."""


def _integer(name: str, value: Any, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected an integer") from None
    if number < least:
        raise ValueError(f"{name} is {number}; expected at least {least}")
    return number


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operation, or several together, ask of one device.

    Costs add up, and `cost * n` is n times the same work.

    Attributes:
        flops: Floating-point operations.
        bytes_moved: Bytes read from and written to device memory.
        bytes_sent: Bytes sent to other ranks, one way.

    Raises:
        ValueError: A number, or the factor of a multiplication, is negative.
    """

    flops: int
    bytes_moved: int
    bytes_sent: int

    def __post_init__(self) -> None:
        for name in ("flops", "bytes_moved", "bytes_sent"):
            _integer(name, getattr(self, name))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.bytes_sent + other.bytes_sent,
        )

    def __mul__(self, factor: int) -> "Cost":
        factor = _integer("factor", factor)
        return Cost(self.flops * factor, self.bytes_moved * factor, self.bytes_sent * factor)

    __rmul__ = __mul__


_NOTHING = Cost(0, 0, 0)
_MAY_BE_ZERO = frozenset({"rows", "elements", "experts_touched", "window"})
_LISTS = frozenset({"sequences", "seq_lens"})
_INDEX_BYTES = 8
_FLOAT32_BYTES = 4
_P = ParamSpec("_P")
_costs: dict[str, Callable[..., Cost]] = {}

COSTS: Mapping[str, Callable[..., Cost]] = MappingProxyType(_costs)
"""Cost function of every operation of `CATEGORIES`, by its name."""


def _operation(function: Callable[_P, Cost]) -> Callable[_P, Cost]:
    """Enter a function in `COSTS`; refuse impossible sizes, take integers of any type.

    Sizes often come from numpy, whose integers would overflow without a word.
    """

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> Cost:
        for name, value in kwargs.items():
            if name not in _LISTS and not isinstance(value, bool):
                kwargs[name] = _integer(name, value, 0 if name in _MAY_BE_ZERO else 1)
        return function(*args, **kwargs)

    _costs[function.__name__] = checked
    return checked


@_operation
def embedding(*, rows: int, features: int, element_bytes: int) -> Cost:
    """Look up `rows` rows of a table [vocabulary, features]; a row is read each time it is used."""
    return gather_rows(rows=rows, features=features, element_bytes=element_bytes)


@_operation
def gather_rows(*, rows: int, features: int, element_bytes: int) -> Cost:
    """Copy `rows` rows of `features` elements, found by their indices."""
    return Cost(0, rows * (2 * features * element_bytes + _INDEX_BYTES), 0)


@_operation
def rms_norm(*, rows: int, features: int, element_bytes: int, residual: bool = False) -> Cost:
    """Normalize x [rows, features] and scale it by weight [features].

    Four FLOPs per element: square, sum, two factors. With `residual`, x is first added to
    residual [rows, features], which is written back.
    """
    if not rows:
        return _NOTHING
    elements = rows * features
    moved = (4 if residual else 2) * elements + features
    return Cost((5 if residual else 4) * elements, moved * element_bytes, 0)


@_operation
def linear(
    *,
    rows: int,
    in_features: int,
    out_features: int,
    element_bytes: int,
    bias: bool = False,
    residual: bool = False,
    float_out: bool = False,
) -> Cost:
    """Multiply x [rows, in_features] by weight [out_features, in_features].

    `bias` [out_features] and `residual` [rows, out_features] are read and added where they are
    True; the result has `element_bytes`, too, or is float32. The logits of selected rows are this
    operation on those rows, to float32.
    """
    if not rows:
        return _NOTHING
    outputs = rows * out_features
    weights = (in_features + bias) * out_features
    reads = weights + rows * in_features + residual * outputs
    flops = (2 * in_features + bias + residual) * outputs
    written = outputs * (_FLOAT32_BYTES if float_out else element_bytes)
    return Cost(flops, reads * element_bytes + written, 0)


@_operation
def rope_append(
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
    qk_norm: bool = False,
) -> Cost:
    """Split qkv [rows, (heads + 2·kv_heads)·head_dim], rotate Q and K, append K and V to pages.

    Three FLOPs per element of Q and K: a rotated pair takes four products and two sums. With
    `qk_norm` four more as in `rms_norm`, and two weights [head_dim] are read. For each token its
    position, its slot and a row of float32 cosines and sines are read.
    """
    if not rows:
        return _NOTHING
    rotated = rows * (heads + kv_heads) * head_dim
    moved = 2 * rows * (heads + 2 * kv_heads) * head_dim + (2 * head_dim if qk_norm else 0)
    row_bytes = head_dim * _FLOAT32_BYTES + 2 * _INDEX_BYTES
    return Cost((7 if qk_norm else 3) * rotated, moved * element_bytes + rows * row_bytes, 0)


@_operation
def prefill_attention(
    *,
    sequences: Iterable[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
    window: int = 0,
    causal: bool = True,
    lse: bool = False,
) -> Cost:
    """Attention of the last tokens of some sequences over their pages.

    4·head_dim FLOPs for each head and each pair of a query and a key it sees. K and V are read
    once for each sequence, from the first token that any of its queries sees. Page tables and
    lengths, a few bytes for each page, are not counted.

    Args:
        sequences: (queries, tokens in pages, the queries' own included) of each sequence.
        heads: Query heads; a multiple of `kv_heads`.
        kv_heads: Heads of K and of V.
        head_dim: Elements of a head.
        element_bytes: Bytes of an element of Q, K, V and the result.
        window: Keys a query sees, itself included; 0 means all.
        causal: False counts the full square of every query with every key of its sequence, the
            work of a kernel that skips nothing; `window` must then be 0.
        lse: The float32 logarithm of each query's and head's sum is written, too.

    Raises:
        ValueError: A sequence has more queries than tokens, `heads` is no multiple of `kv_heads`,
            or there is a `window` in a full square.
    """
    if heads % kv_heads:
        raise ValueError(f"heads is {heads}; expected a multiple of kv_heads, which is {kv_heads}")
    if window and not causal:
        raise ValueError(f"window is {window} with causal=False; expected 0 for the full square")
    queries = keys = pairs = 0
    for index, lengths in enumerate(sequences):
        query_len, seq_len = (_integer(f"sequences[{index}]", length) for length in lengths)
        if query_len > seq_len:
            raise ValueError(
                f"sequences[{index}] is ({query_len}, {seq_len}); expected the number of queries, "
                f"then that of all tokens, the queries' own included"
            )
        queries += query_len
        keys += _keys_seen(query_len, seq_len, window)
        pairs += _pairs(query_len, seq_len, window) if causal else query_len * seq_len
    moved = 2 * (queries * heads + keys * kv_heads) * head_dim
    lse_bytes = queries * heads * _FLOAT32_BYTES if lse else 0
    return Cost(4 * pairs * heads * head_dim, moved * element_bytes + lse_bytes, 0)


def _keys_seen(query_len: int, seq_len: int, window: int) -> int:
    """Keys that at least one of the last `query_len` tokens sees."""
    if not query_len:
        return 0
    return min(seq_len, query_len - 1 + window) if window else seq_len


def _pairs(query_len: int, seq_len: int, window: int) -> int:
    """Pairs of one of the last `query_len` tokens and a key that it sees, itself included."""
    most = min(window, seq_len) if window else seq_len
    first = seq_len - query_len + 1
    # Query by query, the first ones see `short` keys fewer than the most, one less than that, …, 1.
    short = max(0, most - first)
    return query_len * most - short * (short + 1) // 2


@_operation
def decode_attention(
    *,
    seq_lens: Iterable[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
    window: int = 0,
    lse: bool = False,
) -> Cost:
    """Attention of one token per sequence: `prefill_attention` with one query each.

    `seq_lens` are the tokens in pages of each sequence, its query's own included, so at least 1.
    """
    return prefill_attention(
        sequences=[(1, _integer(f"seq_lens[{i}]", n, 1)) for i, n in enumerate(seq_lens)],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        element_bytes=element_bytes,
        window=window,
        lse=lse,
    )


@_operation
def merge_attention(*, rows: int, heads: int, head_dim: int, element_bytes: int) -> Cost:
    """Merge two attention states, out [rows, heads, head_dim] and float32 lse [rows, heads] each.

    Three FLOPs per element of out: two factors and a sum. Both states are read, and the merged
    one is written with its lse.
    """
    state_bytes = rows * heads * (head_dim * element_bytes + _FLOAT32_BYTES)
    return Cost(3 * rows * heads * head_dim, 3 * state_bytes, 0)


@_operation
def swiglu(*, rows: int, features: int, element_bytes: int) -> Cost:
    """silu(gate)·up of gate_up [rows, 2·features] to out [rows, features].

    Four FLOPs per element of out: an exponential, a sum, a division and a product.
    """
    return Cost(4 * rows * features, 3 * rows * features * element_bytes, 0)


@_operation
def moe_route(
    *, rows: int, experts: int, experts_per_token: int, element_bytes: int, normalize: bool = False
) -> Cost:
    """Choose `experts_per_token` experts of each row of router_logits [rows, experts].

    Four FLOPs per logit, a softmax: difference, exponential, sum, division; with `normalize` a
    sum and a division per chosen expert. Of these, ids (int64) and weights (float32) are written.

    Raises:
        ValueError: `experts_per_token` is more than `experts`.
    """
    if experts_per_token > experts:
        raise ValueError(
            f"experts_per_token is {experts_per_token}; expected at most experts, which is "
            f"{experts}"
        )
    logits, chosen = rows * experts, rows * experts_per_token
    flops = 4 * logits + (2 * chosen if normalize else 0)
    return Cost(flops, logits * element_bytes + chosen * (_INDEX_BYTES + _FLOAT32_BYTES), 0)


@_operation
def moe_experts(
    *,
    rows: int,
    features: int,
    expert_features: int,
    experts_per_token: int,
    experts_touched: int,
    element_bytes: int,
) -> Cost:
    """Weighted sum of the experts of each row of x [rows, features], added to the residual.

    For each choice of an expert the two products, SwiGLU between them, and a factor and a sum per
    element of out. A touched expert's gate_up [2·expert_features, features] and down [features,
    expert_features] are read once; what lies between the products stays inside.

    Args:
        rows: Tokens.
        features: Elements of a row of x, residual and out.
        expert_features: Elements of a row between an expert's two products.
        experts_per_token: Experts of each token, all different.
        experts_touched: Different experts of all tokens together.
        element_bytes: Bytes of an element of activations and expert weights. Ids are int64, the
            weights of the sum float32.

    Raises:
        ValueError: So many tokens cannot touch `experts_touched` experts.
    """
    chosen = rows * experts_per_token
    fewest = experts_per_token if rows else 0
    if not fewest <= experts_touched <= chosen:
        raise ValueError(
            f"experts_touched is {experts_touched}; expected {fewest} to {chosen}, as each of "
            f"{rows} rows has {experts_per_token} different experts"
        )
    flops = chosen * (6 * features * expert_features + 4 * expert_features + 2 * features)
    moved = 3 * experts_touched * features * expert_features + 3 * rows * features
    return Cost(flops, moved * element_bytes + chosen * (_INDEX_BYTES + _FLOAT32_BYTES), 0)


@_operation
def sample(*, rows: int, vocabulary: int) -> Cost:
    """Draw a token for each row of float32 logits [rows, vocabulary].

    Four FLOPs per logit: difference from the largest, division by the temperature, exponential,
    running sum. Five parameters of each row are read (top_k is int64, the others float32) and an
    id is written.
    """
    row_bytes = (vocabulary + 4) * _FLOAT32_BYTES + 2 * _INDEX_BYTES
    return Cost(4 * rows * vocabulary, rows * row_bytes, 0)


@_operation
def feed_sampled(*, rows: int) -> Cost:
    """Replace unknown ids by those sampled last: an id and a slot are read, an id is looked up.

    Every row counts as unknown, and is written.
    """
    return Cost(0, 4 * rows * _INDEX_BYTES, 0)


@_operation
def keep_sampled(*, rows: int) -> Cost:
    """Keep sampled ids by slot: an id and a slot are read, an id is written."""
    return Cost(0, 3 * rows * _INDEX_BYTES, 0)


@_operation
def all_reduce(*, elements: int, element_bytes: int, ranks: int) -> Cost:
    """Sum a tensor of `elements` elements over N ranks; every rank gets the whole sum.

    2·(N−1)/N of the tensor is sent, as in a reduce-scatter and an all-gather that keep what lies
    between them inside; the tensor is read and the sum written. Shards are those of
    `reduce_scatter`.
    """
    half = reduce_scatter(elements=elements, element_bytes=element_bytes, ranks=ranks)
    moved = 2 * elements * element_bytes if ranks > 1 else 0
    return Cost(half.flops, moved, 2 * half.bytes_sent)


@_operation
def all_gather(*, elements: int, element_bytes: int, ranks: int) -> Cost:
    """Join a shard of each of N ranks to a tensor of `elements` elements on every rank.

    (N−1)/N of the tensor is sent; a shard is read and the tensor written. Shards are those of
    `reduce_scatter`.
    """
    mirrored = reduce_scatter(elements=elements, element_bytes=element_bytes, ranks=ranks)
    return Cost(0, mirrored.bytes_moved, mirrored.bytes_sent)


@_operation
def reduce_scatter(*, elements: int, element_bytes: int, ranks: int) -> Cost:
    """Sum a tensor of `elements` elements over N ranks; every rank gets a shard of the sum.

    (N−1)/N of the tensor is sent, with an addition for each element that is; the tensor is read
    and a shard written. Where N does not divide the elements, shards differ by one element and
    the cost is that of the rank with the most to do. A rank alone has nothing to do.
    """
    if ranks == 1:
        return _NOTHING
    smallest, largest = elements // ranks, -(-elements // ranks)
    sent = elements - smallest
    return Cost(sent, (elements + largest) * element_bytes, sent * element_bytes)


def peak_time(
    cost: Cost,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    link_bytes_per_second: float | None = None,
) -> float:
    """Seconds that a device with these rates needs at least: the roofline of the work.

    The longest of the times to compute, to move and to send, each at its full rate (Williams,
    Waterman and Patterson, 2009, with the link as a third resource).

    Args:
        cost: The work.
        flops_per_second: Floating-point operations per second.
        bytes_per_second: Traffic with device memory, reads and writes together.
        link_bytes_per_second: Link to other ranks, one way; None where there is none.

    Raises:
        ValueError: A rate is not positive, or there is something to send and no link.
    """
    if link_bytes_per_second is None and cost.bytes_sent:
        raise ValueError(
            f"link_bytes_per_second is None and the cost has {cost.bytes_sent} bytes to send; "
            f"give the rate of the link, one way"
        )
    seconds = 0.0
    for name, amount, rate in (
        ("flops_per_second", cost.flops, flops_per_second),
        ("bytes_per_second", cost.bytes_moved, bytes_per_second),
        ("link_bytes_per_second", cost.bytes_sent, link_bytes_per_second),
    ):
        if rate is None:
            continue
        if not rate > 0:
            raise ValueError(f"{name} is {rate}; expected a positive rate")
        seconds = max(seconds, amount / rate)
    return seconds
