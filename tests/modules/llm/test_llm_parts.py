"""Splice, tree, likelihoods, generation: against the plain way, on every kind of position handling."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoTokenizer

from lightning_sfubm.datamodules.prompt_batch import PromptBatch
from lightning_sfubm.datamodules.prompt_templates import load_template
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.affinity import standardise
from lightning_sfubm.modules.llm.backbone import Backbone
from lightning_sfubm.modules.llm.list_ranking import TitleTrie, branch_log_likelihood, greedy, supports_cache
from lightning_sfubm.modules.llm.projection import TokenProjector
from lightning_sfubm.modules.llm.splice import splice
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm.tree import separate_states, supports_tree, tree_mask, tree_states
from lightning_sfubm.modules.llm_head import LLMHead

ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma3", "gpt2", "opt"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = write_tiny_llm(tmp_path_factory.mktemp(architecture), architecture)
            made[architecture] = Backbone(str(folder), precision="32").eval()
        return made[architecture]

    return get


def prompts_for(backbone, catalogue, batch, form="branch", **options):
    template = load_template("movies", form)
    builder = PromptBuilder(backbone.tokenizer, template, catalogue.titles, 4, 8, False, False, False)
    return builder.build(batch["history"], batch["candidates"], **options), builder


# ---------------------------------------------------------------------------------------------------- splice


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_splice_equals_the_loop(rows, length, width, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, length, width, generator=generator)
    places = torch.rand(rows, length, generator=generator) < 0.4
    vectors = torch.randn(int(places.sum()), width, generator=generator, requires_grad=True)
    expected, taken = embeddings.clone(), 0
    for row in range(rows):
        for column in range(length):
            if places[row, column]:
                expected[row, column] = vectors.detach()[taken]
                taken += 1
    result = splice(embeddings, places, vectors)
    assert torch.equal(result, expected)
    if taken:
        result.sum().backward()
        assert torch.equal(vectors.grad, torch.ones_like(vectors))


@pytest.mark.parametrize("count", [1, 3])
def test_splice_checks_the_count(count):
    places = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="2 soft-token places"):
        splice(torch.zeros(1, 3, 4), places, torch.zeros(count, 4))


# ---------------------------------------------------------------------------------------------------- tree


def test_tree_mask_spelled_out():
    mask = tree_mask(torch.tensor([[-1, 0, 0, 1, 1, 2]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tree_equals_separate_rows(backbones, catalogue, make_batch, architecture):
    backbone = backbones(architecture)
    assert supports_tree(backbone)
    prompts, _ = prompts_for(backbone, catalogue, make_batch())
    with torch.no_grad():
        embeddings = backbone.embed(prompts.tokens)
        shared = tree_states(backbone, embeddings, prompts)
        plain = separate_states(backbone, embeddings, prompts)
    real = prompts.branch >= 0
    torch.testing.assert_close(shared[real], plain[real], atol=1e-4, rtol=0)
    assert torch.isfinite(shared).all()
    assert plain[real].std(0).mean() > 0.1  # the states differ from each other, so equality says something


def test_gradients_through_the_shared_prefix_equal_separate_rows(backbones, catalogue, make_batch):
    backbone = backbones("llama")
    prompts, _ = prompts_for(backbone, catalogue, make_batch())
    gradients = []
    for states_of in (tree_states, separate_states):
        embeddings = backbone.embed(prompts.tokens).requires_grad_()
        states = states_of(backbone, embeddings, prompts)
        ends = states.gather(1, prompts.branch_end.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        (ends * torch.linspace(-1, 1, ends.numel()).view_as(ends)).sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)
    assert gradients[0][prompts.branch == 0].abs().max() > 1e-3


def test_architecture_without_positions_falls_back(tmp_path):
    backbone = Backbone(str(write_tiny_llm(tmp_path / "bloom", "bloom")), precision="32")
    assert not supports_tree(backbone)


def test_a_window_that_counts_columns_falls_back(tmp_path):
    """GPT-Neo's window of 256 columns hides the prefix from a late branch; its probe of a few tokens would not show it."""
    backbone = Backbone(str(write_tiny_llm(tmp_path / "neo", "gpt_neo")), precision="32").eval()
    assert not supports_tree(backbone)
    lengths = [2, 300, 2]  # prefix, a branch, another one whose columns lie beyond the window
    branch = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(2), torch.arange(2, 302), torch.arange(2, 4)]).unsqueeze(0)
    tokens = torch.arange(304).remainder(200).add(4).unsqueeze(0)
    none = torch.zeros_like(tokens)
    prompts = PromptBatch(tokens, branch, positions, none, none - 1, torch.tensor([1]), torch.tensor([[301, 303]]))
    with torch.no_grad():
        states = [f(backbone, backbone.embed(tokens), prompts)[0, -1] for f in (tree_states, separate_states)]
    assert (states[0] - states[1]).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2", "bloom", "mamba"])
