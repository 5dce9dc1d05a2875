"""Is the adapter better than its base, by how much, for whom, and what did it cost?

  python validate_model.py                                      # results/phi2-grpo-final on data/
  python validate_model.py --preset tiny
  python validate_model.py --against OTHER_ADAPTER              # two adapters on one base
  python validate_model.py --prompt "Why is the sky blue?"      # other sample prompts

Base answers come from the same model with the adapter off. Everything is measured on held-out prompts, prompt by prompt, with
95 % intervals over prompts: the rewards of the training at its temperature, the other built-in rewards, what the tuning cost
(KL from the base, surprise at human replies). A killed validation goes on where it was.
"""

import shlex
from contextlib import contextmanager
from pathlib import Path

from phi2_grpo import cli, environment, files

KEYS = ("model", "model_revision", "device", "dtype", "data_dir", "adapter", "max_completion_length", "temperature", "top_p",
        "top_k", "rewards", "target_tokens", "max_prompts", "samples_per_prompt", "rollout", "rollout_batch_size", "seed",
        "validation_dir")  # fmt: skip
TRAINED_WITH = ("temperature", "top_p", "top_k", "max_completion_length", "target_tokens", "rewards")  # taken from run.json


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS, TRAINED_WITH)
    parser.add_argument(
        "--against", metavar="DIR", help="another adapter on the same base, to compare with instead of the base"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="show answers to this instead; may be repeated")
    parser.add_argument("--overwrite", action="store_true", help="start anew where another validation was not finished")
    config, arguments = cli.parse(parser)
    if any(not prompt.strip() for prompt in arguments.prompt or []):
        raise cli.UserError("--prompt is empty. Give it a question.")
    if cli.processes() > 1:
        raise cli.UserError(
            "validate_model.py runs in one process: start it with python, not with accelerate launch or torchrun."
        )
    trained = take_settings_of(Path(config["adapter"]), config, arguments)
    environment.prepare(config["model"], *cli.reward_models(config["rewards"]))
    with files.alone_in(Path(config["validation_dir"])):
        validate(config, arguments, trained)


