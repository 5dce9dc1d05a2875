"""Put the app and an adapter on a Hugging Face Space.

  python deploy_space.py USER/NAME --dry_run                    # list the files, and what would stop a deployment
  python deploy_space.py USER/NAME --adapter results/phi2-grpo-final
  python deploy_space.py USER/NAME --update                     # replace the files of a Space that is there

Sent: the four files of hf_app/ and the adapter's own, no checkpoints. The base comes from the Hub when the Space starts.
"""

import re
import shutil
import tempfile
from pathlib import Path

from phi2_grpo.common import cli, files, setup

KEYS = ("adapter",)
APP = Path(__file__).resolve().parent / "hf_app"
APP_FILES = ("README.md", "app.py", "engine.py", "requirements.txt")
# Set on the Space; each is also the default in app.py where Gradio reads it there.
VARIABLES = [{"key": "GRADIO_SSR_MODE", "value": "false"}, {"key": "GRADIO_ANALYTICS_ENABLED", "value": "False"}]


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("name", metavar="USER/NAME", help="the Space; the app will stand at its address")
    parser.add_argument("--private", action="store_true", help="only you see the Space")
    parser.add_argument("--hardware", default="zero-a10g", help="of a new Space (default: zero-a10g, the free ZeroGPU)")
    parser.add_argument("--update", action="store_true", help="the Space exists: replace its files, keep its settings")
    parser.add_argument("--with_samples", action="store_true", help="held-out prompts and their answers are sent, too")
    parser.add_argument("--dry_run", action="store_true", help="send nothing: list the files and what would stop a deployment")
    config, arguments = cli.parse(parser)
    setup.prepare()

    from rich.filesize import decimal

    from phi2_grpo.common import hub
    from phi2_grpo.common.console import Console

    console, adapter, name = Console(), Path(config["adapter"]), hub.check_name(arguments.name)
    with tempfile.TemporaryDirectory(prefix="space-") as temporary:
        folder = Path(temporary)
        left_out = stage(folder, adapter, arguments.with_samples)
        console.print(f"The Space {name} gets:")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            console.print(f"  {decimal(path.stat().st_size):>9}  {path.relative_to(folder)}")
        for each in left_out:
            console.print(f"left out: {each}")
        problems = check_adapter(adapter) + check_versions(folder) + check_hub(name, adapter, arguments.update)
        if arguments.dry_run:
            for problem in problems:
                console.print(f"would stop a deployment: {problem}", style="yellow")
            console.print("Nothing was sent." if problems else "Nothing was sent; nothing stands in the way.")
            return
        if problems:
            raise cli.UserError("\n".join(problems))
        deploy(name, folder, arguments)
    console.print(
        f"\nhttps://huggingface.co/spaces/{name}\n"
        f"It builds now, some minutes the first time. To follow it: hf spaces logs {name} --build\n"
        f"After a change, send the files again: --update"
    )


def stage(folder: Path, adapter: Path, with_samples: bool) -> list[str]:
    """Copy exactly what the Space needs into an empty folder; returns what was left out. The header names the base."""
    from huggingface_hub import RepoCard

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of_adapter

    for name in APP_FILES:
        shutil.copyfile(APP / name, folder / name)
    (folder / "model_adapters").mkdir()
    public, left_out = hub.public_files(hub.adapter_files(adapter), with_samples)
    for file, content in public.items():
        (folder / "model_adapters" / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    base, _ = base_of_adapter(adapter)
    if hub.is_id(base):
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = card.data["preload_from_hub"] = [base]
        card.data["title"] = f"{base.split('/')[-1]} GRPO"
        card.save(folder / "README.md")
    return left_out


def check_adapter(adapter: Path) -> list[str]:
    """What is wrong with the adapter: incomplete, unreadable, or of a base that no Space can load."""
    from phi2_grpo.common import hub
    from phi2_grpo.models import base, lora

    try:
        lora.check_adapter(str(adapter))
    except cli.UserError as error:
        return [f"adapter: {error}"]
    name, _ = base.base_of_adapter(adapter)
    return (
        [] if hub.is_id(name) else [f"base: {name} is a folder, and a Space loads its base from the Hub. Train on one there."]
    )


def check_versions(folder: Path) -> list[str]:
    """Which of the app's packages are not of the version that the adapter was trained with."""
    pins = re.findall(r"^([\w-]+)==(.+)$", (folder / "requirements.txt").read_text(), re.MULTILINE)
    trained = files.read_run(folder / "model_adapters").get("versions", {})
    return [
        f"versions: trained with {package} {trained[package]}, but hf_app/requirements.txt has {pin}. Set it there and test it."
        for package, pin in pins
        if package in trained and str(trained[package]).split("+")[0] != pin  # 2.13.0+cpu is 2.13.0
    ]


def check_hub(name: str, adapter: Path, update: bool) -> list[str]:
    """What the Hub says against it: no token or a wrong one, the name taken, the base unknown."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of_adapter

    base, _ = base_of_adapter(adapter)
    try:
        hub.check_account(name)
        with hub.clear_errors(name):
            exists = HfApi().repo_exists(name, repo_type="space")
            base_is_there = not hub.is_id(base) or HfApi().repo_exists(base)
    except cli.UserError as error:
        return [f"Hub: {error}"]
    problems = [] if base_is_there else [f"base: {base} is not on the Hub, or your token may not see it."]
    if exists and not update:
        problems.append(f"name: the Space {name} exists. --update replaces its files; or choose another name.")
    if update and not exists:
        problems.append(f"name: there is no Space {name} to update. Leave --update out.")
    return problems


def deploy(name: str, folder: Path, arguments) -> None:
    """Create the Space unless it is there, then send everything in one commit."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub

    with hub.clear_errors(name):
        if not arguments.update:
            HfApi().create_repo(
                name,
                repo_type="space",
                space_sdk="gradio",
                space_hardware=arguments.hardware,
                space_variables=VARIABLES,
                private=arguments.private,
            )
    try:
        with hub.clear_errors(name):
            HfApi().upload_folder(
                repo_id=name,
                repo_type="space",
                folder_path=folder,
                commit_message="The app and its adapter",
                delete_patterns="*",
            )
    except cli.UserError as error:
        again = "" if arguments.update else f"\n  The Space {name} was made but is empty; go on with --update."
        raise cli.UserError(f"{error}{again}") from None


if __name__ == "__main__":
    cli.run(main)
