"""Rollout engines: token ids of prompts and a GenerationConfig in, completion ids out.

`generate` is transformers' own, for every architecture. `fast` is ours, for Phi: each distinct prompt is prefilled once and its
cache copied to the rows of its group; finished rows are compacted away; on CUDA the decode step (phi_step.py) is captured as a
graph and replayed, so that no kernel waits for Python (as gpt-fast: https://pytorch.org/blog/accelerating-generative-ai-2/).
On the CPU the same steps run without the capture.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache, GenerationConfig, set_seed

from phi2_grpo.models.tokenizer import batches_by_length
from phi2_grpo.rollout.cache import DecodeState, round_length, rows_that_fit
from phi2_grpo.rollout.phi_step import PhiDecoder, unsupported_reason
from phi2_grpo.rollout.sampling import Sampling, generation_eos_ids, truncate_at_eos

FINISHED_CHECK_STEPS = 16  # decode steps on CUDA between two checks for finished rows: each waits for the GPU


def choose_engine(name: str, model) -> tuple[str, str]:
    """The engine for `--rollout name` (auto, generate or fast) and `model`, and why, in words."""
    if name == "generate":
        return "generate", "transformers' generate, as asked for"
    if reason := unsupported_reason(model):
        return "generate", f"transformers' generate, for fast does not support this: {reason}"
    return "fast", "one prefill a group, finished rows compacted; on CUDA each decode step is one graph"


def make_engine(name: str, model, rows: int = 0, reserve: int = 0):
    """The engine that `choose_engine` names, over `model` as it is at each call.

    Args:
        rows: completions decoded at once; 0 for as many as fit.
        reserve: bytes to leave free beside the engine's cache.
    """
    engine, _ = choose_engine(name, model)
    return FastEngine(model, rows, reserve) if engine == "fast" else GenerateEngine(model, rows, reserve)


@contextmanager
def eval_mode(model) -> Iterator[None]:
    """Inside, `model` is in eval mode: in training mode, activation checkpointing switches the cache off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class GenerateEngine:
    """transformers' generate, in batches."""

    def __init__(self, model, rows: int = 0, reserve: int = 0):
        self.model, self.rows, self.reserve = model, rows, reserve

    def __call__(self, prompts: list[list[int]], generation: GenerationConfig, tokenizer=None) -> list[list[int]]:
        """Completion ids of each prompt; the end token is kept, padding is not. `tokenizer` is needed for stop strings."""
        rows = self.rows or rows_that_fit(self.model, max(map(len, prompts)) + generation.max_new_tokens, self.reserve)
        with eval_mode(self.model):
            return [ids for start in range(0, len(prompts), rows)
                    for ids in self._batch(prompts[start : start + rows], generation, tokenizer)]  # fmt: skip

    @torch.no_grad()
    def _batch(self, prompts, generation, tokenizer):
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), generation.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        output = self.model.generate(**inputs, generation_config=generation, tokenizer=tokenizer)
        return [truncate_at_eos(row, generation_eos_ids(generation)) for row in output[:, longest:].tolist()]


