"""Figures over seeds, goals and sentences of the rows of `peers.py`, whose `part` is model, latency or rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from statistics import fmean, stdev
from typing import Any

from documents import Document, Row, grouped, mean, median, spread, values_of
from segmentation_peers.deployment import REFERENCE
from segmentation_peers.models import ENTRIES, PEERS


def comparisons(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by source and budget."""
    return grouped((row for row in rows if "source" in row), "source", "budget")


def told(budget: str) -> str:
    kind, _, number = budget.partition("-")
    return f"{number} {'min' if kind == 'minutes' else 'crops'}"


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return {model: mine for (model,), mine in grouped((row for row in rows if row["part"] == "model"), "model").items()}


def summarise(rows: list[Row]) -> list[Row]:
    """A row for each model of a comparison, best first: figures of the variant that each seed deploys. `miou` has a value for each seed."""
    latencies = {row["seed"]: row for row in rows if row["part"] == "latency"}
    summary = []
    for model, mine in by_model(rows).items():
        timed = [latencies[row["seed"]] for row in mine]
        chosen = [latency["chosen"][model] for latency in timed]
        deployed = [row["variants"][variant] for row, variant in zip(mine, chosen, strict=True)]
        miou = [variant["test"] for variant in deployed]
        summary.append({
            **{key: mine[0].get(key) for key in ("source", "budget", "model")}, "hybrid": ENTRIES[model].hybrid, "seeds": len(mine),
            "deployed": ", ".join(dict.fromkeys(chosen)), "miou": miou, "score": fmean(miou), "test": spread(miou),
            "float": spread([row["variants"][REFERENCE]["test"] for row in mine]),
            "iou": {label: spread(values_of(deployed, f"iou.{label}")) for label in deployed[0]["iou"]},
            "ms": {side: fmean(latency["ms"][side][model] for latency in timed) for side in timed[0]["ms"]},
            "mb": fmean(variant["bytes"] for variant in deployed) / 1e6, "millions": mine[0]["parameters"] / 1e6,
            "minutes": median(mine, "minutes"), **{key: mean(mine, key) for key in ("samples", "images_per_s", "learning_rate")},
        })  # fmt: skip
    return sorted(summary, key=lambda row: -float(row["score"]))


def models(rows: list[Row]) -> Iterator[Row]:
    """A row for each model of each comparison, then the models that were left out."""
    for found in comparisons(rows).values():
        yield from summarise(found)
    yield from ({**row, "cannot": f"seed {row['seed']}: {row['cannot']}"} for row in rows if "cannot" in row)


def variants(rows: list[Row]) -> Iterator[Row]:
    """A row for each variant of each model, also those that are not deployed."""
    for (source, budget), compared in comparisons(rows).items():
        latencies = {row["seed"]: row["variants"] for row in compared if row["part"] == "latency"}
        for model, mine in by_model(compared).items():
            for name in mine[0]["variants"]:
                found = [row["variants"][name] for row in mine]
                scores = {key: spread(values_of(found, key)) for key in ("validation", "admission", "test")}
                ms = fmean(latencies[row["seed"]][model][name] for row in mine)
                yield {"source": source, "budget": budget, "model": model, "variant": name, **scores, "ms": ms}


def rates(rows: list[Row]) -> Iterator[Row]:
    """The learning rates that were tried with each model, the best one marked."""
    for tried in grouped((row for row in rows if row.get("part") == "rate"), "source", "budget", "model").values():
        tried = sorted(tried, key=lambda row: float(row["learning_rate"]))
        best = best_rate(tried)
        choice = "best, at an end" if best in (tried[0], tried[-1]) else "best"
        yield from ({**row, "choice": choice if row is best else ""} for row in tried)


def best_rate(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: float(row["held_out"]))


def seeds_of_all(rows: Iterable[Row]) -> set[int]:
    """The seeds that every model has a row of: means over different seeds say as much of the seeds as of the models."""
    seeds = [{row["seed"] for row in mine} for mine in by_model(rows).values()]
    return set.intersection(*seeds) if seeds else set()


