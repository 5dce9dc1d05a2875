"""Memory that a reward model takes: on the policy's own weights, and loaded beside it.

  python benchmarks/reward_memory.py [--model full|tiny]

full is Phi-2's size with random weights in bfloat16: nothing is downloaded, about 6 GB are written to a temporary folder. Each
variant is a process of its own, which loads policy and reward model and scores two answers: its resident memory on a CPU, its
allocated memory on a GPU.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from phi2_grpo.common import setup  # noqa: E402, it stands in the folder above

VARIANTS = ("policy alone", "reward model on its weights", "reward model beside it")


def make(folder: Path, size: str) -> None:
    """A base, and an untrained reward adapter on it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from benchmarks import models
    from config import CONFIG
    from phi2_grpo.models import embedded
    from phi2_grpo.models.base import EMBEDDED, new_reward_head
    from phi2_grpo.models.lora import lora_config

    base = folder / "base"
    if size == "full":
        models.full_size_phi2(torch.bfloat16).save_pretrained(base)
        embedded.train_tokenizer(embedded.TINY_SAMPLE.read_text(encoding="utf-8").splitlines()[:50]).save_pretrained(base)
    else:
        base.symlink_to(EMBEDDED["tiny"])
    config = {**CONFIG, "model": str(base)}
    reward_model = new_reward_head(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto"))
    reward_model = get_peft_model(reward_model, lora_config(config, reward_model, "SEQ_CLS"))
    reward_model.save_pretrained(folder / "reward")


def measure(folder: Path, variant: str) -> None:
    """Prints what is held at the end, and the peak, in bytes."""
    import torch

    from benchmarks.models import peak_bytes
    from config import CONFIG
    from phi2_grpo.models.base import load_base
    from phi2_grpo.rewards.reward_model import RewardModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if (folder / "base" / "model.safetensors").stat().st_size > 1e9 else torch.float32
    config = {**CONFIG, "model": str(folder / "base")}
    base = load_base(config, device, dtype)
    with torch.no_grad():
        base(torch.arange(64, device=device)[None])
    if variant != "policy alone":
        reward_model = RewardModel(str(folder / "reward"))
        if variant == "reward model beside it":
            reward_model.shares_base_of = lambda config: False  # as if its base were another
        reward_model.load(config, base, device, dtype)
        reward_model(prompts=[[{"role": "user", "content": "Why?"}]] * 2, answers=["Because it is so.", "Nobody knows."])
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
    else:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    print(f"memory {held} {peak_bytes(device)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("full", "tiny"), default="full")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "VARIANT"), help="for the processes that this one starts")
    arguments = parser.parse_args()
    setup.prepare()
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1])
        return
    import torch

    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.model)
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--measure", folder, variant]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            sizes[variant] = [int(size) for size in done.stdout.rpartition("memory ")[2].split()]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, resident memory of the whole process"
    alone = sizes["policy alone"][0]
    rows = [
        (variant, *(f"{size / 1e9:.2f} GB" for size in (held, held - alone, peak))) for variant, (held, peak) in sizes.items()
    ]
    lines = markdown_table(("", "held", "more than the policy alone", "peak, loading included"), rows)
    size = "Phi-2's size, random weights in bfloat16" if arguments.model == "full" else "the tiny model"
    body = "\n".join(lines) + f"\n\n{size}; {where}; LoRA r 16 in float32 and a head as the reward model."
    title = "A reward model's memory" + ("" if arguments.model == "full" else ", tiny")
    write_section(title, f"python benchmarks/reward_memory.py --model {arguments.model}", body, "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
