"""Measure the heavy-tail fits: all four laws with their search for xmin, and what a p-value costs.

    python benchmarks/heavy_tails.py                 # on one thread, as the engine's workers run
    python benchmarks/heavy_tails.py --threads 1 2   # two threads want an idle machine

Spectra of three kinds: Wishart (random initialisation), Wishart with a power-law tail (a trained layer), log-normal
over five decades. Times are medians of several runs after one that warms up, by the clock and by the processor (all
threads together; the one to go by where others use the machine). Where ``powerlaw`` 1.5 is installed its time for one
spectrum is given beside ours, for the power law only (its other laws take minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from diffract.metrics.heavy_tails import Family, exponential, log_normal, p_value, power_law, truncated_power_law

LAWS = {
    "power law": power_law,
    "exponential": exponential,
    "log-normal": log_normal,
    "truncated power law": truncated_power_law,
}


def wishart(rng: np.random.Generator, n: int) -> np.ndarray:
    w = rng.normal(size=(n, 3 * n)) if n <= 1024 else rng.normal(size=(n, n))
    return np.linalg.eigvalsh(w @ w.T / w.shape[1])


def spectra(count: int, n: int) -> dict[str, torch.Tensor]:
    """(count, n) values of each kind; few are made and many drawn from them, as eigenvalues take long to compute."""
    rng = np.random.default_rng(0)
    few = np.stack([wishart(rng, n) for _ in range(min(count, 20 if n <= 1024 else 1))])
    plain = few[rng.integers(len(few), size=count)] * np.exp(0.01 * rng.normal(size=(count, n)))
    spiked = plain.copy()
    tail = n // 5
    spiked[:, :tail] = plain.mean() * 2 * (1 - rng.random((count, tail))) ** (-1 / 2.5)
    wide = np.exp(2.0 * rng.normal(size=(count, n)))
    return {name: torch.from_numpy(x) for name, x in (("Wishart", plain), ("with tail", spiked), ("log-normal", wide))}


def median(work: Callable[[], object], repeats: int) -> np.ndarray:
    """Seconds by the clock and by the processor."""
    work()
    times = []
    for _ in range(repeats):
        begun = np.array([time.perf_counter(), time.process_time()])
        work()
        times.append([time.perf_counter(), time.process_time()] - begun)
    return np.median(times, axis=0)


def measure(count: int, n: int, repeats: int) -> None:
    for kind, values in spectra(count, n).items():
        times = [median(lambda f=fit, x=values: f(x), repeats) for fit in LAWS.values()]
        wall, processor = np.sum(times, axis=0)
        each = "".join(f" {seconds[1] / count * 1e3:.3g} |" for seconds in times)
        print(f"| {count} x {n}, {kind} |{each} {processor / count * 1e3:.3g} | {wall:.3g} s |", flush=True)


def measure_bootstrap() -> None:
    values = spectra(8, 128)["with tail"]
    families: tuple[Family, ...] = ("power_law", "exponential", "log_normal", "truncated_power_law")
    for family in families:
        for refit in (True, False):
            each = median(partial(p_value, values, family, draws=256, refit=refit), 3)[1] / (8 * 256) * 1e3
            print(f"| p-value, {family}, refit={refit} | {each:.3g} ms per draw |", flush=True)


def measure_powerlaw() -> None:
    if find_spec("powerlaw") is None:
        print("powerlaw is not installed: no comparison")
        return
    import powerlaw

    many = spectra(1000, 128)["with tail"]

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            powerlaw.Fit(many[0].numpy(), verbose=False)

    ours, other = median(lambda: power_law(many), 5)[1] / len(many), median(theirs, 5)[1]
    print(f"| power law, 128 values | {ours * 1e3:.3g} ms | powerlaw {other * 1e3:.3g} ms | {other / ours:.0f} x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    args = parser.parse_args()
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s), ms of the processor per spectrum\n")
        print("| spectra |" + "".join(f" {name} |" for name in LAWS) + " all four | by the clock, all spectra |")
        print("|---" * (len(LAWS) + 3) + "|")
        measure(1000, 128, 3)
        measure(1, 4096, 5)
        print()
        measure_bootstrap()
        measure_powerlaw()


if __name__ == "__main__":
    main()
