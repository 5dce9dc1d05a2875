"""The state of a rollout on the device, and how many sequences of it memory holds."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from phi2_grpo.rollout.sampling import Sampling

CGROUPS, MY_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LENGTH_MULTIPLE = 128  # cache lengths are multiples of it, so that a rollout needs few CUDA graphs
MAX_ROWS = {"cuda": 256, "mps": 64, "cpu": 64}


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type != "cuda":
        mps = device.type == "mps"  # what its allocator keeps is free for us, and not for others
        kept = torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory() if mps else 0
        return min([psutil.virtual_memory().available, *free_in_groups()]) + kept
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_in_groups() -> list[int]:
    """Bytes that the limits of a container, or of a scheduler's job, leave: Linux' control groups v2. Empty without limits."""
    free = []
    own = CGROUPS / (MY_GROUP.read_text() if MY_GROUP.exists() else "").rpartition("::/")[2].strip()
    for group in (own, *own.parents):
        with suppress(OSError, ValueError, KeyError):  # not each group counts its memory
            limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit != "max":
                free.append(int(limit) - int(used) + int(stat["inactive_file"]))  # what of files is kept can be dropped
    return free


def round_length(length: int) -> int:
    """The next multiple of LENGTH_MULTIPLE."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def cache_shape(config) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their size."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


def cache_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    layers, heads, head_dim = cache_shape(config)
    return 2 * layers * heads * head_dim * dtype.itemsize


def rows_within(free: float, bytes_per_row: int, reserve: int, device: torch.device) -> int:
    """Sequences to decode at once in `free` bytes, of which `reserve` are left to others."""
    available = 0.9 * free - reserve  # the last tenth is for logits and the prefill
    if device.type != "cuda":  # there others give memory back, and row by row a rollout takes many times as long
        available = max(available, min(0.1 * free, free - reserve))
    return max(1, min(MAX_ROWS[device.type], int(available / bytes_per_row)))


def rows_that_fit(model, length: int, reserve: int = 0) -> int:
    """The same for sequences of `length` tokens of a loaded model, in the memory that is free now."""
    bytes_per_row = round_length(length) * cache_bytes_per_token(model.config, model.dtype)
    return rows_within(free_memory(model.device), bytes_per_row, reserve, model.device)


class DecodeState:
    """A batch that is being decoded. Its tensors keep their addresses, by which a captured CUDA graph finds them.

    `tokens`, `positions`, `finished` and `sample_index` (the completion that a row decodes) are by row; `uniforms`,
    `output_ids` and `log_probs` by completion.
    """

    def __init__(self, decode_step, rows: int, length: int):
        self.rows, self.length, self.device = rows, length, decode_step.device
        self.cache = decode_step.new_cache(rows, length)
        with self.device:
            self.tokens, self.positions, self.sample_index = torch.zeros(3, rows, dtype=torch.long)
            self.finished = torch.zeros(rows, dtype=torch.bool)
            self.uniforms = torch.zeros(rows, length, dtype=torch.float64)
            self.output_ids = torch.zeros(rows, length, dtype=torch.long)
            self.log_probs = torch.zeros(rows, length)
            self.count = torch.zeros(1, dtype=torch.long)  # tokens sampled so far by each live row

    def reset(self, prompt_ids: list[list[int]], uniforms: torch.Tensor) -> None:
        """Begin a batch. `uniforms` (B, new tokens) decide what is sampled."""
        rows, new = uniforms.shape
        self.positions[:rows] = torch.tensor(list(map(len, prompt_ids)), device=self.device)
        torch.arange(rows, out=self.sample_index[:rows])
        self.finished.zero_()
        self.count.zero_()
        self.uniforms[:rows, :new] = uniforms.to(self.device)

    def append_tokens(self, logits: torch.Tensor, sampling: Sampling) -> None:
        """Sample a token from each row of `logits` (B, V), for the first B rows."""
        rows = len(logits)
        sample_index = self.sample_index[:rows]
        tokens, log_probs = sampling.sample(logits, self.uniforms[sample_index, self.count][:, None])
        self.log_probs[sample_index, self.count] = log_probs
        self.output_ids[sample_index, self.count] = tokens
        self.tokens[:rows] = tokens
        for eos in sampling.eos_token_ids:
            self.finished[:rows] |= tokens == eos
        self.count += 1

    def compact_finished(self, rows: int, power_of_two: bool) -> tuple[int, int]:
        """Move the unfinished of the first `rows` rows to the front.

        Returns how many rows to decode from now on (0: all have finished), and the largest of their positions. With
        `power_of_two` their number is one, because each number of rows needs CUDA graphs of its own.
        """
        finished, positions = self.finished[:rows].tolist(), self.positions[:rows].tolist()
        live = [row for row in range(rows) if not finished[row]]
        if not live:
            return 0, 0
        length = max(positions[row] for row in live)
        kept = min(rows, 1 << (len(live) - 1).bit_length()) if power_of_two else len(live)
        source = [row for row in live if row >= kept]
        target = [row for row in range(kept) if finished[row]][: len(source)]
        if source:
            source, target = (torch.tensor(index, device=self.device) for index in (source, target))
            for tensor in (self.tokens, self.positions, self.finished, self.sample_index):
                tensor[target] = tensor[source]
            for layer in self.cache:
                layer[target, :, :, :length] = layer[source, :, :, :length]
        return kept, length
