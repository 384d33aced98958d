"""What the response protocol and its head are worth on simulated cohorts, and whether the protocol keeps its promises.

Parts (any number, in the order given; all by default):

known     Deng 2020 and Fandrei 2024 (../shared/data), whose figures are known
leaks     twenty-five planted leaks: refused or named (row E2 of the goals)
coverage  how often the 95% interval holds the true AUROC, of a score and of a fitted pipeline (E5)
power     the smallest AUROC that is seen at 30, 64 and 80 patients (E9), and what happens above 0.85 (E14)
study     the outcome depends on the study alone: refused, or the confounding is reported
effects   head and baselines, studies held out, where a rare state, composition or clones carry the outcome
null      nothing predicts: intervals and permutation p-values over many cohorts
shuffles  one cohort, its outcomes shuffled within study again and again, through the whole pipeline (E1)

    python scripts/bench_response.py effects --cohorts 4 --patients 100
    python scripts/bench_response.py null --cohorts 50 --shuffles 19 --processes 2

The last line of output is one line of JSON with the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_leaks
import torch
from scipy.stats import binom, kstest, norm

from carvae.data.patients import Patients, read_patients
from carvae.data.simulate_cohorts import CohortDesign, simulate_cohort
from carvae.errors import CarvaeError, LeakSuspected
from carvae.evaluation.response import STUDY, Run, designs_of, evaluate, null_of, scores_of
from carvae.evaluation.response_report import check_leaks
from carvae.model.response import HeadSettings
from carvae.response.allowed import Informative, confounding, informative, power, power_at
from carvae.response.choice import ATTENTION_PCA, CHOSEN
from carvae.response.heads import heads
from carvae.response.methods import baselines
from carvae.response.pairs import BOTH_WAYS, Outcomes, Tally, interval, p_value, weights
from carvae.section_respond import RespondConfig

SMALL = CohortDesign(effect="nothing", n_patients=60, n_studies=4, n_cells=60, n_genes=24)
QUICK = HeadSettings(n_members=2, n_cells=24, n_steps=30)
"""For parts that fit thousands of heads."""
Figures = dict[str, Any]


def run_of(patients: Patients, seed: int, settings: HeadSettings, shuffles: int = 0, *, all_methods: bool) -> Run:
    """The protocol on a simulated cohort; without ``all_methods`` the pooling on components is left out."""
    methods = [*baselines(patients), *heads(patients, settings)]
    kept = tuple(m for m in methods if all_methods or m.name != ATTENTION_PCA)
    return Run(patients, kept, RespondConfig(permutations=shuffles, repeats=1), seed)


def known(args: argparse.Namespace) -> Figures:
    """The two public tables; nothing where they are not at hand."""
    deng = {
        "table": args.data / "deng2020_car_treg_fraction_by_patient.csv",
        "columns": {"patient": "sample", "outcome": "response"},
        "levels": [["CR"], ["PD"]],
        "score": "treg_frac",
    }
    fandrei = {
        "table": args.data / "fandrei2024_bcma_tcr_diversity_response.csv",
        "columns": {"outcome": "response_day30"},
        "where": {"timepoint": "Day 30", "lineage": "CD8"},
        "levels": [["SD/PD", "VGPR/PR"], ["CR"]],
        "score": "shannon",
    }
    found = {}
    for name, settings in {"deng": deng, "fandrei": fandrei}.items():
        if not settings["table"].exists():  # type: ignore[attr-defined]
            print(f"{name}: {settings['table']} is not there; left out")
            continue
        config = RespondConfig.model_validate(settings)
        metrics = evaluate(Run(read_patients(config), (), config, 0))
        headline = metrics["headline"]
        found[name] = {**rounded(headline["auroc"]), "n": metrics["patients"]}
        found[name] |= {"p": round(headline["p"], 3), "verdict": headline["verdict"]}
        print(name, found[name])
    return found


def leaks(args: argparse.Namespace) -> Figures:
    """Planted leaks, and the same checks where nothing was planted."""
    caught, silent = planted_leaks.run(args.seed), planted_leaks.honest(args.seed)
    for leak in caught:
        print(f"{leak.how:8} {leak.leak}: {leak.said[:100]}")
    how = [leak.how for leak in caught]
    false = sum(leak.how != "missed" for leak in silent)
    return {"planted": len(how), "refused": how.count("refused"), "named": how.count("named"), "false_alarms": false}


def coverage(args: argparse.Namespace) -> Figures:
    """Sixty patients of four studies: a score with a known AUROC, and composition (true: its mean over cohorts)."""
    found: Figures = {}
    for true in (0.50, 0.65, 0.80):
        inside = [_score_inside(true, args.seed + k) for k in range(args.runs)]
        found[f"score {true:.2f}"] = float(np.mean(inside))
        print(f"score, true AUROC {true:.2f}: the interval holds it in {np.mean(inside):.1%} of {args.runs} cohorts")
    jobs = [(strength, args.seed + k) for strength in (0.0, 1.2, 3.0) for k in range(args.runs)]
    each = np.array(list(spread(_pipeline, jobs, args.processes))).reshape(-1, args.runs, 3)
    for rows in each:
        true = rows[:, 0].mean()
        inside = (rows[:, 1] <= true) & (true <= rows[:, 2])
        found[f"pipeline {true:.2f}"] = float(inside.mean())
        print(f"pipeline, mean AUROC {true:.2f}: the interval holds it in {inside.mean():.1%} of {args.runs} cohorts")
    return found


def _score_inside(true: float, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    level = (rng.random(60) < 0.45).astype(float)
    score = rng.normal(size=60) + np.sqrt(2) * norm.ppf(true) * level
    names = np.array([f"p{i:02d}" for i in range(60)], dtype=object)
    outcomes = Outcomes(names, np.array([f"s{i % 4}" for i in range(60)], dtype=object), level, None)
    tally = Tally.of(outcomes, [score])
    return _holds(interval(tally.value, tally.drawn(weights(outcomes, rng, 1000))), true)


def _pipeline(job: tuple[float, int]) -> tuple[float, float, float]:
    """Composition alone, studies held out: the figure and its interval."""
    strength, seed = job
    design = replace(SMALL, effect="composition", strength=strength, n_genes=6)
    patients = simulate_cohort(design, np.random.default_rng((seed, 1)))
    method = next(m for m in baselines(patients) if m.name == "composition")
    run = Run(patients, (method,), RespondConfig(), seed)
    tally = Tally.of(Outcomes.of(patients), scores_of(run, designs_of(run)[STUDY]).by_method[CHOSEN])
    drawn = tally.drawn(weights(Outcomes.of(patients), np.random.default_rng(seed), 1000))
    found = interval(tally.value, drawn, BOTH_WAYS)
    return tally.value, found["low"] or 0.0, found["high"] or 1.0


def _holds(found: dict[str, float | None], true: float) -> bool:
    return found["low"] is not None and found["high"] is not None and found["low"] <= true <= found["high"]


def power_part(args: argparse.Namespace) -> Figures:
    """What can be seen, and the alarm above 0.85."""
    found: Figures = {}
    for n in (30, 64, 80):
        strata = ((n - round(0.45 * n), round(0.45 * n)),)
        least = power(Informative(("one",), (), strata), both_sides=False)["smallest_detectable"]
        rng, hits, d = np.random.default_rng(n), 0, np.sqrt(2) * norm.ppf(least)
        for _ in range(400):
            worse, better = rng.normal(size=strata[0][0]), rng.normal(d, 1, strata[0][1])
            auroc = (better[:, None] > worse[None]).mean()
            hits += (auroc - 0.5) / np.sqrt((n + 1) / (12 * strata[0][0] * strata[0][1])) > norm.ppf(0.95)
        found[f"smallest at {n}"], found[f"seen at {n}"] = least, hits / 400
        print(f"{n} patients: smallest AUROC seen four times in five {least:.3f} (simulated: {hits / 400:.0%})")
    assert power_at(0.5, strata, both_sides=False) == 0.05
    found["leak_suspected"] = _alarm(args.seed)
    return found


def _alarm(seed: int) -> bool:
    """Whether a feature that copies the outcome is stopped by the alarm."""
    patients = simulate_cohort(SMALL, np.random.default_rng(seed))
    copy = patients.outcome_R + np.random.default_rng(seed).normal(0, 0.3, patients.outcome_R.size)
    patients = replace(patients, bags={}, columns=("copy",), x_RF=copy[:, None])
    try:
        check_leaks(
            evaluate(Run(patients, tuple(baselines(patients)), RespondConfig(permutations=200, repeats=1), seed))
        )
    except LeakSuspected as error:
        print(f"LeakSuspected: {error}")
        return True
    return False


def study(args: argparse.Namespace) -> Figures:
    """Study-only effects: what is said of each cohort."""
    said: dict[str, int] = {}
    for k in range(args.cohorts):
        patients = simulate_cohort(replace(SMALL, effect="study", n_patients=100, n_studies=5), _rng(args, k))
        patients = replace(patients, bags={})
        try:
            informative(patients)
            rows = confounding(patients, np.random.default_rng(k))
            p = next(row["p"] for row in rows if row["what"] == "study")
            what = "confounding reported" if p < 0.05 else "missed"
        except CarvaeError:
            what = "refused"
        said[what] = said.get(what, 0) + 1
    print("study-only effect:", said)
    return said


def effects(args: argparse.Namespace) -> Figures:
    """Mean AUROC within held-out studies of every method."""
    found: Figures = {}
    for effect in args.effects:
        jobs = [(effect, args.patients, args.seed + k) for k in range(args.cohorts)]
        each = list(spread(_effect, jobs, args.processes))
        means = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        used = float(np.mean([one["head used"] for one in each]))
        for name, mean in means.items():
            print(
                f"{effect}, {args.patients} patients: {name} {mean:.3f} ({', '.join(f'{o[name]:.2f}' for o in each)})"
            )
        found[effect] = {name: round(mean, 3) for name, mean in means.items()} | {"head used": used}
    return found


def _effect(job: tuple[Any, int, int]) -> dict[str, float]:
    torch.set_num_threads(1)
    effect, n_patients, seed = job
    patients = simulate_cohort(CohortDesign(effect=effect, n_patients=n_patients), np.random.default_rng((seed, 0)))
    run = run_of(patients, seed, HeadSettings(), all_methods=True)
    scores, outcomes = scores_of(run, designs_of(run)["study"]), Outcomes.of(patients)
    used = float(np.mean([setting[CHOSEN] == "head" for setting in scores.settings]))
    return {name: Tally.of(outcomes, own).value for name, own in scores.by_method.items()} | {"head used": used}


def null(args: argparse.Namespace) -> Figures:
    """Cohorts in which nothing predicts."""
    jobs = [(args.shuffles, args.seed + k) for k in range(args.cohorts)]
    each = list(spread(_null, jobs, args.processes))
    value, holds, p = (np.array(column, float) for column in zip(*each, strict=True))
    false = int((p <= 0.05).sum())
    by_chance = binom.sf(false - 1, len(each), 0.05)
    uniform = float(kstest(p - np.random.default_rng(0).random(p.size) / (args.shuffles + 1), "uniform").pvalue)
    print(f"{len(each)} cohorts: mean AUROC {value.mean():.3f}, interval holds 0.5 in {holds.mean():.0%}")
    print(f"p <= 0.05 in {false} of {len(each)} (by chance {by_chance:.2f}), uniform {uniform:.2f}")
    return {
        "cohorts": len(each),
        "mean_auroc": round(float(value.mean()), 4),
        "interval_holds_half": float(holds.mean()),
        "false_positives": false / len(each),
        "uniform_p": round(uniform, 3),
    }


def _null(job: tuple[int, int]) -> tuple[float, bool, float]:
    torch.set_num_threads(1)
    shuffles, seed = job
    patients = simulate_cohort(SMALL, np.random.default_rng((seed, 2)))
    run = run_of(patients, seed, QUICK, shuffles, all_methods=False)
    folds, outcomes = designs_of(run)["study"], Outcomes.of(patients)
    tally = Tally.of(outcomes, scores_of(run, folds, only=CHOSEN).by_method[CHOSEN])
    spread_of = tally.drawn(weights(outcomes, np.random.default_rng(seed)))
    p = p_value(tally.value, null_of(run, folds, CHOSEN), both_sides=False)
    return tally.value, _holds(interval(tally.value, spread_of, BOTH_WAYS), 0.5), p


def shuffles(args: argparse.Namespace) -> Figures:
    """One cohort with a strong rare-state effect: what the pipeline makes of its shuffled outcomes."""
    jobs = [(args.seed, k) for k in range(args.runs)]
    each = list(spread(_shuffled, jobs, args.processes))
    value, p = (np.array(column) for column in zip(*each, strict=True))
    print(f"{len(each)} shuffles: mean AUROC {value.mean():.3f}, standard deviation {value.std():.3f}")
    uniform = float(kstest(p, "uniform").pvalue)
    print(f"p-values by the interval's standard error: below 0.05 in {(p < 0.05).mean():.1%}, uniform: {uniform:.2f}")
    return {"shuffles": len(each), "mean_auroc": round(float(value.mean()), 4), "uniform_p": round(uniform, 3)}


def _shuffled(job: tuple[int, int]) -> tuple[float, float]:
    torch.set_num_threads(1)
    seed, k = job
    patients = simulate_cohort(replace(SMALL, effect="rare"), np.random.default_rng((seed, 3)))
    patients = patients.shuffled(np.random.default_rng((seed, 4, k)))
    run, outcomes = run_of(patients, seed, QUICK, all_methods=False), Outcomes.of(patients)
    tally = Tally.of(outcomes, scores_of(run, designs_of(run)["study"], only=CHOSEN).by_method[CHOSEN])
    deviation = BOTH_WAYS * tally.drawn(weights(outcomes, np.random.default_rng((seed, k)), 500)).std()
    return tally.value, float(2 * norm.sf(abs(tally.value - 0.5) / deviation))


def spread(work: Callable[[Any], Any], jobs: list[Any], processes: int) -> Iterator[Any]:
    """The results in order, by so many processes."""
    if processes == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(work, jobs)


def rounded(found: dict[str, float | None]) -> Figures:
    """To three digits."""
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def _rng(args: argparse.Namespace, k: int) -> np.random.Generator:
    return np.random.default_rng((args.seed, k))


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "known": known,
    "leaks": leaks,
    "coverage": coverage,
    "power": power_part,
    "study": study,
    "effects": effects,
    "null": null,
    "shuffles": shuffles,
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cohorts", type=int, default=4, help="simulated cohorts (effects, null, study)")
    parser.add_argument("--patients", type=int, default=100, help="patients of a cohort (effects)")
    parser.add_argument("--effects", nargs="+", default=["rare", "composition", "clones"], help="what carries it")
    parser.add_argument("--shuffles", type=int, default=19, help="shuffles of each cohort (null)")
    parser.add_argument("--runs", type=int, default=200, help="cohorts (coverage) or shuffles (shuffles)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public tables (known)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: Figures = {}
    for part in args.parts or PARTS:
        start = time.perf_counter()
        print(f"== {part}", flush=True)
        figures[part] = PARTS[part](args) | {"seconds": round(time.perf_counter() - start)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
