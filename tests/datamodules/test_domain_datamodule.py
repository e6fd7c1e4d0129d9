"""The data module end to end: leakage (objects and a canary item), determinism, the cache, Lightning."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sfubm.datamodules.batching import SortedBatchSampler
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
from lightning_sfubm.datamodules.preference_datamodule import PreferenceDataModule
from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
from lightning_sfubm.datamodules.readers.base import RawDomain
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.errors import CheckpointError, ConfigError, DataError


class Given:
    """A reader of a ready-made raw domain; counts how often it is read."""

    def __init__(self, raw: RawDomain) -> None:
        self.raw = raw
        self.reads = 0

    def read(self, root: Path | None) -> RawDomain:
        self.reads += 1
        return self.raw

    def fingerprint(self, root: Path | None) -> str:
        return str(hash((str(self.raw.interactions.to_pydict()), str(self.raw.items.to_pydict()))))


def ready(reader: object = None, **settings) -> DomainDataModule:
    data = DomainDataModule("shop", reader or SyntheticReader(num_users=80, num_items=60), **settings)
    data.setup()
    return data


def items_of(loader, *keys: str) -> set[int]:
    return {item for batch in loader for key in keys for item in batch[key].flatten().tolist()} - {0}


def test_canary_items_never_reach_training(raw_domain) -> None:
    """Three items stand only at the stage-2, validation and test position of one user."""
    rows = [(user, item, step) for user in range(30) for step, item in enumerate(range(8))]
    rows += [(99, item, step) for step, item in enumerate([0, 1, 2, 3, 901, 902, 903])]
    titles = {item: f"title {item}" for item in [*range(40), 901, 902, 903]}
    rows += [(200 + item, item, 0) for item in range(40)]  # users with one item: they train, and are never evaluated
    data = ready(Given(raw_domain(rows, titles)), k_core=0, stage2_positions=1, windows="all", num_candidates=10)
    canaries = {data.domain.item_keys.index(key) for key in ("901", "902", "903")}
    stage2, val, test = sorted(canaries)
    user = data.domain.user_keys.index("99")

    assert not canaries & items_of(data.train_dataloader(), "history", "targets")
    assert data.catalogue.train_counts[[stage2, val, test]].tolist() == [0, 0, 0]
    assert data.catalogue.train_counts.sum() == 30 * 5 + 4 + 40
    histories = data.catalogue.histories  # what is counted of which items stand near each other
    assert histories is not None
    counted = [histories.items[start:end] for start, end in zip(histories.starts, histories.ends, strict=True)]
    counts = np.bincount(np.concatenate(counted), minlength=data.num_items + 1)
    assert counts.tolist() == data.catalogue.train_counts.tolist()
    ranking = RankingDataModule(data, train_candidates=5)
    ranking.setup("fit")
    assert not {val, test} & items_of(ranking.train_dataloader(), "history", "target")
    assert stage2 not in items_of(ranking.train_dataloader(), "history")
    assert test not in items_of(data.val_dataloader(), "history", "target", "seen")
    assert test not in items_of(data.test_dataloader(), "history", "seen")
    for loader, target, known in (
        (ranking.train_dataloader(), stage2, 4),
        (data.val_dataloader(), val, 5),
        (data.test_dataloader(), test, 6),
    ):
        for batch in loader:
            for row in (batch["user"] == user).nonzero().flatten().tolist():
                assert batch["target"][row] == target
                assert batch["candidates"][row, batch["target_index"][row]] == target
                assert (batch["history"][row] > 0).sum() == known
                negatives = set(batch["candidates"][row].tolist()) - {target}
                later = {stage2: set(), val: {test}, test: set()}[target]
                assert not negatives & (set(batch["history"][row].tolist()) | later)
    one_item_users = {data.domain.user_keys.index(str(200 + item)) for item in range(40)}
    for loader in (data.val_dataloader(), data.test_dataloader(), data.train_dataloader()):
        assert not one_item_users & {u for batch in loader for u in batch["user"].tolist()}


def test_stage2_negatives_may_be_held_out_items() -> None:
    """Were validation and test items never drawn as negatives, a model could learn their absence."""
    data = ready(stage2_positions=1)
    rows = data.rank_rows("train2", num_candidates=20)
    hits = 0
    for epoch in range(4):
        lists = rows.candidates.at(epoch).candidates
        for user, candidates in zip(rows.users, lists, strict=True):
            train = set(data.domain.sequence(user)[:-2].tolist())
            later = set(data.domain.sequence(user)[-2:].tolist()) - train
            assert len(set(candidates.tolist()) & train) == 1  # the target alone
            hits += len(later & set(candidates.tolist()))
    assert hits > 50


def test_samples_of_text_are_positions_that_trained_stage_1_and_no_others() -> None:
    data = ready(stage2_positions=1)
    rows = data.rank_rows("train1", num_candidates=5)
    counts = np.maximum(data.splits.train_end - data.splits.train_start - 1, 0)
    assert len(rows) == counts.sum() > 0
    assert len(np.unique(rows.positions)) == len(rows)
    assert (rows.positions > data.splits.train_start[rows.users]).all()  # each has a history
    assert (rows.positions < data.splits.train_end[rows.users]).all()  # none is held out
    lists = rows.candidates.at(0).candidates
    for user, position, candidates in zip(rows.users, rows.positions, lists, strict=True):
        train = data.domain.items[data.splits.train_start[user] : data.splits.stage2_end[user]]
        assert set(candidates.tolist()) & set(train.tolist()) == {data.domain.items[position]}
    few, more = (data.rank_rows("train1", 5, max_rows=n).positions for n in (10, 30))
    assert len(few) == 10
    assert set(few) < set(more) < set(rows.positions)
    ranking = RankingDataModule(data, batch_size=4, train_candidates=5, text_samples=10)
    ranking.setup("fit")
    assert sorted(t for b in ranking.train_dataloader() for t in b["target"].tolist()) == sorted(data.domain.items[few])


def test_samples_of_text_need_nothing_held_out() -> None:
    data = ready(stage2_positions=0)
    RankingDataModule(data, text_samples=10).setup("fit")
    with pytest.raises(ConfigError, match="holds no positions out for stage 2"):
        RankingDataModule(data).setup("fit")


def test_stage2_candidates_are_redrawn_by_epoch_whatever_the_workers() -> None:
    def epochs(workers: int) -> list[list[torch.Tensor]]:
        data = ready(stage2_positions=2, num_workers=workers)
        loader = data.rank_dataloader("train2", 16, num_candidates=8, seed=5, shuffle=True)
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append([batch["candidates"] for batch in loader])
        return found

    alone, two = epochs(0), epochs(2)
    assert all(torch.equal(a, b) for x, y in zip(alone, two, strict=True) for a, b in zip(x, y, strict=True))
    by_user = ready(stage2_positions=2).rank_rows("train2", 8, seed=5).candidates
    assert not np.array_equal(by_user.at(0).candidates, by_user.at(1).candidates)


def test_train_batches_do_not_depend_on_workers() -> None:
    first, second = (list(ready(batch_size=16, num_workers=n).train_dataloader()) for n in (0, 2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


def test_candidates_are_the_same_for_every_subset_and_loader() -> None:
    data = ready(max_eval_users=30)
    whole = {u: c for b in data.test_dataloader() for u, c in zip(b["user"].tolist(), b["candidates"], strict=True)}
    ranking = RankingDataModule(data, max_test_users=20, eval_batch_size=7)
    ranking.setup()
    some = {u: c for b in ranking.test_dataloader() for u, c in zip(b["user"].tolist(), b["candidates"], strict=True)}
    assert len(some) == 20
    assert all(torch.equal(whole[user], candidates) for user, candidates in some.items())
    assert sum(len(batch["user"]) for batch in data.val_dataloader()) == 30
    assert data.candidate_hash == ready().candidate_hash
    assert data.candidate_hash != ready(seed=2).candidate_hash
    assert data.candidate_hash["val"] != data.candidate_hash["test"]


def test_subsets_of_users_and_rows_are_drawn_and_not_the_first_ones() -> None:
    data = ready(stage2_positions=1)
    users, rows = (
        [set(data.rank_rows(split, 5, seed=seed, **{limit: 20}).users.tolist()) for seed in (1, 1, 2)]
        for split, limit in (("test", "max_users"), ("train2", "max_rows"))
    )
    for first, again, other in (users, rows):
        assert len(first) == 20
        assert first == again
        assert first != other
        assert max(first) > 39  # of 80


def test_seen_is_the_complete_known_history_beyond_max_length() -> None:
    data = ready(max_length=4)
    for batch in data.test_dataloader():
        assert batch["history"].shape[1] <= 4
        for user, seen, target in zip(batch["user"].tolist(), batch["seen"], batch["target"].tolist(), strict=True):
            sequence = data.domain.sequence(user)
            assert seen[seen > 0].tolist() == sequence[:-1].tolist()
            assert target == sequence[-1]
        for user, history in zip(batch["user"].tolist(), batch["history"], strict=True):
            assert history[history > 0].tolist() == data.domain.sequence(user)[:-1][-4:].tolist()


def test_predictions_follow_the_complete_sequence_of_every_user(raw_domain) -> None:
    rows = [(user, (user * 3 + step) % 40, step) for user in range(40) for step in range(6)]
    rows += [(100, 5, 0), (101, 6, 0), (101, 7, 1)]  # too short to be evaluated
    data = ready(Given(raw_domain(rows)), k_core=0, max_length=4, train_users=5, eval_batch_size=7)
    found = {}
    for batch in data.predict_dataloader():
        assert batch.keys() == {"history", "user", "seen"}
        for user, history, seen in zip(batch["user"].tolist(), batch["history"], batch["seen"], strict=True):
            found[user] = (history[history > 0].tolist(), seen[seen > 0].tolist())
    assert len(found) == data.domain.num_users == 42
    for user, (history, seen) in found.items():
        assert seen == data.domain.sequence(user).tolist()
        assert history == seen[-4:]


def test_evaluation_negatives_lie_outside_the_complete_history() -> None:
    data = ready(SyntheticReader(num_users=80, num_items=60, mean_length=20))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            for user, candidates, target in zip(batch["user"], batch["candidates"], batch["target"], strict=True):
                complete = set(data.domain.sequence(int(user)).tolist())
                assert set(candidates.tolist()) & complete == {int(target)}


def test_ranks_share_the_work() -> None:
    data = ready(stage2_positions=1)
    parts = [data.rank_dataloader("test", 16, rank=rank, world_size=3) for rank in range(3)]
    users = [user for part in parts for batch in part for user in batch["user"].tolist()]
    assert sorted(users) == data.splits.eval_users.tolist()
    assert len({len(part) for part in parts}) == 1


def test_second_run_reads_the_cache_and_not_the_source(raw_domain, cache: Path) -> None:
    rows = [(user, item, item) for user in range(30) for item in range(8)]
    reader = Given(raw_domain(rows, {item: f"t{item}" for item in range(8)}))
    settings = {"k_core": 2, "num_candidates": 2}
    with pytest.raises(DataError, match="leaves 0 of 8 items"):
        ready(reader, **settings)  # everybody has interacted with everything
    assert reader.reads == 1
    rows = [(user, item, item) for user in range(30) for item in range(user % 5, user % 5 + 6)]
    reader = Given(raw_domain(rows))
    first, second = ready(reader, **settings), ready(reader, **settings)
    assert reader.reads == 1
    for name in ("offsets", "items", "times", "titles", "texts", "user_keys", "item_keys", "fingerprint", "card"):
        left, right = getattr(first.domain, name), getattr(second.domain, name)
        assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right
    assert not second.domain.items.flags.writeable  # mapped, not copied
    ready(reader, k_core=3, num_candidates=2)
    assert reader.reads == 2
    assert not list(cache.rglob(".writing*"))


def test_damaged_cache_is_one_clear_error(cache: Path) -> None:
    ready()
    path = next(cache.rglob("interactions.arrow"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="delete the folder"):
        ready()


@pytest.mark.parametrize("part", ["domains", "candidates"])
def test_a_cache_of_another_account_is_told_from_a_damaged_one(cache: Path, closed, part: str) -> None:
    ready()
    closed(cache / part)
    with pytest.raises(
        DataError, match=r"belongs to account .* and is closed to this account; set SFUBM_CACHE"
    ) as caught:
        ready()
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("folder", ["domains", "candidates"])
def test_a_cache_that_may_not_be_written(cache: Path, monkeypatch, folder: str) -> None:
    def refuse(*_: object, dir: Path, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    where = {"domains": "storage.tempfile.mkdtemp", "candidates": "results.tempfile.mkstemp"}[folder]
    package = "datamodules" if folder == "domains" else "evaluation"
    monkeypatch.setattr(f"lightning_sfubm.{package}.{where}", refuse)
    with pytest.raises(DataError, match=rf"{folder}/.* set SFUBM_CACHE to a folder of your own"):
        ready()


@pytest.mark.parametrize(
    ("titles", "words"),
    [
        ({item: f"title {item}" for item in range(12)}, "domain 'shop' has 12 items with distinct titles"),
        (dict.fromkeys(range(40), "The same"), "domain 'shop' has 1 items with distinct titles"),
    ],
)
def test_domains_without_enough_distinct_titles(raw_domain, titles: dict, words: str) -> None:
    rows = [(user, item, item) for user in range(20) for item in range(user % 7, user % 7 + 5)]
    rows += [(100 + item, item, 0) for item in titles]
    with pytest.raises(DataError, match=words):
        ready(Given(raw_domain(rows, titles)), k_core=0)


def test_too_few_items_are_said_to_be_so_by_what_was_dropped(raw_domain) -> None:
    """Most interactions name items that the items table lacks."""
    rows = [(user, (user + place) % 90, place) for user in range(90) for place in range(18)]
    titles = {item: f"title {item}" for item in range(30)}
    with pytest.raises(
        DataError,
        match=r"leaves \d+ of 30 items .*; lower num_candidates \(dropped before: 1,080 interactions with items",
    ) as error:
        ready(Given(raw_domain(rows, titles)), k_core=0)
    assert str(error.value).endswith(
        "1,080 interactions with items that are not in the items table; "
        "43 users whose every interaction was dropped by the rules before the k-core)"
    )
    with pytest.raises(
        DataError, match=r"30 items with distinct titles.*; add items or lower num_candidates \(dropped bef"
    ):
        ready(Given(raw_domain(rows, titles)), k_core=0, num_candidates=40)


def test_odd_titles_and_short_users_end_in_a_result(raw_domain) -> None:
    titles = {item: f"title {item}" for item in range(40)} | {0: "", 1: "x" * 2000, 2: "新しい本", 3: None}
    rows = [(user, (user * 3 + step) % 40, step) for user in range(40) for step in range(6)] + [("one", 5, 0)]
    rows = [(str(user), item, order) for user, item, order in rows]
    data = ready(Given(raw_domain(rows, titles)), k_core=0, text_encoder=HashingTextEncoder(8))
    assert data.catalogue.titles[1:5] == ["untitled 0", "x" * 2000, "新しい本", "untitled 3"]
    assert torch.allclose(data.catalogue.text_embeddings[1:].norm(dim=1), torch.ones(40))
    assert not data.catalogue.text_embeddings[0].any()
    assert data.catalogue.text_embeddings.shape == (41, 8)


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.users: list[list[int]] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if index == 0:
            self.users.append([])
        self.users[-1] += batch["user"].tolist()
        return self.weight * 0

    def validation_step(self, batch: dict, index: int) -> None:
        assert batch["candidates"].shape[1] == 20

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**flags) -> L.Trainer:
    return L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **flags,
    )  # fmt: skip


def test_fit_walks_every_sequence_once_an_epoch_in_new_order() -> None:
    data, module = ready(batch_size=16), Recorder()
    trainer().fit(module, datamodule=data)
    assert len(module.users) == 3
    assert all(sorted(epoch) == list(range(80)) for epoch in module.users)
    assert module.users[0] != module.users[1] != module.users[2]


@pytest.mark.parametrize("batches", [1, 0.5])
def test_overfitting_on_a_few_batches_is_refused_in_a_sentence(batches: float) -> None:
    with pytest.raises(ConfigError, match=r"overfit_batches replaces .* set trainer\.limit_train_batches instead"):
        trainer(overfit_batches=batches).fit(Recorder(), datamodule=ready())


def test_fit_on_stage2_needs_held_out_positions() -> None:
    trainer().fit(
        Recorder(), datamodule=RankingDataModule(DomainDataModule("s", SyntheticReader(), stage2_positions=1))
    )
    with pytest.raises(ConfigError, match="stage2_positions"):
        trainer().fit(Recorder(), datamodule=RankingDataModule(DomainDataModule("s", SyntheticReader())))


def test_checkpoint_of_other_data_is_refused() -> None:
    state = ready().state_dict()
    ready().load_state_dict(state)
    with pytest.raises(CheckpointError, match="other data"):
        ready(k_core=6).load_state_dict(state)


def test_a_state_says_which_positions_trained_and_only_while_that_is_true() -> None:
    held_out, whole = ready(stage2_positions=1), ready()
    state = held_out.state_dict()
    assert state["train_positions"] != whole.state_dict()["train_positions"]
    assert state == ready(stage2_positions=1, seed=2).state_dict()  # without a subset the seed draws none
    assert held_out.state_dict() == held_out.catalogue.origin
    differing = [ready(stage2_positions=1, **some) for some in ({"stage2_users": 9}, {"train_users": 40})]
    differing += [ready(stage2_positions=1, stage2_users=9, seed=2), held_out.trained_by(np.arange(80) % 2 == 0)]
    assert len({data.catalogue.origin["train_positions"] for data in (held_out, whole, *differing)}) == 6
    of_an_earlier_version = {"fingerprint": state["fingerprint"]}
    for other in (of_an_earlier_version, whole.state_dict()):
        data = ready(stage2_positions=1)
        data.load_state_dict(other)
        assert data.state_dict() == {"fingerprint": state["fingerprint"]}
        data.load_state_dict(state)
        assert data.state_dict() == state


def test_use_before_setup_and_unknown_split() -> None:
    data = DomainDataModule("shop", SyntheticReader())
    with pytest.raises(ConfigError, match=r"call setup\(\) first"):
        _ = data.catalogue
    with pytest.raises(ConfigError, match="split must be"):
        ready().rank_rows("train")


@pytest.mark.parametrize("size", [0, -1])
def test_subsets_of_nobody_are_refused(size: int) -> None:
    for name in ("stage2_users", "max_eval_users", "train_users"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1.*not {size}"):
            DomainDataModule("shop", SyntheticReader(), **{name: size})
    data = ready()
    with pytest.raises(ConfigError, match=f"max_users must be at least 1.*not {size}"):
        data.rank_rows("val", max_users=size)
    for name in ("max_train_users", "max_val_users", "max_test_users"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            RankingDataModule(data, **{name: size})
    for name in ("max_val_users", "max_test_users"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            PreferenceDataModule(data, **{name: size})


def test_a_setup_that_failed_fails_again() -> None:
    data = DomainDataModule("shop", SyntheticReader(num_users=80, num_items=60), num_candidates=61)
    for _ in range(2):
        with pytest.raises(DataError, match="too few for lists of 61"):
            data.setup()
    with pytest.raises(ConfigError, match=r"call setup\(\) first"):
        _ = data.domain


def test_a_very_long_history_does_not_pad_all_batches(raw_domain, monkeypatch) -> None:
    """Every user is evaluated and predicted once all the same, with the same row."""
    rows = [(user, (user * 3 + step) % 40, step) for user in range(60) for step in range(6)]
    rows += [(99, step % 20, step) for step in range(900)]
    data = ready(Given(raw_domain(rows)), k_core=0, max_length=4, text_encoder=HashingTextEncoder(8))
    union = UnionDataModule({"shop": data})
    union.prepare_data()
    union.setup()

    def loaders() -> list[DataLoader]:
        return [data.val_dataloader(), data.test_dataloader(), data.predict_dataloader(), union.val_dataloader()]

    plain = [list(loader) for loader in loaders()]
    monkeypatch.setitem(SortedBatchSampler.__init__.__kwdefaults__, "seen_ids", 2000)
    cut = [list(loader) for loader in loaders()]
    assert [max(b["seen"].numel() for b in loader) > 50_000 for loader in plain] == [True] * 4
    assert [max(b["seen"].numel() for b in loader) <= 2000 for loader in cut] == [True] * 4

    def by_user(batches: list) -> dict:
        return {
            int(user): {
                k: v[row][v[row] > 0].tolist() if k in ("seen", "history") else v[row].tolist() for k, v in b.items()
            }
            for b in batches
            for row, user in enumerate(b["user"])
        }

    assert [by_user(found) for found in cut] == [by_user(found) for found in plain]


def test_federation_of_any_size(csv_tables, write_tables) -> None:
    folder = write_tables(*csv_tables(num_users=90))
    one = FederatedDataModule({"solo": DomainDataModule("solo", TableReader("source"), k_core=2)}, str(folder.parent))
    one.prepare_data()
    one.setup()
    assert one.domains["solo"].num_items == 40
    names = ["b", "a", "c"]
    domains = {n: DomainDataModule(n, SyntheticReader(i), root="/own") for i, n in enumerate(names)}
    three = FederatedDataModule(domains, root="/shared")
    three.setup()
    assert list(three.domains) == ["a", "b", "c"]
    assert three.domains["a"].root == "/own"
    assert three.overlap()["a, b"]["users"] == 0
    assert set(three.overlap()) == {"a, b", "a, c", "b, c"}
    assert json.dumps({name: card.to_dict() for name, card in three.data_cards.items()})
    with pytest.raises(ConfigError, match="same name"):
        FederatedDataModule({"x": DomainDataModule("y", SyntheticReader())})
    with pytest.raises(ConfigError, match="at least one"):
        FederatedDataModule({})


def test_order_in_which_domains_are_named_changes_nothing() -> None:
    def batches(names: list[str]) -> list[torch.Tensor]:
        places = {"a": 0, "b": 1}
        data = FederatedDataModule({n: DomainDataModule(n, SyntheticReader(places[n]), batch_size=32) for n in names})
        data.setup()
        return [batch["history"] for domain in data.domains.values() for batch in domain.train_dataloader()]

    assert all(map(torch.equal, batches(["a", "b"]), batches(["b", "a"])))


def test_command_line_form() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(FederatedDataModule, "data")
    base = "lightning_sfubm.datamodules"
    domain = {
        "name": "a",
        "user_range": [0, 500],
        "reader": {"class_path": f"{base}.synthetic.SyntheticReader", "init_args": {"num_users": 50}},
        "text_encoder": {"class_path": f"{base}.synthetic.HashingTextEncoder"},
    }
    entry = {"class_path": f"{base}.domain_datamodule.DomainDataModule", "init_args": domain}
    config = parser.parse_object({"data": {"domains": {"a": entry}, "root": "somewhere"}})
    data = parser.instantiate(config).data
    assert data.domains["a"].reader.num_users == 50
    assert data.domains["a"].settings.user_range == (0, 500)
    assert data.domains["a"].root == "somewhere"


def test_a_young_shop_trains_and_validates_on_few_users_and_tests_all() -> None:
    data, whole = ready(train_users=10, stage2_positions=1), ready(stage2_positions=1)
    trained = {int(u) for batch in data.train_dataloader() for u in batch["user"]}
    assert len(trained) <= 10
    for split in ("val", "train2"):
        assert {int(u) for u in data.rank_rows(split).users} <= set(np.flatnonzero(data.splits.trained))
    assert len(data.rank_rows("val").users) == 10
    assert len(data.rank_rows("val", max_users=4).users) == 4
    assert data.rank_rows("test").users.tolist() == whole.rank_rows("test").users.tolist()
    assert data.candidate_hash == whole.candidate_hash
    assert data.catalogue.train_counts.sum() < whole.catalogue.train_counts.sum()
    assert data.catalogue.num_items == whole.catalogue.num_items


def test_another_half_of_the_users_can_train_without_touching_the_first() -> None:
    data = ready(train_users=40, stage2_positions=1)
    before = data.catalogue.train_counts.clone()
    others = data.trained_by(~data.splits.trained)
    first = {user for batch in data.train_dataloader() for user in batch["user"].tolist()}
    second = {user for batch in others.train_dataloader() for user in batch["user"].tolist()}
    assert first
    assert second
    assert not first & second
    assert torch.equal(data.catalogue.train_counts, before)
    assert not torch.equal(others.catalogue.train_counts, before)
    assert others.candidate_hash == data.candidate_hash
