"""What the model sees: the chat template, prompts rendered by it, and their lengths."""

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


def end_tokens(tokenizer) -> list[int]:
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
