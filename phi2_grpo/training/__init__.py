"""A training run: preflight, trainer, callbacks, checkpoints, outputs."""
