"""What the model sees: the chat template, prompts rendered by it, and their lengths."""

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from phi2_grpo.common.cli import UserError, load_errors
from phi2_grpo.models.base import base_load_errors, load_pretrained, resolve_model

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


# Llama's and SmolLM3's prompts hold the date, and would be others on each day that a run goes on.
NO_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
QUESTION = [{"role": "user", "content": "Why?"}]  # to try a tokenizer with
FORWARD_TOKENS = 2048  # in one forward pass over prompts or answers, padding included


def load_tokenizer(config: dict):
    """The base's tokenizer, ready for GRPO. Raises UserError where it cannot be loaded, or lacks tokens.

    Its `all_eos_ids` are the tokens that end a turn: its own, those that the base's generation config names beside it, and what
    its chat template puts behind an answer.
    """
    tokenizer = load_pretrained(AutoTokenizer, config)
    prepare_tokenizer(tokenizer)
    with base_load_errors(config):  # a chat template is a program, and may raise anything
        length, turn_end = count_tokens(tokenizer, [QUESTION])[0], _turn_end_ids(tokenizer)
    if tokenizer.eos_token_id is None or not length:  # transformers makes an empty one where the files are missing
        raise UserError(f"the tokenizer of {config['model']} has no end token (eos_token), or no tokens. Copy it again.")
    # Not eos_token_ids, which transformers takes for the eos_token itself.
    tokenizer.all_eos_ids = list(dict.fromkeys([tokenizer.eos_token_id, *_config_eos_ids(config), *turn_end]))
    return tokenizer


def prepare_tokenizer(tokenizer) -> None:
    """Set what a base model's tokenizer lacks: left padding, with the end token, and a chat template unless it has its own.

    A `[PAD]` token of its own would make PEFT save the embeddings; the masks make the end token safe.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # as Llama's and Gemma's do
        tokenizer.chat_template = "{{ bos_token }}" * begins + CHAT_TEMPLATE
    if "strftime_now" in tokenizer.chat_template and not tokenizer.chat_template.startswith(NO_DATE):
        tokenizer.chat_template = NO_DATE + tokenizer.chat_template


def _turn_end_ids(tokenizer) -> list[int]:
    """The special token that the chat template puts behind an answer; a base's config may not name it (Qwen's does not)."""
    text = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "Because."}], tokenize=False)
    ids = tokenizer(text.rpartition("Because.")[2], add_special_tokens=False)["input_ids"][:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]


def _config_eos_ids(config: dict) -> list[int]:
    """The end tokens that the base's generation_config.json names, or else its config.json."""
    name, revision = resolve_model(config)
    try:
        named = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError):  # it has none, or one that transformers refuses
        named = load_pretrained(AutoConfig, config)
    ids = getattr(named, "eos_token_id", None)
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def render(tokenizer, conversations: list[list[dict]]) -> list[str]:
    """Conversations as the model sees them, up to where its answer begins."""
    # An empty list is refused by transformers.
    return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True) if conversations else []


def count_tokens(tokenizer, conversations: list[list[dict]]) -> list[int]:
    """Prompt lengths in tokens, chat template included."""
    texts, lengths = render(tokenizer, conversations), []
    # Not `tokenizer(...)["input_ids"]`, and not all at once: to hold so many results costs more than the tokenizing.
    for i in range(0, len(texts), 1000):
        lengths += map(len, tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False))
    return lengths


def check_context(conversations: list[list[dict]], tokenizer, config: dict, context: int) -> int:
    """Tokens of the longest prompt. Raises UserError where it and the longest answer are more than the `context`."""
    longest, new = max(count_tokens(tokenizer, conversations)), config["max_completion_length"]
    if longest + new > context:
        raise UserError(
            f"the longest prompt ({longest} tokens) and --max_completion_length {new} are more than the context of {context}. "
            f"Give --max_completion_length {max(0, context - longest)}, or prepare data with a smaller --max_prompt_tokens."
        )
    return longest


def check_vocabulary(tokenizer, base) -> None:
    """Raise UserError where the model has no row for a token that is used. An added one may be more: Gemma 3's for images."""
    prompt = tokenizer(render(tokenizer, [QUESTION]), add_special_tokens=False)["input_ids"][0]
    highest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id, *tokenizer.all_eos_ids, *prompt)
    if highest >= (rows := base.config.get_text_config().vocab_size):
        name = base.config.name_or_path
        raise UserError(f"the tokenizer has a token {highest:,}, and {name} {rows:,} rows: copy both again, from one place.")


def check_prompt_format(adapter: Path, tokenizer) -> None:
    """Raise UserError where an adapter brings a chat template under which a prompt reads otherwise than under its base's."""
    if (adapter / "tokenizer_config.json").is_file():
        with load_errors(f"the tokenizer in {adapter} is broken", "Copy it again, or remove it: the base's is used then."):
            own = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
            if own.chat_template is None:
                return
            prepare_tokenizer(own)
            if (text := render(own, [QUESTION])) == render(tokenizer, [QUESTION]):
                return
        raise UserError(
            f"{adapter} was trained with prompts like {text[0]!r}, and its base has another chat template. Put the adapter's "
            "tokenizer files into a copy of the base (hf download NAME --local-dir FOLDER), and give that: --model FOLDER"
        )


def batches_by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in batches, the shortest first, of at most FORWARD_TOKENS tokens each, padding included."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
