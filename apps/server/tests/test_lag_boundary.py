"""Where answers end, over HTTP: the same with and without running ahead, counted to the token.

The engine that runs ahead sees an end one iteration late, and hears of a stop string, which is
found outside of it, later still. Nothing of what it has made by then is shown or counted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from nf_runtime.tokenizer import Tokenizer

DEMO_MODEL = Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo"
TOKENIZER = Tokenizer(DEMO_MODEL)
VOCAB_SIZE = TOKENIZER.backend.get_vocab_size()
PROMPT = "def fibonacci(n):"
CONTEXT = 1024
LENGTH = 32
GREEDY = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 0}
SAMPLED = GREEDY | {"temperature": 0.9, "seed": 5, "n": 3}
FIRST_TOKEN = 0  # of the vocabulary: the end of sequence


class Server:
    """A live server and one client of it, for many requests from many threads."""

    def __init__(self, live: Any) -> None:
        self.live = live
        self.client = httpx.Client(base_url=live.url, timeout=120)

    def ask(self, fields: dict[str, Any], request_id: str = "", stream: bool = False) -> Answer:
        """Send one completion, or a chat if it has messages."""
        route = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        if stream:
            fields = fields | {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"x-request-id": request_id} if request_id else {}
        response = self.client.post(route, json=fields, headers=headers)
        assert response.status_code == 200, response.text
        if not stream:
            body = response.json()
            return Answer.from_choices(body["choices"], body["usage"])
        *frames, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        parts = [json.loads(frame.removeprefix("data: ")) for frame in frames]
        choices = [choice for part in parts for choice in part["choices"]]
        return Answer.from_choices(choices, parts[-1]["usage"])

    def log_line(self, request_id: str) -> str:
        """The line that the server wrote about a request."""
        lines = self.live.log().splitlines()
        return next(line for line in lines if f"request={request_id} " in line)


@dataclass
class Choice:
    """A choice as a client puts it together."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Answer:
    """What a client has of a request at its end."""

    choices: list[Choice]
    usage: dict[str, int]

    @classmethod
    def from_choices(cls, parts: list[dict[str, Any]], usage: dict[str, Any]) -> Answer:
        """Put parts of choices together, however many there are of each."""
        choices: dict[int, Choice] = {}
        for part in parts:
            choice = choices.setdefault(part["index"], Choice())
            assert choice.finish_reason is None, "something came after the end"
            message = part.get("message") or part.get("delta") or {}
            choice.text += part.get("text") or message.get("content") or ""
            listed = part["logprobs"] or {}
            choice.tokens += listed.get("tokens", ())
            choice.tokens += [token["token"] for token in listed.get("content", ())]
            choice.finish_reason = part["finish_reason"]
        usage = {name: count for name, count in usage.items() if name.endswith("_tokens")}
        return cls([choices[index] for index in sorted(choices)], usage)


