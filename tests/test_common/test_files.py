"""What is written is complete or not there, and what is not ours stays."""

from pathlib import Path

import pytest

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError


def test_a_failed_write_leaves_the_old(tmp_path, monkeypatch):
    files.write_json(tmp_path / "out" / "run.json", {"config": {}})
    with pytest.raises(ValueError), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise ValueError
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "out" / "run.json", {"loss": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError):
        files.write_text(tmp_path / "out" / "run.json", "half")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/run.json"]
    assert files.read_run(tmp_path / "out") == {"config": {}}


def test_a_run_that_was_killed_between_the_two_renames(tmp_path):
    (tmp_path / ".out.outgoing").mkdir()
    (tmp_path / ".out.outgoing" / "old").touch()
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out" / "old").exists()
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_whose_a_folder_is(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    files.write_json(tmp_path / "ours" / "run.json", {"config": {}})
    files.write_text(tmp_path / "theirs" / "run.json", '{"config": "of another program"}')

    def whose(name):
        return files.check_replaceable(tmp_path / name, lambda folder: "config" in files.read_run(folder))

    assert (whose("ours"), whose("empty"), whose("missing")) == (True, False, False)
    with pytest.raises(UserError, match="theirs"):
        whose("theirs")
    with pytest.raises(UserError, match="run.json"):
        files.check_writable(tmp_path / "ours" / "run.json" / "out")
    for writable in (True, False):  # the latter for users who are not root
        with monkeypatch.context() as patch, pytest.raises(UserError, match="another folder"):
            patch.setattr("os.access", lambda *_, writable=writable: writable)
            with files.lock_folder(Path("/")):
                pass
    with pytest.raises(OSError, match="too long"), files.lock_folder(tmp_path / ("a" * 250)):  # which every script explains
        pass
