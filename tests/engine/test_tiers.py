"""KV on disk: what some ranks wrote, others go on from, with the tokens that Transformers gives.

Real tiny models on ranks that are threads; every engine is one start of a process. Damage, lost files, full disks and
lost ranks cost time, never a token.
"""

import errno
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from tiny_models import (
    NUM_TOKENS,
    PROMPT_LENS,
    Reference,
    TinyModel,
    all_pairs,
    greedy,
    memory_for,
    random_prompt,
    run_all,
    tiny_engine,
    tiny_model,
)

from longspan.config import EngineConfig
from longspan.engine import disk_keeper
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
from longspan.kv.page_bytes import PageBytes
from longspan.kv.page_directory import MARK, MODEL, ModelPages, all_pages
from longspan.scheduler import tiers as tiers_module
from longspan.scheduler.loading import Loading
from longspan.scheduler.request import Request
from longspan.scheduler.tiers import TierCounts
from longspan.worker import page_mover

OPTIONS = {"page_size": 16, "stripe_size": 64, "max_num_batched_tokens": 200, "check_invariants": 1}


@pytest.fixture(autouse=True)
def loading_is_sooner(monkeypatch):
    """Than computing, whatever either takes here."""
    monkeypatch.setattr(tiers_module, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30})
    monkeypatch.setattr(tiers_module, "MEMORY", 1.0)
    monkeypatch.setattr(page_mover, "NICENESS", 0)


def reference(model: TinyModel, length: int) -> Reference:
    return model.references[PROMPT_LENS.index(length)]


@contextmanager
def engine_on(model: TinyModel, directory: Path, **options: object) -> Iterator[Engine]:
    with tiny_engine(model, **{**OPTIONS, "kv_disk": str(directory), **options}) as engine:
        yield engine
        engine.tiers.flush(engine.scheduler, engine.executor)


def serve(engine: Engine, *prompts: list[int], max_tokens: int = NUM_TOKENS) -> list[Request]:
    requests = [engine.add_request(prompt, greedy(max_tokens)) for prompt in prompts]
    run_all(engine)
    return requests


def counts(engine: Engine) -> TierCounts:
    return engine.scheduler.memory.tiers.counts["disk"]


def pages_of(directory: Path) -> list[Path]:
    return sorted(page.path for page in all_pages(directory))


CASES = all_pairs(
    {
        "family": ("llama", "mistral-window-24", "gemma3", "llama4", "youtu", "gpt_oss"),
        "writers": (1, 2, 3),
        "readers": (2, 3, 1, 5),
        "placements": (("striped", "packed"), ("packed", "striped"), ("auto", "spill"), ("spill", "auto")),
        "kv_cache_dtype": ("auto", "int8", "bfloat16"),
    }
)


@pytest.mark.cover
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_what_some_ranks_wrote_others_go_on_from(case, tmp_path):
    model, dtype = tiny_model(case["family"]), case["kv_cache_dtype"]
    wanted = reference(model, 1025)
    found: list[Request] = []
    ranks = (case["writers"], case["readers"])
    for num_ranks, placement in zip(ranks, case["placements"], strict=True):
        options = {"context_parallel_size": num_ranks, "placement": placement, "kv_cache_dtype": dtype}
        with engine_on(model, tmp_path, **options) as engine:
            found += serve(engine, wanted.prompt)
            computed = sum(stats.tokens_computed for stats in engine.rank_stats())
            load_s = counts(engine).load_s
    assert [request.num_cached for request in found] == [0, 1024]
    assert load_s > 0.0
    assert computed == 1 + NUM_TOKENS - 1
    assert found[0].output_token_ids == found[1].output_token_ids
    if dtype == "auto":
        assert found[1].output_token_ids == wanted.token_ids


