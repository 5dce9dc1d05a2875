"""Rollouts: prompts and sampling settings in, completions out, all as token ids. There are two engines.

`GenerateEngine` is transformers' generate, for every architecture. `FastEngine` is ours, for decoders with ordinary attention
(decode_step.py, and phi_step.py for Phi): each distinct prompt is prefilled once and its cache copied to the rows of its group;
finished rows are dropped; on a CUDA GPU each decode step is captured as a CUDA graph and replayed, so that no kernel waits for
Python (as gpt-fast does, https://pytorch.org/blog/accelerating-generative-ai-2/). Elsewhere the same steps run uncaptured.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, set_seed

from phi2_grpo.common.cli import UserError
from phi2_grpo.models.tokenizer import batches_by_length
from phi2_grpo.rollout.cache import DecodeState, round_length, rows_that_fit
from phi2_grpo.rollout.decode_step import DecodeStep, unsupported_reason
from phi2_grpo.rollout.phi_step import PhiDecodeStep, is_phi
from phi2_grpo.rollout.sampling import Sampling, generation_eos_ids, truncate_at_eos

BATCH = 64  # prompts that share a seed in `complete`; fixed, for what is sampled depends on it
FINISHED_CHECK_STEPS = 16  # decode steps on a GPU between two checks for finished rows, each of which waits for the device


def choose_engine(name: str, model, device: torch.device) -> tuple[str, str]:
    """The engine ("fast" or "generate") for `model` on `device` under `--rollout name`, and the reason in words.

    Raises UserError where "fast" is asked for, and does not support the model or the device.
    """
    if name == "generate":
        return "generate", "transformers' generate, as asked for"
    no_float64 = "a Mac's GPU (MPS) has no float64, which sampling needs" if device.type == "mps" else None
    if reason := no_float64 or unsupported_reason(model):
        if name == "fast":
            raise UserError(f"--rollout fast is not supported here: {reason}. Give --rollout auto or generate.")
        return "generate", f"transformers' generate, because the fast engine is not supported here: {reason}"
    return "fast", "prompts prefilled once a group, finished rows dropped; on a GPU most decode steps are one CUDA graph"


def make_engine(name: str, model, rows: int = 0, reserve: int = 0) -> "GenerateEngine":
    return (FastEngine if choose_engine(name, model, model.device)[0] == "fast" else GenerateEngine)(model, rows, reserve)


class GenerateEngine:
    """transformers' generate, with the weights and the adapter that `model` has at each call.

    `rows`: completions decoded at once; 0 for as many as memory holds. `reserve`: bytes of memory to leave to whatever else
    runs beside the cache. `log_probs`: of the tokens of the last call, by completion, or None where the engine does not know
    them.
    """

    log_probs: list[list[float]] | None = None

    def __init__(self, model, rows: int = 0, reserve: int = 0):
        self.model, self.rows, self.reserve = model, rows, reserve

    @torch.no_grad()
    def __call__(self, prompt_ids: list[list[int]], generation_config: GenerationConfig, tokenizer=None) -> list[list[int]]:
        """Completion ids of each prompt, with the end token and without padding. Stop strings need the `tokenizer`."""
        training, self.log_probs = self.model.training, None
        self.model.eval()  # in training mode activation checkpointing disables the cache
        try:
            return self._complete(prompt_ids, generation_config, tokenizer)
        finally:
            self.model.train(training)

    def _complete(self, prompt_ids, generation_config, tokenizer):
        length = max(map(len, prompt_ids)) + generation_config.max_new_tokens
        rows = self.rows or rows_that_fit(self.model, length, self.reserve)
        eos_ids, completions = generation_eos_ids(generation_config), []
        for start in range(0, len(prompt_ids), rows):
            prompts = [torch.tensor(ids, device=self.model.device) for ids in prompt_ids[start : start + rows]]
            ids = pad_sequence(prompts, True, generation_config.pad_token_id or 0, padding_side="left")
            mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, padding_side="left")
            inputs = {"input_ids": ids, "attention_mask": mask}
            output = self.model.generate(**inputs, generation_config=generation_config, tokenizer=tokenizer)
            completions += [truncate_at_eos(row, eos_ids) for row in output[:, ids.shape[1] :].tolist()]
        return completions


class FastEngine(GenerateEngine):
    """Our engine. It keeps its cache and its CUDA graphs between calls.

    Each completion and token has its own random number, drawn by torch's CPU generator: what is sampled depends on batches,
    dropped rows and the device by rounding alone (not at all in float32 on one CPU). Stop strings are left to `trim`; the
    model's context ends a completion. Settings that it does not support go to generate.
    """

    def __init__(self, model, rows: int = 0, reserve: int = 0):
        super().__init__(model, rows, reserve)
        self.decode_step = (PhiDecodeStep if is_phi(model) else DecodeStep)(model)
        self.state = DecodeState(self.decode_step, 0, 0)
        self.max_rows = 0
        self.cuda = self.decode_step.device.type == "cuda"
        # Products of experts may wait for the device, which no graph can hold.
        self.experts = any("expert" in name and weight.dim() == 3 for name, weight in model.named_parameters())
        self.stream = torch.cuda.Stream() if self.cuda else None  # one for all captures: libraries keep a workspace a stream
        self.graphs = {}  # by rows, cache length and sampling

    def _complete(self, prompt_ids, generation_config, tokenizer):
        sampling = Sampling.of(generation_config)
        if sampling is None:
            return super()._complete(prompt_ids, generation_config, tokenizer)
        longest = max(map(len, prompt_ids))
        new = max(0, min(generation_config.max_new_tokens, self.decode_step.context - longest))
        draw = torch.zeros if sampling.greedy else torch.rand
        uniforms = draw(len(prompt_ids), new, dtype=torch.float64)
        if self.decode_step.sync_adapter():
            self.graphs.clear()
        self._allocate(len(prompt_ids), longest + new)
        completions, self.log_probs, rows = [], [], self.state.rows
        with self.decode_step.lean_lora():
            for start in range(0, len(prompt_ids), rows):
                completions += self._complete_batch(prompt_ids[start : start + rows], uniforms[start : start + rows], sampling)
        return completions

    def _allocate(self, rows: int, length: int) -> None:
        """Have a state for `rows` sequences of `length` tokens, or for as many as fit."""
        rows, length = max(rows, self.state.rows), max(round_length(length), self.state.length)
        if length > self.state.length or min(rows, self.max_rows) > self.state.rows:
            self.graphs.clear()
            self.state = None  # its memory is freed before free memory is measured
            self.max_rows = self.rows or rows_that_fit(self.model, length, self.reserve)
            self.state = DecodeState(self.decode_step, min(rows, self.max_rows), length)

    def _complete_batch(self, prompt_ids, uniforms, sampling):
        state, (rows, new) = self.state, uniforms.shape
        position = max(map(len, prompt_ids))  # of the next token, in the longest row
        state.reset(prompt_ids, uniforms)
        if new:
            state.append_tokens(self._prefill(prompt_ids), sampling)
        for count in range(1, new):
            if not self.cuda or count % FINISHED_CHECK_STEPS == 0:
                rows, position = state.compact_finished(rows, power_of_two=self.cuda)
                if not rows:
                    break
            position += 1
            self._decode(rows, position, sampling)
        sampled, log_probs = (kept[: len(prompt_ids), :new].tolist() for kept in (state.output_ids, state.log_probs))
        completions = [truncate_at_eos(ids, sampling.eos_token_ids) for ids in sampled]
        self.log_probs += [values[: len(ids)] for values, ids in zip(log_probs, completions, strict=True)]
        return completions

    def _prefill(self, prompt_ids: list[list[int]]) -> torch.Tensor:
        """Run each distinct prompt once and copy its keys and values to the rows that have it. Returns logits (B, V)."""
        device, logits = self.decode_step.device, None
        rows_of = defaultdict(list)
        for row, prompt in enumerate(prompt_ids):
            rows_of[tuple(prompt)].append(row)
        prompts = list(rows_of)
        for indices in batches_by_length(list(map(len, prompts))):
            batch = [torch.tensor(prompts[i], device=device) for i in indices]
            ids = pad_sequence(batch, batch_first=True)  # what is read of the padding into the cache, decoding overwrites
            last_logits, prefilled = self.decode_step.prefill(ids, [len(prompt) - 1 for prompt in batch])
            pairs = [(row, source) for source, i in enumerate(indices) for row in rows_of[prompts[i]]]
            target, source = torch.tensor(pairs, device=device).unbind(1)
            for layer, new in zip(self.state.cache, prefilled.layers, strict=True):
                layer[target, :, :, : ids.shape[1]] = torch.stack((new.keys, new.values), 1)[source]
            logits = last_logits.new_empty(len(prompt_ids), last_logits.shape[-1]) if logits is None else logits
            logits[target] = last_logits[source]
        return logits

    def _decode(self, rows: int, length: int, sampling: Sampling) -> None:
        """Sample one token for each of the first `rows` rows, whose sequences have at most `length` tokens by now."""
        key = (rows, round_length(length), sampling)
        if not self.cuda or self.experts:
            self._step(rows, length, sampling)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            self.graphs[key] = self._step_and_capture(*key)

    def _step(self, rows, length, sampling):
        state = self.state
        logits = self.decode_step.logits(state.tokens[:rows], state.positions[:rows], state.cache, length)
        state.positions[:rows] += 1  # of finished rows, too: none gets further than a live row could, so all stay in the cache
        state.append_tokens(logits, sampling)

    def _step_and_capture(self, rows, length, sampling):
        """Run one step, then capture the same step; the capture itself computes nothing."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # libraries initialize and allocate at their first call, outside of the graph
            self._step(rows, length, sampling)
        torch.cuda.current_stream().wait_stream(self.stream)
        pool = next((graph.pool() for graph in self.graphs.values()), None)  # graphs run one at a time, so they share memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            self._step(rows, length, sampling)
        return graph


def complete(
    engine: GenerateEngine,
    tokenizer,
    prompts: list[str],
    generation_config: GenerationConfig,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Completion ids of rendered prompts, in their order. The same `seed` gives two models the same random numbers.

    `advance` is told how many more are done.
    """
    completions: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        prompt_ids = tokenizer([prompts[i] for i in batch], add_special_tokens=False)["input_ids"]
        set_seed(seed + start)
        completions.update(zip(batch, engine(prompt_ids, generation_config, tokenizer), strict=True))
        advance(len(batch))
    return [completions[i] for i in range(len(prompts))]
