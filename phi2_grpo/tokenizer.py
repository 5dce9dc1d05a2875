"""The tokenizer, the chat template, and prompts as the model sees them. Imports no torch: preparing data needs none."""

import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from phi2_grpo.cli import UserError

if not sys.stderr.isatty():  # in a log file a progress bar is noise
    transformers.utils.logging.disable_progress_bar()

# "Instruct: ...\nOutput:", the QA format of the model card. The answer follows with its leading space.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Instruct: ' + message['content'] | trim + '\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Output: ' + message['content'] | trim }}{{ '' if loop.last else '\\n' }}
{%- else -%}{{ message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Output:' }}{%- endif -%}"""


def resolve_model(config: dict) -> tuple[str, str | None]:
    """The base model's folder or Hub id, and its revision (None for a folder). "tiny" is built at the first need."""
    if config["model"] == "tiny":
        from phi2_grpo.tiny import tiny_base  # it builds on this module

        return str(tiny_base()), None
    path = Path(config["model"]).expanduser()
    if path.exists():
        return str(path.resolve()), None
    return config["model"], config["model_revision"]


def load_pretrained(loader, config: dict, **options):
    """`loader.from_pretrained` for the configured base; UserError saying what to do where it cannot be had."""
    name, revision = resolve_model(config)
    try:
        return loader.from_pretrained(name, **({"revision": revision} if revision else {}), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the model {name}{f' (revision {revision})' if revision else ''} cannot be loaded: {reason}\n"
            f"  On a machine with network: hf download {name}; offline: HF_HUB_OFFLINE=1 once it is in the cache,\n"
            "  or --model FOLDER for a local copy. To try everything without the Hub: --preset tiny"
        ) from None


def load_tokenizer(config: dict):
    """The base's tokenizer, ready for GRPO: padding with the end token, on the left, and a chat template.

    A `[PAD]` token of its own would make PEFT save the embeddings; the end token serves, because masks rule.
    """
    tokenizer = load_pretrained(AutoTokenizer, config)
    prepare_tokenizer(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer) -> None:
    """Set what a base model's tokenizer lacks; a chat template of its own stays."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE


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
