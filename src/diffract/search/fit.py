"""Numbers that are learned on text: factors of what training changed, and for comparison all weights.

A factor f = 1 + z belongs to a part P of the change, W = W1 + z P: a singular direction s u v^T, or a whole matrix,
slice or vector. Its gradient is <dL/dW, P>, of a direction s u^T (dL/dW) v. One backward pass gives them all: when the
gradient of a weight is there, it is read and let go, so that no more than one is held.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffract.edits.draft import Place
from diffract.errors import SelectionError
from diffract.evaluate import Subject
from diffract.evaluate.scoring import Row, windows
from diffract.search.sample import batches, gradients_of, sum_of_bits


@dataclass(frozen=True)
class FitText:
    """The text of one task that numbers are learned on.

    Attributes:
        rows: Tokens, each predicted once.
        size_bytes: The length of the text.
        weight: What a bit per byte of it counts in the objective.
    """

    rows: tuple[Row, ...]
    size_bytes: int
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(row.scored for row in self.rows)


def fit_text(subject: Subject, texts: Sequence[str], tokens: int) -> FitText:
    """Return the first texts that together have so many tokens, one at least."""
    rows: list[Row] = []
    size = 0
    for text, ids in zip(texts, subject.encode(texts), strict=True):
        rows += windows([*subject.start, *ids], subject.context, "text")
        size += len(text.encode())
        if sum(row.scored for row in rows) >= tokens:
            break
    return FitText(tuple(rows), size)


@dataclass(frozen=True)
class FitSettings:
    """How numbers are learned, by Adam.

    Attributes:
        rate: The size of a step.
        passes: How often all of the text is read.
        batch_tokens: Tokens of each step, of the longest text; of others as large a share.
        seed: Of the order in which text is read.
    """

    rate: float
    passes: int
    batch_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.passes >= 1 and self.batch_tokens >= 1):
            raise SelectionError(
                f"expected rate above 0, passes and batch_tokens from 1; got {self.rate}, {self.passes} and "
                f"{self.batch_tokens}."
            )

    def steps(self, texts: Sequence[FitText]) -> int:
        """How many steps a pass has."""
        return max(1, round(max(text.tokens for text in texts) / self.batch_tokens))

    def dealt(self, texts: Sequence[FitText]) -> Iterator[list[list[Row]]]:
        """Yield for each step the rows of each text; in every pass each row is dealt once, in another order."""
        count = self.steps(texts)
        for turn in range(self.passes):
            # A generator of its own for each pass: what a search did before does not move it.
            order = random.Random(f"{self.seed} {turn}")
            shuffled = [order.sample(text.rows, len(text.rows)) for text in texts]
            for step in range(count):
                yield [rows[step::count] for rows in shuffled]


def learn(model: torch.nn.Module, texts: Sequence[FitText], settings: FitSettings, taken: Callable[[], None]) -> None:
    """Go through the text, and let a step be taken after each share of it.

    The objective is sum over texts of weight x bits per byte; its gradient is where the backward pass leaves it.

    Args:
        model: The model, in evaluation mode.
        texts: The text of each task.
        settings: How it is dealt.
        taken: Takes a step, and forgets the gradient.
    """
    device = next(model.parameters()).device
    for step in settings.dealt(texts):
        for text, rows in zip(texts, step, strict=True):
            if not rows or text.weight == 0:
                continue
            # A share stands for the whole text: bits per token there, times the tokens to a byte of all.
            count = text.weight * text.tokens / text.size_bytes / sum(row.scored for row in rows)
            for batch in batches(rows, device):
                (count * sum_of_bits(model, batch)).backward()
        taken()


@dataclass(frozen=True)
class LearnedPart:
    """A part of a tensor's change, with the factors that are learned of it.

    Attributes:
        name: What tables of factors call it: a matrix, a head's slice, or a tensor.
        tensor: The tensor.
        place: Where in it.
        change: The whole change there, where there is one factor for it.
        U: Left vectors as columns, (m, M), where every direction has its own.
        S: Singular values (M,).
        Vh: Right vectors as rows, (M, n).
    """

    name: str
    tensor: str
    place: Place
    change: Tensor | None = None
    U: Tensor | None = None
    S: Tensor | None = None
    Vh: Tensor | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> LearnedPart:
        """Return the part where a model lies, in what its steps are computed in."""
        moved = {n: getattr(self, n) for n in ("change", "U", "S", "Vh") if getattr(self, n) is not None}
        return replace(self, **{name: tensor.to(device, dtype) for name, tensor in moved.items()})

    def start(self) -> Tensor:
        """Return z of the tuned model: zeros, one for each direction or one for all."""
        shape = () if self.S is None else self.S.shape
        held = self.change if self.S is None else self.S
        assert held is not None
        return torch.zeros(shape, dtype=held.dtype, device=held.device)

    def slope(self, gradient: Tensor) -> Tensor:
        """Return dL/dz from dL/dW of the part."""
        if self.change is not None:
            return (gradient * self.change).sum()
        assert self.U is not None and self.S is not None and self.Vh is not None
        return self.S * ((self.U.mT @ gradient.reshape(len(self.U), -1)) * self.Vh).sum(-1)

    def moved(self, z: Tensor) -> Tensor:
        """Return z P."""
        if self.change is not None:
            return z * self.change
        assert self.U is not None and self.S is not None and self.Vh is not None
        return (self.U * (z * self.S)) @ self.Vh


def learn_factors(
    model: torch.nn.Module, parts: Sequence[LearnedPart], texts: Sequence[FitText], settings: FitSettings
) -> dict[str, Tensor]:
    """Return the factors of each part, in float64; the model is as it was afterwards.

    Args:
        model: The tuned model, in evaluation mode.
        parts: What has factors; of one tensor they do not overlap.
        texts: The text, with what it counts.
        settings: How they are learned.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    own = [
        part.on(w.device, torch.promote_types(w.dtype, torch.float32)) for part in parts for w in [weights[part.tensor]]
    ]
    by_tensor: dict[str, list[tuple[LearnedPart, Tensor]]] = defaultdict(list)
    for part in own:
        by_tensor[part.tensor].append((part, part.start()))
    z = {part.name: value for found in by_tensor.values() for part, value in found}
    optimizer = torch.optim.Adam(z.values(), lr=settings.rate)

    def read(tensor: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            for part, value in by_tensor[tensor]:
                slope = part.slope(weight.grad[part.place].to(value.dtype))
                value.grad = slope if value.grad is None else value.grad + slope
            # At once: gradients of all weights together would take as much memory as the model.
            weight.grad = None

        return take

    with kept(weights[name] for name in by_tensor) as before, gradients_of(model, before):
        hooks = [weights[name].register_post_accumulate_grad_hook(read(name)) for name in by_tensor]
        starts = {name: before[weights[name]] for name in by_tensor}

        @torch.no_grad()
        def taken() -> None:
            optimizer.step()
            optimizer.zero_grad()
            for name, found in by_tensor.items():
                for part, value in found:
                    # From the start each time: added to step by step, half precision would swallow small steps.
                    start = starts[name][part.place]
                    weights[name][part.place] = start + part.moved(value).reshape(start.shape)

        try:
            learn(model, texts, settings, taken)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: 1 + value.detach().double().cpu() for name, value in z.items()}


def fine_tune(model: torch.nn.Module, texts: Sequence[FitText], settings: FitSettings) -> dict[str, Tensor]:
    """Return all weights as the same text and objective train them, by name, on the CPU; the model is as it was.

    Args:
        model: What training begins with, in evaluation mode.
        texts: The text, with what it counts.
        settings: How the weights are trained; without weight decay.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    with kept(weights) as before, gradients_of(model, before):
        optimizer = torch.optim.AdamW(weights, lr=settings.rate, weight_decay=0.0)

        def taken() -> None:
            # Clipped, as fine-tuning usually is: a control that diverges would flatter the factors.
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        learn(model, texts, settings, taken)
        return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters(remove_duplicate=False)}


@contextmanager
def kept(weights: Iterator[Tensor] | Sequence[Tensor]) -> Iterator[Mapping[Tensor, Tensor]]:
    """Give weights their values back afterwards; yield copies of them, by weight."""
    before = {weight: weight.detach().clone() for weight in weights}
    try:
        yield before
    finally:
        with torch.no_grad():
            for weight, value in before.items():
                weight.copy_(value)
                weight.grad = None
