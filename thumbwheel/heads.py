"""The heads of a reward model: rows of one linear layer, named in the model's configuration.

    overall           the score
    helpfulness …     the score in a single respect, one head an aspect
    ensemble-0 …      what else the score could be, given the data: their spread is how uncertain it is

The names are the `id2label` of a sequence classifier, so that Transformers and vLLM's pooling runner read it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thumbwheel import errors

OVERALL = "overall"
ENSEMBLE = "ensemble-"


@dataclass(frozen=True)
class Heads:
    """Which heads there are, in the order of the rows: the overall one, aspects, the ensemble."""

    aspects: tuple[str, ...] = ()
    ensemble: int = 0
    """Members; 0 for none, otherwise at least two."""

    def __post_init__(self) -> None:
        """Raises `errors.InvalidArgument`."""
        if len({OVERALL, *self.aspects}) != 1 + len(self.aspects) or any(
            not name or name.startswith(ENSEMBLE) for name in self.aspects
        ):
            raise errors.InvalidArgument(
                f"are {', '.join(self.aspects)!r}.",
                field="reward_aspects",
                remedy=f"Name each once, and none of them {OVERALL} or {ENSEMBLE}….",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all rows."""
        return (OVERALL, *self.aspects, *(f"{ENSEMBLE}{index}" for index in range(self.ensemble)))

    @property
    def judging(self) -> int:
        """How many rows are about what people said: the overall one and the aspects, which come first."""
        return 1 + len(self.aspects)

    @classmethod
    def named(cls, names: Sequence[str]) -> Heads:
        """Reads `names`. The first is the overall one, whatever it is called."""
        aspects = tuple(name for name in names[1:] if not name.startswith(ENSEMBLE))
        return cls(aspects, len(names) - 1 - len(aspects))

    @classmethod
    def of(cls, id2label: Mapping[int, str]) -> Heads:
        """Those of a model, by its configuration's `id2label`."""
        return cls.named([id2label[index] for index in sorted(id2label)])


ONE_HEAD = Heads()
"""The overall one alone."""
