"""The methods an experiment can compare: how each row of the table comes to its ranker."""

from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.methods.cross_domain import CROSS_DOMAIN
from lightning_sfubm.methods.llm import LLM
from lightning_sfubm.methods.published_llm import PUBLISHED_LLM
from lightning_sfubm.methods.single_domain import SINGLE_DOMAIN
from lightning_sfubm.methods.stage1 import STAGE1

#: key of a row -> how it is made; the order is that of a table with all rows
METHODS: dict[str, Method] = {**SINGLE_DOMAIN, **CROSS_DOMAIN, **STAGE1, **PUBLISHED_LLM, **LLM}

__all__ = ["METHODS", "DomainRun", "Method"]
