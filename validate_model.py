"""Is the adapter better than its base, by how much, for whom, and what did it cost?

  python validate_model.py                                      # results/phi2-grpo-final on data/
  python validate_model.py --preset tiny
  python validate_model.py --against OTHER_ADAPTER              # two adapters on one base
  python validate_model.py --prompt "Why is the sky blue?"      # answers this as a chat, then measures as ever

Base answers come from the same model with the adapter off. Everything is measured on held-out prompts, prompt by prompt, with
intervals over prompts: the rewards of the training at its temperature, rewards of any answer, and what the tuning cost
(KL to the base, negative log-likelihood of human replies).
"""

import shlex
from pathlib import Path

from phi2_grpo.common import cli, files, setup

KEYS = ("model", "model_revision", "device", "dtype", "data_dir", "adapter", "max_completion_length", "temperature", "top_p",
        "top_k", "rewards", "target_tokens", "format_regex", "max_prompts", "samples_per_prompt", "rollout",
        "rollout_batch_size", "seed", "validation_dir")  # fmt: skip
# Taken from the adapter's run.json.
TRAINED_WITH = ("temperature", "top_p", "top_k", "max_completion_length", "target_tokens", "format_regex", "rewards")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS, dict.fromkeys((*TRAINED_WITH, "model", "model_revision"), "the training's"))
    parser.add_argument("--against", metavar="DIR", help="compare with another adapter on the same base, instead of the base")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a question to answer as a chat; may be repeated")
    config, arguments = cli.parse(parser)
    if any(not prompt.strip() for prompt in arguments.prompt or []):
        raise cli.UserError("--prompt is empty. Give it a question.")
    cli.check_one_process("validate_model.py")
    trained = use_training_settings(config, arguments)
    setup.prepare(config["model"], *config["rewards"])

    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded

    embedded.prepare(config["model"], oasst.sample_dialogues)
    with files.lock_folder(Path(config["validation_dir"])):
        validate(config, arguments, trained)


def use_training_settings(config: dict, arguments) -> dict:
    """What the adapter was trained with goes into `config`, where no flag says otherwise; returns its run.json.

    Raises UserError for rewards that are code, or models from elsewhere: they are not run unasked.
    """
    from phi2_grpo.rewards.functions import untrusted_rewards

    run = files.read_run(Path(config["adapter"]))
    for key, value in run.get("config", {}).items():
        if key in TRAINED_WITH and getattr(arguments, key) is None:
            config[key] = cli.parse_value(key, ",".join(value) if isinstance(value, list) else str(value))
    if not arguments.rewards and (untrusted := untrusted_rewards(config["rewards"])):
        raise cli.UserError(
            f"{config['adapter']} was trained with {', '.join(untrusted)}, which is not on this machine, or is code, and that "
            f"runs only when you name it:\n  --rewards {shlex.quote(','.join(config['rewards']))}   (or other rewards)"
        )
    return run


