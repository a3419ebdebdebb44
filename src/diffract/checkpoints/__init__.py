"""Checkpoints: a reference becomes named tensors that are read when asked for, and tensors become files."""

from diffract.checkpoints.reader import Checkpoint, Factors, row_blocks, tensor_digest
from diffract.checkpoints.reference import Reference, open_checkpoint
from diffract.checkpoints.tensors import FLOATS, TORCH_DTYPES, TensorInfo, machine_epsilon
from diffract.checkpoints.writer import TensorWriter

__all__ = [
    "FLOATS",
    "TORCH_DTYPES",
    "Checkpoint",
    "Factors",
    "Reference",
    "TensorInfo",
    "TensorWriter",
    "machine_epsilon",
    "open_checkpoint",
    "row_blocks",
    "tensor_digest",
]
