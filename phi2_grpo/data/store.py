"""The prepared data on disk: writing it whole, reading it back checked."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, disable_caching, load_from_disk

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, prepare_command


def first_rows(prompts) -> list[dict]:
    """A few train rows to try the rewards on."""
    return prompts["train"].select(range(min(8, len(prompts["train"])))).to_list()


disable_caching()  # its files would go into data_dir, which may be shared and not ours to write


PROMPTS, PREFERENCES, FUNNEL = "oasst1_prompts", "oasst1_preferences", "funnel.json"


_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


# Said aloud, because a split without references would otherwise get a column of no type.
FEATURES = {
    PROMPTS: Features({"prompt": _MESSAGES, "lang": Value("string"), "message_id": Value("string"),
                       "reference": Value("string")}),
    PREFERENCES: Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES, "lang": Value("string"),
                           "message_id": Value("string"), "rank_distance": Value("int32")}),
}  # fmt: skip


# What a reader compares with its own settings. The tokenizer must agree; the rest is said where it differs.
CHOICES = ("dataset", "dataset_revision", "languages", "max_prompt_tokens", "max_turns", "max_toxicity")


def tokenizer_fingerprint(tokenizer) -> str:
    """Equal for tokenizers that count alike: vocabulary, merges and chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are set by use, not by kind.
    parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
    return hashlib.sha256((json.dumps(parts, sort_keys=True) + str(tokenizer.chat_template)).encode()).hexdigest()[:16]


def fingerprint(prompts: DatasetDict) -> str:
    """Of what stands in which split, in which order."""
    digest = hashlib.sha256()
    for split in sorted(prompts):
        digest.update(split.encode())
        for row in prompts[split]:
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def exists(data_dir: Path) -> bool:
    """Whether prepared data is in `data_dir`, or a part of it. Raises UserError where what would be replaced is none."""
    if "::" in str(data_dir.resolve()):
        raise UserError(f"{data_dir.resolve()} has a :: in it, which datasets takes for two addresses. Choose another folder.")
    found = [data_dir / name for name in (*FEATURES, FUNNEL) if os.path.lexists(data_dir / name)]
    for path in found:
        ours = (
            path.is_symlink() or path.name == FUNNEL or any(path.glob("*.json")) or (path.is_dir() and not any(path.iterdir()))
        )
        if not ours:
            raise UserError(f"{path} is no data set, and would be replaced. Move it, or choose another --data_dir.")
    return bool(found)


