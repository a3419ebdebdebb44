"""``diffract search directions`` and ``svf``: learned factors of what training changed, beside their controls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from diffract.corpora.splits import digest
from diffract.edits import Interpolate, Scale, Svf
from diffract.edits.bench import Bench, Other
from diffract.edits.directions import decomposed
from diffract.edits.draft import everything, flat, place_of
from diffract.edits.edit import Edit
from diffract.edits.factors import as_table
from diffract.edits.live import threads_of_matrices
from diffract.edits.mixing import seeded
from diffract.edits.spectral_edits import change_directions, weight_directions
from diffract.errors import SelectionError, printable
from diffract.evaluate import Task
from diffract.matrices import Matrix
from diffract.metrics.peaks import spectral_peaks
from diffract.schemas import FACTORS, ITEMS, ON_RECIPE, QUALITY, RECIPE_CHOICE
from diffract.search.certificate import Claim, dominates
from diffract.search.fit import FitSettings, FitText, LearnedPart, fine_tune, fit_text, learn_factors
from diffract.search.plan import SPLITS, UNCHANGED, Point, SearchCurve
from diffract.search.run import NUMBERS, QualitySearch
from diffract.search.sample import task_texts
from diffract.search.scorer import Rows, Scorer
from diffract.search.stage import Role, Stage
from diffract.store import cache_key
from diffract.tables import frame

Per = Literal["direction", "head", "matrix"]
"""What has a factor of its own: each singular direction, each head's slice of a matrix, or each matrix."""

Control = Literal["interpolation", "random", "fine-tuning"]

LAMBDAS = (0.03, 0.1, 0.3)
"""How much what is to be kept counts beside the target; which of them is chosen."""

FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""How far interpolation of the whole model goes back to the base."""

FIT_SHARE = 2 / 3
"""Such a share of the selection split's documents is learned on; on the rest is chosen."""

FEWEST = 15
"""Documents that the selection split has at least: under five on which to choose there is no interval."""

TABLES_OF_TOKENS = ("embed", "unembed")


@dataclass(frozen=True)
class Parted:
    """A task of the selection split in two, by document.

    Attributes:
        documents: The names of those that are learned on.
        texts: Their text, piece by piece.
        choose: The task of the others, on which is chosen.
    """

    documents: Sequence[str]
    texts: Sequence[str]
    choose: Task


def parted(task: Task) -> Parted:
    """Return what of a task is learned on, and the task of the rest, on which is chosen.

    Raises:
        SelectionError: The task has no text, or too few documents.
    """
    if task.kind != "bits":
        raise SelectionError(
            f"task {printable(task.name)!r} is measured by answers; factors are learned on text. "
            "Name text for --eval and --keep, and put tasks of answers --beside."
        )
    documents = [re.sub(r":[^:]*$", "", item.id) for item in task.items]
    ranked = sorted(set(documents), key=lambda name: digest(f"fit {name}"))
    if len(ranked) < FEWEST:
        raise SelectionError(
            f"task {printable(task.name)!r} has {len(ranked)} documents in the selection split, expected {FEWEST} or "
            "more: some to learn on and some to choose by. Give more text."
        )
    fit = set(ranked[: round(FIT_SHARE * len(ranked))])
    texts = [text for text, name in zip(task_texts(task), documents, strict=True) if name in fit]
    items = tuple(item for item, name in zip(task.items, documents, strict=True) if name not in fit)
    key = cache_key("part", task.key, [item.id for item in items])
    return Parted(sorted(fit), texts, replace(task, items=items, key=key))


@dataclass(frozen=True)
class Objective:
    """Sum over tasks of weight x bits per byte: T over its span, and lambda times G over its span.

    Attributes:
        targets: For each task of the target its span, T_base - T_tuned; 1 where that is not known to be above zero.
        kept: For each task that is to be kept its span, G_tuned - G_base; likewise.
        in_bits: Whether spans are left out, since one of them may be none.
    """

    targets: Mapping[str, float]
    kept: Mapping[str, float]
    in_bits: bool

    def weights(self, lam: float) -> dict[str, float]:
        """Return what a bit per byte of each task counts."""
        targets = {name: 1 / span / len(self.targets) for name, span in self.targets.items()}
        return targets | {name: lam / span / len(self.kept) for name, span in self.kept.items()}

    def gain(self, gains: Mapping[str, float], lam: float) -> float:
        """Return how much less the objective is, from the gains of the tasks."""
        return sum(weight * gains[name] for name, weight in self.weights(lam).items())


