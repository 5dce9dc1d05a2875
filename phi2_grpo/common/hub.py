"""Talking to the Hub: who we are there, and its refusals in plain words. The token is never printed nor written."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line

# What an adapter folder may hold; nothing else of it is sent anywhere.
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja", "generation_config.json", "run.json", "metrics.jsonl", "evaluation.jsonl",
                 "reward.png")  # fmt: skip


LOG_IN = "`hf auth login` asks for a token and keeps it, HF_TOKEN=... gives one; it needs the right to write"


def is_id(name: str) -> bool:
    """Whether it looks like a Hub id, and is no path of this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def check_name(name: str) -> str:
    """USER/NAME as the Hub takes it. Raises UserError."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name on the Hub: {first_line(error)} Give USER/NAME.") from None
    if not re.fullmatch(r"[^/]+/[^/]+", name):
        raise UserError(f"{name!r} is no name on the Hub. Give USER/NAME, with your user or organization before the slash.")
    return name


# The settings that name a place on the user's machine.
PATH_KEYS = {"data_dir", "output_dir", "reward_dir", "adapter", "init_adapter", "validation_dir", "merged_from"}


SAMPLES_FILE = "evaluation.jsonl"


def public_files(paths: list[Path], with_samples: bool = False) -> tuple[dict[str, Path | bytes], list[str]]:
    """What of `paths` may leave the machine, by name: a path as it is, or bytes without what is private; and what was left out.

    Paths of this machine become the last part of their name, wherever they stand in the text files. Held-out prompts and their
    answers go only `with_samples`.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths if path.suffix in (".json", ".jsonl", ".md")
             and path.name != "tokenizer.json"}  # fmt: skip
    private = _private(*(files.read_json(path) for path in paths if path.name in ("run.json", "adapter_config.json")))
    left_out, found = [], {path.name: path for path in paths}
    for name, text in texts.items():
        if name == SAMPLES_FILE and not with_samples:
            rows = [json.loads(line) for line in text.splitlines()]
            count = sum(len(row.pop("answers", ())) for row in rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            left_out += [f"{name}: {count} held-out prompts with their answers (sent with --with_samples)"] if count else []
        cleaned = text
        for path in sorted(private, key=len, reverse=True):
            cleaned = cleaned.replace(json.dumps(path)[1:-1], private[path]).replace(path, private[path])
        left_out += [f"{name}: paths of this machine, but for their last part"] if cleaned != text else []
        if cleaned != texts[name]:
            found[name] = cleaned.encode()
    return found, left_out


def _private(*values, key: str = "") -> dict[str, str]:
    """The texts in JSON `values` that say where something is on this machine, and what may be said instead."""
    found = {}
    for value in values:
        if isinstance(value, dict):
            for name, inner in value.items():
                found |= _private(inner, key=name)
        elif isinstance(value, list):
            found |= _private(*value, key=key)
        elif isinstance(value, str) and key == "vllm_server_base_url":
            found |= {value: ""} if value else {}
        elif isinstance(value, str) and re.search(r"[/\\]", value) and (key in PATH_KEYS or not is_id(value)):
            found[value] = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return found


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's own files, as far as they are there; no checkpoints, no optimizer state."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def check_account(name: str) -> str:
    """Who is logged in, if they may write under `name`'s owner. Raises UserError."""
    if not get_token():
        raise UserError(f"no token for the Hub. {LOG_IN}.")
    with clear_errors(name):
        me = HfApi().whoami()
    owner = name.split("/")[0]
    mine = [me["name"], *(group["name"] for group in me.get("orgs", []))]
    if owner not in mine:
        raise UserError(f"the token is {me['name']}'s, who may write to {', '.join(mine)}, not to {owner}. Name one of those.")
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(f"the token of {me['name']} can only read. Make one that can write: {LOG_IN}.")
    return me["name"]


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turns what the Hub, or the way to it, refuses into a UserError with the next step."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"no token for the Hub. {LOG_IN}.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = (error.server_message or str(error)).strip().splitlines()[0]
        raise UserError(hide_token(_refusal(status, name, said))) from None
    except ValueError as error:  # a model card that the Hub does not take
        raise UserError(hide_token(f"the Hub does not take this: {str(error).strip()}")) from None
    except (OSError, HTTPError) as error:
        raise UserError(hide_token(f"the Hub cannot be reached: {error}. Look at the network, then run this again.")) from None


def _refusal(status: int, name: str, said: str) -> str:
    if status == 401:
        return f"the Hub does not know the token ({said}). {LOG_IN}."
    if status == 402:
        return (
            f"the Hub wants a paid plan for this ({said}).\n"
            "  A free account can host Gradio Spaces on ZeroGPU (--hardware zero-a10g), within limits; CPU ones need PRO.\n"
            "  See the billing page of your account, or run the app on your machine: make app"
        )
    if status == 403:
        return f"the token may not write to {name} ({said}). {LOG_IN}."
    if status == 409:
        return f"{name} exists already ({said}). Choose another name, or --update to replace the files there."
    if status == 429:
        return f"too many requests to the Hub ({said}). Wait some minutes, then run this again."
    return f"the Hub answered {status}: {said}. Run this again; what is uploaded already is not sent twice."


def hide_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "hf_***") if token else text