def test_an_answer_is_found_by_the_next_turn_of_a_chat(tmp_path):
    model = tiny_model("llama")
    wanted = reference(model, 97)
    with engine_on(model, tmp_path, context_parallel_size=2) as engine:
        serve(engine, wanted.prompt, max_tokens=40)
    with engine_on(model, tmp_path) as engine:
        (turn,) = serve(engine, wanted.prompt + wanted.token_ids[:40], max_tokens=24)
    assert turn.num_cached == 128
    assert turn.output_token_ids == wanted.token_ids[40:]


def test_pages_that_memory_cannot_hold_come_back_from_the_disk(tmp_path):
    model = tiny_model("llama")
    prompts = [random_prompt(300, seed) for seed in range(6)]
    with tiny_engine(model) as engine:
        alone = [request.output_token_ids for request in serve(engine, *prompts, max_tokens=8)]
    memory = memory_for(model, 400)
    with engine_on(model, tmp_path, kv_cache_memory=memory) as engine:
        for _ in range(2):
            found: list[Request] = []
            for prompt in prompts:
                found += serve(engine, prompt, max_tokens=8)
                engine.tiers.flush(engine.scheduler, engine.executor)
            assert [request.output_token_ids for request in found] == alone
        assert [request.num_cached for request in found] == [288] * 6
        assert counts(engine).hit_tokens == 6 * 288


@pytest.mark.parametrize("family", ["mistral-window-24", "gemma3", "gpt_oss"])
def test_copied_pages_and_loaded_ones_of_a_request_leave_others_theirs(family, tmp_path, monkeypatch):
    """Loaded pages may lie so far behind those to copy that windows have left these before any is copied."""
    began: dict[int, tuple[bool, bool]] = {}  # request to whether it waits for pages, and has others to copy
    original = Loading.begin

    def begin(self, request):
        has_copies = bool(request.allocation.copies)
        began[request.request_id] = (original(self, request), has_copies)
        return began[request.request_id][0]

    monkeypatch.setattr(Loading, "begin", begin)
    model = tiny_model(family)
    wanted, others = reference(model, 1025), [random_prompt(150, seed) for seed in range(4)]
    options = {"context_parallel_size": 2, "placement": "packed", "kv_cache_memory": memory_for(model, 2500)}
    with engine_on(model, tmp_path, **options) as engine:
        alone = [serve(engine, prompt)[0].output_token_ids for prompt in others]
        serve(engine, wanted.prompt)
    with engine_on(model, tmp_path, **options) as engine:
        (start,) = serve(engine, wanted.prompt[:300])
        pools = enumerate(engine.scheduler.memory.allocators)
        (home,) = [rank for rank, of_rank in pools if of_rank[0].find(start.page_hashes[17]) is not None]
        busy = [engine.add_request(random_prompt(900, seed), greedy(1)) for seed in (7, 8)]
        engine.step()
        elsewhere = next(request for request in busy if request.allocation.ranks != {home})
        engine.scheduler.cancel(elsewhere)
        while elsewhere.finish_reason is None:
            engine.step()
        requests = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in (wanted.prompt, *others)]
        run_all(engine)
    assert began[requests[0].request_id] == (True, True)
    assert [request.output_token_ids for request in requests] == [wanted.token_ids, *alone]
    assert requests[0].num_cached == 1024


