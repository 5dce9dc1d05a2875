"""The embedded base: a Phi of 2.2M parameters, made on the spot, so that the whole loop runs on a laptop.

It is the real PhiForCausalLM with a small config and a byte-level BPE tokenizer, trained on the train split of
sample/tiny.jsonl alone (held-out prompts stay new to it), and only far enough to answer in words and to stop
sometimes: GRPO needs something to improve.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from phi2_grpo.common import files, progress
from phi2_grpo.common.console import Console
from phi2_grpo.models.base import ROOT, TINY_FOLDER
from phi2_grpo.models.tokenizer import prepare_tokenizer, render

TINY_SAMPLE = ROOT / "sample" / "tiny.jsonl"
END = "<|endoftext|>"

# hidden 160 x 4 layers and 2 x 3072 x 160 embeddings. Changing anything here, or the sample, builds the model anew.
RECIPE = {"vocab_size": 3072, "hidden_size": 160, "layers": 4, "heads": 4, "context": 1024,
          "steps": 350, "batch": 16, "max_length": 192, "learning_rate": 3e-3, "runs_on": 0.5, "seed": 0}  # fmt: skip


def prepare(model: str, load_dialogues: Callable[[], list[dict]]) -> None:
    """Build the tiny base in TINY_FOLDER unless it is there and current, or `model` is another.

    `load_dialogues` returns the rows that it is trained on, with the texts `prompt` and `reply`. The scripts hand it over, so
    that this folder needs nothing of data/.
    """
    if model != "tiny":
        return
    fingerprint = hashlib.sha256(json.dumps(RECIPE).encode() + TINY_SAMPLE.read_bytes()).hexdigest()
    TINY_FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(TINY_FOLDER.with_name(".tiny-base.lock")):  # of several processes one builds, the others wait
        if files.read_json(TINY_FOLDER / "built-from.json").get("fingerprint") == fingerprint:
            return
        Console().print("Building the tiny base model (once, about a minute on two cores) ...")
        with files.atomic_folder(TINY_FOLDER) as folder:
            _build(load_dialogues(), folder)
            files.write_json(folder / "built-from.json", {"fingerprint": fingerprint})


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, the end token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=RECIPE["vocab_size"], special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, unk_token=END)
    prepare_tokenizer(tokenizer)
    return tokenizer


def _build(dialogues: list[dict], folder: Path) -> None:
    """Train tokenizer and model into `folder`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # seconds to import, and rarely needed

    tokenizer = train_tokenizer([text for dialogue in dialogues for text in dialogue.values()])
    prompts = render(tokenizer, [[{"role": "user", "content": dialogue["prompt"]}] for dialogue in dialogues])
    texts = [f"{prompt} {dialogue['reply']}" for prompt, dialogue in zip(prompts, dialogues, strict=True)]
    # Like Phi-2, whose textbooks are full of exercises, it learns to run on into the next question about as often as to end.
    draw = random.Random(RECIPE["seed"])
    rows = [{"text": text if draw.random() > RECIPE["runs_on"] else f"{text}\n{draw.choice(texts)}"} for text in texts]
    config = PhiConfig(
        vocab_size=RECIPE["vocab_size"],
        hidden_size=RECIPE["hidden_size"],
        intermediate_size=4 * RECIPE["hidden_size"],
        num_hidden_layers=RECIPE["layers"],
        num_attention_heads=RECIPE["heads"],
        max_position_embeddings=RECIPE["context"],
        resid_pdrop=0.1,  # as Phi-2 has it, so that forgetting to switch dropout off shows here too
        **{key: tokenizer.eos_token_id for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=RECIPE["steps"],
        learning_rate=RECIPE["learning_rate"],
        per_device_train_batch_size=RECIPE["batch"],
        lr_scheduler_type="cosine",
        warmup_steps=20,
        seed=RECIPE["seed"],
        max_length=RECIPE["max_length"],
        train_sampling_strategy="group_by_length",  # less padding, twice as fast
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # sums depend on their number: so every machine and test gets the same base
    torch.manual_seed(RECIPE["seed"])
    trainer = SFTTrainer(
        PhiForCausalLM(config),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[progress.ProgressBar("tiny base")],
    )
    progress.silence_printing(trainer)
    trainer.train()
    torch.set_num_threads(threads)
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
