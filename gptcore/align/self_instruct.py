"""Growing a set of instructions from a few (Wang et al. 2022, "Self-Instruct"), with a reason for each reject.

A model is shown some of the set and continues the list; what it proposes enters the set unless a filter says why not.
The filters are the paper's (section 2.2: ROUGE-L under 0.7 with everything there, length, no repetition of input and
output) and those for what a base model writes besides.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptcore.errors import UserError

SIMILAR = 0.7  # ROUGE-L from which an instruction is a duplicate; Wang et al. 2022, section 2.2
REASONS = ("empty", "malformed", "too short", "too long", "repetitive", "duplicate", "refused")


@dataclass(frozen=True)
class Filter:
    """What an instruction must be: ``shortest`` to ``longest`` words, under ``similar`` to all that are there.

    ``accepts``: a further check of the text; what it refuses is counted as ``refused``.
    """

    shortest: int = 3
    longest: int = 150
    similar: float = SIMILAR
    accepts: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or not 0.0 < self.similar <= 1.0:
            raise UserError(
                f"self-instruct: got {self.shortest} to {self.longest} words and similar {self.similar}, expected "
                "1 <= shortest <= longest and 0 < similar <= 1"
            )

    def reason(self, text: str, there: Sequence[Sequence[str]]) -> str | None:
        """Why ``text`` is rejected, one of :data:`REASONS`, or None. ``there``: words of each instruction so far."""
        if not text.strip():
            return "empty"
        if not text.isprintable() or not re.search(r"[^\W\d_]", text) or "\ufffd" in text:
            return "malformed"
        words = words_of(text)
        if len(words) < self.shortest:
            return "too short"
        if len(words) > self.longest:
            return "too long"
        if len(set(words)) * 2 < len(words) and len(words) > 5:
            return "repetitive"
        if any(
            rouge_l(words, other) >= self.similar for other in there if _may_be(words, other, self.similar)
        ):
            return "duplicate"
        return "refused" if self.accepts is not None and not self.accepts(text) else None


@dataclass
class Grown:
    """What came of it: ``kept`` in the order they entered, the seeds not among them; ``rejected`` by reason, with the
    text of each in ``rejects``; ``rounds`` asked; ``growth``: how many were kept after each of them."""

    kept: list[str] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    rounds: int = 0
    growth: list[int] = field(default_factory=list)


Propose = Callable[[Sequence[str]], Sequence[str]]  # from some instructions, new ones


def grow(
    seeds: Sequence[str],
    propose: Propose,
    count: int,
    *,
    shown: int = 8,
    most_rounds: int = 100,
    filter: Filter | None = None,
    seed: int = 0,
) -> Grown:
    """Add up to ``count`` instructions to ``seeds``.

    Each round shows ``propose`` at most ``shown`` instructions: three quarters of them seeds, the rest from what was
    kept (Wang et al.: 6 and 2 of 8). It ends at ``count``, or after ``most_rounds``.

    Raises:
        UserError: no seeds, or numbers below 1.
    """
    if not seeds or min(count, shown, most_rounds) < 1:
        raise UserError(
            f"self-instruct: got {len(seeds)} seeds, count {count}, shown {shown}, most_rounds {most_rounds}; expected "
            "at least 1 of each"
        )
    filter = filter or Filter()
    drawn, grown = random.Random(f"self-instruct {seed}"), Grown()
    there = [words_of(text) for text in seeds]
    while len(grown.kept) < count and grown.rounds < most_rounds:
        grown.rounds += 1
        own = min(len(grown.kept), shown // 4)
        examples = drawn.sample(list(seeds), min(len(seeds), shown - own)) + drawn.sample(grown.kept, own)
        drawn.shuffle(examples)
        for text in propose(examples):
            text = " ".join(text.split()) if text.strip() else ""
            reason = filter.reason(text, there)
            if reason is not None:
                grown.rejected[reason] += 1
                grown.rejects.append((reason, text))
            elif len(grown.kept) < count:
                grown.kept.append(text)
                there.append(words_of(text))
        grown.growth.append(len(grown.kept))
    return grown


def listed(examples: Sequence[str], heading: str = "Instructions:") -> str:
    """A prompt that shows ``examples`` as a numbered list and leaves the next number open."""
    lines = [f"{number}. {text}" for number, text in enumerate(examples, 1)]
    return "\n".join([heading, *lines, f"{len(examples) + 1}."])


def items_of(continuation: str) -> list[str]:
    """The instructions of a list that a model went on with after :func:`listed`: one a line, numbers taken off."""
    return [re.sub(r"^\s*\d+[.)]\s*", "", line).strip() for line in continuation.split("\n") if line.strip()]


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, in their order."""
    return re.findall(r"\w+", text.lower())


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L's F1 of two sequences of words: from their longest common subsequence (Lin 2004, section 3.2), 0 to 1."""
    if not candidate or not reference:
        return 0.0
    lengths = [0] * (len(reference) + 1)
    for word in candidate:
        diagonal = 0
        for place, other in enumerate(reference, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return 2.0 * lengths[-1] / (len(candidate) + len(reference))


def _may_be(words: Sequence[str], other: Sequence[str], similar: float) -> bool:
    """Whether sequences of these lengths can be as alike as ``similar``: what they share is at most the shorter."""
    return 2.0 * min(len(words), len(other)) >= similar * (len(words) + len(other))
