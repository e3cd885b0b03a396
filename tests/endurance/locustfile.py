"""Users of a server that serves `recall`, for Locust: what they ask, and what they must be answered.

Holds one class per habit; `weight` is how many there are among 24. Must not know how the server is started or what its
metrics must say: that is `tests/server/test_server_load.py`. By hand, against a server on port 8000:

    .venv/bin/locust -f tests/endurance/locustfile.py --headless -u 24 -r 24 -t 30s --host http://127.0.0.1:8000

Every answer is checked: status, shape, text, usage. What is wrong is a failure in Locust's report, so is an exception.
Requests are of the method POST, named after their kind; entries of the method FIRST are the times to the first text.
"""

import contextlib
import itertools
import json
import logging
import random
import time

import requests
from locust import HttpUser, between, task
from locust.exception import ResponseError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG_LEN = 20_000
"""Tokens of a long prompt."""
PAGE_SIZE = 16
ANSWER_TIMEOUT_S = 100
LETTERS = "abcdefghijklmnopqrstuvwxyzäöü€🙂"
"""Some take several tokens; a stream must not cut them."""


class WrongAnswerError(ResponseError):
    """An answer is not what it must be."""


def check(what, got, expected):
    """Both must be equal."""
    if got != expected:
        raise WrongAnswerError(f"{what}: got {got!r:.400}, expected {expected!r:.400}")


def num_bytes(text):
    return len(text.encode())


# -- what `recall` can be asked ----------------------------------------------------------------------------------------


class Boxes:
    """Facts. Their last 16 bytes before the number name the box, so they occur once and the answer is certain."""

    def __init__(self, rng, count):
        self.number_of = dict(
            zip(rng.sample(range(10_000, 100_000), count), rng.sample(range(10**5, 10**6), count), strict=True)
        )
        self.text = "".join(f"The number of box {box} is {number}. " for box, number in self.number_of.items())

    def question(self, rng, among=slice(None)):
        """A question and its answer."""
        box = rng.choice(list(self.number_of)[among])
        return f"Once more: The number of box {box} is ", str(self.number_of[box])


class Song:
    """Letters in an order of its own, again and again: what follows is certain, however long it goes on."""

    def __init__(self, rng):
        self.verse = "".join(rng.sample(LETTERS, len(LETTERS)))
        self.prompt = self.verse * 3

    def goes_on(self, num_letters):
        return "".join(itertools.islice(itertools.cycle(self.verse), num_letters))


SYSTEM = Boxes(random.Random(0), 60)
"""The system prompt that many share, about 2,000 tokens."""


# -- shapes ------------------------------------------------------------------------------------------------------------


def check_head(found, prefix, kind):
    check("model", found["model"], "recall")
    check("object", found["object"], kind)
    check("id", found["id"].startswith(prefix + "-"), True)
    check("created", abs(found["created"] - time.time()) < 600, True)


