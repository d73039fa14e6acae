"""The next-token loss equals TRL's, one demonstration at a time."""

from __future__ import annotations

import pytest
import torch

from tests.unit.trainer.losses import trl_peer
from tests.unit.trainer.samples import make_demonstrations
from trainer.losses.sft import Sft
from trainer.samples import Pair


def test_sft_equals_trl_on_the_same_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes the mean over a batch's tokens; of one demonstration, that is ours. It is among its losses for DPO."""
    demonstrations = make_demonstrations(6)
    policy = trl_peer.random_logprobs(demonstrations, 0)
    inputs = trl_peer.leaves(policy)
    theirs = []
    for demonstration in demonstrations:
        prompt, response = demonstration.prompt, demonstration.response
        pair = Pair(id=demonstration.id, prompt=prompt, chosen=response, rejected=(250,))
        logprobs = {pair.id: torch.cat([policy[pair.id], torch.zeros(1)])}
        table = trl_peer.Recorded(trl_peer.record([pair], logprobs))
        sequences = [prompt + pair.chosen, prompt + pair.rejected]
        theirs.append(
            trl_peer.dpo_loss(
                table, table, trl_peer.padded(sequences, [len(prompt)] * 2), beta=0.1, types=["sft"], weights=[1.0]
            )
        )
    ours = trl_peer.our_losses(Sft(), demonstrations, policy, {}, {}, monkeypatch)
    trl_peer.assert_same(ours.losses.mean(), torch.stack(theirs).mean(), inputs)
    torch.testing.assert_close(ours.measures["nll"], ours.losses)
