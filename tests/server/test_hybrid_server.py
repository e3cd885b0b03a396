"""`longspan serve` with recurrent layers: many clients, several ranks, a kill, and the prefix cache."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hybrid_models import HYBRIDS
from served_command import command
from tiny_models import generate_reference, random_prompt, write_model

from longspan.models.loader import load_tokenizer
from longspan.models.recall_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NUM_TOKENS, NUM_CLIENTS = 24, 16


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3_5")
    model_type, options = HYBRIDS["qwen3_5_text"]
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "vocab_size": VOCAB_SIZE}
    write_model(path, model_type, **{**options, **ids})
    load_tokenizer("recall").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("placement", ["striped", "packed"])
def test_16_clients_at_once_get_transformers_tokens_before_and_after_a_kill(repository, placement):
    shared = [token % 128 for token in random_prompt(300, 1)]
    prompts = [shared + [token % 128 for token in random_prompt(1 + 5 * i, i)] for i in range(NUM_CLIENTS)]
    tokenizer = load_tokenizer(repository)
    wanted = [generate_reference(repository, prompt, NUM_TOKENS).token_ids for prompt in prompts]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted]
    options = ("--context-parallel-size", "3", "--placement", placement, "--max-restarts", "2", "--dtype", "float32")
    more = ("--state-snapshot-tokens", "64", "--kv-cache-memory", "32Mi", "--stripe-size", "32")
    with command(*options, *more, model=repository) as served, ThreadPoolExecutor(NUM_CLIENTS) as pool:

        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
            answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.json()

        answers = list(pool.map(ask, prompts))
        assert [answer["choices"][0]["text"] for answer in answers] == texts
        again = list(pool.map(ask, prompts))
        assert [answer["choices"][0]["text"] for answer in again] == texts
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in again]
        assert min(cached) >= 256
        running = [pool.submit(ask, prompt) for prompt in prompts]
        os.kill(served.workers()[1], signal.SIGKILL)
        assert [future.result()["choices"][0]["text"] for future in running] == texts
        metrics = httpx.get(f"{served.url}/metrics").text
        assert re.search(r'longspan:state_slots_used{.*rank="0"} 0.0', metrics)
        assert served.end() == 0
