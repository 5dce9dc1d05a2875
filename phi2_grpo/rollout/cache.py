"""The rollout's KV cache: how many sequences fit, and the state of the sequences being decoded."""

import psutil
import torch

from phi2_grpo.rollout.phi_step import PhiDecoder
from phi2_grpo.rollout.sampling import Sampling

LENGTH_MULTIPLE = 128  # a captured decode step reads a multiple of so many cache positions
CPU_ROWS = 64  # completions decoded at once on a CPU; 64 were no faster than 32 there (benchmarks/RESULTS.md)


def cache_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def round_length(length: int) -> int:
    """`length` as the cache has it: the next multiple of LENGTH_MULTIPLE."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def rows_in(free: float, row: int, reserve: int, device: torch.device) -> int:
    """How many sequences, `row` bytes of cache each, to decode at once in `free` bytes less `reserve`."""
    room = 0.9 * free - reserve  # the rest is for logits, and for the prefill
    return max(1, min(256 if device.type == "cuda" else CPU_ROWS, int(room / row)))


def rows_that_fit(loaded, length: int, reserve: int = 0) -> int:
    """The same for sequences of `length` tokens of a loaded model, in the memory that is free now."""
    row = round_length(length) * cache_bytes_per_token(loaded.config, loaded.dtype)
    return rows_in(free_memory(loaded.device), row, reserve, loaded.device)


class DecodeState:
    """A batch being decoded: tensors on the device whose addresses stay, for captured graphs.

    By row: `tokens`, `positions`, `finished` and `sample_index` (the completion that a row belongs to). By completion:
    `uniforms` (random numbers in [0, 1), one a token) and `output_ids`.
    """

    def __init__(self, decoder: PhiDecoder, rows: int, length: int):
        self.rows, self.length = rows, length
        device, shape = decoder.device, (len(decoder.layers), rows, 2, decoder.heads, length, decoder.head_width)
        # Zeros: what lies behind a row's end is masked, and 0 x NaN is NaN.
        self.cache = torch.zeros(shape, dtype=decoder.dtype, device=device)
        self.tokens, self.positions, self.sample_index = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.output_ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens sampled so far

    def changed_by_step(self) -> list[torch.Tensor]:
        """What a step changes, but for the cache: a repeated step writes the same there."""
        return [self.tokens, self.positions, self.finished, self.output_ids, self.count]

    def reset(self, prompts: list[list[int]], uniforms: torch.Tensor | None) -> None:
        rows = len(prompts)
        self.positions[:rows] = torch.tensor([len(prompt) for prompt in prompts], device=self.positions.device)
        torch.arange(rows, out=self.sample_index[:rows])
        self.finished.zero_()
        self.count.zero_()
        if uniforms is not None:
            self.uniforms[:rows, : uniforms.shape[1]] = uniforms.to(self.uniforms.device)

    def append_tokens(self, logits: torch.Tensor, rows: int, sampling: Sampling) -> None:
        """Sample a token for each of the first `rows` rows, and append it."""
        sample_index = self.sample_index[:rows]
        tokens = sampling.sample(logits, self.uniforms[sample_index, self.count][:, None])
        self.output_ids[sample_index, self.count] = tokens
        self.tokens[:rows] = tokens
        for end in sampling.eos_ids:
            self.finished[:rows] |= tokens == end
        self.count += 1

    def compact_finished(self, rows: int, halves: bool) -> tuple[int, int]:
        """Move unfinished rows to the front; returns how many rows go on (0: all are finished), and their highest position.

        `halves`: only by halves, as every number of rows is a graph of its own.
        """
        finished, positions = self.finished[:rows].tolist(), self.positions[:rows].tolist()
        live = [row for row in range(rows) if not finished[row]]
        if not live:
            return 0, 0
        kept = min(rows, 1 << (len(live) - 1).bit_length()) if halves else len(live)
        movers = [row for row in live if row >= kept]
        if movers:
            holes = [row for row in range(kept) if finished[row]][: len(movers)]
            highest = max(positions[row] for row in movers)
            to, source = (torch.tensor(side, device=self.tokens.device) for side in (holes, movers))
            for tensor in (self.tokens, self.positions, self.finished, self.sample_index):
                tensor[to] = tensor[source]
            for cached in self.cache:
                cached[to, :, :, :highest] = cached[source, :, :, :highest]
        return kept, max(positions[row] for row in live)
