"""Every family of the table gives Transformers' greedy tokens, and its log-probabilities up to rounding."""

import pytest
import transformers
from proven_models import PROVEN_MODELS, SPREADS, check_proven, proven_engine, proven_model

from longspan.models.families import PROVEN_FAMILIES, Need, version_of

FAST = ("gather_kv", "pass_q", "pass_kv", "tree", "auto")
FAST_CASES = [(name, FAST[i % len(FAST)]) for i, name in enumerate(PROVEN_MODELS)]
"""One case per family; every family's others are slow tests."""

SLOW_CASES = [(name, spread) for name in PROVEN_MODELS for spread in SPREADS]


def check(name: str, spread: str) -> None:
    family = PROVEN_FAMILIES[PROVEN_MODELS[name][0]]
    if version_of(transformers.__version__) < version_of(family.since):
        pytest.skip(f"proven from Transformers {family.since} on")
    # Recurrences are float32 in float64 models too, and cut elsewhere they round elsewhere: Transformers' own chunks of
    # a prompt change log-probabilities of these models by 6e-5 to 3e-4.
    slack = 1e-4 if Need.STATES in family.needs else 2e-6
    model = proven_model(name)
    with proven_engine(model, **SPREADS[spread]) as engine:
        check_proven(model, engine, slack)
        counts = [stats.tokens_computed for stats in engine.rank_stats()]
    assert all(counts), "every rank computed something"


@pytest.mark.cover(cases=26)  # of 105, with every strategy
@pytest.mark.parametrize(("name", "spread"), FAST_CASES)
def test_a_proven_family_gives_the_tokens_and_log_probabilities_of_transformers(name, spread):
    check(name, spread)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spread"), SLOW_CASES)
def test_a_proven_family_gives_the_tokens_and_log_probabilities_of_transformers_in_every_spread(name, spread):
    check(name, spread)


def test_every_row_of_the_table_has_a_model():
    assert {model_type for model_type, _ in PROVEN_MODELS.values()} == set(PROVEN_FAMILIES)


@pytest.mark.slow
def test_no_more_than_some_families_repeat_themselves():
    """A model that repeats one token proves little by its tokens; then the log-probabilities are what is proven."""
    repeating = {
        name
        for name in PROVEN_MODELS
        if len({token for r in proven_model(name).references for token in r.token_ids}) < 24
    }
    assert len(repeating) < len(PROVEN_MODELS) // 6, sorted(repeating)
