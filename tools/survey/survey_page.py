"""The survey's page: tables and verdicts from the figures; a sentence that depends on a figure is chosen by it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from survey_plots import figure_name
from survey_text import HEAD, NOTES, TAIL, TITLES

Results = Mapping[str, Any]
"""The result of each experiment on one set of models."""

NOT_RUN = "not run"
LEVEL = 0.01
"""A difference of mean accuracy up to this is called none: about the standard error of one figure."""


@dataclass(frozen=True)
class Claim:
    """One claim of the survey and how its figures are shown and judged."""

    key: str
    title: str
    text: str
    tables: Callable[[Results], str]
    judge: Callable[[Results], tuple[str, str]]
    """Verdict, and the sentence with the figures that it rests on."""


def page(found: Mapping[str, Results]) -> str:
    """Return the whole page for the sets of models that have results."""
    parts = [HEAD, _verdicts(found)]
    for name, results in found.items():
        parts += [
            f"Before merging, {TITLES[name]} (the last column is the size of the task vector):",
            _references(results),
        ]
    for number, claim in enumerate(CLAIMS, 1):
        parts += [f"## {number}. {claim.title}", _wrapped(claim.text)]
        for name, results in found.items():
            if claim.key not in results:
                continue
            verdict, reason = claim.judge(results)
            parts += [
                f"### {number}. {TITLES[name]}: {verdict}",
                f"![{claim.title}, {TITLES[name]}](survey/{figure_name(name, claim.key)})",
                claim.tables(results),
                _wrapped(reason),
            ]
        parts += [_wrapped(NOTES[claim.key])] if claim.key in NOTES else []
    return "\n\n".join([*parts, TAIL]) + "\n"


def _verdicts(found: Mapping[str, Results]) -> str:
    rows = [
        [
            f"{number}. {claim.title}",
            *(claim.judge(results)[0] if claim.key in results else NOT_RUN for results in found.values()),
        ]
        for number, claim in enumerate(CLAIMS, 1)
    ]
    return _table(["claim", *(TITLES[name] for name in found)], rows)


def _references(results: Results) -> str:
    accuracy, size = results["references"]["accuracy"], results["references"]["size"]
    rows = [[name, *row.values(), _mean(row.values()), size.get(name, "")] for name, row in accuracy.items()]
    return _table(["model", *accuracy["base"], "mean", "‖δ‖ / ‖θ₀‖, %"], rows)


def _trim_table(results: Results) -> str:
    r = results["trim"]
    rows = [[task, r["base"][task], *row] for task, row in r["accuracy"].items()]
    rows.append(["mean", *(_mean(row[i] for row in rows) for i in range(1, len(rows[0])))])
    return _table(["kept", "0 (base)", *(f"{d:g}" for d in r["densities"])], rows)


def _judge_trim(results: Results) -> tuple[str, str]:
    r = results["trim"]
    at = list(r["densities"]).index(0.2)
    lost = {task: row[-1] - row[at] for task, row in r["accuracy"].items()}
    gain = [(row[at] - r["base"][task]) / (row[-1] - r["base"][task]) for task, row in r["accuracy"].items()]
    worst, mean = max(lost.values()), _mean(lost.values())
    verdict = "shows" if worst <= LEVEL else "shows nearly" if mean <= 0.05 else "does not show"
    return verdict, (
        f"The top 20 % alone change the whole fine-tune's accuracy by {_signed(-mean)} points on the mean and by "
        f"{_signed(-worst)} in the worst task; they keep "
        f"{100 * min(gain):.0f} to {100 * max(gain):.0f} % of its gain over the base."
    )


def _interference_tables(results: Results) -> str:
    rows = results["interference"]["rows"]
    names = {
        "signs conflict, of entries influential in some model": "conflict_any",
        "signs conflict, of entries influential in two or more": "conflict_shared",
    } | {
        f"influential values {text} {name}": f"{key}, {name}"
        for key, text in (("shrunk", "shrunk below 3/4 by"), ("kept", "median size kept by"))
        for name in ("mean of all", "mean of trimmed", "TIES")
    }
    head = [f"n = {row['n']}" for row in rows]
    values = [[text, *(row["values"][key] for row in rows)] for text, key in names.items()]
    accuracies = [[name, *(row["accuracy"][name] for row in rows)] for name in rows[0]["accuracy"]]
    return (
        _table(["share of influential values, %", *head], values)
        + "\n\n"
        + _table(["accuracy on the merged tasks, %", *head], accuracies)
    )


def _judge_interference(results: Results) -> tuple[str, str]:
    rows = results["interference"]["rows"]
    first, last = rows[1]["accuracy"], rows[-1]["accuracy"]
    values, n = [row["values"] for row in rows], rows[-1]["n"]
    rising = ("conflict_any", "conflict_shared", "shrunk, mean of all")
    grows = all(a[key] < b[key] for a, b in pairwise(values) for key in rising)
    effects = {
        "trimming before the mean": last["mean of trimmed"] - last["mean of all"],
        "trimming before the sum": last["sum of trimmed"] - last["sum of all"],
        "election before the mean": last["mean of trimmed, elected"] - last["mean of trimmed"],
        "election before the sum": last["sum of trimmed, elected"] - last["sum of trimmed"],
    }
    trimming = [name.split()[-1] for name in list(effects)[:2] if effects[name] > LEVEL]
    election = [name.split()[-1] for name in list(effects)[2:] if effects[name] > LEVEL]
    helped = [
        f"{what} helps {'the ' + ' and the '.join(which) if which else 'nothing'}"
        for what, which in (("trimming", trimming), ("election", election))
    ]
    row = results["scaled"]["methods"]["task arithmetic"]
    scaled = sum(row["rows"][row["best"]][half] for half in ("tune", "report")) / 2
    listed = "; ".join(f"{name} {_signed(effect)}" for name, effect in effects.items())
    return f"{'shows' if grows else 'does not show'} in the values; in accuracy, {', '.join(helped)}", (
        f"With more models, {'more' if grows else 'not always more'} influential values shrink and more signs "
        f"conflict, and the merge falls from {_percent(first['mean of all'])} (mean of all, n = 2) to "
        f"{_percent(last['mean of all'])} (n = {n}). Of the entries that are influential in both of two models, "
        f"{_percent(values[1]['conflict_shared'])} conflict; signs drawn by a coin would in 50 %. What "
        f"the two remedies do to the accuracy at n = {n}, in "
        f"points: {listed}. A sum of all with the best λ of claim 4 ({row['lambdas'][row['best']]:g}) reaches "
        f"{_percent(scaled)}, {_compared(scaled, last['sum of trimmed'])} the trimmed sum."
    )


def _fisher_table(results: Results) -> str:
    rows = results["fisher"]["rows"]
    tasks = list(rows["average"]["tasks"])
    names = {name: f"Fisher: {name}" for name in rows} | {"average": "isotropic average"}
    body = [[names[name], *row["tasks"].values(), row["report"], row["tune"]] for name, row in rows.items()]
    return _table(["merge", *tasks, "mean", "mean, tuning half"], body)


def _judge_fisher(results: Results) -> tuple[str, str]:
    rows, best = results["fisher"]["rows"], results["fisher"]["best"]
    plain, gains = rows["average"]["report"], {}
    for name in ("default", best):
        gains[name] = rows[name]["report"] - plain
    verdict = {2: "shows", 1: "shows with the default only", 0: "does not show"}
    n = sum(gain > LEVEL for gain in (gains["default"], gains[best]))
    word = verdict[n] if n != 1 or gains["default"] > LEVEL else "shows for the tuned variant only"
    return word, (
        f"Against the isotropic average the default gains {_signed(gains['default'])} points, the variant that "
        f"was best on the tuning half (“{best}”) {_signed(gains[best])}."
    )


def _scaled_table(results: Results) -> str:
    r = results["scaled"]
    tasks = list(r["average"]["tasks"])
    rows = [["averaging", "", *r["average"]["tasks"].values(), r["average"]["report"], r["average"]["tune"]]]
    for name, row in r["methods"].items():
        default = list(row["lambdas"]).index(1.0)
        for i, text in ((default, "1 (default)"), (row["best"], f"{row['lambdas'][row['best']]:g} (best)")):
            point = row["rows"][i]
            rows.append([name, text, *point["tasks"].values(), point["report"], point["tune"]])
    return _table(["method", "λ", *tasks, "mean", "mean, tuning half"], rows)


def _judge_scaled(results: Results) -> tuple[str, str]:
    r = results["scaled"]
    best = {name: row["rows"][row["best"]] for name, row in r["methods"].items()}
    ties = max((name for name in best if name.startswith("TIES")), key=lambda name: best[name]["tune"])
    average, arithmetic = r["average"]["report"], best["task arithmetic"]["report"]
    value = best[ties]["report"]
    beats = [value - average > LEVEL, value - arithmetic > LEVEL]
    verdict = "shows" if all(beats) else "shows against one of the two" if any(beats) else "does not show"
    default = list(r["methods"][ties]["lambdas"]).index(1.0)
    plain = r["methods"]["TIES, density 0.2"]["rows"][default]["report"]
    sum_of_all = r["methods"]["task arithmetic"]["rows"][-1]["report"]
    return verdict, (
        f"With λ (and TIES' density) chosen on the tuning half, TIES reaches {_percent(value)}, task arithmetic "
        f"{_percent(arithmetic)}, averaging {_percent(average)}: TIES is {_compared(value, arithmetic)} task "
        f"arithmetic and {_compared(value, average)} averaging. Untuned, at λ = 1, TIES has {_percent(plain)} and "
        f"task arithmetic {_percent(sum_of_all)}: there TIES is {_compared(plain, sum_of_all)} it."
    )


def _drop_alone_table(results: Results) -> str:
    r = results["drop_alone"]
    rows = []
    for rescale, text in (("paper", "rescaled"), ("none", "not")):
        means = {task: [point[0] for point in points] for task, points in r[rescale].items()}
        rows += [[f"{task}, {text}", *values] for task, values in means.items()]
        rows.append([f"mean, {text}", *(_mean(column) for column in zip(*means.values(), strict=True))])
    return _table(["drop rate", *(f"{rate:g}" for rate in r["rates"])], rows)


def _judge_drop_alone(results: Results) -> tuple[str, str]:
    r = results["drop_alone"]
    with_, without = (
        [_mean(points[i][0] for points in r[rescale].values()) for i in range(len(r["rates"]))]
        for rescale in ("paper", "none")
    )
    kept = [rate for rate, a in zip(r["rates"], with_, strict=True) if with_[0] - a <= 2 * LEVEL]
    bare = [rate for rate, a in zip(r["rates"], without, strict=True) if without[0] - a <= 2 * LEVEL]
    at = list(r["rates"]).index(0.9)
    verdict = "shows to 0.99" if max(kept) >= 0.99 else f"shows up to a drop rate of {max(kept):g}"
    if max(kept) < 0.5:
        verdict = "does not show"
    base, last = _mean(r["base"].values()), r["rates"][-1]
    return verdict, (
        f"With the rescale, the mean stays within two points of the whole fine-tune's up to a drop rate of "
        f"{max(kept):g}; without it, up to {max(bare):g}. At 0.9 the rescale makes {_signed(with_[at] - without[at])} "
        f"points, at {last:g} {_signed(with_[-1] - without[-1])}. At {last:g} the rescaled model is at "
        f"{_percent(with_[-1])}, {_compared(with_[-1], base)} the base's {_percent(base)}."
    )


def _drop_before_table(results: Results) -> str:
    r = results["drop_before"]
    rows = [[_setting(name, r), *map(_range, points)] for name, points in r["methods"].items()]
    for name, lambdas in r["lambdas"].items():
        rows.append([f"{name}: λ", *(f"{value:g}" for value in lambdas)])
    return _table(["drop rate", *(f"{rate:g}" for rate in r["rates"])], rows)


def _setting(name: str, result: Results) -> str:
    if name not in result["settings"]:
        return name
    inside = ", ".join(f"{key} {str(value).lower()}" for key, value in result["settings"][name][1].items())
    return f"{name} ({inside})" if inside else name


def _judge_drop_before(results: Results) -> tuple[str, str]:
    r = results["drop_before"]
    texts, gains = [], []
    for name, points in r["methods"].items():
        i = max(range(1, len(points)), key=lambda i, points=points: points[i]["tune"])
        alone, (mean, least, _) = points[0]["report"][0], points[i]["report"]
        if mean - alone > LEVEL and least > alone:
            gains.append(mean - alone)
        at_most = points[-1]["report"][0] - alone
        texts.append(
            f"{name} {_signed(mean - alone)} at {r['rates'][i]:g}, {_signed(at_most)} at {r['rates'][-1]:g}"
        )
    verdict = "does not show"
    if gains:
        verdict = f"shows for {len(gains)} of {len(texts)} merges, by at most {_points(max(gains))}"
    return verdict, (
        f"Points gained over the same merge without a drop, at the rate that was best on the tuning half and at the "
        f"greatest: {'; '.join(texts)}."
    )


def _later_table(results: Results) -> str:
    methods = results["later"]["methods"]
    tasks = list(methods["task arithmetic"]["rows"][0]["tasks"])
    rows = []
    for name, row in methods.items():
        point = row["rows"][row["best"]]
        default = row["rows"][list(row["lambdas"]).index(1.0)]
        rows.append(
            [
                name,
                f"{row['lambdas'][row['best']]:g}",
                *point["tasks"].values(),
                point["report"],
                point["tune"],
                default["report"],
            ]
        )
    return _table(["method", "best λ", *tasks, "mean", "mean, tuning half", "mean at λ = 1"], rows)


def _judge_later(results: Results) -> tuple[str, str]:
    methods = results["later"]["methods"]
    best = {name: row["rows"][row["best"]]["report"] for name, row in methods.items()}
    plain = best.pop("task arithmetic")
    gains = {name: value - plain for name, value in best.items()}
    better = [name for name, gain in gains.items() if gain > LEVEL]
    verdict = "does not show"
    if better:
        most = max(gains.values())
        verdict = f"shows for {len(better)} of {len(gains)} methods, by at most {_points(most)}"
    listed = "; ".join(f"{name} {_signed(gain)}" for name, gain in gains.items())
    return verdict, (
        f"With λ chosen on the tuning half, task arithmetic reaches {_percent(plain)}. Points gained over it: {listed}."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str | float]]) -> str:
    """Return a Markdown table; numbers are fractions, shown in percent."""
    head = list(head)
    lines = [head, ["---"] * len(head)]
    lines += [[cell if isinstance(cell, str) else f"{100 * cell:.1f}" for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _wrapped(text: str) -> str:
    """Break lines at 120, but not inside `20 %` or `λ = 1`."""
    glued = re.sub(r"(?<=[=λ\d]) (?=[%=\d])", "\0", text)
    return textwrap.fill(glued, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _range(point: Mapping[str, Any]) -> str:
    mean, least, most = (f"{100 * value:.1f}" for value in point["report"])
    return mean if least == most else f"{mean} ({least}–{most})"


def _compared(value: float, other: float) -> str:
    return "level with" if abs(value - other) <= LEVEL else "above" if value > other else "below"


CLAIMS = (
    Claim(
        "trim",
        "The top 20 % of a task vector keep the accuracy",
        "Each fine-tune alone, trimmed per tensor to its largest magnitudes: `ties` of one model, `density` swept.",
        _trim_table,
        _judge_trim,
    ),
    Claim(
        "interference",
        "Interference grows with the number of models",
        "All sets of n fine-tunes, the mean over the sets, each scored on its own tasks. “Influential” is the top "
        "20 % of a task vector, per tensor. Mean and sum of the task vectors, of all of each vector, of the trimmed "
        "vectors, and of the trimmed vectors after the election of signs: neighbours differ in one step. TIES "
        "divides by the number of models that agree (λ = 1).",
        _interference_tables,
        _judge_interference,
    ),
    Claim(
        "fisher",
        "Fisher merging beats isotropic averaging",
        "All fine-tunes merged. The diagonals are exact (the square of every single example's gradient, "
        "for every label, "
        "weighted by its probability) over 1000 training images or 256 training texts per task, imported with "
        "`streammerge fisher import` and read from Zarr stores.",
        _fisher_table,
        _judge_fisher,
    ),
    Claim(
        "scaled",
        "TIES beats task arithmetic and averaging",
        "All fine-tunes merged; λ is the one that was best on the tuning half, the figures are of the report half.",
        _scaled_table,
        _judge_scaled,
    ),
    Claim(
        "drop_alone",
        "A fine-tune survives the drop of most of its task vector, if rescaled",
        "Each fine-tune alone: `dare_linear` of one model, λ = 1, `rescale: paper` against `none`.",
        _drop_alone_table,
        _judge_drop_alone,
    ),
    Claim(
        "drop_before",
        "DARE before a merge improves it",
        "All fine-tunes merged; before each method a drop with rescale (`drop_rate`). λ is the best of claim 4, the "
        "Fisher variant the best of claim 3, both chosen without a drop; “λ anew”: λ chosen for each rate. "
        "Mean of three seeds (least–greatest).",
        _drop_before_table,
        _judge_drop_before,
    ),
    Claim(
        "later",
        "Later methods beat task arithmetic",
        "All fine-tunes merged by methods published since: votes (consensus, EMR, PCB) and methods of whole matrices. λ is chosen "
        "on the tuning half for each. SVC and Subspace Boosting correct the sum of the task vectors.",
        _later_table,
        _judge_later,
    ),
)
