"""Products on the CPU by BLAS's own routines, as SciPy exports them to compiled code.

NumPy and torch offer general products only (NumPy notices x @ x.T, but copies the result and cannot add to one), and
SciPy's Python wrappers hold the interpreter's lock, so that threads would wait for each other. These calls add in
place, do half the work for a Gram matrix, and let other threads run. Sums over pieces take them all from one library:
the threads of two libraries would keep each other from the cores between calls.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from scipy.linalg import cython_blas  # pyright: ignore[reportAttributeAccessIssue] (compiled)
from torch import Tensor

ONE = ctypes.byref(ctypes.c_double(1.0))


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x x^T to the upper triangle of ``total``; what lies below the diagonal means nothing.

    Args:
        total: (M, M), float64, C-contiguous, on the CPU.
        x: (M, K), float64, one of its strides 1.
    """
    assert total.is_contiguous()
    n, k = x.shape
    by_rows, lda = _layout(x)
    # Fortran sees C's upper triangle as the lower one, and rows as columns
    trans = b"T" if by_rows else b"N"
    _routine("dsyrk", 10)(
        b"L", trans, _int(n), _int(k), ONE, x.data_ptr(), _int(lda), ONE, total.data_ptr(), _int(n)
    )  # fmt: skip


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y^T to ``total``.

    Args:
        total: (M, M), float64, C-contiguous, on the CPU.
        x: (M, K), float64, one of its strides 1.
        y: (M, K), float64, the same one of its strides 1.
    """
    assert total.is_contiguous()
    n, k = x.shape
    by_rows, ldx = _layout(x)
    same, ldy = _layout(y)
    assert same == by_rows
    first, second = (b"T", b"N") if by_rows else (b"N", b"T")  # Fortran sees total^T = y x^T
    _routine("dgemm", 13)(
        first, second, _int(n), _int(n), _int(k), ONE, y.data_ptr(), _int(ldy), x.data_ptr(), _int(ldx), ONE,
        total.data_ptr(), _int(n),
    )  # fmt: skip


def row_dots(x: Tensor, y: Tensor) -> list[float]:
    """Return the sum of x * y over each row.

    Args:
        x: (b, k), float64, on the CPU; rows contiguous.
        y: Likewise.
    """
    assert x.stride(1) == y.stride(1) == 1
    ddot, one, k = _routine("ddot", 5, ctypes.c_double), _int(1), _int(x.shape[1])
    first, second = x.data_ptr(), y.data_ptr()
    steps = 8 * x.stride(0), 8 * y.stride(0)
    return [ddot(k, first + i * steps[0], one, second + i * steps[1], one) for i in range(len(x))]


def _layout(x: Tensor) -> tuple[bool, int]:
    """Whether rows are contiguous (else columns are), and the distance of neighbouring ones."""
    by_rows = x.stride(1) == 1
    assert by_rows or x.stride(0) == 1
    return by_rows, max(x.stride(0), x.shape[1]) if by_rows else max(x.stride(1), x.shape[0])


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _routine(name: str, arguments: int, result: Any = None) -> Any:
    """The function, from the capsule that SciPy keeps for Cython; ctypes lets go of the lock while it runs.

    Leading ``bytes`` are the routine's flags, everything else is a pointer.
    """
    capsule = cython_blas.__pyx_capi__[name]
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * arguments)(address)
