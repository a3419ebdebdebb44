"""Random-matrix and shape metrics once more, literally and slowly, in NumPy and SciPy: rows of the property table."""

import math
import zlib
from functools import cache

import numpy as np
import scipy
import torch

TRACY_WIDOM_99 = 2.0234492814  # 99% quantile of F_1, published as 2.0234


def noise(S: np.ndarray, shape: tuple[int, int]) -> dict[str, float]:
    """The bulk, spikes taken away one by one until none is above the fluctuation edge."""
    values, N, M = S**2 / max(shape), max(shape), min(shape)
    removed = 0
    while True:
        root_n, root_m = math.sqrt(max(N - removed - 1, 1)), math.sqrt(M - removed)
        factor = (root_n + root_m) ** 2 + TRACY_WIDOM_99 * (root_n + root_m) * (1 / root_n + 1 / root_m) ** (1 / 3)
        v = N * values[removed:].sum() / ((N - removed) * (M - removed))
        if values[removed] <= v * factor / N:
            break
        removed += 1
    edge = v * (math.sqrt(N - removed) + math.sqrt(M - removed)) ** 2 / N
    bulk = values[values <= edge]
    if 2 * len(bulk) < M:
        return dict.fromkeys(("variance", "edge", "ks", "spikes", "spikes_tw", "soft_rank", "bulk_share"), math.nan)
    return {
        "variance": v,
        "edge": edge,
        "ks": bulk_distance(bulk, v * (N - removed) / N, (M - removed) / (N - removed)) if v > 0 else math.nan,
        "spikes": float((values > edge).sum()),
        "spikes_tw": float((values > v * factor / N).sum()),
        "soft_rank": edge / values[0],
        "bulk_share": bulk.sum() / values.sum(),
    }


def bulk_distance(bulk: np.ndarray, v: float, gamma: float) -> float:
    """Distance from the law of the noise matrix that is left when the spikes' directions are gone."""
    short = len(bulk)
    low, high = v * (1 - math.sqrt(gamma)) ** 2, v * (1 + math.sqrt(gamma)) ** 2

    def share(x: float) -> float:
        """Integral of the density, with x = low + (high - low) sin^2 t, which takes the square roots away."""
        end = math.asin(math.sqrt(min(max((x - low) / (high - low), 0.0), 1.0)))

        def density(t: float) -> float:
            sine, cosine = math.sin(t), math.cos(t)
            at = low + (high - low) * sine**2
            ratio = (high - low) * sine**2 / at if at > 0 else 1.0
            return (high - low) * ratio * cosine**2 / (math.pi * gamma * v)

        return scipy.integrate.quad(density, 0, end, epsabs=1e-12, epsrel=1e-12)[0]

    law = np.array([share(x) for x in np.sort(bulk)])
    rank = np.arange(short)
    return float(max((law - rank / short).max(), ((rank + 1) / short - law).max()))


def null_sigmas(w: np.ndarray) -> np.ndarray:
    order = torch.randperm(w.size, generator=torch.Generator().manual_seed(0)).numpy()
    return np.linalg.svd(w.flatten()[order].reshape(min(w.shape), max(w.shape)), compute_uv=False)


def null_distance(w: np.ndarray, S: np.ndarray) -> float:
    first, second = S**2, null_sigmas(w) ** 2
    return scipy.stats.wasserstein_distance(first, second) / first.mean()


@cache
def threshold_factor(beta: float) -> float:
    """omega(beta) of Gavish & Donoho 2014, the median of the law by root finding."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def share(end: float) -> float:
        reach = math.asin(math.sqrt((end - low) / (high - low)))

        def density(t: float) -> float:
            at = low + (high - low) * math.sin(t) ** 2
            return (high - low) ** 2 * (math.sin(t) * math.cos(t)) ** 2 / (math.pi * beta * at) if at else 0.0

        return scipy.integrate.quad(density, 0, reach, epsabs=1e-12, epsrel=1e-12)[0] - 0.5

    median = scipy.optimize.brentq(share, low, high, xtol=1e-14)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / math.sqrt(median)


def hard_threshold(S: np.ndarray, shape: tuple[int, int]) -> float:
    return threshold_factor(min(shape) / max(shape)) * float(np.median(S))


def density_peaks(S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Grid, density and tops of the peaks in the density of ln sigma."""
    x = np.log(S[S > 0])
    if len(x) < 3 or np.ptp(x) < 1e-12:
        return None
    kernel = scipy.stats.gaussian_kde(x)
    h = max(math.sqrt(kernel.covariance[0, 0]), np.ptp(x) / (255 - 6))
    kernel.set_bandwidth(h / x.std(ddof=1))
    grid = np.linspace(x.min() - 3 * h, x.max() + 3 * h, 256)
    values = kernel(grid)
    tops, _ = scipy.signal.find_peaks(values, prominence=0.05 * values.max())
    return grid, values, tops


