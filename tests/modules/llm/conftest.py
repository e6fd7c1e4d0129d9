"""A tiny LLM, a tiny domain and a stand-in for stage 1."""

import pytest

from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from tests.modules.llm.stand_ins import FixedStage1, batch_of, tiny_catalogue


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    return str(write_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="session")
def catalogue():
    return tiny_catalogue()


@pytest.fixture(scope="session")
def stage1():
    return FixedStage1()


@pytest.fixture(scope="session")
def make_batch():
    return batch_of