class Prepared:
    """Rows to disk as they come, into `folder`; `finish` makes data sets of them."""

    def __init__(self, folder: Path):
        self.folder, self.parts = folder, {(name, split): [] for name in FEATURES for split in ("train", "validation")}

    def add(self, name: str, split: str, rows: list[dict]) -> None:
        """Rows of the data set called `name`."""
        if rows:
            columns = {column: [row[column] for row in rows] for column in FEATURES[name]}
            path = self.folder / f"{name}-{split}-{len(self.parts[name, split])}"
            Dataset.from_dict(columns, features=FEATURES[name]).save_to_disk(str(path))
            self.parts[name, split].append(path)

    def finish(self, data_dir: Path, funnel: dict) -> DatasetDict:
        """Both data sets and funnel.json into `data_dir`; returns the prompts.

        funnel.json goes first and comes back last: as long as it is away, readers say that the data is half-written.
        """
        with files.atomic_folder(data_dir / ".prepared") as staging:
            for name, features in FEATURES.items():
                tables = DatasetDict({split: self._table(name, split) for split in ("train", "validation")})
                # Said aloud, because an empty split in no shard at all cannot be read back.
                shards = {split: 1 + len(table) // 100_000 for split, table in tables.items()}
                tables.cast(features).save_to_disk(str(staging / name), num_shards=shards)
        prompts = load_from_disk(str(data_dir / ".prepared" / PROMPTS))
        files.write_json(data_dir / ".prepared" / FUNNEL, {**funnel, "fingerprint": fingerprint(prompts)})
        (data_dir / FUNNEL).unlink(missing_ok=True)
        for name in FEATURES:
            if os.path.lexists(data_dir / name):  # a link is moved away as well as a folder
                (data_dir / name).rename(data_dir / ".prepared" / f"old-{name}")
            (data_dir / ".prepared" / name).rename(data_dir / name)
        (data_dir / ".prepared" / FUNNEL).rename(data_dir / FUNNEL)
        shutil.rmtree(data_dir / ".prepared", ignore_errors=True)
        return load_from_disk(str(data_dir / PROMPTS))

    def _table(self, name: str, split: str) -> Dataset:
        if not self.parts[name, split]:
            return Dataset.from_dict({column: [] for column in FEATURES[name]}, features=FEATURES[name])
        return concatenate_datasets([load_from_disk(str(path)) for path in self.parts[name, split]])


def load_preferences(config: dict, tokenizer) -> tuple[DatasetDict, dict, list[str]]:
    """The ranked pairs, the funnel and notes; checked as `load_prompts` checks, which must find its own whole."""
    _, funnel, notes = load_prompts(config, tokenizer)
    data_dir = Path(config["data_dir"])
    try:
        pairs = load_from_disk(str(data_dir / PREFERENCES))
        whole = all(table.features == FEATURES[PREFERENCES] for table in pairs.values()) and {"train", "validation"} <= set(
            pairs
        )
    except Exception as error:
        again = prepare_command({**config, **funnel["settings"]}, overwrite=True)
        raise UserError(f"{data_dir / PREFERENCES} cannot be read ({error}). Make it again: {again}") from None
    if not whole:
        again = prepare_command({**config, **funnel["settings"]}, overwrite=True)
        raise UserError(f"{data_dir / PREFERENCES} has another schema. Make it again: {again}")
    return pairs, funnel, notes


def load_prompts(config: dict, tokenizer) -> tuple[DatasetDict, dict, list[str]]:
    """The prepared prompts, the funnel, and notes where they were prepared with other settings than `config` has.

    Raises UserError where the data is missing, half-written, of another schema or for another tokenizer.
    """
    data_dir = Path(config["data_dir"])
    if not (data_dir / PROMPTS).exists():
        raise UserError(f"no prepared prompts in {data_dir}. Make them first: {prepare_command(config)}")
    again = prepare_command(config, overwrite=True)
    try:
        funnel = json.loads((data_dir / FUNNEL).read_text(encoding="utf-8"))
        if (
            not {"settings", "model", "tokenizer", "fingerprint"} <= funnel.keys()
            or not set(CHOICES) <= funnel["settings"].keys()
        ):
            raise ValueError(f"{FUNNEL} lacks something")
        prompts = load_from_disk(str(data_dir / PROMPTS))
        found = fingerprint(prompts) if isinstance(prompts, DatasetDict) else None
    except Exception as error:  # pyarrow, json and the file system each have their own
        raise UserError(f"the data in {data_dir} is half-written ({error}). Make it again: {again}") from None
    wrong = [
        f"{split} has {', '.join(table.column_names)}"
        for split, table in (prompts.items() if isinstance(prompts, DatasetDict) else [("it", prompts)])
        if not FEATURES[PROMPTS].keys() <= set(table.column_names) or table.features["prompt"] != FEATURES[PROMPTS]["prompt"]
    ]
    if wrong or not isinstance(prompts, DatasetDict) or not {"train", "validation"} <= set(prompts):
        raise UserError(
            f"the data in {data_dir} has another schema ({'; '.join(wrong) or 'no train and validation split'}); needed: "
            f"train and validation with {', '.join(FEATURES[PROMPTS])}. Make it again: {again}"
        )
    if funnel["fingerprint"] != found:
        raise UserError(f"the data in {data_dir} is not what its funnel.json describes. Make it again: {again}")
    own = {key: config[key] for key in ("model", "model_revision", "data_dir")}
    again = prepare_command({**config, **funnel["settings"], **own}, overwrite=True)  # as it was, but for this model
    if funnel["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the data in {data_dir} was prepared for the tokenizer of {funnel['model']}, not of {config['model']}: its "
            f"token limits do not hold. Make it again, or elsewhere with another --data_dir: {again}"
        )
    notes = [f"{key} was {funnel['settings'][key]} when the data was prepared; config now says {config[key]}"
             for key in CHOICES if funnel["settings"][key] != config[key]]  # fmt: skip
    return prompts, funnel, notes


def select_rows(table, count: int, seed: int) -> list[dict]:
    """`count` rows, drawn with `seed`; all of them, in that order, where there are fewer."""
    return table.shuffle(seed=seed).select(range(min(count, len(table)))).to_list()
