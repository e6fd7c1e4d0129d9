"""All domains of a federation, side by side: the data of each client stays in its own data module."""

from itertools import combinations

import lightning as L

from lightning_sfubm.datamodules.card import DataCard
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.parsing import normalise_title
from lightning_sfubm.names import path_part


class FederatedDataModule(L.LightningDataModule):
    """Holds K >= 1 domains; prepares and sets up each on its own, and never joins them.

    Args:
        domains: data module by domain name; the key becomes the domain's name.
        root: data root handed to every domain that has none of its own.
    """

    def __init__(self, domains: dict[str, DomainDataModule], root: str | None = None) -> None:
        super().__init__()
        if not domains:
            raise ConfigError("a federation needs at least one domain")
        self.root = root
        self.domains = {name: domains[name] for name in sorted(domains)}
        for name, domain in self.domains.items():
            path_part(name, "data.domains")
            if domain.name != name:
                raise ConfigError(f"domain '{domain.name}' stands under the name '{name}'; give both the same name")
            if domain.root is None:
                domain.root = root

    def prepare_data(self) -> None:
        """Prepare every domain."""
        for domain in self.domains.values():
            domain.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up every domain."""
        for domain in self.domains.values():
            domain.setup(stage)

    @property
    def data_cards(self) -> dict[str, DataCard]:
        """The card of every domain."""
        return {name: domain.data_card for name, domain in self.domains.items()}

    def overlap(self) -> dict[str, dict[str, int]]:
        """Keys and titles that pairs of domains share, for the report of a simulation.

        No silo could compute this: it reads across domains and must feed nothing but a report. Equal keys mean little
        where a source numbers its users and items from 0.

        Returns:
            For ``"a, b"``: counts of shared ``users``, ``items`` and (normalised) ``titles``.
        """
        report = {}
        for left, right in combinations(self.domains, 2):
            a, b = self.domains[left].domain, self.domains[right].domain
            report[f"{left}, {right}"] = {
                "users": len(set(a.user_keys) & set(b.user_keys)),
                "items": len(set(a.item_keys[1:]) & set(b.item_keys[1:])),
                "titles": len(set(map(normalise_title, a.titles[1:])) & set(map(normalise_title, b.titles[1:]))),
            }
        return report
