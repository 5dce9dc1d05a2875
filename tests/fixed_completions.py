"""train_grpo.py with completions that depend on the prompt and its index in the whole batch alone, not on the process.

torchrun --nproc_per_node 2 tests/fixed_completions.py FLAGS OF TRAIN_GRPO
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from phi2_grpo.common import cli, setup
from phi2_grpo.rollout import engine

setup.prepare("tiny")

import train_grpo  # noqa: E402


class FixedEngine:
    log_probs = None  # not known, as of generate

    def __init__(self, _, model, *__):
        self.eos = model.config.eos_token_id

    def __call__(self, prompts, generation, tokenizer=None):
        first = int(os.environ.get("RANK", "0")) * len(prompts)
        return [self.complete(f"{prompt} {i}", generation.max_new_tokens) for i, prompt in enumerate(prompts, first)]

    def complete(self, seed: str, longest: int) -> list[int]:
        draw = random.Random(seed)
        return [*(draw.randrange(40, 200) for _ in range(draw.randrange(longest))), self.eos]


engine.make_engine = FixedEngine

if __name__ == "__main__":
    cli.run(train_grpo.main)
