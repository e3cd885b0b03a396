"""Variables of chat templates follow from a request's fields, and the tokenizer is described."""

import shutil

import pytest
from serving import served_model, serving
from test_server import CHAT
from tiny_models import TinyModel

from longspan.models.loader import load_tokenizer

SAID = [{"role": "user", "content": "a"}]


def copy_with_template(tmp_path, template):
    path = tmp_path / "model"
    shutil.copytree(served_model().path, path)
    (path / "chat_template.jinja").write_text(template)
    return TinyModel("templated", str(path), [])


@pytest.mark.parametrize(
    ("template", "fields", "rendered"),
    [
        ("{{ enable_thinking }}|{{ mood }}", {"chat_template_kwargs": {"mood": "good"}}, "|good"),
        ("{{ enable_thinking }}", {"chat_template_kwargs": {"enable_thinking": False}}, "False"),
        ("{{ enable_thinking }}", {"reasoning_effort": "high"}, "True"),
        ("{{ enable_thinking }}", {"reasoning_effort": "none"}, "False"),
        ("{{ reasoning_effort }}|{{ enable_thinking }}", {"reasoning_effort": "low"}, "low|"),
    ],
)
def test_fields_set_the_templates_variables(cache_home, tmp_path, template, fields, rendered):
    with serving(copy_with_template(tmp_path, template + "!")) as served:
        answer = served.ok(CHAT, messages=SAID, max_tokens=1, return_token_ids=True, **fields)
        assert bytes(answer["prompt_token_ids"]).decode() == rendered + "!"


def test_the_tokenizer_is_described(cache_home):
    with serving() as served:
        found = served.http.get("/tokenizer_info").json()
    tokenizer = load_tokenizer(served_model().path)
    assert found["tokenizer_class"] == type(tokenizer).__name__
    assert (found["eos_token"], found["eos_token_id"]) == (tokenizer.eos_token, tokenizer.eos_token_id)
    assert (found["vocab_size"], found["chat_template"]) == (len(tokenizer), tokenizer.chat_template)
    assert found["model_max_length"] == 2048
