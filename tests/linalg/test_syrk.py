"""The symmetric update against NumPy, for every layout that pieces of a stack can have."""

import pytest
import torch

from diffract.linalg.symmetric import mirrored
from diffract.linalg.syrk import add_gram

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4)]


@pytest.mark.parametrize("layout", ["rows", "columns", "wide rows", "wide columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_upper_triangle_grows_by_the_product(shape: tuple[int, int], layout: str) -> None:
    n, k = shape
    x = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = {
        "rows": x.contiguous,
        "columns": lambda: x.mT.contiguous().mT,
        "wide rows": lambda: torch.cat([x, x], 1)[:, :k],
        "wide columns": lambda: torch.cat([x.mT, x.mT], 1)[:, :n].mT,
    }[layout]()
    assert torch.equal(given, x)
    start = torch.arange(n * n, dtype=torch.float64).view(1, n, n)
    total = start.clone()
    add_gram(total[0], given)
    want = torch.from_numpy(start[0].numpy() + x.numpy() @ x.numpy().T)
    # The products of at most nine terms near one: a few eps of the largest entry.
    assert (torch.triu(total[0]) - torch.triu(want)).abs().max() <= 1e-14 * (1 + want.abs().max())
    whole = mirrored(total)[0]
    assert torch.equal(whole, whole.mT)
    assert torch.equal(torch.triu(whole), torch.triu(total[0]))
