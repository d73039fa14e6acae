"""From samples to tensors: steps of a round, micro-batches of one length, rows in which responses share their prompt.

    a row:        prompt ······ response ······ response ······ padding
    positions:    0 … P−1       P …             P …
    attention:    causal, but no response sees another

So each prompt is computed once for all of its responses, and every number equals that of separate sequences.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.samples import Group, Sample

PerToken = Mapping[str, Mapping[str, Tensor]]
"""Numbers that go with response tokens: by their name and by sample id, [T] for the T response tokens of the sample."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sample's prompt and some of its responses: all of them, but where they are too many for one row."""

    sample: Sample
    first: int
    """Index of its first response."""
    last: int
    """Index after its last response."""

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        """The responses in it."""
        return self.sample.responses[self.first : self.last]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of the responses in it."""
        return len(self.sample.prompt) + sum(map(len, self.responses))

    @property
    def span(self) -> slice:
        """Where its response tokens are among those of the sample."""
        lengths = [len(response) for response in self.sample.responses[: self.last]]
        return slice(sum(lengths[: self.first]), sum(lengths))


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, with S sequences (a prompt and one response) that have N response tokens.

    Sequences and response tokens are in the order of the rows: of a batch of pairs, 2i is chosen of pair i and 2i + 1
    is rejected of it.
    """

    rows: tuple[Row, ...]
    """What the B rows hold."""

    input_ids: Tensor
    """[B, L] token ids."""

    position_ids: Tensor
    """[B, L] positions."""

    attention_mask: Tensor
    """[B, 1, L, L] booleans: query (third) may see key (last)."""

    predictors: Tensor
    """[N] indices into B·L of the tokens whose output predicts a response token."""

    targets: Tensor
    """[N] the response tokens that they predict."""

    owners: Tensor
    """[N] the sequence that each belongs to."""

    last_tokens: Tensor
    """[S] indices into B·L of the last token of every sequence."""

    lengths: Tensor
    """[S] response tokens of every sequence, as float32."""

    weights: Tensor
    """[S] weights of the samples that the sequences are of."""

    given: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] what else is known of every response token, by name."""

    @property
    def sequences(self) -> int:
        """S."""
        return self.last_tokens.shape[0]

    @property
    def tokens(self) -> int:
        """B·L, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        given = {name: tensor.to(device) for name, tensor in self.given.items()}
        return Batch(rows=self.rows, given=given, **tensors)

    def sums(self, values: Tensor) -> Tensor:
        """[S] sums over the tokens of every sequence, of `values` [N]."""
        zeros = torch.zeros(self.sequences, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.owners, values)

    def means(self, values: Tensor) -> Tensor:
        """[S] means over the tokens of every sequence, of `values` [N]."""
        return self.sums(values) / self.lengths


