"""Whatever a client makes of our OpenAPI description, no answer is a failure of the server."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from serving import error_of, serving

from longspan.server.config import ServerConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(cache_home):
    with serving(config=ServerConfig(max_model_len=60)) as served:
        yield served


@pytest.fixture(scope="module")
def description(server):
    found = server.http.get("/openapi.json").json()
    assert set(found["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/metrics",
    }
    return schemathesis.openapi.from_dict(found)


schema = schemathesis.pytest.from_fixture("description")
schema.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])


@schema.parametrize()
@hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_server(case, server):
    answer = case.call(base_url=server.url, timeout=30)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and "text/plain" not in answer.headers.get("content-type", [""])[0]:
        error_of(answer, answer.status_code)
    server.wait_until_free()
