"""What a validation says: one line to quote, tables, pictures, and the answers behind them."""

import random
import re
from pathlib import Path

import numpy
from rich.text import Text

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError
from phi2_grpo.common.console import BLUE, GREY, ORANGE, make_figure, make_table, markdown_table, plot_interval, save_figure
from phi2_grpo.common.stats import FEW, interval, paired, simultaneous, verdict
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.collapse import COLLAPSE, SINCE_START

COLORS = {"base": GREY, "tuned": BLUE}


# What is neither a reward nor good or bad by itself; of the rest more is better, but for the surprise.
DIRECTION = {"answer tokens": None, "KL from base": None, "reply surprise": False}


EXPLAINED = {
    "total reward": "all rewards of the training, by their weights",
    "distinct-2": "share of word pairs in the answers to one prompt that are different",
    "answer tokens": "of the trimmed answer",
    "KL from base": "nats per token of its own answers: how far it has moved",
    "reply surprise": "nats per token of the best human replies, the mean over prompts: did it forget?",
}


def summarize(
    samples: list[dict], prompts: list[dict], costs: dict[str, dict[str, list]], scorer, names: tuple[str, str]
) -> dict:
    """The numbers of a report.

    Args:
        samples: one dict a completion, `side` (base or tuned), `prompt` (an index into `prompts`), `answer` and `scores`.
        prompts: rows of the data set.
        costs: metric -> side -> a value a prompt, or None where it has none.
        scorer: made of the training's rewards first, and of the others (weight 0).
        names: what the sides are called.
    """
    trained = [reward.name for reward in scorer.chosen if reward.weight]
    others = [reward.name for reward in scorer.chosen if not reward.weight]
    grouped = {side: [[] for _ in prompts] for side in ("base", "tuned")}
    for sample in samples:
        grouped[sample["side"]][sample["prompt"]].append(sample)

    def of(side: str, value) -> list[float | None]:
        return [_mean([value(sample) for sample in group]) for group in grouped[side]]

    values = {name: {side: of(side, lambda s, n=name: s["scores"].get(n)) for side in grouped} for name in trained + others}
    if len(trained) > 1:
        values = {"total reward": {side: of(side, lambda s: s["score"]) for side in grouped}, **values}
    values["answer tokens"] = {side: of(side, lambda s: s["answer"].tokens) for side in grouped}
    values["distinct-2"] = {side: [_distinct(group) for group in grouped[side]] for side in grouped}
    values |= costs
    # A reward of negative weight is paid for less of it.
    direction = {**DIRECTION, **{reward.name: reward.weight >= 0 for reward in scorer.chosen}}
    usable = [name for name, sides in values.items() if paired(sides["base"], sides["tuned"])]
    headline = "total reward" if "total reward" in usable else next((name for name in trained if name in usable), None)
    by_language = {
        code: [i for i, row in enumerate(prompts) if row["lang"] == code] for code in {row["lang"] for row in prompts}
    }
    judged = {code: [[values[headline][side][i] for i in here] for side in grouped]
              for code, here in sorted(by_language.items())} if headline else {}  # fmt: skip
    judged = {code: sides for code, sides in judged.items() if (found := paired(*sides)) and found.prompts >= FEW}
    # The headline is one question. The other rows are many, and one of them would often seem to differ by chance.
    level = simultaneous(len(usable) - 1 + len(judged))
    metrics = {}
    for name in usable:
        found = paired(values[name]["base"], values[name]["tuned"], 0.95 if name == headline else level)
        metrics[name] = {**found.to_json(), "verdict": verdict(found, direction.get(name, True)), "trained": name in trained}
    languages = {}
    for code, sides in judged.items():
        found = paired(*sides, level)
        languages[code] = {**found.to_json(), "verdict": verdict(found, direction.get(headline, True))}
    signs_of = {side: collapse.measure([s["answer"] for s in samples if s["side"] == side],
                                 [prompts[s["prompt"]]["lang"] for s in samples if s["side"] == side],
                                 scorer.target_tokens) for side in grouped}  # fmt: skip
    alarms = {}
    for sign, value in signs_of["tuned"].items():
        (low, high, meaning), before = COLLAPSE[f"collapse/{sign}"], signs_of["base"].get(sign)
        relative = f"collapse/{sign}" in SINCE_START
        if relative and before is None:
            continue
        judged = value - before if relative else value
        if not low <= judged <= high and (relative or before is None or low <= before <= high):
            alarms[sign] = f"{sign} is {value:.2f}, base {format_number(before)}: {meaning.partition(':')[0]}"
    found = {
        "names": list(names),
        "prompts": len(prompts),
        "headline": headline,
        "reversed": direction.get(headline) is False,
        "metrics": metrics,
        "languages": languages,
        "level": level,  # of every row but the headline
        "signs": signs_of,
        "alarms": alarms,
        "missing": [name for name in values if name not in metrics],
    }
    return {"line": summary_line(found), **found, "values": values}


