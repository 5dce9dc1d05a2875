"""Merge an adapter into its base, for engines that read plain weights; send the adapter or the merged model to the Hub.

  python export_model.py --out results/phi2-grpo-merged                 # full weights: vLLM, llama.cpp, transformers
  python export_model.py --push_to_hub USER/NAME                        # the adapter with its card
  python export_model.py --out DIR --push_to_hub USER/NAME-merged --merged    # the full weights

Merged in float32 and rounded once. What was merged, and again what was written, is compared with the adapter on the sample
prompts; another model is not written.
"""

from pathlib import Path

from config import CONFIG
from phi2_grpo.common import cli, files, setup

KEYS = ("model", "model_revision", "dtype", "adapter")


def main() -> None:
    defaults = {**dict.fromkeys(("model", "model_revision"), "the adapter's"), "dtype": "as the base, bfloat16 for float16"}
    parser = cli.make_parser(__doc__, KEYS, defaults)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the merged model")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="send the adapter there, or with --merged the merged model")
    parser.add_argument("--merged", action="store_true", help="send the merged model of --out")
    parser.add_argument("--private", action="store_true", help="only you see the model on the Hub")
    config, arguments = cli.parse(parser)
    out, name = arguments.out, arguments.push_to_hub
    if not (out or name) or (arguments.merged and not (out and name)):
        raise cli.UserError("give --out DIR to merge, --push_to_hub USER/NAME to send the adapter, or both with --merged.")
    setup.prepare(*([] if name else [config["model"]]))  # an upload says itself what stands in its way

    from phi2_grpo.common import hub
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.models.base import use_adapter_base
    from phi2_grpo.models.lora import check_adapter

    console = Console()
    embedded.prepare(config["model"], oasst.sample_dialogues)
    adapter = check_adapter(config["adapter"])
    use_adapter_base(adapter, config, arguments)
    console.print(f"export_model: {cli.differences(config, KEYS)}")
    if name:
        hub.check_account(name)
        check_repository(name, arguments.merged, arguments.private)
    if out:
        files.check_writable(out)
        if files.check_replaceable(out, lambda folder: "merged_from" in files.read_run(folder)) and not arguments.overwrite:
            raise cli.UserError(f"{out} holds a merged model. Replace it: --overwrite; or choose another --out.")
        with files.lock_folder(out):
            merge(console, config, adapter, out)
    if name:
        paths = [path for path in out.iterdir() if path.is_file()] if arguments.merged else hub.adapter_files(adapter)
        send(console, name, paths, arguments.private)


def merge(console, config: dict, adapter: Path, out: Path) -> None:
    """Write the merged model to `out`, and print how it differs from the adapter. Raises UserError if it is another model."""
    import torch
    from transformers import AutoModelForCausalLM

    from phi2_grpo.models.answers import saved_generation_config
    from phi2_grpo.models.base import context_length, load_base, meta_model
    from phi2_grpo.models.lora import load_adapter
    from phi2_grpo.models.tokenizer import check_prompt_format, load_tokenizer
    from phi2_grpo.training.model_card import merged_card

    tokenizer, base = load_tokenizer(config), meta_model(config)
    check_prompt_format(adapter, tokenizer)
    # As the base is stored, but bfloat16 for float16: Phi-2 overflows in it.
    stored = torch.float32 if base.config.dtype in (None, torch.float32) else torch.bfloat16
    dtype = stored if config["dtype"] == "auto" else getattr(torch, config["dtype"])
    trained = {**CONFIG, **files.read_run(adapter).get("config", {})}
    generation = saved_generation_config(adapter, tokenizer, trained, context_length(base))
    generation.stop_strings = None  # plain `generate(**inputs)` and pipelines would fail
    card = merged_card(adapter, str(dtype))
    with torch.no_grad(), files.atomic_folder(out) as folder:
        with console.status("merging in float32"):  # on the CPU: a GPU may be too small for float32
            tuned = load_adapter(load_base(config, torch.device("cpu"), torch.float32), str(adapter)).eval()
            prompts, answers = greedy_answers(tuned, tokenizer)
            expected = log_probs(tuned, tokenizer, prompts, answers)
            merged = tuned.merge_and_unload()
            refuse_if_other(log_probs(merged, tokenizer, prompts, answers) - expected, "merged in float32")
            merged = merged.to(dtype)
            rounded = log_probs(merged, tokenizer, prompts, answers)
        with console.status("writing"):
            merged.generation_config = generation
            merged.save_pretrained(folder, max_shard_size="5GB")
            tokenizer.save_pretrained(folder)
            readable_by_transformers_4(folder)
            files.write_text(folder / "README.md", card)
            files.write_json(folder / "run.json", {**files.read_json(adapter / "run.json"), "merged_from": str(adapter)})
            del tuned, merged
        with console.status("reading it back"):
            written = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            read_back = log_probs(written, tokenizer, prompts, answers)
            refuse_if_other(read_back - rounded, "read back from the disk")
            again = greedy_answers(written, tokenizer)[1]
    same = sum(old == new for old, new in zip(answers, again, strict=True))
    console.print(f"Greedy answers to the sample prompts: {same} of {len(answers)} are the adapter's, token for token.")
    console.print(f"Log-probs differ from the adapter's by {(read_back - expected).abs().max():.2g} nats at most.")
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"Merged model: {out}, {dtype}, {size / 1e9:.2f} GB")


