"""`thumbwheel reward init` and `report`, on a tiny model: from a file to a version, and a page on it."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from thumbwheel import errors
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import SAMPLES, LocalStore, VerifiedVersion
from thumbwheel.heads import Heads
from trainer import models
from trainer.reward import init, report
from trainer.reward.config import InitSettings, ReportSettings
from trainer.reward.pairs import held_out
from trainer.samples import Pair

pytestmark = pytest.mark.usefixtures("one_rank")


def never() -> bool:
    return False


def rows(count: int) -> Iterator[dict[str, object]]:
    """What is polite is better, and that is what the aspect `manners` is about."""
    rng = random.Random(0)
    for index in range(count):
        words = [rng.choice(["a", "b", "c"]) for _ in range(rng.randint(1, 3))]
        yield {
            "prompt": f"q{index}",
            "chosen": " ".join([*words, "P"]),
            "rejected": " ".join([*words[:1], "R"]),
            "aspects": {"manners": "chosen", "helpfulness": "tie"},
            "source": rng.choice(["vote", "edit"]),
        }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gzipped file of pairs, with a line that is none."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl.gz"
    lines = [json.dumps(row) for row in rows(160)]
    lines.insert(7, json.dumps({"prompt": "broken", "chosen": "x"}))
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def home(data: Path, policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment whose first reward model was made from the file."""
    home = tmp_path_factory.mktemp("home")
    settings = InitSettings(
        data=data, home=home, base_model=str(policy_path), learning_rate=1e-3, head_learning_rate=1e-2, epochs=2
    )
    assert init.run(settings, never) == "reward-000001"
    return home


def load(home: Path, version: str) -> VerifiedVersion:
    return LocalStore(home / "store", ManifestVerifier.load(home / "keys")).load(version)


def test_the_version_has_learnt_and_says_of_what(home: Path) -> None:
    version = load(home, "reward-000001")
    manifest = version.manifest
    ids = (version.path / SAMPLES).read_text().split()
    assert manifest.parent == "reward-000000"
    assert manifest.lineage.sample_count == len(ids)
    assert 0 < manifest.metrics["heldout_pairs"] == 160 - len(ids)
    assert manifest.metrics["heldout_accuracy"] >= 0.9
    assert manifest.metrics["heldout_manners_accuracy"] >= 0.8
    assert manifest.metrics["temperature"] > 0
    assert (home / "reward-000001.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((version.path / init.CURVES).read_text())
    assert len(curves["judged"]) >= 4
    assert min(found["heldout_loss"] for _, found in curves["judged"]) == manifest.metrics["heldout_loss"]


def test_its_heads_are_those_of_version_0_and_its_probe_is_true(home: Path) -> None:
    first, second = load(home, "reward-000000"), load(home, "reward-000001")
    for version in (first, second):
        model = models.load_scorer(version.path)
        heads = Heads.of(model.config.id2label)
        assert heads == Heads(("helpfulness", "harmlessness", "fluency", "manners"), 4)
        probe = version.manifest.probes[0]
        score = models.sequence_score(model.eval(), [*probe.prompt_token_ids, *probe.token_ids])
        assert score == pytest.approx(probe.score, abs=1e-3)
    assert models.load_scorer(first.path).score.weight[:5].abs().max() == 0.0


def test_a_second_start_is_refused(home: Path, data: Path) -> None:
    with pytest.raises(errors.Conflict, match=r"reward model already: reward-000001.*another --home"):
        init.run(InitSettings(data=data, home=home), never)


def test_the_report_judges_what_was_not_learnt(home: Path, data: Path, tmp_path: Path) -> None:
    settings = ReportSettings(version="reward-000001", home=home, data=data, output=tmp_path / "page.html")
    page = report.run(settings, never).read_text()
    heldout = int(load(home, "reward-000001").manifest.metrics["heldout_pairs"])
    assert f"Judged on {heldout} pairs" in page
    for part in ("manners", "vote", "edit", "agreement_with_parent", "uncertainty_when_wrong", "Calibration"):
        assert part in page
    assert page.count("data:image/png;base64,") == 2


def test_a_report_on_nothing_unseen_says_what_to_do(home: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    learnt = (load(home, "reward-000001").path / SAMPLES).read_text().split()
    seen.write_text(json.dumps({"id": learnt[0], "prompt": "q", "chosen": "x", "rejected": "y"}))
    with pytest.raises(errors.FailedPrecondition, match="none is left to judge it on"):
        report.run(ReportSettings(version="reward-000001", home=home, data=seen), never)


def test_it_stops_when_it_gets_no_better(
    data: Path, policy_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a rate at which everything is unlearnt again, the best is what it was early."""
    settings = InitSettings(
        data=data,
        home=tmp_path,
        base_model=str(policy_path),
        learning_rate=0.05,
        head_learning_rate=1e-2,
        epochs=10,
        patience=2,
        curves=tmp_path / "curves.png",
    )
    init.run(settings, never)
    assert "got no better 2 times" in capsys.readouterr().out
    steps = load(tmp_path, "reward-000001").manifest.lineage.steps
    assert steps < 10 * 9
    assert settings.curves is not None
    assert settings.curves.exists()


def test_what_has_learnt_nothing_is_not_published(policy_path: Path, tmp_path: Path) -> None:
    """The held-out pairs say the opposite of the others."""
    data = tmp_path / "pairs.jsonl"
    with data.open("w") as file:
        for number in range(120):
            prompt = (10 + number, 11)
            good, bad = ("P", "R")[:: -1 if held_out(Pair(id="", prompt=prompt, chosen=(), rejected=()), 0.1) else 1]
            file.write(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")
    settings = InitSettings(
        data=data, home=tmp_path, base_model=str(policy_path), learning_rate=1e-3, head_learning_rate=1e-2
    )
    with pytest.raises(errors.FailedPrecondition, match=r"as a coin would: nothing is published.*reward-000001.png"):
        init.run(settings, never)
    store = LocalStore(tmp_path / "store", ManifestVerifier.load(tmp_path / "keys"))
    assert [manifest.sequence for manifest in store.versions(init.REWARD)] == [0]
    assert (tmp_path / "reward-000001.png").exists()