def peak_count(S: np.ndarray) -> float:
    return math.nan if density_peaks(S) is None else float(len(members(S)))


def members(S: np.ndarray) -> list[np.ndarray]:
    """Whether each sigma lies within a peak: down to half-way between the top and the valley on that side.

    Peaks with less than 5% of the sigmas, or under three of them, are none.
    """
    found = density_peaks(S)
    if found is None:
        return []
    inside, (grid, values, tops) = [], found
    for i, top in enumerate(tops):
        valley_ends = (tops[i - 1] if i else 0, tops[i + 1] if i + 1 < len(tops) else len(grid) - 1)
        ends = []
        for end, step in zip(valley_ends, (-1, 1), strict=True):
            side = np.arange(top, end + step, step)
            level = (values[top] + values[side].min()) / 2
            at = next(j for j in side if values[j] <= level)
            share = (level - values[at]) / (values[at - step] - values[at])
            ends.append(grid[at] + share * (grid[at - step] - grid[at]))
        x = np.log(np.where(S > 0, S, np.nan))
        inside.append((x >= ends[0]) & (x <= ends[1]))
    return [one for one in inside if one.sum() >= max(3, 0.05 * (S > 0).sum())]


def expected_energy(energy: np.ndarray, rows: np.ndarray, S: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Least squares on 1, sigma^2 and the rows' energies, reweighted twenty times."""
    found = np.full(len(energy), math.nan)
    if known.sum() < 10 or not (energy[known] > 0).any():
        return found
    terms = np.stack([np.ones(known.sum()), S[known] ** 2, rows[known]], 1)
    terms /= terms.max(0)
    e = energy[known]
    least = np.sort(e)[(len(e) - 1) // 2]
    fitted = np.full(len(e), least)
    for _ in range(20):
        solution = np.linalg.lstsq(terms / fitted[:, None], e / fitted, rcond=1e-9)[0]
        fitted = np.maximum(terms @ solution, least / 1000)
    found[known] = fitted
    return found


def tenth(energy: np.ndarray, expected: np.ndarray, k: int) -> float:
    known = np.flatnonzero(np.isfinite(expected))
    part = [i for rank, i in enumerate(known) if 10 * rank // len(known) == k]
    return float(energy[part].sum() / expected[part].sum()) if part else math.nan


def enrichment(ratio: np.ndarray, peaks: list[np.ndarray]) -> float:
    known, inside = np.isfinite(ratio), np.any([*peaks, np.zeros(len(ratio), bool)], 0)
    if len(peaks) < 2 or (known & ~inside).sum() < 5:
        return math.nan
    return float(ratio[known & inside].mean() / ratio[known & ~inside].mean())


def enrichment_pvalue(ratio: np.ndarray, peaks: list[np.ndarray]) -> float:
    if math.isnan(enrichment(ratio, peaks)):
        return math.nan
    known = np.isfinite(ratio)
    inside, values = np.any(peaks, 0)[known], ratio[known]
    uniform = torch.rand(999, len(ratio), generator=torch.Generator().manual_seed(0))[:, : len(values)]
    observed, reached = values[inside].sum(), 0
    for places in uniform.argsort(-1).numpy():
        reached += values[places < inside.sum()].sum() >= observed - 1e-12 * values.sum()
    return (1 + reached) / 1000


def tail_distance(tail: np.ndarray, survival: np.ndarray) -> float:
    """max |i / k - F| over an ascending tail, the empirical function from its left side; ties share their least i."""
    first = np.searchsorted(tail, tail, side="left")
    return float(np.abs(first / len(tail) - (1 - survival)).max())


def best_tail(values: np.ndarray, law: str) -> dict[str, float]:
    """The tail of least distance of a law with one parameter, candidate by candidate."""
    x, best = np.sort(values[values > 0]), {"ks": math.inf}
    for xmin in np.unique(x)[:-1]:
        tail = x[x >= xmin]
        k = len(tail)
        if law == "power_law":
            slope = k / np.log(tail / xmin).sum()
            survival, own = (
                (tail / xmin) ** -slope,
                {"alpha": 1 + slope, "alpha_stderr_fixed_xmin": slope / math.sqrt(k)},
            )
        else:
            rate = 1 / (tail - xmin).mean()
            survival, own = np.exp(-rate * (tail - xmin)), {"rate": rate}
        ks = tail_distance(tail, survival)
        if ks < best["ks"]:
            best = {"xmin": xmin, "ks": ks, "tail_count": float(k), **own}
    return (
        best
        if len(best) > 1
        else dict.fromkeys(("xmin", "ks", "tail_count", "alpha", "alpha_stderr_fixed_xmin", "rate"), math.nan)
    )


def against_exponential(values: np.ndarray) -> tuple[float, float]:
    """Vuong's ratio and p of the power law's tail against an exponential."""
    found = best_tail(values, "power_law")
    if math.isnan(found["alpha"]):
        return math.nan, math.nan
    tail = values[values >= found["xmin"]]
    k, rate = len(tail), 1 / (tail - found["xmin"]).mean()
    power = math.log((found["alpha"] - 1) / found["xmin"]) - found["alpha"] * np.log(tail / found["xmin"])
    differences = power - (math.log(rate) - rate * (tail - found["xmin"]))
    ratio = differences.sum() / (math.sqrt(k) * differences.std())
    return ratio, math.erfc(abs(ratio) / math.sqrt(2))


def gaussians(w: np.ndarray, draws: int, salt: int) -> np.ndarray:
    """The normal numbers that a matrix's draws are made of."""
    rows = (w**2).sum(1)
    seed = zlib.crc32((rows / rows.sum()).astype(np.float32).tobytes(), salt)
    return torch.randn(draws, *w.shape, generator=torch.Generator().manual_seed(seed)).double().numpy()


def rowcol_draws(w: np.ndarray, draws: int = 39, salt: int = 0) -> np.ndarray:
    """Gaussians with the matrix's row and column norms."""
    rows, cols = (w**2).sum(1), (w**2).sum(0)
    drawn = gaussians(w, draws, salt) * np.sqrt(np.outer(rows, cols) / rows.sum())
    for _ in range(3):
        drawn *= np.sqrt(cols / np.maximum((drawn**2).sum(1), 1e-300))[:, None, :]
        drawn *= np.sqrt(rows / np.maximum((drawn**2).sum(2), 1e-300))[:, :, None]
    return drawn


def row_draws(w: np.ndarray) -> np.ndarray:
    """39 Gaussians with the matrix's row norms."""
    drawn = gaussians(w, 39, 0)
    return drawn * (np.linalg.norm(w, axis=1) / np.linalg.norm(drawn, axis=2))[:, :, None]


def reached(own: float, draws: list[float]) -> float:
    known = [one for one in draws if not math.isnan(one)]
    return math.nan if math.isnan(own) or not known else (1 + sum(one >= own for one in known)) / (1 + len(known))


def block_exponent(w: np.ndarray) -> float:
    """Hill's estimator over the upper half of the eigenvalues of square blocks."""
    wide = w if w.shape[0] <= w.shape[1] else w.T
    side = len(wide)
    blocks = [wide[:, i : i + side] for i in range(0, wide.shape[1] - side + 1, side)]
    values = np.sort(np.concatenate([np.linalg.svd(b, compute_uv=False) ** 2 for b in blocks]))[::-1]
    k = len(values) // 2
    if k == 0:
        return math.nan  # of one value there is no upper half
    return 1 + k / sum(math.log(x / values[k]) for x in values[:k])


def exponent_scatter(values: np.ndarray) -> float:
    x = np.sort(values[values > 0])[::-1]
    picked = torch.randint(len(x), (50, len(x)), generator=torch.Generator().manual_seed(0)).numpy()
    found = np.array([best_tail(x[one], "power_law")["alpha"] for one in picked])
    return float(np.std(found[np.isfinite(found)], ddof=1)) if np.isfinite(found).sum() > 25 else math.nan
