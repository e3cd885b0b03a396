"""Hostile clients against a real server: none may hurt the others, or leave anything behind.

    python tests/endurance/hostile.py [--requests 10000] [--seed 0] [--clients 8] [--idle 1000]

Starts `longspan serve recall` with two ranks. Clients send requests that a seed makes: right ones with fields taken
away, added, or set to what nobody expects (huge numbers, NaN, deep JSON, lone surrogates, long strings, other types),
bodies that are cut off or no JSON, odd names, queries, headers and methods, and connections that stop at every stage.
`--idle` connections say nothing all the while, and one client asks the same short question again and again, whose
answer is known. Ends with one line of JSON; exit status 0 if

- no answer was 5xx, and every 4xx has the shape of an error of its API,
- every answer to the known question was right, at any time,
- afterwards no request runs, no page is held, no file descriptor or process is left.

Note [Seeds]
    What a client sends depends on its seed alone (`--seed` plus its number); in which order the server sees the
    requests of several clients, on the machine.
"""

import argparse
import contextlib
import copy
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from process_tree import children
from served_command import command

from longspan.server.anthropic_types import MessagesRequest
from longspan.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from longspan.server.responses_types import ResponsesRequest

QUESTION = {"model": "recall", "prompt": "The magic number is 4711. Once more: The magic number is ", "max_tokens": 4}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
CALL = {"name": "f", "arguments": '{"x": 1}'}
FUNCTION = {"name": "f", "parameters": SCHEMA}
FORM = {"name": "x", "schema": {"enum": ["a", "b"]}}
HELLO = [{"role": "user", "content": "hello"}]
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "a", "content": "1"},
]
BLOCKS = [
    *HELLO,
    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "1"}]},
]
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "function_call", "call_id": "a", **CALL},
    {"type": "function_call_output", "call_id": "a", "output": "1"},
]
RIGHT: dict[str, list[dict[str, object]]] = {
    "/v1/completions": [
        {"prompt": "a b c", "max_tokens": 2},
        {"prompt": [[65, 66], [67]], "max_tokens": 2, "logprobs": 1, "echo": True, "n": 2},
    ],
    "/v1/chat/completions": [
        {"messages": HELLO, "max_tokens": 2},
        {"messages": TURNS, "tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 2},
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": FORM}, "max_tokens": 2},
    ],
    "/v1/responses": [
        {"input": "hello", "max_output_tokens": 2},
        {"input": ITEMS, "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 2},
        {"input": "hello", "text": {"format": {"type": "json_schema", **FORM}}, "max_output_tokens": 2},
    ],
    "/v1/messages": [
        {"messages": HELLO, "max_tokens": 2},
        {"messages": BLOCKS, "tools": [{"name": "f", "input_schema": SCHEMA}], "max_tokens": 2, "system": "s"},
    ],
    "/v1/messages/count_tokens": [{"messages": HELLO}, {"messages": BLOCKS}],
    "/tokenize": [{"prompt": "a b c"}, {"messages": TURNS}],
    "/detokenize": [{"tokens": [65, 66]}],
}
"""Bodies that are served, of every address that takes one."""

OTHERS = (
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name:path}"),
    ("GET", "/health"),
    ("HEAD", "/health"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/page/{name}"),
    ("GET", "/live"),
    ("GET", "/openapi.json"),
)
"""Methods and addresses without a body."""

REQUESTS = (CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = sorted({name for one in REQUESTS for name in (*one.model_fields, *one.REFUSED, *one.TAKEN)})
"""Every field that a body may have, or that is refused by name."""


def value(rng: random.Random, depth: int = 0) -> object:
    """What nobody expects."""
    scalars = [
        *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 10**400, 1e308, -1e-308, 0.5),
        *(float("nan"), float("inf"), float("-inf")),
        *("", "a", "\ud800", "\x00", "\ufffe", "🙂" * 100, "x" * rng.choice((10, 10_000, 300_000)), "1", "NaN"),
    ]
    kind = rng.random()
    if kind < 0.7 or depth > 2:
        return rng.choice(scalars)
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 50)))]
    if kind < 0.9:
        return {str(value(rng, 9))[:50]: value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}
    nested: object = rng.choice(scalars)
    for _ in range(rng.choice((5, 100, 900))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def break_inside(rng: random.Random, fields: dict[str, object]) -> None:
    """Replace or drop something, anywhere in a body."""
    place: Any = fields
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8):
            break
        place = place[key]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = value(rng)