def test_generation_is_left_to_architectures_that_go_on_from_what_they_have_read(tmp_path, architecture):
    folder = write_tiny_llm(tmp_path / architecture, architecture)
    assert supports_cache(Backbone(str(folder), precision="32")) == (architecture != "mamba")


# ---------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("form", ["branch", "list"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
def test_likelihood_equals_full_forward(backbones, catalogue, make_batch, architecture, form):
    """T28: shared prefix, few logits, against the transformers model on every prefix + title by itself."""
    backbone = backbones(architecture)
    batch = make_batch()
    prompts, _ = prompts_for(backbone, catalogue, batch, form)
    with torch.no_grad():
        states = tree_states(backbone, backbone.embed(prompts.tokens), prompts)
        sums, counts = branch_log_likelihood(backbone, states, prompts, chunk=7)
        for row in range(len(batch["history"])):
            prefix = prompts.tokens[row][prompts.branch[row] == 0]
            for number in range(batch["candidates"].shape[1]):
                title = prompts.tokens[row][prompts.branch[row] == number + 1]
                logits = backbone.causal_lm(torch.cat([prefix, title]).unsqueeze(0)).logits[0].float()
                steps = logits.log_softmax(-1)[len(prefix) - 1 : -1]
                expected = steps.gather(1, title.unsqueeze(1)).sum()
                torch.testing.assert_close(sums[row, number], expected, atol=1e-4, rtol=1e-5)
                assert counts[row, number] == len(title)


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3"])
def test_batched_generation_equals_single_and_full_forward(backbones, catalogue, make_batch, architecture):
    """T14: left padding changes nothing; the cache changes nothing."""
    backbone = backbones(architecture)
    batch = make_batch(rows=3)
    empty = torch.zeros(3, 0, dtype=torch.long)
    prompts, builder = prompts_for(backbone, catalogue, batch, "list", branches=empty)
    eos = backbone.tokenizer.eos_token_id
    together = greedy(backbone, backbone.embed(prompts.tokens), prompts, 6, eos)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        single = builder.build(one["history"], one["candidates"], branches=empty[:1])
        assert greedy(backbone, backbone.embed(single.tokens), single, 6, eos) == [together[row]]
        tokens = single.tokens
        expected = []
        with torch.no_grad():
            for _ in range(6):
                token = backbone.causal_lm(tokens).logits[0, -1].argmax()
                if token == eos:
                    break
                expected.append(int(token))
                tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
        assert together[row] == expected
    assert any(together)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3"])
def test_a_batch_in_parts_equals_the_whole(backbones, catalogue, make_batch, monkeypatch, architecture):
    """Rows are computed a few at a time where no gradient is wanted: states, cache and what follows from it stay the same."""
    backbone = backbones(architecture)
    batch = make_batch(rows=5)
    branching, _ = prompts_for(backbone, catalogue, batch, "branch")
    listing, _ = prompts_for(backbone, catalogue, batch, "list", branches=torch.zeros(5, 0, dtype=torch.long))
    eos = backbone.tokenizer.eos_token_id

    def everything():
        with torch.no_grad():
            states = tree_states(backbone, backbone.embed(branching.tokens), branching)
        return states, greedy(backbone, backbone.embed(listing.tokens), listing, 6, eos)

    passes = []
    plain = backbone._pass
    monkeypatch.setattr(backbone, "_pass", lambda *args: passes.append(len(args[0])) or plain(*args))
    states, answers = everything()
    assert set(passes) == {5}
    monkeypatch.setattr("lightning_sfubm.modules.llm.backbone.CPU_TOKENS", 2 * listing.tokens.shape[1])
    passes.clear()
    again, answers_again = everything()
    assert min(passes) < 5
    real = branching.branch >= 0
    torch.testing.assert_close(again[real], states[real], atol=1e-5, rtol=1e-4)
    assert answers_again == answers
    passes.clear()
    tree_states(backbone, backbone.embed(branching.tokens), branching)  # with gradients: whole
    assert passes == [5]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_constrained_generation_yields_candidates_only(backbones, catalogue, make_batch, architecture):
    backbone = backbones(architecture)
    batch = make_batch(rows=4)
    prompts, builder = prompts_for(backbone, catalogue, batch, "list", branches=torch.zeros(4, 0, dtype=torch.long))
    answers = builder.answers(batch["candidates"].numpy())
    tries = [TitleTrie(row) for row in answers]
    found = greedy(backbone, backbone.embed(prompts.tokens), prompts, 12, backbone.tokenizer.eos_token_id, tries)
    plain = [TitleTrie(row) for row in answers]
    for trie in plain:
        trie.only_rest = lambda prefix: None  # every token computed
    again = greedy(backbone, backbone.embed(prompts.tokens), prompts, 12, backbone.tokenizer.eos_token_id, plain)
    assert again == found
    for row, answer in enumerate(found):
        assert [*answer, backbone.tokenizer.eos_token_id] == answers[row][tries[row].candidates(answer)[0]]


