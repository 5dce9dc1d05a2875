"""Flags made from CONFIG, and one way to fail.

Imports nothing heavy: `--help` of every script answers before torch could be loaded.
"""

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import config as settings

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class UserError(Exception):
    """Something the user can mend. Its text says what was given, what the rule is and what to do; the exit code is 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def split_weight(item: str) -> tuple[str, float]:
    """ "length:0.5" is ("length", 0.5); without a number behind the last colon, the weight is 1."""
    name, colon, weight = item.rpartition(":")
    try:
        return (name, float(weight)) if colon else (item, 1.0)
    except ValueError:
        return item, 1.0  # what stands behind the colon is a function's name


def reward_model_names(items: list[str]) -> list[str]:
    """Those of --rewards that name a folder or a Hub id."""
    names = [split_weight(item)[0] for item in items]
    return [name for name in names if "/" in name and (":" not in name or Path(name).is_dir())]


def _comments() -> dict[str, str]:
    """The comment behind each key of CONFIG, which is the flag's help. A test holds that every key has one."""
    source = Path(settings.__file__).read_text(encoding="utf-8").split("PRESETS = {")[0]
    return dict(re.findall(r'^    "(\w+)": .*?,  # (.+)$', source, flags=re.MULTILINE))


def parse_value(key: str, text: str):
    """`text` as the type of CONFIG[key], within LIMITS[key]; raises UserError naming the key, the value and the rule."""
    default = settings.CONFIG[key]
    if not text.strip() and default != "":
        raise UserError(f"--{key} is empty. Leave it out for the default ({default}), or give a value.")
    try:
        if isinstance(default, bool):
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        elif isinstance(default, list):
            value = [item.strip() for item in text.split(",") if item.strip()]
        else:
            value = type(default)(text)
            if isinstance(value, str) and value.startswith("~"):  # a shell expands ~/x, but not --key=~/x
                value = os.path.expanduser(value)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise UserError(f"--{key} is {text!r}, but it takes {kind} (default: {default}).") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{key} is {text!r}, but it takes a finite number (default: {default}).")
    limit = settings.LIMITS.get(key)
    if isinstance(limit, set) and value not in limit:
        raise UserError(f"--{key} is {text!r}, but it takes one of: {', '.join(sorted(limit))}.")
    if isinstance(limit, tuple) and not limit[0] <= value <= limit[1]:
        raise UserError(f"--{key} is {text!r}, but it takes {limit[0]} to {limit[1]} (default: {default}).")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """argparse's own messages, without the usage block in front: the message is what the user needs."""
        raise UserError(f"{message}. See: python {self.prog} --help")


