"""By what feedback is judged, and by what pairs are picked: the settings as the work reads them."""

from __future__ import annotations

from typing import NamedTuple

from services.collector.curation.settings import CurationSettings


class Rules(NamedTuple):
    """By what is judged. `learn_from_cut`: a response that reached its greatest length may be an example."""

    curation: CurationSettings = CurationSettings()
    learn_from_cut: bool = False


class Shares(NamedTuple):
    """How often each way of picking picks; what is left falls to what the reward model is unsure of."""

    random: float = 0.2
    duel: float = 0.4
