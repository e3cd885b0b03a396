"""vLLM's own server with context parallelism: it answers, streams, counts, and ends when told to."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from engines import random_prompts, reference

START_S, ANSWER_S, END_S = 420, 120, 60


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Served:
    """A running server."""

    def __init__(self, model):
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
        command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "m"]
        command += ["--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1]]
        command += [
            "--additional-config",
            json.dumps({"longspan": {"context_parallel_size": 2, "min_striped_len": 400}}),
        ]
        self.process = subprocess.Popen(command)
        self.ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # not through a proxy

    def wait_until_ready(self):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server has ended"
            try:
                with self.ask(f"{self.url}/health", timeout=5):
                    return
            except urllib.error.URLError:
                time.sleep(0.5)
        raise AssertionError("the server is not ready in time")

    def complete(self, **body):
        """The answer's lines."""
        body = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self.ask(request, timeout=ANSWER_S) as answer:
            return answer.read().decode().splitlines()

    def streamed_tokens(self, prompt):
        """Tokens of a streamed answer."""
        *events, last = [line for line in self.complete(prompt=prompt, max_tokens=12, stream=True) if line]
        assert last == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        return [token for choice in choices for token in choice["token_ids"] or ()]

    def generation_tokens(self):
        with self.ask(f"{self.url}/metrics", timeout=ANSWER_S) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))


@contextmanager
def serving(model):
    """A server that is ready."""
    server = Served(model)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gpt_oss"])
def test_it_answers_streams_counts_and_ends(models, model_of_kind, kind):
    model = models[kind] if kind in models else model_of_kind(kind)[0]
    prompts = random_prompts((9, 900))  # packed, and striped
    expected = reference(model, prompts, 12)
    with serving(model) as served:
        for prompt, tokens in zip(prompts, expected, strict=True):
            (answer,) = served.complete(prompt=prompt, max_tokens=12)
            assert json.loads(answer)["choices"][0]["token_ids"] == tokens
        with ThreadPoolExecutor() as clients:
            streams = list(clients.map(served.streamed_tokens, prompts))
        assert streams == expected
        assert served.generation_tokens() == 4 * 12
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(END_S) == 0
