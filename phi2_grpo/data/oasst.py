"""OpenAssistant's message trees: rows to messages, messages to prompts, references and ranked pairs.

The data: https://huggingface.co/datasets/OpenAssistant/oasst1, described in arXiv 2304.07327. A row is a message; a tree
is a root prompt with its replies, their follow-up questions, and so on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import sources
from phi2_grpo.data.prompts import normalize, split

ROLES = {"prompter": "user", "assistant": "assistant"}  # oasst1's name: the chat template's


class Message(NamedTuple):
    """One row, reduced to what the choice of prompts needs: oasst1's columns, with their types.

    An export leaves out columns that are null. pandas writes true as 1.0.
    """

    message_id: str
    text: str  # without white space at its ends
    role: str  # a key of ROLES
    lang: str
    parent_id: str | None
    message_tree_id: str | None
    rank: int | float | None  # among its siblings; 0 is the best
    deleted: bool | float | None
    review_result: bool | float | None  # false: rejected; null: never reviewed
    toxicity: int | float | None  # 0 to 1, out of the columns labels and detoxify

    @property
    def accepted(self) -> bool:
        return self.review_result in (True, None)

    @property
    def usable(self) -> bool:
        return bool(self.text) and self.accepted and not self.deleted


def is_message(row: dict) -> bool:
    """Whether a row has the columns by which oasst1's are known: a message's, or a complete tree's."""
    return {"message_id", "role", "text"} <= row.keys() or {"message_tree_id", "prompt"} <= row.keys()


def read_messages(source: str, revision: str) -> tuple[dict[str, list[Message]], str | None]:
    """All messages by split, as `sources.read_rows` splits them, and the commit of a data set of the Hub. Raises UserError."""
    splits, commit = sources.read_rows(source, revision)
    return {split: parse_messages(rows, f"{source} {split}") for split, rows in splits.items()}, commit


def parse_messages(rows: Iterable[dict], name: str) -> list[Message]:
    """All messages of the rows of a split. Raises UserError for a row that is not oasst1's, `name` saying of which source."""
    messages = []
    for number, row in enumerate(rows, 1):
        try:
            messages += parse_row(row)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            columns = ", ".join(Message._fields[:-1])
            raise UserError(f"{name}, row {number}: {error}. Needed are oasst1's columns: {columns}.") from None
    return messages


def parse_row(row: dict) -> list[Message]:
    """The message of a row; all messages, parents first, of a row that is a complete tree (replies inside their parents)."""
    if "prompt" not in row or "message_tree_id" not in row:
        return [_parse_message(row)]
    rows = [{**row["prompt"], "parent_id": None}]
    for each in rows:  # replies are appended in the loop, and read by it
        each["message_tree_id"] = row["message_tree_id"]
        rows += [{**reply, "parent_id": each["message_id"]} for reply in each.get("replies") or () if reply]
    return [_parse_message(each) for each in rows]


def _parse_message(row: dict) -> Message:
    row = {**row, "toxicity": _toxicity(row.get("labels") or {}, row.get("detoxify") or {})}
    message = Message(*(_clean(row.get(column)) for column in Message._fields))
    for (column, kind), value in zip(Message.__annotations__.items(), message, strict=True):
        if not isinstance(value, kind):
            raise ValueError(f"{column} is {value!r}, but it takes {getattr(kind, '__name__', kind)}")
    if message.role not in ROLES:
        raise ValueError(f"role is {message.role!r}, but it takes {' or '.join(ROLES)}")
    if message.parent_id and not message.message_tree_id:
        raise ValueError("message_tree_id is missing, and only a root can do without")
    tree = message.message_tree_id or message.message_id  # of a root
    return message._replace(text=message.text.strip(), message_tree_id=tree)


