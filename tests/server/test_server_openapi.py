"""Whatever a client makes of our OpenAPI description, no answer is a failure of the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from serving import error_of, serving

from longspan.server.config import ServerConfig

pytestmark = pytest.mark.slow

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/tokenizer_info",
    "/metrics",
)


@pytest.fixture(scope="module")
def server(cache_home):
    with serving(config=ServerConfig(max_model_len=60)) as served:
        yield served


@pytest.fixture(scope="module")
def operations(server):
    description = server.http.get("/openapi.json").json()
    assert set(description["paths"]) == set(PATHS)
    found = schemathesis.openapi.from_dict(description).get_all_operations()
    return {operation.ok().path: operation.ok() for operation in found}


WITHOUT_BODY = ("/v1/models", "/v1/models/{name}", "/health", "/tokenizer_info", "/metrics")
"""Nothing can be wrong with a request to these."""


@pytest.mark.parametrize(
    ("path", "mode"),
    [(p, mode) for p in PATHS for mode in GenerationMode if mode is GenerationMode.POSITIVE or p not in WITHOUT_BODY],
)
def test_no_request_breaks_the_server(server, operations, path, mode):
    codes = set()

    @given(case=operations[path].as_strategy(generation_mode=mode))
    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case):
        answer = case.call(base_url=server.url, timeout=30)
        codes.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400 and answer.content != b"Invalid HTTP request received.":
            if path.startswith("/v1/messages"):
                assert answer.json()["type"] == "error", answer.text
            else:
                error_of(answer, answer.status_code)

    send()
    assert codes
    server.wait_until_free()
