"""What an answer is: one definition, for the rewards, the lengths and the scores of a validation.

A base model often goes on after its answer with "Exercise 3:", a new "Instruct:" or another dialogue. A length reward on all
its tokens would reward exactly that, so rewards and lengths are of the trimmed answer; loss and KL of the whole completion.
"""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import GenerationConfig

from phi2_grpo.common.cli import load_errors
from phi2_grpo.models.tokenizer import CHAT_TEMPLATE

# How Phi-2 goes on (https://huggingface.co/microsoft/phi-2 shows the prompt format). Exercises carry their number, so that a
# line like "Exercise helps" is no stop. Each adapter's generation_config.json has them.
STOP_STRINGS = ["\nInstruct:", "\nOutput:", "\nUser:", "\nHuman:", "\nExercise:", *(f"\nExercise {n}" for n in range(1, 10))]


@dataclass(frozen=True)
class Answer:
    """A completion, trimmed."""

    text: str
    ids: tuple[int, ...]  # of `text`, tokenized anew: odd ways to cut the same text into tokens are not rewarded as length
    ended: bool  # by itself: the end token came, and no stop string before it
    finish_reason: str  # in words, for people

    @property
    def tokens(self) -> int:
        return len(self.ids)


def stop_strings(tokenizer) -> list[str]:
    """STOP_STRINGS under Phi-2's prompt format; none where a model has its own template, and ends its turns by a token."""
    return STOP_STRINGS if str(tokenizer.chat_template).endswith(CHAT_TEMPLATE) else []


def trim(completion_ids: list[list[int]], tokenizer) -> list[Answer]:
    """Trim completions (lists of token ids, of any lengths) to what stands before the first stop string or end token."""
    if not completion_ids:
        return []
    eos_ids, stops = set(tokenizer.all_eos_ids), stop_strings(tokenizer)
    before_eos = [list(takewhile(lambda token: token not in eos_ids, ids)) for ids in completion_ids]
    texts, finished = tokenizer.batch_decode(before_eos, skip_special_tokens=True), []
    for i, text in enumerate(texts):
        start, stop = min(((text.find(stop), stop) for stop in stops if stop in text), default=(len(text), ""))
        texts[i] = text[:start].rstrip()  # white space at its end does not count
        ended = len(before_eos[i]) < len(completion_ids[i])
        reason = f"ran on into {stop.strip()!r}" if stop else "ended by itself" if ended else "cut off at the limit"
        finished.append((ended and not stop, reason))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Answer(text.strip(), tuple(own), *how) for text, own, how in zip(texts, ids, finished, strict=True)]


def chat_generation_config(tokenizer, config: dict, context: int) -> GenerationConfig:
    """How to chat with an adapter, for readers of its folder. Stop strings need `generate(..., tokenizer=tokenizer)`.

    A chat gets more tokens than a training's completions, within half of the `context`, so that answers can end by themselves.
    """
    return GenerationConfig(
        eos_token_id=tokenizer.all_eos_ids,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=min(max(256, 4 * config["max_completion_length"]), context // 2),
        do_sample=True,
        temperature=config["chat_temperature"],
        top_p=config["chat_top_p"],
        stop_strings=stop_strings(tokenizer) or None,
    )


def saved_generation_config(adapter: Path, tokenizer, config: dict, context: int) -> GenerationConfig:
    """The same, read back; made anew where an adapter trained elsewhere has none. Raises UserError where it is broken."""
    path = adapter / "generation_config.json"
    if not path.is_file():
        return chat_generation_config(tokenizer, config, context)
    with load_errors(f"{path} is broken", "Copy it again, or remove it: then the defaults take its place."):
        return GenerationConfig.from_pretrained(str(adapter))
