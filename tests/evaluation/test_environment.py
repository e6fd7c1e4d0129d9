import json
import re

import torch

from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.precision import has_fast_bf16


def test_the_environment_says_what_figures_depend_on() -> None:
    facts = json.loads(json.dumps(environment()))
    hardware = facts["hardware"]
    assert hardware["threads"] == torch.get_num_threads()
    assert hardware["bf16"] is has_fast_bf16(torch.device("cpu"))
    assert hardware["vectors"]
    assert {"python", "torch", "lightning", "transformers"} <= set(facts["versions"])
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", facts["commit"])
