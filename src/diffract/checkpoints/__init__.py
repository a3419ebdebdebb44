"""Checkpoints: a reference becomes named tensors that are read when asked for, and tensors become files.

Headers are read without torch, so that looking at a model is quick; ``dtypes`` has torch's side of it.
"""

from diffract.checkpoints.checkpoint import Checkpoint, Factors, as_bytes, renamed, reshaped, row_blocks, tensor_digest
from diffract.checkpoints.header import FLOATS, TensorInfo
from diffract.checkpoints.open import Reference, open_checkpoint
from diffract.checkpoints.writer import TensorWriter

__all__ = [
    "FLOATS",
    "Checkpoint",
    "Factors",
    "Reference",
    "TensorInfo",
    "TensorWriter",
    "as_bytes",
    "open_checkpoint",
    "renamed",
    "reshaped",
    "row_blocks",
    "tensor_digest",
]
