"""train_grpo.py with completions that are fixed: of a prompt and its place in the whole batch, whatever process it falls to.

  torchrun --nproc_per_node 2 tests/spread.py FLAGS OF TRAIN_GRPO

For the tests of several processes: what is left is how the update is spread.
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


class Fixed:
    def __init__(self, model, *_):
        self.end = model.config.eos_token_id

    def __call__(self, prompts, generation, tokenizer=None):
        first, made = int(os.environ.get("RANK", "0")) * len(prompts), []
        for place, prompt in enumerate(prompts, first):
            draw = random.Random(f"{prompt} {place}")
            length = draw.randint(1, generation.max_new_tokens)
            made.append([draw.randrange(40, 200) for _ in range(length - 1)] + [self.end])
        return made


engine.make_engine = lambda name, *arguments: Fixed(*arguments)

if __name__ == "__main__":
    cli.run(train_grpo.main)
