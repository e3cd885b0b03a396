"""The event loop goes on with everything else while a thousand streams are told, and thousands of requests begin."""

import asyncio
import gc
import random

import pytest
from serving import gather, serving, texts
from test_server import COMPLETIONS, PROMPT, alone

from longspan.engine.request_stream import AT_ONCE, MOST_MERGED, RequestStream, _Deliveries
from longspan.engine.update import Update
from longspan.errors import LongspanError
from longspan.llm import LLM
from longspan.models.detokenizer import LONG_TEXT, token_ids_of
from longspan.models.loader import load_tokenizer
from longspan.server import garbage
from longspan.server.turns import BEGINS, InTurn
from longspan.types import FinishReason


def update(*token_ids, reason=None, is_recovering=False):
    return Update([*token_ids], [], 1, 0, 0.0, reason, None, is_recovering=is_recovering)


def test_a_step_of_many_requests_is_told_some_at_a_time():
    async def tell():
        deliveries = _Deliveries()
        streams = [RequestStream(lambda _: None) for _ in range(5 * AT_ONCE)]
        deliveries.take([(stream, update(1)) for stream in streams])
        told = []
        for _ in range(6):
            told.append(sum(stream._updates.qsize() for stream in streams))
            await asyncio.sleep(0)
        return told

    assert asyncio.run(tell()) == [16, 32, 48, 64, 80, 80]


def test_what_waits_for_the_event_loop_is_merged_and_keeps_its_order():
    async def tell():
        deliveries = _Deliveries()
        first = [RequestStream(lambda _: None) for _ in range(AT_ONCE)]
        stream, failed = RequestStream(lambda _: None), RequestStream(lambda _: None)
        steps = [update(1), update(2, 3), update(is_recovering=True), update(4), update(5, reason=FinishReason.STOP)]
        for one in steps:
            deliveries.take([(other, update(9)) for other in first] + [(stream, one)])
        deliveries.take([(failed, update(7)), (failed, LongspanError("gone"))])
        assert (await anext(failed)).token_ids == [7]
        with pytest.raises(LongspanError, match="gone"):
            await anext(failed)
        return [(one.token_ids, one.is_recovering, one.finish_reason) async for one in stream]

    expected = [([1, 2, 3], False, None), ([], True, None), ([4, 5], False, FinishReason.STOP)]
    assert asyncio.run(tell()) == expected


def test_merged_updates_stay_short():
    async def tell():
        stream = RequestStream(lambda _: None)
        for i in range(3 * MOST_MERGED):
            stream.wait_with(update(i))
        return [len(one.token_ids) for one in stream.pending]

    assert asyncio.run(tell()) == [MOST_MERGED] * 3


def test_requests_that_come_together_begin_one_after_another():
    begun = []

    async def app(scope, receive, send):
        begun.append(scope["number"])

    async def come():
        in_turn = InTurn(app)
        tasks = [asyncio.create_task(in_turn({"number": i}, None, None)) for i in range(5 * BEGINS)]
        tasks[BEGINS + 1].cancel()  # a client that goes while it waits
        seen = []
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            seen.append(len(begun))
        await asyncio.gather(*tasks, return_exceptions=True)
        await in_turn({"number": -1}, None, None)
        return seen

    seen = asyncio.run(come())
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= BEGINS
    assert begun == [*(i for i in range(5 * BEGINS) if i != BEGINS + 1), -1]


def test_streams_that_begin_together_are_whole(cache_home):
    with (
        serving(max_num_seqs=40) as served,
        LLM(served.engine.config.model, executor="threads", threads_per_rank=1, kv_cache_memory=2**25) as llm,
    ):
        expected = alone(llm, max_tokens=12).outputs[0].text
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        for chunks in asyncio.run(gather(served.url, [body] * 80, COMPLETIONS)):
            assert texts(chunks) == [expected]


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_same_tokens(cache_home, special):
    tokenizer, rng = load_tokenizer("recall"), random.Random(1)
    text = "".join(rng.choice("ab é🙂\n<|eos|>") for _ in range(LONG_TEXT + 10))
    found = token_ids_of(tokenizer, text, add_special_tokens=special)
    assert found == tokenizer(text, add_special_tokens=special)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(5)  # what Transformers would undo
    assert token_ids_of(tokenizer, text, add_special_tokens=special) == found


@pytest.mark.slow
def test_long_texts_have_the_same_tokens_in_a_real_vocabulary(smollm2):
    tokenizer, rng = load_tokenizer(str(smollm2)), random.Random(1)
    for letters in ("abcdefghij", "ab \n.é🙂1", "<|im_start|> a"):
        text = "".join(rng.choice(letters) for _ in range(LONG_TEXT + 10)) + "<|im_end|>"
        found = token_ids_of(tokenizer, text, add_special_tokens=True)
        assert found == tokenizer(text, add_special_tokens=True)["input_ids"]


def test_everything_is_looked_at_for_garbage_when_no_request_is_open(monkeypatch):
    class State:
        num_open = 1

    looked, state = [], State()
    monkeypatch.setattr(garbage, "IDLE_S", 0.001)
    monkeypatch.setattr(gc, "collect", lambda: looked.append(state.num_open))

    async def run():
        task = asyncio.create_task(garbage.collect_when_idle(state))
        await asyncio.sleep(0.05)
        state.num_open = 0
        await asyncio.sleep(0.05)  # once, as nothing was open since
        state.num_open = 1
        monkeypatch.setattr(garbage, "LATEST_S", 0.0)
        await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(run())
    assert looked[0] == 0
    assert 0 not in looked[1:]
    assert 1 in looked
