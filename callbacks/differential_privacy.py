"""User-level differential privacy of the shared teacher: its training phase becomes DP-SGD."""

import copy
import hashlib
import math
import os
import secrets
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sfubm.contracts import TrainBatch
from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.privacy.accounting import Mechanism, PrivacyAccountant, noise_multiplier_for
from lightning_sfubm.privacy.noise import NoiseStream
from lightning_sfubm.privacy.per_user import Method, PerUserGradients, private_gradient, without_user_draws
from lightning_sfubm.privacy.poisson import PoissonSampler
from lightning_sfubm.privacy.secret import client_secret
from lightning_sfubm.privacy.teacher_loss import TeacherLoss
from lightning_sfubm.privacy.training_checks import check_trainer, checked_rows
from lightning_sfubm.seeds import seeded


class DifferentialPrivacy(Callback):
    """Train the teacher of an :class:`~lightning_sfubm.modules.fkd.FKDDistiller` with DP-SGD over users.

    In every step each user is drawn with the same probability (none at all is possible, and is a step too), each drawn user's
    whole gradient is clipped, Gaussian noise is added to the sum and the sum is divided by the expected number of users. The
    optimiser sees nothing else: training step and training loader of the fit are replaced, and put back afterwards.

    What is promised:

    - *Adversary*: everyone who receives the teacher's weights, after each round, however often: the server, the other clients,
      whoever they tell. Each upload is computed from the private gradients so far, so that one epsilon covers them all.
    - *Neighbours*: two data sets of a client, one of which has one user's whole training sequence more. Users of different
      clients do not overlap: epsilon holds for each user at the figure of their own client. Where the datamodule draws some
      users out of all (``max_users``, ``train_users``, ``stage2_users``), the data sets are those of the users drawn: who else
      is drawn depends on everybody, and no noise covers that. The mechanism's description says so.
    - *Public*: the catalogue with its text vectors, the number of users, all settings of the run.
    - *Not covered*: what else is made of behaviour and leaves the client. Validation metrics, logs (the share of clipped users
      among them), choosing an epoch or a setting by them, ``weighting: examples``, k-core filtering, which lets one user decide
      whether others are kept: each would need noise and accounting of its own. Neither is anything of this trained before,
      without this callback.
    - The encoder's dropout is off in these steps: masks are drawn for a batch one user after the other, so that a user more
      would move everybody's behind them, and with them their clipped gradients. That of the text vectors, drawn once a step
      for the item table, stays.
    - Sampling and noise come from named streams of a pseudo-random generator, among the names all that a step's sum follows
      from. Whoever knows the seed can subtract the noise: give ``secret_dir`` where the guarantee has to hold, and read "noise"
      as that of floating-point numbers.

    What is never exchanged needs no noise: phases that train nothing shared (the student) run unchanged, and the trainers of
    local phases and of methods outside the federation do not get the callback (``rounds_only``).

    Args:
        clip_norm: C, bound on the norm of a user's gradient, over all parameters together.
        noise_multiplier: standard deviation of the noise over C; ``None`` = the least that keeps ``target_epsilon`` over
            ``total_epochs``. 0 adds none and spends an infinite epsilon.
        target_epsilon: budget; training refuses a step past it. ``None`` = none.
        total_epochs: epochs of all rounds together, for which the noise is set where ``noise_multiplier`` is ``None``.
        delta: of the guarantee; must be below one over the number of users.
        expected_batch_size: expected number of users a step; ``None`` = the datamodule's ``batch_size``. An epoch has
            as many steps as visit each user once in the mean.
        accounting: ``"prv"`` or ``"rdp"``, see :class:`~lightning_sfubm.privacy.accounting.PrivacyAccountant`.
        gradients: how users are told apart, see :class:`~lightning_sfubm.privacy.per_user.PerUserGradients`.
        seed: root of the streams; ``None`` = that of ``seed_everything``, or 0.
        secret_dir: folder with one secret a client (``<client>.key``, made at first use), which with a number drawn once a run
            takes the seed's place. Keep it out of what is backed up or published with checkpoints.

    Raises:
        ConfigError: a setting is out of range.
    """

    rounds_only = True  #: what stays with the client is not accounted for and need not be private
    makes_private = True  #: a loop that is given it sends no update without a guarantee

    def __init__(
        self,
        clip_norm: float = 1.0,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        total_epochs: int | None = None,
        delta: float = 1e-5,
        expected_batch_size: int | None = None,
        accounting: Mechanism = "prv",
        gradients: Method = "auto",
        seed: int | None = None,
        secret_dir: str | None = None,
    ) -> None:
        if not clip_norm > 0 or (noise_multiplier is not None and not 0 <= noise_multiplier < math.inf):
            raise ConfigError(
                f"clip_norm = {clip_norm} (> 0) and noise_multiplier = {noise_multiplier} (>= 0) are required"
            )
        if noise_multiplier is None and (target_epsilon is None or total_epochs is None or total_epochs < 1):
            raise ConfigError(
                "differential privacy needs noise_multiplier, or target_epsilon and total_epochs (rounds x local epochs) to "
                f"set the noise by; got target_epsilon = {target_epsilon}, total_epochs = {total_epochs}"
            )
        if noise_multiplier != 0 and not math.isfinite(clip_norm):
            raise ConfigError("noise is a multiple of clip_norm: give a finite clip_norm or noise_multiplier 0")
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.target_epsilon, self.total_epochs, self.delta = target_epsilon, total_epochs, delta
        self.expected_batch_size, self.gradients = expected_batch_size, gradients
        self.seed, self.secret_dir = seed, secret_dir
        self.accountant = PrivacyAccountant(accounting, target_epsilon=target_epsilon, delta=delta)
        self._active = False
        self._sigma = 0.0
        self._nonce = ""
        self._drawn_by: tuple[str, ...] = ()

    # ------------------------------------------------------------------ before and after a fit

    def check_start(self, trainer: Trainer, module: LightningModule, datamodule: Any, epochs: int) -> None:
        """Refuse a first round that is sure to be refused when it begins, while nothing is changed yet.

        Args:
            trainer: with the flags that the round will have.
            module: of the client, bound to its catalogue.
            datamodule: of the client, set up.
            epochs: of the round.

        Raises:
            ConfigError: see :meth:`setup`, or the encoder cannot be trained by this method.
            PrivacyError: see :meth:`setup`, or the round would pass the budget or cannot be accounted for.
        """
        module = _distiller(module)
        check_trainer(trainer)
        users = len(checked_rows(datamodule.train_dataloader().dataset, self.delta))
        sampler = PoissonSampler(users, self._expected_users(datamodule), lambda: 0)
        PerUserGradients(TeacherLoss(module.teacher, module.logits_precision), self.gradients)
        limit = trainer.limit_train_batches
        steps = epochs * (min(limit, len(sampler)) if isinstance(limit, int) else int(limit * len(sampler)))
        plan, sigma = copy.deepcopy(self.accountant), self._noise_multiplier(sampler)
        plan.check(sigma, sampler.sample_rate, steps)
        plan.step(sigma, sampler.sample_rate, steps)
        plan.epsilon()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what a guarantee needs and replace the training loader by Poisson-sampled users.

        Raises:
            ConfigError: another module, no datamodule, or a trainer setting that does not go together with DP-SGD.
            PrivacyError: the data has several rows a user, or ``delta`` is no promise for so many users.
        """
        if stage != "fit":
            return
        self._active = False
        module = _distiller(pl_module)
        if module.phase != module.round_phase:
            return
        check_trainer(trainer)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise ConfigError(
                "DifferentialPrivacy draws users from a datamodule: pass one to fit instead of dataloaders"
            )
        loader = datamodule.train_dataloader()
        rows = checked_rows(loader.dataset, self.delta)
        self._client = str(getattr(datamodule, "name", "client"))
        self._drawn_by = tuple(getattr(datamodule, "drawn_by", ()))
        self._expected = self._expected_users(datamodule)
        self._sampler = PoissonSampler(len(rows), self._expected, lambda: self.accountant.steps, name=self._client)
        workers = loader.num_workers
        datamodule.train_dataloader = lambda: DataLoader(
            rows, sampler=self._sampler, batch_size=None, num_workers=workers
        )
        self._active = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the training step.

        Raises:
            PrivacyError: the phase trains shared parameters without noise, or private ones among them.
        """
        assert isinstance(pl_module, FKDDistiller)
        shared = {id(p) for p in pl_module.teacher.parameters()}
        trained = {id(p) for p in pl_module.trained_parameters()}
        if trained - shared if self._active else trained & shared:
            raise PrivacyError(
                f"the phase '{pl_module.phase}' does not train the shared teacher alone: it cannot be private; use 'teacher'"
            )
        if not self._active:
            return
        self._sigma = self._noise_multiplier(self._sampler)
        self._root = self._sampler.seed = self._root_seed()
        loss = TeacherLoss(pl_module.teacher, pl_module.logits_precision)
        per_user = PerUserGradients(loss, self.gradients)

        def training_step(batch: TrainBatch, batch_idx: int) -> Tensor:
            return self._step(pl_module, per_user, batch)

        pl_module.training_step = training_step  # type: ignore[method-assign, assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a plan that would pass the budget before anything of it is spent.

        Raises:
            PrivacyError: the planned epochs do not fit the budget, or steps were taken before without accounting.
        """
        if not self._active:
            return
        if trainer.global_step > self.accountant.steps:
            raise PrivacyError(
                f"the teacher has been trained for {trainer.global_step} steps, but only {self.accountant.steps} of them are "
                "accounted for: start without the checkpoint, or from one written under DifferentialPrivacy"
            )
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            planned = (trainer.max_epochs - trainer.current_epoch) * int(trainer.num_training_batches)
            if trainer.max_steps > 0:
                planned = min(planned, trainer.max_steps - trainer.global_step)
            self.accountant.check(self._sigma, self._sampler.sample_rate, max(0, planned))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put training step and loader back."""
        self._restore(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put training step and loader back, as after a whole fit."""
        self._restore(trainer, pl_module)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active:
            for owner, name in ((pl_module, "training_step"), (trainer.datamodule, "train_dataloader")):  # type: ignore[attr-defined]
                vars(owner).pop(name, None)

    # ------------------------------------------------------------------ training

    def _step(self, module: FKDDistiller, per_user: PerUserGradients, batch: TrainBatch) -> Tensor:
        """A number whose gradient by the teacher's parameters is the private gradient, and nothing else."""
        step, rate = self.accountant.steps, self._sampler.sample_rate
        self.accountant.check(self._sigma, rate)
        release = (self._client, step, self._sum_of(module, batch))
        with seeded(self._root, "private dropout", self._client, step), without_user_draws(module.teacher.encoder):
            private = private_gradient(
                per_user,
                batch["history"],
                batch["targets"],
                clip_norm=self.clip_norm,
                noise_multiplier=self._sigma,
                expected_users=self._expected,
                noise=NoiseStream(str(self._root).encode(), "gradient noise", *release),
            )
        self.accountant.step(self._sigma, rate)
        clipped = (private.norms > self.clip_norm).float().mean() if len(private.norms) else torch.zeros(())
        module.log("train/clipped_share", clipped, on_step=False, on_epoch=True, batch_size=max(1, len(private.norms)))
        parameters = per_user.parameters()
        return torch.stack([(parameters[name] * g).sum() for name, g in private.total.items()]).sum()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show and log ``privacy/epsilon`` and ``privacy/delta`` at an epoch's end and every ``log_every_n_steps`` steps."""
        last = batch_idx + 1 == trainer.num_training_batches
        every = int(getattr(trainer, "log_every_n_steps", 0)) or 1
        if self._active and (last or self.accountant.steps % every == 0):
            spent = {"privacy/epsilon": self.accountant.epsilon(), "privacy/delta": self.delta}
            pl_module.log_dict(spent, prog_bar=True, on_step=True, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both once more, for loggers that see a step now and then only: each epoch's point is in all of them."""
        if self._active:
            spent = {"privacy/epsilon": self.accountant.epsilon(), "privacy/delta": self.delta}
            pl_module.log_dict(spent, on_step=False, on_epoch=True, batch_size=1)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The accountant's history, for checkpoints."""
        return {"accountant": self.accountant.state_dict(), "nonce": self._nonce}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on accounting where a checkpoint stands."""
        self.accountant.load_state_dict(state_dict["accountant"])
        self._nonce = state_dict["nonce"]

    def describe(self) -> dict[str, object]:
        """The mechanism and what it has spent, in words and numbers, for ledgers and reports."""
        return {
            "mechanism": "DP-SGD over users",
            "neighbours": "one user's whole sequence added or removed" + self._among(),
            "epsilon": self.accountant.epsilon(),
            "delta": self.delta,
            "accounting": self.accountant.mechanism,
            "steps": self.accountant.steps,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self._sigma,
            "sample_rate": self._sampler.sample_rate,
            "secret": "kept by the client" if self.secret_dir else "derived from the run's seed (simulation only)",
        }

    def _among(self) -> str:
        """What the neighbours are data sets of, where that is not everybody's data."""
        if not self._drawn_by:
            return ""
        return f", among the users that {' and '.join(self._drawn_by)} drew (whom they draw depends on all users)"

    def without_budget(self, datamodule: Any) -> None:
        """From now on, train with the noise that this data asks for, and spend what it takes: for shadow models of an audit.

        Those train as the audited model did, but on other users, and the same budget would set another noise for them or refuse
        them. Nothing of theirs is sent.

        Args:
            datamodule: of the audited client, set up.

        Raises:
            ConfigError: the expected batch is larger than the data.
            PrivacyError: no noise keeps the budget on this data.
        """
        users = len(datamodule.train_dataloader().dataset)
        self.noise_multiplier = self._noise_multiplier(
            PoissonSampler(users, self._expected_users(datamodule), lambda: 0)
        )
        self.target_epsilon = self.accountant.target_epsilon = None

    def _expected_users(self, datamodule: Any) -> float:
        return float(self.expected_batch_size or datamodule.batch_size)

    def _noise_multiplier(self, sampler: PoissonSampler) -> float:
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        assert self.total_epochs is not None
        steps = self.total_epochs * len(sampler)
        rate, mechanism = sampler.sample_rate, self.accountant.mechanism
        return noise_multiplier_for(self.target_epsilon, self.delta, rate, steps, mechanism)

    def _sum_of(self, module: FKDDistiller, batch: TrainBatch) -> str:
        """Hash of all that a step's clipped sum follows from, so that no noise is added to two sums that differ.

        A run that went back to an earlier state and is given another global teacher, other data or another bound would take a
        step of the same number, and the difference of the two results would have no noise.
        """
        digest = hashlib.blake2b(repr((self.clip_norm, self._sigma, self._expected)).encode(), digest_size=16)
        tensors = {**module.teacher.state_dict(), "history": batch["history"], "targets": batch["targets"]}
        for name, value in sorted(tensors.items()):
            digest.update(f"{name}{tuple(value.shape)}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _root_seed(self) -> int:
        if self.secret_dir is None:
            return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        # Two runs on data that differ by one user must not share noise: their difference would have none. A run that goes on
        # from its checkpoint must, or a step taken twice would have been two releases.
        self._nonce = self._nonce or secrets.token_hex(16)
        return int.from_bytes(client_secret(self.secret_dir, self._client) + bytes.fromhex(self._nonce), "big")


def privacy_of(trainer: Trainer) -> dict[str, object] | None:
    """What :class:`DifferentialPrivacy` says of a trainer's last fit; ``None`` where it was not private."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DifferentialPrivacy) and callback._active and callback.accountant.steps:
            return callback.describe()
    return None


def _distiller(module: LightningModule) -> FKDDistiller:
    if not isinstance(module, FKDDistiller):
        raise ConfigError(f"DifferentialPrivacy trains the teacher of FKDDistiller, not {type(module).__name__}")
    return module
