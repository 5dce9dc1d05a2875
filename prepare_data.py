"""Turn OpenAssistant messages into GRPO prompts and preference pairs on disk.

  python prepare_data.py                                    # oasst1 from the Hub -> data/
  python prepare_data.py --languages en,es --max_turns 2    # two languages, follow-up questions too
  python prepare_data.py --dataset messages.jsonl.gz        # a local copy
  python prepare_data.py --preset tiny                      # the sample in tiny/ -> data/tiny

What you should see on the full data set (88,838 messages in ready trees): 84,437 train rows with 9,846 roots, 4,401
validation rows; 9,780 of the train roots have distinct texts, the median root is 26 Phi-2 tokens long, 95 in 100 are
under 125.
"""

import multiprocessing
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = cli.PREPARE_KEYS


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--overwrite", action="store_true", help="replace data prepared earlier")
    config, arguments = cli.parse(parser)

    setup.prepare(config["model"], config["dataset"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst, sources, store

    console = Console()
    console.print(f"prepare_data: {cli.differences(config, KEYS)}")
    data_dir = Path(config["data_dir"])
    files.check_writable(data_dir)
    if store.exists(data_dir) and not arguments.overwrite:
        raise cli.UserError(f"{data_dir} holds prepared data. Replace it: --overwrite, or choose another --data_dir.")

    from phi2_grpo.models import embedded
    from phi2_grpo.models.tokenizer import load_tokenizer

    with console.status("looking at the messages"):
        source, commit = sources.read_messages(config["dataset"], config["dataset_revision"], config["max_toxicity"] < 1)
    embedded.prepare(config["model"], oasst.sample_dialogues)
    tokenizer = load_tokenizer(config)
    with files.lock_folder(data_dir), scratch_in(data_dir) as scratch:
        with console.status("reading messages"):
            chunks = {split: sources.Chunks(scratch / (split or "all"), messages) for split, messages in source.items()}
        found = sum((part.languages for part in chunks.values()), Counter())
        if not found:
            raise cli.UserError(f"--dataset {config['dataset']} holds no messages.")
        languages = oasst.check_languages(config["languages"], found)
        trees = None  # to be held out, where the source has no validation split
        if "" in chunks:
            trees = oasst.validation_trees(chunks[""].numbers, config["validation_fraction"], config["split_seed"])

        prepared, funnels, taken = store.Prepared(scratch), {}, set()
        for split in ("validation", "train"):  # validation first: what stands there leaves train
            part = chunks.get("", chunks.get(split))  # one part for both, or one each, or none
            paths = part.paths if part else []
            funnel, seen, kept = Counter(oasst.filter_prompts([], lambda _: [], *limits(config, languages))[1]), set(), 0
            for rows, counts in each(config, [(path, trees, split == "validation", languages) for path in paths], tokenizer):
                prompts, pairs = oasst.deduplicate(rows, seen, taken)
                prepared.add(store.PROMPTS, split, prompts)
                prepared.add(store.PREFERENCES, split, pairs)
                kept += len(prompts)
                for step, count in counts.items():
                    funnel[step] += count
            funnels[split] = {**funnel, "distinct": len(seen), "kept": kept}
            taken |= seen
        if not funnels["train"]["kept"]:
            raise cli.UserError(f"no train prompt is left: {oasst.explain_empty(funnels['train'])}.")
        prompts = prepared.finish(
            data_dir,
            {
                "dataset_commit": commit,
                "settings": {key: config[key] for key in KEYS},
                "model": config["model"],
                "tokenizer": store.tokenizer_fingerprint(tokenizer),
                "funnel": {split: funnels[split] for split in ("train", "validation")},
            },
        )
    show(console, funnels, prompts, data_dir)


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder for what is on its way, gone afterwards; and `folder` too, if nothing was put there."""
    scratch = folder / ".preparing"
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run's
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()


def limits(config: dict, languages: set[str] | None) -> tuple:
    """What `oasst.candidates` takes after messages and counter."""
    return languages, config["max_prompt_tokens"], config["max_turns"], config["max_toxicity"]


def choose(config: dict, tokenizer, path: Path, trees: set[str] | None, inside: bool, languages: set[str] | None) -> tuple:
    """The candidates of one chunk, as `oasst.candidates` returns them."""
    from phi2_grpo.data import oasst, sources
    from phi2_grpo.models.tokenizer import count_tokens

    messages = sources.read_chunk(path, trees, inside)
    return oasst.filter_prompts(messages, lambda talks: count_tokens(tokenizer, talks), *limits(config, languages))


def each(config: dict, chunks: list[tuple], tokenizer) -> Iterator[tuple]:
    """`choose` for every chunk, in order; with --num_proc by so many processes."""
    if config["num_proc"] == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield choose(config, tokenizer, *chunk)
        return
    context = multiprocessing.get_context("spawn")  # a fork would carry over the tokenizer's threads, but not run them
    with ProcessPoolExecutor(config["num_proc"], context, _start, (config,)) as workers:
        waiting = [workers.submit(_choose, chunk) for chunk in chunks]
        try:
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool:
            raise cli.UserError(
                "a process of --num_proc was ended from outside, most likely for lack of memory. Give a smaller --num_proc."
            ) from None
        except BaseException:  # a Ctrl-C too: what they have begun is of no use
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


_worker: dict = {}


def _start(config: dict) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches all of them; the first process ends the others
    from phi2_grpo.models.tokenizer import load_tokenizer

    setup.prepare(config["model"])
    _worker.update(config=config, tokenizer=load_tokenizer(config))


def _choose(chunk: tuple) -> tuple:
    return choose(_worker["config"], _worker["tokenizer"], *chunk)


def show(console, funnels: dict, prepared, data_dir: Path) -> None:
    """The funnel and the languages, as tables."""
    from datasets import load_from_disk

    from phi2_grpo.common.console import make_table

    funnel = make_table("What was kept", "step", "train", "validation")
    for step in funnels["train"]:
        style = "bold" if step == "kept" else None
        funnel.add_row(step, f"{funnels['train'][step]:,}", f"{funnels['validation'][step]:,}", style=style)
    console.print(funnel)

    counts = {split: Counter(table["lang"]) for split, table in prepared.items()}
    languages = make_table("Prompts by language", "language", "train", "validation")
    for language, _ in sum(counts.values(), Counter()).most_common():
        languages.add_row(language, f"{counts['train'][language]:,}", f"{counts['validation'][language]:,}")
    console.print(languages)

    pairs = {split: len(table) for split, table in load_from_disk(str(data_dir / "oasst1_preferences")).items()}
    with_reference = len(prepared["train"]) - prepared["train"].data.column("reference").null_count
    console.print(
        f"{len(prepared['train']):,} train prompts ({with_reference:,} with a human reply) and "
        f"{len(prepared['validation']):,} validation prompts -> {data_dir / 'oasst1_prompts'}\n"
        f"{pairs['train']:,} and {pairs['validation']:,} ranked pairs of replies -> {data_dir / 'oasst1_preferences'}",
        soft_wrap=True,
    )
    if not len(prepared["validation"]):
        console.print("No validation prompt: validate_model.py will have nothing to measure.", style="yellow")


if __name__ == "__main__":
    cli.run(main)
