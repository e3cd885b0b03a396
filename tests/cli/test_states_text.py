"""What `--explain` says of recurrent layers."""

from longspan.cli.explain import states_text
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.scheduler.state_parts import PartsNote
from longspan.types import ModelSpec


def spec_of(*groups):
    return ModelSpec("tiny", 6, 100, None, (), (), (None,) * 6, state_groups=groups)


def test_recurrent_layers_are_counted_with_their_states():
    delta = StateGroup((0, 2), (StateComponent("recurrent", 0, (4, 16, 16), "float32"),))
    conv = StateGroup((1,), (StateComponent("conv", 0, (64, 3), "float32"),))
    text = states_text(spec_of(delta, conv))
    assert text.startswith("recurrent layers: 3 of 6, 0.00896 MB of state per request; a run waits for the state")
    assert text.endswith("decode steps are no CUDA graphs")


def test_parts_of_states_are_told_with_their_predicted_times():
    delta = StateGroup((0, 2), (StateComponent("recurrent", 0, (4, 16, 16), "float32", 4),))
    notes = [PartsNote(4, False, 96, 3, 0.002, 0.005, num_steps=2), PartsNote(1, True, 64, 2, 0.004, 0.004)]
    notes.append(PartsNote(1, False, 64, 2, None, None))
    assert states_text(spec_of(delta), notes).splitlines()[1:] == [
        "    states handed on in 4 parts 2 times; first 96 tokens on 3 ranks: predicted 2.000 ms in all layers, "
        "whole 5.000 ms",
        "    states handed on whole, forced, 1 time; first 64 tokens on 2 ranks: predicted 4.000 ms in all layers",
        "    states handed on whole 1 time; first 64 tokens on 2 ranks",
    ]


def test_nothing_is_said_without_recurrent_layers():
    assert states_text(spec_of()) is None