class FastEngine:
    """Our engine. It keeps its cache and its graphs between calls, for a captured graph knows the cache by its address.

    Random numbers come from torch's CPU generator, one for each completion and token: batches, compaction and the device
    change nothing of what is sampled.
    """

    def __init__(self, model, rows: int = 0, reserve: int = 0):
        self.model, self.rows, self.reserve = model, rows, reserve
        self.decoder = PhiDecoder(model)
        self.cuda = self.decoder.device.type == "cuda"
        self.state: DecodeState | None = None
        self.stream = torch.cuda.Stream() if self.cuda else None  # one for all captures: libraries keep a workspace a stream
        self._forget_graphs()

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], generation: GenerationConfig, tokenizer=None) -> list[list[int]]:
        """As GenerateEngine's. Stop strings are left to what trims the answers; the context ends a completion."""
        try:
            sampling = Sampling.of(generation)
        except ValueError:  # someone has edited an adapter's generation_config.json
            return GenerateEngine(self.model, self.rows, self.reserve)(prompts, generation, tokenizer)
        new = max(0, min(generation.max_new_tokens, self.decoder.context - max(map(len, prompts))))
        uniforms = None if sampling.greedy else torch.rand(len(prompts), new, dtype=torch.float64)
        if self.decoder.sync_adapter():
            self._forget_graphs()
        rows = self._make_room(len(prompts), max(map(len, prompts)) + new)
        completions = []
        with eval_mode(self.model):
            for start in range(0, len(prompts), rows):
                part = slice(start, start + rows)
                completions += self._batch(prompts[part], sampling, new, None if uniforms is None else uniforms[part])
        return completions

    def _forget_graphs(self) -> None:
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool = None  # the pool of graphs that are gone may not be used again

    def _make_room(self, rows: int, length: int) -> int:
        """State for `rows` sequences of `length` tokens, or for as many as fit; returns how many."""
        length, state = round_length(length), self.state
        if state and state.length >= length and state.rows >= min(rows, self.fit):
            return state.rows
        if state:
            rows, length = max(rows, state.rows), max(length, state.length)
        self._forget_graphs()
        self.state = state = None  # freed before the free memory is read
        self.fit = self.rows or rows_that_fit(self.model, length, self.reserve)
        self.state = DecodeState(self.decoder, min(rows, self.fit), length)
        return self.state.rows

    def _batch(self, prompts: list[list[int]], sampling: Sampling, new: int, uniforms: torch.Tensor | None) -> list[list[int]]:
        state, rows = self.state, len(prompts)
        highest = max(map(len, prompts))  # position of the next token, in the longest row
        state.reset(prompts, uniforms)
        if new:
            state.append_tokens(self._prefill(prompts), rows, sampling)
        for count in range(1, new):
            if count % (FINISHED_CHECK_STEPS if self.cuda else 1) == 0:
                rows, highest = state.compact_finished(rows, halves=self.cuda)
                if not rows:
                    break
            self._advance(rows, highest + 1, sampling)
            highest += 1
        return [truncate_at_eos(ids, sampling.eos_ids) for ids in state.output_ids[: len(prompts), :new].tolist()]

    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Run each distinct prompt through the model once, and copy its keys and values to all its rows; logits (B, V)."""
        decoder, cache = self.decoder, self.state.cache
        rows_of: dict[tuple, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        distinct, logits = list(rows_of), None
        for batch in batches_by_length(list(map(len, distinct))):
            part = [distinct[i] for i in batch]
            longest = len(part[-1])
            # Padded on the right: a causal model never attends there, and decoding overwrites it.
            ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in part], device=decoder.device)
            past = DynamicCache()
            hidden = decoder.model.model(input_ids=ids, past_key_values=past, use_cache=True).last_hidden_state
            last = torch.tensor([len(prompt) - 1 for prompt in part], device=decoder.device)
            part_logits = decoder.model.lm_head(hidden[torch.arange(len(part), device=decoder.device), last])  # (prompts, V)
            pairs = [(row, i) for i, prompt in enumerate(part) for row in rows_of[prompt]]
            to, source = (torch.tensor(side, device=decoder.device) for side in zip(*pairs, strict=True))
            for cached, layer in zip(cache, past.layers, strict=True):
                cached[to, 0, :, :longest] = layer.keys[source]
                cached[to, 1, :, :longest] = layer.values[source]
            logits = part_logits.new_empty(len(prompts), part_logits.shape[-1]) if logits is None else logits
            logits[to] = part_logits[source]
        return logits

    def _advance(self, rows: int, length: int, sampling: Sampling) -> None:
        """Decode one token for the first `rows` rows, which have at most `length` tokens each, this one included."""
        if not self.cuda:
            return self._step(rows, length, sampling)
        length = min(round_length(length), self.state.length)
        key = (rows, length, sampling)
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        self.graphs[key].replay()

    def _step(self, rows: int, length: int, sampling: Sampling) -> None:
        state = self.state
        logits = self.decoder.logits(state.tokens[:rows], state.positions[:rows], state.cache, length)
        state.positions[:rows] += 1  # of finished rows too: none goes further than an unfinished one could
        state.append_tokens(logits, rows, sampling)

    def _capture(self, rows: int, length: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """The step as a graph; the state is unchanged when it returns."""
        changed = self.state.changed_by_step()
        before = [tensor.clone() for tensor in changed]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # once without capture: libraries choose and allocate at their first call
            self._step(rows, length, sampling)
        torch.cuda.current_stream().wait_stream(self.stream)
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(old)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Graphs run one after another, so they may share their memory.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self._step(rows, length, sampling)
        return graph


def complete(engine, tokenizer, prompts: list[str], generation: GenerationConfig, seed: int) -> list[list[int]]:
    """Completion ids for rendered prompts, in their order; the end token is kept, the padding is not.

    `seed` is set before, so that two models sample with the same random numbers.
    """
    completions = next(complete_in_batches(engine, tokenizer, prompts, generation, len(prompts), seed))
    return [completions[i] for i in range(len(prompts))]


def complete_in_batches(
    engine, tokenizer, prompts: list[str], generation: GenerationConfig, batch_size: int, seed: int
) -> Iterator[dict[int, list[int]]]:
    """The same in batches, by the prompts' indices. The seed of a batch is `seed` plus where it begins."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: less padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = tokenizer([prompts[i] for i in batch], add_special_tokens=False)["input_ids"]
        set_seed(seed + start)
        yield dict(zip(batch, engine(ids, generation, tokenizer), strict=True))
