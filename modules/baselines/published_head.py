"""What the published LLM recommenders share here: an LLM head with settings of its own, derived from a configured one."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_sfubm.contracts import Catalogue, Stage1
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm_head import LLMHead

#: settings that all LLM rows of a table share, so that backbone, prompt lengths and optimiser are the same
SHARED = (
    "llm",
    "template",
    "history_length",
    "title_tokens",
    "adapter_learning_rate",
    "projector_learning_rate",
    "weight_decay",
    "warmup",
    "precision",
    "activation_checkpointing",
    "seed",
)


DEFAULT_TEMPLATE = "shopping"


class PublishedHead(LLMHead):
    """An :class:`LLMHead` whose constructor offers only what the published method leaves open.

    Args:
        template: as for :class:`LLMHead`; ``None`` = ``shopping``, and in the table of an experiment that of its LLM.
        settings: the others.
    """

    #: whether the method reads a trained recommender; one that does refuses to run without, and the reverse
    reads_stage1: ClassVar[bool]

    def __init__(self, template: str | None = None, **settings: Any) -> None:
        settings["template"] = template or DEFAULT_TEMPLATE
        super().__init__(**settings)
        self.own_template = template  #: as it was set, or ``None``
        defaults = {
            name: p.default for name, p in inspect.signature(LLMHead.__init__).parameters.items() if name != "self"
        }
        # Under the command line the hyper-parameters are those of the sub-class's constructor alone.
        self._settings = SimpleNamespace(**{**defaults, **settings})

    @property
    def settings(self) -> Any:
        """All settings of an :class:`LLMHead`, those that the method fixes among them."""
        return self._settings

    @classmethod
    def from_head(cls, head_hparams: Mapping[str, Any], **changes: Any) -> Self:
        """The method on the backbone, prompt lengths and optimiser settings of another head.

        Args:
            head_hparams: ``hparams`` of a configured :class:`LLMHead`; only the names in :data:`SHARED` are taken, the
                rest is as the method has it.
            changes: settings to be set otherwise.
        """
        offered = inspect.signature(cls.__init__).parameters
        shared = {name: head_hparams[name] for name in SHARED if name in offered and name in head_hparams}
        return cls(**{**shared, **changes})

    def attach_stage1(self, stage1: Stage1 | None, catalogue: Catalogue) -> None:
        """As :meth:`LLMHead.attach_stage1`.

        Raises:
            ConfigError: a method that reads a recommender gets none, or one that reads text alone gets one.
        """
        name = type(self).__name__
        if self.reads_stage1 and stage1 is None:
            raise ConfigError(f"{name} reads a trained recommender; call attach_stage1(recommender, catalogue)")
        if not self.reads_stage1 and stage1 is not None:
            raise ConfigError(f"{name} reads titles only; call attach_stage1(None, catalogue)")
        super().attach_stage1(stage1, catalogue)
