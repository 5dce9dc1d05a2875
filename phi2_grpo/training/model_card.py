"""Model cards for the Hub. Every number in one comes from the run's own metrics, or from a validation."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from phi2_grpo.common import files, hub
from phi2_grpo.common.cli import UserError, disk_is_full, first_line
from phi2_grpo.common.console import markdown_table

USE_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

folder = "."  # this folder, or its id on the Hub
model = AutoPeftModelForCausalLM.from_pretrained(folder)
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
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
model.config.pad_token_id = tokenizer.pad_token_id
messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it scatters light."}]
score = model(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)).logits[0, 0].item()
scale = json.load(open(f"{folder}/run.json"))["scores"]
print((score - scale["mean"]) / scale["std"])  # 0: as good as the mean of the ranked replies
"""


USE_MERGED = """\
from transformers import pipeline

chat = pipeline("text-generation", "DIR or USER/NAME")
print(chat([{"role": "user", "content": "What are the benefits of exercise?"}])[0]["generated_text"][-1]["content"])
"""


VALIDATED = "## On held-out prompts\n"


USE = "## Use\n"


MADE = "## How it was made\n"


def _card(facts: dict, pipeline: str, tags: list[str], title: str, body: str, code: str, settings: str) -> str:
    """The frame of both cards; `title` has a place for the base."""
    config, dataset = facts["config"], facts["data"]["dataset"]
    data = ModelCardData(
        base_model=config["model"] if hub.is_id(config["model"]) else None,
        library_name="peft",
        pipeline_tag=pipeline,
        license="mit",
        datasets=[dataset] if hub.is_id(dataset) else None,
        tags=tags,
    )
    base = config["model"] if hub.is_id(config["model"]) else Path(config["model"]).name  # no path in what may be published
    base = "the tiny Phi of this project, made on the spot" if base == "tiny" else base
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"""---
{data.to_yaml()}
---

# {title.format(base=base)}

{body}

{USE}
```python
{code}```

{MADE}
- LoRA r={config["lora_r"]}, alpha={config["lora_alpha"]}, on {facts["adapted"]}
- {settings}, seed {config["seed"]}
- {versions}
- code at commit {facts["git_commit"] or "unknown"}; all settings in `run.json`, every step in `metrics.jsonl`
"""


def adapter_card(
    facts: dict, steps: int, seconds: float, changes: dict[str, tuple], finished: bool, collapsed: bool = False
) -> str:
    """`changes`: what is measured, with its means over the first and the last steps."""
    config = facts["config"]
    rewards = [(reward["name"], f"{reward['weight']:g}", reward["pays_for"]) for reward in facts["rewards"]]
    changed = [(name, f"{first:.3g}", f"{last:.3g}") for name, (first, last) in changes.items()]
    lines = [
        *markdown_table(("reward", "weight", ""), rewards),
        "",
        f"{steps} steps{'' if finished else ' (a checkpoint of a longer run)'} in {seconds / 60:.1f} min on "
        f"{facts['hardware']}. Target: {config['target_tokens']} tokens."
        + (" The run collapsed after it, so this earlier checkpoint was kept." if collapsed else ""),
        "",
        *markdown_table(("over training, first to last steps", "from", "to"), changed),
        "",
        "These are the rewards of sampled training completions. Whether held-out answers are better is what "
        "`validate_model.py` says.",
        "",
        "![reward curve](reward.png)",
    ]
    settings = (
        f"learning rate {config['learning_rate']:g}, {config['num_generations']} generations per prompt, "
        f"beta {config['beta']:g}, loss {config['loss_type']}"
    )
    title = "A LoRA adapter for {base}, trained with GRPO"
    return _card(facts, "text-generation", ["grpo", "trl", "lora"], title, "\n".join(lines), USE_ADAPTER, settings)


def reward_model_card(facts: dict, steps: int, seconds: float, accuracy: list[str], left_out: int) -> str:
    """What it is worth, beside what costs nothing. `accuracy`: lines of Markdown (see `reward_accuracy.markdown`)."""
    config = facts["config"]
    lines = [*accuracy, "", "![scores of preferred and other replies](scores.png)"]
    settings = (
        f"{steps} updates of {config['per_device_train_batch_size']} x {config['gradient_accumulation_steps']} pairs "
        f"({left_out} too long), learning rate {config['reward_learning_rate']:g}, {seconds / 60:.1f} min on "
        f"{facts['hardware']}"
    )
    title = "A reward model on {base}: LoRA and a scalar head"
    return _card(
        facts, "text-classification", ["reward-model", "trl", "lora"], title, "\n".join(lines), USE_REWARD_MODEL, settings
    )


def add_validation(adapter: Path, line: str, table: list[str]) -> None:
    """The result of a validation into the adapter's card, before its "Use"; that of an earlier one is replaced."""
    path = adapter / "README.md"
    before, use, after = (path.read_text(encoding="utf-8") if path.is_file() else "").partition(USE)
    if use:
        section = "\n".join([VALIDATED, line, "", *table, "", ""])
        try:
            files.write_text(path, before.partition(VALIDATED)[0] + section + use + after)
        except OSError as error:  # a read-only adapter is validated all the same
            if disk_is_full(error):
                raise


def merged_card(adapter: Path, dtype: str) -> str:
    """The adapter's own card, for the merged model: other metadata, other code. Raises UserError for a card that is broken."""
    path = adapter / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "", ignore_metadata_errors=True)
    except Exception as error:  # YAML's own kinds, and the Hub's
        raise UserError(f"{path} is no model card: {first_line(error)}. Mend it, or remove it.") from None
    card.data.library_name = "transformers"
    before, _, after = card.text.partition(USE)
    before = before.replace("![reward curve](reward.png)\n\n", "").replace(
        "# A LoRA adapter for", "# Merged: a LoRA adapter for"
    )
    made = after.partition(MADE)[1:]
    stops = files.read_json(adapter / "generation_config.json").get("stop_strings") or []
    cut = f", for plain `generate` refuses them: cut an answer before the first of {', '.join(map(json.dumps, stops))}"
    left_out = f"\n\nStop strings are left out{cut}." if stops else ""
    return f"""---
{card.data.to_yaml()}
---
{before}{USE}
Merged in float32, written in {dtype}: plain weights, which transformers, vLLM and llama.cpp's converter read.{left_out}

```python
{USE_MERGED}```

{"".join(made)}"""
