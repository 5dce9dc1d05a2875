"""Share of padding in what a GRPO update computes: TRL's, and in batches of similar lengths (training/trainer.py).

  python benchmarks/padding.py --data data/tiny --model tiny

By counting, without a model: prompts are drawn from the prepared ones, answers have the lengths of human replies, cut at the
limit. Batches are those of the preset.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="full|tiny|FOLDER", default="full")
    parser.add_argument("--data", metavar="DIR", required=True)
    parser.add_argument("--tokenizer", metavar="NAME", help="Hub id or folder (default: the model's)")
    arguments = parser.parse_args()
    from datasets import load_from_disk

    from benchmarks import models
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.models.tokenizer import batches_by_length, count_tokens, load_tokenizer
    from phi2_grpo.training.trainer import SIMILAR

    config = models.setting(arguments.model)
    tokenizer = load_tokenizer({**config, "model": arguments.tokenizer or config["model"]})
    table = load_from_disk(str(Path(arguments.data) / "oasst1_prompts"))["train"]
    limit, group, rows = config["max_completion_length"], config["num_generations"], config["per_device_train_batch_size"]
    prompts = count_tokens(tokenizer, table["prompt"])
    replies = [len(tokenizer(text)["input_ids"]) + 1 for text in table["reference"] if text]
    draw, real, computed = random.Random(0), 0, {"TRL": 0, "in batches of similar lengths": 0}
    for _ in range(STEPS):
        drawn = draw.choices(prompts, k=rows * config["gradient_accumulation_steps"] // group)
        batch = [(prompt, min(limit, draw.choice(replies))) for prompt in drawn for _ in range(group)]
        widest = max(prompt for prompt, _ in batch) + max(answer for _, answer in batch)
        draw.shuffle(batch)
        for start in range(0, len(batch), rows):
            lengths = [prompt + answer for prompt, answer in batch[start : start + rows]]
            real += sum(lengths)
            computed["TRL"] += widest * len(lengths)
            parts = batches_by_length(lengths, widest * len(lengths), SIMILAR)
            computed["in batches of similar lengths"] += sum(len(part) * lengths[part[-1]] for part in parts)
    body = "\n".join(markdown_table(("update", "tokens a step", "padding"), [
        (name, f"{count / STEPS:,.0f}", f"{1 - real / count:.1%}") for name, count in computed.items()
    ]))  # fmt: skip
    middle = sorted(prompts)[len(prompts) // 2]
    body += (
        f"\n\n{STEPS} steps of {rows} x {config['gradient_accumulation_steps']} completions of {limit} tokens at most, over "
        f"{len(prompts):,} prompts (median {middle} tokens); real tokens a step: {real / STEPS:,.0f}."
    )
    command = " ".join(["python benchmarks/padding.py", *sys.argv[1:]])
    write_section(f"Padding, {Path(arguments.model).name}", command, body, "trl")


if __name__ == "__main__":
    main()
