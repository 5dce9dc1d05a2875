"""OpenAssistant messages: reading them from wherever they are, checked row by row, and keeping them on disk in chunks.

The data: https://huggingface.co/datasets/OpenAssistant/oasst1, described in arXiv 2304.07327. A row is a message; a tree
is a root prompt with its replies, their follow-up questions, and so on.
"""

import contextlib
import glob
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import config
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line

NEEDED = ("message_id", "text", "role", "lang")


COLUMNS = (*NEEDED, "parent_id", "message_tree_id", "rank", "review_result", "deleted")  # an export leaves out what is null


TOXICITY_COLUMNS = ("labels", "detoxify")  # nested and large: read only where max_toxicity asks for them


TREE = ("message_tree_id", "prompt")  # the columns of a file of whole trees, in which replies lie inside their parents


ROLES = ("prompter", "assistant")


FILES = (".jsonl", ".json", ".parquet")  # and .gz behind the first two


class Message(NamedTuple):
    """One row, reduced to what the choice of prompts needs."""

    id: str
    parent: str | None
    tree: str
    text: str
    role: str  # "prompter" or "assistant"
    lang: str
    rank: int | None  # 0 is the best of its siblings
    usable: bool  # not deleted
    reviewed: bool  # not rejected in review; the few never reviewed (null) stay
    toxicity: float | None


def _toxicity(row: dict) -> float | None:
    """People's own toxicity label (0-1), else the classifier's (detoxify), else None. Both may be null or lack the name.

    Labels are {"name": [...], "value": [...]} on the Hub, and {"toxicity": {"value": ...}} in the exports.
    """
    labels = row.get("labels") or {}
    if "toxicity" in (labels.get("name") or ()):
        found = labels["value"][labels["name"].index("toxicity")]
    elif labels.get("toxicity"):
        found = labels["toxicity"].get("value")
    else:
        found = (row.get("detoxify") or {}).get("toxicity")
    if not (found is None or isinstance(found, (int, float))):
        raise ValueError(f"the toxicity is {found!r}, but it takes a number")
    return None if _null(found) else float(found)


def _null(value) -> bool:
    """Whether it is null, or the NaN that pandas makes of it."""
    return value is None or value != value


def _boolean(row: dict, column: str) -> bool | None:
    """true, false or null, which pandas writes as 1.0, 0.0 and NaN where a column has nulls."""
    value = row.get(column)
    if _null(value):
        return None
    if value not in (True, False):
        raise ValueError(f"{column} is {value!r}, but it takes true, false or null")
    return bool(value)


def _message(row, where: str) -> Message:
    """A Message from a raw row; UserError naming `where` if it is not one."""
    if not isinstance(row, dict):
        raise UserError(f"{where}, is {type(row).__name__}, not a message (a JSON object with oasst1's columns).")
    try:
        texts = {key: None if _null(row.get(key)) else row[key] for key in (*NEEDED, "parent_id", "message_tree_id")}
        for key, value in texts.items():
            if not isinstance(value, str) and (value is not None or key in NEEDED):
                raise ValueError(f"{key} is {value!r}, but it takes a text")
        if texts["role"] not in ROLES:
            raise ValueError(f"role is {texts['role']!r}, but oasst1 has {' and '.join(ROLES)}")
        if texts["message_tree_id"] is None:
            if texts["parent_id"] is not None:
                raise ValueError("message_tree_id is missing, and only a root can do without")
            texts["message_tree_id"] = texts["message_id"]
        rank = None if _null(row.get("rank")) else row["rank"]
        if rank is not None and not (isinstance(rank, (int, float)) and 0 <= rank < 1_000_000):
            raise ValueError(f"rank is {rank!r}, but it takes 0 to 999,999")
        rank = rank if rank is None else int(rank)
        deleted, reviewed, toxicity = _boolean(row, "deleted"), _boolean(row, "review_result"), _toxicity(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}, which is not what oasst1 has there.") from None
    except (TypeError, IndexError, KeyError, OverflowError, AttributeError):
        raise UserError(f"{where}: labels, detoxify or rank are not what oasst1 has there.") from None
    strings = [texts[key] for key in ("message_id", "parent_id", "message_tree_id", "text", "role", "lang")]
    with contextlib.suppress(UnicodeEncodeError):
        "".join(filter(None, strings)).encode()
        return Message(*strings, rank, not deleted, reviewed is not False, toxicity)
    # Half of a surrogate pair: JSON can say it, and nothing after this can.
    strings = [each and each.encode("utf-8", "replace").decode() for each in strings]
    return Message(*strings, rank, not deleted, reviewed is not False, toxicity)


