"""How many bits a model needs for tokens: the kernel of bits per byte and of choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from diffract.errors import CheckpointError, printable
from diffract.evaluate.batches import Budget, run_batches
from diffract.evaluate.subject import Subject

LOGITS_BYTES = 1 << 31
"""Of float32 logits a batch has no more."""

POSITIONS_AT_ONCE = 1024
"""The logits of so many positions are upcast at a time."""


@dataclass(frozen=True)
class Row:
    """A sequence of tokens.

    Attributes:
        ids: All but the last are given to the model, all but the first are predicted.
        scored: How many of the last ones count.
        item: What to call it in a message.
    """

    ids: Sequence[int]
    scored: int
    item: str


def row_bits(subject: Subject, rows: Sequence[Row], budget: Budget) -> list[float]:
    """Return for each row -sum log2 p(token | those before it) over its last ``scored`` tokens.

    Logits are upcast to float32 for the log-softmax, sums are float64. Rows are padded on the right and masked, so that
    a causal model's numbers do not depend on what else is in a batch but for rounding.

    Raises:
        CheckpointError: A sum is NaN or infinite, or memory does not suffice for one row.
    """
    most = LOGITS_BYTES // (4 * subject.vocabulary)
    return run_batches(rows, lambda row: len(row.ids) - 1, lambda batch: _batch_bits(subject, batch), budget, most=most)


@torch.inference_mode()
def _batch_bits(subject: Subject, rows: list[Row]) -> list[float]:
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    known = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.as_tensor(row.ids)
        known[i, : len(row.ids) - 1] = 1
    ids, known = ids.to(subject.device), known.to(subject.device)
    logits_BTV = subject.model(input_ids=ids[:, :-1], attention_mask=known[:, :-1], use_cache=False).logits
    spans = [slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for row in rows]
    nats = [_nats(logits_BTV[i, span], ids[i, 1:][span]) for i, span in enumerate(spans)]
    sums = (torch.stack(nats) / log(2)).tolist()
    for row, bits in zip(rows, sums, strict=True):
        if not bits < float("inf"):
            raise CheckpointError(
                f"{printable(subject.name)}: {bits} bits for {printable(row.item)}: its logits are not finite. The "
                "weights hold NaN or Inf, or the dtype overflows; try --dtype float32."
            )
    return sums


def _nats(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the cross-entropy of a row's targets, summed in float64."""
    parts = zip(logits_TV.split(POSITIONS_AT_ONCE), targets_T.split(POSITIONS_AT_ONCE), strict=True)
    sums = [torch.nn.functional.cross_entropy(a.float(), b, reduction="none").double().sum() for a, b in parts]
    return torch.stack(sums).sum()