@dataclass
class Case:
    """A request and the answer that it has to get, wherever it runs."""

    fields: dict[str, Any]
    choices: list[Choice]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        """All tokens up to those that ended the choices, these included."""
        return sum(len(choice.tokens) for choice in self.choices)

    def check(self, answer: Answer) -> None:
        """Compare an answer with what it has to be."""
        assert answer.choices == self.choices
        assert answer.usage == {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Whole:
    """An answer that nothing stops, and what is to become of it when something does."""

    def __init__(self, server: Server, fields: dict[str, Any]) -> None:
        self.fields = fields
        answer = server.ask(fields)
        self.prompt_tokens = answer.usage["prompt_tokens"]
        self.choices = [choice.tokens for choice in answer.choices]
        for choice in answer.choices:
            assert "".join(choice.tokens) == choice.text, "choose another prompt or seed"
            assert len(choice.tokens) == LENGTH

    @property
    def tokens(self) -> list[str]:
        """Of the first choice."""
        return self.choices[0]

    def pair(self, start: int) -> str:
        """Two tokens from `start` on that have not come before and are in no token."""
        for i in range(start, LENGTH - 1):
            text = self.tokens[i] + self.tokens[i + 1]
            inside = any(text in token for token in self.tokens)
            if not inside and self.end([text]) == i + 2:
                return text
        raise AssertionError("the answer has no two tokens to stop at; choose another prompt")

    def end(self, stops: list[str], least: int = 0) -> int:
        """How many tokens the first choice has when one of `stops` ends it."""
        return len(_stopped(self.tokens, stops, least, LENGTH, False).tokens)

    def stopped(self, *stops: str, **fields: Any) -> Case:
        """The case of stop strings, and of more fields."""
        fields = self.fields | {"stop": list(stops)} | fields
        choices = [
            _stopped(
                tokens,
                list(stops),
                fields.get("min_tokens", 0),
                fields["max_tokens"],
                fields.get("include_stop_str_in_output", False),
            )
            for tokens in self.choices
        ]
        return Case(fields, choices, self.prompt_tokens)

    def stopped_at_id(self, at: int, **fields: Any) -> Case:
        """The case of the first token from `at` on that has not come before, as a stop id."""
        at = next(i for i in range(at, LENGTH) if self.tokens[i] not in self.tokens[:i])
        ids = [i for i in range(VOCAB_SIZE) if TOKENIZER.token_text(i) == self.tokens[at]]
        fields = self.fields | {"stop_token_ids": ids} | fields
        shown = at + bool(fields.get("include_stop_str_in_output"))
        text = "".join(self.tokens[:shown])
        return Case(fields, [Choice(text, self.tokens[: at + 1], "stop")], self.prompt_tokens)


def _stopped(tokens: list[str], stops: list[str], least: int, most: int, keep: bool) -> Choice:
    """What remains of an answer: by brute force over all its texts."""
    text = ""
    for count, token in enumerate(tokens[:most], start=1):
        before, text = len(text), text + token
        found = [
            (at, stop)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        ]
        if found and count > least:
            at, stop = min(found)
            return Choice(text[: at + len(stop) * keep], tokens[:count], "stop")
    return Choice(text, tokens[:most], "length")


def _ended_by_eos(whole: Whole, count: int) -> Case:
    """The end of sequence as the likeliest token everywhere, from `count` on."""
    fields = {"logit_bias": {"0": 100}, "ignore_eos": False, "min_tokens": count - 1}
    fields = whole.fields | fields
    eos = TOKENIZER.decode([FIRST_TOKEN], skip_special_tokens=False)
    kept = whole.tokens[: count - 1]
    return Case(fields, [Choice("".join(kept), [*kept, eos], "stop")], whole.prompt_tokens)


CASES: dict[str, Callable[[Whole], Case]] = {
    "one token": lambda whole: whole.stopped(whole.tokens[5]),
    "one token, kept": lambda whole: whole.stopped(
        whole.tokens[5], include_stop_str_in_output=True
    ),
    "the first token": lambda whole: whole.stopped(whole.tokens[0]),
    "within a token": lambda whole: whole.stopped(whole.tokens[5][1:-1]),
    "two tokens": lambda whole: whole.stopped(whole.pair(6)),
    "two tokens, kept": lambda whole: whole.stopped(whole.pair(6), include_stop_str_in_output=True),
    "the first two tokens": lambda whole: whole.stopped(whole.tokens[0] + whole.tokens[1]),
    "over a page": lambda whole: whole.stopped(whole.pair(14)),
    "two strings": lambda whole: whole.stopped(whole.pair(9), whole.pair(6)),
    "at max_tokens": lambda whole: whole.stopped(
        whole.pair(6), max_tokens=whole.end([whole.pair(6)])
    ),
    "one token, at max_tokens": lambda whole: whole.stopped(
        whole.tokens[5], max_tokens=whole.end([whole.tokens[5]])
    ),
    "max_tokens within it": lambda whole: whole.stopped(
        whole.pair(6), max_tokens=whole.end([whole.pair(6)]) - 1
    ),
    "max_tokens and one more": lambda whole: whole.stopped(
        whole.pair(6), max_tokens=whole.end([whole.pair(6)]) + 1
    ),
    "min_tokens within it": lambda whole: whole.stopped(
        whole.pair(6), min_tokens=whole.end([whole.pair(6)]) - 1
    ),
    "min_tokens at its end": lambda whole: whole.stopped(
        whole.pair(6), min_tokens=whole.end([whole.pair(6)])
    ),
    "never": lambda whole: whole.stopped("\u0001", whole.tokens[LENGTH - 1] + "\u0001"),
    "stop id": lambda whole: whole.stopped_at_id(4),
    "stop id, kept": lambda whole: whole.stopped_at_id(4, include_stop_str_in_output=True),
    "stop id first": lambda whole: whole.stopped_at_id(0),
    "eos first": lambda whole: _ended_by_eos(whole, 1),
    "eos": lambda whole: _ended_by_eos(whole, 8),
    "max_tokens 1": lambda whole: whole.stopped(max_tokens=1),
    "max_tokens 2": lambda whole: whole.stopped(max_tokens=2),
}
SEVERAL: dict[str, Callable[[Whole], Case]] = {
    "n, one stops": lambda whole: whole.stopped(whole.choices[0][3] + whole.choices[0][4]),
    "n, all stop": lambda whole: whole.stopped(
        *(tokens[2 + 3 * i] + tokens[3 + 3 * i] for i, tokens in enumerate(whole.choices))
    ),
    "n, kept": lambda whole: whole.stopped(
        whole.choices[1][6], include_stop_str_in_output=True, max_tokens=20
    ),
    "n, max_tokens 1": lambda whole: whole.stopped(max_tokens=1),
}


@pytest.fixture(scope="module")
def servers(live: Any, live_without_lag: Any) -> Iterator[dict[str, Server]]:
    both = {"ahead": Server(live), "waiting": Server(live_without_lag)}
    yield both
    for server in both.values():
        server.client.close()


@pytest.fixture(scope="module")
def cases(servers: dict[str, Server]) -> dict[str, Case]:
    """All cases, made of what the server without a lag answers when nothing stops it."""
    one = Whole(servers["waiting"], GREEDY | {"prompt": PROMPT})
    several = Whole(servers["waiting"], SAMPLED | {"prompt": PROMPT})
    made = {name: make(one) for name, make in CASES.items()}
    made |= {name: make(several) for name, make in SEVERAL.items()}
    ids = [5 + i % 7 for i in range(CONTEXT)]
    for length in (CONTEXT - 9, CONTEXT - 1):
        room = CONTEXT - length
        fields = GREEDY | {"prompt": ids[:length], "max_tokens": room}
        whole = servers["waiting"].ask(fields)
        case = Case(fields, whole.choices, length)
        assert [choice.finish_reason for choice in whole.choices] == ["length"]
        assert case.completion_tokens == room
        made[f"context end, {room} left"] = case
        open_end = {name: value for name, value in fields.items() if name != "max_tokens"}
        made[f"context end, {room} left, no max_tokens"] = Case(open_end, whole.choices, length)
    return made


def gained(server: Server, *names: str) -> Callable[[], list[float]]:
    """By how much metrics have grown since this was called."""
    before = [server.live.metric(name) for name in names]
    return lambda: [server.live.metric(name) - old for name, old in zip(names, before, strict=True)]


def test_what_the_cases_are(cases: dict[str, Case]) -> None:
    """That they are what their names say; a model that talks otherwise must not weaken them."""
    ends = {name: [choice.finish_reason for choice in case.choices] for name, case in cases.items()}
    counts = {name: case.completion_tokens for name, case in cases.items()}
    assert ends["two tokens"] == ends["at max_tokens"] == ends["min_tokens within it"] == ["stop"]
    assert counts["at max_tokens"] == counts["two tokens"] == counts["min_tokens within it"]
    assert ends["max_tokens within it"] == ["length"]
    assert counts["max_tokens within it"] == counts["two tokens"] - 1
    assert counts["min_tokens at its end"] > counts["two tokens"]
    assert (ends["never"], counts["never"]) == (["length"], LENGTH)
    assert (counts["the first token"], counts["the first two tokens"]) == (1, 2)
    assert set(ends["n, one stops"]) == {"stop", "length"}
    assert ends["n, all stop"] == ["stop"] * 3
    assert len({len(choice.tokens) for choice in cases["n, all stop"].choices}) > 1
    assert counts["over a page"] > 16


@pytest.mark.parametrize("mode", ["ahead", "waiting"])
def test_alone(servers: dict[str, Server], cases: dict[str, Case], mode: str) -> None:
    """Whole and in a stream; the log line and the metrics count as the client does."""
    server = servers[mode]
    grown = gained(
        server,
        "nanoflow_generation_tokens_total",
        "nanoflow_prompt_tokens_total",
        'nanoflow_requests_total{outcome="stop"}',
        'nanoflow_requests_total{outcome="length"}',
        "nanoflow_iterations_ahead_total",
    )
    for name, case in cases.items():
        for stream in (False, True):
            request_id = f"{name}-{stream}".replace(" ", "_")
            case.check(server.ask(case.fields, request_id, stream))
            line = server.log_line(request_id)
            length = any(choice.finish_reason == "length" for choice in case.choices)
            assert f"outcome={'length' if length else 'stop'} " in line
            assert f"prompt={case.prompt_tokens} " in line
            assert f"output={case.completion_tokens} " in line
    *counted, ahead = grown()
    lengths = sum(
        any(choice.finish_reason == "length" for choice in case.choices) for case in cases.values()
    )
    assert counted == [
        2 * sum(case.completion_tokens for case in cases.values()),
        2 * sum(case.prompt_tokens for case in cases.values()),
        2 * (len(cases) - lengths),
        2 * lengths,
    ]
    assert (ahead > 100) == (mode == "ahead")
    assert mode == "ahead" or server.live.metric("nanoflow_iterations_ahead_total") == 0


@pytest.mark.parametrize("mode", ["ahead", "waiting"])
def test_beside_others(servers: dict[str, Server], cases: dict[str, Case], mode: str) -> None:
    """All at once, whole and in streams, while others go on."""
    server = servers[mode]
    long = {"prompt": "import os\n", "max_tokens": 300, "ignore_eos": True, "temperature": 0.8}
    others = [threading.Thread(target=server.ask, args=(long, "", s)) for s in (False, True)]
    grown = gained(server, "nanoflow_iterations_total", "nanoflow_iteration_tokens_total")
    for thread in others:
        thread.start()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            (case, pool.submit(server.ask, case.fields, "", stream))
            for case in cases.values()
            for stream in (False, True)
        ]
        for case, answer in asked:
            case.check(answer.result())
    for thread in others:
        thread.join()
    iterations, tokens = grown()
    assert tokens > 2 * iterations  # they were computed together


