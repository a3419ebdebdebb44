"""Delta: a model as what differs from its base, lossless."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

from diffract.edits.edit import Argument, Edit, Model, Planned, describe
from diffract.errors import CheckpointError
from diffract.settings import STRICT, size_text

if TYPE_CHECKING:
    from diffract.edits.bench import Bench
    from diffract.edits.draft import Draft
    from diffract.edits.write import Target, Written


class Delta(Edit):
    """Write what a model has in other bits than its base: compressed and lossless; `diffract apply` puts it back."""

    model_config = STRICT | ConfigDict(json_schema_extra={"required": ["base"]})

    name: ClassVar = "delta"
    usage: ClassVar = "diffract delta BASE TUNED -o DELTA"
    arguments: ClassVar = (
        Argument("base", "BASE", "What the model was tuned from; it is needed again to put the delta back."),
        Argument("model", "TUNED", "The checkpoint to store."),
    )
    not_options: ClassVar = ("base",)
    writes_adapter: ClassVar = True
    takes_output: ClassVar = False

    base: Model
    """What the model was tuned from; it is needed again to put the delta back."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return no change: the model is what it is, and only written otherwise."""
        from diffract.checkpoints.delta import FILES, DeltaWriter, Origin
        from diffract.checkpoints.dtypes import TORCH_DTYPES
        from diffract.edits.write import Written

        if bench.checkpoint.set_aside:
            raise CheckpointError(
                f"{bench.checkpoint.reference}: it has tensors that are read as something else than what is stored "
                "(quantised codes, training states), so that a delta could not give them back. Make the delta of a "
                "checkpoint of plain weights."
            )
        names, base = bench.counterparts(self.base)
        total = sum(info.size_bytes for info in draft.checkpoint.infos.values())
        summary: dict[str, Any] = {"base": describe(self.base), "model": size_text(total)}

        def write(draft: Draft, target: Target) -> Written:
            digests: dict[str, str] = {}
            done = 0
            with DeltaWriter(target.folder, describe(self.base)) as writer:
                for name, info in draft.checkpoint.infos.items():
                    origin = Origin(base, names[name]) if name in names else None
                    read = partial(draft.stored_block, name, dtype=TORCH_DTYPES[info.dtype])
                    digests[name] = writer.add(info, read, origin)
                    done += info.size_bytes
                    if target.progress:
                        target.progress(done, total, name)
            summary["stored"] = size_text(writer.written_bytes)
            summary["stored, share of the model"] = round(writer.written_bytes / max(1, total), 4)
            # a configuration beside it would make loaders take the folder for a whole model
            (target.folder / FILES).mkdir()
            return Written({".": digests}, target.folder / FILES, loads_alone=True, written_bytes=writer.written_bytes)

        return Planned({}, summary, write=write)
