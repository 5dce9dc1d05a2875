"""What the libraries must be told before they are imported."""

import os
import socket
import warnings
from pathlib import Path
from urllib.parse import urlparse


def prepare(*hub_names: str) -> None:
    """Quiet libraries, no telemetry, and no long wait for a Hub that cannot be reached.

    Offline, huggingface_hub tries every file for half a minute, even one that is in the cache. One look at the Hub's
    address, where any of `hub_names` (models, data sets) is not a local path, saves that.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # trackio is built on Gradio
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRACKIO_DIR", str(Path("results/trackio").resolve()))
    # Ours to heed when a pin moves (the tests show them), not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    remote = [name for name in hub_names if name != "tiny" and not Path(name).expanduser().exists()]
    if remote and "HF_HUB_OFFLINE" not in os.environ and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _reachable() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy's business
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=5).close()
        return True
    except OSError:
        return False
