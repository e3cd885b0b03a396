"""The page and its events: behind the key, off where it is off, true, small at any size, and free when nobody looks."""

import json
import re
import threading
import time
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from serving import error_of, serving
from simulated_server import fill, simulated_server

from longspan.errors import LongspanError
from longspan.server.config import ServerConfig
from longspan.server.live import MAX_ROWS
from longspan.server.page_map import MAX_CELLS

PAGE = files("longspan.server") / "page_files"
PROMPT = "Once upon a time there was a server with two ranks. " * 8


def events(server, number, **headers):
    """The first events of the stream."""
    found = []
    with server.http.stream("GET", "/live", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in answer.iter_lines():
            if line:
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == number:
                return found
    return found


@pytest.fixture(scope="module")
def server():
    options = {"placement": "striped", "page_size": 4, "stripe_size": 8}
    with serving(context_parallel_size=2, **options) as one:
        yield one


def test_events_begin_with_the_server_and_go_on_with_its_state(server):
    first, second, third = events(server, 3)
    assert first == {
        "type": "server",
        "version": first["version"],
        "model": server.state.model_name,
        "page_size": 4,
        "longest_request": server.state.lengths.longest_request,
        "has_chat_template": True,
    }
    assert (second["type"], second["status"], second["reason"]) == ("state", "ok", None)
    assert third["time_s"] - second["time_s"] > 0.3
    assert list(second) == [
        *("type", "time_s", "status", "reason", "generated_tokens", "running", "waiting", "requests", "slots_per_cell"),
        *("ranks", "strategies", "steps_per_strategy", "bytes_per_strategy", "prefix_queries_tokens"),
        *("prefix_hit_tokens", "preemptions", "restarts", "last_recovery_s"),
    ]


@pytest.mark.cover
def test_a_running_request_is_seen_with_its_pages_and_its_progress(server):
    asked = threading.Thread(
        target=server.ok, args=("/v1/completions",), kwargs={"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    )
    asked.start()
    state = {"requests": []}
    while asked.is_alive() and not any(row["generated"] for row in state["requests"]):
        state = events(server, 2)[1]
    (row,) = state["requests"]
    assert (row["phase"], row["prompt"], row["max_tokens"]) == ("decode", len(PROMPT) + 1, 900)
    assert row["computed"] >= row["prompt"]
    assert row["stripes"][:3] == [[row["stripes"][0][0], 2], [1 - row["stripes"][0][0], 4], [row["stripes"][0][0], 4]]
    owners = [set(rank["cells"][1::3]) for rank in state["ranks"]]
    assert all(row["id"] in of_rank for of_rank in owners)
    assert all(rank["pages"] - rank["free"] - rank["cached"] > 0 for rank in state["ranks"])
    assert sum(rank["tokens"] for rank in state["ranks"]) >= row["computed"]
    asked.join()
    state = events(server, 2)[1]
    assert (state["requests"], state["running"]) == ([], 0)
    assert all(rank["cached"] > 0 for rank in state["ranks"])
    assert {one["phase"] for one in state["strategies"]} == {"prefill", "decode"}
    assert state["generated_tokens"] >= 900
    striped = [one for one in state["strategies"] if one["candidates"]]
    assert striped
    for one in striped:
        assert one["strategy"] in {candidate["strategy"] for candidate in one["candidates"]}


@pytest.mark.cover
def test_watchers_share_a_snapshot_and_nobody_costs_nothing(server, monkeypatch):
    taken = []
    look = server.state.engine.look

    async def counted(seconds):
        taken.append(seconds)
        return await look(seconds)

    monkeypatch.setattr(type(server.state.engine), "look", lambda self, seconds: counted(seconds))
    watchers = [threading.Thread(target=events, args=(server, 4)) for _ in range(5)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    assert len(taken) <= 6
    time.sleep(1.2)
    seen = len(taken)
    time.sleep(1.2)
    assert len(taken) == seen


def test_events_end_with_the_server(server):
    server.state.is_draining = True
    try:
        assert [event["type"] for event in events(server, 9)] == ["server"]
    finally:
        server.state.is_draining = False


def test_the_page_loads_only_what_is_there(server):
    answer = server.http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    linked = re.findall(r'(?:src|href)="(page/[^"]+)"', answer.text)
    assert {"page/style.css", "page/main.js"} <= {*linked}
    names = {name.removeprefix("page/") for name in linked}
    for script in (one for one in PAGE.iterdir() if one.name.endswith(".js")):
        names |= {*re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert names == {one.name for one in PAGE.iterdir() if one.name != "index.html"}
    for name in names:
        found = server.http.get(f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["content-type"].partition(";")[0] in {"text/css", "text/javascript", "image/svg+xml"}
    for path in ("/page/nothing.js", "/page/../page.py", "/page/%2e%2e%2fpage.py"):
        assert server.http.get(path).status_code == 404
    everything = "".join(one.read_text() for one in PAGE.iterdir())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", everything), "the page needs another host"


class _Tags(HTMLParser):
    """Every element that must be closed is, in order; ids are unique, and what is referred to is there."""

    VOID = frozenset(("meta", "base", "link", "input", "img", "br"))

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.named = [], [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        for name in ("for", "aria-labelledby", "aria-describedby"):
            self.named |= {*(found.get(name) or "").split()}
        if tag == "a":
            self.named.add(found["href"].removeprefix("#"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass  # of the drawing

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_the_page_is_well_formed_and_all_that_it_names_is_there():
    tags = _Tags()
    tags.feed((PAGE / "index.html").read_text())
    tags.close()
    assert tags.open == []
    assert len(tags.ids) == len({*tags.ids})
    assert tags.named <= {*tags.ids}
    scripts = "".join(one.read_text() for one in PAGE.iterdir() if one.name.endswith(".js"))
    asked = {*re.findall(r'getElementById\("([^"]+)"\)', scripts)} | {*re.findall(r'\bget\("([^"]+)"\)', scripts)}
    assert asked <= {*tags.ids}


def test_the_page_is_behind_the_key_which_a_browser_sends_as_a_password():
    with serving(config=ServerConfig(api_key="sesame")) as server:
        for path in ("/", "/page/main.js", "/live"):
            answer = server.http.get(path)
            error_of(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert server.http.get(path, auth=("x", "wrong")).status_code == 401
        assert server.http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert server.http.get("/", headers={"Authorization": "Basic !"}).status_code == 401
        assert server.http.get("/", auth=("any name", "sesame")).status_code == 200
        assert server.http.get("/page/main.js", headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert server.http.get("/v1/models", auth=("", "sesame")).status_code == 200
        assert events(server, 1, Authorization="Bearer sesame")[0]["type"] == "server"


def test_a_page_that_is_off_is_not_there_nor_what_feeds_it():
    with serving(config=ServerConfig(page=False)) as server:
        for path in ("/", "/page/main.js", "/live"):
            error_of(server.http.get(path), 404)


def test_addresses_of_the_page_hold_behind_a_proxy():
    with serving(config=ServerConfig(root_path="/llm")) as server:
        assert '<base href="/llm/">' in server.http.get("/llm/").text
        assert server.http.get("/llm/page/main.js").status_code == 200


def test_an_event_is_small_and_quick_with_128_ranks_and_a_thousand_requests():
    lens = [*[30, 300, 700] * 331, 6000, 20_000, 20_000, 30_000, 30_000, 40_000, 40_000]
    with simulated_server(128, step_s=0.02) as server:
        fill(server, lens, 4000)
        started = time.perf_counter()
        state = events(server, 2)[1]
        assert time.perf_counter() - started < 20  # on a busy machine
        while not state["running"] or not any(row["stripes"] for row in state["requests"]):
            state = events(server, 2)[1]
        assert state["running"] + state["waiting"] == 1000
        assert len(state["requests"]) == MAX_ROWS
        assert len(state["ranks"]) == 128
        assert sum(sum(rank["cells"][::3]) for rank in state["ranks"]) <= MAX_CELLS
        assert len(json.dumps(state)) < 400_000


def test_a_failed_server_says_so(server, monkeypatch):
    monkeypatch.setattr(server.state.engine, "failure", LongspanError("rank 0 was killed"))
    state = events(server, 4)[-1]  # the first may be one that was made before
    assert (state["status"], state["reason"]) == ("failed", "rank 0 was killed")


def test_while_ranks_are_replaced_events_say_so_and_wait_for_nobody(server, monkeypatch):
    monkeypatch.setattr(server.state.engine, "is_recovering", True)
    state = events(server, 4)[-1]
    assert (state["status"], "ranks" in state) == ("recovering", False)