def test_what_was_computed_ahead_of_a_stop_string_is_dropped(
    servers: dict[str, Server], cases: dict[str, Case], wait_until: Any
) -> None:
    """There is such a token, always: the case is not met by being lucky."""
    server, case = servers["ahead"], cases["two tokens"]
    wait_until(lambda: server.live.metric("nanoflow_requests_running") == 0, 5, "not idle")
    grown = gained(server, "nanoflow_iterations_total", "nanoflow_generation_tokens_total")
    case.check(server.ask(case.fields))
    iterations, counted = grown()
    assert iterations > counted == case.completion_tokens


@pytest.mark.parametrize("mode", ["ahead", "waiting"])
def test_chats_end_alike(servers: dict[str, Server], mode: str) -> None:
    """A stop string, and the end of the context when no limit was given."""
    messages = [{"role": "user", "content": "class Stack:\n"}]
    fields = {name: GREEDY[name] for name in ("temperature", "max_tokens", "ignore_eos")}
    whole = Whole(servers["waiting"], fields | {"messages": messages, "logprobs": True})
    case = whole.stopped(whole.pair(6))
    content = "x = 1\n" * 260
    while len(TOKENIZER.apply_chat_template([{"role": "user", "content": content}])) >= CONTEXT:
        content = content.removesuffix("x = 1\n")
    filled = [{"role": "user", "content": content}]
    prompt_tokens = len(TOKENIZER.apply_chat_template(filled))
    assert CONTEXT - 10 < prompt_tokens < CONTEXT
    for stream in (False, True):
        case.check(servers[mode].ask(case.fields, "", stream))
        answer = servers[mode].ask(
            {"messages": filled, "temperature": 0, "ignore_eos": True, "logprobs": True}, "", stream
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "length"
        assert len(choice.tokens) == answer.usage["completion_tokens"] == CONTEXT - prompt_tokens
        assert answer.usage["prompt_tokens"] == prompt_tokens
        assert answer.usage["total_tokens"] == CONTEXT
