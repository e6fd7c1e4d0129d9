"""Secure aggregation: the server learns the sum of the clients' vectors and no single one of them.

The protocol is that of Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(figure 4 without the steps for an active adversary), among n clients with threshold t:

    ===================  ==================================================  ==========================================
    step                 client sends                                        server answers
    ===================  ==================================================  ==========================================
    1 ``advertise_keys`` two fresh X25519 public keys                        the roster of all keys
    2 ``share_keys``     shares of its mask key and of a seed, sealed        a mailbox of shares for each client
    3 ``mask_input``     ``y_u = x_u + m(b_u) +- sum_v m(s_uv)`` mod 2^k     who survived and who dropped
    4 ``unmask``         survivors' seed shares, dropped clients' key shares the sum
    ===================  ==================================================  ==========================================

The masks m(s_uv) of a pair cancel in the sum. Those with a client that dropped before step 3 are removed with its recovered
mask key; the clients' own masks m(b_u) are removed with the recovered seeds of those whose input arrived. The second mask
keeps an input hidden whose mask key was recovered and that arrives late after all.

What is guaranteed: a server that follows the protocol and keeps all it sees, alone or together with fewer than t clients,
learns nothing of the other clients but the sum of their inputs, who took part, and the public settings. What is not: keys
are not signed, so a server that *deviates* can pose as clients (the channels must authenticate it, or the paper's active
variant is needed); a client that lies about its input is not noticed; the sum itself may tell something (with two clients,
each learns the other's vector from it): that is the business of differential privacy; Python integers are not constant-time.

Two additions of ours [choice]: every key is bound to the hash of the roster, so that clients that were shown different
rosters cannot end in one sum, and a hash commits a client to its seed, so that altered shares are noticed.
"""

from collections.abc import Mapping

from torch import Tensor

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.privacy.secagg.client import STEPS, SecAggClient
from lightning_sfubm.privacy.secagg.encoding import SecAggSettings
from lightning_sfubm.privacy.secagg.server import SecAggServer, SecureSum

__all__ = ["STEPS", "SecAggClient", "SecAggServer", "SecAggSettings", "SecureSum", "secure_sum"]


def secure_sum(
    vectors: Mapping[str, Mapping[str, Tensor]],
    settings: SecAggSettings,
    *,
    weights: Mapping[str, float] | None = None,
    dropped: Mapping[str, str] | None = None,
    round: int = 0,
) -> SecureSum:
    """Run one round of the protocol in this process, with every message as bytes.

    Args:
        vectors: named float tensors by client, with the same names and shapes for all.
        settings: of the protocol.
        weights: by client; 1 where ``None``. The sum is over ``weight * tensor``.
        dropped: client -> the step of :data:`STEPS` it is gone before; a client that is gone before ``"unmask"`` has sent
            its masked input and is in the sum.
        round: the federated round.

    Returns:
        The sums, exact to fixed-point precision, over the clients that sent their input.

    Raises:
        PrivacyError: fewer clients than the threshold are left at a step.
        MessageError: the clients' tensors differ in name or shape, a value is out of range, or a weight is missing.
        ConfigError: ``dropped`` names an unknown client or step.
    """
    gone = dict(dropped or {})
    for name, step in gone.items():
        if name not in vectors or step not in STEPS:
            raise ConfigError(f"secure_sum: dropped names '{name}' before '{step}'; clients drop before one of {STEPS}")
    if not vectors or set(weights or vectors) != set(vectors):
        raise MessageError("a secure sum needs the vectors of at least two clients, and a weight for each or for none")
    shapes = {key: tuple(value.shape) for key, value in vectors[min(vectors)].items()}
    server = SecAggServer(settings, shapes, round)
    clients = {name: SecAggClient(name, settings, shapes, round) for name in sorted(vectors)}

    def present(step: str) -> list[str]:
        return [name for name in clients if name not in gone or STEPS.index(step) < STEPS.index(gone[name])]

    invite = server.invite()
    roster = server.collect_keys({name: clients[name].advertise_keys(invite) for name in present("advertise_keys")})
    mailboxes = server.collect_shares({name: clients[name].share_keys(roster) for name in present("share_keys")})
    request = server.collect_inputs(
        {
            name: clients[name].mask_input(mailboxes[name], vectors[name], weights[name] if weights else 1.0)
            for name in present("mask_input")
        }
    )
    return server.collect_reveals({name: clients[name].unmask(request) for name in present("unmask")})
