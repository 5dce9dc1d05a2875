"""What the model sees: the chat template, prompts rendered by it, and their lengths."""

from collections.abc import Iterator

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from phi2_grpo.common.cli import UserError, first_line
from phi2_grpo.models.base import load_pretrained, resolve_model

# Answered by validate_model.py and export_model.py, and offered by the app.
SAMPLE_PROMPTS = [
    "Explain the theory of relativity to a 5 year old.",
    "Write a python function to calculate fibonacci numbers.",
    "What are the benefits of exercise?",
    "Tengo un problema con mi coche, hace un ruido extraño.",
]


# "Instruct: ...\nOutput:", the QA format of the model card. The answer follows with its leading space.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Instruct: ' + message['content'] | trim + '\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Output: ' + message['content'] | trim }}{{ '' if loop.last else '\\n' }}
{%- else -%}{{ message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Output:' }}{%- endif -%}"""


def prepare_tokenizer(tokenizer) -> None:
    """Set what a base model's tokenizer lacks; a chat template of its own stays."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE


def eos_token_ids(tokenizer) -> list[int]:
    """The tokens that end a turn: the tokenizer's own, then those that the base's generation config names beside it.

    `loading.load_tokenizer` sets `end_token_ids`; most chat models name several.
    """
    return getattr(tokenizer, "end_token_ids", None) or [tokenizer.eos_token_id]


def render(tokenizer, conversations: list[list[dict]]) -> list[str]:
    """Conversations as the model sees them, up to where its answer begins."""
    return [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in conversations]


def count_tokens(tokenizer, conversations: list[list[dict]]) -> list[int]:
    """Prompt lengths in tokens, chat template included."""
    if not conversations:
        return []
    # Not `tokenizer(...)["input_ids"]`: lists of Python ints for 10,000 prompts cost more than the tokenizing.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(render(tokenizer, conversations), add_special_tokens=False)
    return [len(encoding) for encoding in encodings]


def check_context(conversations: list[list[dict]], tokenizer, config: dict, context: int) -> int:
    """Tokens of the longest prompt. Raises UserError where that and the longest answer are more than the `context`."""
    longest = max(count_tokens(tokenizer, conversations))
    if longest + config["max_completion_length"] > context:
        raise UserError(
            f"the longest prompt has {longest} tokens; with max_completion_length {config['max_completion_length']} that is "
            f"more than the context of {context}. Give at most --max_completion_length {max(0, context - longest)}, or "
            "prepare the data with a smaller --max_prompt_tokens."
        )
    return longest


def check_vocabulary(tokenizer, base) -> None:
    """Raise UserError where the tokenizer has more tokens than the model has rows for."""
    if len(tokenizer) > base.config.get_text_config().vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens, and {base.config.name_or_path} {base.config.vocab_size:,}: "
            "they are not of one model. Copy them again, from one place."
        )


def load_tokenizer(config: dict):
    """The base's tokenizer, ready for GRPO: padding with the end token, on the left, and a chat template.

    A `[PAD]` token of its own would make PEFT save the embeddings; the end token serves, because masks rule.
    """
    tokenizer = load_pretrained(AutoTokenizer, config)
    prepare_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config['model']} has no end token (eos_token), so no answer could end.")
    tokenizer.end_token_ids = list(dict.fromkeys([tokenizer.eos_token_id, *_config_eos_ids(config)]))
    word = "plant"
    try:
        talk = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        rendered = word in tokenizer.apply_chat_template(talk, tokenize=False)
        counted = all(count_tokens(tokenizer, [talk[:1], [{"role": "user", "content": word * 9}]]))
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"the chat template of {config['model']} fails: {first_line(error)}. Mend or remove it.") from None
    if not rendered or not counted:
        raise UserError(f"the chat template of {config['model']} leaves out what is said, or its tokenizer has no tokens.")
    return tokenizer


def _config_eos_ids(config: dict) -> list[int]:
    """The end tokens that the base's generation_config.json names, or else its config.json."""
    name, revision = resolve_model(config)
    try:
        found = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # it has none
        found = load_pretrained(AutoConfig, config)
    except ValueError:  # sampling settings that transformers refuses; the ends are read all the same
        found = GenerationConfig.from_dict({})
    ends = getattr(found, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


FORWARD_TOKENS = 2048  # in one forward pass over prompts or answers, padding included


def batches_by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in batches of alike lengths, the shortest first, of at most FORWARD_TOKENS each, padding included."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
