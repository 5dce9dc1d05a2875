"""Tokens that a GRPO update computes: TRL's padded rows, and ours, packed (training/packing.py).

  python benchmarks/padding.py --data data/tiny --model tiny

By counting, without a model: prompts are drawn from the prepared ones, answers have the lengths of human replies, cut at the
limit. Batches are those of the preset; TRL shuffles the rows of a step before it splits them.
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
    import torch
    from datasets import load_from_disk

    from benchmarks import models
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.models.base import meta_model
    from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer
    from phi2_grpo.training.packing import pack
    from phi2_grpo.training.trainer import pass_tokens

    config = models.setting(arguments.model)
    tokenizer = load_tokenizer({**config, "model": arguments.tokenizer or config["model"]})
    most = 2 * models.PHI2["hidden_size"] if arguments.model == "full" else pass_tokens(meta_model(config))
    table = load_from_disk(str(Path(arguments.data) / "oasst1_prompts"))["train"]
    limit, group, rows = config["max_completion_length"], config["num_generations"], config["per_device_train_batch_size"]
    prompts = count_tokens(tokenizer, table["prompt"])
    replies = [len(tokenizer(text)["input_ids"]) + 1 for text in table["reference"] if text]
    draw, real = random.Random(0), 0
    computed = {f"{part}, {whose}": 0 for part in ("update", "reference") for whose in ("TRL", "packed")}
    for _ in range(STEPS):
        drawn = draw.choices(range(len(prompts)), k=rows * config["gradient_accumulation_steps"] // group)
        batch = [(prompt, min(limit, draw.choice(replies))) for prompt in drawn for _ in range(group)]
        real += sum(prompts[prompt] + answer for prompt, answer in batch)
        left, right = max(prompts[prompt] for prompt, _ in batch), max(answer for _, answer in batch)
        for part in ("reference", "update"):  # the reference's rows stand in order
            for start in range(0, len(batch), rows):
                micro = batch[start : start + rows]
                ids, mask = torch.zeros(2, len(micro), left + right, dtype=torch.long)
                for row, (prompt, answer) in enumerate(micro):
                    ids[row, left - prompts[prompt] : left] = prompt
                    mask[row, left - prompts[prompt] : left + answer] = 1
                computed[f"{part}, TRL"] += ids.numel()
                computed[f"{part}, packed"] += sum(each.input_ids.numel() for each in pack(ids, mask, right, most))
            draw.shuffle(batch)
    body = "\n".join(markdown_table(("pass", "tokens a step", "of the rows' tokens"), [
        (name, f"{count / STEPS:,.0f}", f"{count / real:.2f}") for name, count in computed.items()
    ]))  # fmt: skip
    middle = sorted(prompts)[len(prompts) // 2]
    body += (
        f"\n\n{STEPS} steps of {rows} x {config['gradient_accumulation_steps']} completions of {limit} tokens at most, {group} "
        f"a prompt, over {len(prompts):,} prompts (median {middle} tokens); tokens in a step's rows: {real / STEPS:,.0f}."
    )
    command = " ".join(["python benchmarks/padding.py", *sys.argv[1:]])
    write_section(f"Tokens computed, {Path(arguments.model).name}", command, body, "trl")


if __name__ == "__main__":
    main()