def check_usage(usage, num_prompt, num_generated, least_cached=0):
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    check(f"{least_cached} <= {cached} cached tokens < {num_prompt}", least_cached <= cached < num_prompt, True)
    check(
        "usage",
        usage,
        {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    )


def events(answer):
    """Chunks of a stream; after the last one comes the end mark, and then nothing."""
    check("status", answer.status_code, 200)
    check("content type", answer.headers["content-type"], "text/event-stream; charset=utf-8")
    ended = False
    for line in answer.iter_lines():
        if not line or line.startswith(b":"):
            continue
        check("text after the end mark", (ended, line), (False, line))
        check("start of an event", line[:6], b"data: ")
        ended = line == b"data: [DONE]"
        if not ended:
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise WrongAnswerError(f"the stream ends with {chunk!r:.400}")
            yield chunk
    check("end mark", ended, True)


class Visitor(HttpUser):
    """What all users have in common."""

    abstract = True
    wait_time = between(0.02, 0.3)
    numbers = itertools.count()

    def on_start(self):
        self.rng = random.Random(next(Visitor.numbers))  # how fast others are does not change what it asks

    @contextlib.contextmanager
    def asking(self, kind, path, body, **options):
        """An answer to check; the request lasts until it was read."""
        started = time.perf_counter()
        with self.client.post(
            path, name=kind, catch_response=True, timeout=ANSWER_TIMEOUT_S, **{"json": body, **options}
        ) as answer:
            try:
                yield answer
                answer.success()
            except (ResponseError, LookupError, TypeError, ValueError, requests.RequestException) as error:
                message = f"{kind}: {type(error).__name__}: {error}; asked {body!r:.1000} {options}"
                logging.getLogger(__name__).error(message)
                answer.failure(message)
            finally:
                answer.request_meta["response_time"] = (time.perf_counter() - started) * 1000
                answer.close()

    def note_first(self, kind, answer):
        """The first text has come."""
        ms = (time.time() - answer.request_meta["start_time"]) * 1000
        self.environment.events.request.fire(
            request_type="FIRST", name=kind, response_time=ms, response_length=0, exception=None, context={}
        )

    def complete(self):
        """A short completion, in one piece."""
        boxes = Boxes(self.rng, self.rng.randint(1, 8))
        question, number = boxes.question(self.rng)
        prompt = boxes.text + question
        body = {"model": "recall", "prompt": prompt, "max_tokens": 20, "temperature": 0, "stop": "."}
        with self.asking("completion", COMPLETIONS, body) as answer:
            check("status", answer.status_code, 200)
            found = answer.json()
            check_head(found, "cmpl", "text_completion")
            check(
                "choices", found["choices"], [{"index": 0, "text": number, "logprobs": None, "finish_reason": "stop"}]
            )
            check_usage(found["usage"], 1 + num_bytes(prompt), len(number) + 1)  # <|bos|>; the stop string


class Completer(Visitor):
    """Completes short prompts."""

    weight = 6

    @task
    def one(self):
        self.complete()


class Singer(Visitor):
    """Streams chats, wants usage, and ends at max_tokens."""

    weight = 6

    @task
    def one(self):
        song = Song(self.rng)
        text = song.goes_on(self.rng.randint(5, 60))
        body = {
            "messages": [{"role": "user", "content": song.prompt}],
            "max_completion_tokens": num_bytes(text),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self.asking("chat stream", CHAT, body, stream=True) as answer:
            deltas, ids, usage = [], set(), None
            for chunk in events(answer):
                check("chunk after usage", usage, None)
                check_head(chunk, "chatcmpl", "chat.completion.chunk")
                ids.add(chunk["id"])
                usage = chunk["usage"]
                if usage is not None:
                    check("choices beside usage", chunk["choices"], [])
                    continue
                (choice,) = chunk["choices"]
                check("choice", (choice["index"], choice["logprobs"]), (0, None))
                if len(deltas) == 1:
                    self.note_first("chat stream", answer)
                deltas.append((choice["delta"], choice["finish_reason"]))
            check("ids", len(ids), 1)
            check("first chunk", deltas[0], ({"role": "assistant", "content": ""}, None))
            check("last chunk", deltas[-1], ({}, "length"))
            check("fields between", {(*delta, reason) for delta, reason in deltas[1:-1]}, {("content", None)})
            check("text", "".join(delta["content"] for delta, _ in deltas[1:-1]), text)
            check_usage(usage, num_bytes(song.prompt), num_bytes(text))


class Colleague(Visitor):
    """Chats about the system prompt that all share."""

    weight = 5
    least_cached = 0

    @task
    def one(self):
        least_cached = Colleague.least_cached
        question, number = SYSTEM.question(self.rng)
        body = {
            "model": "recall",
            "messages": [{"role": "system", "content": SYSTEM.text}, {"role": "user", "content": question}],
            "max_tokens": 20,
            "temperature": 0,
            "stop": ["."],
        }
        with self.asking("shared chat", CHAT, body) as answer:
            check("status", answer.status_code, 200)
            found = answer.json()
            check_head(found, "chatcmpl", "chat.completion")
            message = {"role": "assistant", "content": number, "refusal": None}
            check(
                "choices",
                found["choices"],
                [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            )
            check_usage(found["usage"], num_bytes(SYSTEM.text + question), len(number) + 1, least_cached)
            Colleague.least_cached = num_bytes(SYSTEM.text) - PAGE_SIZE  # for all that are asked from now on


class Leaver(Visitor):
    """Goes in the middle of a stream, now and then before its first text."""

    weight = 4

    @task
    def one(self):
        song = Song(self.rng)
        body = {"prompt": song.prompt, "max_tokens": 50_000, "temperature": 0, "ignore_eos": True, "stream": True}
        with self.asking("leave", COMPLETIONS, body, stream=True) as answer:
            check("status", answer.status_code, 200)
            text = ""
            for chunk in itertools.islice(events(answer), self.rng.choice((0, 1, 2, 5, 20, 40))):
                check_head(chunk, "cmpl", "text_completion")
                (choice,) = chunk["choices"]
                check("finish reason", choice["finish_reason"], None)
                text += choice["text"]
            check("text", text, song.goes_on(len(text)))


BAD = (
    # path, body, options, param, code
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, {}, "max_tokens", None),
    (COMPLETIONS, {"prompt": "a", "temperature": -1, "stream": True}, {}, "temperature", None),
    (COMPLETIONS, {"prompt": "a", "beams": 3}, {}, "beams", None),
    (COMPLETIONS, {"prompt": [999]}, {}, "prompt", None),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10_000_000}, {}, "max_tokens", "context_length_exceeded"),  # the model
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1_000_000}, {}, None, "context_length_exceeded"),  # the KV memory
    (COMPLETIONS, None, {"data": '{"prompt": "a', "json": None}, None, None),
    (CHAT, {"messages": []}, {}, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, {}, "tools", None),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "return_progress": True}, {}, "return_progress", None),
)


