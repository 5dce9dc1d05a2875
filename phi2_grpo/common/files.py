"""Outputs are written beside their place and moved in when they are whole: a killed run leaves the old or the new one."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from phi2_grpo.common.cli import UserError, process_index


def sibling(path: Path, form: str) -> Path:
    """A neighbour of `path`; `form` has a place for its name. Raises UserError for what has no name, or too long a one."""
    path = path if path.name not in ("", "..") else path.resolve()
    name = form.format(path.name)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{str(path).encode(errors='replace').decode()} has letters that are no UTF-8. Choose another folder."
        ) from None
    if not path.name or len(os.fsencode(name)) > 255:
        rule = "has too long a name" if path.name else "is no folder of its own"
        raise UserError(f"{path} {rule}: others stand beside it, like {name}. Choose another folder.")
    return path.with_name(name)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes the place of `path` when the block ends without an error.

    Raises UserError where it cannot be written.
    """
    path = path.resolve()  # a link stays one, and "." has no name to write beside
    incoming, outgoing = (sibling(path, f".{{}}.{end}") for end in ("incoming", "outgoing"))
    try:
        if outgoing.exists() and not path.exists():
            outgoing.rename(path)  # a run was killed between the two renames below
        for leftover in (incoming, outgoing):
            shutil.rmtree(leftover, ignore_errors=True)
        incoming.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder.") from None
    try:
        yield incoming
        open_to_umask(incoming)
        if path.exists():
            path.rename(outgoing)
        incoming.rename(path)
    finally:
        if outgoing.exists() and not path.exists():
            outgoing.rename(path)  # it was stopped between the two
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.rmtree(outgoing, ignore_errors=True)


def open_to_umask(folder: Path) -> None:
    """Give the files the rights that the user's umask gives: safetensors makes them its owner's alone."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folder it stands in, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".{path.name}.incoming")
    incoming.write_text(text, encoding="utf-8")
    os.replace(incoming, path)


def write_json(path: Path, data) -> None:
    """Write JSON whole or not at all; NaN is refused, for no other reader takes it."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON lines whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# What is read of a run.json, and its types; what has another is as good as absent.
RUN = {"config": dict, "data": dict, "versions": dict, "files": dict, "seconds": (int, float), "processes": int}


def read_run(folder: Path) -> dict:
    """The run.json of an adapter, a checkpoint or a reward model."""
    found = read_json(folder / "run.json")
    return {key: value for key, value in found.items() if isinstance(value, RUN.get(key, object))}


def read_json(path: Path) -> dict:
    """A JSON object from disk; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_no_pointer(*paths: Path) -> None:
    """Raise UserError for a Git LFS pointer: what a clone without git-lfs leaves in a file's place."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(30).startswith(b"version https://git-lfs"):
                    raise UserError(f"{path} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull")


def digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def nearest_existing(path: Path) -> Path:
    """`path`, or the first of its parents that exists."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_writable(path: Path) -> None:
    """Raise UserError unless files can be made in `path` (which need not exist yet), and another folder beside it."""
    sibling(path, ".{}.incoming")
    try:
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(2, f"it is a link to {path.readlink()}, which is not there")
        nearest = nearest_existing(path)
        if not nearest.is_dir():
            raise NotADirectoryError(20, f"{nearest} is a file")
        probe = nearest / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine on the same disk may have the same process id
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}. Choose another folder.") from None


def check_replaceable(folder: Path, key: str) -> bool:
    """Whether `folder` holds what a run of this kind left, by a key of its run.json; UserError where it holds anything else."""
    if os.path.ismount(folder):
        raise UserError(f"{folder} is a disk of its own, and cannot be replaced as a whole. Choose a folder in it.")
    holds = folder.is_dir() and any(folder.iterdir())
    if holds and key not in read_run(folder):
        raise UserError(f"{folder} holds something else than what would take its place, and it stays. Choose another folder.")
    return holds


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """No other process writes to `folder` meanwhile. A killed process leaves no lock (flock(2)). Raises UserError.

    Of several processes of one run the first asks for all.
    """
    if process_index():
        yield
        return
    folder = folder.resolve()
    lock = FileLock(sibling(folder, ".{}.lock"), timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {folder}. Wait until it has ended, or choose another folder.") from None
    except OSError as error:
        raise UserError(f"cannot write beside {folder}: {error.strerror}. Choose another folder.") from None
    try:
        yield
    finally:
        lock.release()
