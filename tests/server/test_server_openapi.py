"""Whatever a client makes of our OpenAPI description, no answer is a failure of the server."""

import pytest
import schemathesis
from hostile import RIGHT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from serving import error_of, serving

from longspan.server.config import ServerConfig

pytestmark = pytest.mark.slow

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/{response_id}",
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
ENDLESS = ("/live",)
"""Addresses whose answers do not end by themselves, which `test_live.py` looks at."""


@pytest.fixture(scope="module")
def server(cache_home):
    with serving(config=ServerConfig(max_model_len=60)) as served:
        yield served


@pytest.fixture(scope="module")
def operations(server):
    description = server.http.get("/openapi.json").json()
    assert set(description["paths"]) == {*PATHS, *ENDLESS}
    found = [one.ok() for one in schemathesis.openapi.from_dict(description).get_all_operations()]
    return {path: [one for one in found if one.path == path] for path in PATHS}


WITHOUT_BODY = tuple(path for path in PATHS if path not in RIGHT)
"""Nothing can be wrong with a request to these."""


@pytest.mark.parametrize(
    ("path", "mode"),
    [(p, mode) for p in PATHS for mode in GenerationMode if mode is GenerationMode.POSITIVE or p not in WITHOUT_BODY],
)
def test_no_request_breaks_the_server(server, operations, path, mode):
    codes = set()

    @given(case=one_of(*(one.as_strategy(generation_mode=mode) for one in operations[path])))
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
