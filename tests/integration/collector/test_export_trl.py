"""TRL takes an exported file as it is: its own trainers train on it, on a tiny model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.collector.config import CollectorSettings
from services.collector.database import Database
from services.collector.exchange.exporting import export_file
from services.collector.exchange.importing import Source, import_file
from services.collector.exchange.report import refusals
from services.collector.intake import Curator
from services.collector.rights.tenants import Tenants
from tests.support import make_tiny_llama
from tests.unit.services.collector.parts import Deployment

PAIRS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
async def exported(tmp_path: Path) -> Any:
    """Pairs taken in, curated, and written to a file in the format asked for."""
    deployment = Deployment.at(tmp_path)
    database = Database(CollectorSettings(home=tmp_path).database_url)
    rows = [
        {
            "chosen": f"\n\nHuman: Question {i}?\n\nAssistant: Yes {i}.",
            "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: No.",
        }
        for i in range(PAIRS)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refusals(path) as refused:
        source = Source("default", "set", False, deployment.key, Tenants())
        await import_file(database, Curator(), source, path, "hh", refused, lambda _: None)

    async def write(name: str) -> Path:
        out = tmp_path / f"{name}.jsonl"
        with refusals(out) as report:
            done = await export_file(database, "default", out, name, None, report, lambda _: None)
        assert done == (PAIRS, 0)
        return out

    yield write
    database.close()


@pytest.fixture
def no_noise() -> Iterator[None]:
    """What TRL and Transformers warn of is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", ["trl", "trl-chat", "hh", "openrlhf"])
async def test_dpo_trainer_takes_it(exported: Any, model: Path, tmp_path: Path, name: str) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = datasets.load_dataset("json", data_files=str(await exported(name)), split="train", cache_dir=str(tmp_path))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(str(model)),
        args=DPOConfig(**arguments(tmp_path)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(str(model)),
    )
    trained = trainer.train()
    assert len(trainer.train_dataset) == PAIRS
    assert trained.global_step == 1
    assert 0.5 < trained.training_loss < 1.0  # log 2 before anything is learnt


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", ["trl", "trl-chat", "hh", "openrlhf"])
async def test_reward_trainer_takes_it(exported: Any, model: Path, tmp_path: Path, name: str) -> None:
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = datasets.load_dataset("json", data_files=str(await exported(name)), split="train", cache_dir=str(tmp_path))
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(str(model), num_labels=1),
        args=RewardConfig(**arguments(tmp_path)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(str(model)),
    )
    trained = trainer.train()
    assert len(trainer.train_dataset) == PAIRS
    assert trained.global_step == 1
    assert 0.0 < trained.training_loss < 10.0
