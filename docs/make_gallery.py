"""Draw the gallery: docs/gallery.md and one image of each kind of figure, from the samples, in about ten minutes.

    python docs/make_gallery.py

A trajectory needs a series of checkpoints. Where ``../shared`` has none, a small one is made: random matrices that a
few directions grow out of. The page says which.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

import diffract
from diffract.plots import KINDS, save

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples" / "tiny-olmo2"
SERIES = ROOT.parent / "shared" / "data" / "checkpoints" / "hybrid_stories"
SERIES_LAYOUT = ROOT / "docs" / "examples" / "hybrid_stories.json"
DOMAINS = ("natural", "math", "code", "instructions")
SERIES_SOURCE = "ten checkpoints of a small language model (bapt433/HybridStories, Apache-2.0)"
MADE_SERIES = "random matrices that a few directions grow out of"


@dataclass(frozen=True)
class Picture:
    """A figure of the gallery.

    Attributes:
        kind: A name of the catalog.
        run: Which of the runs.
        options: What follows the run on the command line.
        text: What to see.
        name: Of its file; the kind by default.
        width: Of the image, in pixels.
    """

    kind: str
    run: str
    options: dict[str, str | int]
    text: str
    name: str = ""
    width: int = 900


PICTURES = (
    Picture(
        "density",
        "compared",
        {"matrix": "L3.mlp.down"},
        "The density of the eigenvalues λ = σ²/N of one matrix, on two logarithmic axes, where a power law is a "
        "straight line. The black curve is the Marchenko-Pastur law of noise with the variance of the bulk, scaled by "
        "the share of eigenvalues that are no spikes; the orange one is what row and column norms alone give; the "
        "light blue steps are the same entries in random order. Each "
        "tail fit begins at its own x<sub>min</sub> and is scaled by the share of eigenvalues from there on. "
        "Triangles are spikes above the edge of the law.",
    ),
    Picture(
        "density",
        "compared",
        {"matrix": "L3.mlp.down", "axes": "lin-log"},
        "The same with a linear vertical axis. λ ρ(λ) is drawn, the density per unit of ln λ, so that equal areas are "
        "equal shares of the eigenvalues.",
        "density_lin_log",
    ),
    Picture(
        "ks",
        "compared",
        {"matrix": "L3.mlp.down"},
        "The Kolmogorov-Smirnov distance between the tail and its best power law, for every eigenvalue at which the "
        "tail might begin. A deep, single minimum is a tail that is really there.",
    ),
    Picture(
        "spectrum",
        "compared",
        {"matrix": "L3.mlp.down", "model": "math"},
        "Singular values of base, tuned and change.",
    ),
    Picture(
        "agreement",
        "compared",
        {"matrix": "L3.mlp.down", "model": "math"},
        "How far singular vectors of base and tuned agree, by rank. Near-equal singular values swap and mix their "
        "vectors, so the right panel projects each tuned vector on the base vectors whose σ is within 5% of its own. "
        "Dashed: what random vectors would give. Shaded: ranks that belong to a peak of the base's spectrum.",
        width=700,
    ),
    Picture(
        "profile",
        "compared",
        {"model": "math"},
        "The energy of the change along each base singular direction, over what noise, rescaling and turns would give: "
        "1 is no preference. Left: by tenth of the spectrum, median over the matrices of a projection, band of "
        "quartiles. Right: by peak, for the matrices with two peaks or more.",
    ),
    Picture(
        "heads", "heads", {}, "The change of every head over its q, k, v and o, in each domain, in the same colours."
    ),
    Picture(
        "scores",
        "heads",
        {"reference": "natural"},
        "Reference-domain scores: each map is scaled to [0, 1], and that of the reference subtracted. Orange heads are "
        "specific to the domain, purple ones changed more for natural text.",
    ),
    Picture(
        "lorenz",
        "heads",
        {},
        "What share of the squared change the least changed heads have together. The further below the diagonal, the "
        "fewer heads carry the change.",
    ),
    Picture(
        "violins",
        "compared",
        {"model": "math"},
        "The relative change of every matrix and head by layer; colours tell how far singular vectors still agree.",
    ),
    Picture(
        "head_heatmap", "compared", {"model": "math", "metric": "effective_rank"}, "Any metric over layers and heads."
    ),
    Picture(
        "evolution",
        "series",
        {"metric": "effective_rank"},
        "A metric over training: the median over layers and heads, and the middle half, for each projection.",
    ),
    Picture(
        "ridge",
        "series",
        {"projection": "mlp.down"},
        "The density of ln σ at every checkpoint, of one matrix or pooled over a layer or projection.",
    ),
    Picture(
        "lineage",
        "related",
        {},
        "What was found of each pair, and the correlation of their weights; beside it the tree of the nearest pairs, "
        "which leads away from the root that was named.",
    ),
    Picture(
        "rewind",
        "rewound",
        {},
        "What is chosen on the left is reported on the right: gains over the tuned model, with paired 95% intervals. "
        "Thin lines are controls, random orders and orders from their end; dashed is the base.",
        width=700,
    ),
    Picture(
        "effects",
        "rewound",
        {},
        "Orange heads are better rewound, purple ones are needed. `--metric first_order` shows what one backward pass "
        "predicts.",
    ),
    Picture(
        "truncation",
        "truncated",
        {},
        "The same points against the energy that is kept and against the bytes. Thin lines are controls, one for each "
        "seed; diamonds are rules without a number.",
        width=680,
    ),
    Picture(
        "factors",
        "factored",
        {},
        "Each mark is a singular direction of the change: above the dashed line amplified, at 0 the base's.",
    ),
    Picture(
        "front",
        "factored",
        {},
        "Held-out gains over the tuned model with 95% intervals. Filled marks are dominated by no other recipe; the "
        "dashed curve is interpolation of the whole model.",
        width=700,
    ),
    Picture(
        "paths",
        "connected",
        {"task": "math"},
        "Dotted: the line between the ends. Bits per byte, so that a curve below its line is better than the line; a "
        "barrier would be a red bar up to the curve.",
    ),
    Picture(
        "connectivity",
        "connected",
        {},
        "The largest fall below the line between the ends. A tick: its interval ends below the tolerance.",
    ),
    Picture("simplex", "connected", {"task": "math"}, "Each mark is a mixture; its colour is bits per byte."),
)


def make_runs(folder: Path, series: Path) -> dict[str, Path]:
    """Write the runs that the figures are drawn from."""
    base = f"base={SAMPLES / 'base'}"
    tuned = [f"{domain}={SAMPLES / domain}" for domain in DOMAINS]
    runs = {
        name: folder / name
        for name in ("compared", "heads", "related", "series", "rewound", "truncated", "factored", "connected")
    }
    diffract.compare(base, *tuned, metrics=["all"], nulls="all", output=runs["compared"])
    diffract.heads(base, *tuned, output=runs["heads"])
    diffract.lineage(base, *tuned, root="base", output=runs["related"])
    if series.is_dir():
        follow([str(series)], by="step", select="attn, mlp", output=runs["series"])
    else:
        follow(synthetic_series(), by="given", select="mlp", output=runs["series"])
    make_searches(runs)
    return runs


def make_searches(runs: dict[str, Path]) -> None:
    """Write the runs of searches; they evaluate the samples, which takes some minutes."""
    from diffract.search import connect, search_directions, search_rewind, search_truncate

    pair, few = (SAMPLES / "base", SAMPLES / "math"), {"eval": "math=word-problems:1", "limit": 60}
    search_rewind(*pair, reference=SAMPLES / "natural", output=runs["rewound"], **few)
    search_truncate(*pair, fractions="0,0.25,0.5,0.7,0.8,0.9,1", output=runs["truncated"], **few)
    texts = {"eval": "harder=word-problems:2", "keep": "code=stdlib", "limit": 40}
    settings = {"passes": 1, "batch_tokens": 512, "tokens": 8000, "rates": "0.0003,0.001"}
    search_directions(*pair, output=runs["factored"], **texts, **settings)
    domains = [f"{domain}={SAMPLES / domain}" for domain in ("math", "code", "natural")]
    connect(SAMPLES / "base", *domains, eval="math=word-problems:1,code", limit=20, output=runs["connected"])


def follow(checkpoints: Sequence[Any], metrics: Sequence[str] = ("all",), **how: Any) -> diffract.Run:
    """Analyse a series of checkpoints whose tensors have the names of hybrid_stories.json."""
    return diffract.trajectory(*checkpoints, architecture=SERIES_LAYOUT, metrics=metrics, against="first", **how)


def synthetic_series(checkpoints: int = 12, width: int = 96, layers: int = 3) -> list[dict[str, np.ndarray]]:
    """Noise that a few directions grow out of, in place of a model's gate, up and down projections."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (2 * width, width), "w2": (2 * width, width), "w3": (width, 2 * width)}
    names = {f"blocks.{layer}.mlp.{p}.weight": shape for layer in range(layers) for p, shape in shapes.items()}
    noise = {name: 0.02 * rng.standard_normal(shape) for name, shape in names.items()}
    learnt = {name: _heavy(rng, shape) for name, shape in names.items()}
    times = np.linspace(0, 1, checkpoints)
    return [{name: (1 - t / 3) * noise[name] + t * learnt[name] for name in names} for t in times]


