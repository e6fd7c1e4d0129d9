from collections.abc import Callable

import lightning as L
import pytest
import torch

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.seeds import torch_generator

NUM_ITEMS, TEXT_DIM, LENGTH = 30, 12, 8


@pytest.fixture
def catalogue() -> Catalogue:
    """30 items with random unit text vectors."""
    text = torch.nn.functional.normalize(
        torch.randn(NUM_ITEMS + 1, TEXT_DIM, generator=torch_generator(0, "text")), dim=1
    )
    text[0] = 0.0
    counts = torch.arange(NUM_ITEMS + 1)
    return Catalogue("tiny", NUM_ITEMS, ["", *(f"item {i}" for i in range(NUM_ITEMS))], text, counts)


def left_pad(rows: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return rows.masked_fill(torch.arange(rows.shape[1]) < padding[:, None], 0)


@pytest.fixture
def train_batch() -> TrainBatch:
    """Six sequences of 1 to 8 items; the last position of one row predicts nothing."""
    rows = torch.randint(1, NUM_ITEMS + 1, (6, LENGTH + 1), generator=torch_generator(0, "train"))
    padding = torch.tensor([0, 1, 3, 5, 6, 7])
    history, targets = left_pad(rows[:, :-1], padding), left_pad(rows[:, 1:], padding)
    targets[0, -1] = 0
    return TrainBatch(history=history, targets=targets, user=torch.arange(6))


@pytest.fixture
def rank_batch() -> RankBatch:
    """Five users with 1 to 8 items and ten candidates."""
    generator = torch_generator(0, "rank")
    history = torch.randint(1, NUM_ITEMS + 1, (5, LENGTH), generator=generator)
    history = left_pad(history, torch.tensor([0, 2, 4, 6, 7]))
    candidates = torch.stack([torch.randperm(NUM_ITEMS, generator=generator)[:10] + 1 for _ in range(5)])
    index = torch.randint(0, 10, (5,), generator=generator)
    target = candidates.gather(1, index[:, None]).squeeze(1)
    return RankBatch(
        history=history, target=target, candidates=candidates, target_index=index, user=torch.arange(5), seen=history
    )


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DomainDataModule:
    """300 users whose next item follows a planted chain of topics; chance of Hit@1 is .05."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUBM_CACHE", str(tmp_path_factory.mktemp("cache")))
        data = DomainDataModule(
            "synthetic",
            SyntheticReader(num_items=60, order=0.95),
            text_encoder=HashingTextEncoder(dim=32),
            batch_size=32,
            max_length=20,
        )
        data.prepare_data()
        data.setup()
    return data


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., L.Trainer]:
    def make(**kwargs) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        checkpoints = {"enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
        return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **checkpoints, **kwargs})

    return make
