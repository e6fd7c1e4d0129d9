"""Data cards at the start of a fit without an experiment."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_sfubm.callbacks.data_card import DataCardPrinter
from tests.conftest import small_distiller


def test_a_federated_fit_shows_a_card_for_every_domain(
    federated_data: Any, federated_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for bar, cards in ((True, 2), (False, 0)):
        trainer = federated_trainer(rounds=0, local_max_epochs=1, flags={"enable_progress_bar": bar})
        trainer.callbacks.append(DataCardPrinter())
        trainer.fit(small_distiller(), datamodule=federated_data())
        assert capsys.readouterr().out.count("Data card: ") == cards


@pytest.mark.parametrize(("first", "count"), [(True, 1), (False, 0)])
def test_the_first_process_shows_the_card_of_one_domain(
    first: bool, count: int, federated_data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = federated_data(domains=1).domains["alpha"]
    domain.setup("fit")
    trainer: Any = SimpleNamespace(is_global_zero=first, progress_bar_callback=object(), datamodule=domain)
    for stage in ("fit", "test"):
        DataCardPrinter().setup(trainer, small_distiller(), stage)
    trainer.datamodule = None
    DataCardPrinter().setup(trainer, small_distiller(), "fit")
    assert capsys.readouterr().out.count("Data card: alpha") == count
