"""Prompts of the user's own: rows of the usual forms to conversations, references and pairs.

The forms are TRL's (https://huggingface.co/docs/trl/dataset_formats), OpenAI's messages, ShareGPT's conversations, Alpaca's
instructions, HH-RLHF's dialogues, and questions with answers. What a row has beside them reaches the rewards by its name.
"""

import ast
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from decimal import Decimal
from itertools import chain, islice, product
from pathlib import Path
from typing import NamedTuple

from phi2_grpo.common.cli import UserError
from phi2_grpo.common.languages import language_identifier

ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system", "developer": "system"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"
)
# Columns that hold a prompt, alone or with those beside it, in the order in which they are looked for.
PROMPT_COLUMNS = ("messages", "conversations", "prompt", "instruction", "question", "chosen")
FOLLOWING = ("input", "context", "passage")  # what an instruction or a question is about; read behind it
REFERENCE_COLUMNS = ("reference", "answer", "completion", "output", "response", "solution", "ground_truth")
# Names under which rewards get something else than a column.
TAKEN = {"pairs", "prompts", "completions", "completion", "completion_ids", "answers", "answer_ids", "answer_tokens", "ended",
         "target_tokens", "format_regex", "trainer_state", "log_metric", "log_extra", "image", "images", "tools"}  # fmt: skip
UNKNOWN = "und"  # ISO 639's code for an undetermined language


class Form(NamedTuple):
    """Which columns of the rows are read as what; an empty name where there is none."""

    prompt: str
    follows: str  # one of FOLLOWING
    system: str  # a system message of the row's own
    reference: str
    pairs: bool  # chosen and rejected are there
    lang: str
    id: str
    others: tuple[str, ...]  # all further columns: rewards get them by their names, but those of TAKEN

    def __str__(self) -> str:
        used = dict(zip(("prompt", "with", "system", "reference", "pairs", "language", "id"), self, strict=False))
        used["pairs"] = "chosen and rejected" if self.pairs else ""
        used["for rewards"] = " and ".join(column for column in self.others if column not in TAKEN)
        used["left out, a reserved name"] = " and ".join(column for column in self.others if column in TAKEN)
        return ", ".join(f"{what} = {column}" for what, column in used.items() if column)


def find_form(rows: list[dict], prompt_column: str, reference_column: str) -> Form:
    """The form of the rows, of which some of the first are enough. Raises UserError where none fits, or a column is missing."""
    columns = {column: None for row in rows for column in row}
    keys = {f"{column}.{key}" for row in rows for column, value in row.items() if isinstance(value, dict) for key in value}

    def first(*names: str) -> str:
        return next((name for name in names if name in columns), "")

    known = {"prompt_column": list(columns), "reference_column": [*columns, *sorted(keys)]}
    for flag, name in (("prompt_column", prompt_column), ("reference_column", reference_column)):
        if name and name not in known[flag]:
            raise UserError(f"--{flag} {name}: there is no such column. There are: {', '.join(known[flag])}.")
    pairs = {"chosen", "rejected"} <= columns.keys()
    prompt = prompt_column or first(*PROMPT_COLUMNS[: None if pairs else -1])
    if not prompt:
        raise UserError(
            f"no column of the data is known to hold prompts; there are: {', '.join(columns)}. Give --prompt_column COLUMN, "
            f"and --reference_column COLUMN for the right or best answer. Known: {', '.join(PROMPT_COLUMNS[:-1])}."
        )
    reference = reference_column or first(*(name for name in REFERENCE_COLUMNS if name != prompt))
    about = [name for name in FOLLOWING if prompt in ("instruction", "question") and name in columns]
    texts = (name for name in about if any(_text(row.get(name)) for row in rows))  # and no objects
    follows = next(texts, "") or next((name for name in about if not any(row.get(name) for row in rows)), "")
    used = (prompt, follows, first("system", "system_prompt"), reference, pairs, first("lang"), first("message_id", "id"))
    others = columns.keys() - {*used, "prompt", *(("chosen", "rejected") if pairs else ())}
    return Form(*used, tuple(sorted(others)))


