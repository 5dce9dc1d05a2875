"""Look at the prepared prompts before training on them: languages, lengths, samples, a picture.

  python inspect_data.py --preset tiny                   # after prepare_data.py --preset tiny
  python inspect_data.py --language es --samples 10
  python inspect_data.py --search python

Samples are shown exactly as the model will see them: special and white-space characters made visible, tokens counted.
"""

from collections import Counter
from pathlib import Path

from phi2_grpo.common import cli, files, setup

KEYS = ("model", "model_revision", "data_dir")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS, dict.fromkeys(KEYS[:2], "the data's"))
    parser.add_argument("--language", metavar="CODE", help="only prompts in this language")
    parser.add_argument("--samples", metavar="N", default="5", help="prompts shown in full (default: 5)")
    parser.add_argument("--search", metavar="WORD", default="", help="only prompts that contain this text")
    config, arguments = cli.parse(parser)
    if not arguments.samples.isdecimal():
        raise cli.UserError(f"--samples is {arguments.samples!r}, but it takes a whole number, 0 or more.")
    if arguments.model is None:  # the one that the data was prepared for
        prepared = files.read_json(Path(config["data_dir"]) / "funnel.json").get("settings", {})
        config |= {key: prepared[key] for key in ("model", "model_revision") if key in prepared}
    setup.prepare(config["model"])
    inspect(config, arguments.language, arguments.search, int(arguments.samples))


def inspect(config: dict, language: str | None, search: str, samples: int) -> None:
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst, store
    from phi2_grpo.models import embedded
    from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer, render

    console = Console()
    store.find(config)  # before a tokenizer is looked for
    embedded.prepare(config["model"], oasst.sample_dialogues)
    tokenizer = load_tokenizer(config)
    prompts, funnel = store.load_prompts(config, tokenizer)
    source, limit = funnel["settings"]["dataset"], funnel["settings"]["max_prompt_tokens"]
    console.print(f"{config['data_dir']}: prepared from {source} for {funnel['model']}, at most {limit} tokens a prompt")

    rows = [{**row, "split": split} for split, table in prompts.items() for row in table]
    languages = ", ".join(sorted({row["lang"] for row in rows}))
    rows = [row for row in rows if language in (None, row["lang"])]
    rows = [row for row in rows if any(search.casefold() in turn["content"].casefold() for turn in row["prompt"])]
    if not rows:
        raise cli.UserError(f"no prompt is left by --language {language!r} and --search {search!r}. Languages: {languages}.")
    conversations = [row["prompt"] for row in rows]
    for row, text, tokens in zip(rows, render(tokenizer, conversations), count_tokens(tokenizer, conversations), strict=True):
        row |= {"text": text, "tokens": tokens}
    show_languages(console, rows, language or "all")
    show_samples(console, rows, samples)
    picture = Path(config["data_dir"]) / ("inspect-selected.png" if language or search else "inspect.png")
    try:
        draw(rows, picture)
        console.print(f"Picture: {picture}")
    except OSError as error:  # data that is shared may be looked at without the right to write there
        console.print(f"No picture: cannot write {picture}: {error.strerror}", style="yellow")


def show_languages(console, rows: list[dict], name: str) -> None:
    """Per language: how many, how long, how many with a human reply; and of all of them, called `name`."""
    import numpy

    from phi2_grpo.common.console import make_table

    columns = ("language", "train", "validation", "median", "95th percentile", "longest", "with a reference")
    cells = []
    languages = [language for language, _ in Counter(row["lang"] for row in rows).most_common()]
    for language in [*(languages if len(languages) > 1 else []), name]:
        members = [row for row in rows if language in (name, row["lang"])]
        splits = Counter(row["split"] for row in members)
        lengths = numpy.percentile([row["tokens"] for row in members], [50, 95, 100])
        replied = sum(row["reference"] is not None for row in members) / len(members)
        numbers = map(str, (splits["train"], splits["validation"], *map(round, lengths)))
        cells.append([language, *numbers, f"{replied:.0%}"])
    console.print(make_table("Prompts (lengths in tokens, chat template included)", *columns, rows=cells))


def visible(text: str) -> str:
    """White space and control characters made visible; a line break stays one."""
    shown = {"\n": "⏎\n", "\t": "⇥", "\u00a0": "⍽", "\r": "␍"}
    return "".join(shown.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def show_samples(console, rows: list[dict], count: int) -> None:
    """`count` prompts, evenly spread over the data."""
    from rich.panel import Panel
    from rich.text import Text

    from phi2_grpo.data.prompts import UNKNOWN

    for row in rows[:: max(1, len(rows) // max(count, 1))][:count]:
        body = Text(visible(row["text"]))
        if row["reference"]:
            body.append(f"\n\nreference: {visible(row['reference'])}", style="dim")
        language = [row["lang"]] * (row["lang"] != UNKNOWN)
        title = Text("  ".join([row["split"], *language, f"{row['tokens']} tokens", row["message_id"]]))
        console.print(Panel(body, title=title, title_align="left"))


def draw(rows: list[dict], path: Path) -> None:
    """Histogram of token lengths, and prompts per language where there are several."""
    from phi2_grpo.common.console import BLUE, make_figure

    languages = Counter(row["lang"] for row in rows).most_common(20)
    figure, (left, *right) = make_figure(1, min(2, len(languages)), 11, 4)
    lengths = [row["tokens"] for row in rows]
    width = 1 + (max(lengths) - min(lengths)) // 40  # whole tokens, or the bars would have gaps
    left.hist(lengths, bins=range(min(lengths), max(lengths) + width + 1, width), color=BLUE)
    left.set(xlabel="prompt length (tokens, chat template included)", ylabel="prompts")
    for each in right:
        each.bar(*zip(*languages, strict=True), color=BLUE)
        each.set(ylabel="prompts", title="the most frequent languages")
    figure.savefig(path)


if __name__ == "__main__":
    cli.run(main)
