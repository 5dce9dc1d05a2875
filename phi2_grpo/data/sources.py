"""Rows of a data set as plain dicts, by split: from the Hub, a file, a folder of files or a `save_to_disk` folder.

What a row means is not known here: oasst.py reads OpenAssistant's messages, prompts.py any other form.
"""

import csv
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import config
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_lines

# In a folder the first of these that is there: a download from the Hub may have exports of the same rows beside its tables.
FORMATS = tuple(end + gz for end in (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt") for gz in ("", ".gz"))
UNREADABLE = (OSError, ValueError, EOFError, NotImplementedError, csv.Error)  # what open, json, gzip, pyarrow and csv raise
SPLITS = {word: split for split, words in (("train", "train training"), ("test", "test testing"),
                                           ("validation", "validation valid val dev eval evaluation"))
          for word in words.split()}  # fmt: skip


def read_rows(source: str, revision: str, subset: str = "") -> tuple[dict[str, Iterator], str | None]:
    """Rows by split, and the commit of a data set of the Hub, of which `subset` names one of several.

    The splits are train and validation, or all rows as one without a name ("") where the source does not have both. A split
    is known by a word in its name, or of a file in its path: train_sft is train. A test split is taken for the validation split
    where there is none; of a source with both, what is neither is not read. Raises UserError where it cannot be found or read.
    """
    path, commit = Path(source), None
    if any(source == preset.get("dataset") for preset in config.PRESETS.values()) and not path.exists():
        path = Path(config.__file__).parent / source  # the script was called from another folder
    try:
        if path.exists() or source.startswith((".", "/")) or source.lower().endswith(FORMATS):
            if subset:
                raise UserError(f"--dataset_config {subset} is for the Hub. Give that part's place: --dataset {path / subset}")
            parts = _local_parts(path)
        else:
            parts, commit = _hub_parts(source, revision, subset)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the network raise dozens of kinds
        raise UserError(
            f"--dataset {source} cannot be read: {first_lines(error.__cause__ or error, 2)}\n"
            f"  On the Hub: check the name, --dataset_config, the revision ({revision}) and the network; a gated one takes "
            "`hf auth login`. Or give a copy: --dataset FOLDER\n"
            "  To try everything without the Hub: --preset tiny"
        ) from None
    splits = defaultdict(list)
    for name, rows in parts:
        words = (re.search(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])", part.lower()) for part in Path(name).parts[::-1])
        named = next(filter(None, words), None)  # the file's own name before its folders'
        splits[SPLITS[named[1]] if named else ""].append(rows)
    held_out = "validation" if "validation" in splits else "test"
    chosen = {"train": splits["train"], "validation": splits[held_out]}
    if not all(chosen.values()):
        chosen = {"": [rows for _, rows in parts]}
    return {split: chain.from_iterable(rows) for split, rows in chosen.items()}, commit


def _local_parts(path: Path) -> list[tuple[str, Iterable]]:
    """Names and rows of the splits, or of the files, that are there."""
    import datasets

    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        return _table_parts({"": saved} if isinstance(saved, datasets.Dataset) else saved)
    if not path.exists():
        raise UserError(f"--dataset {path}: there is no such file or folder.")
    inside = [each for each in sorted(path.rglob("*")) if not any(p.startswith(".") for p in each.relative_to(path).parts)]
    by_format = ([each for each in inside if each.name.lower().endswith(end)] for end in FORMATS)
    paths = [path] if path.is_file() else next(filter(None, by_format), None)
    if not paths:
        raise UserError(f"--dataset {path} is no file, no save_to_disk folder, and no folder of {', '.join(FORMATS)} files.")
    files.check_no_pointer(*paths)
    for each in paths:
        with each.open("rb") as file:
            if file.read(4) == b"PK\3\4":
                raise UserError(f"{each} is a workbook, or a zip file. Save it as CSV (Excel: CSV UTF-8), and give that.")
    return [(str(each.relative_to(path)) if each != path else each.name, _checked(_file_rows(each), each)) for each in paths]


def _hub_parts(source: str, revision: str, subset: str) -> tuple[list[tuple[str, Iterable]], str | None]:
    import datasets
    from huggingface_hub import constants

    tables = datasets.load_dataset(source, subset or None, revision=revision)
    addresses = [str(table.info.download_checksums) for table in tables.values()]  # hf://datasets/NAME@COMMIT/FILE
    commit = next(iter(re.findall(r"@([0-9a-f]{40})/", " ".join(addresses))), None)
    if revision != "main" and constants.is_offline_mode() and not (commit or "").startswith(revision):
        raise UserError(  # offline, datasets answers with any commit that is in its cache
            f"--dataset_revision {revision} is not in the cache, and there is no network to fetch it: {source} is there at "
            f"commit {commit or 'unknown'}. Give that one, or fetch yours where there is a network."
        )
    return _table_parts(tables), commit


def _table_parts(tables: dict) -> list[tuple[str, Iterable]]:
    return [(name, _checked(_batch_rows(table.with_format("arrow").iter(1000)), name)) for name, table in tables.items()]


def _batch_rows(batches: Iterable) -> Iterator[dict]:
    for batch in batches:  # of pyarrow
        yield from batch.to_pylist()


def _file_rows(path: Path) -> Iterator:
    """Of parquet, JSON lines, one JSON array, a table (CSV, TSV), or a text with a prompt on each line.

    With or without a byte order mark, which Windows writes. All that a table holds stays a text: 007 is no number.
    """
    from pyarrow.parquet import ParquetFile

    if path.suffix.lower() == ".parquet":
        yield from _batch_rows(ParquetFile(path).iter_batches(1000))
        return
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    with opened(path, "rt", encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else None) as lines:
        if kind in ("csv", "tsv"):
            yield from _table_rows(lines, kind)
            return
        if kind == "txt":
            yield from ({"prompt": line.strip()} for line in lines if line.strip())
            return
        first = next(lines, "")
        one = kind == "json" or first.lstrip().startswith("[")
        rows = _object_rows(first + lines.read()) if one else map(json.loads, filter(str.strip, chain([first], lines)))
        yield from ({"prompt": row} if isinstance(row, (str, list)) else row for row in rows)


def _object_rows(text: str) -> Iterable:
    """Of a JSON array, of {"data": [{...}, ...]}, or of JSON lines by another name."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" not in str(error):  # one value, and another behind it
            raise
        return map(json.loads, filter(str.strip, text.split("\n")))
    if isinstance(value, list):
        return value
    columns = {key: item for key, item in value.items() if item} if isinstance(value, dict) else {}
    tables = [key for key, item in columns.items() if isinstance(item, list) and all(isinstance(row, dict) for row in item)]
    if not set(tables) & {"messages", "conversations", "prompt"}:  # of a single row
        if len(tables) > 1 and "data" not in tables:
            raise ValueError(f"it holds several tables ({', '.join(tables)}): give each a file of its own")
        if tables:
            return columns["data" if "data" in tables else tables[0]]
        if columns and all(isinstance(item, list) or (isinstance(item, dict) and "0" in item) for item in columns.values()):
            raise ValueError("it holds columns, not rows (pandas writes rows with orient='records', lines=True)")
    return [value]


def _table_rows(lines: Iterator[str], kind: str) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # 128 KB by default
    head = next(lines, "")
    head = next(lines, "") if head.startswith("sep=") else head  # Excel's
    delimiter = "\t" if kind == "tsv" else max(",;\t", key=head.count)  # of many countries' Excel it is a semicolon
    reader = csv.DictReader(chain([head], lines), delimiter=delimiter, strict=True)
    if twice := [name for name, count in Counter(map(str.strip, reader.fieldnames or ())).items() if name and count > 1]:
        raise ValueError(f"the header has {' and '.join(twice)} twice")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"a row has another number of cells than the header: {str(row)[:200]}")
        # A column without a name is the row's number, as pandas writes it.
        yield {name: value for column, value in row.items() if (name := column.strip())}


def _checked(rows: Iterable, name: str | Path) -> Iterator:
    """The same rows. Raises UserError naming the row past which they cannot be read."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007
            yield row
    except UnicodeDecodeError as error:
        coding = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        advice = f'Save it anew (Excel: "CSV UTF-8"), or: iconv -f {coding} -t utf-8 FILE > NEW_FILE'
        raise UserError(f"{name} is not UTF-8: byte {error.object[error.start]:#x} past row {number}. {advice}") from None
    except UNREADABLE as error:
        advice = " Inside a quoted cell, quotation marks are doubled." if isinstance(error, csv.Error) else ""
        raise UserError(f"{name} cannot be read past row {number}: {first_lines(error)}.{advice}") from None
