"""Adapters over HTTP: a request names one as its model, on every route; they are listed, loaded and unloaded."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from lora_adapters import adapter_engine, write_adapter
from serving import listening, served_model

from longspan.config import EngineConfig
from longspan.engine.async_engine import AsyncEngine
from longspan.errors import ConfigError
from longspan.llm import LLM
from longspan.server import run as server_run
from longspan.server.config import ServerConfig
from longspan.types import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog."
MESSAGES = [{"role": "user", "content": "Hi!"}]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
NAMES = (None, "a", "b")


@pytest.fixture(scope="module")
def adapters(cache_home, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, served_model().path, seed=i) for i, name in enumerate("ab")}


@contextmanager
def serving_with(lora, **options):
    config = ServerConfig(served_model_name="base", **options)
    path = served_model().path
    with (
        adapter_engine(path, lora, context_parallel_size=2, page_size=4, stripe_size=8) as engine,
        listening(AsyncEngine(engine), path, config) as served,
    ):
        yield served
        served.wait_until_free()


@pytest.fixture(scope="module")
def server(adapters):
    with serving_with(adapters) as served:
        yield served


@pytest.fixture(scope="module")
def wanted(adapters):
    """What `LLM` generates of the prompt, by adapter."""
    with LLM(served_model().path, executor="threads", threads_per_rank=1, kv_cache_memory=2**25, lora=adapters) as llm:
        outputs = llm.generate([PROMPT] * 3, SamplingParams(max_tokens=12), lora=NAMES)
        assert (
            llm.generate(PROMPT, SamplingParams(max_tokens=12), lora="b")[0].outputs[0].text
            == outputs[2].outputs[0].text
        )
        with pytest.raises(ConfigError, match="lora: got 2 for 1 prompts, legal is one, or one each"):
            llm.generate(PROMPT, lora=["a", "b"])
        with pytest.raises(ConfigError, match="lora: got 'c', legal is one of a, b"):
            llm.generate(PROMPT, lora="c")
        llm.unload_lora_adapter("a")
        llm.load_lora_adapter("c", adapters["a"])
        assert (
            llm.generate(PROMPT, SamplingParams(max_tokens=12), lora="c")[0].outputs[0].text
            == outputs[1].outputs[0].text
        )
    texts = [output.outputs[0].text for output in outputs]
    assert len(set(texts)) == 3
    return dict(zip(NAMES, texts, strict=True))


def named(name):
    return {} if name is None else {"model": name}


def complete(served, name):
    return served.ok("/v1/completions", prompt=PROMPT, max_tokens=12, temperature=0, **named(name))


def test_rows_of_two_adapters_and_of_none_are_answered_at_once(server, wanted):
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda name: complete(server, name), NAMES * 3))
    for name, answer in zip(NAMES * 3, answers, strict=True):
        assert (answer["model"], answer["choices"][0]["text"]) == (name or "base", wanted[name])


def chat(served, name):
    body = served.ok("/v1/chat/completions", messages=MESSAGES, max_tokens=12, temperature=0, **named(name))
    return body["model"], body["choices"][0]["message"]["content"]


def response(served, name):
    body = served.ok("/v1/responses", input="Hi!", max_output_tokens=12, temperature=0, **named(name))
    return body["model"], body["output"][0]["content"][0]["text"]


def message(served, name):
    body = served.ok("/v1/messages", messages=MESSAGES, max_tokens=12, temperature=0, **named(name))
    return body["model"], body["content"][0]["text"]


def test_every_route_takes_an_adapter_as_its_model(server):
    for name in NAMES:
        model, text = chat(server, name)
        assert model == (name or "base")
        assert response(server, name) == message(server, name) == (model, text)
        (first, *_) = server.stream("/v1/completions", prompt=PROMPT, max_tokens=2, **named(name))
        assert first["model"] == model
    assert len({chat(server, name)[1] for name in NAMES}) == 3
    counted = [server.ok("/v1/messages/count_tokens", messages=MESSAGES, **named(name)) for name in NAMES]
    assert counted[0] == counted[1] == counted[2]
    assert server.ok("/tokenize", prompt="x", model="a") == server.ok("/tokenize", prompt="x")


def test_adapters_are_listed_with_their_parent(server, adapters):
    base, *others = server.http.get("/v1/models").json()["data"]
    assert (base["id"], "parent" in base) == ("base", False)
    assert [(one["id"], one["root"], one["parent"]) for one in others] == [
        (name, adapters[name], "base") for name in ("a", "b")
    ]
    assert server.http.get("/v1/models/b").json() == others[1]


def test_rejects_a_name_that_is_none(server):
    error = server.refused("/v1/completions", 404, prompt=PROMPT, model="c")
    assert (error["message"], error["param"]) == ("model: got 'c', legal is 'base' or 'a' or 'b'", "model")
    assert server.http.get("/v1/models/c").status_code == 404


def test_adapters_are_loaded_by_request_only_if_the_option_says_so(server, adapters):
    for path in (LOAD, UNLOAD):
        assert server.post(path, lora_name="c", lora_path=adapters["a"]).status_code == 404


def test_adapters_come_and_go(adapters, wanted):
    with serving_with({"a": adapters["a"]}, allow_runtime_lora_updating=True, api_key="sesame") as served:
        assert served.post(LOAD, lora_name="b", lora_path=adapters["b"]).status_code == 401
        served.http.headers["Authorization"] = "Bearer sesame"
        done = threading.Event()

        def ask_for_long():
            try:
                body = {"prompt": PROMPT, "max_tokens": 400, "model": "a", "ignore_eos": True, "temperature": 0}
                return served.ok("/v1/completions", **body)
            finally:
                done.set()

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask_for_long)
            while not served.engine.scheduler.running:
                assert not done.is_set()
            answer = served.post(LOAD, lora_name="b", lora_path=adapters["b"])
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'b' added successfully.")
            assert complete(served, "b")["choices"][0]["text"] == wanted["b"]
            answer = served.post(UNLOAD, lora_name="a")
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
            served.refused("/v1/completions", 404, prompt=PROMPT, model="a")
            text = running.result()["choices"][0]["text"]
        assert text.startswith(wanted["a"]), "it was unloaded for new requests alone"
        assert [one["id"] for one in served.http.get("/v1/models").json()["data"]] == ["base", "b"]
        assert [one.name for one in served.engine.adapters.told] == ["b"]


REFUSED = [
    ({"lora_name": "b"}, "lora_path", "lora_path: field required"),
    ({"lora_name": "b", "lora_path": "/nowhere"}, "lora_path", "legal is a directory with adapter_config.json and"),
    (
        {"lora_name": "a", "lora_path": "a's"},
        "lora_name",
        "lora_name: got 'a', which is loaded, legal is a name of at most",
    ),
    (
        {"lora_name": "base", "lora_path": "a's"},
        "lora_name",
        "lora_name: got 'base', which is the model's name, legal is another one",
    ),
    (
        {"lora_name": "a/b", "lora_path": "a's"},
        "lora_name",
        "lora_name: got 'a/b', legal is a name of at most 64 letters",
    ),
    (
        {"lora_name": "c", "lora_path": "a's", "load_inplace": True},
        "load_inplace",
        "load_inplace: only false is supported",
    ),
]


def test_rejects_what_cannot_be_loaded(adapters):
    with serving_with({"a": adapters["a"]}, allow_runtime_lora_updating=True) as served:
        for fields, param, text in REFUSED:
            body = {name: adapters["a"] if value == "a's" else value for name, value in fields.items()}
            error = served.refused(LOAD, **body)
            assert error["param"] == param
            assert text in error["message"]
        error = served.refused(UNLOAD, 404, lora_name="c")
        assert error["message"] == "lora_name: got 'c', legal is one of a"
        assert complete(served, "a")


def test_rejects_an_adapter_of_another_model(adapters, tmp_path):
    shutil.copytree(adapters["a"], tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with serving_with((), allow_runtime_lora_updating=True) as served:
        error = served.refused(LOAD, lora_name="a", lora_path=str(tmp_path / "a"))
        assert "down_proj has lora_A [4, 96] and lora_B" in error["message"]
        assert error["param"] == "lora_path"


def test_rejects_an_adapter_with_the_name_of_the_model(adapters):
    config = EngineConfig(model=served_model().path, lora={"base": adapters["a"]})
    with pytest.raises(ConfigError, match="lora: got an adapter 'base', whose name is that of the model"):
        server_run.serve(config, ServerConfig(served_model_name="base"), None)
