"""From samples to tensors: steps of a round, micro-batches of one length, rows in which a pair shares its prompt.

    a row:        prompt ······ chosen ······ rejected ······ padding
    positions:    0 … P−1       P …           P …
    attention:    causal, but `rejected` does not see `chosen`

So each prompt is computed once for both responses, and every number equals that of two separate sequences.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.buffer import Sample


@dataclass(frozen=True)
class PairBatch:
    """B pairs in rows of L tokens with N response tokens. Sequence i is chosen of pair i, B + i is rejected of it."""

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
    """[2B] indices into B·L of the last token of every sequence."""

    weights: Tensor
    """[B] weights of the samples."""

    @property
    def pairs(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """B·L, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PairBatch:
        """The batch on a device."""
        return PairBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def steps(
    samples: Sequence[Sample], batch_size: int, *, seed: int, round_number: int, epoch: int
) -> list[list[Sample]]:
    """Shuffles a round and divides it into optimizer steps of at most `batch_size` samples, as even as can be.

    The order depends on the arguments alone: a round that is run again runs the same.
    """
    shuffled = sorted(samples, key=lambda sample: sample.id)
    random.Random(f"{seed}/{round_number}/{epoch}").shuffle(shuffled)
    count = math.ceil(len(shuffled) / batch_size)
    bounds = [len(shuffled) * index // count for index in range(count + 1)] if count else []
    return [shuffled[start:end] for start, end in itertools.pairwise(bounds)]


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Groups samples of similar length, so that rows times longest row is at most `max_tokens`.

    A sample that is longer than that by itself gets a micro-batch of its own.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: (sample.tokens, sample.id), reverse=True):
        # Longest first: the first of a group is as long as its rows will be.
        if groups and (len(groups[-1]) + 1) * groups[-1][0].tokens <= max_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def collate(samples: Sequence[Sample]) -> PairBatch:
    """Lays out samples in rows that share their prompt."""
    rows, length = len(samples), max(sample.tokens for sample in samples)
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    position_ids = torch.zeros(rows, length, dtype=torch.long)
    # Padding is on the right, where no real token looks; a padded query sees itself, so that no row of scores is empty.
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1, 1)
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    last_tokens = [0] * (2 * rows)
    for row, sample in enumerate(samples):
        prompt, chosen, rejected = len(sample.prompt), len(sample.chosen), len(sample.rejected)
        assert min(prompt, chosen, rejected) > 0, "ingest lets no empty part through"
        split, end = prompt + chosen, sample.tokens
        input_ids[row, :end] = torch.tensor(sample.prompt + sample.chosen + sample.rejected)
        position_ids[row, :split] = torch.arange(split)
        position_ids[row, split:end] = torch.arange(prompt, prompt + rejected)
        mask[row, 0, split:end, prompt:split] = False
        # The last prompt token predicts the first token of both responses.
        before = row * length + prompt - 1
        predictors += range(before, before + chosen)
        predictors += [before, *range(row * length + split, row * length + end - 1)]
        targets += sample.chosen + sample.rejected
        owners += [row] * chosen + [rows + row] * rejected
        last_tokens[row], last_tokens[rows + row] = row * length + split - 1, row * length + end - 1
    return PairBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        last_tokens=torch.tensor(last_tokens),
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
    )