def greedy_answers(model, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the sample prompts, and of the likeliest answer to each."""
    from transformers import GenerationConfig

    from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS, render
    from phi2_grpo.rollout.engine import GenerateEngine

    texts = render(tokenizer, [[{"role": "user", "content": question}] for question in SAMPLE_PROMPTS])
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ends = {"eos_token_id": tokenizer.all_eos_ids, "pad_token_id": tokenizer.pad_token_id}
    generation = GenerationConfig(max_new_tokens=64, do_sample=False, **ends)
    return prompts, GenerateEngine(model)(prompts, generation)


def log_probs(model, tokenizer, prompts: list[list[int]], answers: list[list[int]]):
    """log p (nats) of the tokens of all answers, one after the other (N,)."""
    import torch

    from phi2_grpo.evaluation.measure import token_log_probs

    of_all = token_log_probs(model, tokenizer, prompts, answers)
    return torch.cat([of_one[range(len(ids)), ids] for of_one, ids in zip(of_all, answers, strict=True)])


def refuse_if_other(differences, when: str) -> None:
    """Raise UserError where log-probs differ (nats) by more than the order of float sums can explain."""
    if not (largest := differences.abs().max().item()) < 0.01:  # NaN is no less
        raise cli.UserError(
            f"{when}, the model differs from the adapter by {largest:.2g} nats in its own answers: it is another model, and "
            "was not written. This adapter cannot be merged; serve it as an adapter."
        )


def readable_by_transformers_4(folder: Path) -> None:
    """Say in the written files, beside transformers 5's own words, what transformers 4 and engines built on it look for.

    They read the rotary settings at the top of config.json, and take defaults in silence where they are not there; and they
    know neither the class name nor the list of special tokens that transformers 5 writes for a tokenizer.
    """
    config = files.read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    plain = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        plain["rope_scaling"] = {key: value for key, value in rope.items() if key not in plain}
    files.write_json(folder / "config.json", {**config, **plain, "torch_dtype": config.get("dtype")})
    tokenizer = files.read_json(folder / "tokenizer_config.json")
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    files.write_json(folder / "tokenizer_config.json", {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})


def check_repository(name: str, merged: bool, private: bool) -> None:
    """Raise UserError for a repository that is there and is public, or holds the other kind: an adapter or a merged model."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub

    with hub.clear_errors(name):
        if HfApi().repo_exists(name):
            if private and not HfApi().repo_info(name).private:
                raise cli.UserError(f"{name} exists and is public. Make it private on the Hub, or give another name.")
            if (other := "adapter_config.json" if merged else "config.json") in HfApi().list_repo_files(name):
                # Of the two, transformers reads the adapter.
                raise cli.UserError(f"{name} holds {other}: adapter and merged model need a name each. Give another.")


def send(console, name: str, paths: list[Path], private: bool) -> None:
    """Upload files in one commit, without what is private; makes the repository at the first time."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from phi2_grpo.common import hub

    public, changed = hub.public_files(paths)
    with hub.clear_errors(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(file, content) for file, content in public.items()]
        HfApi().create_commit(name, operations, commit_message="Upload")
    for each in changed:
        console.print(f"changed: {each}")
    console.print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    cli.run(main)