def body(rng: random.Random, path: str) -> bytes:
    """A request's body: right but for something."""
    fields: dict[str, object] = copy.deepcopy(rng.choice(RIGHT[path]))
    if rng.random() < 0.3:
        break_inside(rng, fields)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        name = rng.choice(FIELDS) if rng.random() < 0.9 else str(value(rng, 9))[:30]
        if rng.random() < 0.15:
            fields.pop(name, None)
        else:
            fields[name] = value(rng)
    data = json.dumps(fields, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.05:
        return data[: rng.randrange(len(data))]
    if kind < 0.1:
        return rng.randbytes(rng.choice((0, 1, 50, 5000)))
    if kind < 0.15:
        return json.dumps(value(rng)).encode()
    return data


def break_off(rng: random.Random, address: tuple[str, int], path: str) -> None:
    """A connection that ends where it should not."""
    data = json.dumps({**RIGHT[path][0], "stream": rng.random() < 0.5, "max_tokens": 50}).encode()
    if path.endswith("tokenize"):
        data = json.dumps(RIGHT[path][0]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    message = head.encode() + data
    stage = rng.choice(("head", "body", "answer", "garbage", "more", "half closed"))
    with socket.create_connection(address, timeout=10) as connection:
        if stage == "head":
            connection.sendall(message[: rng.randrange(1, len(head))])
        elif stage == "body":
            connection.sendall(message[: rng.randrange(len(head), len(message))])
        elif stage == "garbage":
            connection.sendall(rng.randbytes(rng.choice((1, 100, 10_000))))
        elif stage == "more":
            connection.sendall(message + rng.randbytes(100))
        else:
            connection.sendall(message)
            if stage == "half closed":
                connection.shutdown(socket.SHUT_WR)
            if rng.random() < 0.7:
                connection.settimeout(rng.choice((0.001, 0.05, 0.5)))
                with contextlib.suppress(OSError):
                    connection.recv(rng.choice((1, 100, 4096)))
        if rng.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def ask_oddly(rng: random.Random, client: httpx.Client, response_id: str) -> httpx.Response:
    """A request without a body, with odd names, queries, headers or methods; of an endless answer the beginning."""
    method, path = rng.choice(OTHERS)
    names = [response_id, "recall", "main.js", "x" * rng.choice((1, 300, 3000)), "%00", "..%2f..%2fx", "%ff%fe", "%F0"]
    path = path.replace(":path", "").replace("{response_id}", "{name}").replace("{name}", rng.choice(names))
    if rng.random() < 0.2:
        method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"))
    if rng.random() < 0.3:
        query = rng.choice(("stream=true", "include[]=x", "starting_after=-1", "a=%00&a=%ff", "&&==", "x" * 3000))
        path = f"{path}?{query}"
    odd = [
        {"X-Request-Id": rng.choice(("a b", "x" * 5000, "{}"))},
        {"traceparent": rng.choice(("00-0-0-0", "x" * 5000))},
        {"Authorization": rng.choice(("Basic !", "Basic " + "A" * 999, "Bearer"))},
        {"Origin": "null", "Access-Control-Request-Method": "x"},
        {"Content-Type": "application/json", "Range": "bytes=5-1"},
    ]
    with client.stream(method, path, headers=rng.choice(odd) if rng.random() < 0.5 else {}) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
        elif rng.random() < 0.5:
            next(answer.iter_raw())
    return answer


@dataclass
class Found:
    """What the clients saw."""

    codes: Counter[int] = field(default_factory=Counter)
    num_broken_off: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    num_asked: int = 0


def attack(url: str, seed: int, count: int, found: Found) -> None:
    """One client's requests, one after the other."""
    rng = random.Random(seed)
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    response_id = "resp_none"
    with httpx.Client(base_url=url, timeout=60) as client:
        for i in range(count):
            if rng.random() < 0.15:
                try:
                    answer = ask_oddly(rng, client, response_id)
                except httpx.HTTPError as error:
                    found.wrong.append(f"seed {seed}, request {i}: {type(error).__name__} {error}")
                    continue
                found.codes[answer.status_code] += 1
                if what := complaint(answer):
                    found.wrong.append(f"seed {seed}, request {i}: {what} for {answer.request.url}"[:500])
                continue
            path = rng.choice(list(RIGHT))
            if rng.random() < 0.15:
                break_off(rng, address, path)
                found.num_broken_off += 1
                continue
            kind = rng.choice(
                ("application/json", "application/json", "text/plain", "application/json; charset=utf-16")
            )
            sent = body(rng, path)
            try:
                answer = client.post(path, content=sent, headers={"Content-Type": kind})
            except httpx.HTTPError as error:
                found.wrong.append(f"seed {seed}, request {i}: {type(error).__name__} {error} for {sent[:200]!r}")
                continue
            found.codes[answer.status_code] += 1
            if what := complaint(answer):
                found.wrong.append(f"seed {seed}, request {i}: {what} for {sent[:200]!r}")
            if path == "/v1/responses" and answer.status_code == 200 and answer.text.startswith("{"):
                response_id = answer.json()["id"]


def complaint(answer: httpx.Response) -> str | None:
    """What is wrong with an answer."""
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:200]}"
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        try:
            error = answer.json()["error"]
            is_anthropic = answer.request.url.path.startswith("/v1/messages")
            fields = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
            if set(error) == fields and error["message"]:
                return None
        except (ValueError, KeyError, TypeError):
            pass
        return f"an error of another shape: {answer.text[:200]}"
    return None


