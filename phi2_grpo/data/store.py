"""The prepared data on disk: prompts, preference pairs, and funnel.json, which says how they were made."""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, disable_caching, load_from_disk

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_lines, prepare_command

disable_caching()  # its files would go into data_dir, which may be shared and not ours to write

PROMPTS, PREFERENCES, FUNNEL = "prompts", "preferences", "funnel.json"  # the first two with the source's name before them
SPLITS = ("train", "validation")

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# Given, because a split without references would otherwise get a column of no type. Own prompts have more columns.
FEATURES = {
    PROMPTS: Features({"prompt": _MESSAGES, "lang": Value("string"), "message_id": Value("string"),
                       "reference": Value("string")}),
    PREFERENCES: Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES, "lang": Value("string"),
                           "message_id": Value("string")}),
}  # fmt: skip


def tokenizer_fingerprint(tokenizer) -> str:
    """Equal for tokenizers that count alike: vocabulary, merges and chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are set by use, not by kind.
    parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
    return hashlib.sha256((json.dumps(parts, sort_keys=True) + str(tokenizer.chat_template)).encode()).hexdigest()[:16]


def fingerprint(tables: DatasetDict) -> str:
    """Of what stands in which split, in which order."""
    # A column may hold dates or bytes, which are no JSON.
    text = "".join(split + "".join(json.dumps(row, default=str) for row in tables[split].to_list()) for split in sorted(tables))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def exists(data_dir: Path, name: str = "oasst1") -> bool:
    """Whether prepared data, or a part of it, is in `data_dir`. Raises UserError where the place of oasst1's, or of the source
    called `name`, is taken by something else."""
    places = {data_dir / f"{each}_{kind}" for each in ("oasst1", name) for kind in FEATURES}
    present = [path for path in places | {folder(data_dir, kind) for kind in FEATURES} if os.path.lexists(path)]
    for path in present:
        if not any(path.glob("*.json")):
            raise UserError(f"{path} is no data set, and would be replaced. Move it, or choose another --data_dir.")
    return bool(present) or os.path.lexists(data_dir / FUNNEL)


def folder(data_dir: Path, kind: str) -> Path:
    """Where the prepared PROMPTS or PREFERENCES are."""
    return data_dir / f"{files.read_json(data_dir / FUNNEL).get('name', 'oasst1')}_{kind}"


def save(data_dir: Path, prompts: dict[str, list[dict]], pairs: dict[str, list[dict]], funnel: dict) -> None:
    """Write the rows of each split, and the funnel, into `data_dir`, in the place of data prepared earlier; other files stay.

    While funnel.json is away, the data is incomplete: a killed run leaves the old data, the new, or none that is read.
    """
    earlier = [folder(data_dir, kind) for kind in FEATURES]
    with ExitStack() as stack:
        for kind, rows in ((PROMPTS, prompts), (PREFERENCES, pairs)):
            tables = _tables(rows, FEATURES[kind], with_others=kind == PROMPTS)
            place = stack.enter_context(files.atomic_folder(data_dir / f"{funnel['name']}_{kind}"))
            tables.save_to_disk(str(place), num_shards=dict.fromkeys(SPLITS, 1))  # given, or an empty split would have none
        (data_dir / FUNNEL).unlink(missing_ok=True)
    for path in earlier:
        if not path.name.startswith(f"{funnel['name']}_"):
            shutil.rmtree(path, ignore_errors=True)
    files.write_json(data_dir / FUNNEL, funnel)


def _tables(rows: dict[str, list[dict]], features: Features, with_others: bool) -> DatasetDict:
    """The splits with `features`, and with the rows' other columns. Raises UserError for a column of several types."""
    everything = [row for split in SPLITS for row in rows[split]]
    others = list(dict.fromkeys(column for row in everything for column in row if column not in features and column != "pairs"))
    for column in others if with_others else ():
        try:
            table = Dataset.from_dict({column: [row.get(column) for row in everything]})
        except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueError and TypeError
            raise UserError(f"the column {column} cannot be stored: {first_lines(error)}. Make its values one type.") from None
        features = Features({**features, column: table.features[column]})
    tables = {split: {column: [row.get(column) for row in rows[split]] for column in features} for split in SPLITS}
    return DatasetDict({split: Dataset.from_dict(columns, features=features) for split, columns in tables.items()})


def find(config: dict, kind: str = PROMPTS) -> tuple[Path, dict]:
    """Where the prepared PROMPTS, or PREFERENCES, are, and the funnel. Raises UserError where something is missing."""
    data_dir = Path(config["data_dir"])
    funnel, path = files.read_json(data_dir / FUNNEL), folder(data_dir, kind)
    if not path.exists() or "settings" not in funnel:
        again = prepare_command(config, overwrite=exists(data_dir))
        near = {place.parent for of in (data_dir.absolute(), data_dir.absolute().parent) for place in of.glob(f"*/{FUNNEL}")}
        there = sorted(map(str, near - {data_dir.absolute()}))
        what = f"{path.name} or {FUNNEL} is missing" if data_dir.exists() else "there is no such folder"
        known = f" (there are {', '.join(there)})" * bool(there)
        elsewhere = f"If it lies elsewhere: --data_dir FOLDER{known}"
        raise UserError(f"no prepared data in {data_dir}: {what}. {elsewhere}. Prepare it (your own with --dataset): {again}")
    return path, funnel


def load_prompts(config: dict, tokenizer, kind: str = PROMPTS) -> tuple[DatasetDict, dict]:
    """The prepared PROMPTS, or PREFERENCES, and the funnel, with the fingerprint of what was read.

    Raises UserError where the data is missing or incomplete, of another schema, or for another tokenizer.
    """
    path, funnel = find(config, kind)
    own = {key: config[key] for key in ("model", "model_revision", "data_dir")}
    again = prepare_command({**config, **funnel["settings"], **own}, overwrite=True)  # as it was, but for this model
    try:
        tables = load_from_disk(str(path))
        if not all(FEATURES[kind].items() <= tables[split].features.items() for split in SPLITS):
            raise ValueError(f"it lacks one of the columns {', '.join(FEATURES[kind])}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be used: {first_lines(error)}. Prepare it again: {again}") from None
    if funnel["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the data in {config['data_dir']} was prepared for the tokenizer of {funnel['model']}, not of {config['model']}: "
            f"its token limits do not hold. Prepare it again, or elsewhere with another --data_dir: {again}"
        )
    return tables, {**funnel, "fingerprint": fingerprint(tables)}


def select_rows(table: Dataset, count: int, seed: int) -> list[dict]:
    """`count` rows, sampled with `seed`; all of them, in that order, where there are fewer."""
    return table.shuffle(seed=seed).select(range(min(count, len(table)))).to_list()
