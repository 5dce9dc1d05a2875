"""Turn OpenAssistant messages into GRPO prompts and preference pairs on disk.

  python prepare_data.py                                    # oasst1 from the Hub -> data/
  python prepare_data.py --languages en,es --max_turns 2    # two languages, follow-up questions too
  python prepare_data.py --dataset messages.jsonl.gz        # a local copy
  python prepare_data.py --preset tiny                      # the sample in tiny/ -> data/tiny

What you should see on the full data set (88,838 messages in ready trees): 84,437 train rows with 9,846 roots, 4,401
validation rows; 9,780 of the train roots have distinct texts, the median root is 26 Phi-2 tokens long, 95 in 100 are
under 125.
"""

from collections import Counter
from pathlib import Path

from phi2_grpo import cli, environment

KEYS = ("model", "model_revision", "dataset", "dataset_revision", "data_dir", "languages", "max_prompt_tokens", "max_turns",
        "max_toxicity", "validation_fraction", "split_seed")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--overwrite", action="store_true", help="replace data prepared earlier")
    config, arguments = cli.parse(parser)

    environment.prepare(config["model"], config["dataset"])

    from rich.console import Console

    from phi2_grpo import files, oasst

    console = Console()
    console.print(f"prepare_data: {cli.differences(config, KEYS)}", highlight=False)
    data_dir = Path(config["data_dir"])
    files.check_writable(data_dir)
    if (data_dir / "oasst1_prompts").exists() and not arguments.overwrite:
        raise cli.UserError(f"{data_dir} holds prepared data. Replace it: --overwrite, or choose another --data_dir.")

    from phi2_grpo import data
    from phi2_grpo.chat import count_tokens
    from phi2_grpo.loading import load_tokenizer

    tokenizer = load_tokenizer(config)
    with console.status("reading messages"):
        splits = oasst.read_messages(config["dataset"], config["dataset_revision"], config["max_toxicity"] < 1)
        if "" in splits:
            splits = oasst.split_by_tree(splits[""], config["validation_fraction"], config["split_seed"])
        splits = {split: list(messages) for split, messages in splits.items()}
    found = Counter(message.lang for messages in splits.values() for message in messages)
    if not found:
        raise cli.UserError(f"--dataset {config['dataset']} holds no messages.")
    languages = oasst.check_languages(config["languages"], found)

    rows, funnels, taken = {data.PROMPTS: {}, data.PREFERENCES: {}}, {}, set()
    for split in ("validation", "train"):  # validation first: what stands there leaves train
        prompts, pairs, funnels[split] = oasst.choose_prompts(
            splits[split],
            lambda conversations: count_tokens(tokenizer, conversations),
            languages,
            config["max_prompt_tokens"],
            config["max_turns"],
            config["max_toxicity"],
            taken,
        )
        rows[data.PROMPTS][split], rows[data.PREFERENCES][split] = prompts, pairs
    if not rows[data.PROMPTS]["train"]:
        raise cli.UserError(f"no train prompt is left: {oasst.blame(funnels['train'])}.")

    prepared = data.write_prepared(
        data_dir,
        {name: {split: parts[split] for split in ("train", "validation")} for name, parts in rows.items()},
        {
            "settings": {key: config[key] for key in KEYS},
            "model": config["model"],
            "tokenizer": data.tokenizer_fingerprint(tokenizer),
            "funnel": {split: funnels[split] for split in ("train", "validation")},
        },
    )
    show(console, funnels, rows, prepared, data_dir)


def show(console, funnels: dict, rows: dict, prepared, data_dir: Path) -> None:
    """The funnel and the languages, as tables."""
    from rich.table import Table

    funnel = Table("step", "train", "validation", title="What was kept", title_justify="left")
    funnel.columns[1].justify = funnel.columns[2].justify = "right"
    for step in funnels["train"]:
        style = "bold" if step == "kept" else None
        funnel.add_row(step, f"{funnels['train'][step]:,}", f"{funnels['validation'][step]:,}", style=style)
    console.print(funnel)

    counts = {split: Counter(table["lang"]) for split, table in prepared.items()}
    languages = Table("language", "train", "validation", title="Prompts by language", title_justify="left")
    languages.columns[1].justify = languages.columns[2].justify = "right"
    for language, _ in sum(counts.values(), Counter()).most_common():
        languages.add_row(language, f"{counts['train'][language]:,}", f"{counts['validation'][language]:,}")
    console.print(languages)

    pairs = {split: len(part) for split, part in rows["oasst1_preferences"].items()}
    with_reference = sum(row["reference"] is not None for row in rows["oasst1_prompts"]["train"])
    console.print(
        f"{len(prepared['train']):,} train prompts ({with_reference:,} with a human reply) and "
        f"{len(prepared['validation']):,} validation prompts -> {data_dir / 'oasst1_prompts'}\n"
        f"{pairs['train']:,} and {pairs['validation']:,} ranked pairs of replies -> {data_dir / 'oasst1_preferences'}",
        highlight=False,
    )
    if not len(prepared["validation"]):
        console.print("No validation prompt: validate_model.py will have nothing to measure.", style="yellow")


if __name__ == "__main__":
    cli.run(main)
