"""Load over HTTP on servers that are commands, longspan's and vLLM's: parts `http` and `parsers` of serve.py.

Holds clients and server processes. Servers run on the cores of this process, one after the other; the clients too.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common import median

CONNECTIONS = 64
VLLM_VARIABLE = "LONGSPAN_BENCH_VLLM"
"""Environment variable with the path of the Python that has vLLM; without it longspan's server is measured alone."""

PLAIN_TEMPLATE = "{% if tools %}{% endif %}{{ messages[0].content }}"
"""Chat template that takes tools and shows none: prompts with and without them are the same."""


@dataclass
class ServerProcess:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_s(self) -> float:
        """Seconds that its own process has computed; ranks are processes of their own."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(command: Sequence[str]) -> Iterator[ServerProcess]:
    """A server's command with a free port, from its first answer to its end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(process, port, log)
            yield ServerProcess(process, port)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 600
    while True:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read().decode()[-2000:]}")
        assert time.monotonic() < deadline, "the server does not answer"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


async def ask(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> int:
    """Requests one after the other over one connection; returns the number of events or answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    count = 0
    for body in bodies:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status = await reader.readline()
        assert b" 200 " in status, (status, await reader.read(500))
        length = None
        while (line := await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if length is not None:
            await reader.readexactly(length)
            count += 1
            continue
        while (line := await reader.readline()) != b"0\r\n":  # chunks
            count += line.startswith(b"data: {")
        await reader.readline()
    writer.close()
    return count


def rates(port: int, model: str, seed: int) -> tuple[float, float]:
    """Requests per second of 1-token answers over 64 connections, and tokens per second of 64 streams."""

    async def run() -> tuple[float, float]:
        def body(i: int, tokens: int, **more: Any) -> dict[str, Any]:
            prompt = f"{seed} {i}: Once upon a time"
            return {
                "model": model,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                **more,
            }

        started = time.perf_counter()
        each = [[body(100 * i + k, 1) for k in range(4)] for i in range(CONNECTIONS)]
        await asyncio.gather(*(ask(port, "/v1/completions", bodies) for bodies in each))
        of_requests = 4 * CONNECTIONS / (time.perf_counter() - started)
        started = time.perf_counter()
        streams = [[body(i, 64, stream=True)] for i in range(CONNECTIONS)]
        await asyncio.gather(*(ask(port, "/v1/completions", bodies) for bodies in streams))
        return of_requests, 64 * CONNECTIONS / (time.perf_counter() - started)

    return asyncio.run(run())


def smollm2() -> str:
    """Directory of the model that both servers have."""
    from longspan.models.smollm2 import smollm2_path

    return str(smollm2_path())


def http(_model: Path, repeats: int, _length: int) -> dict[str, Any]:
    """Both servers' rates, interleaved by starting them in turn."""
    model = smollm2()
    cores = str(len(os.sched_getaffinity(0)))
    ours = [sys.executable, "-m", "longspan", "serve", model, "--served-model-name", "m", "--threads-per-rank", cores]
    commands = {"longspan": [*ours, "--max-num-seqs", str(CONNECTIONS), "--kv-cache-memory", "1Gi"]}
    if vllm := os.environ.get(VLLM_VARIABLE):
        module = "vllm.entrypoints.openai.api_server"  # its command asks for metadata that CPU builds lack
        theirs = [
            vllm,
            "-m",
            module,
            "--model",
            model,
            "--served-model-name",
            "m",
            "--dtype",
            "float32",
            "--max-model-len",
            "2048",
        ]
        commands["vllm"] = [*theirs, "--max-num-seqs", str(CONNECTIONS)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name, command in commands.items():
            with server(command) as running:
                rates(running.port, "m", 1000 + repeat)  # warm
                found[name].append(rates(running.port, "m", 2000 + repeat))
    rows: dict[str, Any] = {}
    for name, pairs in found.items():
        rows[f"{name}: requests of 1 token"] = f"{median(a for a, _ in pairs):.1f} per s"
        rows[f"{name}: tokens of 64 streams"] = f"{median(b for _, b in pairs):.1f} per s"
    if "vllm" in found:
        for i, what in enumerate(("requests", "tokens of streams")):
            ratio = median(pair[i] for pair in found["longspan"]) / median(pair[i] for pair in found["vllm"])
            rows[f"longspan / vllm, {what}"] = f"{ratio:.2f}"
    return rows | {"goal": "at least 1.2 of vLLM"}


def parsers(_model: Path, repeats: int, _length: int) -> dict[str, Any]:
    """CPU time of the server's process per streamed token: plain, and with tools and thoughts, in turn."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    options = ["--served-model-name", "m", "--threads-per-rank", "1", "--reasoning-parser"]
    ours = [sys.executable, "-m", "longspan", "serve"]
    fields = {"model": "m", "messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0}
    fields |= {"max_tokens": 200, "ignore_eos": True, "stream": True}
    num_tokens = 200 * 16

    def cost(running: ServerProcess, more: dict[str, Any]) -> float:
        async def run() -> None:
            await asyncio.gather(*(ask(running.port, "/v1/chat/completions", [fields | more]) for _ in range(16)))

        before = running.cpu_s()
        asyncio.run(run())
        return (running.cpu_s() - before) / num_tokens * 1e6

    with tempfile.TemporaryDirectory() as directory:
        template = Path(directory) / "template.jinja"
        template.write_text(PLAIN_TEMPLATE)
        more = ["--chat-template", str(template), "--tool-call-parser", "hermes", "--kv-cache-memory", "512Mi"]
        plain, parsed = ([*ours, "recall", *options, name, *more] for name in ("none", "think"))
        with server(plain) as one, server(parsed) as two:
            for running, asked in ((one, {}), (two, {"tools": [tool]})):
                cost(running, asked)  # warm
            found = [(cost(one, {}), cost(two, {"tools": [tool]})) for _ in range(5 * repeats)]
    return {
        "CPU time per token, plain": f"{median(a for a, _ in found):.0f} us",
        "with tools and thoughts / plain": f"{median(b / a for a, b in found):.3f}",
        "goal (tools and thoughts)": "at most 1.03",
    }
