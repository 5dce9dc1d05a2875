"""The evaluation report: one line that sums it up, tables, and the answers behind them."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from phi2_grpo.common import files
from phi2_grpo.common.console import make_table, markdown_table
from phi2_grpo.common.stats import FEW, mean, paired, simultaneous, verdict
from phi2_grpo.evaluation.accuracy import accuracy_rows, accuracy_sentence
from phi2_grpo.evaluation.plots import DIRECTION, draw, format_number
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.functions import BUILT_IN
from phi2_grpo.rewards.scorer import summary_of

SIDES = ("base", "tuned")
FILES = {"report.md", "report.json", "validation.png", "samples.jsonl"}  # the last has every completion with its scores
EXPLAINED = {
    "total reward": "all rewards of the training, by their weights",
    "distinct-2": "share of different token bigrams in the answers to one prompt; shorter answers have more",
    "answer tokens": "of the trimmed answer",
    "KL to base": "over the vocabulary at temperature 1, nats per token of its own completions: how far it has moved",
    "reference NLL": "negative log-likelihood of the best human replies, nats per token, mean over prompts: did it forget?",
}
METRIC_COLUMNS = ("difference, interval", "higher on", "verdict")
CAPTION = "*: reward of the training, or of --rewards; (n): only n prompts have it; higher on: prompts on which {} is higher"
STYLES = {"better": "green", "worse": "red"}  # of a row, by its verdict


def summarize(
    samples: list[dict], prompts: list[dict], costs: dict[str, dict[str, list]], scorer, names: tuple[str, str]
) -> dict:
    """The numbers of a report.

    `samples`: one dict a completion, with `side` (base or tuned), `prompt` (an index into `prompts`), `answer` and `scores`.
    `costs`: metric -> side -> a value a prompt, or None where it has none. `scorer`: of the training's rewards first, and of
    the others (weight 0). `names`: what the sides are called.
    """
    trained = [reward.name for reward in scorer.chosen if reward.weight]
    values = _values(samples, len(prompts), scorer, trained) | costs
    # A reward of negative weight is trained for less of it.
    direction = {**DIRECTION, **{reward.name: reward.weight >= 0 for reward in scorer.chosen}}
    if BUILT_IN["correct"] in scorer.weighted:  # right answers may be worded otherwise than a bare result
        direction |= {"reference NLL": None, "reference": None}
    if not scorer.has_target:  # nobody asked for that length
        direction["length"] = None
    usable = [name for name, sides in values.items() if paired(sides["base"], sides["tuned"])]
    headline = next((name for name in ("total reward", *trained) if name in usable), None)
    languages = {}
    for code in sorted({row["lang"] for row in prompts}) if headline else ():
        rows = [i for i, row in enumerate(prompts) if row["lang"] == code]
        languages[code] = [[values[headline][side][i] for i in rows] for side in SIDES]
    languages = {code: sides for code, sides in languages.items() if (pair := paired(*sides)) and pair.prompts >= FEW}
    languages = languages if len(languages) > 1 else {}  # one alone would say the headline again
    # The headline is one question. The other rows are many, and one of them would often seem to differ by chance.
    level = simultaneous(len(usable) - bool(headline) + len(languages))

    def compare(sides, metric: str, level: float) -> dict:
        pair = paired(*sides, level)
        return {**pair.to_json(), "verdict": verdict(pair, direction.get(metric, True))}

    metrics = {
        name: compare([values[name][side] for side in SIDES], name, 0.95 if name == headline else level)
        | {"trained": name in trained}
        for name in usable
    }
    measured = {side: scorer.collapse_metrics([s["answer"] for s in samples if s["side"] == side],
                                              [prompts[s["prompt"]]["lang"] for s in samples if s["side"] == side])
                for side in SIDES}  # fmt: skip
    report = {
        "names": list(names),
        "prompts": len(prompts),
        "headline": headline,
        "reversed": direction.get(headline) is False,
        "metrics": metrics,
        "languages": {code: compare(sides, headline, level) for code, sides in languages.items()},
        "level": level,  # of every row but the headline
        "collapse": measured,
        "alerts": _alerts(**measured),
        "missing": [name for name in values if name not in metrics],
        "explained": {reward.name: summary_of(reward) for reward in scorer.chosen} | EXPLAINED,
    }
    return {"line": summary_line(report), **report, "values": values}


def _values(samples: list[dict], count: int, scorer, trained: list[str]) -> dict[str, dict[str, list]]:
    """Metric -> side -> the mean over a prompt's samples, or None where one has no value."""
    groups = {side: [[] for _ in range(count)] for side in SIDES}
    for sample in samples:
        groups[sample["side"]][sample["prompt"]].append(sample)

    def means(value) -> dict[str, list]:
        return {side: [mean([value(sample) for sample in group]) for group in groups[side]] for side in SIDES}

    names = trained + [reward.name for reward in scorer.chosen if not reward.weight]
    values = {"total reward": means(lambda s: s["score"])} if len(trained) > 1 else {}
    values |= {name: means(lambda s, name=name: s["scores"].get(name)) for name in names}
    values["answer tokens"] = means(lambda s: s["answer"].tokens)
    values["distinct-2"] = {side: [_distinct(group) for group in groups[side]] for side in SIDES}
    return values


