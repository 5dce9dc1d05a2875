"""Uploads to the Hub: the account, what may leave the machine, and refusals in plain words. The token is never printed."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from phi2_grpo.common.cli import UserError, first_lines, load_errors, split_weight

# What of an adapter folder is sent; evaluation.jsonl, which has held-out prompts in it, stays.
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja", "generation_config.json", "run.json", "metrics.jsonl", "reward.png")  # fmt: skip
LOG_IN = "`hf auth login` stores a token, or set HF_TOKEN; the token needs write access."
# Status of the Hub's answer: what it means, what to do next.
REFUSALS = {
    401: ("the Hub does not know the token", LOG_IN),
    402: (
        "the Hub wants a paid plan for this",
        "A verified free account can host two Gradio Spaces on ZeroGPU (the default hardware); CPU ones need PRO. Or: make app",
    ),
    400: ("the Hub does not take this", "Correct what it names."),
    403: ("the Hub does not allow this", f"If it is the token: {LOG_IN}"),
    409: ("the name is taken", "Choose another name, or --update to replace the files there."),
    429: ("too many requests", "Wait some minutes, then run this again."),
}
OTHER_REFUSAL = ("the Hub refused", "Run this again; what is uploaded already is not sent twice.")


def is_id(name: str) -> bool:
    """Whether it has the form of a Hub id, and is no path of this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turns a refusal of the Hub, or an unreachable Hub, into a UserError with the next step."""
    try:
        yield
        return
    except LocalTokenNotFoundError:
        text = f"no token for the Hub. {LOG_IN}"
    except HfHubHTTPError as error:
        meaning, step = REFUSALS.get(error.response.status_code, OTHER_REFUSAL)
        text = f"{name}: {meaning} ({error.server_message or first_lines(error)}). {step}"
    except ValueError as error:  # a name or a model card that the Hub does not take
        text = f"the Hub does not take {name!r}: {error}"
    except (OSError, HTTPError, RuntimeError, ImportError) as error:  # of an upload that broke off, and of a proxy
        text = f"the Hub cannot be reached: {error}. Check the network, a proxy and the token, then run this again."
    raise UserError(text.replace(get_token() or "hf_***", "hf_***"))


def check_account(name: str) -> None:
    """Raise UserError unless `name` is USER/NAME, and a token is there whose account may write under USER."""
    with clear_errors(name):
        validate_repo_id(name)
        account = HfApi().whoami()
    owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    if name.rpartition("/")[0] not in owners:
        raise UserError(f"{name} is no name under {' or '.join(owners)}, where this token may write. Give one: USER/NAME.")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token of {account['name']} can only read. {LOG_IN}")


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's own files, as far as they are there; no checkpoints, no optimizer state."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def public_files(paths: list[Path]) -> tuple[dict[str, Path | bytes], list[str]]:
    """What of `paths` may leave the machine, by name: as a path, or as bytes without what is private; and which were changed.

    A path of this machine becomes the last part of its name (the other files have no paths in them).
    """
    public, changed = {path.name: path for path in paths}, []
    for name in sorted(public.keys() & {"run.json", "adapter_config.json"}):
        with load_errors(f"{public[name]} is broken", "Copy it again."):
            data = json.loads(public[name].read_text(encoding="utf-8"))
            of_hub = {"model": data.get("model_commit"), "dataset": data.get("data", {}).get("commit")}
        local = {"init_adapter", "merged_from", *(key for key, commit in of_hub.items() if not commit)}
        if (cleaned := _without_paths(data, local)) != data:
            public[name] = json.dumps(cleaned, indent=2, ensure_ascii=False).encode()
            changed.append(f"{name}: of paths only the last part, no address of a server")
    return public, changed


def _without_paths(value, local: set[str], key: str = ""):
    """JSON without paths: each becomes its last part, and a server's address is removed.

    `local`: the keys whose values are paths even where they have the form of a Hub id, as those that end in _dir are.
    """
    if isinstance(value, dict):
        return {name: _without_paths(item, local, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, local, key) for item in value]
    if not isinstance(value, str) or re.match("https?://", value):
        return "" if isinstance(value, str) else value
    is_path = key in local or key.endswith("_dir") or re.match(r"~|\.{0,2}/|[A-Za-z]:\\", value)
    is_path = is_path or ".py:" in value or os.path.exists(split_weight(value)[0])  # a reward's file or folder
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value
