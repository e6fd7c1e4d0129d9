"""The command line: Lightning's own, with federated runs and experiments."""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
from argparse import HelpFormatter
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, _InstantiatorFn
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils import logging as transformers_logging

from lightning_sfubm import callbacks, datamodules, modules
from lightning_sfubm.callbacks.data_card import DataCardPrinter
from lightning_sfubm.callbacks.prediction_writer import PredictionWriter
from lightning_sfubm.checkpoints import SettingsKeeper
from lightning_sfubm.config_files import check_config_files
from lightning_sfubm.errors import CheckpointError, ConfigError, SFUBMError
from lightning_sfubm.experiment import Experiment
from lightning_sfubm.federated.settings import lasting_settings
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.grid.named_files import named_files, named_models
from lightning_sfubm.locks import check_writable
from lightning_sfubm.modules.stage1 import CatalogueModule
from lightning_sfubm.next_steps import StepsTaken, next_steps, nothing_trained
from lightning_sfubm.quiet import quiet_command_line
from lightning_sfubm.seeds import drawn_again

#: above the options in the help of each command
_ABOUT = {
    command: {
        "description": f"{what} The folder configs/ holds settings to start from, in each file the command that runs it; for "
        f"instance: lightning-sfubm {command} {example}"
    }
    for command, what, example in (
        ("fit", "Train.", "--config configs/debug/synthetic.yaml"),
        ("validate", "Evaluate on validation data.", "--config configs/debug/synthetic.yaml --ckpt_path last"),
        ("test", "Evaluate on test data.", "--config configs/debug/synthetic.yaml --ckpt_path last"),
        ("predict", "Recommend to every user.", "--config configs/debug/synthetic.yaml --ckpt_path last"),
    )
}


_NEW_DOMAIN = "; a domain that the settings before do not have is a new one and given whole: is its name misspelt?"
#: how the parser says that a value is not of one type, and what a person calls the type
_WRONG_TYPE = re.compile(
    r"Expected a (<class '(?:bool|int|float|str|list|dict|NoneType|collections\.abc\.Iterable)'>|typing\.Literal\[.+\]|"
    r"dot import path string)(?:: .*)?"
)
_TYPES = {
    "<class 'bool'>": "true/false",
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'list'>": "a list",
    "<class 'collections.abc.Iterable'>": "a list",
    "<class 'dict'>": "a mapping",
    "<class 'NoneType'>": "null",
    "dot import path string": "a class path",
}


class _Parser(LightningArgumentParser):
    """Parser whose errors are one sentence, raised for the entry point to print."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise the first reason that is given for a rejected value, or the message on one line."""
        raise ConfigError(_sentence(message)) from ex

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """As Lightning's; lists every model, data module and callback here, also those that nothing has imported yet."""
        for package in (modules, datamodules, callbacks):
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(found.name)
        return super().format_help(formatter)


def _sentence(message: str) -> str:
    """The first reason in a message of the parser, or all types that it names, with its key, on one line."""
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    # An option inside another one lists its own failures in place of a reason: the first that is a reason counts.
    listed = re.search(r"Errors:\s+- (?!Does not validate)(.+?)(?=\n\s*Given value|\Z)", message, re.DOTALL)
    reasons = [" ".join(reason.split()) for reason in re.split(r"\n\s*- ", listed[1])] if listed else []
    words = reasons[0] if reasons else " ".join(message.split())
    kinds = [match[1] for reason in reasons if (match := _WRONG_TYPE.fullmatch(reason))]
    if reasons and len(kinds) == len(reasons):  # a value of none of the types that the option has
        accepted = [_TYPES.get(kind, f"one of {kind[len('typing.Literal') :]}") for kind in kinds]
        given = re.search(r"Given value: (.{1,60})\Z", message)
        words = f"Expected {' or '.join(filter(None, (', '.join(accepted[:-1]), accepted[-1])))}"
        words += f", not {given[1]}" if given else ""
        if given and given[1] == "None" and "null" in accepted:  # jsonargparse makes it a text on the way in
            words = "null cannot be set by an option of a part within a part: set it in a YAML file, given by --config"
    if missing := re.search(r"Problem with given class_path '[^']+': No module named '[^']+'", words):
        where = "a module of your own is found in the folders that PYTHONPATH names"
        return f"{f'{key[1]}: ' if key else ''}{missing[0]}; {where}"
    if words.startswith('Parser key "domains": the following arguments are required'):
        # The data around the domain are refused too, with this reason and its hint as theirs.
        words = words.removesuffix(_NEW_DOMAIN) + _NEW_DOMAIN
    return f"{key[1]}: {words}" if key and reasons else words


