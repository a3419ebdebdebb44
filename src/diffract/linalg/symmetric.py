"""Eigenvalues and eigenvectors of stacks of symmetric matrices, of which the upper triangle alone is read.

On the CPU through NumPy, whose LAPACK is faster than torch's on processors that are not Intel's, and which lets other
threads run meanwhile.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

Symmetric = Float64[Tensor, "b M M"]


def eigenvalues(a: Symmetric) -> Float64[Tensor, "b M"]:
    """Return all eigenvalues, ascending."""
    if a.device.type != "cpu":
        return torch.linalg.eigvalsh(a, UPLO="U")
    return torch.from_numpy(np.linalg.eigvalsh(a.numpy(), UPLO="U"))


def eigenvectors(a: Symmetric) -> tuple[Float64[Tensor, "b M"], Symmetric]:
    """Return all eigenvalues, ascending, and orthonormal eigenvectors as columns."""
    if a.device.type != "cpu":
        values, vectors = torch.linalg.eigh(a, UPLO="U")
        return values, vectors
    found = np.linalg.eigh(a.numpy(), UPLO="U")
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def mirrored(a: Symmetric) -> Symmetric:
    """Return the symmetric matrices whose upper triangles ``a`` holds; what lies below them is overwritten."""
    return a.triu_().add_(a.triu(1).mT)