def objective_of(rows: Rows, roles: Mapping[str, Role]) -> Objective:
    """Return the objective, from the gains of the base over the tuned model, with intervals, of each task."""
    spans: dict[Role, dict[str, float]] = {"target": {}, "kept": {}}
    sure = True
    for row in rows:
        role = roles[row["task"]]
        if role == "beside":
            continue
        sign = -1 if role == "target" else 1
        spans[role][row["task"]] = sign * row["gain"]
        ends = (row["gain_low"], row["gain_high"])
        sure = sure and None not in ends and min(sign * end for end in ends) > 0
    if not sure:
        spans = {role: dict.fromkeys(own, 1.0) for role, own in spans.items()}
    return Objective(spans["target"], spans["kept"], in_bits=not sure)


def change_parts(bench: Bench, base: Other, asked: Asked) -> list[LearnedPart]:
    """Return the parts of the change of a model that have factors; what did not change has none."""
    found: list[LearnedPart] = []
    matrices = base.shared_matrices(bench.matrices(None, heads=asked.per == "head"))
    held = {m.tensor for m in matrices}
    for m in matrices:
        info = bench.checkpoint.info(m.tensor)
        place = place_of(m, info.shape)
        tuned, start = bench.checkpoint.read(m.tensor)[place], base.read(m.tensor, place)
        if torch.equal(tuned, start) or (is_table(m) and not asked.embeddings):
            continue
        if asked.per == "direction" and not is_table(m):
            with bench.draft().named(m.name), threads_of_matrices(info):
                own = change_directions(flat(tuned), flat(start), known=bench.decompositions)
            found.append(LearnedPart(m.name, m.tensor, place, U=own.U, S=own.told, Vh=own.Vh))
        else:
            found.append(LearnedPart(m.name, m.tensor, place, change=tuned.double() - start.double()))
    for name in bench.entries() if asked.vectors else ():
        place = base.shared(name, everything(bench.checkpoint.info(name).shape))
        if name not in held and place is not None:
            change = bench.checkpoint.read(name)[place].double() - base.read(name, place).double()
            if bool(change.any()):
                found.append(LearnedPart(name, name, place, change=change))
    return found


def weight_parts(bench: Bench) -> list[LearnedPart]:
    """Return the matrices of a model's blocks with their own singular directions."""
    found = []
    for m in bench.matrices(None, heads=False):
        info = bench.checkpoint.info(m.tensor)
        place = place_of(m, info.shape)
        values = flat(bench.checkpoint.read(m.tensor)[place])
        if not is_table(m) and bool(values.any()):
            with threads_of_matrices(info):
                own = weight_directions(values, known=bench.decompositions)
            found.append(LearnedPart(m.name, m.tensor, place, U=own.U, S=own.S, Vh=own.Vh))
    return found


def is_table(matrix: Matrix) -> bool:
    """Whether a matrix has a row for each token."""
    return matrix.block in TABLES_OF_TOKENS


def random_parts(parts: Sequence[LearnedPart], seed: int) -> list[LearnedPart]:
    """Return parts of a random change instead, Gaussian and of the same norm in each, with as many factors."""
    found = []
    for part in parts:
        held = part.change if part.S is None else part.S
        assert held is not None
        shape = held.shape if part.U is None or part.Vh is None else (len(part.U), part.Vh.shape[1])
        noise = torch.randn(shape, generator=seeded(seed, part.name), dtype=torch.float64)
        noise *= held.norm() / noise.norm()
        if part.S is None:
            found.append(replace(part, change=noise))
        else:
            own = decomposed(noise, gram=False)
            found.append(replace(part, U=own.U, S=own.S, Vh=own.Vh))
    return found