@pytest.mark.cover(cases=3)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("family", "placement"), [("llama", "striped"), ("gemma3", "striped"), ("youtu", "packed")])
def test_pages_that_memory_cannot_hold_come_back_from_host_memory(family, placement, num_ranks, tmp_path):
    model = tiny_model(family)
    prompts = [random_prompt(300, seed) for seed in range(6)]
    with tiny_engine(model) as engine:
        alone = [request.output_token_ids for request in serve(engine, *prompts, max_tokens=8)]
    options = {
        **OPTIONS,
        "context_parallel_size": num_ranks,
        "placement": placement,
        "kv_cache_memory": memory_for(model, 600 // (num_ranks if placement == "striped" else 1)),
        "kv_host_memory": memory_for(model, 3000),
    }
    with tiny_engine(model, **options) as engine:
        for _ in range(2):
            found: list[Request] = []
            for prompt in prompts:
                found += serve(engine, prompt, max_tokens=8)
                engine.tiers.flush(engine.scheduler, engine.executor)
            assert [request.output_token_ids for request in found] == alone
        host = engine.scheduler.memory.tiers.counts["host"]
        assert host.failed_pages == 0
        assert host.hit_tokens > 3 * 288
        assert sum(request.num_cached for request in found) > 5 * 250
        assert 0 < engine.scheduler.memory.tiers.num_bytes("host") <= num_ranks * options["kv_host_memory"]


def test_host_memory_keeps_what_was_used_last(tmp_path):
    model = tiny_model("llama")
    prompts = [random_prompt(300, seed) for seed in range(4)]
    options = {"kv_cache_memory": memory_for(model, 400), "kv_host_memory": memory_for(model, 700)}
    with tiny_engine(model, **OPTIONS, **options) as engine:
        for i in (0, 1, 0, 2, 3, 0):
            serve(engine, prompts[i], max_tokens=4)
            engine.tiers.flush(engine.scheduler, engine.executor)
            assert engine.scheduler.memory.tiers.num_bytes("host") <= options["kv_host_memory"]
        assert serve(engine, prompts[3], max_tokens=4)[0].num_cached == 288


def test_both_tiers_get_every_page_and_memory_is_asked_first(tmp_path):
    model = tiny_model("llama")
    prompts = [random_prompt(300, seed) for seed in range(4)]
    options = {"kv_cache_memory": memory_for(model, 400), "kv_host_memory": memory_for(model, 3000)}
    with engine_on(model, tmp_path, **options) as engine:
        for prompt in (*prompts, prompts[0]):
            serve(engine, prompt, max_tokens=4)
            engine.tiers.flush(engine.scheduler, engine.executor)
        tiers = engine.scheduler.memory.tiers
        assert tiers.num_pages("host") == tiers.num_pages("disk") == len(pages_of(tmp_path))
        assert (tiers.counts["host"].num_loads, tiers.counts["disk"].num_loads) == (1, 0)
    with engine_on(model, tmp_path, **options) as engine:
        assert serve(engine, prompts[0], max_tokens=4)[0].num_cached == 288
        assert engine.scheduler.memory.tiers.counts["disk"].num_loads == 1


@pytest.mark.cover
def test_preempted_requests_come_back_from_the_disk(tmp_path):
    model = tiny_model("mistral-window-24")
    prompts = [random_prompt(60, seed) for seed in range(6)]
    with tiny_engine(model) as engine:
        alone = [request.output_token_ids for request in serve(engine, *prompts)]
    for family_memory in (200, 300):
        with engine_on(
            model, tmp_path, context_parallel_size=2, kv_cache_memory=memory_for(model, family_memory), page_size=4
        ) as engine:
            found = serve(engine, *prompts)
            assert engine.scheduler.num_preemptions or family_memory == 300
            assert [request.output_token_ids for request in found] == alone


def damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.cover(cases=3)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_damaged_and_lost_pages_are_counted_and_computed(family, how, tmp_path):
    model, rng = tiny_model(family), random.Random(3)
    wanted = reference(model, 1025)
    with engine_on(model, tmp_path, context_parallel_size=2, placement="striped") as engine:
        serve(engine, wanted.prompt)
    for num_ranks in (1, 3):
        with engine_on(model, tmp_path, context_parallel_size=num_ranks, placement="striped") as engine:
            bad = rng.sample(pages_of(tmp_path), 4)
            for path in bad:
                damage(path, how, rng)
            (request,) = serve(engine, wanted.prompt)
            assert request.output_token_ids == wanted.token_ids
            assert request.num_cached < 1024
            assert counts(engine).failed_pages
            assert bool(counts(engine).damaged_pages) == (how != "gone")
        with engine_on(model, tmp_path) as engine:  # they were written again
            (request,) = serve(engine, wanted.prompt)
            assert request.output_token_ids == wanted.token_ids
            assert request.num_cached == 1024


def test_a_full_disk_is_said_once_and_serving_goes_on(tmp_path, caplog):
    model = tiny_model("llama")
    wanted = reference(model, 97)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(ModelPages, "write", full), engine_on(model, tmp_path) as engine:
        for _ in range(3):
            assert serve(engine, wanted.prompt)[0].output_token_ids == wanted.token_ids
        assert counts(engine).failed_pages
        assert counts(engine).stored_pages == 0
    assert [record.message.count("No space left on device") for record in caplog.records] == [1]


def test_a_directory_that_goes_while_it_is_used_is_said_once(tmp_path, caplog):
    model = tiny_model("llama")
    wanted = reference(model, 1025)
    directory = tmp_path / "kv"
    with engine_on(model, directory) as engine:
        serve(engine, wanted.prompt)
    with engine_on(model, directory) as engine:
        shutil.rmtree(directory)
        for prompt in (wanted.prompt, random_prompt(97, 77)):
            (request,) = serve(engine, prompt)
            assert request.num_cached == 0
            engine.tiers.flush(engine.scheduler, engine.executor)
    assert len([record for record in caplog.records if "kv_disk" in record.message]) <= 1


def test_a_disk_that_does_not_answer_holds_nobody_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page_mover, "READ_S", 0.05)
    model, release = tiny_model("llama"), threading.Event()
    wanted = reference(model, 1025)
    with engine_on(model, tmp_path) as engine:
        serve(engine, wanted.prompt)
    read = ModelPages.read

    def wait_and_read(*arguments: object) -> None:
        release.wait()
        read(*arguments)

    with mock.patch.object(ModelPages, "read", wait_and_read), engine_on(model, tmp_path) as engine:
        for _ in range(2):
            (request,) = serve(engine, wanted.prompt)
            assert request.num_cached in (0, 1024), "0, then what was computed"
            assert request.output_token_ids == wanted.token_ids
        release.set()
    assert [record.message.count("did not answer") for record in caplog.records] == [1]


