"""An experiment: stage 1, baselines and controls, the LLM stage, evaluation on test data, report. One code path for all.

Every method is a row: it is trained (or not), asked to rank the stored test candidates, and its per-user results are
written to ``results/<domain>/<method>.parquet``. A row that is already there, computed with the same configuration and
data, is not computed again when a run is resumed.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console

from lightning_sfubm.audit.report import build_privacy_report
from lightning_sfubm.callbacks.dashboard import log_privacy, log_results_table
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.datamodules.splits import check_subsets
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.evaluation.facts import result_rows
from lightning_sfubm.evaluation.report import build_report
from lightning_sfubm.evaluation.run_folder import RunFolder
from lightning_sfubm.evaluation.terminal import print_results
from lightning_sfubm.experiment_checks import (
    check_heads,
    check_models,
    check_names,
    check_needs,
    check_sizes,
    check_templates,
)
from lightning_sfubm.federated.loop import FederatedLoop, refuse_folder_of_silo
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.kept_rows import finished_row, place_rows, save_row, set_all_aside, set_aside
from lightning_sfubm.methods import METHODS, DomainRun
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.privacy.report import privacy_figures
from lightning_sfubm.ranks import first_prepares, is_first, wait_for_all
from lightning_sfubm.training import Stopwatch

#: paired differences stated in the report, where both rows are there
COMPARISONS = (
    ("stage1", "encoder"),
    ("stage1", "stage1_local"),
    ("stage1", "id_text"),
    ("sfubm", "encoder"),
    ("sfubm", "zero_shot"),
    ("sfubm", "text_lora"),
    ("sfubm", "stage1"),
    ("sfubm", "late_fusion"),
    ("sfubm", "late_fusion_products"),
    ("stage1_with_teacher", "stage1"),
    ("late_fusion", "stage1"),
    ("late_fusion_counts", "late_fusion"),
    ("late_fusion_products", "late_fusion"),
    ("late_fusion_products", "unisrec_fusion_products"),
    ("late_fusion_products", "late_fusion_products_local"),
    ("late_fusion_products_beside_own", "late_fusion_products_local"),
    ("late_fusion_products_beside_own", "late_fusion_products_local_twice"),
    ("stage1_beside_own", "stage1_local_twice"),
)

_GONE_ON = (
    "This run was gone on with: start, machine, commit and the seconds of each stage are those of its last process alone. "
    "Rounds, phases and rows that earlier ones had finished are not in them; a row's own cost stands in its table."
)


class Experiment:
    """What ``fit`` does around a federated stage 1.

    Args:
        title: heading of the report.
        methods: rows of the table, in order; see :data:`lightning_sfubm.methods.METHODS`.
        llm: head of SF-UBM, not of a published method; the other LLM rows are derived from it, so that all share backbone,
            prompt and budget.
        baselines: modules by row (``encoder``, ``id_text``, ``tallrec`` ...), for baselines with settings of their own; a
            sequential row not named here takes encoder and learning rate of ``model``, an LLM row the settings of ``llm``.
        templates: prompt template by domain, for all LLM rows; others use that set for the row under ``baselines``, else
            that of ``llm``.
        patience: epochs without improvement that end a row's training, by row (or ``unisrec_pretraining``, ``pooled_teacher``,
            ``recommender`` of LLaRA and A-LLMRec, ``a_llmrec_alignment``); others use that of ``trainer.federation``.
        llm_epochs: passes over the held-out stage-2 samples.
        llm_batch_size: samples a step.
        llm_eval_batch_size: users a ranking batch.
        train_candidates: candidates of a training sample where each is a branch of its own; prompts that list them, such as
            those of TALLRec, LLaRA and A-LLMRec, list all of them.
        align_epochs: title alignment of the projectors before tuning; 0 = none.
        calibration_users: validation users by whom the tuned head's addition to stage 1 is weighed; 0 = as tuned.
        max_train_users: users whose held-out positions tune the LLM; ``None`` = all.
        text_samples: samples of text alone on which the LLM of ``text_lora`` and of the rows of SF-UBM is tuned before it is
            tuned on held-out positions; they are positions that trained stage 1. 0 = none.
        max_test_users: users on whom *all* rows of the table are compared; ``None`` = all. Methods without an LLM are
            evaluated on all users besides, in a table of their own.
        sigmas: noise levels of the privacy figures; the one in use is added.

    Raises:
        ConfigError: an unknown method, an LLM row without ``llm`` or with the head of a published method there, a number or
            size out of range, or a baseline or patience that no row would read.
    """

    def __init__(
        self,
        title: str = "SF-UBM",
        methods: list[str] | None = None,
        llm: LLMHead | None = None,
        baselines: dict[str, LightningModule] | None = None,
        templates: dict[str, str] | None = None,
        patience: dict[str, int] | None = None,
        llm_epochs: int = 1,
        llm_batch_size: int = 8,
        llm_eval_batch_size: int = 16,
        train_candidates: int = 8,
        align_epochs: int = 0,
        calibration_users: int = 200,
        max_train_users: int | None = None,
        max_test_users: int | None = None,
        text_samples: int = 0,
        sigmas: list[float] | None = None,
    ) -> None:
        check_subsets(
            max_train_users=max_train_users, max_test_users=max_test_users, calibration_users=calibration_users or None
        )
        self.methods = list(METHODS) if methods is None else methods
        self.baselines = baselines or {}
        self.patience = patience or {}
        check_names(self.methods, llm, self.baselines, self.patience)
        self.title, self.llm, self.templates = title, llm, templates or {}
        self.llm_epochs, self.llm_batch_size, self.llm_eval_batch_size = llm_epochs, llm_batch_size, llm_eval_batch_size
        self.train_candidates, self.align_epochs = train_candidates, align_epochs
        self.calibration_users = calibration_users
        self.max_train_users, self.max_test_users = max_train_users, max_test_users
        check_sizes(
            {
                "llm_epochs": (llm_epochs, 1),
                "llm_batch_size": (llm_batch_size, 1),
                "llm_eval_batch_size": (llm_eval_batch_size, 1),
                "train_candidates": (train_candidates, 2),
                "align_epochs": (align_epochs, 0),
                "text_samples": (text_samples, 0),
                **{f"patience['{name}']": (epochs, 1) for name, epochs in self.patience.items()},
                **{f"sigmas[{place}]": (sigma, 0.0) for place, sigma in enumerate(sigmas or [])},
            }
        )
        check_heads(self.methods, llm, self.baselines, text_samples)
        self.text_samples = text_samples
        self.sigmas = [0.01, 0.05, 0.1, 0.2] if sigmas is None else sigmas

    def run(
        self,
        trainer: FederatedTrainer,
        model: LightningModule,
        datamodule: LightningDataModule,
        *,
        ckpt_path: str | Path | None = None,
        command: str = "",
        config_hash: str = "",
    ) -> Path:
        """Run all of it below ``trainer.run_dir``.

        Args:
            trainer: with a federation.
            model: template of the stage-1 module.
            datamodule: a FederatedDataModule.
            ckpt_path: ``"last"`` to go on with an interrupted run: finished rounds, phases and rows are kept.
            command: stated in the report.
            config_hash: rows computed under another hash are not reused.

        Returns:
            Path of the HTML report.
        """
        return trainer.together(self._run, trainer, model, datamodule, ckpt_path, command, config_hash)

    def _run(
        self,
        trainer: FederatedTrainer,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path | None,
        command: str,
        config_hash: str,
    ) -> Path:
        console = Console(highlight=False, quiet=not is_first())
        watch, run_dir = Stopwatch(), trainer.run_dir
        if ckpt_path is None:
            refuse_folder_of_silo(run_dir)
        started = environment()
        if not (domains := getattr(datamodule, "domains", None)):
            raise ConfigError(
                "an experiment compares methods in the domains of a FederatedDataModule, and data has none: a configuration of "
                "configs/domain is for one model alone; give a pair's, or leave out the experiment"
            )
        check_templates(self.methods, self.llm, self.templates, domains)
        check_models(self.methods, self.llm, self.baselines)
        run_dir.mkdir(parents=True, exist_ok=True)
        with watch("data and text vectors"):
            first_prepares(datamodule)
            datamodule.setup("fit")
        check_needs(self.methods, model, domains)
        trains = any(METHODS[key].needs_stage1 for key in self.methods)
        trainer.prepare(model, datamodule)
        if trains:
            trainer.check_start(ckpt_path)
        wait_for_all()  # none is refused
        if ckpt_path is None and is_first():  # not before the run is sure to start: the results may be another's
            set_all_aside(run_dir / "results")
            twins = [p.parent for of in ("local", "local-[0-9]") for p in run_dir.glob(f"{of}/ledger.jsonl")]
            for folder in (*twins, *(run_dir / "models" / name for name in domains)):
                shutil.rmtree(folder, ignore_errors=True)
        cards: dict[str, Any] = datamodule.data_cards  # type: ignore[attr-defined]  # one that has domains has them
        for card in cards.values():
            console.print(card)
        if trains:
            console.print(f"\n[bold]Stage 1[/bold]: {len(domains)} domains, federated rounds, then FKD locally")
            trainer.run_rounds()
        else:
            if ckpt_path is None and is_first():  # no message is sent: what lies here is of another run
                trainer.loop.set_record_aside()  # type: ignore[union-attr]
                (run_dir / "history.jsonl").unlink(missing_ok=True)
                shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
            trainer.write_config()
        assert trainer.loop is not None
        for name, card in cards.items():  # now that those of the run before are set aside
            _write_json(run_dir / "data" / f"{name}.json", card.to_dict())
        with watch("privacy figures"):
            figures = self._privacy(trainer.loop)
        _write_json(run_dir / "privacy.json", figures)
        log_privacy(trainer.shared_loggers, figures)
        shared: dict[str, Any] = {}
        runs = {
            name: DomainRun(self, trainer, model, name, client, watch, run_dir, shared)
            for name, client in trainer.loop.clients.items()
        }
        if is_first():
            set_aside(run_dir / "results", runs, config_hash)
        wait_for_all()
        for domain in runs.values():
            domain.kept = {key for key in METHODS if finished_row(domain.row_path(key), domain, config_hash)}
            domain.to_come = set(self.methods) - domain.kept
        wait_for_all()  # all have looked before the first writes
        for domain in runs.values():
            place_rows(domain, [*self.methods, *METHODS])  # rows that this run does not name come last
        for order, key in enumerate(self.methods):
            for name, domain in runs.items():
                self._row(domain, key, order, name, config_hash, console)
        facts = {
            **started,
            "title": self.title,
            "command": command,
            "seed": trainer.seed,
            "finished": environment()["started"],
            "timings": {**trainer.loop.stopwatch.timings, **watch.timings},
            "domains": list(runs),
            "comparisons": [{"a": a, "b": b} for a, b in COMPARISONS if a in self.methods and b in self.methods],
            "reference_method": "encoder",
            "protocol": self._protocol(datamodule),
            "llm": dict(self.llm.hparams) if self.llm is not None and self._asks_llm else {},
            "notes": [] if ckpt_path is None else [_GONE_ON],
        }
        report = run_dir / "report.html"
        if is_first():
            self._report(trainer, run_dir, facts, console)
        wait_for_all()
        return report

    def _report(self, trainer: FederatedTrainer, run_dir: Path, facts: dict[str, Any], console: Console) -> None:
        _write_json(run_dir / "run.json", facts)
        report = build_report(run_dir)
        privacy = build_privacy_report(run_dir) if (run_dir / "ledger.jsonl").is_file() else None
        results = RunFolder.read(run_dir).results
        log_results_table(trainer.shared_loggers, result_rows(r for rows in results.values() for r in rows))
        print_results(run_dir)
        console.print(f"\nReport: [bold]{report}[/bold]")
        if privacy is not None:
            console.print(f"Privacy report: [bold]{privacy}[/bold]")

    def _row(self, domain: "DomainRun", key: str, order: int, name: str, config_hash: str, console: Console) -> None:
        method = METHODS[key]
        if key not in domain.to_come:
            console.print(f"[dim]{name}: {domain.label(method)}, kept[/dim]")
            return
        domain.to_come.remove(key)
        console.print(f"[dim]{name}: {domain.label(method)}[/dim]")
        before = domain.spent_on(key)
        with domain.watch(f"train {key}"):
            ranker = method.build(domain)
        train_cpu_s = domain.train_cpu_s(key, domain.spent_on(key) - before)
        extra = {"config_hash": config_hash, "train_cpu_s": train_cpu_s}
        with domain.watch(f"evaluate {key}"):
            few = domain.evaluate(ranker, key, method, order, extra)
            if not method.needs_llm and domain.has_larger_test:
                everyone = domain.evaluate(ranker, key, method, order, extra, all_users=True)
                save_row(everyone, domain.row_path(key, all_users=True))
            save_row(few, domain.row_path(key))  # last: where it is, the row is whole

    def _privacy(self, loop: FederatedLoop) -> dict[str, Any]:
        noise = next((c for c in loop.callbacks if isinstance(c, PrivacyNoise)), None)
        if noise is None:
            return {}
        hidden = isinstance(loop.federation.aggregator, SecureKMeans)  # then no vector is sent
        return privacy_figures(
            {name: client.module.semantics() for name, client in loop.clients.items()},
            lambda name, sigma: noise.mechanism(loop.seed, name, sigma, loop.clients[name].text_names()),
            loop.federation.aggregator.aggregate if loop.federation.sends_semantics else lambda uploads: {},
            sigmas=self.sigmas,
            used=noise.sigma if loop.counters.exchanged is not None and not hidden else None,
            seed=loop.seed,
        )

    @property
    def _asks_llm(self) -> bool:
        return any(METHODS[key].needs_llm for key in self.methods)

    def _protocol(self, datamodule: Any) -> dict[str, Any]:
        domains = datamodule.domains
        negatives = _alike({name: domain.num_candidates - 1 for name, domain in domains.items()})
        return {
            "split": "leave one out by time: last = test, one before = validation, rest = training",
            "candidates": f"the target and {negatives} uniform negatives outside the user's history",
            "chance": _alike({name: 1 / domain.num_candidates for name, domain in domains.items()}),
            "k_core": _alike({name: domain.settings.k_core for name, domain in domains.items()}),
            "compared on": _alike({name: self._compared_on(domain) for name, domain in domains.items()}),
            "stage 2 samples": "the last training positions of the users, held out from stage 1",
            "ties": "conservative: a tie counts against the method",
        }

    def _compared_on(self, domain: Any) -> str:
        users = len(domain.splits.test)
        return (
            "all test users" if (self.max_test_users or users) >= users else f"{self.max_test_users} fixed test users"
        )


def _alike(values: Mapping[str, Any]) -> Any:
    """The one value that all domains share, else each domain's, as text."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def _write_json(path: Path, value: Any) -> None:
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str))
    temporary.replace(path)
