"""Servers inside the test process: a tiny model with random weights and a real tokenizer, behind a real socket."""

import asyncio
import atexit
import functools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from tiny_models import TinyModel, tiny_engine, write_model

from longspan.engine.async_engine import AsyncEngine
from longspan.engine.engine import Engine
from longspan.models.loader import load_tokenizer
from longspan.models.recall_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from longspan.server.config import ServerConfig
from longspan.server.run import http_config, make_state
from longspan.server.state import ServerState


@functools.cache
def served_model(*, has_template: bool = True) -> TinyModel:
    """A tiny Llama that knows bytes and writes diverse nonsense, half of it no UTF-8."""
    path = Path(tempfile.mkdtemp(prefix="longspan-served-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    write_model(path, "llama", vocab_size=VOCAB_SIZE, seed=3, **ids)
    tokenizer = load_tokenizer("recall")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        if has_template
        else None
    )
    tokenizer.save_pretrained(path)
    return TinyModel(path.name, str(path), [])


@dataclass
class Served:
    """A server that runs, and a client for it."""

    state: ServerState
    url: str
    http: httpx.Client

    @property
    def engine(self) -> Engine:
        return self.state.engine.engine

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def ok(self, path, **body):
        """The JSON of an answer that must be 200."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path, status=400, **body):
        """The error of an answer that must be one."""
        return error_of(self.post(path, **body), status)

    def stream(self, path, **body):
        """All events of a stream, without the end mark, which must be there."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]

    def wait_until_free(self, seconds=10.0):
        """Until no request holds a page."""
        deadline = time.monotonic() + seconds
        while not self.is_free():
            assert time.monotonic() < deadline, self.state.engine.stats()
            time.sleep(0.01)

    def is_free(self) -> bool:
        stats = self.state.engine.stats()
        return not (stats.num_running or stats.num_waiting or any(stats.kv_pages_used))


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"], body
    assert list(body["error"]) == ["message", "type", "param", "code"], body
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


@contextmanager
def serving(
    model: TinyModel | None = None, *, config: ServerConfig | None = None, defaults=None, **options
) -> Iterator[Served]:
    """A server in a thread; afterwards every page must be free again."""
    model = model or served_model()
    with tiny_engine(model, **options) as engine:
        async_engine = AsyncEngine(engine, max_queued_requests=(config or ServerConfig()).max_queued_requests)
        with listening(async_engine, model.path, config, defaults) as served:
            yield served
            if async_engine.failure is None:
                served.wait_until_free()  # what a client left behind may still be under way


@contextmanager
def listening(engine: AsyncEngine, path: str, config: ServerConfig | None = None, defaults=None) -> Iterator[Served]:
    """A server in a thread, around an engine that it closes."""
    state = make_state(engine, load_tokenizer(path), config or ServerConfig(), defaults)
    settings = http_config(state)
    settings.port = 0
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    url = f"{'http' if state.config.ssl_certfile is None else 'https'}://{host}:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60, verify=False) as client:
            yield Served(state, url, client)
    finally:
        server.should_exit = True
        engine.close()
        thread.join(timeout=20)
        state.close()
    assert not thread.is_alive()


def texts(chunks, num_choices=1):
    """The text of each choice of a completion's chunks."""
    found = [""] * num_choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return found


def reasons(chunks, num_choices=1):
    """The finish reason of each choice; there must be exactly one."""
    found = [[] for _ in range(num_choices)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["finish_reason"] is not None:
                found[choice["index"]].append(choice["finish_reason"])
    return [reason for (reason,) in found]


async def gather(url, bodies, path="/v1/completions"):
    """Chunks of many streams at once."""

    async def one(client, body):
        async with client.stream("POST", path, json={**body, "stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, body) for body in bodies))