def test_trie_with_nested_and_equal_answers():
    trie = TitleTrie([[5, 6, 2], [5, 2], [5, 6, 2], [7, 2]])
    assert trie.next_tokens([]) == [5, 7]
    assert set(trie.next_tokens([5])) == {6, 2}
    assert trie.only_rest([]) is None
    assert trie.only_rest([5]) is None
    assert trie.only_rest([5, 6]) == [2]
    assert trie.only_rest([7]) == [2]
    assert trie.candidates([5]) == [1]
    assert trie.candidates([5, 6]) == [0, 2]


# ---------------------------------------------------------------------------------------------------- projection


def test_soft_tokens_have_the_norm_of_tokens():
    projector = TokenProjector(8, 32, scale=3.0, num_affinities=2)
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(projector.users(x).norm(dim=-1), torch.full((5,), 3.0))
    only = TokenProjector(8, 32, scale=3.0, semantic=False)
    torch.testing.assert_close(only.items(x, y).norm(dim=-1), torch.full((5,), 3.0))
    assert torch.equal(only.items(x, y), only.items(x, y + 1))
    assert projector.affinities(torch.zeros(5, 2)).abs().max() == 0
    assert TokenProjector(8, 32, 3.0, item=False, semantic=False).items(x, y).abs().max() == 0


def test_an_items_soft_token_is_the_sum_of_its_parts_over_the_root_of_their_number():
    projector, x, y = TokenProjector(8, 32, scale=3.0), torch.randn(5, 8), torch.randn(5, 8)
    parts = [torch.nn.functional.normalize(v, dim=-1) for v in (projector.item_map(x), projector.semantic_map(y))]
    torch.testing.assert_close(projector.items(x, y), 3.0 * (parts[0] + parts[1]) / 2**0.5)


@pytest.mark.parametrize("value", [0.0, 6.4036865, -17.3, 1e4])
def test_columns_of_equal_values_become_zero(value):
    """Their mean is rounded, and that difference is no spread."""
    column = torch.full((3, 20, 1), value)
    z = standardise(torch.cat([column, torch.randn(3, 20, 1)], -1))
    assert z[..., 0].abs().max() == 0
    torch.testing.assert_close(z[..., 1].square().mean(1), torch.ones(3))


def test_standardise():
    affinities = torch.tensor([[[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]])
    z = standardise(affinities)
    torch.testing.assert_close(z[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]) * (1.5**0.5))
    assert z[..., 1].abs().max() == 0


# ---------------------------------------------------------------------------------------------------- backbone


def test_cut_layers_and_bad_settings(llm, tmp_path):
    assert len(Backbone(llm, num_layers=1).causal_lm.model.layers) == 1
    with pytest.raises(ConfigError, match=r"num_layers must lie in 1\.\.2"):
        Backbone(llm, num_layers=3)
    with pytest.raises(ConfigError, match="precision 'fp8'"):
        Backbone(llm, precision="fp8")
    with pytest.raises(ConfigError, match="adapter_targets 'nothing'"):
        Backbone(llm, adapter_rank=2, adapter_targets="nothing")
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no usable model config"):
        Backbone(str(tmp_path))


def test_cut_model_equals_the_first_layers(llm, catalogue, make_batch):
    full, cut = Backbone(llm, precision="32").eval(), Backbone(llm, num_layers=1, precision="32").eval()
    prompts, _ = prompts_for(full, catalogue, make_batch())
    with torch.no_grad():
        embeddings = full.embed(prompts.tokens)
        own = cut.states(embeddings, tree_mask(prompts.branch), prompts.positions)
        model = full.causal_lm.model
        model.config.num_hidden_layers = 1
        expected = full.states(embeddings, tree_mask(prompts.branch), prompts.positions)
    torch.testing.assert_close(own, expected)


def test_fingerprint_tells_models_apart(llm, tmp_path):
    same = Backbone(llm, precision="32").fingerprint()
    assert Backbone(llm, precision="bf16").fingerprint() == same
    assert Backbone(llm, num_layers=1).fingerprint() != same
    assert Backbone(str(write_tiny_llm(tmp_path / "other", seed=1))).fingerprint() != same


def test_a_strategy_that_divides_a_head_otherwise_is_refused(tmp_path: Path) -> None:
    head = LLMHead(llm=str(write_tiny_llm(tmp_path / "llm")))
    head._trainer = SimpleNamespace(strategy=FSDPStrategy())  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"configs/trainer/sharded\.yaml"):
        head.configure_model()
    assert head.backbone is None


def test_a_model_of_several_parts_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llm(tmp_path / "llm")
    (folder / "config.json").write_text('{"model_type": "gemma3"}')  # of text and images
    for layers in (None, 1):
        with pytest.raises(ConfigError, match=r"\(gemma3\) is a model of several parts"):
            Backbone(str(folder), num_layers=layers)
