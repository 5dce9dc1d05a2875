"""Flags made from CONFIG, and how every script reports an error.

Imports nothing heavy: `--help` of every script answers before torch could be loaded.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import config as settings

# The keys whose value may be a path; those that end in _dir are, too.
PATHS = {"model", "init_adapter", "adapter", "dataset"}
# A folder that cannot be made or written: no permission, a read-only disk, a file or a dangling link in its place.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class UserError(Exception):
    """Something the user can correct. Its text gives the value, the rule and the remedy; the exit code is 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does, with its own exit code."""


# --- flags


def parse_value(key: str, text: str):
    """`text` as the type of CONFIG[key], within LIMITS[key] or its type's limits. Raises UserError."""
    default = settings.CONFIG[key]
    limit = settings.LIMITS.get(key) or settings.TYPE_LIMITS.get(type(default))
    rule = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a value")
    if limit:
        rule = f"one of: {', '.join(sorted(limit))}" if isinstance(limit, set) else f"{rule} from {limit[0]} to {limit[1]}"
    try:
        text.encode()  # a file name that is no UTF-8 could not be written to run.json
        if isinstance(default, bool):
            value = {"true": True, "false": False}[text.lower()]
        elif isinstance(default, list):
            value = [item.strip() for item in text.split(",") if item.strip()]
        else:
            value = type(default)(text)
        if isinstance(limit, tuple):
            valid = limit[0] <= value <= limit[1]  # NaN is in no range
        else:
            valid = value in limit if limit else text.strip() or default == ""
    except (KeyError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"--{key} is {text!r}, but it takes {rule} (default: {default}).")
    is_path = key.endswith("_dir") or key in PATHS
    return os.path.expanduser(value) if is_path else value  # a shell expands ~/x, but not --key=~/x


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """argparse's own messages, without the usage block in front."""
        raise UserError(f"{message}. See: {script_command(self.prog)} --help")


def _comments() -> dict[str, str]:
    """The comment behind each key of CONFIG, which is the flag's help. A test holds that every key has one."""
    source = Path(settings.__file__).read_text(encoding="utf-8").split("PRESETS = {")[0]
    return dict(re.findall(r'^    "(\w+)": .*?,  # (.+)$', source, flags=re.MULTILINE))


def make_parser(doc: str, keys: tuple[str, ...], defaults: dict[str, str] | None = None) -> argparse.ArgumentParser:
    """A parser with `--preset` and a flag for each of `keys`; a script adds its own arguments to it.

    `defaults`: in words, for keys whose value comes from elsewhere where no flag gives it.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="phi2", choices=settings.PRESETS, help="values over the defaults (default: phi2)")
    comments = _comments()
    for key in keys:
        default = settings.CONFIG[key]
        shown = (defaults or {}).get(key, ",".join(default) if isinstance(default, list) else default)
        text = f"{comments[key]} (default: {shown})" if shown != "" else comments[key]
        # No default here: a flag that is absent must not overwrite the preset's value.
        switch = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}  # --key alone is --key true
        parser.add_argument(f"--{key}", metavar=type(default).__name__.upper(), help=text.replace("%", "%%"), **switch)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[dict, argparse.Namespace]:
    """The effective config (CONFIG, then preset, then flags) and the script's own arguments.

    Raises UserError for an unknown flag (naming the nearest), an unknown preset or a value of the wrong type or range.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        nearest = difflib.get_close_matches(name, vars(arguments), n=1, cutoff=0.5)
        hint = f"did you mean --{nearest[0]}?" if nearest else f"see: {script_command(parser.prog)} --help"
        if not unknown[0].startswith("-"):
            hint = "it stands without a flag (--NAME VALUE). Put a value with a space in it in quotation marks"
        elif name in settings.CONFIG:
            hint = f"it is a setting, but {parser.prog} does not read it"
        raise UserError(f"unknown argument {unknown[0]!r}: {hint}")
    config = {**settings.CONFIG, **settings.PRESETS[arguments.preset]}
    given = {key: text for key, text in vars(arguments).items() if key in config and text is not None}
    return config | {key: parse_value(key, text) for key, text in given.items()}, arguments


def differences(config: dict, keys: tuple[str, ...]) -> str:
    """What a script runs with, as what differs from CONFIG: `model=tiny  device=cpu`."""
    return "  ".join(f"{key}={config[key]}" for key in keys if config[key] != settings.CONFIG[key]) or "all defaults"


def flags(config: dict, preset: str, *keys: str) -> str:
    """Those of `keys` that are not as the preset has them, as flags for another script: " --data_dir elsewhere"."""
    usual = {**settings.CONFIG, **settings.PRESETS[preset]}
    texts = {key: ",".join(value) if isinstance(value := config[key], list) else str(value) for key in keys}
    return "".join(f" --{key} {shlex.quote(text)}" for key, text in texts.items() if config[key] != usual[key])


