"""From OpenAssistant's message trees (reading.py) to prompts, references and ranked pairs."""

import difflib
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import sources
from phi2_grpo.data.sources import Message


def validation_trees(trees: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Whole trees for validation, so that no reply's question stands on the other side."""
    trees = sorted(trees)
    random.Random(seed).shuffle(trees)
    return set(trees[: round(len(trees) * fraction)])


def normalize(conversation: list[dict]) -> str:
    """What makes two conversations the same prompt: their text after Unicode (NFKC), case and white-space folding."""
    text = "\0".join(turn["content"] for turn in conversation)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_languages(languages: str, found: Counter) -> set[str] | None:
    """The wanted language codes, or None for all. Raises UserError for one that the source does not have."""
    wanted = {code.strip() for code in languages.split(",") if code.strip()}
    if "all" in wanted or not wanted:
        return None
    for code in sorted(wanted - set(found)):
        near = difflib.get_close_matches(code, found, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"--languages: the source has no {code!r}.{hint} It has: {', '.join(sorted(found))}.")
    return wanted


def filter_prompts(
    messages: list[Message],
    count_tokens: Callable[[list[list[dict]]], list[int]],
    languages: set[str] | None,
    max_prompt_tokens: int,
    max_turns: int,
    max_toxicity: float,
) -> tuple[list[dict], dict[str, int]]:
    """The prompts of whole trees that pass every limit, duplicates included.

    Args:
        messages: of whole trees.
        count_tokens: token counts of conversations under the model's chat template.

    Returns:
        rows (`prompt`, `lang`, `message_id`, `reference`, and `pairs`: `chosen`, `rejected` and `rank_distance` of ranked
        replies) and the funnel: how many were left after each step, in order.
    """
    by_id = {message.id: message for message in messages}
    replies = defaultdict(list)
    for message in messages:
        if message.role == "assistant" and message.usable and message.reviewed and message.text.strip():
            replies[message.parent].append(message)

    def path_to(message: Message) -> list[Message]:
        """From the root down to `message`; empty where a parent is missing (an orphan), or the turns are too many."""
        path = [message]
        while path[-1].parent is not None:
            parent = by_id.get(path[-1].parent)
            if parent is None or parent.role == path[-1].role or len(path) >= 2 * max_turns - 1:
                return []
            path.append(parent)
        return path[::-1]

    funnel = {"rows": len(messages)}
    paths = [path for m in messages if m.role == "prompter" and (max_turns > 1 or m.parent is None) if (path := path_to(m))]
    funnel["roots" if max_turns == 1 else f"user turns, {max_turns} at most"] = len(paths)
    steps = {
        "not deleted": lambda path: all(message.usable for message in path),
        "not rejected in review": lambda path: all(message.reviewed for message in path),
        "wanted language": lambda path: languages is None or path[-1].lang in languages,
        "toxicity": lambda path: max_toxicity >= 1 or all((message.toxicity or 0) <= max_toxicity for message in path),
        "not empty": lambda path: all(message.text.strip() for message in path),
    }
    for step, keeps in steps.items():
        paths = [path for path in paths if keeps(path)]
        funnel[step] = len(paths)

    roles = {"prompter": "user", "assistant": "assistant"}
    conversations = [[{"role": roles.get(m.role, m.role), "content": m.text.strip()} for m in path] for path in paths]
    lengths = count_tokens(conversations)
    rows = []
    for path, conversation, length in zip(paths, conversations, lengths, strict=True):
        if length > max_prompt_tokens:
            continue
        message = path[-1]
        ranked = sorted((reply for reply in replies[message.id] if reply.rank is not None), key=lambda reply: reply.rank)
        alone = replies[message.id] if len(replies[message.id]) == 1 else []  # a single reply has nothing to rank against
        best = (ranked or alone or [None])[0]
        pairs = []
        for i, better in enumerate(ranked):
            for worse in ranked[i + 1 :]:
                if better.rank < worse.rank and better.text.strip() != worse.text.strip():  # equal ranks say nothing
                    sides = {side: [{"role": "assistant", "content": reply.text.strip()}]
                             for side, reply in (("chosen", better), ("rejected", worse))}  # fmt: skip
                    pairs.append({**sides, "rank_distance": worse.rank - better.rank})
        origin = {"lang": message.lang, "message_id": message.id}
        rows.append({"prompt": conversation, **origin, "reference": best.text.strip() if best else None, "pairs": pairs})
    funnel[f"{max_prompt_tokens} tokens at most"] = len(rows)
    return rows, funnel


def deduplicate(rows: list[dict], seen: set[str], taken: set[str]) -> tuple[list[dict], list[dict]]:
    """Prompts and pairs of the rows whose folded prompt (see `fold`) is not in `seen`, which grows.

    Nor in `taken`, nor a follow-up of one there: its first turns would show the model what is held out.
    """
    prompts, pairs = [], []
    for row in rows:
        key = normalize(row["prompt"])
        if key in seen:
            continue
        seen.add(key)
        if not any(normalize(row["prompt"][:turns]) in taken for turns in range(1, len(row["prompt"]) + 1, 2)):
            origin = {key: row[key] for key in ("prompt", "lang", "message_id")}
            prompts.append({**origin, "reference": row["reference"]})
            pairs += [{**origin, **pair} for pair in row["pairs"]]
    return prompts, pairs


def explain_empty(funnel: dict[str, int]) -> str:
    """Which step left nothing, for the error message."""
    steps = list(funnel.items())
    empty = next(i for i, (_, count) in enumerate(steps) if not count)
    lost = f"the step {steps[empty][0]!r} took the last {steps[empty - 1][1]}" if empty else "there are no rows for it"
    return f"{lost}; " + ", ".join(f"{name} {count}" for name, count in steps)


def sample_dialogues() -> list[dict]:
    """`prompt` and `reply` of the sample's train split, every usable reply; split as prepare_data splits it."""
    config = {**CONFIG, **PRESETS["tiny"]}
    messages = list(sources.read_messages(config["dataset"], "", with_toxicity=False)[0][""])
    trees = validation_trees({m.tree for m in messages}, config["validation_fraction"], config["split_seed"])
    held_out = {normalize([{"content": m.text}]) for m in messages if m.tree in trees and m.parent is None}
    train = {m.id: m for m in messages if m.tree not in trees and m.usable and m.reviewed and m.text.strip()}
    pairs = [(train[m.parent], m) for m in train.values() if m.role == "assistant" and m.parent in train]
    return [{"prompt": question.text.strip(), "reply": reply.text.strip()} for question, reply in pairs
            if normalize([{"content": question.text}]) not in held_out]  # fmt: skip