def make_parser(doc: str, keys: tuple[str, ...], trained_with: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """A parser with `--preset` and a flag for each of `keys`; a script adds its own arguments to it.

    `trained_with`: keys that are taken from an adapter's training where no flag says otherwise.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="phi2", metavar="NAME", help=f"{', '.join(settings.PRESETS)} (default: phi2)")
    helps = _comments()
    for key in keys:
        default = settings.CONFIG[key]
        shown = ",".join(default) if isinstance(default, list) else default
        if key in trained_with:
            shown = "the training's"
        text = f"{helps[key]} (default: {shown})" if shown != "" else helps[key]
        if isinstance(limit := settings.LIMITS.get(key), set):
            text += f"; one of {', '.join(sorted(limit))}"
        # No default here: absence must be seen, so that a preset's value is not overwritten.
        switch = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}  # --key alone is --key true
        parser.add_argument(f"--{key}", metavar=type(default).__name__.upper(), help=text.replace("%", "%%"), **switch)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[dict, argparse.Namespace]:
    """Returns the whole effective config (CONFIG, then preset, then flags) and the script's own arguments.

    Raises UserError for an unknown flag (naming the nearest), an unknown preset or a value of the wrong type or range.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if name.lstrip("-") in settings.CONFIG:
            hint = f"it is a setting, but {parser.prog} does not read it"
        else:
            hint = f"did you mean {nearest[0]}?" if nearest else f"see: python {parser.prog} --help"
        raise UserError(f"unknown argument {unknown[0]!r}: {hint}")
    if arguments.preset not in settings.PRESETS:
        raise UserError(f"--preset is {arguments.preset!r}, but it takes one of: {', '.join(settings.PRESETS)}.")
    config = {**settings.CONFIG, **settings.PRESETS[arguments.preset]}
    for key in settings.CONFIG:
        given = getattr(arguments, key, None)
        if given is not None:
            config[key] = parse_value(key, given)
    return config, arguments


def differences(config: dict, keys: tuple[str, ...]) -> str:
    """What a script runs with, as what differs from CONFIG: `model=tiny  device=cpu`."""
    changed = [f"{key}={config[key]}" for key in keys if config[key] != settings.CONFIG[key]]
    return "  ".join(changed) or "all defaults"


def flags(config: dict, preset: str, *keys: str) -> str:
    """Those of `keys` that are not as the preset has them, as flags for another script: " --data_dir elsewhere"."""
    usual = {**settings.CONFIG, **settings.PRESETS[preset]}
    texts = {key: ",".join(value) if isinstance(value := config[key], list) else str(value) for key in keys}
    return "".join(f" --{key} {shlex.quote(text)}" for key, text in texts.items() if config[key] != usual[key])


# The settings that prepare_data.py reads.
PREPARE_KEYS = ("model", "model_revision", "dataset", "dataset_revision", "data_dir", "languages", "max_prompt_tokens",
                "max_turns", "max_toxicity", "validation_fraction", "split_seed")  # fmt: skip


def prepare_command(config: dict, overwrite: bool = False) -> str:
    """The command that prepares data as `config` has it, for a shell."""
    preset = "tiny" if config["dataset"] == settings.PRESETS["tiny"]["dataset"] else "phi2"
    named = "" if preset == "phi2" else f" --preset {preset}"
    return f"python prepare_data.py{named}{flags(config, preset, *PREPARE_KEYS)}{' --overwrite' if overwrite else ''}"


def process_index() -> int:
    """Which of the processes that torchrun or accelerate launch started this is; the first, 0, is the one that speaks."""
    rank = os.environ.get("RANK") or ""
    return int(rank) if rank.isdecimal() else 0


def num_processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does, with its own exit code."""


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` means that no room is left: each library that writes says it in its own way."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(part in str(error) for part in ("No space left", "os error 28", "file write failed", "unexpected pos"))


def memory_ran_out(error: BaseException) -> bool:
    """Whether `error` is Python's, or torch's (which is not imported here) of a card, or of the CPU."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in str(error)


def print_error(text: str) -> None:
    """To stderr, if anybody listens."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 2 and one message for a UserError, and for what the machine refuses (no room, no memory, no
    permission); 130 for Ctrl-C, 143 for SIGTERM; no traceback.

    Anything else is a bug and keeps its traceback.
    """

    def terminated(*_):
        raise Terminated

    if not process_index():  # so that `finally` clauses run and temporary folders go; the other processes write none
        signal.signal(signal.SIGTERM, terminated)
    if HANGUP and signal.getsignal(HANGUP) is signal.SIG_DFL and not process_index():  # a terminal is closed; nohup ignores it
        signal.signal(HANGUP, terminated)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show "±" shows "?"
    try:
        _check_environment()
        main()
    except UserError as error:
        if process_index():
            time.sleep(2)  # the first will have said the same, and the launcher has ended this one by then
        _fail(str(error))
    except KeyboardInterrupt as interrupt:
        if not process_index():
            print_error(f"\ninterrupted. {interrupt}".rstrip())
        raise SystemExit(143 if isinstance(interrupt, Terminated) else 130) from None
    except Exception as error:
        if _from_interrupt(error):  # transformers makes another error of a Ctrl-C while it imports
            print_error("\ninterrupted.")
            raise SystemExit(130) from None
        if memory_ran_out(error):
            advice = "Close what else is on the card, or ask for less at once: --rollout_batch_size 1, a smaller batch size."
            _fail(f"memory ran out: {first_line(error).split('. ')[0]}.\n  {advice}")
        if disk_is_full(error):
            text = f"no room is left on a disk: {first_line(error)}"
            _fail(f"{text}\n  What was there before is as it was. Make room, and run this again.")
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
            _fail(f"{error.strerror}: {error.filename or 'a disk'}. Mend that, or choose another folder.")
        raise


def _check_environment() -> None:
    """Raise UserError where the shell's folder is gone, or its environment has a part of what torchrun sets."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the folder that you are in is gone. Change to another.") from None
    launched = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if os.environ.get(name)}
    given = " ".join(f"{name}={value}" for name, value in launched.items())
    alone = "LOCAL_RANK" not in launched and launched.items() <= {"RANK": "0", "WORLD_SIZE": "1"}.items()  # as in many a pod
    whole = len(launched) == 3 and all(map(str.isdecimal, launched.values())) and os.environ.get("MASTER_ADDR")
    if not alone and not whole:
        raise UserError(
            f"the environment has {given}, a part of what torchrun sets. Unset it, or start with torchrun or accelerate launch."
        )


def _fail(text: str) -> NoReturn:
    print_error(f"error: {text}")
    raise SystemExit(2) from None


def _from_interrupt(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
