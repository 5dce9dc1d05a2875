"""Look at the prepared prompts before training on them: languages, lengths, samples, a picture.

  python inspect_data.py --preset tiny                   # after prepare_data.py --preset tiny
  python inspect_data.py --language es --samples 10
  python inspect_data.py --search python

Samples are shown exactly as the model will see them: special and white-space characters made visible, tokens counted.
"""

from collections import Counter, defaultdict
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = ("model", "model_revision", "data_dir")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--language", metavar="CODE", help="only prompts in this language")
    parser.add_argument("--samples", metavar="N", default="5", help="prompts shown in full (default: 5)")
    parser.add_argument("--search", metavar="WORD", help="only prompts that contain this text")
    config, arguments = cli.parse(parser)
    if not arguments.samples.isdecimal():
        raise cli.UserError(f"--samples is {arguments.samples!r}, but it takes a whole number, 0 or more.")
    setup.prepare(config["model"])

    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst, store
    from phi2_grpo.models import embedded
    from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer, render

    console = Console()
    embedded.prepare(config["model"], oasst.sample_dialogues)
    tokenizer = load_tokenizer(config)
    prompts, funnel, notes = store.load_prompts(config, tokenizer)
    for note in notes:
        console.print(f"note: {note}", style="yellow")
    console.print(
        f"{config['data_dir']}: prepared from {funnel['settings']['dataset']} for the tokenizer of {funnel['model']}, at most "
        f"{funnel['settings']['max_prompt_tokens']} tokens a prompt",
    )

    rows = [{**row, "split": split} for split, table in prompts.items() for row in table]
    known = sorted({row["lang"] for row in rows})
    if arguments.language is not None and arguments.language not in known:
        raise cli.UserError(f"--language: no prompt is in {arguments.language!r}. There are: {', '.join(known)}.")
    rows = [row for row in rows if arguments.language in (None, row["lang"])]
    if arguments.search:
        word = arguments.search.casefold()
        rows = [row for row in rows if any(word in turn["content"].casefold() for turn in row["prompt"])]
    if not rows:
        raise cli.UserError(f"--search: no prompt contains {arguments.search!r}.")

    texts = render(tokenizer, [row["prompt"] for row in rows])
    lengths = count_tokens(tokenizer, [row["prompt"] for row in rows])
    show_tables(console, rows, lengths)
    show_samples(console, rows, texts, lengths, int(arguments.samples))
    picture = Path(config["data_dir"]) / "inspect.png"
    try:
        draw(rows, lengths, picture)
    except OSError as error:  # data that is shared may be looked at without the right to write there
        console.print(f"No picture: cannot write {picture}: {error.strerror}", style="yellow")
    else:
        console.print(f"Picture: {picture}")


def show_tables(console, rows: list[dict], lengths: list[int]) -> None:
    """Per language: how many, how long, how many with a human reply."""
    import numpy

    from phi2_grpo.common.console import make_table

    by_language = defaultdict(list)
    for row, length in zip(rows, lengths, strict=True):
        by_language[row["lang"]].append((row, length))
    columns = ("language", "train", "validation", "median", "95 %", "longest", "with a reply")
    table = make_table("Prompts (lengths in tokens, chat template included)", *columns)
    groups = sorted(by_language.items(), key=lambda item: -len(item[1]))
    if len(groups) > 1:
        groups.append(("all", list(zip(rows, lengths, strict=True))))
    for language, members in groups:
        splits = Counter(row["split"] for row, _ in members)
        median, high, longest = numpy.percentile([length for _, length in members], [50, 95, 100])
        replied = sum(row["reference"] is not None for row, _ in members) / len(members)
        cells = [splits["train"], splits["validation"], round(median), round(high), round(longest), f"{replied:.0%}"]
        table.add_row(language, *map(str, cells), style="bold" if language == "all" else None)
    console.print(table)


def visible(text: str) -> str:
    """White space and control characters made visible; a line break stays one."""
    shown = {"\n": "⏎\n", "\t": "⇥", "\u00a0": "⍽", "\r": "␍"}
    return "".join(shown.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def show_samples(console, rows: list[dict], texts: list[str], lengths: list[int], count: int) -> None:
    """`count` prompts, evenly spread over the data."""
    from rich.panel import Panel
    from rich.text import Text

    for i in range(0, len(rows), max(1, len(rows) // max(count, 1)))[:count]:
        row = rows[i]
        body = Text(visible(texts[i]))
        if row["reference"]:
            body.append(f"\n\nbest human reply: {visible(row['reference'])}", style="dim")
        title = Text(f"{row['split']}  {row['lang']}  {lengths[i]} tokens  {row['message_id']}")
        console.print(Panel(body, title=title, title_align="left"))


def draw(rows: list[dict], lengths: list[int], path: Path) -> None:
    """Histogram of token lengths, and prompts per language."""
    from phi2_grpo.common.console import BLUE, ORANGE, make_figure, save_figure

    figure, (left, right) = make_figure(1, 2, 11, 4)
    width = 1 + (max(lengths) - min(lengths)) // 40  # whole tokens, or the bars would have gaps
    left.hist(lengths, bins=range(min(lengths), max(lengths) + width + 1, width), color=BLUE)
    left.set(xlabel="prompt length (tokens, chat template included)", ylabel="prompts", title=f"{len(rows):,} prompts")
    counts = {split: Counter(row["lang"] for row in rows if row["split"] == split) for split in ("train", "validation")}
    languages = [language for language, _ in Counter(row["lang"] for row in rows).most_common(20)]
    train = [counts["train"][language] for language in languages]
    right.bar(languages, train, label="train", color=BLUE)
    held_out = [counts["validation"][language] for language in languages]
    right.bar(languages, held_out, bottom=train, label="validation", color=ORANGE)
    right.set(ylabel="prompts", title="languages" + (" (the 20 most frequent)" if len(languages) == 20 else ""))
    right.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
