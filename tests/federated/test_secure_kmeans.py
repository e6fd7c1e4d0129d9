"""Secure k-means as an aggregator and within a run: no vector leaves, and the answer is that of k-means on the union."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.audit.attack import protected_vectors
from lightning_sfubm.audit.check import check_run
from lightning_sfubm.audit.command import schemas
from lightning_sfubm.audit.facts import mechanisms
from lightning_sfubm.audit.replay import replay
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.aggregation import KMeans
from lightning_sfubm.federated.envelopes import check_across_machines
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.secure_kmeans import SecureKMeans, _Noise
from tests.conftest import small_distiller

pytest.importorskip("cryptography")


def units(n: int, seed: int, dim: int = 8) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def planted(seed: int) -> Tensor:
    return normalize(torch.eye(4, 8).repeat_interleave(10, 0) + 0.1 * units(40, seed), dim=1)


def silent(*_: object) -> None:
    pass


def test_planted_clusters_are_found_as_by_k_means_on_the_union() -> None:
    uploads = {"a": planted(1), "b": planted(2), "c": planted(3)}
    views = SecureKMeans(num_clusters=6, min_members=5, seed=1).aggregate(uploads)
    plain = KMeans(num_clusters=4, min_members=5).aggregate(uploads)
    for name in uploads:
        assert float((views[name] * plain[name]).sum(1).min()) > 0.98
        assert len(views[name].unique(dim=0)) >= 4


@pytest.mark.parametrize("epsilon", [None, 1e9])
def test_only_without_noise_do_settled_centroids_end_the_steps(epsilon: float | None) -> None:
    """How many steps there are would tell of the vectors."""
    sent: list[object] = []
    aggregator = SecureKMeans(num_clusters=4, min_members=1, iterations=20, epsilon=epsilon)
    aggregator.views(0, {"a": planted(1), "b": planted(2)}, 0, 1, silent, lambda *message: sent.append(message))
    most = 2 * (20 + 1)  # centroids for each step and the answer, for two clients
    assert len(sent) < most if epsilon is None else len(sent) == most


def test_where_no_cluster_suffices_all_items_get_the_mean_of_all() -> None:
    uploads = {"a": torch.eye(4, 8), "b": torch.eye(8)[4:]}
    views = SecureKMeans(num_clusters=8, min_members=2).aggregate(uploads)
    mean = normalize(torch.ones(8), dim=0)
    for view in views.values():
        torch.testing.assert_close(view, mean.expand(4, 8))


def test_no_sum_of_a_single_client_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shops that sell different things and one thing alike: what is opened besides is of both."""
    opened: list[dict[str, Tensor]] = []
    aggregator = SecureKMeans(num_clusters=12, min_members=3, iterations=4)
    real = aggregator.secure.sum

    def spy(*args: Any, **settings: Any) -> dict[str, Tensor]:
        opened.append(real(*args, **settings))
        return opened[-1]

    monkeypatch.setattr(aggregator.secure, "sum", spy)
    alike, far = normalize(torch.eye(1, 8) + 0.1 * units(20, 5), dim=1), torch.eye(8)
    own = {"a": far[2:4], "b": far[5:7]}
    uploads = {n: torch.cat([alike, normalize(v.repeat(10, 1) + 0.1 * units(20, 6), dim=1)]) for n, v in own.items()}
    aggregator.views(0, uploads, 0, 1, silent, silent)
    counts = [sums["contributors"] for sums in opened if set(sums) == {"contributors"}]
    steps = [sums for sums in opened if "counts" in sums]
    assert len(counts) == len(steps)
    assert any(bool((of == 1).any()) for of in counts)
    for of, sums in zip(counts, steps, strict=True):
        assert sums["counts"][of < 2].abs().max() == 0
        assert sums["sums"][of < 2].abs().max() == 0
        assert torch.equal(sums["contributors"], of * (of > 1))
        assert float(sums["counts"].sum()) > 0


def test_the_order_of_clients_changes_nothing_and_neither_do_fresh_keys() -> None:
    uploads = {"a": planted(1), "b": planted(2), "c": planted(3)}
    for settings in ({}, {"epsilon": 5.0}):
        first = SecureKMeans(num_clusters=6, **settings).aggregate(uploads)
        second = SecureKMeans(num_clusters=6, **settings).aggregate({n: uploads[n] for n in "cab"})
        assert all(torch.equal(first[n], second[n]) for n in uploads)


def test_noise_blurs_and_its_size_follows_from_epsilon_steps_and_exchanges() -> None:
    uploads = {"a": planted(1), "b": planted(2)}
    plain = SecureKMeans(num_clusters=4, min_members=1).aggregate(uploads)
    noisy = SecureKMeans(num_clusters=4, min_members=1, epsilon=0.1).aggregate(uploads)
    assert float((plain["a"] * noisy["a"]).sum(1).mean()) < 0.9
    stated = SecureKMeans(iterations=4, epsilon=1.0, delta=1e-6).describe(2)["differential privacy"]
    assert stated["releases"] == 10
    one = SecureKMeans(iterations=4, epsilon=1.0, delta=1e-6).describe(1)["differential privacy"]
    assert stated["noise_multiplier"] == pytest.approx(one["noise_multiplier"] * 2**0.5)
    assert "simulation only" in stated["secret"]
    assert stated["adversary"].startswith(
        "the server, if it follows the secure aggregation, and any one other organisation"
    )
    assert "differential privacy" not in SecureKMeans().describe(1)


