"""Turn OpenAssistant's message trees, or prompts of your own, into GRPO prompts and ranked preference pairs on disk.

  python prepare_data.py                                    # oasst1 from the Hub -> data/
  python prepare_data.py --languages en,es --max_turns 2    # two languages, follow-up questions too
  python prepare_data.py --dataset prompts.csv --data_dir data/own    # prompts of your own (docs/data.md)
  python prepare_data.py --preset tiny                      # the sample in sample/ -> data/tiny

What you should see on the full data set (88,838 messages in ready trees): 84,437 train rows with 9,846 roots, 4,401
validation rows; 9,780 of the train roots have distinct texts. In inspect_data.py's tables the median root is 26 Phi-2
tokens long, and 95 in 100 are under 125.
"""

import gc
from collections import Counter
from pathlib import Path

from config import CONFIG
from phi2_grpo.common import cli, setup

KEYS = cli.PREPARE_KEYS
OASST_KEYS = ("max_turns", "max_toxicity")  # limits on oasst1's messages; prompts of one's own keep all of their turns
OWN_KEYS = ("prompt_column", "reference_column", "system_prompt")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--overwrite", action="store_true", help="replace data prepared earlier")
    config, arguments = cli.parse(parser)
    setup.prepare(config["model"], config["dataset"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import prompts, store

    console = Console()
    console.print(f"prepare_data: {cli.differences(config, KEYS)}")
    data_dir = Path(config["data_dir"])
    files.check_writable(data_dir)
    if store.exists(data_dir, prompts.name_of(config["dataset"])) and not arguments.overwrite:
        raise cli.UserError(f"{data_dir} holds prepared data. Replace it: --overwrite, or choose another --data_dir.")
    with files.lock_folder(data_dir):
        prepare(config, console)


def prepare(config: dict, console) -> None:
    gc.set_threshold(1_000_000)  # by default 100,000 rows are walked again and again, in search of cycles that they lack
    from phi2_grpo.data import oasst, prompts, sources, store
    from phi2_grpo.models import embedded
    from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer

    splits, commit = sources.read_rows(config["dataset"], config["dataset_revision"], config["dataset_config"])
    first, splits = prompts.peek(splits)
    if not first:
        raise cli.UserError(f"--dataset {config['dataset']} holds no rows.")
    form = None if oasst.is_message(first[0]) else prompts.find_form(first, config["prompt_column"], config["reference_column"])
    if form:
        console.print(f"Columns: {form}")
    if unused := [f"--{key}" for key in (OASST_KEYS if form else OWN_KEYS) if config[key] != CONFIG[key]]:
        console.print(f"Not used: {' and '.join(unused)}, for this source is {'not ' * bool(form)}oasst1's.", style="yellow")
    kind = prompts if form else oasst
    with console.status("reading rows"):
        if form:
            items = prompts.read(splits, form, config["system_prompt"])
        else:
            items = {split: oasst.parse_messages(rows, f"{config['dataset']} {split}") for split, rows in splits.items()}
    if "" in items:  # the source has no validation split
        trees = prompts.same_prompts(items[""]) if form else [message.message_tree_id for message in items[""]]
        items = prompts.split(items[""], config["validation_fraction"], config["split_seed"], trees)
    if form and config["languages"] != "all":
        with console.status("guessing languages"):
            prompts.guess_languages(items)
    known = {row["lang"] if form else row.lang for rows in items.values() for row in rows if row}
    languages = prompts.wanted_languages(config["languages"], known)
    embedded.prepare(config["model"], oasst.sample_dialogues)
    tokenizer = load_tokenizer(config)

    def counter(conversations: list[list[dict]]) -> list[int]:
        advice = "Some take no system message: leave out --system_prompt, or those rows."
        with cli.load_errors(f"the chat template of {config['model']} refuses a prompt", advice):
            return count_tokens(tokenizer, conversations)

    limits = {key: config[key] for key in ("max_prompt_tokens", *(() if form else OASST_KEYS))}
    rows, pairs, funnel, held_out = {}, {}, {"train": {}}, set()
    for split in ("validation", "train"):  # validation first: what stands there leaves train
        with console.status(f"choosing {split} prompts"):
            filtered, steps = kind.filter_prompts(items.get(split, []), counter, languages, **limits)
            rows[split], pairs[split], distinct = prompts.deduplicate(filtered, held_out)
        funnel[split] = {**steps, "distinct": len(distinct), "kept": len(rows[split])}
        held_out = distinct
    if not rows["train"]:
        steps = ", ".join(f"{step}: {count}" for step, count in funnel["train"].items())
        remedy = "Loosen the limit that took the last one; docs/data.md says what a question is."
        raise cli.UserError(f"no train prompt is left ({steps}). {remedy}")

    facts = {
        "name": prompts.name_of(config["dataset"]) if form else "oasst1",
        "dataset_commit": commit,
        "settings": {key: config[key] for key in KEYS},
        "model": config["model"],
        "tokenizer": store.tokenizer_fingerprint(tokenizer),
        "funnel": funnel,
    }
    store.save(Path(config["data_dir"]), rows, pairs, facts)
    show(console, Path(config["data_dir"]), funnel, rows, pairs)


def show(console, data_dir: Path, funnel: dict, prompts: dict, pairs: dict) -> None:
    """The funnel and the languages as tables, and what lies where."""
    from phi2_grpo.common.console import make_table
    from phi2_grpo.common.stats import FEW
    from phi2_grpo.data import store

    languages = {split: Counter(row["lang"] for row in rows) for split, rows in prompts.items()}
    order = [language for language, _ in sum((languages["train"], languages["validation"]), Counter()).most_common()]
    tables = [("left after", funnel["train"], funnel), ("language", order, languages)]
    for title, rows, counts in tables[: 2 if len(order) > 1 else 1]:
        cells = ([row, f"{counts['train'][row]:,}", f"{counts['validation'][row]:,}"] for row in rows)
        console.print(make_table("", title, "train", "validation", rows=cells))
    references = sum(row["reference"] is not None for row in prompts["train"])
    folders = {kind: store.folder(data_dir, kind) for kind in (store.PROMPTS, store.PREFERENCES)}
    train, validation = len(prompts["train"]), len(prompts["validation"])
    text = f"{train:,} train prompts ({references:,} with a reference) and {validation:,} validation prompts"
    console.print(f"{text} -> {folders[store.PROMPTS]}", soft_wrap=True)
    if any(pairs.values()):
        text = f"{len(pairs['train']):,} and {len(pairs['validation']):,} ranked pairs of replies"
        console.print(f"{text} -> {folders[store.PREFERENCES]}", soft_wrap=True)
    if not references:
        text = "No prompt has a reference, which the rewards correct and reference need: --reference_column COLUMN takes one."
        console.print(text, style="yellow")
    if validation < FEW:
        text = f"Only {validation} validation prompts: validate_model.py shows little on fewer than {FEW}."
        console.print(f"{text} Hold out more, before the training: a larger --validation_fraction.", style="yellow")


if __name__ == "__main__":
    cli.run(main)
