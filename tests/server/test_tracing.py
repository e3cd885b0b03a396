"""A span per request reaches a collector, with vLLM's attributes; a collector that is gone disturbs nobody."""

import importlib.util
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import serving
from test_server import CHAT, COMPLETIONS, MESSAGES, RENDERED

from longspan.errors import ConfigError
from longspan.server.config import ServerConfig

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def collector(status=200):
    """A collector's address, and the (resource, span) pairs that it got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/traces" and status == 200:
                for group in sent.resource_spans:
                    resource = values_of(group.resource.attributes)
                    found.extend((resource, span) for scope in group.scope_spans for span in scope.spans)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", found
        finally:
            server.shutdown()
            thread.join()


def values_of(attributes):
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def test_every_request_is_a_span_with_vllms_attributes(cache_home):
    with collector() as (url, found):
        with serving(config=ServerConfig(otlp_endpoint=url)) as served:
            fields = {"max_tokens": 3, "ignore_eos": True, "temperature": 0.5, "top_p": 0.9, "seed": 1}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
            served.http.post(COMPLETIONS, json={"prompt": ["abc", "de"], "n": 2, **fields}, headers=headers)
            served.stream(CHAT, messages=MESSAGES, **fields)
            served.refused(CHAT, messages=MESSAGES, n=0)
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}  # the client's own choice counts
            served.http.post(COMPLETIONS, json={"prompt": "abc", **fields}, headers=unsampled)
            served.ok("/tokenize", prompt="a")
            served.http.post("/nothing")
            served.http.get("/health")
        assert len(found) == 5
    resources, spans = zip(*sorted(found, key=lambda one: one[1].start_time_unix_nano), strict=True)
    assert {resource["service.name"] for resource in resources} == {"longspan"}
    assert [span.name for span in spans] == ["llm_request", "llm_request", "llm_request", "POST /tokenize", "POST"]
    assert {span.kind for span in spans} == {2}  # a server's
    first, streamed, refused, _, nothing = (values_of(span.attributes) for span in spans)
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (TRACE, PARENT)
    assert (spans[1].parent_span_id, spans[1].trace_id != spans[0].trace_id) == (b"", True)
    asked = {"gen_ai.request.max_tokens": 3, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9}
    for one, sequences, prompt, generated in ((first, 4, 4 + 3, 12), (streamed, 1, len(RENDERED), 3)):
        assert asked.items() <= one.items()
        assert one["gen_ai.usage.num_sequences"] == sequences
        assert (one["gen_ai.usage.prompt_tokens"], one["gen_ai.usage.completion_tokens"]) == (prompt, generated)
        assert one["gen_ai.response.finish_reasons"] == ["length"]
        assert one["http.response.status_code"] == 200
        seconds = {name.rpartition(".")[2]: one[name] for name in one if name.startswith("gen_ai.latency.")}
        assert all(value >= 0 for value in seconds.values())
        first_s, e2e_s = seconds["time_to_first_token"], seconds["e2e"]
        assert seconds["time_in_queue"] + seconds["time_in_model_prefill"] == pytest.approx(first_s, abs=1e-6)
        assert seconds["time_in_queue"] + seconds["time_in_model_inference"] <= e2e_s
    assert (first["gen_ai.request.id"], first["gen_ai.request.n"]) == ("mine-1", 2)
    assert (refused["http.response.status_code"], "gen_ai.request.n" in refused) == (400, False)
    assert (nothing["http.response.status_code"], nothing["url.path"]) == (404, "/nothing")


@pytest.mark.cover
@pytest.mark.parametrize("kind", ["gone", "silent", "refusing"])
def test_a_collector_that_does_not_answer_disturbs_nobody(cache_home, capfd, monkeypatch, kind):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with socket.create_server(("127.0.0.1", 0)) as silent, collector(status=404) as (refusing, _):
        port = silent.getsockname()[1]
        if kind == "gone":
            silent.close()
        url = refusing if kind == "refusing" else f"http://127.0.0.1:{port}"
        with serving(config=ServerConfig(otlp_endpoint=url)) as served:
            started = time.monotonic()
            for _ in range(10):
                served.ok(COMPLETIONS, prompt="a", max_tokens=1)
                time.sleep(0.02)
            assert time.monotonic() - started < 5
            ending = time.monotonic()
        assert time.monotonic() - ending < 8
    told = capfd.readouterr().err
    assert told.count("\n") <= 1, told  # the others are tried again for ten seconds
    if kind == "refusing":
        assert told.startswith(f"longspan: traces do not reach {url}/v1/traces, and are dropped: ")
        assert "404" in told


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk.trace", "opentelemetry.exporter"])
def test_rejects_traces_without_the_packages(monkeypatch, missing):
    find = importlib.util.find_spec

    def find_others(name):
        if name == missing:
            return None
        if name.startswith(f"{missing}."):
            raise ModuleNotFoundError(name)
        return find(name)

    monkeypatch.setattr("longspan.server.config.find_spec", find_others)
    with pytest.raises(ConfigError, match=r"otlp_endpoint: got .*: pip install 'longspan\[otlp\]'$"):
        ServerConfig(otlp_endpoint="http://localhost:4318")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://a:1", "http://a:1/v1/traces"),
        ("https://a.example/", "https://a.example/v1/traces"),
        ("http://[::1]:4318/x/y", "http://[::1]:4318/x/y"),
    ],
)
def test_addresses_of_collectors_are_completed(given, taken):
    assert ServerConfig(otlp_endpoint=given).otlp_endpoint == taken
