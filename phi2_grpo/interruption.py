"""Ctrl-C, SIGTERM and SIGHUP while it trains: the step is finished and saved first; a second one stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from phi2_grpo.cli import HANGUP, Terminated, say


class Interruption(TrainerCallback):
    """Ends the training after the step in which it was asked to, with a checkpoint; all processes at the same step.

    `asked` is the signal, or 0.
    """

    def __init__(self):
        self.asked = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted; the second raises."""
        before = {number: signal.signal(number, self._note) for number in self._heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _heard() -> list[int]:
        """A terminal that is closed is heard too, unless nohup says otherwise."""
        hangup = [] if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [HANGUP]
        return [signal.SIGINT, signal.SIGTERM, *hangup]

    def _note(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.asked = number
        say("\nstopping after this step, with a checkpoint; once more stops at once.")

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor(self.asked, device=args.device)
        # Signals reach processes at different times, and one that stops alone leaves the others waiting.
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if agreed := int(asked):  # or else a signal that has come since stays noted, for the next step
            self.asked = agreed
            control.should_save = control.should_training_stop = True

    def raise_if_asked(self) -> None:
        """After the training: the interruption that it was ended by, if it was."""
        if self.asked:
            raise KeyboardInterrupt if self.asked == signal.SIGINT else Terminated
