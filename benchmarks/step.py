"""A GRPO step by part: ours, stock TRL with the same settings, and a widely copied recipe.

  python benchmarks/step.py --model full           # Phi-2's size, random weights (preset phi2); nothing is downloaded
  python benchmarks/step.py --model tiny           # preset tiny, on the CPU
  python benchmarks/step.py --model FOLDER --data DATA_DIR --steps 4 --turns 2    # of 16 completions of up to 96 tokens

Each turn is a process of its own, in the order A B C A B C; its first two steps are not counted, the capture of CUDA graphs
after them is. Stock is TRL's GRPOTrainer with the settings of ours, its rollout by generate. The copied recipe: 1 x 4
completions, two generations, checkpointing on, TRL's other defaults.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("ours", "stock", "recipe")
PARTS = ("rollout", "rewards", "log_probs", "update")
WARMUP = 2


def work(side: str, name: str, data: str, steps: int) -> dict:
    """Train `steps` steps as `side` does; seconds by part and samples a second of those after the first two."""
    from phi2_grpo.common import setup

    setup.prepare("tiny")
    import torch
    from datasets import load_from_disk
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks import models
    from phi2_grpo.common import progress
    from phi2_grpo.models.lora import lora_config
    from phi2_grpo.rollout.cache import free_memory
    from phi2_grpo.rollout.engine import make_engine
    from phi2_grpo.training import memory
    from phi2_grpo.training.outputs import hardware_name
    from phi2_grpo.training.trainer import Trainer, training_arguments

    config, (device, dtype) = models.setting(name), models.device_of(name)
    base, tokenizer = models.base_of(name)
    settings = config
    if side == "recipe":
        settings = {key: config[key] for key in ("max_completion_length", "seed")}
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 2}
        settings |= {"activation_checkpointing": True, "learning_rate": 1e-5}
    settings = {**settings, "max_steps": steps, "save_strategy": "no", "report_to": "none"}
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    def length(completion_ids, **_):
        return [min(1.0, len(ids) / config["target_tokens"]) for ids in completion_ids]

    class Timed(Trainer):
        """Ours, which logs where the seconds of a step went: `seconds/rollout`, `rewards`, `log_probs` (of the reference) and
        `update` (forward and backward). The optimizer itself, which comes after them, is in none."""

        def __init__(self, *arguments, **keywords):
            self.seconds = defaultdict(float)
            super().__init__(*arguments, **keywords)

        def now(self) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()  # kernels run on behind the host; a few waits a step cost nothing
            return time.perf_counter()

        def timed(self, part: str, method, *arguments, **keywords):
            """Call `method`; its seconds, less those of the parts in it, are added to `part`."""
            started, before = self.now(), sum(self.seconds.values())
            result = method(*arguments, **keywords)
            self.seconds[part] += self.now() - started - (sum(self.seconds.values()) - before)
            return result

        def _generate_single_turn(self, *arguments, **keywords):
            return self.timed("rollout", super()._generate_single_turn, *arguments, **keywords)

        def _calculate_rewards(self, *arguments, **keywords):
            return self.timed("rewards", super()._calculate_rewards, *arguments, **keywords)

        def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
            method = super()._get_per_token_logps_and_entropies
            if torch.is_grad_enabled():  # a part of the update
                return method(*arguments, **keywords)
            return self.timed("log_probs", method, *arguments, **keywords)

        def training_step(self, *arguments, **keywords):
            return self.timed("update", super().training_step, *arguments, **keywords)

        def log(self, logs: dict, start_time: float | None = None) -> None:
            logs.update({f"seconds/{part}": round(seconds, 4) for part, seconds in self.seconds.items()})
            self.seconds.clear()
            super().log(logs, start_time)

    class Stock(Timed):
        """TRL's own passes over padded rows."""

        _logps = GRPOTrainer._get_per_token_logps_and_entropies

    with tempfile.TemporaryDirectory() as scratch:
        trainer = (Timed if side == "ours" else Stock)(
            model=base,
            reward_funcs=length,
            args=training_arguments(GRPOConfig, settings, device, dtype, output_dir=scratch, disable_dropout=True),
            train_dataset=load_from_disk(str(Path(data) / "oasst1_prompts"))["train"],
            processing_class=tokenizer,
            peft_config=lora_config(config, base),
            callbacks=[Clock()],
        )  # fmt: skip
        progress.silence_printing(trainer)
        if side == "ours":
            wrapped = trainer.accelerator.unwrap_model(trainer.model)
            parts = memory.estimate(config, wrapped, 64, device, dtype, free_memory(device))
            trainer.engine = make_engine("auto", wrapped, reserve=memory.reserved_bytes(parts))
        trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row][WARMUP:]
    seconds = (times[-1] - times[WARMUP - 1]) / (steps - WARMUP)
    count = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return {
        "step": seconds,
        "samples": count / seconds,
        "peak": models.peak_bytes(device),
        "tokens": sum(row["completions/mean_length"] for row in rows) / len(rows),
        "machine": f"{hardware_name(device)}, {str(dtype).removeprefix('torch.')}",
        **{part: sum(row[f"seconds/{part}"] for row in rows if f"seconds/{part}" in row) / len(rows) for part in PARTS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="full|tiny|FOLDER", default="tiny")
    parser.add_argument("--data", metavar="DIR", default=str(ROOT / "data" / "tiny"), help="of prompts that were prepared")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--side", choices=SIDES, help="one turn of this side alone, printed as JSON")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(work(arguments.side, arguments.model, arguments.data, arguments.steps)))
        return
    from benchmarks.models import middle, prepared
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    prepared()
    runs = {side: [] for side in arguments.sides.split(",")}
    for turn in range(arguments.turns):
        for side in runs:
            command = [sys.executable, __file__, "--side", side, "--model", arguments.model, "--data", arguments.data,
                       "--steps", str(arguments.steps)]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}, {side}: {runs[side][-1]['step']:.2f} s a step", flush=True)
    rows = []
    for side, turns in runs.items():
        values = {key: [turn[key] for turn in turns] for key in ("samples", "step", *PARTS, "tokens", "peak")}
        parts = [f"{sum(values[part]) / len(turns):.3f}" for part in PARTS]
        tokens, peak = f"{sum(values['tokens']) / len(turns):.1f}", f"{max(values['peak']) / 1e9:.2f}"
        rows.append((side, middle(values["samples"]), middle(values["step"]), *parts, tokens, peak))
    lines = markdown_table(("", "samples/s", "s a step", *PARTS, "tokens a completion", "peak, GB"), rows)
    ratios = {
        f"{what} {{}} times {name}": [turn(ours, other) for ours, other in zip(runs["ours"], runs.get(side, []), strict=False)]
        for what, side, name, turn in (
            ("step", "stock", "stock TRL", lambda ours, stock: stock["step"] / ours["step"]),
            ("rollout", "stock", "stock TRL", lambda ours, stock: stock["rollout"] / ours["rollout"]),
            ("update", "stock", "stock TRL", lambda ours, stock: stock["update"] / ours["update"]),
            ("samples", "recipe", "the copied recipe", lambda ours, recipe: ours["samples"] / recipe["samples"]),
        )
    }
    sentences = [text.format(middle(values)) for text, values in ratios.items() if values]
    note = f"{runs['ours'][0]['machine']}; {arguments.turns} turns of {arguments.steps} steps, the first {WARMUP} not counted."
    body = "\n".join(lines) + f"\n\n{note} Medians [lowest, highest].\n\n" + "\n\n".join(sentences)
    command = " ".join(["python benchmarks/step.py", *sys.argv[1:]])
    write_section(f"A GRPO step, {Path(arguments.model).name}", command, body, "torch", "transformers", "trl", "peft")


if __name__ == "__main__":
    main()
