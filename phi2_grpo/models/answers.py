"""What an answer is: one definition, used by the rewards, the validation and the printed samples.

A base model goes on after its answer with "Exercise 3:", a new "Instruct:" or a dialogue of its own. A length reward on
all its tokens pays for exactly that, so everything here looks at the trimmed answer only.
"""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import GenerationConfig

from phi2_grpo.common.cli import UserError, first_line
from phi2_grpo.models.tokenizer import CHAT_TEMPLATE, eos_token_ids

# Where Phi-2 runs on (https://huggingface.co/microsoft/phi-2 shows the prompt format). Exercises carry their number, so
# that a line like "Exercise helps" is no stop. They are written to each adapter's generation_config.json for its readers.
STOP_STRINGS = ["\nInstruct:", "\nOutput:", "\nUser:", "\nHuman:", "\nExercise:", *(f"\nExercise {n}" for n in range(1, 10))]


def stop_strings(tokenizer) -> list[str]:
    """STOP_STRINGS under Phi-2's prompt format; none where a model has a template of its own, and ends its turns by a token."""
    return STOP_STRINGS if getattr(tokenizer, "chat_template", CHAT_TEMPLATE) == CHAT_TEMPLATE else []


@dataclass(frozen=True)
class Answer:
    """A completion, trimmed."""

    text: str
    # The tokens of `text`, as the tokenizer cuts it: neither what follows a stop nor trailing white space counts. Sampling may
    # cut the same text otherwise, so they can be a few more than were sampled; but odd cuts cannot be gamed for length.
    ids: tuple[int, ...]
    ended: bool  # by itself: the end token came, and no stop string before it
    why: str  # for people

    @property
    def tokens(self) -> int:
        """The length of the answer."""
        return len(self.ids)


def trim(completion_ids: list[list[int]], tokenizer) -> list[Answer]:
    """Trim completions (lists of token ids, of any lengths) to what stands before the first stop string or end token."""
    if not completion_ids:
        return []
    ends = set(eos_token_ids(tokenizer))
    cut = [list(takewhile(lambda token: token not in ends, ids)) for ids in completion_ids]
    has_end = [len(kept) < len(ids) for kept, ids in zip(cut, completion_ids, strict=True)]
    raw = tokenizer.batch_decode(cut, skip_special_tokens=True)
    known = stop_strings(tokenizer)
    stops = [min(((i, s) for s in known if (i := text.find(s)) >= 0), default=None) for text in raw]
    texts = [text[: stop[0]].rstrip() if stop else text.rstrip() for text, stop in zip(raw, stops, strict=True)]
    kept = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = []
    for text, ids, stop, end in zip(texts, kept, stops, has_end, strict=True):
        why = f"ran on into {stop[1].strip()!r}" if stop else "ended by itself" if end else "cut off at the limit"
        answers.append(Answer(text.strip(), tuple(ids), end and stop is None, why))
    return answers


def chat_generation_config(tokenizer, config: dict, context: int) -> GenerationConfig:
    """For readers of an adapter folder: how to chat with it. Stop strings need `generate(..., tokenizer=tokenizer)`.

    A chat gets more tokens than a training's completions, within half of the `context`: so that it is seen who ends by itself.
    """
    return GenerationConfig(
        eos_token_id=eos_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=min(max(256, 4 * config["max_completion_length"]), context // 2),
        do_sample=True,
        temperature=config["chat_temperature"],
        top_p=config["chat_top_p"],
        stop_strings=stop_strings(tokenizer) or None,
    )


def saved_generation_config(adapter: Path, tokenizer, config: dict, context: int) -> GenerationConfig:
    """The same, read back; made anew where an adapter trained elsewhere has none. Raises UserError where it is broken."""
    if not (adapter / "generation_config.json").is_file():
        return chat_generation_config(tokenizer, config, context)
    try:
        found = GenerationConfig.from_pretrained(str(adapter))
        for key in ("temperature", "top_p", "top_k", "max_new_tokens"):
            float(getattr(found, key) or 0)
        return found
    except Exception as error:  # of no JSON, of JSON that is no object, of a value that transformers refuses
        raise UserError(f"{adapter / 'generation_config.json'} is broken: {first_line(error)}. Copy it again whole.") from None