def steps(
    samples: Sequence[Sample],
    batch_size: int,
    *,
    seed: int,
    round_number: int,
    epoch: int,
    stratum: Callable[[Sample], str] = lambda sample: "",
) -> list[list[Sample]]:
    """Shuffles a round and divides it into optimizer steps of at most `batch_size` samples, as even as can be.

    Samples of different kinds, and of different strata, are spread evenly over the steps. The order depends on the
    arguments alone: a round that is run again runs the same.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.id):
        groups.setdefault(type(sample).__name__ + stratum(sample), []).append(sample)
    places: list[tuple[float, str, Sample]] = []
    for name, members in groups.items():
        random.Random(f"{seed}/{round_number}/{epoch}").shuffle(members)
        places += [((index + 0.5) / len(members), name, sample) for index, sample in enumerate(members)]
    shuffled = [sample for *_, sample in sorted(places, key=lambda place: place[:2])]
    count = math.ceil(len(shuffled) / batch_size)
    bounds = [len(shuffled) * index // count for index in range(count + 1)] if count else []
    return [shuffled[start:end] for start, end in itertools.pairwise(bounds)]


def whole(samples: Iterable[Sample]) -> list[Row]:
    """A row for each sample, with all of its responses."""
    return [Row(sample, 0, len(sample.responses)) for sample in samples]


def micro_batches(samples: Iterable[Sample], max_tokens: int) -> list[list[Row]]:
    """Groups samples of similar length, so that rows times longest row is at most `max_tokens`, and little is padding.

    Rollouts that do not fit into one row are spread over several; a pair stays together, since its loss is one. A row
    that is too long by itself gets a micro-batch of its own.
    """
    return _grouped([part for row in whole(samples) for part in _parts(row, max_tokens)], max_tokens)


def shared(samples: Iterable[Sample], max_tokens: int, rank: int, ranks: int) -> list[tuple[list[Row], bool]]:
    """The micro-batches of one of several ranks, each with whether it counts. Rows are divided so that ranks have about
    as many tokens. All have as many micro-batches: where another has more, some are divided, and where there is nothing
    to divide, a row is done again and does not count.
    """
    rows = [part for row in whole(samples) for part in _parts(row, max_tokens)]
    loads = [0] * ranks
    mine: list[list[Row]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=_longest_first):
        least = loads.index(min(loads))
        loads[least] += row.tokens
        mine[least].append(row)
    groups = [_grouped(part, max_tokens) for part in mine]
    most = max(map(len, groups))
    found = _divided(groups[rank], most)
    spare = [min(rows, key=lambda row: row.tokens)] if rows else []
    return [(group, True) for group in found] + [(spare, False)] * (most - len(found))


def _divided(groups: Sequence[list[Row]], count: int) -> list[list[Row]]:
    """So many micro-batches, if there are as many rows, by dividing where that saves most padding."""
    found = list(groups)

    def saved(cut: tuple[int, int]) -> int:
        group, at = found[cut[0]], cut[1]
        return (len(group) - at) * (group[0].tokens - group[at].tokens)

    while len(found) < count:
        cuts = [(number, at) for number, group in enumerate(found) for at in range(1, len(group))]
        if not cuts:
            break
        number, at = max(cuts, key=saved)
        found[number : number + 1] = found[number][:at], found[number][at:]
    return found


def _longest_first(row: Row) -> tuple[int, str, int]:
    return -row.tokens, row.sample.id, row.first


def _grouped(rows: Iterable[Row], max_tokens: int) -> list[list[Row]]:
    """Rows by length, the longest first, cut where that costs least: padding, and for each micro-batch `max_tokens` / 8
    tokens, about what a pass takes however little there is in it.
    """
    ordered, each = sorted(rows, key=_longest_first), max_tokens // 8
    # Of the first rows, so many: the least cost, and where their last micro-batch begins.
    least, begins = [0.0, *[math.inf] * len(ordered)], [0] * (len(ordered) + 1)
    for begin, longest in enumerate(row.tokens for row in ordered):
        for end in range(begin + 1, min(len(ordered), begin + max(1, max_tokens // longest)) + 1):
            cost = least[begin] + (end - begin) * longest + each
            if cost < least[end]:
                least[end], begins[end] = cost, begin
    groups: list[list[Row]] = []
    end = len(ordered)
    while end:
        groups.append(ordered[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def _parts(row: Row, max_tokens: int) -> list[Row]:
    if not isinstance(row.sample, Group) or row.tokens <= max_tokens:
        return [row]
    parts, first, taken = [], 0, 0
    for index, response in enumerate(row.sample.responses):
        if index > first and len(row.sample.prompt) + taken + len(response) > max_tokens:
            parts.append(Row(row.sample, first, index))
            first, taken = index, 0
        taken += len(response)
    return [*parts, Row(row.sample, first, row.last)]


def collate(rows: Sequence[Row], given: PerToken | None = None) -> Batch:
    """Lays out rows whose responses share their prompt. `given` has the samples' numbers that go with the tokens."""
    count, length = len(rows), max(row.tokens for row in rows)
    input_ids = torch.zeros(count, length, dtype=torch.long)
    position_ids = torch.zeros(count, length, dtype=torch.long)
    # Padding is on the right, where no real token looks; a padded query sees itself, so that no row of scores is empty.
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(count, 1, 1, 1)
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    last_tokens: list[int] = []
    for number, row in enumerate(rows):
        prompt, start = len(row.sample.prompt), number * length
        ids, positions = list(row.sample.prompt), list(range(prompt))
        assert prompt, "what comes in is checked for empty parts"
        for response in row.responses:
            assert response, "what comes in is checked for empty parts"
            begin, end = len(ids), len(ids) + len(response)
            ids += response
            positions += range(prompt, prompt + len(response))
            mask[number, 0, begin:end, prompt:begin] = False
            # The last prompt token predicts the first token of each response.
            predictors += [start + prompt - 1, *range(start + begin, start + end - 1)]
            targets += response
            lengths.append(len(response))
            last_tokens.append(start + end - 1)
        input_ids[number, : len(ids)] = torch.tensor(ids)
        position_ids[number, : len(ids)] = torch.tensor(positions)
    sizes = torch.tensor(lengths)
    weights = torch.tensor([row.sample.weight for row in rows for _ in row.responses], dtype=torch.float32)
    return Batch(
        rows=tuple(rows),
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.arange(len(lengths)).repeat_interleave(sizes),
        last_tokens=torch.tensor(last_tokens),
        lengths=sizes.float(),
        weights=weights,
        given={
            name: torch.cat([values[row.sample.id][row.span] for row in rows])
            for name, values in (given or {}).items()
            if all(row.sample.id in values for row in rows)
        },
    )
