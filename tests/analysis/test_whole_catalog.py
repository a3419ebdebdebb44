"""Every metric at once: degenerate matrices beside plain ones, pooled peaks, large tensors that have no null."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import diffract
from diffract.analysis import held as stack
from diffract.metrics import CATALOG, GROUPS
from diffract.metrics.catalog import LEFT_OUT
from diffract.metrics.peaks import peak_count
from diffract.schemas import LABELS, OUTCOME

QUICK = [m.name for group, rows in GROUPS.items() if group not in LEFT_OUT for m in rows]


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(40, 48, generator=torch.Generator().manual_seed(seed))


def matrices(seed: int) -> dict[str, torch.Tensor]:
    """Float32, so that Gram matrices serve; all of one shape, so that they could be one batch."""
    plain = gaussian(seed)
    hole = plain.clone()
    hole[3, 4] = torch.nan
    return {"plain": plain, "zero": 0 * plain, "one": torch.ones(40, 48), "hole": hole}


def test_degenerate_matrices_neither_raise_nor_spoil_others() -> None:
    base, tuned = matrices(0), matrices(1)
    found = diffract.compare(base, tuned, metrics="all", cache=False).metrics.filter(model="tuned")
    rows = {row["name"]: row for row in found.iter_rows(named=True)}
    alone = diffract.compare({"plain": base["plain"]}, {"plain": tuned["plain"]}, metrics="all", cache=False)
    assert rows["plain"] == alone.metrics.filter(model="tuned").row(0, named=True)
    assert [rows[name]["status"] for name in base] == ["ok", "zero", "ok", "non_finite"]
    for name in QUICK:
        # This base has one peak, and there is no inside and outside of the bulk.
        assert (rows["plain"][name] is None) == name.startswith("peak_enrichment"), name
        assert rows["hole"][name] is None, name
        for row in rows.values():
            assert row[name] is None or np.isfinite(row[name]), name
    # No vectors, no tail and no density are those of a zero matrix; nothing moved in the matrix of ones.
    for name in ("pl_alpha", "peak_count", "left_agreement_mean", "left_angle_8", "value_share", "null_w1"):
        assert rows["zero"][name] is None, name
    assert rows["one"]["delta_frobenius"] == 0
    assert rows["one"]["mp_spikes"] == rows["one"]["donoho_gavish_rank"] == 1
    assert rows["one"]["pl_alpha"] is None
    assert rows["one"]["peak_enrichment"] is None


def test_a_scan_of_all_has_every_metric_of_one_matrix() -> None:
    found = diffract.scan({"w": gaussian(0)}, metrics="all", cache=False)
    own = [c for c in found.metrics.columns if c not in LABELS | OUTCOME and c != "pooled_peak_count"]
    assert own == [name for name in QUICK if not CATALOG[name].pair]
    quantities = set(found.spectra["quantity"])
    assert quantities == {
        "sigma",
        "null_sigma",
        "pl_ks_scan",
        "peak",
        "peak_position",
        "peak_width",
        "peak_mass",
        "sep_sigma",
    }


def test_curves_of_fits_lie_along_the_spectrum() -> None:
    found = diffract.scan({"w": gaussian(0)}, metrics="all", cache=False)
    curves = {row["quantity"]: row["values"] for row in found.spectra.iter_rows(named=True)}
    row = found.metrics.row(0, named=True)
    scan = [
        (ks, sigma**2 / 48) for ks, sigma in zip(curves["pl_ks_scan"], curves["sigma"], strict=True) if ks is not None
    ]
    assert min(scan) == pytest.approx((row["pl_ks"], row["pl_xmin"]), rel=1e-12)
    assert curves["pl_ks_scan"][0] is None  # the largest eigenvalue is no candidate
    assert len(curves["peak_position"]) == len(curves["peak_width"]) == len(curves["peak_mass"]) == row["peak_count"]
    assert max(curves["peak"]) == row["peak_count"] - 1
    assert row["warning"].startswith(f"tail of {row['pl_tail_count']:.0f} points")


def test_the_null_is_seeded_and_has_the_same_entries() -> None:
    w = gaussian(0)
    one, again = (diffract.scan({"w": w}, metrics="random_matrix", cache=False).spectra for _ in range(2))
    assert one.equals(again)
    null = one.filter(quantity="null_sigma")["values"][0].to_numpy()
    assert np.linalg.norm(null) == pytest.approx(torch.linalg.norm(w.double()).item(), rel=1e-12)
    shuffled = diffract.scan({"w": w.flip(0)}, metrics=["null_spectral_norm"], cache=False).metrics
    assert shuffled["null_spectral_norm"][0] != null[0]


def test_tensors_that_are_never_held_whole_have_no_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", w=torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).numpy())
    whole = diffract.scan(tmp_path / "w.npz", metrics="random_matrix", cache=False).metrics
    monkeypatch.setattr(stack, "KEEP_BYTES", 256)
    streamed = diffract.scan(tmp_path / "w.npz", metrics="random_matrix", cache=False).metrics
    assert streamed["null_w1"].is_null().all()
    assert whole["null_w1"].is_not_null().all()
    assert streamed["mp_variance"][0] == pytest.approx(whole["mp_variance"][0], rel=1e-12)


def test_pooled_peaks_are_those_of_all_heads_together(family: tuple[Path, Path]) -> None:
    run = diffract.scan(family[0], metrics=["peak_count", "stable_rank"], cache=False)
    heads = run.metrics.filter(layer=1, projection="q")
    values = run.spectra.filter(pl.col("name").is_in(heads["name"].to_list()), quantity="sigma")["values"]
    pool = torch.tensor(values.explode().to_list(), dtype=torch.float64)[None]
    assert heads["pooled_peak_count"].to_list() == [peak_count(pool).item()] * 4
    assert run.metrics.filter(block="mlp")["pooled_peak_count"].is_null().all()
    assert "pooled_peak_count" in run.manifest["metrics"]
    assert "pooled_peak_count" not in diffract.scan(family[0], cache=False).metrics.columns
