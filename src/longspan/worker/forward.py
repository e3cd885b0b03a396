"""Call of one rank's model with a step's attention.

Holds the call of a Transformers model: its inputs, and the attention of its layers. Must not know plans, sampling or
graphs.
Read next: `longspan.models.hook`, through which layers call attention; `longspan.worker.runner` and
`longspan.worker.graphs`, which call this.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.cp.relay import ComputeLayer, Relay
from longspan.cp.step import StepAttention
from longspan.kv.state_layout import StateComponent
from longspan.models.adapters import ROW_ADAPTERS
from longspan.models.hook import AttentionCall
from longspan.models.last_layer import READ_ROWS
from longspan.models.recurrent import StepCache
from longspan.models.row_rope import ROW_LENGTHS
from longspan.types import AttentionParams


class StepOutput(NamedTuple):
    """Result of a step on one rank."""

    logits: Tensor | None
    """[n, vocab] logits of the rows that the plan reads, which the next step may overwrite; None on a rank without
    rows."""
    bytes_sent: Mapping[str, int]
    """Bytes that this rank sent in the step, per strategy."""
    capture_failed: bool = False
    """Whether the step was to be captured, and could not be."""


class ModelForward:
    """Runner of a step's layers: the model's, or on a rank without rows those of attention alone."""

    def __init__(
        self,
        model: nn.Module,
        layer_params: Sequence[AttentionParams | None],
        before_layer: Callable[[int], None],
        state_layouts: Mapping[int, Sequence[StateComponent]] | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: model with the `longspan` attention function.
            layer_params: attention parameters of every layer; None in a layer without attention.
            before_layer: function called with the layer's index before every layer.
            state_layouts: layout of the state of every recurrent layer; None if there are none.
        """
        self._model: Any = model
        self._before_layer = before_layer
        self._state_layouts = state_layouts or {}
        self.layer_params = layer_params
        self.device = next(model.parameters()).device
        # A mask with four dimensions is taken as it is; without one, Transformers looks for packed rows in every step.
        self._no_mask = torch.empty(1, 1, 0, 0, device=self.device)

    def run(
        self,
        attention: StepAttention,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        *,
        states: Relay | None = None,
        dense_threads: int | None = None,
        row_lengths: Sequence[int] | None = None,
        row_adapters: Sequence[int | None] | None = None,
    ) -> Tensor:
        """Run the model over a rank's packed rows.

        Args:
            attention: attention of the step.
            token_ids: [T] input tokens.
            positions: [T] global positions.
            logit_rows: [n] int64 packed rows that need logits.
            states: states of the step, if the model has recurrent layers; without, every state is new.
            dense_threads: threads for all but attention and exchanges; None: as many as for these.
            row_lengths: [T] length that counts for RoPE in every row; None where it does not matter.
            row_adapters: [T] adapter of every row, None for a row without; None where no row has one.

        Returns:
            [n, vocab] logits of `logit_rows`.

        Collective: all ranks of the step call this or `join`.
        """
        params, own_threads = self.layer_params, torch.get_num_threads()
        dense_threads = own_threads if dense_threads is None else dense_threads
        is_lent = dense_threads != own_threads

        def attend(call: AttentionCall) -> Tensor:
            self._before_layer(call.layer)
            expected = params[call.layer]
            assert expected is not None, f"layer {call.layer} had no attention"
            assert (call.scale, call.softcap, call.window) == (expected.scale, expected.softcap, expected.window)
            if is_lent:
                torch.set_num_threads(own_threads)  # the others compute too
            attended = attention.attend(call.layer, call.q, call.k, call.v, sinks=call.sinks)
            if is_lent:
                torch.set_num_threads(dense_threads)
            return attended

        if is_lent:
            torch.set_num_threads(dense_threads)
        try:
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                attention_mask=self._no_mask,
                use_cache=False,
                logits_to_keep=logit_rows,
                longspan_attend=attend,
                **{READ_ROWS: attention.read_rows},
                **({} if states is None else {"cache": self._cache(states)}),
                **({} if row_lengths is None else {ROW_LENGTHS: row_lengths}),
                **({} if row_adapters is None else {ROW_ADAPTERS: row_adapters}),
            )
        finally:
            if is_lent:
                torch.set_num_threads(own_threads)
        logits: Tensor = output.logits[0]
        assert logits.shape[0] == len(logit_rows)
        return logits

    def _cache(self, states: Relay) -> StepCache:
        def run_layer(layer: int, compute: ComputeLayer) -> Tensor:
            self._before_layer(layer)
            return states.run_layer(layer, compute)

        return StepCache(self._state_layouts, run_layer)

    def join(self, attention: StepAttention) -> None:
        """Take part in all layers of a step on a rank without rows.

        Collective: all ranks of the step call `run` or this.
        """
        for layer, params in enumerate(self.layer_params):
            self._before_layer(layer)
            if params is not None:
                attention.join(layer)

    def begin_layers(self) -> None:
        """Call `before_layer` for all layers at once, for a launch that repeats a whole step."""
        for layer in range(len(self.layer_params)):
            self._before_layer(layer)
