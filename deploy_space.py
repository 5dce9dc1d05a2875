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
VARIABLES = {"GRADIO_SSR_MODE": "false", "GRADIO_ANALYTICS_ENABLED": "False"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


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
    from phi2_grpo.common.console import Console, make_table

    console = Console()
    name = hub.check_name(arguments.name)
    adapter = Path(config["adapter"])
    with tempfile.TemporaryDirectory(prefix="space-") as folder:
        left_out = stage(Path(folder), adapter, arguments.with_samples)
        table = make_table(f"What the Space {name} gets", "file", "size")
        sent = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        for path in sent:
            table.add_row(str(path.relative_to(folder)), decimal(path.stat().st_size))
        table.add_row(f"{len(sent)} files", decimal(sum(path.stat().st_size for path in sent)), style="bold")
        console.print(table)
        for each in left_out:
            console.print(f"left out: {each}")
        problems = check_adapter(adapter) + check_files(Path(folder)) + check_hub(name, adapter, arguments.update)
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
        f"Wrong? The whole log is there, and on the page under Logs. Again, after a change: --update",
    )


def stage(folder: Path, adapter: Path, with_samples: bool = False) -> list[str]:
    """Copy exactly what the Space needs into an empty folder; returns what was left out. The header names the base."""
    from huggingface_hub import RepoCard

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of_adapter

    for name in APP_FILES:
        shutil.copyfile(APP / name, folder / name)
    (folder / "model_adapters").mkdir()
    sent, left_out = hub.public_files(hub.adapter_files(adapter), with_samples)
    for file, content in sent.items():
        (folder / "model_adapters" / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if hub.is_id(base := base_of_adapter(adapter)[0]):
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = card.data["preload_from_hub"] = [base]
        card.data["title"] = f"{base.split('/')[-1]} GRPO"
        card.save(folder / "README.md")
    return left_out


def check_adapter(adapter: Path) -> list[str]:
    """What is wrong with the adapter: incomplete, unreadable, or of a base that no Space can load."""
    from safetensors import SafetensorError, safe_open

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of_adapter
    from phi2_grpo.models.lora import check_adapter

    try:
        check_adapter(str(adapter))
        with safe_open(adapter / "adapter_model.safetensors", "np") as weights:
            if not any("lora_A" in key for key in weights.keys()):  # noqa: SIM118, it is no dict
                return ["adapter: adapter_model.safetensors holds no LoRA weights. Copy it again whole."]
    except cli.UserError as error:
        return [f"adapter: {error}"]
    except (SafetensorError, OSError) as error:
        return [f"adapter: adapter_model.safetensors cannot be read: {error}. Copy it again whole."]
    if not hub.is_id(base := base_of_adapter(adapter)[0]):
        return [
            f"base: the adapter was trained on the folder {base}, and a Space loads its base from the Hub. Train on one there."
        ]
    return []


def check_files(folder: Path) -> list[str]:
    """What is wrong with the staged files: the header, and versions that are not those of the training."""
    from huggingface_hub import RepoCard

    problems = []
    header = RepoCard.load(folder / "README.md").data.to_dict()
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (folder / "requirements.txt").read_text(), re.MULTILINE))
    for key in ("title", "sdk", "sdk_version", "python_version", "app_file"):
        if not header.get(key):
            problems.append(f"header: {key} is missing in hf_app/README.md.")
    if header.get("sdk") != "gradio" or header.get("sdk_version") != pins.get("gradio"):
        problems.append(f"header: sdk_version {header.get('sdk_version')} is not requirements' gradio {pins.get('gradio')}.")
    if not (folder / str(header.get("app_file"))).is_file():
        problems.append(f"header: app_file {header.get('app_file')} is not among the files.")
    if {header.get("colorFrom"), header.get("colorTo")} - COLORS:
        problems.append(f"header: colorFrom and colorTo take {', '.join(sorted(COLORS))}.")
    if len(header.get("short_description", "")) > 60:
        problems.append("header: short_description has more than 60 characters.")
    versions = files.read_run(folder / "model_adapters").get("versions", {})
    for package in sorted(pins.keys() & versions.keys()):
        if str(versions[package]).split("+")[0] != pins[package]:  # 2.13.0+cpu is 2.13.0
            problems.append(
                f"versions: trained with {package} {versions[package]}, but hf_app/requirements.txt has {pins[package]}. "
                "Set it there, and look that the app still runs."
            )
    return problems


def check_hub(name: str, adapter: Path, update: bool) -> list[str]:
    """What the Hub says against it: no token or a wrong one, the name in use, the base unknown."""
    from huggingface_hub import HfApi

    from phi2_grpo.common import hub
    from phi2_grpo.models.base import base_of_adapter

    try:
        hub.check_account(name)
        with hub.clear_errors(name):
            there = HfApi().repo_exists(name, repo_type="space")
        if there and not update:
            return [f"name: the Space {name} exists. --update replaces its files; or choose another name."]
        if update and not there:
            return [f"name: there is no Space {name} to update. Leave --update out."]
        if hub.is_id(base := base_of_adapter(adapter)[0]):
            with hub.clear_errors(base):
                if not HfApi().repo_exists(base):
                    return [f"base: {base} is not on the Hub, or your token may not see it."]
    except cli.UserError as error:
        return [f"Hub: {error}"]
    return []


def deploy(name: str, folder: str, arguments) -> None:
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
                space_variables=[{"key": key, "value": value} for key, value in VARIABLES.items()],
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
