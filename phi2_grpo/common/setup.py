"""What the libraries must be told before they are imported."""

import ctypes
import os
import socket
import sys
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
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which it hands on to `!python`, is not installed here
    os.environ.setdefault("TRACKIO_DIR", str(Path("results/trackio").resolve()))
    _keep_memory()
    # Ours to heed when a pin moves (the tests show them), not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    remote = [name for name in hub_names if name != "tiny" and not Path(name).expanduser().exists()]
    if remote and "HF_HUB_OFFLINE" not in os.environ and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _keep_memory() -> None:
    """Let glibc keep freed memory for the next tensor, instead of a page fault for each page of each large one.

    M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) of mallopt(3), at the largest int; an older glibc refuses the second.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(-1, 2**31 - 1)
            mallopt(-3, 2**31 - 1)


def _reachable() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy's business
    try:
        address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=5).close()
        return True
    except (OSError, ValueError):  # ValueError: HF_ENDPOINT is no address
        return False
