"""What the libraries must be told before they are imported."""

import ctypes
import os
import socket
import sys
import warnings
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio is built on Gradio
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRACKIO_DIR": str(Path("results/trackio").resolve()),
}
if not sys.stderr.isatty():
    DEFAULTS["TQDM_DISABLE"] = "1"  # in a log file the libraries' progress bars are noise


def prepare(*hub_names: str) -> None:
    """Quiet libraries, no telemetry, and no long wait for a Hub that cannot be reached.

    `hub_names`: models, data sets and rewards. Offline, huggingface_hub tries every file for half a minute, even one that is
    in the cache; so where one of the names is no local path, the Hub is tried once, and the cache alone is used if it is away.
    """
    os.environ |= DEFAULTS | dict(os.environ)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which it hands on to `!python`, is not installed here
    if sys.platform == "linux":
        # glibc keeps freed memory for the next tensor: M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) at the largest int, or
        # at 32 MiB, which is the most that an older glibc takes for the second.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**31 - 1) or mallopt(-3, 2**25)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the tests show them, when a pin moves
    # PEFT looks for the base on the Hub at each save.
    warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file")
    paths = [Path(name.rpartition(":")[0] or name).expanduser() for name in hub_names if "/" in name]  # without a weight
    if any(not path.exists() for path in paths) and "HF_HUB_OFFLINE" not in os.environ and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _reachable() -> bool:
    if getproxies().keys() & {"https", "all"}:  # of the environment, or a Mac's settings
        return True  # only the proxy knows
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True
