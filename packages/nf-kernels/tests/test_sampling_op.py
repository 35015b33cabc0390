"""`sample` draws from the distribution that temperature and filters leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from nf_kernels import ops, set_num_threads

LAST_UNIFORM = 1 - 2**-24  # the largest float32 below 1
UNIFORMS = st.one_of(st.sampled_from([0.0, 2**-24, 0.5, LAST_UNIFORM]), st.floats(0, LAST_UNIFORM))
quick = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module", autouse=True, params=["native", "reference"])
def operations(request):
    """The set that `draw` uses: both have to pass every test."""
    global OPERATIONS
    OPERATIONS = ops.load("cpu", native=request.param == "native")
    if request.param == "native" and OPERATIONS is ops.REFERENCE:
        pytest.skip("no native kernels")


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    """Sample each row of `logits`; parameters are numbers or one per row."""
    rows = len(logits)

    def column(value, dtype):
        return torch.tensor(np.broadcast_to(value, (rows,)), dtype=dtype)

    out = torch.full((rows,), -1, dtype=torch.int64)
    scratch = torch.empty(
        OPERATIONS.scratch_bytes("sample", vocab_size=logits.shape[1]), dtype=torch.uint8
    )
    OPERATIONS["sample"](
        scratch=scratch,
        logits=logits,
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int64),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        uniform=column(uniform, torch.float32),
        out=out,
    )
    return out


def distribution(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probability of every token, token by token in float64."""
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, mass, kept = weights[order].sum(), 0.0, []
        for token in order:
            kept.append(token)
            mass += weights[token] / total
            if mass >= top_p:
                break
        order = kept
    order = [token for token in order if weights[token] >= min_p * weights[order[0]]]
    result = np.zeros_like(weights)
    result[order] = weights[order] / weights[order].sum()
    return result


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 12, "min_p": 0.2},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(parameters):
    torch.manual_seed(5)
    draws = 20_000
    logits = 1.5 * torch.randn(30)
    logits[[0, 13, 29]] = -torch.inf
    uniform = np.random.default_rng(7).random(draws, dtype=np.float32)
    tokens = draw(logits.expand(draws, -1), **parameters, uniform=uniform)
    counts = np.bincount(tokens.numpy(), minlength=30)
    exact = distribution(logits, **parameters)
    assert not counts[exact == 0].any()
    # Cells with few expected draws are joined, as the test demands.
    order = np.argsort(exact)
    order = order[exact[order] > 0]
    small = np.cumsum(exact[order]) * draws < 20
    observed = np.append(counts[order[~small]], counts[order[small]].sum())
    expected = np.append(exact[order[~small]], exact[order[small]].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-3


@given(
    vocabulary=st.integers(1, 1500),  # more and fewer than the candidates that are looked at first
    spread=st.floats(0.05, 3),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 0, 1, 40, 255, 256, 257, 600]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None)
def test_a_draw_inverts_the_distribution(
    vocabulary, spread, temperature, top_k, top_p, min_p, seed
):
    torch.manual_seed(seed)
    logits = spread * torch.randn(vocabulary)
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    exact = distribution(logits, **parameters)
    # Where float64 itself is undecided about a token, so is the test.
    for sign in (-1, 1):
        near = {
            "top_p": top_p + sign * 1e-5 if top_p < 1 else 1.0,
            "min_p": min_p * (1 + sign * 1e-5),
        }
        assume(np.array_equal(distribution(logits, **parameters | near) > 0, exact > 0))
    if 0 < top_k < vocabulary:
        last, first_left = np.sort(logits.double().numpy())[::-1][top_k - 1 : top_k + 1]
        assume(last - first_left > 1e-5 * temperature)
    uniform = np.random.default_rng(seed).random(50, dtype=np.float32)
    tokens = draw(logits.expand(50, -1), **parameters, uniform=uniform).numpy()
    assert (exact[tokens] > 0).all()
    if top_k > 0 or top_p < 1 or min_p > 0:
        # By falling probability; equal ones, as float32 sees it, in any order.
        below = np.array([exact[exact > p * (1 + 1e-5)].sum() for p in exact])
        up_to = np.array([exact[exact >= p * (1 - 1e-5)].sum() for p in exact])
    else:
        up_to = np.cumsum(exact)
        below = up_to - exact
    assert (below[tokens] <= uniform + 1e-5).all()
    assert (uniform <= up_to[tokens] + 1e-5).all()


