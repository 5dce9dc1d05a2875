"""Is the adapter better than its base? Sample answers side by side, then numbers on held-out prompts.

  python validate_model.py                                      # results/phi2-grpo-final on data/
  python validate_model.py --preset tiny
  python validate_model.py --adapter DIR --prompt "Why is the sky blue?"

Base answers come from the same model with the adapter off, drawn with the same seed. The sample prompts are answered as a
chat (the adapter's generation_config.json); the numbers are measured at the training temperature.
"""

from contextlib import nullcontext
from pathlib import Path

from phi2_grpo import cli, environment, files

KEYS = ("model", "model_revision", "device", "dtype", "data_dir", "adapter", "max_completion_length", "temperature", "top_p",
        "top_k", "rewards", "target_tokens", "max_prompts", "samples_per_prompt", "eval_batch_size", "seed",
        "validation_dir")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="show answers to this instead; may be repeated")
    config, arguments = cli.parse(parser)
    if any(not prompt.strip() for prompt in arguments.prompt or []):
        raise cli.UserError("--prompt is empty. Give it a question.")
    if arguments.rewards is None:  # those it was trained with
        trained_with = files.read_json(Path(config["adapter"]) / "run.json").get("config", {})
        config["rewards"] = trained_with.get("rewards") or config["rewards"]
    environment.prepare(config["model"], *cli.reward_models(config["rewards"]))

    from rich.console import Console

    from phi2_grpo import chat, data, model, scoring
    from phi2_grpo.loading import load_tokenizer

    console = Console()
    console.print(f"validate_model: {cli.differences(config, KEYS)}", highlight=False)
    model.check_adapter(config["adapter"])
    files.check_writable(Path(config["validation_dir"]))
    device, dtype = model.choose_device(config)
    tokenizer = load_tokenizer(config)
    prompts, _, _ = data.load_prompts(config, tokenizer)
    if not len(prompts["validation"]):
        raise cli.UserError(f"{config['data_dir']} has no validation prompt. Prepare it with a larger --validation_fraction.")
    scorer = scoring.Scorer(tokenizer, config["target_tokens"], scoring.choose_rewards(config["rewards"]))
    with console.status("loading the model"):
        base = model.load_base(config, device, dtype)
        for judge in scorer.models:
            judge.load(config, base, device, dtype)
        policy = model.load_adapter(base, config["adapter"])

    samples = show_samples(console, policy, tokenizer, config, arguments.prompt or chat.SAMPLE_PROMPTS)
    measured = measure(console, policy, tokenizer, scorer, config, prompts["validation"])
    show_measured(console, measured)
    files.write_json(Path(config["validation_dir"]) / "report.json", {"config": config, "samples": samples, **measured})
    console.print(f"Report: {Path(config['validation_dir']) / 'report.json'}", highlight=False)


def both(policy):
    """("base", adapter off) and ("tuned", adapter on)."""
    return (("base", policy.disable_adapter), ("tuned", nullcontext))


def show_samples(console, policy, tokenizer, config: dict, questions: list[str]) -> list[dict]:
    """The questions answered by base and tuned, side by side, trimmed, with length and why each ended."""
    from rich.table import Table
    from rich.text import Text
    from transformers import GenerationConfig

    from phi2_grpo.answers import trim
    from phi2_grpo.chat import render
    from phi2_grpo.rollout import complete

    generation = GenerationConfig.from_pretrained(config["adapter"])
    texts = render(tokenizer, [[{"role": "user", "content": question}] for question in questions])
    answers = {}
    for name, switch in both(policy):
        with switch(), console.status(f"{name} answers"):
            ids = complete(policy, tokenizer, texts, generation, config["eval_batch_size"], config["seed"])
            answers[name] = trim(ids, tokenizer)
    samples = []
    for i, question in enumerate(questions):
        table = Table("base", "tuned", title=Text(question), title_justify="left", expand=True, show_lines=True)
        pair = [answers["base"][i], answers["tuned"][i]]
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(*(Text(answer.text) for answer in pair))
        table.add_row(*(Text(f"{answer.tokens} tokens, {answer.why}", style="dim") for answer in pair))
        console.print(table)
        shown = [{"answer": answer.text, "tokens": answer.tokens, "why": answer.why} for answer in pair]
        samples.append({"prompt": question, "base": shown[0], "tuned": shown[1]})
    return samples


