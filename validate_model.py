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

from phi2_grpo.common import cli, files, setup

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
    if cli.num_processes() > 1:
        raise cli.UserError(
            "validate_model.py runs in one process: start it with python, not with accelerate launch or torchrun."
        )
    trained = take_settings_of(Path(config["adapter"]), config, arguments)
    setup.prepare(config["model"], *config["rewards"])
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded

    embedded.prepare(config["model"], oasst.sample_dialogues)
    with files.lock_folder(Path(config["validation_dir"])):
        validate(config, arguments, trained)


def validate(config: dict, arguments, trained: dict) -> None:
    """Draw, measure, report. `trained` is the adapter's run.json."""
    from phi2_grpo.common import progress, stats
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import store
    from phi2_grpo.evaluation import journal, measure, report
    from phi2_grpo.models import base
    from phi2_grpo.models.answers import saved_generation_config
    from phi2_grpo.models.base import choose_device, context_length, load_base, meta_model, use_adapter_base
    from phi2_grpo.models.lora import check_adapter, check_same_base, load_adapter
    from phi2_grpo.models.tokenizer import (
        SAMPLE_PROMPTS,
        check_context,
        check_vocabulary,
        load_tokenizer,
        render,
    )
    from phi2_grpo.rewards.scorer import Scorer, choose_rewards, try_rewards, with_all_built_in
    from phi2_grpo.rollout.cache import rows_that_fit
    from phi2_grpo.rollout.engine import make_engine
    from phi2_grpo.training import model_card

    console = Console()
    console.print(f"validate_model: {cli.differences(config, KEYS)}")
    folder = Path(config["validation_dir"])
    adapters = [check_adapter(path) for path in (config["adapter"], arguments.against) if path is not None]
    use_adapter_base(adapters[0], config)
    check_same_base(adapters, None if arguments.model else config)
    files.check_writable(folder)
    report.check_replaceable(folder)
    device, dtype = choose_device(config)
    tokenizer = load_tokenizer(config)
    tables, funnel, _ = store.load_prompts(config, tokenizer)
    if trained.get("data", {}).get("fingerprint", funnel["fingerprint"]) != funnel["fingerprint"]:
        text = (
            f"{config['adapter']} was trained on other data than {config['data_dir']}: it may have seen what is held out here."
        )
        console.print(text, style="yellow")
    if not len(tables["validation"]):
        raise cli.UserError(f"{config['data_dir']} has no validation prompt. Prepare it with a larger --validation_fraction.")
    prompts = store.select_rows(tables["validation"], config["max_prompts"], config["seed"])
    scorer = Scorer(tokenizer, config["target_tokens"], with_all_built_in(choose_rewards(config["rewards"])))
    drawing = ("temperature", "top_p", "top_k", "max_completion_length", "samples_per_prompt", "seed", "max_prompts")
    run = {
        "adapters": [files.digest(path / "adapter_model.safetensors") for path in adapters],
        "data": funnel["fingerprint"],
        "model": [config["model"], config["model_revision"], device.type, str(dtype)],
        **{key: config[key] for key in drawing},
    }
    try_rewards(scorer, tables["validation"].select(range(min(8, len(tables["validation"])))).to_list())
    empty = meta_model(config)
    check_vocabulary(tokenizer, empty)
    drawn = journal.Journal(folder / "unfinished" / "journal.jsonl", run, arguments.overwrite)
    context = context_length(empty)
    generation = saved_generation_config(adapters[0], tokenizer, config, context)  # how to chat
    generation.max_new_tokens = min(generation.max_new_tokens or 256, context // 2)
    length = check_context([row["prompt"] for row in prompts], tokenizer, config, context)
    length += config["max_completion_length"]
    with console.status("loading the model"):
        base = load_base(config, device, dtype)
        for judge in scorer.models:
            judge.load(config, base, device, dtype)
        policy = load_adapter(base, config["adapter"])
        if arguments.against:
            load_adapter(policy, arguments.against, "against")
    sides = {"base": ("against" if arguments.against else None), "tuned": "default"}
    engine = make_engine(config["rollout"], policy, config["rollout_batch_size"], measure.reserved_bytes(policy))
    batch = config["rollout_batch_size"] or rows_that_fit(policy, length, measure.reserved_bytes(policy))
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
        console, engine, tokenizer, voice, names, generation, config["seed"], arguments.prompt or SAMPLE_PROMPTS
    )
    texts = render(tokenizer, [row["prompt"] for row in prompts for _ in range(config["samples_per_prompt"])])
    with progress.progress_bar(console, "held-out prompts", 2 * len(texts)) as advance:
        for side in sides:
            with voice(side):
                measure.complete_prompts(engine, tokenizer, texts, config, side, drawn, advance)
    samples, costs, perplexity = [], {"KL from base": {}, "reply surprise": {}}, {}
    repeated = [row for row in prompts for _ in range(config["samples_per_prompt"])]
    with progress.progress_bar(console, "what it cost", 2 * (len(repeated) + len(prompts))) as advance:
        for side in sides:
            ids = [drawn.found[side, i] for i in range(len(repeated))]
            for i, row in enumerate(scorer.score(repeated, ids)):
                samples.append({**row, "side": side, "prompt": i // config["samples_per_prompt"]})
            with voice(side):
                if sides[side] is None:
                    kl = [0.0] * len(repeated)
                else:
                    kl = measure.kl_to_base(policy, policy.disable_adapter, tokenizer, repeated, ids, advance)
                costs["KL from base"][side] = measure.mean_per_prompt(kl, config["samples_per_prompt"])
                surprise = measure.reference_nll(policy, tokenizer, prompts, advance)
                costs["reply surprise"][side] = [value and value[0] / value[1] for value in surprise]
                perplexity[side] = measure.perplexity(surprise)
    found = {**report.summarize(samples, prompts, costs, scorer, names), "perplexity": perplexity}
    report.show(console, found, config["samples_per_prompt"])
    facts = [
        f"{config['adapter']} against {arguments.against or 'its base'}, {config['model']}",
        f"{len(prompts)} held-out prompts of {funnel['settings']['dataset']}, {config['samples_per_prompt']} samples each, "
        f"seed {config['seed']}, temperature {config['temperature']:g}, at most {config['max_completion_length']} tokens",
        f"rewards{' of the training' if trained and not arguments.rewards else ''}: {', '.join(config['rewards'])}; target "
        f"{config['target_tokens']} tokens",
    ]
    with drawn.finished_in(folder) as new:
        report.write(new, found, samples, prompts, shown, facts, {**config, "against": arguments.against})
    as_trained = all(config[key] == trained.get("config", {}).get(key) for key in TRAINED_WITH)
    if not arguments.against and as_trained and len(prompts) >= stats.FEW:
        model_card.add_validation(adapters[0], found["line"], [*report.metric_table(found), "", report.levels(found)])
    else:
        console.print("The model card is left as it is: that takes the settings of the training, the base, and 20 prompts.")
    console.print(f"Report: {folder / 'report.md'}   picture: {folder / 'validation.png'}", soft_wrap=True)


def take_settings_of(adapter: Path, config: dict, arguments) -> dict:
    """What the adapter was trained with goes into `config`, where no flag says otherwise; returns its run.json.

    Raises UserError for rewards that are code, or models from elsewhere: they are not run unasked.
    """
    from phi2_grpo.rewards.functions import untrusted_rewards

    run = files.read_run(adapter)
    saved = run.get("config", {})
    try:
        for key in TRAINED_WITH:
            if getattr(arguments, key) is None and key in saved:
                text = ",".join(saved[key]) if isinstance(saved[key], list) else str(saved[key])
                config[key] = cli.parse_value(key, text)
    except (cli.UserError, TypeError) as error:
        raise cli.UserError(f"{adapter / 'run.json'} is not what a training wrote: {error}") from None
    if not arguments.rewards and (unasked := untrusted_rewards(config["rewards"])):
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

    from phi2_grpo.common.console import make_table
    from phi2_grpo.models.answers import trim
    from phi2_grpo.models.tokenizer import render
    from phi2_grpo.rollout.engine import complete

    texts = render(tokenizer, [[{"role": "user", "content": question}] for question in questions])
    answers = {}
    for side, name in zip(("base", "tuned"), names, strict=True):
        with voice(side), console.status(Text(f"{name} answers")):
            ids = complete(engine, tokenizer, texts, generation, seed)
            answers[side] = trim(ids, tokenizer)
    samples = []
    for i, question in enumerate(questions):
        table = make_table(Text(question), *names, words=(0, 1), expand=True, show_lines=True)
        pair = [answers["base"][i], answers["tuned"][i]]
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(*(Text(answer.text) for answer in pair))
        table.add_row(*(Text(f"{answer.tokens} tokens, {answer.finish_reason}", style="dim") for answer in pair))
        console.print(table)
        shown = [{"answer": answer.text, "tokens": answer.tokens, "why": answer.finish_reason} for answer in pair]
        samples.append({"prompt": question, "base": shown[0], "tuned": shown[1]})
    return samples


if __name__ == "__main__":
    cli.run(main)