@given(st.integers(1, 700), st.floats(0.05, 5), st.integers(0, 2**20), UNIFORMS, st.data())
@quick
def test_a_forbidden_token_is_never_drawn(vocabulary, spread, seed, uniform, data):
    torch.manual_seed(seed)
    logits = 20 * spread * torch.randn(vocabulary)
    forbidden = torch.rand(vocabulary) < data.draw(st.sampled_from([0.05, 0.5, 0.99]))
    forbidden[data.draw(st.integers(0, vocabulary - 1), label="allowed")] = False
    logits[forbidden] = -torch.inf
    parameters = {
        "temperature": data.draw(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 100.0])),
        "top_k": data.draw(st.sampled_from([0, 1, 5, 1000])),
        "top_p": data.draw(st.sampled_from([1e-6, 0.5, 1 - 2**-24, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.3, 1.0])),
    }
    (token,) = draw(logits.unsqueeze(0), **parameters, uniform=uniform).tolist()
    assert 0 <= token < vocabulary
    assert not forbidden[token], parameters


def test_the_ends_of_uniform_reach_the_first_and_the_last_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 0.0, -torch.inf]])
    for parameters in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 0.5}):
        assert draw(logits, **parameters, uniform=0.0).item() == 1
        assert draw(logits, **parameters, uniform=LAST_UNIFORM).item() == 4


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"temperature": 1e-6},
        {"temperature": 1e-40},  # dividing by it overflows
        {"temperature": 1e-40, "top_k": 5},
    ],
    ids=str,
)
def test_what_leaves_one_token_gives_the_most_likely(parameters):
    torch.manual_seed(0)
    logits = 3 * torch.randn(8, 500)
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        assert torch.equal(draw(logits, **parameters, uniform=uniform), logits.argmax(dim=-1))


def test_top_k_keeps_exactly_k_of_equal_tokens():
    uniform = np.linspace(0, LAST_UNIFORM, 200, dtype=np.float32)
    tokens = draw(torch.zeros(200, 10), top_k=4, uniform=uniform)
    assert len(set(tokens.tolist())) == 4


@pytest.mark.parametrize("vocabulary", [11, 40_000])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_row_does_not_depend_on_the_others(vocabulary, threads):
    torch.manual_seed(vocabulary)
    rows = 12
    generator = np.random.default_rng(3)
    logits = 2 * torch.randn(rows, vocabulary)
    parameters = {
        "temperature": np.array([0.0, 1.0, 0.7] * 4),
        "top_k": np.array([0, 0, 5, 0, 0, 0] * 2),
        "top_p": np.array([1.0, 1.0, 1.0, 0.9] * 3),
        "min_p": np.array([0.0] * 11 + [0.01]),
        "uniform": generator.random(rows, dtype=np.float32),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    set_num_threads(threads)
    try:
        together = draw(logits, **parameters)
        order = generator.permutation(rows)
        shuffled = draw(logits[order], **{k: v[order] for k, v in parameters.items()})
        alone = [
            draw(logits[row : row + 1], **{k: v[row] for k, v in parameters.items()}).item()
            for row in range(rows)
        ]
    finally:
        torch.set_num_threads(before)
        set_num_threads(before)
    assert together[order].tolist() == shuffled.tolist()
    assert together.tolist() == alone


def test_logits_are_left_as_they_are():
    logits = torch.randn(4, 20)
    kept = logits.clone()
    draw(logits, temperature=0.8, top_k=3)
    draw(logits, temperature=0.8)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_a_row_without_a_distribution_gives_a_token_and_spoils_no_other(value, top_k):
    logits = torch.zeros(3, 20)
    logits[:, 7] = 50.0
    logits[1] = value
    tokens = draw(logits, top_k=top_k).tolist()
    assert tokens[::2] == [7, 7]
    assert 0 <= tokens[1] < 20


def test_no_rows():
    assert draw(torch.empty(0, 9)).tolist() == []


def test_sampled_tokens_are_fed_to_the_next_iteration():
    last = torch.tensor([10, 11, 12, 13])
    OPERATIONS["keep_sampled"](
        sampled=torch.tensor([77, 88]), slots=torch.tensor([3, 1]), last_sampled=last
    )
    assert last.tolist() == [10, 88, 12, 77]
    token_ids = torch.tensor([5, -1, 6, -1, -1])
    OPERATIONS["feed_sampled"](
        token_ids=token_ids, slots=torch.tensor([0, 3, 1, 0, 1]), last_sampled=last
    )
    assert token_ids.tolist() == [5, 77, 6, 10, 88]
    none = torch.empty(0, dtype=torch.int64)
    OPERATIONS["feed_sampled"](token_ids=none, slots=none, last_sampled=last)
    OPERATIONS["keep_sampled"](sampled=none, slots=none, last_sampled=last)
    assert last.tolist() == [10, 88, 12, 77]
