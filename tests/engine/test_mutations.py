"""The comparison with Transformers notices broken code: every mutation here must change tokens, in every family.

A test that cannot fail proves nothing. Each mutation breaks one thing on purpose and in one place; if the tokens stayed
the same, `test_families` would not see that fault either.
"""

import pytest
from tiny_models import FAMILIES, greedy, run_all, tiny_engine, tiny_model

from longspan.comm.threads import ThreadCommunicator
from longspan.cp import base, eager, wire
from longspan.cp.resolve import StoreRun
from longspan.worker.forward import ModelForward

pytestmark = pytest.mark.cover

PROMPTS = slice(1, 3)  # 31 and 97 tokens
NUM_TOKENS = 32
PAGE_SIZE = 4
FAST = ("llama", "mistral-window-7", "qwen2-window-mix", "smollm3-window", "gemma3")


def generate(family, strategy):
    model = tiny_model(family)
    nodes = (0, 1, 1) if strategy == "tree" else (0, 0)
    with tiny_engine(
        model,
        context_parallel_size=len(nodes),
        nodes=nodes,
        placement="striped",
        page_size=PAGE_SIZE,
        stripe_size=2 * PAGE_SIZE,
        strategy=strategy,
    ) as engine:
        for runner in engine.executor.runners:
            for pool in runner.pools:
                for tensor in (*pool.k.values(), *pool.v.values()):
                    tensor.zero_()  # what was never written must not be luck
        requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in references(family)]
        run_all(engine)
    return [request.output_token_ids for request in requests]


def references(family):
    return tiny_model(family).references[PROMPTS]


def expected(family):
    return [reference.token_ids[:NUM_TOKENS] for reference in references(family)]


def change_stores(monkeypatch, change):
    """`change` gets {request: [(token, row) of its last stretch of new tokens on this rank]} and all (token, row)."""
    original = eager.store_runs

    def store_runs(rows, pool_layout):
        stores = {token + i: row + i for token, row, count in original(rows, pool_layout) for i in range(count)}
        newest = {}
        for (request_id, start, end), token in rows.items():
            newest[request_id] = range(token, token + end - start)
        change(stores, newest)
        return [StoreRun(token, row, 1) for token, row in stores.items()]

    monkeypatch.setattr(eager, "store_runs", store_runs)
    monkeypatch.setattr(eager, "is_scattered", lambda stores: False)  # it wants a row for every token


def drop_a_page(monkeypatch):
    """The last whole page of every request's prompt on every rank is not stored."""

    def drop(stores, newest):
        for tokens in newest.values():
            for token in tokens[-PAGE_SIZE:] if len(tokens) >= PAGE_SIZE else ():
                del stores[token]

    change_stores(monkeypatch, drop)


def swap_two_pages(monkeypatch):
    """Two requests' pages change places. (Two pages of one request may: a key knows its position.)"""

    def swap(stores, newest):
        if len(newest) == 2 and all(len(tokens) >= PAGE_SIZE for tokens in newest.values()):
            a, b = newest.values()
            for i, j in zip(a[-PAGE_SIZE:], b[-PAGE_SIZE:], strict=True):
                stores[i], stores[j] = stores[j], stores[i]

    change_stores(monkeypatch, swap)


def ignore_lse_in_one_merge(monkeypatch):
    """In decode, the answer of the other rank and one's own count the same."""

    def mutated(original):
        def merge_rows(acc, row, part):
            if part.lse.shape[0] > 2:
                return original(acc, row, part)
            rows = slice(row, row + part.lse.shape[0])
            acc.out[rows] = (acc.out[rows] + part.out) / 2
            return None

        return merge_rows

    for module in (base, wire):
        monkeypatch.setattr(module, "merge_rows_", mutated(module.merge_rows_))


def shift_positions_on_one_rank(monkeypatch):
    original = ModelForward.run

    def run(self, attention, token_ids, positions, logit_rows, **options):
        return original(self, attention, token_ids, positions + (attention.rank == 1), logit_rows, **options)

    monkeypatch.setattr(ModelForward, "run", run)


def lose_every_third_message(monkeypatch):
    """It arrives as zeros."""
    original = ThreadCommunicator.receive

    def receive(self, peer, tensor):
        original(self, peer, tensor)
        self.num_received = getattr(self, "num_received", 0) + 1
        if self.num_received % 3 == 2:
            tensor.zero_()

    monkeypatch.setattr(ThreadCommunicator, "receive", receive)


@pytest.mark.cover(cases=12)
@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
@pytest.mark.parametrize(
    ("mutation", "strategy"),
    [
        (drop_a_page, "pass_q"),
        (swap_two_pages, "pass_kv"),
        (ignore_lse_in_one_merge, "pass_q"),
        (shift_positions_on_one_rank, "gather_kv"),
        (lose_every_third_message, "pass_q"),
        (ignore_lse_in_one_merge, "tree"),
        (lose_every_third_message, "tree"),
    ],
)
def test_a_mutation_changes_tokens(family, mutation, strategy, monkeypatch):
    mutation(monkeypatch)
    assert generate(family, strategy) != expected(family)


@pytest.mark.parametrize("strategy", ["pass_q", "pass_kv", "gather_kv", "tree"])
def test_the_same_run_without_a_mutation_changes_nothing(strategy):
    assert generate("gemma3", strategy) == expected("gemma3")
