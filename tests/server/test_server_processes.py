"""`longspan serve` as people run it: a command with worker processes, clients of other makes, signals, deaths."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pydantic
import pytest
from served_command import FACT, FILLER, QUESTION, command

from longspan.models.recall import recall_path

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def server(cache_home):
    options = ("--context-parallel-size", "2", "--placement", "striped", "--page-size", "4", "--stripe-size", "16")
    with command(*options, "--kv-cache-memory", "64Mi", "--api-key", "sesame") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as one:
        yield one


def test_the_command_says_where_it_is_and_what_it_holds(server):
    capacity, parsers, ready = server.lines[:3]
    numbers = re.fullmatch(
        r"longspan: model recall on 2 ranks: KV for (\d+) tokens, (\d+) per rank; "
        r"longest request (\d+) tokens, prompt and answer together\n",
        capacity,
    )
    total, per_rank, longest = map(int, numbers.groups())
    assert total == 2 * per_rank
    assert longest == total + 1
    assert parsers == "longspan: parsers: tool calls hermes, reasoning none\n"
    assert ready == f"longspan: ready at {server.url}\n"
    assert len(server.workers()) == 2


def test_openais_client_completes(client):
    answer = client.completions.create(
        model="recall", prompt=FACT + QUESTION, max_tokens=50, temperature=0, stop=".", logprobs=2
    )
    assert answer.choices[0].text == "4711"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.tokens == list("4711.")
    stream = client.completions.create(
        model="recall",
        prompt=[FACT + QUESTION, "Say abcdefghijklmnopqrst. Say abcdefghijklmnop"],
        max_tokens=4,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["4711", "qrst"]
    assert chunk.usage.completion_tokens == 8


def test_openais_client_chats(client):
    messages = [{"role": "system", "content": FACT}, {"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(
        model="recall", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "4711."
    assert answer.choices[0].logprobs.content[0].bytes == [ord("4")]
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    with client.chat.completions.stream(model="recall", messages=messages, stop=".", temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(deltas) == "4711"
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_openais_async_client_runs_many_at_once(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:

            async def one(number):
                text = f"The number of box {number} is {number * 7919}. Once more: The number of box {number} is "
                stream = await client.chat.completions.create(
                    model="recall",
                    messages=[{"role": "user", "content": text}],
                    temperature=0,
                    stop=["."],
                    max_tokens=20,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(100, 116)))

    assert asyncio.run(ask()) == [str(number * 7919) for number in range(100, 116)]


def test_openais_client_parses_structured_answers(client):
    class Safe(pydantic.BaseModel):
        number: int
        is_open: bool

    written = '{"number": 4711, "is_open": false}'
    prompt = f"The answer in the book is {written}\nOnce more: The answer in the book is "
    answer = client.chat.completions.parse(
        model="recall",
        messages=[{"role": "user", "content": prompt}],
        response_format=Safe,
        temperature=0,
        max_tokens=100,
    )
    assert answer.choices[0].message.parsed == Safe(number=4711, is_open=False)
    assert answer.choices[0].finish_reason == "stop"


def test_openais_client_understands_refusals(server, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="recall",
            messages=[{"role": "user", "content": "a"}],
            functions=[{"name": "f"}],
        )
    assert refused.value.param == "functions"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="recall", prompt="x" * 200_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["recall"]


def test_curl_gets_an_answer_and_a_stream(server):
    def curl(body, *options):
        headers = ("-H", "Content-Type: application/json", "-H", "Authorization: Bearer sesame")
        done = subprocess.run(
            ["curl", "-sN", *options, f"{server.url}/v1/completions", *headers, "-d", json.dumps(body)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    body = {"prompt": FACT + FILLER[:5000] + QUESTION, "max_tokens": 4, "temperature": 0}
    assert json.loads(curl(body))["choices"][0]["text"] == "4711"
    lines = curl({**body, "stream": True, "return_progress": True}, "-i").splitlines()
    assert lines[0].startswith("HTTP/1.1 200")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(line) for line in data[:-1]]
    assert "prompt_progress" in chunks[0]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "4711"


# -- ends --------------------------------------------------------------------------------------------------------------

TWO_RANKS = ("--context-parallel-size", "2", "--placement", "striped", "--max-num-batched-tokens", "64")
LONG = {"prompt": FACT + FILLER + QUESTION, "max_tokens": 4, "temperature": 0, "stream": True, "return_progress": True}


def read_stream(url, body, started, found):
    """Read a stream to its end, noting its lines; `started` is set at the first one."""
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer,
    ):
        for line in answer.iter_lines():
            if line:
                found.append(line)
                started.set()
        found.append("end")


@contextlib.contextmanager
def reading(url, body):
    """Lines of a stream that is being read in a thread and has begun."""
    started, found = threading.Event(), []
    thread = threading.Thread(target=read_stream, args=(url, body, started, found), daemon=True)
    thread.start()
    assert started.wait(timeout=60)
    yield found
    thread.join(timeout=60)
    assert not thread.is_alive()


def text_of(lines):
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_sigterm_lets_running_requests_end_and_exits_with_0(cache_home):
    with command(*TWO_RANKS) as served:
        with httpx.Client(base_url=served.url) as other:
            assert other.get("/health").status_code == 200
            with reading(served.url, LONG) as lines:
                served.process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + 10
                while other.get("/health").status_code == 200:
                    assert time.monotonic() < deadline
                refused = other.post("/v1/completions", json={"prompt": "a"})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "shutting_down"
                assert "end" not in lines  # it was refused while the long one ran
        assert text_of(lines) == "4711"
        assert lines[-2:] == ["data: [DONE]", "end"]
        assert served.process.wait(timeout=30) == 0
        assert "no new requests; 1 still run" in served.said()


@pytest.mark.slow
def test_a_client_that_never_sends_the_rest_does_not_keep_a_server_from_ending(cache_home):
    with command() as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: 100\r\n\r\n{")
            httpx.get(f"{served.url}/health").raise_for_status()
            assert served.end() == 0


@pytest.mark.slow
def test_an_idle_server_ends_at_once(cache_home):
    with command() as served:
        httpx.get(f"{served.url}/health").raise_for_status()
        started = time.monotonic()
        assert served.end() == 0
        assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_second_signal_ends_a_server_at_once(cache_home):
    with command(*TWO_RANKS) as served:
        endless = {"prompt": "abc", "max_tokens": 500_000, "ignore_eos": True, "stream": True}
        with reading(served.url, endless) as lines:
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert served.process.poll() is None
            started = time.monotonic()
            assert served.end(signal.SIGINT, seconds=20) == 128 + signal.SIGINT
            assert time.monotonic() - started < 2  # 0.7 on an idle machine
        assert '"error"' in lines[-2]  # told, not just dropped
        assert lines[-1] == "end"


def test_a_second_signal_does_not_wait_for_threads(cache_home):
    """A text of 20 MB is tokenized for half a minute, in a thread that nothing can stop."""
    with command(*TWO_RANKS) as served:
        text = {"prompt": "ab c" * 5_000_000}

        def ask():
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{served.url}/v1/completions", json=text, timeout=60)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        time.sleep(2)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert served.process.poll() is None
        started = time.monotonic()
        assert served.end(signal.SIGTERM, seconds=20) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 2
        thread.join(timeout=10)


def test_when_a_worker_is_killed_for_good_every_client_is_told_and_the_exit_code_is_not_0(cache_home):
    with command(*TWO_RANKS, "--max-restarts", "0") as served:
        answers = []

        def ask():
            body = {"prompt": FILLER + "!", "max_tokens": 100_000, "ignore_eos": True}
            answers.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=60))

        waiting = [threading.Thread(target=ask) for _ in range(2)]
        with reading(served.url, LONG) as lines:
            for thread in waiting:
                thread.start()
            time.sleep(0.5)
            victim = served.workers()[1]
            os.kill(victim, signal.SIGKILL)
        for thread in waiting:
            thread.join(timeout=60)
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert lines[-1] == "end"
        assert error["type"] == "server_error"
        assert f"rank 1 (pid {victim}) was killed by SIGKILL" in error["message"]
        assert [answer.status_code for answer in answers] == [500, 500]
        assert all("rank 1" in answer.json()["error"]["message"] for answer in answers)
        assert served.process.wait(timeout=30) == 1
        deadline = time.monotonic() + 5
        while f"longspan: rank 1 (pid {victim}) was killed by SIGKILL" not in served.said():
            assert time.monotonic() < deadline, served.said()
            time.sleep(0.05)


@pytest.mark.slow
def test_an_idle_server_notices_that_a_worker_died(cache_home):
    with command(*TWO_RANKS, "--max-restarts", "1") as served:
        first = served.workers()
        os.kill(first[0], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while "new ranks are ready" not in served.said():
            assert time.monotonic() < deadline, served.said()
            time.sleep(0.05)
        second = served.workers()
        assert len(second) == 2
        assert not {*first} & {*second}
        os.kill(second[0], signal.SIGKILL)
        assert served.process.wait(timeout=30) == 1
        assert "the ranks were started again once within 600 s before (max_restarts)" in served.said()


# -- models of their own -----------------------------------------------------------------------------------------------


def test_a_real_model_talks_to_openais_client(smollm2):
    with (
        command("--context-parallel-size", "2", "--kv-cache-memory", "128Mi", model="smollm2") as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


@pytest.mark.parametrize("source", ["auto", pytest.param("none", marks=pytest.mark.slow)])
def test_sampling_defaults_come_from_the_models_files(cache_home, tmp_path, source):
    path = shutil.copytree(recall_path(), tmp_path / "model")
    (path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 1, "eos_token_id": 257}')
    options = ("--generation-config", source, "--kv-cache-memory", "32Mi")
    with command(*options, model=path) as served:
        assert ("sampling defaults of generation_config.json: temperature 0.5, top_k 1\n" in served.said()) == (
            source == "auto"
        )
        # One token is left to draw from, or all of them.
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 1000.0}
        answers = [
            httpx.post(f"{served.url}/v1/completions", json=body | {"seed": i}, timeout=60).json() for i in range(3)
        ]
    assert (len({answer["choices"][0]["text"] for answer in answers}) == 1) == (source == "auto")


def test_rejects_sampling_defaults_that_are_illegal(cache_home, tmp_path):
    path = shutil.copytree(recall_path(), tmp_path / "model")
    (path / "generation_config.json").write_text('{"top_p": 3.0}')
    done = subprocess.run(
        [sys.executable, "-m", "longspan", "serve", str(path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "longspan: generation_config.json: top_p: got 3.0, legal is a number"
    )
