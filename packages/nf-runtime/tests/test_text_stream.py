"""Text comes out of tokens whole: no half characters, and never a part of a stop string."""

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_runtime.text_stream import TextStream
from nf_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
TOKENIZER = Tokenizer(DEMO)
SPECIAL = TOKENIZER.eos_token_id
VOCAB_SIZE = TOKENIZER.backend.get_vocab_size()

# Characters of one to four bytes, some of which only make sense together.
PIECES = st.sampled_from(
    [
        "a",
        " b",
        "\n",
        "é",
        "e\u0301",
        "ß",
        "語",
        "模型",
        "한",
        "🎉",
        "👩‍👩‍👧",
        "🇯🇵",
        "\u200d",
        "Ω",
        "\x00",
    ]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=20).filter(
    lambda text: "\ufffd" not in text
)
# Half of them are single bytes in a byte-level vocabulary: most sequences are no valid text.
TOKENS = st.lists(st.integers(0, 300) | st.integers(0, VOCAB_SIZE - 1), max_size=30)


def stream(prompt: list[int] | None = None, **options: object) -> TextStream:
    return TextStream(TOKENIZER, prompt or [], **({"stop": []} | options))  # type: ignore[arg-type]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def splits(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    return [
        [text[a:b] for a, b in pairwise((0, *cuts, len(text)))]
        for mask in range(2 ** (len(text) - 1))
        for cuts in [[i for i in range(1, len(text)) if mask >> (i - 1) & 1]]
    ]


@given(text=TEXTS, at=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_text_comes_out_as_it_went_in(text: str, at: float) -> None:
    """Wherever the prompt ends, even within a character, which the answer then completes."""
    ids = encode(text)
    cut = round(at * len(ids))
    answer = stream(ids[:cut])
    pieces = [answer.push(token) for token in ids[cut:]]
    before = TOKENIZER.decode(ids[:cut]).rstrip("\ufffd")
    assert before + "".join(pieces) + answer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(ids=TOKENS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_give_the_text_of_the_whole(ids: list[int], skip: bool) -> None:
    """A sequence that is no text shows its damage where it is; an unfinished end is left out."""
    answer = stream(skip_special_tokens=skip)
    pieces = [answer.push(token) for token in ids]
    text = "".join(pieces) + answer.finish()
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}


def test_every_text_is_given_as_soon_as_it_is_certain() -> None:
    text = "def f(x):\n    return x"
    answer = stream(encode("# a\n"))
    for token in encode(text):
        assert answer.push(token) == TOKENIZER.decode([token])


def test_special_tokens_are_left_out_or_shown() -> None:
    assert SPECIAL is not None
    hidden, shown = stream(), stream(skip_special_tokens=False)
    assert hidden.push(SPECIAL) == ""
    assert shown.push(SPECIAL) == TOKENIZER.decode([SPECIAL], skip_special_tokens=False) != ""


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("pieces", splits("b<end>c"), ids="|".join)
def test_a_stop_string_is_found_across_tokens(pieces: list[str], include: bool) -> None:
    answer = stream(encode("a"), stop=["<end>"], include_stop=include)
    given = []
    for token in [token for piece in ["a", *pieces] for token in encode(piece)]:
        given.append(answer.push(token))
        if answer.stopped_by:
            break
        assert "<" not in "".join(given)  # nothing of what may become the stop string
    assert answer.stopped_by == "<end>"
    assert "".join(given) + answer.finish() == ("ab<end>" if include else "ab")


ONE_TOKEN = [ids[0] for ids in map(encode, ("a", "b", "ab", "ba", "aa", "c")) if len(ids) == 1]
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(
    ids=st.lists(st.sampled_from(ONE_TOKEN), max_size=20),
    stops=STOPS,
    include=st.booleans(),
    minimum=st.just(0) | st.integers(1, 8),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_that_overlap(
    ids: list[int], stops: list[str], include: bool, minimum: int
) -> None:
    """The first to begin wins, of those that a token completes; held text is never longer than one.

    Up to the minimum, what is completed does not count.
    """
    answer = stream(stop=stops, include_stop=include)
    given, seen, expected, stopped_by = "", "", None, None
    for count, token in enumerate(ids, start=1):
        before, seen = len(seen), seen + TOKENIZER.decode([token])
        given += answer.push(token, check_stop=count > minimum)
        found = [
            (at, stop)
            for stop in stops
            for at in range(len(seen))
            if seen.startswith(stop, at) and at + len(stop) > before
        ]
        if found and count > minimum:
            at, stopped_by = min(found)
            expected = seen[: at + len(stopped_by)] if include else seen[:at]
            break
        assert seen.startswith(given)
        assert len(seen) - len(given) < max(map(len, stops))
    assert answer.stopped_by == stopped_by
    given += answer.finish()
    assert given == (seen if expected is None else expected)


def test_text_held_back_is_given_when_it_is_no_stop_string() -> None:
    answer = stream(stop=["<end>"])
    assert [answer.push(encode(c)[0]) for c in "a<enx"] == ["a", "", "", "", "<enx"]


def test_text_held_back_is_given_at_the_end() -> None:
    answer = stream(stop=["<end>"])
    assert "".join(answer.push(encode(c)[0]) for c in "a<en") == "a"
    assert answer.finish() == "<en"
    assert answer.finish() == ""


def test_nothing_stops_before_the_minimum() -> None:
    answer = stream(stop=["b"])
    tokens = [encode(c)[0] for c in "abab"]
    assert [answer.push(t, check_stop=False) for t in tokens[:2]] == ["a", "b"]
    assert answer.stopped_by is None
    assert [answer.push(t) for t in tokens[2:]] == ["a", ""]
    assert answer.stopped_by == "b"


def test_a_stop_string_may_begin_before_the_minimum() -> None:
    """But one that is complete by then stops nothing, though it may be held back as a beginning."""
    a, b, x = (encode(c)[0] for c in "abx")
    answer = stream(stop=["ab"])
    assert [answer.push(a, check_stop=False), answer.push(b)] == ["", ""]
    assert answer.stopped_by == "ab"
    answer = stream(stop=["ab", "abab"])
    assert [answer.push(t, check_stop=False) for t in (a, b)] == ["", ""]
    assert answer.push(x) == "abx"
    assert answer.stopped_by is None


def test_encoding_holds_up_no_other_thread() -> None:
    """A long prompt is encoded beside the event loop; it must not stop it."""
    text = "x = 1\n" * 200_000
    pauses = [0.0]
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            started = time.monotonic()
            time.sleep(0.001)
            pauses.append(time.monotonic() - started)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    ids = encode(text)
    took = time.monotonic() - started
    done.set()
    thread.join()
    assert max(pauses) < took / 2
    assert TOKENIZER.decode(ids) == text