def validate(config: dict, arguments, trained: dict) -> None:
    """Load, sample, measure, report. `trained` is the adapter's run.json."""
    from phi2_grpo.common.console import Console
    from phi2_grpo.data.store import select_rows
    from phi2_grpo.evaluation import report
    from phi2_grpo.evaluation.accuracy import measure_greedy, summarize_accuracy
    from phi2_grpo.evaluation.chat import show_samples
    from phi2_grpo.evaluation.measure import measure, reserved_bytes
    from phi2_grpo.models.answers import saved_generation_config
    from phi2_grpo.models.base import choose_device, context_length, describe_base, meta_model, use_adapter_base
    from phi2_grpo.models.lora import check_adapter, check_same_base
    from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS, check_context, check_prompt_format, check_vocabulary, load_tokenizer
    from phi2_grpo.rewards.functions import BUILT_IN
    from phi2_grpo.rewards.scorer import Scorer, add_built_in, describe_rewards, parse_rewards, try_rewards
    from phi2_grpo.rollout.engine import make_engine
    from phi2_grpo.training.checkpoints import reward_list

    console = Console()
    console.print(f"validate_model: {cli.differences(config, KEYS)}")
    folder = Path(config["validation_dir"])
    adapters = [check_adapter(path) for path in (config["adapter"], arguments.against) if path is not None]
    use_adapter_base(adapters[0], config, arguments)
    if not arguments.model:
        check_same_base(adapters, config)
    files.check_writable(folder)
    files.check_replaceable(folder, report.is_report)
    device, dtype = choose_device(config)
    tokenizer, base = load_tokenizer(config), meta_model(config)
    check_vocabulary(tokenizer, base)
    for adapter in adapters:
        check_prompt_format(adapter, tokenizer)
    table, funnel, seen = load_held_out(config, tokenizer, adapters)
    if seen:
        console.print(seen, style="yellow")
    prompts = select_rows(table, config["max_prompts"], config["seed"])
    chosen = parse_rewards(config["rewards"])
    as_trained = reward_list({"rewards": describe_rewards(chosen)}) == reward_list(trained)  # by their files' digests, too
    scorer = Scorer(tokenizer, config["target_tokens"], add_built_in(chosen), config["format_regex"])
    try_rewards(scorer, prompts)
    context = context_length(base)
    generation = saved_generation_config(adapters[0], tokenizer, config, context)  # how to chat
    generation.max_new_tokens = min(generation.max_new_tokens or 256, context // 2)
    check_context([row["prompt"] for row in prompts], tokenizer, config, context)

    with console.status("loading the model"):
        policy = load_policy(config, adapters, scorer, device, dtype)
    engine = make_engine(config["rollout"], policy, config["rollout_batch_size"], reserved_bytes(policy))
    names = side_names(adapters)
    against, questions = bool(arguments.against), [row["prompt"] for row in prompts[:3]]
    if arguments.prompt or funnel.get("name") == "oasst1":
        questions = [[{"role": "user", "content": text}] for text in arguments.prompt or SAMPLE_PROMPTS]
    shown = show_samples(console, engine, tokenizer, names, generation, config["seed"], questions, against)
    samples, costs = measure(console, engine, tokenizer, scorer, prompts, config, against)
    numbers = report.summarize(samples, prompts, costs, scorer, names)
    if BUILT_IN["correct"] in [reward.function for reward in scorer.chosen]:
        greedy = measure_greedy(console, engine, tokenizer, scorer, prompts, config, against)
        numbers["accuracy"] = summarize_accuracy(samples, greedy, config["samples_per_prompt"])

    report.show(console, numbers, config)
    facts = [
        f"{config['adapter']} against {arguments.against or 'its base'}, {describe_base(config)}",
        f"{len(prompts)} held-out prompts of {funnel['settings']['dataset']}, samples of each: {config['samples_per_prompt']}, "
        f"seed {config['seed']}, temperature {config['temperature']:g}, at most {config['max_completion_length']} tokens",
        f"rewards{' of the training' * as_trained}: {', '.join(config['rewards'])}; target {config['target_tokens']} tokens",
        *filter(None, [seen]),
    ]
    report.write(folder, numbers, samples, prompts, shown, facts, {**config, "against": arguments.against})
    update_card(console, adapters[0], config, arguments, trained if as_trained and not seen else {}, numbers)
    console.print(f"Report: {folder / 'report.md'}   picture: {folder / 'validation.png'}", soft_wrap=True)


def load_held_out(config: dict, tokenizer, adapters: list[Path]) -> tuple:
    """The validation split, the funnel, and a warning where a training may have seen these prompts, else ""."""
    from phi2_grpo.data.store import load_prompts

    tables, funnel = load_prompts(config, tokenizer)
    if not len(tables["validation"]):
        raise cli.UserError(f"{config['data_dir']} has no validation prompt. Prepare it with a larger --validation_fraction.")
    data, now = {str(path): files.read_run(path).get("data", {}) for path in adapters}, funnel["fingerprint"]
    others = [path for path, of in data.items() if {of.get("fingerprint", now), *of.get("earlier", [])} != {now}]
    text = f"{' and '.join(others)} was trained on other data than {config['data_dir']}: it may have seen what is held out."
    return tables["validation"], funnel, text * bool(others)


def load_policy(config: dict, adapters: list[Path], scorer, device, dtype):
    """The base with the adapter, called default, and the other one, called against; reward models are loaded too."""
    from phi2_grpo.models.base import load_base
    from phi2_grpo.models.lora import load_adapter

    base = load_base(config, device, dtype)
    for model in scorer.models:
        model.load(config, base, device, dtype)
    policy = load_adapter(base, str(adapters[0]))
    for other in adapters[1:]:
        load_adapter(policy, str(other), "against")
    return policy


def side_names(adapters: list[Path]) -> tuple[str, str]:
    if len(adapters) == 1:
        return "base", "tuned"
    same = adapters[0].name == adapters[1].name
    return tuple(str(path) if same else path.name for path in (adapters[1], adapters[0]))


def update_card(console, adapter: Path, config: dict, arguments, trained: dict, numbers: dict) -> None:
    """The result into the adapter's model card, where it was measured as it was trained, on prompts enough."""
    from phi2_grpo.common.stats import FEW
    from phi2_grpo.evaluation.report import CAPTION, levels, metric_table
    from phi2_grpo.training.model_card import add_validation

    same = (config[key] == trained.get("config", {}).get(key) for key in TRAINED_WITH if key != "rewards")  # compared before
    scored = numbers["metrics"].get(numbers["headline"], {"prompts": 0})["prompts"]
    needed = {"the base as the other side": not arguments.against, "the training's settings and data": all(same),
              f"{FEW} prompts": scored >= FEW}  # fmt: skip
    if missing := [what for what, there in needed.items() if not there]:
        console.print(f"The model card was not changed. That takes {' and '.join(missing)}.")
    else:
        below = f"\\{CAPTION.format('tuned')}. {levels(numbers)}"
        add_validation(adapter, numbers["line"], [*metric_table(numbers), "", below])


if __name__ == "__main__":
    cli.run(main)