def _of_tree(row: dict) -> Iterator[dict]:
    """The messages of a whole tree, parents first."""
    waiting = [(row.get("prompt"), None)]
    while waiting:
        message, parent = waiting.pop(0)
        yield {**message, "parent_id": parent, "message_tree_id": row["message_tree_id"]}
        waiting += [(reply, message.get("message_id")) for reply in message.get("replies") or () if reply]


def _messages(table, name: str, with_toxicity: bool) -> Iterator[Message]:
    """Messages of a `Dataset` or `IterableDataset`. Raises UserError where its columns, or a row, are not oasst1's."""
    rows, number = iter(table), 0
    columns = table.column_names
    if columns is None:  # not known before a row is read
        first = _next(rows, name, number)
        columns, rows = list(first or ()), itertools.chain([first] if first else (), rows)
    trees = set(TREE) <= set(columns)
    if not trees and columns:
        if missing := [column for column in NEEDED if column not in columns]:
            raise UserError(
                f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(columns) or 'none'}. Needed are oasst1's: "
                f"{', '.join(COLUMNS)}; null ones may be left out."
            )
        if table.column_names:
            wanted = (*COLUMNS, *(TOXICITY_COLUMNS if with_toxicity else ()))
            rows = iter(table.select_columns([column for column in wanted if column in columns]))
    while (row := _next(rows, name, number)) is not None:
        number += 1
        where = f"{name}, row {number}"
        for message in _of_tree(row) if trees else (row,):
            yield _message(message, where)


def _next(rows: Iterator[dict], name: str, number: int) -> dict | None:
    """The row after the first `number`, or None. Raises UserError where it cannot be read."""
    try:
        return next(rows, None)
    except Exception as error:  # pyarrow, datasets and the file system each have their own
        raise UserError(f"{name} cannot be read past row {number}: {_reason(error)}.") from None


