"""Merge an adapter into its base, for engines that read plain weights; send the adapter or the merged model to the Hub.

  python export_model.py --out results/phi2-grpo-merged                 # full weights: vLLM, llama.cpp, transformers
  python export_model.py --push_to_hub USER/NAME                        # the adapter with its card
  python export_model.py --out DIR --push_to_hub USER/NAME --merged     # the full weights

Merged in float32 and rounded once. What was written is read back and compared with the adapter on the sample prompts.
"""

import os
import shutil
from pathlib import Path

from config import CONFIG
from phi2_grpo.common import cli, files, setup

KEYS = ("model", "model_revision", "dtype", "adapter")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--out", metavar="DIR", help="folder for the merged model")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="send the adapter there, or with --merged the merged model")
    parser.add_argument("--merged", action="store_true", help="send the merged model of --out")
    parser.add_argument("--with_samples", action="store_true", help="send held-out prompts and their answers, too")
    parser.add_argument("--private", action="store_true", help="only you see the model on the Hub")
    config, arguments = cli.parse(parser)
    if not arguments.out and not arguments.push_to_hub:
        raise cli.UserError("nothing to do. Give --out DIR to merge, or --push_to_hub USER/NAME to send the adapter.")
    if arguments.merged and not (arguments.out and arguments.push_to_hub):
        raise cli.UserError("--merged sends a merged model: give --out DIR and --push_to_hub USER/NAME with it.")
    setup.prepare(config["model"])

    from phi2_grpo.common import hub
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.models.base import use_adapter_base
    from phi2_grpo.models.lora import check_adapter

    console = Console()
    embedded.prepare(config["model"], oasst.sample_dialogues)
    adapter = check_adapter(config["adapter"])
    use_adapter_base(adapter, config)
    console.print(f"export_model: {cli.differences(config, KEYS)}")
    if arguments.push_to_hub:
        hub.check_account(hub.check_name(arguments.push_to_hub))
    if arguments.out:
        with files.lock_folder(Path(arguments.out)):
            merge(console, config, adapter, Path(arguments.out), arguments.overwrite)
    if arguments.push_to_hub:
        folder = Path(arguments.out) if arguments.merged else adapter
        paths = hub.adapter_files(folder) if not arguments.merged else sorted(p for p in folder.iterdir() if p.is_file())
        send(console, arguments.push_to_hub, paths, arguments.private, arguments.with_samples)


def merge(console, config: dict, adapter: Path, out: Path, overwrite: bool) -> None:
    """Write the merged model to `out`, whole or not at all, and show how it differs from the adapter."""
    files.check_writable(out)
    if files.check_replaceable(out, "merged_from") and not overwrite:
        raise cli.UserError(f"{out} is there already. Replace it: --overwrite; or choose another --out.")

    import torch
    from transformers import AutoModelForCausalLM

    from phi2_grpo.models.answers import saved_generation_config
    from phi2_grpo.models.base import context_length, load_base, meta_model
    from phi2_grpo.models.lora import load_adapter
    from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS, load_tokenizer
    from phi2_grpo.training import model_card

    tokenizer = load_tokenizer(config)
    empty = meta_model(config)
    # The adapter's own file says how to chat; but stop strings would make plain `generate(**inputs)` and pipelines fail.
    generation = saved_generation_config(adapter, tokenizer, chat_settings(adapter), context_length(empty))
    generation.stop_strings = None
    stored = empty.config.dtype or torch.float32
    dtype = getattr(torch, config["dtype"]) if config["dtype"] != "auto" else _export_dtype(stored)
    name = str(dtype).removeprefix("torch.")
    card = model_card.merged_card(adapter, name)
    needed = empty.num_parameters() * dtype.itemsize
    free = shutil.disk_usage(files.nearest_existing(out)).free
    if free < 1.05 * needed:
        raise cli.UserError(f"{out} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Choose another disk: --out.")

    with console.status("merging in float32"):
        cpu = torch.device("cpu")  # once, and exactly: there is no hurry, and a card may be too small for float32
        tuned = load_adapter(load_base(config, cpu, torch.float32), str(adapter)).eval()
        expected = [greedy(tuned, tokenizer, question) for question in SAMPLE_PROMPTS]
        merged = merge_untied(tuned)
        refuse_if_other(largest_difference(merged, tokenizer, expected), "merged in float32")
        merged = merged.to(dtype)
        rounded = [(prompt, ids, log_probs(merged, tokenizer, prompt, ids)) for prompt, ids, _ in expected]
        merged.generation_config = generation
    with files.atomic_folder(out) as folder:
        with console.status("writing"):
            merged.save_pretrained(folder, max_shard_size="5GB")
            tokenizer.save_pretrained(folder)
            readable_by_transformers_4(folder)
            files.write_text(folder / "README.md", card)
            files.write_json(folder / "run.json", {**files.read_json(adapter / "run.json"), "merged_from": str(adapter)})
            del tuned, merged
        with console.status("reading it back"):
            written = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            refuse_if_other(largest_difference(written, tokenizer, rounded), "read back from the disk")
            compare(console, written, tokenizer, expected)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"Merged model: {out}, {name}, {size / 1e9:.2f} GB")