def _distinct(group: list[dict]) -> float | None:
    bigrams = [pair for sample in group for pair in collapse.ngrams(sample["answer"].ids, 2)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def _alerts(base: dict[str, float], tuned: dict[str, float]) -> dict[str, str]:
    """The collapse metrics that left their range by the tuning: the base's are inside, or were not measured."""
    alerts = {}
    for name, value in tuned.items():
        (low, high, meaning), before = collapse.COLLAPSE[f"collapse/{name}"], base.get(name)
        if f"collapse/{name}" in collapse.SINCE_START:
            outside = before is not None and not low <= value - before <= high
        else:
            outside = not low <= value <= high and (before is None or low <= before <= high)
        if outside:
            alerts[name] = f"{name} is {value:.2f}, base {format_number(before)}: {meaning.partition(':')[0]}"
    return alerts


def summary_line(report: dict) -> str:
    """The report in one line; its words are fixed by the intervals and the alerts."""
    metrics, (base, tuned) = report["metrics"], report["names"]
    main = metrics.get(report["headline"])
    if main is None:
        return "No reward could be computed on these prompts."
    verb = {"better": "beats", "worse": "is worse than"}.get(main["verdict"], "shows no difference from")
    what = "the reward " * (report["headline"] != "total reward") + report["headline"]
    few = "" if main["prompts"] >= FEW else " (few: weak)" if main["low"] is not None else " (too few for an interval)"
    parts = [
        f"{tuned[:1].upper() + tuned[1:]} {verb} {base} on {what}: {main['tuned']:.2f} against "
        f"{main['base']:.2f}, {_difference(main, 2)}, {main['prompts']} prompts{few}"
    ]
    rest = {name: m["verdict"] for name, m in metrics.items() if name not in (*DIRECTION, report["headline"])}
    for outcome, text in (("better", "{} better"), ("worse", "{} worse"), ("no difference shown", "no difference shown in {}")):
        if those := [name for name, of_metric in rest.items() if of_metric == outcome]:
            parts.append(text.format(", ".join(those)))
    if "KL to base" in metrics:
        parts.append(f"KL {metrics['KL to base']['tuned']:.2f}")
    nll = metrics.get("reference NLL")
    if nll and nll["verdict"] != "no difference shown":
        parts.append(f"reference NLL {nll['difference']:+.2f} nats per token")
    gamed = f" Gamed? {'; '.join(report['alerts'].values())}." if report["alerts"] and main["verdict"] == "better" else ""
    return f"{'; '.join(parts)}.{gamed}"


def metric_rows(report: dict, most_places: int = 3, sign: str = "+") -> list[list[str]]:
    """metric (see CAPTION), base, tuned, difference with its interval, share of prompts with a higher value, verdict."""
    rows = []
    for name, m in report["metrics"].items():
        places = min(1 if name == "answer tokens" else 3, most_places)
        some = f" ({m['prompts']})" * (m["prompts"] < report["prompts"])
        higher = "all equal" if m["low"] == m["high"] == 0 else f"{m['win_rate']:.0%}"
        rows.append([name + " *" * m["trained"] + some, *_compared(m, places, sign), higher, m["verdict"]])
    return rows


def metric_table(report: dict) -> list[str]:
    return markdown_table(("mean of", *report["names"], *METRIC_COLUMNS), metric_rows(report))


def _compared(m: dict, places: int, sign: str = "+") -> list[str]:
    """base, tuned, difference [low, high]."""
    return [format_number(m["base"], places), format_number(m["tuned"], places), _difference(m, places, sign)]


def _difference(m: dict, places: int, sign: str = "") -> str:
    """The difference, and its interval where there is one: with as many places as show that it excludes 0."""
    if m["low"] is None:
        return format_number(m["difference"], places, "+")
    while m["low"] * m["high"] > 0 and not all(round(m[end], places) for end in ("low", "high")):  # of four, by `to_json`
        places += 1
    low, high = (format_number(m[end], places, sign) for end in ("low", "high"))
    return f"{format_number(m['difference'], places, '+')} [{low}, {high}]"


def more_tables(report: dict) -> Iterator[tuple[str, tuple[str, ...], list[list[str]], str]]:
    """Heading, columns, rows, and a sentence or "", of what the report has beside the metrics; for terminal and Markdown."""
    names = report["names"]
    if report["languages"]:
        columns = ("language", "prompts", *names, METRIC_COLUMNS[0], "verdict")
        rows = [[code, str(m["prompts"]), *_compared(m, 3), m["verdict"]] for code, m in report["languages"].items()]
        yield f"{report['headline'].capitalize()} by language", columns, rows, ""
    if accuracy := report.get("accuracy"):
        sentence = accuracy_sentence(accuracy, report["metrics"].get("correct", {}).get("verdict", ""))
        yield "Accuracy", ("accuracy", *names, "difference, 95 % interval"), accuracy_rows(accuracy), sentence


def levels(report: dict) -> str:
    """What the intervals of the tables are, in one sentence."""
    rows = len(report["metrics"]) - bool(report["headline"]) + len(report["languages"])
    others = f"the other {rows} rows together at 95 %, so each at {100 * report['level']:.2f} %" if rows > 0 else ""
    headline = f"{report['headline']} at 95 %" if report["headline"] else ""
    return f"Intervals, by sign flips over prompts: {'; '.join(filter(None, (headline, others)))}."


def remarks(report: dict) -> list[str]:
    """What stands beside the tables."""
    lines = [levels(report)] if any(m["low"] is not None for m in report["metrics"].values()) else []
    if report["missing"]:
        what = ", ".join(report["missing"])
        lines.append(f"Left out, for no prompt has what they take (a known language, a reference, a score): {what}.")
    return lines + [f"Fewer than {FEW} prompts show little. Too few have no interval."] * (report["prompts"] < FEW)


def show(console, report: dict, config: dict) -> None:
    title = f"{report['prompts']} held-out prompts x {config['samples_per_prompt']}, temperature {config['temperature']:g}"
    rows = metric_rows(report, most_places=2, sign="")  # to fit into 80 columns
    options = {"rows": [[*row[:-1], row[-1].replace("no difference shown", "-")] for row in rows],
               "row_styles": [STYLES.get(row[-1], "none") for row in rows], "caption_justify": "left",
               "caption": f"{CAPTION.format(report['names'][1])}; -: no difference shown"}  # fmt: skip
    console.print(make_table(title, "mean of", *report["names"], *METRIC_COLUMNS, words=(0, 5), **options))
    for heading, columns, cells, sentence in more_tables(report):
        console.print(make_table(heading, *columns, rows=cells, words=(0, 5)))
        if sentence:
            console.print(sentence)
    for line in remarks(report):
        console.print(line)
    console.print(Text(report["line"], style="bold"))


def markdown(report: dict, samples: list[dict], prompts: list[dict], shown: list[dict], facts: list[str], seed: int) -> str:
    """All of the report, complete by itself."""
    lines = ["# Evaluation", "", f"**{report['line']}**", "", *(f"- {fact}" for fact in facts), "", *metric_table(report)]
    lines += ["", f"\\{CAPTION.format(report['names'][1])}, ties half.", ""]
    lines += [f"- *{name}*: {text}" for name, text in report["explained"].items() if text and name in report["metrics"]]
    for line in remarks(report):
        lines += ["", line]
    for heading, columns, rows, sentence in more_tables(report):
        lines += ["", f"## {heading}", "", *markdown_table(columns, rows), *(["", sentence] if sentence else [])]
    lines += ["", "![all metrics with their intervals, and the answer lengths](validation.png)", ""]
    lines += ["## Sample prompts, as a chat", ""]
    for question in shown:
        lines += [f"**{_one_line(question['prompt'])}**", ""]
        for side, name in zip(SIDES, report["names"], strict=True):
            answer = question[side]
            lines += [f"*{name}* ({answer['tokens']} tokens, {answer['finish_reason']})", "", fenced(answer["answer"]), ""]
    for title, indices in _examples(report, seed).items():
        lines += [f"## {title}", ""] + ["None.", ""] * (not indices)
        for i in indices:
            lines += [f"**{_one_line(prompts[i]['prompt'][-1]['content'])}** ({prompts[i]['lang']})", ""]
            for side, name in zip(SIDES, report["names"], strict=True):
                first = next(s for s in samples if s["side"] == side and s["prompt"] == i)
                scores = ", ".join(f"{key} {value:.2f}" for key, value in first["scores"].items() if value is not None)
                answer = first["answer"]
                lines += [f"*{name}* ({answer.tokens} tokens, {answer.finish_reason}; {scores})", "", fenced(answer.text), ""]
    return "\n".join(lines)


def _examples(report: dict, seed: int) -> dict[str, list[int]]:
    """Prompts whose answers are shown: the most improved, the most harmed, and some at random."""
    if report["headline"] is None:
        return {}
    values = report["values"][report["headline"]]
    sign = -1 if report["reversed"] else 1
    gains = {i: sign * (tuned - base) for i, (base, tuned) in enumerate(zip(*values.values(), strict=True))
             if None not in (base, tuned)}  # fmt: skip
    order = sorted(gains, key=gains.get)
    return {
        f"Most improved, by {report['headline']}": [i for i in order[::-1] if gains[i] > 0][:5],
        f"Most harmed, by {report['headline']}": [i for i in order if gains[i] < 0][:5],
        "At random": random.Random(seed).sample(order, min(5, len(order))),
    }


def write(folder: Path, report: dict, samples: list[dict], prompts: list[dict], shown: list[dict], facts: list[str],
          config: dict) -> None:  # fmt: skip
    """FILES, in the place of an earlier report."""
    lines = []
    for sample in samples:
        row, answer = prompts[sample["prompt"]], sample["answer"]
        lines.append({"side": sample["side"], "message_id": row["message_id"], "lang": row["lang"], "prompt": row["prompt"],
                      "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended,
                      "finish_reason": answer.finish_reason, "scores": sample["scores"],
                      "completion_ids": sample["completion_ids"]})  # fmt: skip
    numbers = {key: value for key, value in report.items() if key != "values"}
    with files.atomic_folder(folder) as new:
        draw(report, samples, new / "validation.png")
        files.write_text(new / "report.md", markdown(report, samples, prompts, shown, facts, config["seed"]))
        files.write_rows(new / "samples.jsonl", lines)
        files.write_json(new / "report.json", {**numbers, "facts": facts, "config": config, "samples": shown})


def is_report(folder: Path) -> bool:
    """Whether `folder` holds a report and nothing else."""
    return {path.name for path in folder.iterdir()} <= FILES and "headline" in files.read_json(folder / "report.json")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*")


def fenced(text: str) -> str:
    """A code block that no text can leave."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
