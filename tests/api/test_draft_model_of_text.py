"""Text is the same with a draft model: grammars, streams of a server, several answers, ranks that are killed while they
make drafts, and a draft model of another tokenizer is refused before weights are loaded."""

import json
import os
import signal

import pytest
from draft_texts import SCHEMA, STRIPED, TEXT, THREADS, VALUE, plain_and_drafting
from drafts import check_all_drafts
from process_tree import ranks
from serving import served_model, serving, texts
from tiny_models import write_model

from longspan import LLM, ConfigError, SamplingParams
from longspan.models.loader import load_tokenizer
from longspan.models.recall_tokenizer import VOCAB_SIZE

DRAFTS = {"method": "draft_model", "model": "recall", "num_speculative_tokens": 5}


@pytest.fixture(autouse=True)
def whatever_steps_take(monkeypatch):
    """All drafts are checked: on a busy machine rows seem to take so long that none pays."""
    check_all_drafts(monkeypatch)


@pytest.fixture(scope="module")
def llms(cache_home):
    with plain_and_drafting(DRAFTS) as both:
        yield both


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_output_follows_its_schema_with_a_draft_model(llms, temperature):
    params = SamplingParams(max_tokens=90, json_schema=SCHEMA, temperature=temperature, seed=2)
    found, expected = (llm.generate(f"a: {VALUE}\nb: {VALUE}\nc: ", params)[0].outputs[0] for llm in reversed(llms))
    assert found.text == expected.text
    assert set(json.loads(found.text)) == {"city", "digits"}
    assert llms[1].engine.scheduler.drafting.num_accepted


def test_a_model_that_drafts_for_itself_takes_few_steps(llms):
    engine, params = llms[1].engine, SamplingParams(max_tokens=140, ignore_eos=True, stop="nowhere")
    first = engine.scheduler.next_plan_id
    (output,) = llms[1].generate(TEXT + "\n" + TEXT[:30], params)
    assert output.outputs[0].text == TEXT[30:170]
    assert engine.scheduler.next_plan_id - first < 45


def test_a_server_streams_several_answers_with_a_draft_model(tmp_path):
    asked = {"prompt": "one two three", "max_tokens": 40, "temperature": 0.9, "seed": 1, "ignore_eos": True, "n": 2}
    with serving() as plain:
        expected = plain.ok("/v1/completions", **asked)
    drafts = {**DRAFTS, "model": served_model().path}
    with serving(served_model(), speculative_config=drafts, **STRIPED) as served:
        chunks = served.stream("/v1/completions", stream_options={"include_usage": True}, **asked)
    assert texts(chunks, 2) == [choice["text"] for choice in expected["choices"]]
    assert chunks[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


@pytest.mark.processes
def test_a_request_goes_on_after_a_rank_was_killed_with_a_draft_model(cache_home):
    prompt, params = TEXT + "\n" + TEXT[:30], SamplingParams(max_tokens=120, ignore_eos=True)
    options = {"kv_cache_memory": 2**26, "max_restarts": 2, "threads_per_rank": 1, **STRIPED}
    with LLM("recall", speculative_config=DRAFTS, **options) as llm:
        counts, before = llm.engine.scheduler.drafting, []

        def kill(progress):
            if not before and progress.generated_tokens > 40:
                before.append(counts.num_accepted)
                os.kill(ranks(os.getpid())[1], signal.SIGKILL)

        (output,) = llm.generate(prompt, params, on_progress=kill)
        assert llm.engine.restarts.num_done == 1
    assert output.outputs[0].text == TEXT[30:150]
    assert 0 < before[0] < counts.num_accepted - 20, "drafts before and after the loss"


def test_rejects_another_tokenizer(tmp_path, cache_home):
    """Sizes are equal, and a token is another one."""
    path = write_model(tmp_path / "other", "llama", vocab_size=VOCAB_SIZE)
    drafts = {"method": "draft_model", "model": path, "num_speculative_tokens": 2}
    with pytest.raises(
        ConfigError, match=r"^speculative_config: got the draft model '.*', legal is one that can be loaded"
    ):
        LLM("recall", speculative_config=drafts, **THREADS)
    tokenizer = load_tokenizer("recall")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"only one of them has the token 'one more' as 260"):
        LLM("recall", speculative_config=drafts, **THREADS)


def test_the_command_refuses_a_missing_draft_model(longspan):
    drafts = json.dumps({"method": "draft_model", "model": "./nowhere", "num_speculative_tokens": 4})
    outcome = longspan("generate", "recall", "--prompt", "x", "--speculative-config", drafts)
    assert outcome.code == 2
    assert "speculative-config: got the draft model './nowhere', legal is one that can be loaded" in outcome.err