class _TopLevelOnly(_InstantiatorFn):
    """Store the configuration as hyper-parameters of the configured model or data module alone.

    Lightning's own does so for every module it makes, also for one nested in another option, which would then be given
    the hyper-parameters of the top-level one.
    """

    def __call__(self, class_type: type[Any], *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
        self.cli._dump_config()
        configured = self.cli.config_dump.get(self.key) or {}
        if configured.get("class_path") != f"{class_type.__module__}.{class_type.__qualname__}":
            return class_type(*args, **kwargs)
        return super().__call__(class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)


class _ConfigWriter(SaveConfigCallback):
    """Keep the configuration of a fit as ``config.yaml``, that of another command beside it: the weights are not of that.

    Lightning's own does so before the checkpoint is read. Here it is once the first step is sure to be taken: what is
    refused until then leaves the file of the run before.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a fit."""
        self._write(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of ``validate``; the validations of a fit pass."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of ``test``."""
        self._write(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of ``predict``."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        command = TrainerFn(trainer.state.fn)
        if command != TrainerFn.FITTING:
            self.config_filename = f"config_{command.value}.yaml"
        super().setup(trainer, pl_module, command.value)


class SFUBMCLI(LightningCLI):
    """``LightningCLI`` with ``trainer.federation`` and ``experiment``; explicit flags win over a checkpoint's settings.

    Args:
        args: those of the command line by default; with a sub-command first where ``run`` is true.
        run: run the sub-command; otherwise only build ``trainer``, ``model`` and ``datamodule``.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self._argv = list(sys.argv[1:] if args is None else args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=FederatedTrainer,
            # The data modules deal rows out to the processes themselves.
            trainer_defaults={"callbacks": [PredictionWriter()], "use_distributed_sampler": False},
            parser_class=_Parser,
            seed_everything_default=1,
            save_config_callback=_ConfigWriter,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-sfubm", **_ABOUT},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--experiment``: what ``fit`` does after stage 1."""
        parser.add_argument(
            "--experiment",
            type=Experiment | None,
            default=None,
            help="After a federated fit: baselines, LLM stage, evaluation on test data, report.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning does; a config file that cannot be read is named, in one sentence."""
        if args is None or isinstance(args, (list, tuple)):
            check_config_files(sys.argv[1:] if args is None else args)
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ConfigError(f"a file that an option names is not UTF-8 text ({error}): configs are YAML") from None

    def _add_instantiators(self) -> None:
        for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
            self.parser.add_instantiator(_TopLevelOnly(cli=self, key=key), kind, subclasses=True)

    def instantiate_classes(self) -> None:
        """As Lightning does; what a constructor refuses reads as one sentence."""
        try:
            super().instantiate_classes()
        except SFUBMError:
            raise
        except MisconfigurationException as error:  # a trainer this machine cannot have, such as one on GPUs
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        except ValueError as error:
            # The parser tries a class in turn with the other types an option admits and lists every failure.
            if "Errors:" not in str(error):
                raise
            raise ConfigError(_sentence(str(error))) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning lets what a checkpoint holds override what was typed. Here that wins."""

    def before_fit(self) -> None:
        """Hand a federated run its resolved configuration, and how to run it again, to be kept in its folder."""
        self._refuse_unwritable()
        if self.config_init["fit"].get("experiment") is None:
            self.trainer.callbacks.append(DataCardPrinter())  # type: ignore[attr-defined]
        if isinstance(self.trainer, FederatedTrainer):
            self.trainer.config_text = f"# lightning-sfubm {' '.join(self._argv)}\n{self._resolved}"
            self.trainer.settings = self.lasting_settings
            if not self._federated:
                self.trainer.callbacks.append(SettingsKeeper(self.trainer.settings))  # type: ignore[attr-defined]

    def before_validate(self) -> None:
        """Refuse a stage-1 model that nothing has trained, and a run folder that cannot be."""
        self._refuse_untrained()
        self._refuse_unwritable()

    def before_test(self) -> None:
        """Refuse a stage-1 model that nothing has trained, and a run folder that cannot be."""
        self._refuse_untrained()
        self._refuse_unwritable()

    def before_predict(self) -> None:
        """Refuse a stage-1 model that nothing has trained, an LLM, and a run folder that cannot be."""
        from lightning_sfubm.modules.llm.ranking import RankingLM

        if isinstance(self.model, RankingLM):
            raise ConfigError(
                f"predict writes the best of a whole catalogue, and {type(self.model).__name__} ranks the candidates it is "
                "given: predict with a stage-1 model, or evaluate this one with test"
            )
        self._refuse_untrained()
        self._refuse_unwritable()

    def _refuse_untrained(self) -> None:
        # An LLM head may be evaluated as it is: a row of its own, zero-shot. A federation is refused by its trainer.
        given = self.config_init[self.config_init["subcommand"]].get("ckpt_path")
        if given is None and not self._federated and isinstance(self.model, CatalogueModule):
            raise CheckpointError(
                "without --ckpt_path the weights are random: give 'last' or 'best' of an earlier fit with the same "
                "trainer.default_root_dir, or the path of a checkpoint"
            )

    def _refuse_unwritable(self) -> None:
        # Every command writes its configuration there, after the data are prepared. A federation looks after its own.
        root = self.trainer.default_root_dir
        if self.trainer.is_global_zero and not self._federated and "://" not in root:
            check_writable(Path(root), "--trainer.default_root_dir")

    @property
    def _federated(self) -> bool:
        return getattr(self.trainer, "federation", None) is not None

    @property
    def lasting_settings(self) -> dict[str, Any]:
        """Settings that a run that goes on must share with the one before."""
        return lasting_settings(yaml.safe_load(self._resolved))

    @cached_property
    def _resolved(self) -> str:
        """The configuration of the sub-command as YAML; made once, for it takes as long as parsing."""
        name = self.config.get("subcommand")
        config = self.config[name] if name else self.config
        return self._parser(name).dump(config, skip_none=False, skip_link_targets=False)

    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):
            self.config_dump = yaml.safe_load(self._resolved)

    def fit(self, **kwargs: Any) -> None:
        """Train, and say where the checkpoints of one model are; or the experiment, where one is configured."""
        experiment = self.config_init["fit"].get("experiment")
        if experiment is None:
            steps = StepsTaken()
            if not self._federated:
                self.trainer.callbacks.append(steps)  # type: ignore[attr-defined]
            self.trainer.fit(**kwargs)
            if self.trainer.is_global_zero and not self._federated:
                if not steps.any:
                    print(nothing_trained(self.trainer))
                for line in next_steps(self.trainer, self.model, self._argv):
                    print(line)
            return
        if not isinstance(self.trainer, FederatedTrainer) or self.trainer.federation is None:
            raise ConfigError("an experiment follows federated rounds: set trainer.federation, or experiment to null")
        for name, module in experiment.baselines.items():
            if any(True for _ in module.parameters()):  # an LLM has none before its model is loaded
                experiment.baselines[name] = drawn_again(module, self.trainer.seed, "first weights", name)
        experiment.run(
            self.trainer,
            self.model,
            self.datamodule,
            ckpt_path=kwargs.get("ckpt_path"),
            command="lightning-sfubm " + " ".join(self._argv),
            config_hash=self._config_hash(),
        )

    def _config_hash(self) -> str:
        """Hash of what rows depend on: stage 1 with its rounds, and the experiment's settings but for which rows are wanted."""
        config = yaml.safe_load(self._resolved)
        experiment = {
            k: v for k, v in config["experiment"]["init_args"].items() if k not in ("title", "methods", "sigmas")
        }
        rounds = config["trainer"]["federation"]["init_args"]["rounds"]
        named = [yaml.safe_dump(experiment)]
        settings = [
            lasting_settings(config),
            rounds,
            experiment,
            *named_files((), named),
            *sorted(named_models((), named).items()),
        ]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def run(argv: list[str]) -> None:
    """Parse and run; returns nothing, so that a console script's exit code stays 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()  # a bar for each load of a model that takes a second
    quiet_command_line(fitting=argv[0] == "fit")
    SFUBMCLI(args=None if argv == sys.argv[1:] else argv)
