"""OpenAssistant messages: reading them from wherever they are, checked row by row, and keeping them on disk in chunks.

The data: https://huggingface.co/datasets/OpenAssistant/oasst1, described in arXiv 2304.07327. A row is a message; a tree
is a root prompt with its replies, their follow-up questions, and so on.
"""

import gzip
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

import config
from phi2_grpo.cli import UserError, first_line

# column: the types that a value of it may have
COLUMNS = {
    "message_id": str,
    "parent_id": (str, type(None)),
    "message_tree_id": str,
    "text": str,
    "role": str,
    "lang": str,
    "rank": (int, float, type(None)),  # a float where pandas wrote the file: its missing values make it so
    "review_result": (bool, type(None)),
    "deleted": (bool, type(None)),
}
TOXICITY_COLUMNS = ("labels", "detoxify")  # nested and large: read only where max_toxicity asks for them


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
    """People's own toxicity label (0-1), else the classifier's (detoxify), else None. Both may be null or lack the name."""
    labels = row.get("labels") or {}
    if isinstance(labels, dict) and "toxicity" in (labels.get("name") or ()):
        return float(labels["value"][labels["name"].index("toxicity")])
    detoxify = row.get("detoxify") or {}
    found = detoxify.get("toxicity") if isinstance(detoxify, dict) else None
    return None if found is None else float(found)


def _message(row, where: str) -> Message:
    """A Message from a raw row; UserError naming `where` if it is not one."""
    if not isinstance(row, dict):
        raise UserError(f"{where}, is {type(row).__name__}, not a message (a JSON object with oasst1's columns).")
    for column, kinds in COLUMNS.items():
        if column not in row and column not in ("rank", "review_result", "deleted"):
            raise UserError(f"{where}, lacks the column {column!r}. Needed: {', '.join(COLUMNS)}.")
        if not isinstance(row.get(column), kinds) and not (column == "deleted" and row.get(column) is None):
            raise UserError(f"{where}: {column} is {row[column]!r}, which is not what oasst1 has there.")
    try:
        toxicity = _toxicity(row)
        rank = None if row.get("rank") is None or row["rank"] != row["rank"] else int(row["rank"])
        if rank is not None and not 0 <= rank < 1_000_000:
            raise ValueError
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, AttributeError):
        raise UserError(f"{where}: labels, detoxify or rank are not what oasst1 has there.") from None
    strings = [row[column] for column in ("message_id", "parent_id", "message_tree_id", "text", "role", "lang")]
    try:
        "".join(filter(None, strings)).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can say it, and nothing after this can
        strings = [each and each.encode("utf-8", "replace").decode() for each in strings]
    return Message(*strings, rank, not row.get("deleted"), row.get("review_result") is not False, toxicity)


def _json_lines(path: Path) -> Iterator[Message]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _message(json.loads(line), f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}, is not JSON: {error.msg} (column {error.colno}).") from None
    except (ValueError, EOFError, OSError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} cannot be read past line {number}: {error}.") from None


def _batches(columns: list[str], read: Callable[[list[str]], Iterable], name: str, with_toxicity: bool) -> Iterator[Message]:
    """Messages of a table; `read(columns)` gives Arrow batches of it."""
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise UserError(f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}.")
    number = 0
    try:
        for batch in read([*COLUMNS, *(c for c in TOXICITY_COLUMNS if with_toxicity and c in columns)]):
            for row in batch.to_pylist():
                number += 1
                yield _message(row, f"{name}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{name} cannot be read past row {number}: {first_line(error)}.") from None


def _table(table, name: str, with_toxicity: bool) -> Iterator[Message]:
    """Messages of a `datasets.Dataset`."""
    arrow = table.with_format("arrow")
    return _batches(table.column_names, lambda columns: arrow.select_columns(columns).iter(2000), name, with_toxicity)


def _parquet(path: Path, with_toxicity: bool) -> Iterator[Message]:
    """Messages of a file. Not by `datasets`, which copies it into its cache, and takes `[` in a path for a pattern."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--dataset {path} cannot be read: {first_line(error)}") from None
    return _batches(file.schema_arrow.names, lambda columns: file.iter_batches(2000, columns=columns), str(path), with_toxicity)


def read_messages(source: str, revision: str, with_toxicity: bool) -> tuple[dict[str, Iterable[Message]], str | None]:
    """Messages by split; one unnamed split ("") where the source has no split called validation. And the commit of the Hub.

    `source` is a .jsonl, .jsonl.gz or .parquet file, a `save_to_disk` folder, or a data set id on the Hub.
    Raises UserError where it cannot be found, reached or read.
    """
    import datasets  # slow to import, and not needed for JSON lines

    path = Path(source)
    if source == config.PRESETS["tiny"]["dataset"] and not path.exists():
        path = Path(config.__file__).parent / source  # the script was called from another folder
    name = path.name.removesuffix(".gz")
    if path.is_file() and name.endswith((".jsonl", ".json")):
        return {"": _json_lines(path)}, None
    if path.is_file() and name.endswith(".parquet"):
        return {"": _parquet(path, with_toxicity)}, None
    if path.is_file():
        raise UserError(f"--dataset {source} is a file, but not .jsonl, .jsonl.gz or .parquet.")
    local = path.exists() or source.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json", ".parquet"))
    if local and not path.exists():
        raise UserError(f"--dataset {source}: no such file or folder.")
    try:
        loaded = datasets.load_from_disk(str(path)) if local else datasets.load_dataset(source, revision=revision)
    except Exception as error:  # the libraries below raise dozens of kinds; each means that there is no data
        reason = first_line(error)
        if local:
            raise UserError(f"--dataset {source} cannot be read: {reason}") from None
        raise UserError(
            f"the data set {source} (revision {revision}) cannot be reached or read: {reason}\n"
            "  Check the name and the network, or give a local copy: --dataset messages.jsonl.gz\n"
            "  To try everything without the Hub: --preset tiny"
        ) from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {"": loaded}
    elif "validation" in loaded:
        loaded = {split: loaded[split] for split in ("train", "validation") if split in loaded}
    else:
        loaded = {"": datasets.concatenate_datasets(list(loaded.values()))}
    commit = next(filter(None, map(_commit, loaded.values())), None)
    return {split: _table(table, f"{source} {split}".strip(), with_toxicity) for split, table in loaded.items()}, commit


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