def test_a_move_that_breaks_is_no_more_than_lost_pages(tmp_path, monkeypatch, caplog):
    model = tiny_model("llama")
    wanted = reference(model, 97)
    with engine_on(model, tmp_path) as engine:
        serve(engine, wanted.prompt)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PageBytes, "scatter", broken)
    with engine_on(model, tmp_path) as engine:
        (request,) = serve(engine, wanted.prompt)
    assert request.output_token_ids == wanted.token_ids
    assert request.num_cached == 0
    assert [record.message.count("RuntimeError: out of memory") for record in caplog.records] == [1]


def test_the_files_used_longest_ago_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_keeper, "LOOK_EVERY_S", 0.01)
    model = tiny_model("llama")
    prompts = [random_prompt(160, seed) for seed in range(4)]
    with engine_on(model, tmp_path) as engine:
        serve(engine, prompts[0], max_tokens=1)
    of_one = sum(page.num_bytes for page in all_pages(tmp_path))
    with engine_on(model, tmp_path, kv_disk_size=int(2.6 * of_one)) as engine:
        for prompt in (prompts[1], prompts[0], prompts[2]):
            serve(engine, prompt, max_tokens=1)
            engine.tiers.flush(engine.scheduler, engine.executor)
    assert sum(page.num_bytes for page in all_pages(tmp_path)) <= 2.6 * of_one
    with engine_on(model, tmp_path) as engine:
        cached = [serve(engine, prompt, max_tokens=1)[0].num_cached for prompt in prompts]
    assert cached[0] == cached[2] == 144
    assert 0 < cached[1] < 144, "its last pages went, its first ones are still of use"