def chat_settings(adapter: Path) -> dict:
    """What `model.generation_config` takes of the adapter's training, or the defaults."""
    return {**CONFIG, **files.read_run(adapter).get("config", {})}


def merge_untied(tuned):
    """The adapter merged into its base. A head that is the embedding too gets a weight of its own, where they differ then."""
    import torch

    base = tuned.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    if tied:  # PEFT merges in place, into both at once
        plain = getattr(head, "base_layer", head)
        plain.weight = torch.nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    merged = tuned.merge_and_unload()
    if tied:
        merged.config.tie_word_embeddings = torch.equal(
            merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
        )
        merged.tie_weights()
    return merged


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
    if isinstance(special := tokenizer.get("extra_special_tokens"), list):
        del tokenizer["extra_special_tokens"]
        tokenizer["additional_special_tokens"] = special
    files.write_json(folder / "tokenizer_config.json", {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})


def largest_difference(language_model, tokenizer, expected: list[tuple[str, list[int], list[float]]]) -> float:
    """Between the log-probs (nats) of `expected` and the model's own of the same tokens."""
    pairs = [(log_probs(language_model, tokenizer, prompt, ids), wanted) for prompt, ids, wanted in expected]
    return max((abs(a - b) for found, wanted in pairs for a, b in zip(found, wanted, strict=True)), default=0.0)


def refuse_if_other(difference: float, when: str) -> None:
    """Raise UserError where `difference` (nats) is more than the order of float sums can explain."""
    if not difference < 0.01:  # NaN is no less
        raise cli.UserError(
            f"{when}, the model differs from the adapter by {difference:.2g} nats in its own answers: it is another model, and "
            "was not written. This adapter cannot be merged; serve it as an adapter."
        )


def _export_dtype(stored):
    """bfloat16, which Phi-2 needs (it overflows in float16); a base kept in float32 stays in it."""
    import torch

    return torch.float32 if stored == torch.float32 else torch.bfloat16


def greedy(language_model, tokenizer, question: str) -> tuple[str, list[int], list[float]]:
    """The likeliest answer to a question: the prompt, token ids, and the log-prob of each."""
    from phi2_grpo.models.tokenizer import eos_token_ids, render

    prompt = render(tokenizer, [[{"role": "user", "content": question}]])[0]
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 64, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = {"eos_token_id": eos_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    output = language_model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options, **ends)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    return prompt, ids, log_probs(language_model, tokenizer, prompt, ids)


def log_probs(language_model, tokenizer, prompt: str, ids: list[int]) -> list[float]:
    """log p of each of `ids` after `prompt`, in nats."""
    import torch

    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = language_model(torch.tensor([before + ids])).logits.float()  # (1, T, V)
    rows = logits[0, len(before) - 1 : -1].log_softmax(-1)  # (answer, V)
    return rows[range(len(ids)), ids].tolist()


def compare(console, written, tokenizer, expected: list[tuple[str, list[int], list[float]]]) -> None:
    """What was written against the adapter on its float32 base: the greedy answers, and the log-probs of the adapter's."""
    from rich.text import Text

    from phi2_grpo.common.console import make_table
    from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS

    columns = ("sample prompt", "greedy answers", "largest log-prob difference")
    table = make_table("Merged against adapter", *columns, words=(0, 1))
    for question, (prompt, ids, wanted) in zip(SAMPLE_PROMPTS, expected, strict=True):
        same = len(os.path.commonprefix([ids, greedy(written, tokenizer, question)[1]]))
        found = log_probs(written, tokenizer, prompt, ids)
        largest = max((abs(a - b) for a, b in zip(found, wanted, strict=True)), default=0.0)
        words = "the same" if same == len(ids) else f"the same for {same} of {len(ids)} tokens"
        table.add_row(Text(question), words, f"{largest:.2g} nats")
    console.print(table)


def send(console, name: str, paths: list[Path], private: bool, with_samples: bool) -> None:
    """Upload files in one commit, without what is private; makes the repository at the first time."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from phi2_grpo.common import hub

    found, left_out = hub.public_files(paths, with_samples)
    operations = [CommitOperationAdd(file, content) for file, content in found.items()]
    with hub.clear_errors(name):
        HfApi().create_repo(name, private=private, exist_ok=True)
        HfApi().create_commit(name, operations, commit_message="Upload")
    for each in left_out:
        console.print(f"left out: {each}")
    console.print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    cli.run(main)
