"""Models that cannot be measured in training, and bases that they cannot be compared with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from diffract.checkpoints import Checkpoint, Reference
from diffract.errors import CheckpointError


def refuse_sharded(model: nn.Module) -> None:
    """Raise unless every parameter of a model is whole in this process."""
    found = _sharding(model)
    if found:
        raise CheckpointError(
            f"SpectralCallback sees only a part of each matrix: the model is sharded ({found}). Train with whole "
            "parameters (DDP, ZeRO-1 or ZeRO-2), or leave it out and run `diffract trajectory` on the saved "
            "checkpoints."
        )


def _sharding(model: nn.Module) -> str | None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "DTensor, as of FSDP2"
    return "tensor parallelism" if (getattr(model, "tp_size", None) or 1) > 1 else None


def refuse_adapter(model: nn.Module) -> None:
    """Raise if a model is trained through a PEFT adapter: its own matrices never change, and the sum is nowhere."""
    if getattr(model, "peft_config", None):
        raise CheckpointError(
            "the model is trained through an adapter, whose sum with the model SpectralCallback does not see. Leave it "
            "out and run `diffract trajectory` on the saved adapters."
        )


def refuse_shared(base: Reference, model: nn.Module) -> None:
    """Raise if a base in memory holds the very tensors that are trained."""
    if isinstance(base, str | Path | Checkpoint):
        return
    held = (base.state_dict(keep_vars=True) if isinstance(base, nn.Module) else base).values()
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    if any(isinstance(value, Tensor) and value.data_ptr() in trained for value in held):
        raise CheckpointError(
            "base holds the very tensors that are trained, so that nothing would ever differ. Pass base='start'."
        )
