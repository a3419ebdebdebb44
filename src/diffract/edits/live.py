"""Edits of a loaded model in place, undone to the last bit: for evaluation without files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from diffract.checkpoints import TensorInfo
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.edits.bench import Bench
from diffract.edits.directions import Decompositions
from diffract.edits.draft import WORKING_COPIES, Draft, Place, everything, overlap
from diffract.edits.edit import Edit
from diffract.engine import SIDE_BY_SIDE_BYTES, one_torch_thread, single_threaded
from diffract.errors import CheckpointError, printable

Saved = list[tuple[Tensor, Tensor]]
"""Parts of parameters, and what they were."""


class LiveModel:
    """A loaded model that steps of recipes change in place, on whatever device it is.

    What they compute is what they would write to files, bit for bit. A step costs time in proportion to what it
    changes: bases should lie in memory too (a loaded model, a mapping), as files are read anew by every step.

    Examples:
        >>> model, base = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> before = model.weight.clone()
        >>> from diffract.edits import Interpolate
        >>> with LiveModel(model).edited(Interpolate(other=base, at=1)):
        ...     torch.equal(model.weight, base.weight)
        True
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        architecture: str | Path | None = None,
        allow: Collection[str] = (),
        decompositions: Decompositions | None = None,
    ) -> None:
        """Look at a model; nothing of it is copied.

        Args:
            model: Its parameters must not be replaced afterwards; training them in place is fine.
            architecture: A JSON file that describes it; by default ``model.config`` does.
            allow: What is allowed though it speaks against taking weights from another model, as in recipes.
            decompositions: Where those of matrices are kept for the next step; by default each step makes its own.
        """
        state = model.state_dict(keep_vars=True)
        self._tensors = {name: value.data for name, value in state.items() if isinstance(value, Tensor)}
        self.bench = Bench(model, architecture=architecture, allow=allow, record=False)
        self.bench.decompositions = decompositions

    @contextmanager
    def edited(self, *steps: Edit) -> Iterator[None]:
        """Change the model for the duration of a block.

        Args:
            steps: What to do, in this order.

        Raises:
            DiffractError: A step does not fit the model; nothing is changed then.
        """
        saved = self._change(steps)
        try:
            yield
        finally:
            _undo(saved)

    def apply(self, *steps: Edit) -> None:
        """Change the model for good.

        Raises:
            DiffractError: A step does not fit the model; nothing is changed then.
        """
        self._change(steps)

    @torch.no_grad()
    def _change(self, steps: Sequence[Edit]) -> Saved:
        """Change the model and return what was there before; where that fails halfway, nothing stays changed."""
        draft, _ = self.bench.plan(steps)
        saved: Saved = []
        try:
            for name in dict.fromkeys(name for changes in draft.steps for name in changes):
                info = self.bench.checkpoint.info(name)
                with draft.named(name), _threads_of_files(draft, name):
                    # All new values come before the first is stored: a step may read the tensor that it changes.
                    own = self._in_shape(name)
                    found = list(_new_values(draft, info, own))
                twins = (self._in_shape(twin) for twin, target in self.bench.ties.items() if target == name)
                copies = [own, *(twin for twin in twins if twin.data_ptr() != own.data_ptr())]
                for place, values in found:
                    for tensor in copies:
                        saved.append((tensor[place], tensor[place].clone()))
                        tensor[place].copy_(values)
        except BaseException:
            _undo(saved)
            raise
        return saved

    def _in_shape(self, name: str) -> Tensor:
        """Return a parameter in the shape that it is read with: a view, which changes the parameter itself."""
        info, own = self.bench.checkpoint.info(name), self._tensors[name]
        if info.axes is not None and not own.is_contiguous():
            raise CheckpointError(
                f"{printable(name)!r} does not lie in the order of its axes (channels_last?), so that it cannot be "
                "changed in place. Make the module's memory_format torch.contiguous_format first."
            )
        return own.view(info.shape)


@torch.no_grad()
def _undo(saved: Saved) -> None:
    # Backwards: of what was changed twice, what was there first is put back last.
    for part, before in reversed(saved):
        part.copy_(before)


def _threads_of_files(draft: Draft, name: str) -> AbstractContextManager[None]:
    """Compute in as many threads as when files are written: sums may depend on it in their last bit."""
    if any(change.whole for change in draft.changes(name)):
        return threads_of_matrices(draft.checkpoint.info(name))
    return nullcontext() if draft.workspace_bytes(name) > SIDE_BY_SIDE_BYTES else one_torch_thread()


def threads_of_matrices(info: TensorInfo) -> AbstractContextManager[None]:
    """Compute in as many threads as edits of a tensor's whole matrices do, so that all of them find the same bits."""
    return nullcontext() if WORKING_COPIES * 8 * info.entries > SIDE_BY_SIDE_BYTES else single_threaded()


def _new_values(draft: Draft, info: TensorInfo, stored: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Yield what changes of a tensor, in the blocks that files are written in.

    If one step alone changes it, that is what it changes; else all of the tensor.
    """
    changes, dtype = draft.changes(info.name), TORCH_DTYPES[info.dtype]
    whole = everything(info.shape)
    for rows in draft.spans(info.name):
        if len(changes) > 1:
            place = whole if rows is None else (slice(*rows), *whole[1:])
            yield place, draft.stored_block(info.name, rows, dtype)
            continue
        for part, apply in changes[0].parts:
            if found := overlap(part, rows):
                yield found[1], apply(stored[found[1]].cpu(), found[1]).to(dtype)
