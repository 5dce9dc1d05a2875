"""Put the app and an adapter on a Hugging Face Space.

  python deploy_space.py USER/NAME --dry_run                    # list the files, and what would stop a deployment
  python deploy_space.py USER/NAME --adapter results/phi2-grpo-final
  python deploy_space.py USER/NAME --adapter DIR --update       # replace the files of a Space that is there

Sent: the four files of hf_app/ and the adapter's own, no checkpoints. The base comes from the Hub when the Space starts.
"""

import shutil
import tempfile
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = ("adapter",)
APP = Path(__file__).resolve().parent / "hf_app"
APP_FILES = ("README.md", "app.py", "engine.py", "requirements.txt")


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("name", metavar="USER/NAME", help="the Space; the app will stand at its address")
    parser.add_argument("--private", action="store_true", help="only you see a new Space")
    parser.add_argument("--hardware", help="of a new Space (default: zero-a10g, which is ZeroGPU)")
    parser.add_argument("--update", action="store_true", help="the Space exists: replace all of its files, keep its settings")
    parser.add_argument("--dry_run", action="store_true", help="send nothing: list the files and what would stop a deployment")
    config, arguments = cli.parse(parser)
    if arguments.update and (arguments.private or arguments.hardware):
        text = "--private and --hardware are for a new Space, and --update keeps its settings. Change them on the Space's page."
        raise cli.UserError(text)
    setup.prepare()

    from rich.filesize import decimal

    from phi2_grpo.common.console import Console

    console, adapter, name = Console(), Path(config["adapter"]), arguments.name
    with tempfile.TemporaryDirectory(prefix="space-") as temporary:
        folder = Path(temporary)
        changed = stage(folder, adapter)
        console.print(f"The Space {name} gets:")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            console.print(f"  {decimal(path.stat().st_size):>9}  {path.relative_to(folder)}")
        for each in changed:
            console.print(f"changed: {each}")
        problems = []
        for check in (check_adapter, check_hub):
            try:
                check(adapter, name, arguments.update)
            except cli.UserError as error:
                problems.append(str(error))
        if problems:
            raise cli.UserError("\n".join([*problems, "Nothing was sent."]))
        if arguments.dry_run:
            return console.print("Nothing was sent; nothing stands in the way.")
        deploy(name, folder, arguments)
    console.print(
        f"\nhttps://huggingface.co/spaces/{name}\n"
        f"It builds now, some minutes the first time. To follow it: hf spaces logs {name} --build --follow\n"
        "After a change, send all files again: the same command with --update"
    )


def stage(folder: Path, adapter: Path) -> list[str]:
    """Copy exactly what the Space needs into an empty folder; returns what was changed. The header names the base."""
    from huggingface_hub import RepoCard

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of

    for name in APP_FILES:
        shutil.copyfile(APP / name, folder / name)
    (folder / "model_adapters").mkdir()
    public, changed = hub.public_files(hub.adapter_files(adapter))
    for file, content in public.items():
        (folder / "model_adapters" / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    base, _ = base_of(adapter)
    if hub.is_id(base):
        card = RepoCard.load(folder / "README.md")
        for key, value in {"models": [base], "preload_from_hub": [base], "title": f"{base.split('/')[-1]} GRPO"}.items():
            card.data[key] = value
        card.save(folder / "README.md")
    return changed


def check_adapter(adapter: Path, *_) -> None:
    """Raise UserError for an adapter that is incomplete or broken, or of a base that no Space can load."""
    from phi2_grpo.common import hub
    from phi2_grpo.models import base, lora

    name, _ = base.base_of(lora.check_adapter(str(adapter)))
    if not hub.is_id(name):
        raise cli.UserError(f"the adapter's base is the folder {name}; a Space loads it from the Hub. Train on a base there.")


def check_hub(adapter: Path, name: str, update: bool) -> None:
    """Raise UserError where the Hub is against it: no token or a wrong one, the name taken, the base unknown."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of

    base, _ = base_of(adapter)
    hub.check_account(name)
    with hub.clear_errors(name):
        exists = HfApi().repo_exists(name, repo_type="space")
        base_exists = not hub.is_id(base) or HfApi().repo_exists(base)
    if exists != update:
        remedy = "exists: replace its files with --update" if exists else "does not exist: leave --update out"
        raise cli.UserError(f"the Space {name} {remedy}, or give another name.")
    if not base_exists:
        raise cli.UserError(f"the base {base} is not on the Hub, or your token may not see it. Train on a base there.")


def deploy(name: str, folder: Path, arguments) -> None:
    """Create the Space unless it is there, then send everything in one commit."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub

    with hub.clear_errors(name):
        if not arguments.update:
            private, hardware = arguments.private or None, arguments.hardware or "zero-a10g"  # None: as the organization has it
            HfApi().create_repo(name, repo_type="space", space_sdk="gradio", space_hardware=hardware, private=private)
    message = "The app and its adapter"
    with hub.clear_errors(f"{name} (the Space exists; go on with --update)"):
        HfApi().upload_folder(repo_id=name, repo_type="space", folder_path=folder, commit_message=message, delete_patterns="*")


if __name__ == "__main__":
    cli.run(main)