def _reason(error: BaseException) -> str:
    """What an error says; datasets wraps the one that says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def read_messages(source: str, revision: str, with_toxicity: bool) -> tuple[dict[str, Iterable[Message]], str | None]:
    """Messages by split; one unnamed split ("") where the source has no split called validation. And the commit of the Hub.

    `source` is a .jsonl, .jsonl.gz, .json or .parquet file of messages or of whole trees, a folder of such files as the Hub has
    them, a `save_to_disk` folder, or a data set id on the Hub. The first row of each split is read at once.
    Raises UserError where it cannot be found, reached or read.
    """
    path = Path(source)
    if source == config.PRESETS["tiny"]["dataset"] and not path.exists():
        path = Path(config.__file__).parent / source  # the script was called from another folder
    local = path.exists() or source.startswith((".", "/", "~")) or path.name.removesuffix(".gz").endswith(FILES)
    if local and not path.exists():
        raise UserError(f"--dataset {source}: no such file or folder.")
    if path.is_file() and not path.name.removesuffix(".gz").endswith(FILES):
        raise UserError(f"--dataset {source} is a file, but not .jsonl, .jsonl.gz, .json or .parquet.")
    commit = None
    try:
        if local:
            loaded = _local(path)
        else:
            loaded, commit = _of_hub(source, revision)
    except UserError:
        raise
    except Exception as error:  # the libraries below raise dozens of kinds; each means that there is no data
        if local:
            raise UserError(f"--dataset {source} cannot be read: {_reason(error)}") from None
        raise UserError(
            f"the data set {source} (revision {revision}) cannot be reached or read: {_reason(error)}\n"
            "  Check the name and the network, or give a local copy: --dataset messages.jsonl.gz\n"
            "  To try everything without the Hub: --preset tiny"
        ) from None
    if "validation" in loaded:
        parts = {split: [loaded[split]] for split in ("train", "validation") if split in loaded}
    else:
        parts = {"": list(loaded.values())}
    found = {}
    for split, tables in parts.items():
        name = f"{source} {split}".strip()
        rows = itertools.chain.from_iterable(_messages(table, name, with_toxicity) for table in tables)
        found[split] = itertools.chain(list(itertools.islice(rows, 1)), rows)  # what is no message is said at once
    return found, commit


def _local(path: Path) -> dict:
    """The tables of a file or folder, by split; read as they stand, without a copy in datasets' cache."""
    import datasets

    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(path))
        return {"": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    # A download from the Hub has its tables in data/, and may have the exports of the same messages beside them.
    kind = next((kind for kind in (".parquet", *FILES[:2]) if [*path.rglob(f"*{kind}"), *path.rglob(f"*{kind}.gz")]), "")
    found = [path] if path.is_file() else sorted([*path.rglob(f"*{kind}"), *path.rglob(f"*{kind}.gz")]) if kind else []
    if not found:
        raise UserError(f"--dataset {path} holds no .parquet or .jsonl file, and is no save_to_disk folder.")
    if not any(file.stat().st_size for file in found):
        raise UserError(f"--dataset {path} holds no messages: it is empty.")
    files.check_no_pointer(*found)
    by_split: dict[str, list[str]] = defaultdict(list)
    for file in found:
        split = re.match(r"(train|validation|test)\b", file.name) if len(found) > 1 else None
        by_split[split[1] if split else ""].append(glob.escape(str(file.resolve())))  # or [ is a pattern
    if "test" in by_split and len(by_split) > 1:
        del by_split["test"]
    builder = "parquet" if found[0].name.endswith(".parquet") else "json"
    # One chunk, or columns that begin further on in the file would be refused.
    options = {"chunksize": 1 << 30} if builder == "json" else {}
    return {
        split: datasets.load_dataset(builder, data_files=paths, split="train", streaming=True, **options)
        for split, paths in by_split.items()
    }


def _of_hub(source: str, revision: str) -> tuple[dict, str | None]:
    """The tables of a data set of the Hub, by split, and their commit. Raises UserError for another commit than the pinned."""
    import datasets
    from huggingface_hub import constants

    loaded = dict(datasets.load_dataset(source, revision=revision))
    commit = next(filter(None, map(_commit, loaded.values())), None)
    pinned = revision != "main"
    if pinned and constants.is_offline_mode() and not (commit or "").startswith(revision):  # a cache answers with any commit
        raise UserError(
            f"--dataset_revision {revision} is not what is in the cache, and there is no network to fetch it: {source} is "
            f"there at commit {commit or 'unknown'}. Give that one, or fetch yours where there is a network."
        )
    return loaded, commit


def _commit(table) -> str | None:
    """Which commit of the Hub a `datasets.Dataset` was loaded from, by the addresses of its files."""
    found = re.search(r"@([0-9a-f]{40})/", " ".join(map(str, table.info.download_checksums or ())))
    return found and found[1]


class Chunks:
    """Messages on disk in chunks of whole trees, so that a source of any size is worked through in little memory.

    Trees are counted by their first message: where a source has one tree after another, chunk by chunk is its own order.
    """

    def __init__(self, folder: Path, messages: Iterable[Message], trees_per_chunk: int = 4000):
        self.folder, self.numbers, self.languages = folder, {}, Counter()
        folder.mkdir(parents=True)
        pending, waiting = defaultdict(list), 0
        for message in messages:
            self.languages[message.lang] += 1
            number = self.numbers.setdefault(message.tree, len(self.numbers))
            pending[number // trees_per_chunk].append(json.dumps(message))
            waiting += 1
            if waiting == 20_000:
                self._flush(pending)
                waiting = 0
        self._flush(pending)
        self.paths = [folder / str(chunk) for chunk in range(-(-len(self.numbers) // trees_per_chunk))]

    def _flush(self, pending: dict[int, list[str]]) -> None:
        for chunk, lines in pending.items():
            with (self.folder / str(chunk)).open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        pending.clear()


def read_chunk(path: Path, trees: set[str] | None = None, inside: bool = True) -> list[Message]:
    """The messages of a chunk; with `trees`, those in them, or those outside."""
    with path.open(encoding="utf-8") as lines:
        messages = [Message(*json.loads(line)) for line in lines]
    return [message for message in messages if trees is None or (message.tree in trees) == inside]
