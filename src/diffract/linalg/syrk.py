"""Symmetric rank-k updates on the CPU, by BLAS's own ``dsyrk`` as SciPy exports it to compiled code.

NumPy and torch offer general products only (NumPy notices x @ x.T, but copies the result and cannot add to one), and
SciPy's Python wrapper holds the interpreter's lock, so that threads would wait for each other. This call does half the
work of a general product, adds in place, and lets other threads run.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from scipy.linalg import cython_blas  # pyright: ignore[reportAttributeAccessIssue] (compiled)
from torch import Tensor


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x x^T to the upper triangle of ``total``; what lies below the diagonal means nothing.

    Args:
        total: (M, M), float64, C-contiguous, on the CPU.
        x: (M, K), float64, one of its strides 1.
    """
    n, k = x.shape
    by_rows = x.stride(1) == 1
    assert total.is_contiguous()
    assert by_rows or x.stride(0) == 1
    # Fortran sees C's upper triangle as the lower one, and rows as columns
    trans, lda = (b"T", max(x.stride(0), k)) if by_rows else (b"N", max(x.stride(1), n))
    one = ctypes.c_double(1.0)
    _dsyrk()(
        *(b"L", trans, _int(n), _int(k), ctypes.byref(one), x.data_ptr()),
        *(_int(lda), ctypes.byref(one), total.data_ptr(), _int(n)),
    )


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _dsyrk() -> Any:
    """The function, from the capsule that SciPy keeps for Cython; ctypes lets go of the lock while it runs."""
    capsule = cython_blas.__pyx_capi__["dsyrk"]
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule))
    p, text = ctypes.c_void_p, ctypes.c_char_p
    return ctypes.CFUNCTYPE(None, text, text, p, p, p, p, p, p, p, p)(address)