class Careless(Visitor):
    """Sends what must be refused, and on the same connection something good."""

    weight = 2

    @task
    def one(self):
        path, body, options, param, code = self.rng.choice(BAD)
        with self.asking("bad", path, body, **options) as answer:
            check("status", answer.status_code, 400)
            check("content type", answer.headers["content-type"], "application/json")
            (error,) = answer.json().values()
            message = error.pop("message")
            check("message", bool(message), True)
            check("error", error, {"type": "invalid_request_error", "param": param, "code": code})
        self.complete()


class Reader(Visitor):
    """Asks twice about each of its long documents: the second time most of it is in the prefix cache."""

    weight = 1

    def on_start(self):
        super().on_start()
        self.document, self.is_known = None, False

    @task
    def one(self):
        boxes = self.document if self.is_known else Boxes(self.rng, LONG_LEN // 34)
        least_cached = LONG_LEN - 100 if self.is_known else 0
        self.document, self.is_known = boxes, not self.is_known
        question, number = boxes.question(self.rng, slice(100, None))
        prompt = boxes.text[-(LONG_LEN - 1 - len(question)) :] + question
        body = {
            "prompt": prompt,
            "max_tokens": 20,
            "temperature": 0,
            "stop": ".",
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
        }
        with self.asking("long", COMPLETIONS, body, stream=True) as answer:
            text, reasons, processed = "", [], [0]
            for chunk in events(answer):
                check_head(chunk, "cmpl", "text_completion")
                if "prompt_progress" in chunk:
                    progress = chunk["prompt_progress"]
                    check("total", progress["total"], LONG_LEN)
                    processed.append(progress["processed"])
                for choice in chunk["choices"]:
                    if choice["text"] and not text:
                        self.note_first("long", answer)
                    text += choice["text"]
                    reasons.append(choice["finish_reason"])
            check("text", text, number)
            check("finish reasons", (set(reasons[:-1]), reasons[-1]), ({None}, "stop"))
            check("progress", (processed[-1], processed), (LONG_LEN, sorted(processed)))
            check_usage(chunk["usage"], LONG_LEN, len(number) + 1, least_cached)