@torch.no_grad()
def moved_weights(
    model: torch.nn.Module, parts: Sequence[LearnedPart], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights that have factors, as these make them, on the CPU."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {part.tensor: weights[part.tensor].detach().to("cpu", copy=True) for part in parts}
    for part in parts:
        values = found[part.tensor][part.place]
        values += part.moved(factors[part.name] - 1).reshape(values.shape).to(values.dtype)
    return found


@dataclass(frozen=True)
class Asked:
    """What is asked of a search for factors, beside what all searches are asked.

    Attributes:
        of: Whether factors are of the singular directions of the change, or of the tuned model's weights.
        per: What has a factor of its own.
        embeddings: Whether tables of tokens have one.
        vectors: Whether vectors have one.
        fit: How factors are learned.
        tokens: The most tokens of each task that are learned on.
        polish: Passes of fine-tuning that follow.
        rates: The rates that fine-tuning is tried at.
        controls: What stands beside.
    """

    of: Literal["change", "weights"]
    fit: FitSettings
    tokens: int
    rates: tuple[float, ...]
    controls: tuple[Control, ...]
    per: Per = "direction"
    embeddings: bool = True
    vectors: bool = True
    polish: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.polish < 0:
            raise SelectionError(f"expected tokens from 1 and polish from 0, got {self.tokens} and {self.polish}.")


@dataclass
class DirectionsSearch(QualitySearch):
    """A search for factors.

    Attributes:
        stage: The live model.
        wanted: What is asked of it.
        made: The models that were learned, by recipe and place on its curve.
        learned: What was found out on the way, for the manifest.
    """

    stage: Stage
    wanted: Asked
    made: dict[tuple[str, float], Point] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stage, bench = self.stage, self.stage.live.bench
        self.base = stage.in_memory(stage.asked.models["base"])
        self.kind = "search directions" if self.wanted.of == "change" else "search svf"
        self.recipe = self.kind.split()[1]
        self.models = {"base": self.base, "tuned": stage.subject.model}
        self.roles = stage.roles
        fitted = {t.name: parted(t) for t in stage.tasks["selection"] if self.roles[t.name] != "beside"}
        self.documents = {name: own.documents for name, own in fitted.items()}
        choose = [fitted[t.name].choose if t.name in fitted else t for t in stage.tasks["selection"]]
        self._refuse_twins(choose)
        stage.tasks = {**stage.tasks, "selection": choose}
        self.texts = {name: fit_text(stage.subject, own.texts, self.wanted.tokens) for name, own in fitted.items()}
        (other,) = bench.meet([self.base], bench.entries(), chosen=False)
        self.parts = change_parts(bench, other, self.wanted) if self.wanted.of == "change" else weight_parts(bench)
        if not self.parts:
            raise SelectionError("nothing changed between base and tuned model: there is nothing to give factors to.")
        self.ends = [Point("base", (Interpolate(other=self.base, at=1),), labels={"recipe": "base"})]
        self.curves = [SearchCurve(self.recipe, {"recipe": self.recipe}, LAMBDAS, ends=False)]
        if self.wanted.polish:
            name = f"{self.recipe} then polish"
            self.curves.append(SearchCurve(name, {"recipe": name}, self.wanted.rates, ends=False))
        at = {"interpolation": FRACTIONS, "random": (1.0,), "fine-tuning": self.wanted.rates}
        self.curves += [
            SearchCurve(name, {"recipe": name}, at[name], control=True, group="points of controls", ends=False)
            for name in self.wanted.controls
        ]
        if not self.wanted.controls:
            stage.notes.append("no controls: what is gained here is a bare claim, as other recipes may gain as much")

    def _refuse_twins(self, tasks: Sequence[Task]) -> None:
        """Refuse a text that is target and to be kept at once."""
        targets, kept = (
            {item.id: t.name for t in tasks if self.roles[t.name] == role for item in t.items}
            for role in ("target", "kept")
        )
        if twins := sorted(set(targets) & set(kept)):
            raise SelectionError(
                f"target {printable(targets[twins[0]])!r} and {printable(kept[twins[0]])!r}, which is to be kept, have "
                f"{len(twins)} items in common. Name texts that differ."
            )

    def told(self) -> dict[str, Any]:
        """Return the settings that this kind alone has, and what was chosen by, as a manifest keeps them."""
        fit, wanted = self.wanted.fit, self.wanted
        told = {
            "per": wanted.per,
            "embeddings": wanted.embeddings,
            "vectors": wanted.vectors,
            "rate": fit.rate,
            "passes": fit.passes,
            "batch_tokens": fit.batch_tokens,
            "seed": fit.seed,
            "tokens": {name: text.tokens for name, text in self.texts.items()},
            "polish": wanted.polish,
            "rates": list(wanted.rates),
            "controls": list(wanted.controls),
            "factors": sum(part.start().numel() for part in self.parts),
        }
        return told | self.learned

    def learn(self, scorer: Scorer, *, effects: bool) -> None:
        """Learn factors for each lambda and choose one; then the controls, with that one."""
        model, fit = self.stage.subject.model, self.wanted.fit
        self.objective = objective_of(scorer.rows("selection", self.ends[0]), self.roles)
        if self.objective.in_bits:
            self.stage.notes.append(
                "what training gained or forgot is not sure on the choose part: the objective is T + lambda G in bits"
            )
        found = {lam: learn_factors(model, self.parts, self._texts(lam), fit) for lam in LAMBDAS}
        for lam, factors in found.items():
            self._make(self.recipe, lam, self._step(factors))
        # The largest that still gains for sure in the target; else the smallest, which is said.
        sure = []
        for lam in LAMBDAS:
            rows = scorer.rows("selection", self.made[self.recipe, lam])
            lows = [row["gain_low"] for row in rows if self.roles[row["task"]] == "target"]
            if all(low is not None and low > 0 for low in lows):
                sure.append(lam)
        self.lam = max(sure, default=min(LAMBDAS))
        if not sure:
            self.stage.notes.append(f"no lambda shows a gain in the target on the choose part: {self.lam} is the least")
        self.factors, texts = found[self.lam], self._texts(self.lam)
        span = {name: None if self.objective.in_bits else value for name, value in self.objective.targets.items()}
        kept = {name: None if self.objective.in_bits else value for name, value in self.objective.kept.items()}
        self.learned = {"lambda": self.lam, "lambda_sure": bool(sure), "spans": span | kept}
        for rate in self.wanted.rates if self.wanted.polish else ():
            with self.stage.live.edited(self._step(self.factors)):
                weights = fine_tune(model, texts, replace(fit, rate=rate, passes=self.wanted.polish))
            self._make(f"{self.recipe} then polish", rate, Interpolate(other=weights, at=1))
        if "interpolation" in self.wanted.controls:
            for at in FRACTIONS:
                self._make("interpolation", at, *([Interpolate(other=self.base, at=at)] if at else []))
        if "random" in self.wanted.controls:
            parts = random_parts(self.parts, fit.seed)
            weights = moved_weights(model, parts, learn_factors(model, parts, texts, fit))
            self._make("random", 1.0, Interpolate(other=weights, at=1))
        if "fine-tuning" in self.wanted.controls:
            passes = fit.passes + self.wanted.polish
            for rate in self.wanted.rates:
                weights = fine_tune(model, texts, replace(fit, rate=rate, passes=passes))
                self._make("fine-tuning", rate, Interpolate(other=weights, at=1))

    def _texts(self, lam: float) -> list[FitText]:
        weights = self.objective.weights(lam)
        return [replace(text, weight=weights[name]) for name, text in self.texts.items()]

    def _step(self, factors: Mapping[str, Tensor]) -> Edit:
        if self.wanted.of == "weights":
            return Svf(factors=as_table(factors))
        return Scale(base=self.base, factors=as_table(factors))

    def _make(self, recipe: str, at: float, *steps: Edit) -> None:
        key = "base" if (recipe, at) == ("interpolation", 1) else (recipe, at) if steps else UNCHANGED.key
        self.made[recipe, at] = Point(key, steps, at, labels={"recipe": recipe, "at": at})

    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model that was made for a place on a curve."""
        return self.made[curve.labels["recipe"], at]

    def claims(self) -> dict[str, Claim]:
        """Return what each task says of the checkpoint: what is beside was optimised by nobody."""
        return {name: "sentinel" if role == "beside" else role for name, role in self.roles.items()}

    def learned_on(self) -> Mapping[str, Sequence[str]]:
        """Return the documents that factors were learned on, by task."""
        return self.documents

    def choose(self, scorer: Scorer, curves: Sequence[SearchCurve]) -> Rows:
        """Return a row for each recipe and task: what was chosen of its curve on the choose part, in both splits.

        Of the directions lambda decides, of all others the objective with that lambda.
        """
        chosen: dict[str, Point] = {}
        for curve in curves:
            if curve.labels["recipe"] == self.recipe:
                chosen[curve.name] = self.made[self.recipe, self.lam]
            else:
                chosen[curve.name] = max(curve.points, key=lambda point: self._gain(scorer, point))
        # What nobody optimised dominates nothing.
        counting = [task for task in scorer.tasks["held-out"] if self.roles[task.name] != "beside"]
        for point in chosen.values():
            for split in SPLITS:
                scorer.score(split, point, split)
        found = []
        for curve in curves:
            point = chosen[curve.name]
            scores = scorer.score("held-out", point)
            better = [n for n, other in chosen.items() if dominates(scorer.score("held-out", other), scores, counting)]
            both = zip(*(scorer.rows(split, point) for split in SPLITS), strict=True)
            for own in both:
                row = {**point.labels, "which": "best", "control": curve.control, "state": scorer.number(point)}
                row |= {"task": own[0]["task"], "role": self.roles[own[0]["task"]], "dominated_by": better}
                for split, numbers in zip(SPLITS, own, strict=True):
                    row |= {f"{split.replace('-', '_')}_{name}": numbers[name] for name in NUMBERS}
                found.append(row)
        return found

    def _gain(self, scorer: Scorer, point: Point) -> float:
        gains = {row["task"]: row["gain"] for row in scorer.rows("selection", point)}
        return self.objective.gain(gains, self.lam)

    def best(self, chosen: Rows) -> Mapping[str, Any] | None:
        """Return a row of the recipe that is no control and gains most of the objective on the choose part."""
        own = [row for row in chosen if not row["control"]]
        gains: dict[str, dict[str, float]] = {}
        for row in own:
            gains.setdefault(row["recipe"], {})[row["task"]] = row["selection_gain"]
        recipe = max(gains, key=lambda name: self.objective.gain(gains[name], self.lam))
        return next(row for row in own if row["recipe"] == recipe)

    def tables(self, scorer: Scorer, curves: Sequence[SearchCurve], chosen: Rows) -> dict[str, pl.DataFrame]:
        """Return points of curves and of the base, what was chosen, the chosen factors, and items."""
        points = [point for curve in curves for point in curve.points]
        rows = [{**row, "role": self.roles[row["task"]]} for row in scorer.labelled([*points, self.ends[0]])]
        return {
            "points": frame(rows, ON_RECIPE | QUALITY),
            "choice": frame(chosen, RECIPE_CHOICE),
            "factors": frame(self._factor_rows(), FACTORS),
            "items": scorer.items().select(*ITEMS),
        }

    def _factor_rows(self) -> Rows:
        bench = self.stage.live.bench
        known = {m.name: m.labels for m in (*bench.layout.matrices, *bench.whole_layout.matrices)}
        found = []
        for part in self.parts:
            own = {"name": part.name, "tensor": part.tensor, **known.get(part.name, {})}
            labels = {name: own[name] for name in own if name in FACTORS}
            factors = self.factors[part.name]
            if part.S is None:
                found.append({**labels, "factor": float(factors)})
                continue
            peaks = spectral_peaks(part.S[None]).membership[0].tolist()
            columns = zip(part.S.tolist(), factors.tolist(), peaks, strict=True)
            for i, (sigma, factor, peak) in enumerate(columns):
                own_peak = None if peak < 0 else peak
                found.append({**labels, "direction": i, "sigma": sigma, "peak": own_peak, "factor": factor})
        return found