def _clean(value):
    """NaN, which pandas makes of null, as null; and no half of a surrogate pair, which JSON can say and UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if value != value else value


def _toxicity(labels: dict, detoxify: dict):
    """People's own label, else the classifier's (detoxify), else None.

    Labels are {"name": [...], "value": [...]} on the Hub, and {"toxicity": {"value": ...}} in OpenAssistant's exports.
    """
    if "name" in labels:
        labels = {name: {"value": value} for name, value in zip(labels["name"], labels["value"], strict=True)}
    return (labels.get("toxicity") or {"value": detoxify.get("toxicity")})["value"]


def filter_prompts(
    messages: list[Message],
    count_tokens: Callable[[list[list[dict]]], list[int]],
    languages: set[str],
    max_prompt_tokens: int,
    max_turns: int,
    max_toxicity: float,
) -> tuple[list[dict], dict[str, int]]:
    """The prompts of complete trees that pass every limit, duplicates included.

    `count_tokens` returns the lengths of conversations under the model's chat template. Returns rows (`prompt`, `lang`,
    `message_id`, `reference`, `pairs`) and the funnel: how many were left after each step, in order.
    """
    by_id = {message.message_id: message for message in messages}
    replies = defaultdict(list)
    for message in messages:
        if message.role == "assistant" and message.usable:
            replies[message.parent_id].append(message)

    def path_to(message: Message) -> list[Message]:
        """From the root down to `message`; empty where a parent is missing (an orphan), or the turns are too many."""
        path = [message]
        while path[-1].parent_id is not None:
            parent = by_id.get(path[-1].parent_id)
            if parent is None or parent.role == path[-1].role or len(path) >= 2 * max_turns - 1:
                return []
            path.append(parent)
        return path[::-1]

    paths = [path for message in messages if message.role == "prompter" and (path := path_to(message))]
    funnel = {"rows": len(messages), "roots" if max_turns == 1 else f"user turns, {max_turns} at most": len(paths)}
    steps = {
        "not deleted": lambda path: not any(message.deleted for message in path),
        "not rejected in review": lambda path: all(message.accepted for message in path),
        "wanted language": lambda path: path[-1].lang in languages,
        "toxicity": lambda path: all((message.toxicity or 0) <= max_toxicity for message in path),
        "not empty": lambda path: all(message.text for message in path),
    }
    for step, keeps in steps.items():
        paths = [path for path in paths if keeps(path)]
        funnel[step] = len(paths)

    prompts = [[_turn(message) for message in path] for path in paths]
    rows = []
    for path, prompt, length in zip(paths, prompts, count_tokens(prompts), strict=True):
        if length <= max_prompt_tokens:
            message = path[-1]
            row = {"prompt": prompt, "lang": message.lang, "message_id": message.message_id}
            rows.append({**row, **rank_replies(replies[message.message_id])})
    return rows, {**funnel, f"{max_prompt_tokens} tokens at most": len(rows)}


def _turn(message: Message) -> dict:
    return {"role": ROLES[message.role], "content": message.text}


def rank_replies(replies: list[Message]) -> dict:
    """Of the usable replies to one prompt: `reference`, the best, and `pairs` of one ranked above another."""
    ranked = sorted((reply for reply in replies if reply.rank is not None), key=lambda reply: reply.rank)
    best = ranked or (replies if len(replies) == 1 else [])  # a single reply has nothing to be ranked against
    pairs = [
        {"chosen": [_turn(better)], "rejected": [_turn(worse)]}
        for better, worse in combinations(ranked, 2)
        if better.rank < worse.rank and better.text != worse.text
    ]
    return {"reference": best[0].text if best else None, "pairs": pairs}


def sample_dialogues() -> list[dict]:
    """`prompt` and `reply` of the sample's train split, every usable reply; split as prepare_data splits it."""
    config = {**CONFIG, **PRESETS["tiny"]}
    messages = read_messages(config["dataset"], "")[0][""]
    trees = [message.message_tree_id for message in messages]
    splits = split(messages, config["validation_fraction"], config["split_seed"], trees)
    held_out = {normalize([_turn(message)]) for message in splits["validation"] if message.parent_id is None}
    usable = {message.message_id: message for message in splits["train"] if message.usable}
    pairs = [(usable.get(reply.parent_id), reply) for reply in usable.values() if reply.role == "assistant"]
    kept = [(prompt, reply) for prompt, reply in pairs if prompt and normalize([_turn(prompt)]) not in held_out]
    return [{"prompt": prompt.text, "reply": reply.text} for prompt, reply in kept]
