"""How many tokens the augment drafts in a round: the measured best number, which may be 0."""

import collections
import time
from typing import NamedTuple

from absl import logging

from calm_jax import processes

COMPARED = 32  # drafted tokens after which the measured acceptance counts
PROBE = 64  # dispatches after which another way is timed again
GAIN = 1.05  # speed-up that a change of the number needs
TIMED = 8  # dispatches whose times are kept
FORGET = 0.95  # factor on older counts at each dispatch


class Drafting(NamedTuple):
    """The state of drafting.

    Attributes:
        length: tokens that are now drafted in a round; 0: none, since drafts do not pay.
        compared: drafted tokens that were compared with the composed model's choice.
        accepted: compared tokens that were equal to it.
        reason: the measurements from which `length` follows; "" before there are any.
    """

    length: int
    compared: int
    accepted: int
    reason: str

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ compared."""
        return self.accepted / self.compared if self.compared else None


class DraftLength:
    """Chooses the number of drafted tokens between dispatches, from 0 to `most`.

    A round that drafts k tokens, each accepted with probability a, makes (1 - a^(k+1)) / (1 - a)
    tokens (arXiv 2211.17192, equation 1). Its time is measured for `most` and for 0, and taken as
    linear between them. The first run of a program is not timed, since it compiles.
    """

    def __init__(self, most: int):
        self.most = most
        self.length = most
        self.compared = self.accepted = 0
        self.reason = ""
        self._candidates = sorted({0, most} | {2**n for n in range(most.bit_length())})
        self._recent = [0.0, 0.0]
        self._seconds: dict[int, collections.deque[float]] = {}
        self._ran: set = set()
        self._dispatches = 0
        self._next = most

    @property
    def report(self) -> Drafting:
        return Drafting(self.length, self.compared, self.accepted, self.reason)

    def begin(self) -> int:
        """The number of tokens that the next dispatch drafts in each round."""
        self._begun = time.perf_counter()
        return self._next

    def end(self, program: tuple, rounds: int, compared: int, accepted: int) -> None:
        """Takes the results of the dispatch; `program` identifies the compiled program."""
        seconds = time.perf_counter() - self._begun
        drafted = self._next
        self.compared += compared
        self.accepted += accepted
        if compared:
            self._recent = [
                FORGET * old + new
                for old, new in zip(self._recent, (compared, accepted), strict=True)
            ]
        if (drafted, program) in self._ran and rounds:
            recent = self._seconds.setdefault(drafted, collections.deque(maxlen=TIMED))
            recent.append(seconds / rounds)
        self._ran.add((drafted, program))
        self._dispatches += 1
        self._choose()
        # Clocks differ between processes, but all must draft the same number.
        self.length, self._next, self.reason = processes.gather(
            (self.length, self._next, self.reason)
        )[0]

    def _choose(self) -> None:
        if self.most not in self._seconds or self._recent[0] < COMPARED:
            self._next = self.most
            return
        if 0 not in self._seconds:
            self._next = 0
            return
        acceptance = self._recent[1] / self._recent[0]
        rates = {k: tokens_of_round(k, acceptance) / self._time(k) for k in self._candidates}
        best = max(rates, key=rates.get)
        if rates[best] > GAIN * rates[self.length]:
            self.length = best
            kept = max(rates, key=lambda k: (k > 0, rates[k]))
            self.reason = (
                f"{acceptance:.0%} of drafted tokens are accepted; a row makes {rates[0]:.3g} "
                f"tokens/s without a draft and {rates[kept]:.3g} with {kept} drafted at a time"
            )
            logging.info("%d tokens are drafted at a time: %s", best, self.reason)
        self._next = self.length
        probes, rest = divmod(self._dispatches, PROBE)
        if rest == 0:
            others = [k for k in (0, self.most) if k != self.length]
            self._next = others[probes % len(others)]

    def _time(self, drafted: int) -> float:
        # Other work of the machine only adds to a time, so the least one counts.
        none, most = (min(self._seconds[k]) for k in (0, self.most))
        return none + (most - none) * drafted / self.most


def tokens_of_round(drafted: int, acceptance: float) -> float:
    """The mean number of tokens that a round makes."""
    return sum(acceptance**k for k in range(drafted + 1))