def measure(console, policy, tokenizer, scorer, config: dict, held_out) -> dict:
    """Mean rewards, answer length and ended share of base and tuned on the held-out prompts, and the paired differences."""
    from transformers import GenerationConfig

    from phi2_grpo.chat import render
    from phi2_grpo.progress import counting
    from phi2_grpo.rollout import complete

    rows = held_out.shuffle(seed=config["seed"]).select(range(min(config["max_prompts"], len(held_out)))).to_list()
    repeated = [row for row in rows for _ in range(config["samples_per_prompt"])]
    columns = {key: [row[key] for row in repeated] for key in repeated[0] if key != "prompt"}
    conversations = [row["prompt"] for row in repeated]
    generation = GenerationConfig(
        do_sample=True,
        **{key: config[key] for key in ("temperature", "top_p", "top_k")},
        max_new_tokens=config["max_completion_length"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    per_prompt: dict[str, dict] = {}
    with counting(console, "held-out prompts", 2 * len(repeated)) as advance:
        for name, switch in both(policy):
            with switch():
                texts, batch, seed = render(tokenizer, conversations), config["eval_batch_size"], config["seed"]
                ids = complete(policy, tokenizer, texts, generation, batch, seed, advance)
            scores = scorer.score(conversations, ids, columns)
            answers = [row["answer"] for row in scorer.last]
            found = {"reward": scores}
            if len(scorer.chosen) > 1:
                found |= {reward.name: [row["scores"][reward.name] for row in scorer.last] for reward in scorer.chosen}
            found |= {"answer tokens": [a.tokens for a in answers], "ended": [float(a.ended) for a in answers]}
            per_prompt[name] = {key: _mean_per_prompt(values, config["samples_per_prompt"]) for key, values in found.items()}
    metrics = {metric: compare(per_prompt["base"][metric], per_prompt["tuned"][metric]) for metric in per_prompt["base"]}
    return {
        "prompts": len(rows),
        "samples_per_prompt": config["samples_per_prompt"],
        "rewards": config["rewards"],
        "metrics": {metric: found for metric, found in metrics.items() if found},
    }


def _mean_per_prompt(values: list[float | None], samples: int) -> list[float | None]:
    """Samples of one prompt stand next to each other. None for a prompt that a reward does not score."""
    groups = [values[i : i + samples] for i in range(0, len(values), samples)]
    return [None if None in group else sum(group) / samples for group in groups]


def compare(base: list[float | None], tuned: list[float | None]) -> dict[str, float] | None:
    """Means, and the mean paired difference with the half-width of its 95 % interval (1.96 standard errors over prompts).

    Over the prompts that both have; None where there is none.
    """
    import numpy

    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None]
    if not pairs:
        return None
    base, tuned = zip(*pairs, strict=True)
    difference = numpy.subtract(tuned, base)
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    means = {"base": numpy.mean(base), "tuned": numpy.mean(tuned), "difference": difference.mean(), "half_width": 1.96 * error}
    return {name: round(float(value), 4) if numpy.isfinite(value) else None for name, value in means.items()}


def show_measured(console, measured: dict) -> None:
    """The held-out numbers as a table, and what they say."""
    from rich.table import Table

    title = f"{measured['prompts']} held-out prompts x {measured['samples_per_prompt']}, at the training temperature"
    table = Table("mean of", "base", "tuned", "difference, 95 % interval", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for metric, found in measured["metrics"].items():
        places = 1 if metric == "answer tokens" else 3
        interval = "?" if found["half_width"] is None else f"{found['half_width']:.{places}f}"
        cells = [f"{found[side]:.{places}f}" for side in ("base", "tuned")]
        table.add_row(metric, *cells, f"{found['difference']:+.{places}f} ± {interval}")
    console.print(table)
    reward = measured["metrics"]["reward"]
    if reward["half_width"] is None or abs(reward["difference"]) <= reward["half_width"]:
        verdict = "No difference shown: the interval of the reward's difference holds 0."
    else:
        word = "better" if reward["difference"] > 0 else "worse"
        verdict = f"By its reward, tuned is {word} than base on prompts that it has not seen."
    console.print(verdict, style="bold")


if __name__ == "__main__":
    cli.run(main)