def python_command() -> str:
    """What a shell starts this Python by: `python` in an active environment, otherwise its path."""
    own, named = sys.executable, shutil.which("python")
    if named and os.path.dirname(named) == os.path.dirname(own) and os.path.samefile(named, own):
        return "python"
    here = os.path.join(os.getcwd(), "")
    return shlex.quote(own.removeprefix(here) if os.sep in own.removeprefix(here) else own)


def script_command(name: str) -> str:
    """What a shell starts a script of this repo by, from the working directory."""
    path = Path(settings.__file__).with_name(name)
    return f"{python_command()} {name if path.parent.resolve() == Path.cwd() else shlex.quote(str(path))}"


# The settings that prepare_data.py reads.
PREPARE_KEYS = ("model", "model_revision", "dataset", "dataset_config", "dataset_revision", "data_dir", "prompt_column",
                "reference_column", "system_prompt", "languages", "max_prompt_tokens", "max_turns", "max_toxicity",
                "validation_fraction", "split_seed")  # fmt: skip


def prepare_command(config: dict, overwrite: bool = False) -> str:
    """The command that prepares data as `config` has it, for a shell."""
    preset = next((name for name, its in settings.PRESETS.items() if its.get("dataset") == config["dataset"]), "phi2")
    named = "" if preset == "phi2" else f" --preset {preset}"
    command = f"{script_command('prepare_data.py')}{named}{flags(config, preset, *PREPARE_KEYS)}"
    return f"{command}{' --overwrite' if overwrite else ''}"


def split_weight(item: str) -> tuple[str, float]:
    """ "length:0.5" is ("length", 0.5); without a number behind the last colon, the weight is 1."""
    name, colon, weight = item.rpartition(":")
    try:
        return (name, float(weight)) if colon else (item, 1.0)
    except ValueError:
        return item, 1.0  # what stands behind the colon is a function's name


# --- processes


def process_index() -> int:
    """Which of the processes that torchrun or accelerate launch started this is. The first, 0, prints and writes."""
    return int(os.environ.get("RANK") or 0)


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_one_process(script: str) -> None:
    """Raise UserError where a launcher started several processes of `script`."""
    if num_processes() > 1:
        raise UserError(f"{script} runs in one process: start it with python, not with accelerate launch or torchrun.")


# --- errors


def first_lines(error: BaseException, count: int = 1) -> str:
    """The first lines of an error's text, as one; its type where it has none."""
    return " ".join(line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()[:count])


def disk_is_full(error: BaseException) -> bool:
    """Whether no room is left. The writers of safetensors and of torch, which are not Python, give no errno, only a text."""
    texts = ("No space left", "file write failed", "unexpected pos")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in texts)


def memory_ran_out(error: BaseException) -> bool:
    """Whether `error` is Python's, or torch's (which is not imported here), by its type or its text."""
    texts = ("can't allocate memory", "MPS backend out of memory", "CUDA error: out of memory")
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return out_of_memory or any(text in str(error) for text in texts)


@contextlib.contextmanager
def load_errors(what: str, advice: str = "") -> Iterator[None]:
    """Around the loading of an input (data, a model, an adapter): whatever a library raises there becomes a UserError with
    `what`, the first lines of its message, and `advice`. Full memory and a full disk pass, for `run` explains them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or memory_ran_out(error) or disk_is_full(error):
            raise
        raise UserError("\n  ".join(filter(None, (f"{what}: {first_lines(error, 2)}", advice)))) from error


def print_error(text: str) -> None:
    """To stderr; a closed one is no error."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """What a user can correct, in words; "" for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if memory_ran_out(error):
        advice = "Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much) or"
        new_run = "--rollout_batch_size; in a new run also --max_completion_length or --reward_max_length."
        return f"out of memory: {first_lines(error)}\n  {advice} {new_run}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Packages are missing in this Python: make setup, then source .venv/bin/activate"
    if disk_is_full(error):
        return f"no room is left on a disk: {first_lines(error)}\n  Existing files were not changed. Make room and run again."
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"{error.strerror}: {error.filename}. Change that, or choose another folder."
    return ""


def run(main: Callable[[], None]) -> None:
    """Run a script. Exit codes without a traceback: 2 for a UserError and for what the machine refuses, 130 for Ctrl-C,
    143 for SIGTERM. Anything else is a bug and keeps its traceback. Of several processes only the first prints them."""

    def terminate(*_):
        raise Terminated  # so that `finally` clauses run and temporary folders go

    first = process_index() == 0
    if first:
        signal.signal(signal.SIGTERM, terminate)
        if HANGUP and signal.getsignal(HANGUP) is signal.SIG_DFL:  # a terminal is closed; nohup ignores it
            signal.signal(HANGUP, terminate)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="replace")  # a terminal that cannot show "±" shows "?"
    try:
        main()
    except KeyboardInterrupt as interrupt:
        if first:
            print_error(f"\ninterrupted. {interrupt}".rstrip())
        raise SystemExit(143 if isinstance(interrupt, Terminated) else 130) from None
    except Exception as error:
        if not (text := explain(error)):
            raise
        time.sleep(0 if first else 10)  # the first process says the same, and the launcher ends the others meanwhile
        print_error(f"error: {text}")
        raise SystemExit(2) from None