def validate(config: dict, arguments, trained: dict) -> None:
    """Draw, measure, report. `trained` is the adapter's run.json."""
    from phi2_grpo import (
        cards,
        chat,
        checks,
        data,
        evaluation,
        journal,
        looks,
        model,
        plan,
        progress,
        proof,
        rollout,
        scoring,
        statistics,
    )
    from phi2_grpo.loading import load_tokenizer, use_base_of

    console = looks.Console()
    console.print(f"validate_model: {cli.differences(config, KEYS)}")
    folder = Path(config["validation_dir"])
    adapters = [Path(model.check_adapter(path)) for path in (config["adapter"], arguments.against) if path is not None]
    use_base_of(adapters[0], config)
    checks.same_base(adapters, None if arguments.model else config)
    files.check_writable(folder)
    proof.check_replaceable(folder)
    device, dtype = model.choose_device(config)
    tokenizer = load_tokenizer(config)
    tables, funnel, _ = data.load_prompts(config, tokenizer)
    if trained.get("data", {}).get("fingerprint", funnel["fingerprint"]) != funnel["fingerprint"]:
        text = (
            f"{config['adapter']} was trained on other data than {config['data_dir']}: it may have seen what is held out here."
        )
        console.print(text, style="yellow")
    if not len(tables["validation"]):
        raise cli.UserError(f"{config['data_dir']} has no validation prompt. Prepare it with a larger --validation_fraction.")
    prompts = evaluation.held_out_rows(tables["validation"], config["max_prompts"], config["seed"])
    scorer = scoring.Scorer(
        tokenizer, config["target_tokens"], scoring.with_all_built_in(scoring.choose_rewards(config["rewards"]))
    )
    drawing = ("temperature", "top_p", "top_k", "max_completion_length", "samples_per_prompt", "seed", "max_prompts")
    run = {
        "adapters": [files.digest(path / "adapter_model.safetensors") for path in adapters],
        "data": funnel["fingerprint"],
        "model": [config["model"], config["model_revision"], device.type, str(dtype)],
        **{key: config[key] for key in drawing},
    }
    scoring.try_rewards(scorer, tables["validation"].select(range(min(8, len(tables["validation"])))).to_list())
    empty = model.empty_base(config)
    checks.same_vocabulary(tokenizer, empty)
    drawn = journal.Journal(folder / "unfinished" / "journal.jsonl", run, arguments.overwrite)
    context = model.context_of(empty)
    generation = model.saved_generation_config(adapters[0], tokenizer, config, context)  # how to chat
    generation.max_new_tokens = min(generation.max_new_tokens or 256, context // 2)
    length = checks.fits_context([row["prompt"] for row in prompts], tokenizer, config, context)
    length += config["max_completion_length"]
    with console.status("loading the model"):
        base = model.load_base(config, device, dtype)
        for judge in scorer.models:
            judge.load(config, base, device, dtype)
        policy = model.load_adapter(base, config["adapter"])
        if arguments.against:
            model.load_adapter(policy, arguments.against, "against")
    sides = {"base": ("against" if arguments.against else None), "tuned": "default"}
    engine = rollout.make_engine(config["rollout"], policy, config["rollout_batch_size"], evaluation.held_bytes(policy))
    batch = config["rollout_batch_size"] or plan.rows_that_fit(policy, length, evaluation.held_bytes(policy))
    drawn.open(batch)
    names = ("base", "tuned")
    if arguments.against:
        same = adapters[0].name == adapters[1].name
        names = tuple(str(path) if same else path.name for path in (adapters[1], adapters[0]))

    @contextmanager
    def voice(side: str):
        """The policy speaking as `side`."""
        if sides[side] is None:
            with policy.disable_adapter():
                yield
        else:
            policy.set_adapter(sides[side])
            yield
            policy.set_adapter("default")

    shown = show_samples(
        console, engine, tokenizer, voice, names, generation, config["seed"], arguments.prompt or chat.SAMPLE_PROMPTS
    )
    texts = chat.render(tokenizer, [row["prompt"] for row in prompts for _ in range(config["samples_per_prompt"])])
    with progress.counting(console, "held-out prompts", 2 * len(texts)) as advance:
        for side in sides:
            with voice(side):
                evaluation.answer(engine, tokenizer, texts, config, side, drawn, advance)
    samples, costs, perplexity = [], {"KL from base": {}, "reply surprise": {}}, {}
    repeated = [row for row in prompts for _ in range(config["samples_per_prompt"])]
    with progress.counting(console, "what it cost", 2 * (len(repeated) + len(prompts))) as advance:
        for side in sides:
            ids = [drawn.found[side, i] for i in range(len(repeated))]
            for i, row in enumerate(scorer.score(repeated, ids)):
                samples.append({**row, "side": side, "prompt": i // config["samples_per_prompt"]})
            with voice(side):
                if sides[side] is None:
                    kl = [0.0] * len(repeated)
                else:
                    kl = evaluation.divergence(policy, policy.disable_adapter, tokenizer, repeated, ids, advance)
                costs["KL from base"][side] = evaluation.mean_per_prompt(kl, config["samples_per_prompt"])
                surprise = evaluation.surprise(policy, tokenizer, prompts, advance)
                costs["reply surprise"][side] = [value and value[0] / value[1] for value in surprise]
                perplexity[side] = evaluation.perplexity(surprise)
    found = {**proof.summarize(samples, prompts, costs, scorer, names), "perplexity": perplexity}
    proof.show(console, found, config["samples_per_prompt"])
    facts = [
        f"{config['adapter']} against {arguments.against or 'its base'}, {config['model']}",
        f"{len(prompts)} held-out prompts of {funnel['settings']['dataset']}, {config['samples_per_prompt']} samples each, "
        f"seed {config['seed']}, temperature {config['temperature']:g}, at most {config['max_completion_length']} tokens",
        f"rewards{' of the training' if trained and not arguments.rewards else ''}: {', '.join(config['rewards'])}; target "
        f"{config['target_tokens']} tokens",
    ]
    with drawn.finished_in(folder) as new:
        proof.write(new, found, samples, prompts, shown, facts, {**config, "against": arguments.against})
    as_trained = all(config[key] == trained.get("config", {}).get(key) for key in TRAINED_WITH)
    if not arguments.against and as_trained and len(prompts) >= statistics.FEW:
        cards.add_validation(adapters[0], found["line"], [*proof.metric_table(found), "", proof.levels(found)])
    else:
        console.print("The model card is left as it is: that takes the settings of the training, the base, and 20 prompts.")
    console.print(f"Report: {folder / 'report.md'}   picture: {folder / 'validation.png'}", soft_wrap=True)


def take_settings_of(adapter: Path, config: dict, arguments) -> dict:
    """What the adapter was trained with goes into `config`, where no flag says otherwise; returns its run.json.

    Raises UserError for rewards that are code, or models from elsewhere: they are not run unasked.
    """
    from phi2_grpo.rewards import not_run_unasked

    run = files.read_run(adapter)
    saved = run.get("config", {})
    try:
        for key in TRAINED_WITH:
            if getattr(arguments, key) is None and key in saved:
                text = ",".join(saved[key]) if isinstance(saved[key], list) else str(saved[key])
                config[key] = cli.parse_value(key, text)
    except (cli.UserError, TypeError) as error:
        raise cli.UserError(f"{adapter / 'run.json'} is not what a training wrote: {error}") from None
    if not arguments.rewards and (unasked := not_run_unasked(config["rewards"])):
        raise cli.UserError(
            f"{adapter} was trained with {', '.join(unasked)}, which is not on this machine, or is code, and that runs only "
            f"when you name it:\n  --rewards {shlex.quote(','.join(config['rewards']))}   (or other rewards)"
        )
    return run


def show_samples(
    console, engine, tokenizer, voice, names: tuple[str, str], generation, seed: int, questions: list[str]
) -> list[dict]:
    """The questions answered by both as a chat, as `generation` has it, side by side, trimmed."""
    from rich.text import Text

    from phi2_grpo import looks
    from phi2_grpo.answers import trim
    from phi2_grpo.chat import render
    from phi2_grpo.rollout import complete

    texts = render(tokenizer, [[{"role": "user", "content": question}] for question in questions])
    answers = {}
    for side, name in zip(("base", "tuned"), names, strict=True):
        with voice(side), console.status(Text(f"{name} answers")):
            ids = complete(engine, tokenizer, texts, generation, seed)
            answers[side] = trim(ids, tokenizer)
    samples = []
    for i, question in enumerate(questions):
        table = looks.table(Text(question), *names, words=(0, 1), expand=True, show_lines=True)
        pair = [answers["base"][i], answers["tuned"][i]]
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(*(Text(answer.text) for answer in pair))
        table.add_row(*(Text(f"{answer.tokens} tokens, {answer.why}", style="dim") for answer in pair))
        console.print(table)
        shown = [{"answer": answer.text, "tokens": answer.tokens, "why": answer.why} for answer in pair]
        samples.append({"prompt": question, "base": shown[0], "tuned": shown[1]})
    return samples


if __name__ == "__main__":
    cli.run(main)
