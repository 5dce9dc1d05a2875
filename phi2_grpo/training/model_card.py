"""Model cards: of an adapter, of a reward model, of a merged model. Every number is the run's own, or a validation's."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from phi2_grpo.common import files, hub
from phi2_grpo.common.cli import load_errors
from phi2_grpo.common.console import markdown_table
from phi2_grpo.models.base import SMOLLM2_ID, describe_base

USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

folder = "."  # this folder, or its id on the Hub
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="DTYPE")
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "What are the benefits of exercise?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
config = GenerationConfig.from_pretrained(folder)  # sampling, end token and stop strings
output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
USE_REWARD_MODEL = """\
import json

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = "."  # this folder
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="DTYPE").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
model.config.pad_token_id = tokenizer.pad_token_id
messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it scatters light."}]
score = model(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)).logits[0, 0].item()
scale = json.load(open(f"{folder}/run.json"))["scores"]
print((score - scale["mean"]) / scale["std"])  # 0: as good as the mean of the ranked replies
"""
USE_MERGED = """\
from transformers import pipeline

chat = pipeline("text-generation", ".")  # this folder, or its id on the Hub
print(chat([{"role": "user", "content": "What are the benefits of exercise?"}])[0]["generated_text"][-1]["content"])
"""
# Of the bases that are known here; tiny is made here. Of any other a card says nothing.
LICENSES = {"microsoft/phi-2": "mit", SMOLLM2_ID: "apache-2.0", "tiny": "mit"}
FIRST_TO_LAST = "first steps to last (ten each, or half of the run)"  # what `outputs.first_and_last` averages
VALIDATED = "## On held-out prompts\n"
USE = "## Use\n"
TRAINING = "## Training\n"
CURVE = "![reward curve](reward.png)\n"


def _frame(data: ModelCardData, before: str, use: str, code: str, training: str) -> str:
    """What the three cards have in common: header, title with results, code to use it, and how it was trained."""
    return f"---\n{data.to_yaml()}\n---\n{before}{USE}{use}\n```python\n{code}```\n\n{training}"


def _new_card(facts: dict, tag: str, pipeline: str, title: str, body: str, code: str, settings: str) -> str:
    """The card of a training. No path goes into it: a local base or data set is named by its last part."""
    config, dataset = facts["config"], facts["data"]["dataset"]
    dataset = dataset if hub.is_id(dataset) else Path(dataset).name
    base = describe_base(config).partition(",")[0]
    data = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="peft",
        pipeline_tag=pipeline,
        license=LICENSES.get(base),
        datasets=[dataset] if "/" in dataset else None,
        tags=[tag, "trl", "lora"],
    )
    training = f"""{TRAINING}
- Base: {describe_base(config)}, in {facts["dtype"]}
- Data: {dataset}
- LoRA: r {config["lora_r"]}, alpha {config["lora_alpha"]}, on {facts["adapted"]}
- {settings}, seed {config["seed"]}
- Hardware: {facts["hardware"]}
- Versions: {", ".join(f"{name} {number}" for name, number in facts["versions"].items())}
- Code: commit {facts["git_commit"] or "unknown"}; all settings are in `run.json`, every step in `metrics.jsonl`
"""
    code = code.replace("DTYPE", facts["dtype"])  # or transformers would take the stored one: Phi-2's is float16
    return _frame(data, f"\n# {title} {base}\n\n{body}\n", "", code, training)


def adapter_card(facts: dict, steps: int, seconds: float, changes: dict[str, tuple], finished: bool) -> str:
    """`changes`: what is measured, with its means over the first and the last steps."""
    config = facts["config"]
    rewards = [(reward["name"], f"{reward['weight']:g}", reward["summary"]) for reward in facts["rewards"]]
    changed = [(name, f"{first:.3g}", f"{last:.3g}") for name, (first, last) in changes.items()]
    rewards_table = "\n".join(markdown_table(("reward", "weight", ""), rewards))
    changes_table = "\n".join(markdown_table((f"over training, {FIRST_TO_LAST}", "from", "to"), changed))
    length = f"{steps} steps{'' if finished else ' (a checkpoint of a longer run)'} in {seconds / 60:.1f} min"
    body = f"""{rewards_table}

{length}, target {config["target_tokens"]} tokens:

{changes_table}

These are means over sampled training completions, the KL an estimate. `validate_model.py` measures held-out answers.

{CURVE}"""
    settings = "GRPO: {num_generations} completions a prompt, learning rate {learning_rate:g}, beta {beta:g}, loss {loss_type}"
    return _new_card(facts, "grpo", "text-generation", "GRPO adapter (LoRA) for", body, USE_ADAPTER, settings.format(**config))


def reward_model_card(facts: dict, steps: int, seconds: float, accuracy: list[str], left_out: int) -> str:
    """`accuracy`: how often it agrees with people, in lines of Markdown (see `reward_accuracy.markdown`)."""
    config = facts["config"]
    body = "\n".join([*accuracy, "", "![scores of preferred and other replies](scores.png)", ""])
    settings = (
        f"{steps} steps of {config['per_device_train_batch_size']} x {config['gradient_accumulation_steps']} pairs "
        f"({left_out} of both splits too long) in {seconds / 60:.1f} min, learning rate {config['reward_learning_rate']:g}"
    )
    title = "Reward model (LoRA and a scalar head) on"
    return _new_card(facts, "reward-model", "text-classification", title, body, USE_REWARD_MODEL, settings)


def merged_card(adapter: Path, dtype: str) -> str:
    """The adapter's own card, for the merged model. Raises UserError for a card that cannot be read."""
    path = adapter / "README.md"
    with load_errors(f"{path} is no model card", "Correct it, or remove it."):
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "", ignore_metadata_errors=True)
    card.data.library_name = "transformers"
    text = card.text.replace(CURVE, "").replace("# GRPO adapter (LoRA) for", "# GRPO adapter merged into")
    before, _, after = text.partition(USE)
    stops = ", ".join(map(json.dumps, files.read_json(adapter / "generation_config.json").get("stop_strings") or []))
    cut = f"\nPlain `generate` takes no stop strings: cut an answer before the first of {stops}.\n" if stops else ""
    use = f"\nMerged in float32, written in {dtype}: plain weights for transformers, vLLM and llama.cpp.\n{cut}"
    return _frame(card.data, before, use, USE_MERGED, "".join(after.partition(TRAINING)[1:]))


def add_validation(adapter: Path, line: str, table: list[str]) -> None:
    """Write the result of a validation into the adapter's card, in place of an earlier one. A read-only adapter stays."""
    path = adapter / "README.md"
    before, use, after = (path.read_text(encoding="utf-8") if path.is_file() else "").partition(USE)
    if use and os.access(adapter, os.W_OK):
        section = "\n".join([VALIDATED, line, "", *table, "", ""])
        files.write_text(path, before.partition(VALIDATED)[0] + section + use + after)
