"""BLAS's routines against NumPy, for every layout that pieces of a stack can have."""

import pytest
import torch

from diffract.linalg.blas import add_gram, add_product, row_dots
from diffract.linalg.exact import mirrored

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4)]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    n, k = x.shape
    given = {
        "rows": x.contiguous,
        "columns": lambda: x.mT.contiguous().mT,
        "wide rows": lambda: torch.cat([x, x], 1)[:, :k],
        "wide columns": lambda: torch.cat([x.mT, x.mT], 1)[:, :n].mT,
    }[layout]()
    assert torch.equal(given, x)
    return given


@pytest.mark.parametrize("layout", ["rows", "columns", "wide rows", "wide columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_upper_triangle_grows_by_the_product(shape: tuple[int, int], layout: str) -> None:
    n, k = shape
    x = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = laid_out(x, layout)
    start = torch.arange(n * n, dtype=torch.float64).view(1, n, n)
    total = start.clone()
    add_gram(total[0], given)
    want = torch.from_numpy(start[0].numpy() + x.numpy() @ x.numpy().T)
    # The products of at most nine terms near one: a few eps of the largest entry.
    assert (torch.triu(total[0]) - torch.triu(want)).abs().max() <= 1e-14 * (1 + want.abs().max())
    whole = mirrored(total)[0]
    assert torch.equal(whole, whole.mT)
    assert torch.equal(torch.triu(whole), torch.triu(total[0]))


@pytest.mark.parametrize("layout", ["rows", "columns", "wide rows", "wide columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_total_grows_by_the_product_of_two(shape: tuple[int, int], layout: str) -> None:
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = torch.arange(shape[0] ** 2, dtype=torch.float64).view(shape[0], shape[0])
    want = torch.from_numpy(total.numpy() + x.numpy() @ y.numpy().T)
    add_product(total, laid_out(x, layout), laid_out(y, layout))
    # As above: at most nine terms near one.
    assert (total - want).abs().max() <= 1e-14 * (1 + want.abs().max())


@pytest.mark.parametrize("count", [1, 3])
def test_dots_of_rows_that_need_not_follow_each_other(count: int) -> None:
    x, y = torch.randn(2, count, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = (x.numpy()[:, :11] * y.numpy()[:, 9:]).sum(1)
    assert row_dots(x[:, :11], y[:, 9:]) == pytest.approx(want, rel=1e-13)