def _heavy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    rank = min(shape) // 3
    sizes = 0.05 * (1 + rng.pareto(2, rank))
    left, right = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return left * sizes @ right / np.sqrt(max(shape))


def draw(runs: dict[str, Path], folder: Path) -> None:
    """Write every image."""
    for picture in PICTURES:
        made = diffract.plot(picture.kind, runs[picture.run], **picture.options)  # pyright: ignore[reportArgumentType]
        width = None if picture.kind == "lorenz" else picture.width  # which is square
        file = save(made, folder / f"{picture.name or picture.kind}.png", width=width, scale=1)
        file.write_bytes(packed(file.read_bytes()))


def packed(png: bytes) -> bytes:
    """Return the same image in a fifth less space; a browser packs in haste."""
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    rows = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    before = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    again = [*before, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return png[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in again
    )


def page(series: Path) -> str:
    """Return the gallery as Markdown."""
    about = (
        "Every figure that `diffract plot` draws ([commands.md](commands.md#diffract-plot)), from the sample family in "
        "[samples/tiny-olmo2](https://github.com/diffract-llm/diffract/blob/main/samples/tiny-olmo2/README.md); "
        "those over training from "
        f"{SERIES_SOURCE if series.is_dir() else MADE_SERIES}. `make gallery` draws them again."
    )
    lines = ["# Gallery", "", fill(about, 120)]
    for kind in dict.fromkeys(picture.kind for picture in PICTURES):
        lines += ["", f"## {kind}", "", KINDS[kind].summary]
        for picture in (p for p in PICTURES if p.kind == kind):
            options = "".join(f" --{name} {value}" for name, value in picture.options.items())
            file = picture.name or kind
            lines += ["", f"    diffract plot {kind} RUN{options} -o {file}.png", ""]
            lines += [f"![{kind}](gallery/{file}.png)", "", fill(picture.text, 120)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the gallery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=Path, default=SERIES, help="folder with a series of checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where gallery.md and gallery/ go")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw(make_runs(Path(folder), asked.series), asked.output / "gallery")
    (asked.output / "gallery.md").write_text(page(asked.series), encoding="utf-8")


if __name__ == "__main__":
    main()