def test_the_noise_in_the_sum_has_at_least_the_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client adds a share that suffices where only the threshold of them stays; all three together add 3/2 of it."""
    sent: dict[str, dict[str, Tensor]] = {}
    aggregator = SecureKMeans(num_clusters=400, min_members=1, iterations=1, epsilon=1.0)
    real = aggregator.secure.sum

    def spy(round: int, vectors: dict[str, dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
        sent.update(vectors)
        return real(round, vectors, **settings)

    monkeypatch.setattr(aggregator.secure, "sum", spy)
    aggregator.views(0, {n: torch.eye(1, 8) for n in "abc"}, 3, 1, silent, silent)
    scale = aggregator.describe(1)["differential privacy"]["noise_multiplier"] * 3**0.5
    total = torch.stack([sent[n]["sums"] for n in "abc"]).sum(0)
    assert float(total.std()) == pytest.approx(scale * (3 / 2) ** 0.5, rel=0.06)
    assert abs(float(torch.corrcoef(torch.stack([sent[n]["sums"].flatten() for n in "ab"]))[0, 1])) < 0.08


def test_of_two_clients_the_other_one_alone_adds_what_the_guarantee_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each knows its own share and can subtract it."""
    sent: dict[str, dict[str, Tensor]] = {}
    aggregator = SecureKMeans(num_clusters=400, min_members=1, iterations=1, epsilon=1.0)
    real = aggregator.secure.sum

    def spy(round: int, vectors: dict[str, dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
        sent.update(vectors)
        return real(round, vectors, **settings)

    monkeypatch.setattr(aggregator.secure, "sum", spy)
    aggregator.views(0, {n: torch.eye(1, 8) for n in "ab"}, 3, 1, silent, silent)
    scale = aggregator.describe(1)["differential privacy"]["noise_multiplier"] * 3**0.5
    for name in "ab":
        assert float(sent[name]["sums"].std()) == pytest.approx(scale, rel=0.06)


def test_secrets_of_the_clients_own_key_the_noise(tmp_path: Any) -> None:
    uploads = {"a": planted(1), "b": planted(2)}
    ends = [
        SecureKMeans(num_clusters=4, epsilon=1.0, secret_dir=str(tmp_path / folder)).aggregate(uploads)["a"]
        for folder in ("one", "one", "other")
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    secret = SecureKMeans(num_clusters=4, epsilon=1.0, secret_dir=str(tmp_path / "one"))
    runs = [secret.views(0, uploads, 3, 1, silent, silent, nonce)["a"] for nonce in ("one", "one", "other")]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])  # two runs share no noise
    assert (tmp_path / "one" / "a.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "bad",
    [
        {"num_clusters": 0},
        {"min_members": 0},
        {"iterations": 0},
        {"max_items": 0},
        {"epsilon": -1.0},
        {"delta": 0.0, "epsilon": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SecureKMeans(**bad)


def test_more_items_than_agreed_are_refused_before_anything_wraps() -> None:
    with pytest.raises(MessageError, match="admits no more"):
        SecureKMeans(num_clusters=1, max_items=5).aggregate({"a": units(40, 1), "b": units(40, 2)})


def test_a_client_with_too_few_items_is_refused_before_its_moments_leave() -> None:
    """The sum over one vector is that vector: of two clients the other one would have it. Noise covers it."""
    few = SecureKMeans(num_clusters=2, min_members=5)
    with pytest.raises(PrivacyError, match="client 'a' has 4 items"):
        few.aggregate({"a": units(4, 1), "b": units(20, 2)})
    assert len(few.aggregate({"a": units(5, 1), "b": units(20, 2)})["a"]) == 5
    uploads = {"a": units(1, 1), "b": units(20, 2)}
    sent: list[object] = []
    settings = SecureKMeans(num_clusters=2, min_members=5)
    with pytest.raises(PrivacyError, match=r"client 'a' has 1 items, and SecureKMeans\.min_members = 5"):
        settings.views(1, uploads, 0, 1, lambda *message: sent.append(message), silent)
    assert not sent
    assert SecureKMeans(num_clusters=2, min_members=5, epsilon=1.0, delta=1e-3).aggregate(uploads)["a"].shape == (1, 8)


def test_across_machines_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="SecureKMeans takes many messages"):
        check_across_machines(Federation(aggregator=SecureKMeans()))


def test_in_a_run_no_vector_leaves_and_the_audit_reads_what_did(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(
        exchange="semantics",
        aggregator=SecureKMeans(num_clusters=8, min_members=2, iterations=3, epsilon=4.0),
        keep_messages=True,
        rounds=1,
        callbacks=[PrivacyNoise(0.0)],
        flags={"limit_val_batches": 1},
    )
    trainer.fit(small_distiller(), datamodule=federated_data(domains=3))
    loop, lines = trainer.loop, read_ledger(trainer.run_dir / "ledger.jsonl")
    up = [line for line in lines if line["direction"] == "up"]
    assert {line["kind"] for line in up} == {
        f"semantics secagg {step}" for step in ("keys", "shares", "masked input", "unmask")
    }
    assert all(line["tensors"] == {} for line in up)
    down = [line for line in lines if line["tensors"]]
    assert {line["kind"] for line in down} == {"semantics centroids"}
    for client in loop.clients.values():
        view = client.module.teacher.global_text[1:]  # row 0 is the padding
        assert view.shape == client.module.semantics().shape
        assert 1 <= len(view.unique(dim=0)) <= 8
    check = check_run(trainer.run_dir, schemas(loop))
    assert check.problems == []
    assert check.parsed == len(down) == 3 * 4
    assert replay(check.messages, check.entries, loop.clients, {}, partial(protected_vectors, loop)) == ([], [])
    standings = {(row["standing"], row.get("protects", "")) for row in mechanisms(lines)}
    assert standings == {("simulated", "item"), ("hidden", "")}  # without secret_dir the noise follows from the seed


class _Away(FederatedCallback):
    def on_upload(self, loop: Any, client: str, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if client == "beta":
            raise ClientDropped("away")
        return tensors


def test_with_one_client_there_each_keeps_its_own_vectors(
    federated_data: Any, federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = federated_trainer(
        exchange="semantics", aggregator=SecureKMeans(4), rounds=0, callbacks=[PrivacyNoise(0.0), _Away()]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert "client 'beta' dropped out" in caplog.text
    assert "a sum needs two at least" in caplog.text
    assert [json.loads(line) for line in (trainer.run_dir / "ledger.jsonl").read_text().splitlines()] == []


def test_no_noise_is_added_to_two_sums_that_differ() -> None:
    """The difference of two such sums would have none: of a run begun again with an item less, or without a client."""
    sums = {"sums": torch.arange(6.0).reshape(2, 3)}

    def drawn(
        names: tuple[object, ...] = ("nonce", 0, "a", "b"), step: int = 1, plus: float = 0.0, of: str = ""
    ) -> Tensor:
        noise = _Noise(1.0, 1, {"a": b"k" * 32}, names, of)
        tensors = {"sums": sums["sums"] + plus}
        return noise("a", step, tensors, 1.0)["sums"] - tensors["sums"]

    torch.testing.assert_close(drawn(), drawn())
    others = [drawn(("nonce", 1, "a", "b")), drawn(("nonce", 0, "a", "b", "c")), drawn(step=2), drawn(plus=1.0)]
    for other in [*others, drawn(of="other centroids")]:
        assert float((drawn() - other).abs().min()) > 1e-3


def test_a_run_begun_again_keeps_its_number_unless_settings_data_or_secrets_are_others(
    federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    trainer = federated_trainer(callbacks=[PrivacyNoise(0.05, str(tmp_path / "secrets"))])
    loop = trainer.build_loop(small_distiller(), federated_data(num_users=20))
    number = loop._run_nonce()
    assert loop._run_nonce() == number
    key = tmp_path / "secrets/beta.key"
    kept = key.read_bytes()
    for settings, secret in (({"trainer": "another"}, kept), ({}, bytes(32))):
        loop.settings = settings
        key.write_bytes(secret)
        with pytest.raises(
            CheckpointError, match="noise_nonce: messages of a run with other settings, data or secrets"
        ):
            loop._run_nonce()
    for torn in ("", number[:-1], "../" + number):
        (trainer.run_dir / "noise_nonce").write_text(torn)
        with pytest.raises(PrivacyError, match="noise_nonce: holds no number of a run"):
            loop._run_nonce()


def test_sums_that_were_opened_are_not_made_again_of_other_silos(federated_data: Any, federated_trainer: Any) -> None:
    loop = federated_trainer().build_loop(small_distiller(), federated_data(num_users=20))

    def line(client: str, step: str) -> dict[str, Any]:
        return {"client": client, "round": 0, "direction": "up", "kind": f"semantics secagg {step}"}

    private = SecureKMeans(epsilon=1.0)
    loop.ledger.since = [line(name, "masked input") for name in ("alpha", "beta")]
    loop._check_same_silos(private, 0, {"alpha", "beta", "gamma"})  # nothing was opened: nobody knows a sum
    loop.ledger.since += [line(name, "unmask") for name in ("alpha", "beta")]
    loop._check_same_silos(private, 0, {"alpha", "beta"})
    loop._check_same_silos(private, 1, {"alpha", "beta", "gamma"})
    loop._check_same_silos(SecureKMeans(), 0, {"alpha"})
    with pytest.raises(PrivacyError, match=r"\['alpha', 'beta'\] were opened .* \['alpha'\] would be a second release"):
        loop._check_same_silos(private, 0, {"alpha"})
