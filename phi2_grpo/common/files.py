"""Outputs are written beside their place and moved in when complete: a killed run leaves the old or the new one."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phi2_grpo.common.cli import UserError, process_index

# What is read of a run.json, and its types. Other programs write files of that name too.
RUN = {"config": dict, "data": dict, "seconds": (int, float), "processes": int}


def sibling(path: Path, form: str) -> Path:
    """A neighbour of `path`; `form` has a place for its name. Raises UserError for a disk's root, which has none."""
    path = path if path.name not in ("", "..") else path.resolve()
    if not path.name:
        raise UserError(f"{path} is the root of a disk. Choose another folder.")
    return path.with_name(form.format(path.name))


def nearest_existing(path: Path) -> Path:
    """`path`, or the first of its parents that exists."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes the place of `path` when the block ends without an error."""
    path = path.resolve()  # a link stays one
    incoming, outgoing = sibling(path, ".{}.incoming"), sibling(path, ".{}.outgoing")

    def clean_up() -> None:
        if outgoing.exists() and not path.exists():
            outgoing.rename(path)  # stopped between the two renames below
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.rmtree(outgoing, ignore_errors=True)

    clean_up()  # after a run that was killed
    incoming.mkdir(parents=True)
    try:
        yield incoming
        open_to_umask(incoming)
        if path.exists():
            path.rename(outgoing)
        incoming.rename(path)
    finally:
        clean_up()


def open_to_umask(folder: Path) -> None:
    """Give files the rights of the user's umask: safetensors makes them readable by their owner alone."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some file systems have no such rights
                path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folder it stands in, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = sibling(path, ".{}.incoming")
    try:
        incoming.write_bytes(text.encode())
        os.replace(incoming, path)
    finally:
        incoming.unlink(missing_ok=True)  # of a disk that is full


def write_json(path: Path, data) -> None:
    """Write JSON atomically; NaN is refused, for it is no JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> dict:
    """A JSON object from disk; {} where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def read_run(folder: Path) -> dict:
    """The run.json of an adapter, a checkpoint or a reward model, without values of types that are not ours."""
    return {key: value for key, value in read_json(folder / "run.json").items() if isinstance(value, RUN.get(key, object))}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_no_pointer(*paths: Path) -> None:
    """Raise UserError for a Git LFS pointer: what a clone without git-lfs leaves in a file's place."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(30).startswith(b"version https://git-lfs"):
                    raise UserError(f"{path} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull")


def check_writable(path: Path) -> None:
    """Raise UserError unless files can be made in `path`, which need not exist yet."""
    nearest = nearest_existing(path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {path}: {nearest} is not a folder in which you may write. Choose another folder.")


def check_replaceable(folder: Path, is_ours: Callable[[Path], bool]) -> bool:
    """True where `folder` holds something of ours, False where it is empty or missing. Raises UserError for anything else."""
    full = folder.is_dir() and any(folder.iterdir())
    if os.path.ismount(folder) or (full and not is_ours(folder)):
        raise UserError(f"{folder} is not ours to replace: it holds other files, or is a mounted disk. Choose another folder.")
    return full


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """No other run writes to `folder` meanwhile. A killed process leaves no lock (flock(2)). Raises UserError."""
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    beside = sibling(folder, ".{}.lock")
    above = os.access(nearest_existing(folder.parent), os.W_OK)  # it may be another user's, as of a mounted disk
    lock = FileLock(beside if above else folder / ".lock", timeout=0)
    try:
        if process_index() == 0:  # of several processes of one run, the first holds the lock for all
            lock.acquire()  # and makes the folder above
    except Timeout:
        raise UserError(f"another run is writing to {folder}. Wait until it ends, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()