def parse_row(row: dict, form: Form, system_prompt: str, number: str) -> dict | None:
    """The prompt of a row with all that belongs to it, or None where it has none that a chat can begin with.

    Returns `prompt` (a conversation that ends with the user), `lang`, `message_id` (`number` where the row has no id),
    `reference`, `pairs`, and the other columns.
    """
    value = row.get(form.prompt)
    turns = _turns(row.get("prompt") if form.prompt in PROMPT_COLUMNS[:2] and not value else value)
    if turns and form.follows and (more := _text(row.get(form.follows))):
        turns[-1]["content"] += f"\n\n{more}"
    reference = _reference(row, form.reference) if form.reference else None
    if form.reference == "completion" and str(row.get("label")).lower() == "false":
        reference = None  # of TRL's unpaired preferences, a bad reply
    pairs = []
    if form.pairs and turns:
        chosen, rejected = _turns(row.get("chosen")), _turns(row.get("rejected"))
        shared = chosen[:-1] if chosen and rejected and chosen[:-1] == rejected[:-1] else None
        if form.prompt == "chosen" or (shared and len(shared) > len(turns)):  # the prompt is what both begin with
            turns = shared
        if turns and shared is not None:
            pair = {name: [{"role": "assistant", "content": each[-1]["content"]}]
                    for name, each in (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
            pairs, reference = [pair] * (pair["chosen"] != pair["rejected"]), reference or chosen[-1]["content"]
    prompt, reply = _cut(turns or [])
    if not prompt:
        return None
    if (system := _text(row.get(form.system)) or system_prompt) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    lang, own_id = (row.get(column) if column else None for column in (form.lang, form.id))
    used = {form.prompt, form.follows, form.system, *TAKEN, *(("chosen", "rejected") if form.pairs else ())}
    return {
        **{column: value for column, value in row.items() if column not in used},
        "prompt": prompt,
        "lang": lang if isinstance(lang, str) and lang.strip() else UNKNOWN,
        "message_id": number if own_id in (None, "") else str(own_id),
        "reference": reference or reply,
        "pairs": pairs,
    }


def _reference(row: dict, name: str) -> str | None:
    """The text of a column, or of a key of a column of objects (verl's reward_model.ground_truth); of several, the first."""
    column, _, key = (name, "", "") if name in row else name.partition(".")
    value = row.get(column)
    value = _conversation((value.get(key) if isinstance(value, dict) else None) if key else value)
    value = value[0] if isinstance(value, list) and value and not isinstance(value[0], dict) else value
    return str(value) if isinstance(value, bool) else _text(value)


def _conversation(value):
    """A turn alone, or a conversation stored as a text, as a list: in JSON, in Python (by pandas), or as HH-RLHF has it."""
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        texts = (value, re.sub(r"\}\s+\{", "}, {", value))  # numpy writes no commas
        for read, text in product((json.loads, ast.literal_eval), texts):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                turns = read(text)
                return turns if all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns) else value
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        return [{"role": role, "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]
    return value


def _turns(value) -> list[dict] | None:
    """A text as a question, or a list of turns as `role` and `content`; turns of one role in a row become one.

    None where the value is neither, or has a role that is no speaker's or a content that is no text.
    """
    value = _conversation(value)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return [{"role": "user", "content": text}] if (text := _text(value)) else []
    turns: list[dict] = []
    for turn in value if isinstance(value, list) else [None]:
        turn = turn if isinstance(turn, dict) else {}
        role, given = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or (role := ROLES.get(role.lower())) is None:
            return None
        if not (content := _text(given)):
            if isinstance(given, (list, dict)) and given:  # an image, or anything else that is no text
                return None
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def _text(value) -> str | None:
    """A text, a number, the texts of OpenAI's content parts, or of TRL's list of one message; None for nothing of them."""
    if isinstance(value, list):
        parts = [part.get("text", part.get("content")) if isinstance(part, dict) else None for part in value]
        value = "\n".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if value is None or isinstance(value, (bool, dict)) or value != value:
        return None
    if isinstance(value, float) and abs(value) < float("inf"):
        value = f"{Decimal(repr(value)):f}"  # 5e-05 is no text that people write
    return str(value).encode("utf-8", "replace").decode().strip() or None


def _cut(turns: list[dict]) -> tuple[list[dict], str | None]:
    """The turns before the last of the assistant's, and that one's text; without what stands before the first question."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    turns = turns[len(system) :]
    while turns and turns[0]["role"] != "user":
        turns = turns[1:]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answers and turns[-1]["role"] == "assistant":
        return system + turns[: answers[-1]], turns[answers[-1]]["content"]
    return (system + turns, None) if turns else ([], None)


def peek(splits: dict[str, Iterable[dict]], count: int = 1000) -> tuple[list[dict], dict[str, Iterable[dict]]]:
    """Some of the first rows of each split, and all of them again."""
    firsts, again = [], {}
    for name, rows in splits.items():
        rows = iter(rows)
        first = list(islice(rows, count))
        firsts += [row for row in first if isinstance(row, dict)]
        again[name] = chain(first, rows)
    return firsts, again


def name_of(source: str) -> str:
    """What the prepared data is called: the Hub's name, the folder's or the file's, without what no file name takes."""
    name = Path(source.rstrip("/")).name
    while (stem := re.sub(r"\.(gz|jsonl|json|csv|tsv|txt|parquet)$", "", name)) != name:
        name = stem
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "own"


def read(splits: dict[str, Iterable[dict]], form: Form, system_prompt: str) -> dict[str, list[dict | None]]:
    """The rows of each split as `parse_row` parses them."""
    numbered = {split: enumerate(rows, 1) for split, rows in splits.items()}
    return {
        split: [parse_row(row, form, system_prompt, f"{split or 'row'}-{number}") if isinstance(row, dict) else None
                for number, row in rows]
        for split, rows in numbered.items()
    }  # fmt: skip


def same_prompts(rows: list[dict | None]) -> list[str]:
    """What `split` takes for trees: rows of one prompt, as those of several answers to it; `deduplicate` sees to follow-ups."""
    return [normalize(row["prompt"]) if row else "" for row in rows]


def split(items: list, fraction: float, seed: int, trees: list[str]) -> dict[str, list]:
    """Train and validation. `trees` has the id of each item's tree; no tree is divided: a reply's question is on its side."""
    order = sorted(set(trees))
    random.Random(seed).shuffle(order)
    held_out = set(order[: round(len(order) * fraction)])
    splits = {"train": [], "validation": []}
    for item, tree in zip(items, trees, strict=True):
        splits["validation" if tree in held_out else "train"].append(item)
    return splits


def guess_languages(splits: dict[str, list[dict | None]]) -> None:
    """Put py3langid's guess where a row names no language."""
    for row in chain.from_iterable(splits.values()):
        if row and row["lang"] == UNKNOWN:
            row["lang"] = language_identifier().classify(row["prompt"][-1]["content"])[0]


def filter_prompts(
    rows: list[dict | None],
    count_tokens: Callable[[list[list[dict]]], list[int]],
    languages: set[str],
    max_prompt_tokens: int,
) -> tuple[list[dict], dict[str, int]]:
    """The rows that pass every limit, duplicates included, and the funnel: how many were left after each step, in order."""
    funnel = {"rows": len(rows)}
    rows = [row for row in rows if row]
    funnel["with a question"] = len(rows)
    rows = [row for row in rows if row["lang"] in languages]
    funnel["wanted language"] = len(rows)
    lengths = count_tokens([row["prompt"] for row in rows])
    rows = [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_tokens]
    return rows, {**funnel, f"{max_prompt_tokens} tokens at most": len(rows)}


def wanted_languages(languages: str, known: set[str]) -> set[str]:
    """The codes that `languages` names ("all" or a list). Raises UserError for one that the source does not have."""
    wanted = known if languages == "all" else {code.strip() for code in languages.split(",")}
    if unknown := wanted - known:
        raise UserError(f"--languages: the source has no {', '.join(sorted(unknown))}. It has: {', '.join(sorted(known))}.")
    return wanted


def normalize(conversation: list[dict]) -> str:
    """What makes two conversations the same prompt: their text after Unicode (NFKC), case and white-space folding."""
    text = "\0".join(turn["content"] for turn in conversation)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def deduplicate(rows: list[dict], held_out: set[str]) -> tuple[list[dict], list[dict], set[str]]:
    """Prompts and pairs of the rows, each normalized prompt once, and the set of those.

    Left out is what stands in `held_out`, and a follow-up of it: its first turns would show the model what is held out.
    """
    distinct = {}
    for row in rows:
        first = distinct.setdefault(normalize(row["prompt"]), row)
        if first is not row:  # the same question with another pair of answers
            first["reference"] = first["reference"] or row["reference"]
            first["pairs"] = first["pairs"] + [pair for pair in row["pairs"] if pair not in first["pairs"]]
    prompts = []
    for row in distinct.values():
        beginnings = (row["prompt"][: i + 1] for i, turn in enumerate(row["prompt"]) if turn["role"] == "user")
        if held_out.isdisjoint(map(normalize, beginnings)):
            prompts.append(row)
    return prompts, [{**row, **pair} for row in prompts for pair in row["pairs"]], set(distinct)