def ask(url: str, stop: threading.Event, found: Found) -> None:
    """The known question, again and again."""
    with httpx.Client(base_url=url, timeout=60) as client:
        right = None
        while not stop.is_set():
            started = time.monotonic()
            answer = client.post("/v1/completions", json=QUESTION)
            found.slowest_s = max(found.slowest_s, time.monotonic() - started)
            found.num_asked += 1
            text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
            right = text if right is None else right
            if "4711" not in text or text != right:
                found.wrong.append(f"the known question: {answer.status_code} {text[:200]}")
            stop.wait(0.05)


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mb(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def held(url: str) -> float:
    """Requests and pages that the server counts."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "longspan:kv_pages_used")
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def run(requests: int, seed: int, clients: int, idle: int) -> dict[str, object]:
    """Returns the counts; `wrong` and `left` are empty if all is well."""
    found = Found()
    options = ("--context-parallel-size", "2", "--threads-per-rank", "1", "--max-model-len", "512")
    with command(*options) as server:
        pid, url = server.process.pid, server.url
        attack(url, seed - 1, 20, Found())  # whatever is made once and kept
        files, rss, processes = open_files(pid), resident_mb(pid), len(server.workers()) + len(children(pid))
        parts = urlsplit(url)
        silent = [socket.create_connection((str(parts.hostname), int(parts.port or 80))) for _ in range(idle)]
        stop = threading.Event()
        asking = threading.Thread(target=ask, args=(url, stop, found))
        asking.start()
        share = [requests // clients + (i < requests % clients) for i in range(clients)]
        attacking = [
            threading.Thread(target=attack, args=(url, seed + i, count, found)) for i, count in enumerate(share)
        ]
        for thread in attacking:
            thread.start()
        for thread in attacking:
            thread.join()
        stop.set()
        asking.join()
        for connection in silent:
            connection.close()
        deadline = time.monotonic() + 30
        while (held(url) or open_files(pid) > files + 2) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = {
            "requests and pages": held(url),
            "files": max(0, open_files(pid) - files - 2),  # the question of this very moment
            "processes": len(server.workers()) + len(children(pid)) - processes,
        }
        grown = resident_mb(pid) - rss
        status = server.end()
        if status:
            found.wrong.append(f"the server ended with {status}")
    return {
        "requests": requests,
        "broken_off": found.num_broken_off,
        "answers": {str(code): count for code, count in sorted(found.codes.items())},
        "asked": found.num_asked,
        "slowest_answer_s": round(found.slowest_s, 2),
        "grown_mb": grown,
        "left": {what: count for what, count in left.items() if count},
        "wrong": found.wrong[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--idle", type=int, default=1000, help="connections that say nothing")
    found = run(**vars(parser.parse_args()))
    print(json.dumps(found))
    return 1 if found["wrong"] or found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