def judged(document: Document) -> Iterator[tuple[str, list[Row], list[Row], float]]:
    """For each comparison with hybrids and peers, over the seeds that all models have: its name (empty for the only one), both summaries,
    best first, and the lead of the best hybrid in points of mIoU."""
    compared = comparisons(document.rows)
    for (source, budget), rows in compared.items():
        seeds = seeds_of_all(rows)
        summary = summarise([row for row in rows if row.get("seed") in seeds])
        hybrids, peers = ([row for row in summary if row["hybrid"] is kind] for kind in (True, False))
        if hybrids and peers:
            lead = 100 * (hybrids[0]["score"] - peers[0]["score"])
            yield f"{source}, {told(budget)}" if len(compared) > 1 else "", hybrids, peers, lead


def goals(document: Document) -> dict[str, dict[str, float | None]]:
    """Cases of the four goals. One seed can miss a goal, but not meet it.

    `lead`: less the standard deviations of both. `earth`: the lead on `earth`. `best`, `fastest`: latency of the fastest hybrid with at
    least the best peer's score, over that peer's, and over the fastest peer's if it is another one; infinite if no hybrid has that score.
    """
    cases: dict[str, dict[str, float | None]] = {"lead": {}, "earth": {}, "best": {}, "fastest": {}}
    for case, hybrids, peers, lead in judged(document):
        best, scores = peers[0], (hybrids[0]["miou"], peers[0]["miou"])
        one_seed = best["seeds"] == 1
        cases["lead"][case] = (lead if lead < 0 else None) if one_seed else lead - 100 * sum(map(stdev, scores))
        if best["source"] == "earth":
            cases["earth"][case] = None if one_seed else lead
        for side in best["ms"]:
            reaching = [row["ms"][side] for row in hybrids if row["score"] >= best["score"]]
            for goal, peer in (("best", best), ("fastest", min(peers, key=lambda row: float(row["ms"][side])))):
                if goal == "best" or peer is not best:
                    share = None if one_seed and reaching else min(reaching, default=inf) / peer["ms"][side]
                    cases[goal][f"{case} {side}²".strip()] = share
    return cases


def variant(document: Document) -> str:
    """Sources, budgets and models: documents of the same are runs of the same."""
    compared = comparisons(document.rows)
    names = sorted({model for found in compared.values() for model in by_model(found)})
    hybrids, peers = ([name for name in names if ENTRIES[name].hybrid is kind] for kind in (True, False))
    where = "; ".join(f"{source}, {told(budget)}" for source, budget in compared)
    return f"{where}: {', '.join(hybrids + peers if len(peers) <= 2 else [*hybrids, f'{len(peers)} peers'])}"


def newest(document: Document) -> str:
    found = [(*hybrids, peers[0], lead) for _, hybrids, peers, lead in judged(document)]
    models = [", ".join(f"{row['model']} {row['test']}" for row in rows) for *rows, _ in found]
    return "; ".join(f"{told} (best peer), a lead of {lead:.1f} points" for told, (*_, lead) in zip(models, found, strict=True))


def claim(documents: list[Document]) -> str:
    """Leads and shares of the time after one minute of training beside all of PEERS; leads after longer trainings."""
    short: dict[str, float] = {}
    longer: list[float] = []
    shares: list[float] = []
    for each in documents:
        for _, (hybrid, *_), peers, lead in judged(each):
            kind, _, minutes = hybrid["budget"].partition("-")
            if minutes == "1" and len(peers) >= len(PEERS):
                short[hybrid["source"]] = lead
                shares += [100 * value for value in goals(each)["best"].values() if value is not None]
            elif kind == "minutes" and minutes != "1":
                longer.append(lead)
    leads = ", ".join(f"{value:+.1f}" for value in sorted(short.values(), reverse=True))
    after = f"after longer training {min(longer):+.1f} to {max(longer):+.1f}. {min(shares):.0f} to {max(shares):.0f} % of the time"
    return f"after one minute of training {leads} points on {len(short)} label sets; {after}"
