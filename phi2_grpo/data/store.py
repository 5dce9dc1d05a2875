"""The prepared data on disk: prompts, preference pairs, and funnel.json, which says how they were made."""

import hashlib
import json
import os
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, disable_caching, load_from_disk

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line, prepare_command

disable_caching()  # its files would go into data_dir, which may be shared and not ours to write

PROMPTS, PREFERENCES, FUNNEL = "oasst1_prompts", "oasst1_preferences", "funnel.json"
SPLITS = ("train", "validation")

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# Given, because a split without references would otherwise get a column of no type.
FEATURES = {
    PROMPTS: Features({"prompt": _MESSAGES, "lang": Value("string"), "message_id": Value("string"),
                       "reference": Value("string")}),
    PREFERENCES: Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES, "lang": Value("string"),
                           "message_id": Value("string")}),
}  # fmt: skip

# What a reader compares with its own settings: a difference is a note, and no error.
CHOICES = ("dataset", "dataset_revision", "languages", "max_prompt_tokens", "max_turns", "max_toxicity")


def tokenizer_fingerprint(tokenizer) -> str:
    """Equal for tokenizers that count alike: vocabulary, merges and chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are set by use, not by kind.
    parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
    return hashlib.sha256((json.dumps(parts, sort_keys=True) + str(tokenizer.chat_template)).encode()).hexdigest()[:16]


def fingerprint(tables: DatasetDict) -> str:
    """Of what stands in which split, in which order."""
    text = "".join(split + "".join(map(json.dumps, tables[split])) for split in sorted(tables))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def exists(data_dir: Path) -> bool:
    """Whether prepared data, or a part of it, is in `data_dir`. Raises UserError where a name is taken by something else."""
    present = [data_dir / name for name in (*FEATURES, FUNNEL) if os.path.lexists(data_dir / name)]
    for path in present:
        if path.name != FUNNEL and not any(path.glob("*.json")):
            raise UserError(f"{path} is no data set, and would be replaced. Move it, or choose another --data_dir.")
    return bool(present)


def save(data_dir: Path, prompts: dict[str, list[dict]], pairs: dict[str, list[dict]], funnel: dict) -> None:
    """Write the rows of each split, and the funnel, into `data_dir`, whose other files stay.

    While funnel.json is away, the data is incomplete: a killed run leaves the old data, the new, or none that is read.
    """
    with ExitStack() as stack:
        for name, rows in ((PROMPTS, prompts), (PREFERENCES, pairs)):
            tables = DatasetDict()
            for split in SPLITS:
                columns = {column: [row[column] for row in rows[split]] for column in FEATURES[name]}
                tables[split] = Dataset.from_dict(columns, features=FEATURES[name])
            folder = stack.enter_context(files.atomic_folder(data_dir / name))
            tables.save_to_disk(str(folder), num_shards=dict.fromkeys(SPLITS, 1))  # given, or an empty split would have none
        (data_dir / FUNNEL).unlink(missing_ok=True)
    saved = fingerprint(load_from_disk(str(data_dir / PROMPTS)))
    files.write_json(data_dir / FUNNEL, {**funnel, "fingerprint": saved})


def load_prompts(config: dict, tokenizer, name: str = PROMPTS) -> tuple[DatasetDict, dict, list[str]]:
    """The prepared prompts, the funnel, and notes on what differs from `config`; the fingerprint is of what was read.

    Raises UserError where the data is missing or incomplete, of another schema, or for another tokenizer.
    """
    data_dir, funnel = Path(config["data_dir"]), files.read_json(Path(config["data_dir"]) / FUNNEL)
    if not (data_dir / name).exists() or "settings" not in funnel:
        again = prepare_command(config, overwrite=exists(data_dir))
        raise UserError(f"no prepared data in {data_dir}, or not all of it: {name} or {FUNNEL} is missing. Prepare it: {again}")
    own = {key: config[key] for key in ("model", "model_revision", "data_dir")}
    again = prepare_command({**config, **funnel["settings"], **own}, overwrite=True)  # as it was, but for this model
    try:
        tables = load_from_disk(str(data_dir / name))
        if not all(FEATURES[name].items() <= tables[split].features.items() for split in SPLITS):
            raise ValueError(f"it has other columns than {', '.join(FEATURES[name])}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{data_dir / name} cannot be used: {first_line(error)}. Prepare it again: {again}") from None
    if funnel["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the data in {data_dir} was prepared for the tokenizer of {funnel['model']}, not of {config['model']}: its "
            f"token limits do not hold. Prepare it again, or elsewhere with another --data_dir: {again}"
        )
    then = funnel["settings"]
    notes = [f"{key} was {then[key]} when the data was prepared; config now says {config[key]}"
             for key in CHOICES if then.get(key, config[key]) != config[key]]  # fmt: skip
    return tables, {**funnel, "fingerprint": fingerprint(tables)}, notes


def load_preferences(config: dict, tokenizer) -> tuple[DatasetDict, dict, list[str]]:
    """The ranked pairs, as `load_prompts` loads the prompts."""
    return load_prompts(config, tokenizer, PREFERENCES)


def first_rows(prompts: DatasetDict) -> list[dict]:
    """A few train rows to try the rewards on."""
    return list(islice(prompts["train"], 8))


def select_rows(table: Dataset, count: int, seed: int) -> list[dict]:
    """`count` rows, sampled with `seed`; all of them, in that order, where there are fewer."""
    return table.shuffle(seed=seed).select(range(min(count, len(table)))).to_list()