def _mean(values: list) -> float | None:
    return None if None in values or not values else sum(values) / len(values)


def _distinct(group: list[dict]) -> float | None:
    bigrams = [pair for sample in group for pair in collapse.ngrams(sample["answer"].ids, 2)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def format_number(value: float | None, places: int = 2, sign: str = "") -> str:
    return "?" if value is None else f"{round(value, places) + 0.0:{sign}.{places}f}"  # + 0.0: no -0.00


def summary_line(found: dict) -> str:
    """One line that a person can quote; its words are fixed by the intervals and the alarms."""
    base, tuned = found["names"]
    tuned = tuned[:1].upper() + tuned[1:]
    main = found["metrics"].get(found["headline"])
    if main is None:
        return "No reward could be computed on these prompts."
    verb = {"better": "beats", "worse": "is worse than"}.get(main["verdict"], "shows no difference from")
    weak = " (few: weak)" if main["prompts"] < FEW else ""
    text = (
        f"{tuned} {verb} {base} on {found['headline']}: {main['tuned']:.2f} against {main['base']:.2f}, "
        f"{main['difference']:+.2f} "
        f"[{format_number(main['low'])}, {format_number(main['high'])}], {main['prompts']} prompts{weak}"
    )
    rest = {name: m for name, m in found["metrics"].items() if name not in (*DIRECTION, found["headline"])}
    parts = []
    for word in ("better", "worse"):
        if names := [name for name, m in rest.items() if m["verdict"] == word]:
            parts.append(f"{', '.join(names)} {word}")
    if names := [name for name, m in rest.items() if m["verdict"] == "no difference shown"]:
        parts.append(f"no difference shown in {', '.join(names)}")
    if kl := found["metrics"].get("KL from base"):
        parts.append(f"KL {kl['tuned']:.2f}")
    surprise = found["metrics"].get("reply surprise")
    if surprise and surprise["verdict"] != "no difference shown":
        parts.append(f"surprise at human replies {surprise['difference']:+.2f} nats per token")
    text = "; ".join([text, *parts]) + "."
    if found["alarms"] and main["verdict"] == "better":
        text += " Gamed? " + "; ".join(found["alarms"].values()) + "."
    return text


def metric_rows(found: dict, most_places: int = 3) -> list[list[str]]:
    """metric (* if trained), base, tuned, difference with its interval, win rate, verdict; for terminal and Markdown."""
    rows = []
    for name, m in found["metrics"].items():
        small = m["low"] is not None and max(abs(m["low"]), abs(m["high"])) < 0.1  # [-0.01, -0.00] would say nothing
        places = min(1 if name == "answer tokens" else 3, 3 if small else most_places)
        rows.append([name + (" *" if m["trained"] else ""), *_compared(m, places), f"{m['win_rate']:.0%}", m["verdict"]])
    return rows


def metric_table(found: dict) -> list[str]:
    """The lines of that table in Markdown."""
    return markdown_table(("mean of", *found["names"], "difference, interval", "wins", "verdict"), metric_rows(found))


def levels(found: dict) -> str:
    """What the intervals of the tables are, in one sentence."""
    rows = len(found["metrics"]) - 1 + len(found["languages"])
    others = f"; the other {rows} rows together at 95 %, so each at {100 * found['level']:.2f} %" if rows > 0 else ""
    return f"Intervals, by sign flips over prompts: {found['headline']} at 95 %{others}."


def language_rows(found: dict) -> list[list[str]]:
    """language, prompts, base, tuned, difference with its interval, verdict, of the headline's metric."""
    return [[code, str(m["prompts"]), *_compared(m, 3), m["verdict"]] for code, m in found["languages"].items()]


def _compared(m: dict, places: int) -> list[str]:
    """base, tuned, difference [low, high]."""
    low, high, difference = (format_number(m[key], places, "+") for key in ("low", "high", "difference"))
    return [format_number(m["base"], places), format_number(m["tuned"], places), f"{difference} [{low}, {high}]"]


def remarks(found: dict) -> list[str]:
    """What is to be said beside the tables."""
    said = [levels(found)]
    base, tuned = (found.get("perplexity", {}).get(side) for side in ("base", "tuned"))
    if base is not None:
        names = found["names"]
        said.append(f"Perplexity of the best human replies: {base:,.4g} to {names[0]}, {tuned:,.4g} to {names[1]}.")
    if found["missing"]:
        said.append(f"Left out, for they could not be computed on these prompts: {', '.join(found['missing'])}.")
    if found["prompts"] < FEW:
        said.append(f"Fewer than {FEW} prompts: the intervals are weak.")
    return said


def show(console, found: dict, samples_per_prompt: int) -> None:
    """The numbers for the terminal."""
    names = found["names"]
    title = f"{found['prompts']} held-out prompts x {samples_per_prompt}, at the training temperature"
    table = make_table(title, "mean of", *names, "difference", "wins", "", words=(0, 5))
    styles = {"better": "green", "worse": "red"}
    for row in metric_rows(found, most_places=2):
        table.add_row(*map(Text, row[:-1]), row[-1].replace("no difference shown", "-"), style=styles.get(row[-1]))
    table.caption, table.caption_justify = "* paid for in the training; -: no difference shown", "left"
    console.print(table)
    if found["languages"]:
        columns = ("language", "prompts", *names, "difference, interval", "")
        languages = make_table(found["headline"], *columns, words=(0, 5))
        for row in language_rows(found):
            languages.add_row(*map(Text, row))
        console.print(languages)
    for remark in remarks(found):
        console.print(remark)
    console.print(Text(found["line"], style="bold"))


def draw(found: dict, samples: list[dict], path: Path) -> None:
    """Paired differences, answer lengths, win rates by metric, and differences by language."""
    base_name, tuned_name = found["names"]
    headline = found["headline"]
    figure, (differences, lengths, wins, languages) = make_figure(2, 2, 11, 8)
    if m := found["metrics"].get(headline):
        differences.hist([t - b for b, t in _pairs(found, headline)], bins=20, color=BLUE, alpha=0.7)
        if m["low"] is not None:
            differences.axvspan(m["low"], m["high"], color=ORANGE, alpha=0.4, label="mean, 95 % interval")
            differences.legend(frameon=False)
        differences.axvline(m["difference"], color=ORANGE)
        differences.axvline(0, color="grey", linestyle="--", linewidth=1)
    differences.set(title=f"{headline}: {tuned_name} less {base_name}", xlabel="difference on a prompt", ylabel="prompts")
    tokens = {side: [s["answer"].tokens for s in samples if s["side"] == side] for side in COLORS}
    edges = numpy.linspace(0, max(map(max, tokens.values())) + 1, 31)
    for side, name in zip(COLORS, found["names"], strict=True):
        lengths.hist(tokens[side], edges, color=COLORS[side], alpha=0.6, label=name)
    lengths.legend(frameon=False)
    lengths.set(title="Answer lengths", xlabel="tokens", ylabel="answers")
    rated = [name for name in found["metrics"] if name not in DIRECTION][::-1]
    for i, name in enumerate(rated):
        won = [(t > b) + 0.5 * (t == b) for b, t in _pairs(found, name)]
        plot_interval(wins, i, found["metrics"][name]["win_rate"], interval(won), BLUE)
    wins.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    wins.set_yticks(range(len(rated)), rated)
    wins.set(title=f"Share of prompts that {tuned_name} wins (ties half)", xlim=(0, 1), ylim=(-0.6, len(rated) - 0.4))
    shown = list(found["languages"].items())[::-1]
    for i, (_, m) in enumerate(shown):
        plot_interval(languages, i, m["difference"], (m["low"], m["high"]), BLUE)
    if shown:
        languages.axvline(0, color="grey", linestyle="--", linewidth=1)
        languages.set_yticks(range(len(shown)), [f"{code} ({m['prompts']})" for code, m in shown])
        languages.set(
            title=f"{headline}: difference by language, {found['level']:.1%} intervals", ylim=(-0.6, len(shown) - 0.4)
        )
    else:
        languages.text(0.5, 0.5, f"no language has {FEW} prompts", ha="center", transform=languages.transAxes)
        languages.set_axis_off()
    save_figure(figure, path)


def _pairs(found: dict, metric: str | None) -> list[tuple[float, float]]:
    """(base, tuned) of the prompts that have both."""
    sides = found["values"].get(metric) or {"base": [], "tuned": []}
    return [pair for pair in zip(sides["base"], sides["tuned"], strict=True) if None not in pair]


def markdown(found: dict, samples: list[dict], prompts: list[dict], shown: list[dict], facts: list[str], seed: int) -> str:
    """The whole report, complete by itself."""
    lines = ["# Validation", "", f"**{found['line']}**", "", *(f"- {fact}" for fact in facts), "", *metric_table(found)]
    lines += ["", "\\*: paid for in the training. Wins: share of prompts on which "
                  "the second has more, ties half.", ""]  # fmt: skip
    lines += [f"- *{name}*: {text}" for name, text in EXPLAINED.items() if name in found["metrics"]]
    for remark in remarks(found):
        lines += ["", remark]
    if found["languages"]:
        columns = ("language", "prompts", *found["names"], "difference, interval", "verdict")
        lines += ["", f"## {found['headline'].capitalize()} by language", "", *markdown_table(columns, language_rows(found))]
    lines += ["", "![paired differences, lengths, win rates, languages](validation.png)", ""]
    lines += ["## Sample prompts, as a chat", ""]
    for sample in shown:
        lines += [f"**{one_line(sample['prompt'])}**", ""]
        for side, name in zip(COLORS, found["names"], strict=True):
            answer = sample[side]
            lines += [f"*{name}* ({answer['tokens']} tokens, {answer['why']})", "", fenced(answer["answer"]), ""]
    main = found["values"].get(found["headline"]) or {"base": [], "tuned": []}
    both = enumerate(zip(main["base"], main["tuned"], strict=True))
    sign = -1 if found["reversed"] else 1
    gains = {i: sign * (tuned - base) for i, (base, tuned) in both if None not in (base, tuned)}
    order = sorted(gains, key=gains.get)
    chosen = {
        "Most improved": [i for i in order[::-1] if gains[i] > 0][:5],
        "Most harmed": [i for i in order if gains[i] < 0][:5],
        "At random": random.Random(seed).sample(order, min(5, len(order))),
    }
    for title, picks in chosen.items():
        lines += [f"## {title}", ""] + ([] if picks else ["None.", ""])
        for i in picks:
            row = prompts[i]
            lines += [f"**{one_line(row['prompt'][-1]['content'])}** ({row['lang']}, {sign * gains[i]:+.2f})", ""]
            for side, name in zip(COLORS, found["names"], strict=True):
                first = next(s for s in samples if s["side"] == side and s["prompt"] == i)
                scores = ", ".join(f"{key} {value:.2f}" for key, value in first["scores"].items() if value is not None)
                answer = first["answer"]
                lines += [f"*{name}* ({answer.tokens} tokens, {answer.finish_reason}; {scores})", "", fenced(answer.text), ""]
    return "\n".join(lines)


def write(folder: Path, found: dict, samples: list[dict], prompts: list[dict], shown: list[dict], facts: list[str],
          config: dict) -> None:  # fmt: skip
    """report.json, report.md, validation.png and samples.jsonl (every completion with its scores)."""
    draw(found, samples, folder / "validation.png")
    files.write_text(folder / "report.md", markdown(found, samples, prompts, shown, facts, config["seed"]))
    lines = []
    for sample in samples:
        row, answer = prompts[sample["prompt"]], sample["answer"]
        lines.append({"side": sample["side"], "message_id": row["message_id"], "lang": row["lang"], "prompt": row["prompt"],
                      "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended, "why": answer.finish_reason,
                      "scores": sample["scores"], "completion_ids": sample["completion_ids"]})  # fmt: skip
    files.write_rows(folder / "samples.jsonl", lines)
    numbers = {key: value for key, value in found.items() if key != "values"}
    files.write_json(folder / "report.json", {**numbers, "facts": facts, "config": config, "samples": shown})


def check_replaceable(folder: Path) -> None:
    """Raise UserError where a report would take the place of files that are no report."""
    there = [name for name in ("report.md", "report.json", "validation.png", "samples.jsonl") if (folder / name).exists()]
    unfinished = (folder / "unfinished" / "journal.jsonl").exists()  # it may have been killed while it moved the files in
    if there and not unfinished and "headline" not in files.read_json(folder / "report.json"):
        raise UserError(f"{folder} has a {there[0]} that is no validation's, and would be replaced. Choose another folder.")


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*")


def fenced(text: str) -> str:
    """A code block that no text can leave."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