def test_two_engines_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_keeper, "LOOK_EVERY_S", 0.01)
    model = tiny_model("llama")
    wanted = reference(model, 1025)
    with engine_on(model, tmp_path) as one, engine_on(model, tmp_path, context_parallel_size=2) as two:
        serve(one, wanted.prompt)
        one.tiers.flush(one.scheduler, one.executor)
        while two.scheduler.memory.tiers.num_pages("disk") < 64:
            two.tiers.tell(two.scheduler)
        (request,) = serve(two, wanted.prompt)
        assert request.num_cached == 1024
        assert request.output_token_ids == wanted.token_ids
        both = random_prompt(500, 9)
        found = serve(one, both) + serve(two, both)
        assert found[0].output_token_ids == found[1].output_token_ids
    names = [path.name for path in pages_of(tmp_path)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 8},
        {"kv_cache_dtype": "bfloat16"},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}},
    ],
)
def test_pages_of_another_layout_or_model_are_not_found(change, tmp_path):
    model = tiny_model("llama")
    with engine_on(model, tmp_path) as engine:
        serve(engine, random_prompt(200, 1), max_tokens=1)
    with engine_on(model, tmp_path, **change) as engine:
        assert serve(engine, random_prompt(200, 1), max_tokens=1)[0].num_cached == 0
    other = tiny_model("llama-one-kv-head")
    with engine_on(other, tmp_path) as engine:
        assert serve(engine, random_prompt(200, 1), max_tokens=1)[0].num_cached == 0
    assert len(list(tmp_path.rglob(MODEL))) == 3


def test_nothing_of_a_prompt_is_in_a_name(tmp_path):
    with engine_on(tiny_model("llama"), tmp_path) as engine:
        serve(engine, random_prompt(100, 1), max_tokens=1)
    digits = set("0123456789abcdef")
    names = [path.name for path in tmp_path.rglob("*")]
    assert all(set(name) <= digits for name in names if name not in (MARK, MODEL))


def test_a_page_in_another_ones_place_changes_tokens(tmp_path, monkeypatch):
    """Else the other tests would prove little. (Pages that only change places change nothing: keys have their RoPE.)"""
    model = tiny_model("llama")
    wanted = reference(model, 1025)
    with engine_on(model, tmp_path) as engine:
        serve(engine, wanted.prompt)
    scatter = PageBytes.scatter
    monkeypatch.setattr(
        PageBytes, "scatter", lambda pool, slots, pages: scatter(pool, slots, pages[:1].expand_as(pages))
    )
    with engine_on(model, tmp_path) as engine:
        (request,) = serve(engine, wanted.prompt)
    assert request.num_cached == 1024
    assert request.output_token_ids != wanted.token_ids


def test_rejects_what_no_disk_can_serve(tmp_path):
    model = tiny_model("llama")
    refusals = {
        "kv_disk_size: got 5 without kv_disk": {"kv_disk": None, "kv_disk_size": 5},
        "kv_disk_size: got 0, legal is a whole number from 1": {"kv_disk_size": 0},
        "kv_host_memory: got 0, legal is a whole number from 1": {"kv_host_memory": 0},
        "kv_disk: got one with device 'cuda'": {"device": "cuda"},
        "kv_disk: got one without prefix caching": {"enable_prefix_caching": False},
        "kv_disk: got one with executor 'ray'": {"executor": "ray"},
        "kv_disk: got ''": {"kv_disk": ""},
    }
    for message, options in refusals.items():
        with pytest.raises(ConfigError, match=message):
            EngineConfig(model=model.path, **{"kv_disk": str(tmp_path), **options})
    much = r"kv_host_memory: got \d+ bytes per rank, legal is at most"
    with pytest.raises(ConfigError, match=much), engine_on(model, tmp_path, kv_host_memory=2**50):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"kv_disk: got .*file"), engine_on(model, tmp_path / "file"):
        pass
