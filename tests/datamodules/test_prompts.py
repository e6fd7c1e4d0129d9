import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.datamodules.prompt_batch import CANDIDATE, ITEM, USER
from lightning_sfubm.datamodules.prompt_templates import TEMPLATE_DIR, load_template
from lightning_sfubm.datamodules.prompts import PromptBuilder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.llm.tiny import _tokenizer

TITLES = ["", "Alien", "Aliens", "", "A very long title that never ends", "</s> trick", "日本", "line\n break"]
MARKS = {USER: "<U>", ITEM: "<I>", CANDIDATE: "<C>"}


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


def builder(tokenizer, form="branch", **options):
    return PromptBuilder(tokenizer, load_template("movies", form), TITLES, **{"title_tokens": 40, **options})


def spell(tokenizer, tokens):
    """A text from tokens and soft-token codes."""
    text, run = "", []
    for token in [*tokens.tolist(), None]:
        if token is None or token < 0:
            text, run = text + tokenizer.decode(run), []
            text += MARKS.get(token, "")
        else:
            run.append(token)
    return text


def test_branch_form_spelled_out(tokenizer):
    batch = builder(tokenizer).build(torch.tensor([[0, 1, 2]]), torch.tensor([[4, 1]]))
    prefix = spell(tokenizer, batch.tokens[0][batch.branch[0] == 0])
    assert prefix == (
        "A user<U> of a film service watched these films, oldest first: Alien<I>; Aliens<I>;"
        "\nThe film the user will watch next:"
    )
    assert spell(tokenizer, batch.tokens[0][batch.branch[0] == 1]) == " A very long title that never ends<C>"
    assert spell(tokenizer, batch.tokens[0][batch.branch[0] == 2]) == " Alien<C>"


def test_list_form_spelled_out(tokenizer):
    build = builder(tokenizer, "list", user_token=False, history_tokens=False, candidate_tokens=False)
    batch = build.build(torch.tensor([[1]]), torch.tensor([[2, 1]]), branches=torch.tensor([[2]]))
    prefix = spell(tokenizer, batch.tokens[0][batch.branch[0] == 0])
    assert "next from this list:\n- Aliens\n- Alien\nAnswer with its title only.\nAnswer:" in prefix
    assert spell(tokenizer, batch.tokens[0][batch.branch[0] == 1]) == " Aliens</s>"


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_within_a_prompt():
    """SentencePiece's way: each piece tokenised alone would begin with a space of its own, and so would every title."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for title in TITLES for letter in title} | set(map(chr, range(32, 127))) | {"\n"})
    words = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁Alien", -1.0), *((x, -4.0) for x in letters if x != " ")]
    model = Tokenizer(models.Unigram(words, unk_id=0))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.tokenize("Alien") == ["▁Alien"]
    assert tokenizer.tokenize(" Alien") == ["▁", "▁Alien"]
    build = builder(tokenizer, user_token=False, history_tokens=False, candidate_tokens=False)
    batch = build.build(torch.tensor([[1, 2]]), torch.tensor([[1]]))
    prefix = tokenizer.convert_ids_to_tokens(batch.tokens[0][batch.branch[0] == 0])
    assert (
        "".join(prefix)
        .replace("▁", " ")
        .endswith("films, oldest first: Alien; Aliens;\nThe film the user will watch next:")
    )
    assert tokenizer.convert_ids_to_tokens(batch.tokens[0][batch.branch[0] == 1]) == ["▁Alien"]
    assert build.title_token_ids[1] == tokenizer.convert_tokens_to_ids(["▁Alien"])


def test_titles_are_data_not_control(tokenizer):
    batch = builder(tokenizer).build(torch.tensor([[5, 3, 6, 7]]), torch.tensor([[1]]))
    assert tokenizer.eos_token_id not in batch.tokens[0][batch.branch[0] >= 0]
    text = spell(tokenizer, batch.tokens[0])
    assert " </s> trick<I>; unnamed film<I>; 日本<I>; line break<I>;" in text


def test_long_titles_are_cut_and_counted(tokenizer):
    build = builder(tokenizer, title_tokens=6)
    assert build.unnamed == 1
    assert build.cut_titles == sum(len(tokenizer(" " + (t or "unnamed film"))["input_ids"]) > 6 for t in TITLES[1:])
    batch = build.build(torch.tensor([[1]]), torch.tensor([[4]]))
    assert (batch.branch[0] == 1).sum() == 7


@pytest.mark.parametrize("form", ["branch", "list", "binary"])
def test_no_rows_are_no_prompts(tokenizer, form):
    nobody = torch.zeros(0, 4, dtype=torch.long)
    batch = builder(tokenizer, form).build(nobody, nobody[:, :3], disliked=nobody[:, :2])
    assert batch.tokens.shape == batch.branch.shape == (0, 0)
    assert batch.branch_end.shape == (0, 3)
    assert batch.prefix_end.shape == (0,)


def test_newest_items_are_mentioned(tokenizer):
    text = spell(
        tokenizer, builder(tokenizer, history_length=1).build(torch.tensor([[2, 1]]), torch.tensor([[1]])).tokens[0]
    )
    assert " Alien<I>;" in text
    assert "Aliens" not in text


def test_empty_history_is_a_prompt_too(tokenizer):
    batch = builder(tokenizer).build(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1]]))
    assert "oldest first:\nThe film" in spell(tokenizer, batch.tokens[0])


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.data())
def test_batched_rows_equal_single_rows(data):
    """Left padding, positions, ends, owners: each row of a batch says what it says alone."""
    tokenizer = _shared_tokenizer()
    form = data.draw(st.sampled_from(["branch", "list"]))
    build = builder(tokenizer, form, history_length=3)
    rows = data.draw(st.integers(1, 3))
    ids = st.integers(1, len(TITLES) - 1)
    history = [[0] * (5 - n) + data.draw(st.lists(ids, min_size=n, max_size=n)) for n in range(rows)]
    candidates = [data.draw(st.permutations(range(1, len(TITLES))))[:3] for _ in range(rows)]
    batch = build.build(torch.tensor(history), torch.tensor(candidates))
    for row in range(rows):
        alone = build.build(torch.tensor(history[row : row + 1]), torch.tensor(candidates[row : row + 1]))
        shift = batch.tokens.shape[1] - alone.tokens.shape[1]
        assert (batch.branch[row, :shift] == -1).all()
        for name in ("tokens", "branch", "positions", "items", "slots"):
            assert torch.equal(getattr(batch, name)[row, shift:], getattr(alone, name)[0])
        assert torch.equal(batch.branch_end[row] - shift, alone.branch_end[0])
        assert batch.prefix_end[row] - shift == alone.prefix_end[0]
        ends = batch.branch_end[row]
        assert torch.equal(batch.branch[row][ends], torch.arange(1, 4))
        assert batch.branch[row][batch.prefix_end[row]] == 0
        prefix = (batch.branch[row] == 0).sum()
        for number in range(1, 4):
            mine = batch.positions[row][batch.branch[row] == number]
            assert torch.equal(mine, torch.arange(len(mine)) + prefix)
            owned = batch.items[row][batch.branch[row] == number]
            assert (owned == candidates[row][number - 1]).all()
        assert torch.equal(batch.positions[row][batch.branch[row] == 0], torch.arange(prefix))


_cached = []


def _shared_tokenizer():
    if not _cached:
        _cached.append(_tokenizer())
    return _cached[0]


def test_no_history_prompt_and_no_branches(tokenizer):
    build = builder(tokenizer)
    prior = build.build(
        torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.tensor([[1, 2]]), False
    )
    assert (
        spell(tokenizer, prior.tokens[0][prior.branch[0] == 0])
        == "A user of a film service.\nThe film the user will watch next:"
    )
    bare = build.build(torch.tensor([[1]]), torch.tensor([[2]]), branches=torch.zeros(1, 0, dtype=torch.long))
    assert bare.branch.max() == 0
    assert bare.branch_end.shape == (1, 0)


def test_chat_format_wraps_and_bos_is_kept(tokenizer, tmp_path):
    own = tmp_path / "chat.yaml"
    own.write_text("chat: true\nsystem: Be brief.\n")
    tokenizer = _tokenizer()
    with pytest.raises(ConfigError, match="tokenizer has none"):
        PromptBuilder(tokenizer, load_template(str(own), "branch"), TITLES)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    batch = PromptBuilder(tokenizer, load_template(str(own), "branch"), TITLES).build(
        torch.tensor([[1]]), torch.tensor([[2]])
    )
    text = spell(tokenizer, batch.tokens[0])
    assert text.startswith("<s>system: Be brief.</s><s>user: A user<U>")
    assert text.endswith("</s><s>assistant: Aliens<C>")
    assert (batch.tokens[0] == tokenizer.bos_token_id).sum() == 3
    tokenizer.chat_template = "<s>Today is {{ strftime_now('%d %b %Y') }}.</s>" + tokenizer.chat_template
    batch = PromptBuilder(tokenizer, load_template(str(own), "branch"), TITLES).build(
        torch.tensor([[1]]), torch.tensor([[2]])
    )  # the same on every day
    assert spell(tokenizer, batch.tokens[0]).startswith("<s>Today is 26 Jul 2024.</s><s>system: Be brief.")
    from tokenizers import processors

    plain = _tokenizer()
    plain._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)]
    )
    batch = builder(plain).build(torch.tensor([[1]]), torch.tensor([[2]]))
    assert batch.tokens[0, 0] == plain.bos_token_id
    assert (batch.tokens[0] == plain.eos_token_id).sum() == 0


@pytest.mark.parametrize("form", ["branch", "list"])
@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATE_DIR.glob("*.yaml")))
def test_shipped_templates_are_complete(tokenizer, name, form):
    template = load_template(name, form)
    build = PromptBuilder(tokenizer, template, TITLES)
    text = spell(tokenizer, build.build(torch.tensor([[1]]), torch.tensor([[2]])).tokens[0])
    assert template.noun in text
    assert "{" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nuon: film", "unknown entry 'nuon'"),
        ("noun: [1]", "'noun' must be of type str"),
        ("noun: ' '", "'noun' is empty"),
        ("branch: {candidate: ' {titel}'}", r"'branch.candidate' holds '\{titel\}'"),
        ("branch: {candidate: ' x'}", r"must hold '\{title\}' exactly once"),
        ("branch: {candidates: ' {title}'}", "unknown entry 'branch.candidates'"),
        ("branch: {question: ''}", "'branch.question' is empty"),
        ("branch: {question: 3}", "must be a text"),
        ("noun: [film", "not readable YAML"),
        ("- film", "must hold entries"),
    ],
)
def test_broken_templates(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_template(str(path), "branch")
    assert "own.yaml" in str(caught.value)


def test_unknown_template_form_and_sizes(tokenizer):
    with pytest.raises(ConfigError, match=r"no prompt template at .*one of \['base', 'beauty'"):
        load_template("moovies", "branch")
    with pytest.raises(ConfigError, match="form 'tree'"):
        load_template("movies", "tree")
    with pytest.raises(ConfigError, match="history_length"):
        builder(tokenizer, history_length=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["branch", "list"]), st.integers(60, 400), st.integers(2, 20))
def test_titles_are_shortened_until_the_longest_prompt_fits(form, context, candidates):
    titles = ["", *(" ".join(f"word{i}{j}" for j in range(1 + 3 * i)) for i in range(24))]
    made = PromptBuilder(_tokenizer(), load_template("movies", form), titles, 5, 30)
    try:
        cut = made.fit_context(context, candidates)
    except ConfigError:  # not even titles of one token fit
        assert made.title_tokens == 1
        assert made._longest(candidates) > context
        return
    rows = torch.arange(1, candidates + 1).unsqueeze(0) + 24 - candidates
    batch = made.build(torch.tensor([[20, 21, 22, 23, 24]]), rows)
    assert int(batch.positions.max()) < context
    assert batch.branch_end.shape[1] == candidates  # none left out
    assert cut == made.cut_titles
    roomy = PromptBuilder(_tokenizer(), load_template("movies", form), titles, 5, 30)
    assert made.title_tokens == 30 or roomy._longest(candidates) > context  # not shortened without need


@pytest.mark.parametrize("disliked", [0, 2, 5, 9])
def test_titles_make_room_for_all_that_is_disliked(disliked):
    titles = ["", *(f"word{i} " * 9 for i in range(24))]
    made = PromptBuilder(_tokenizer(), load_template("movies", "binary"), titles, 5, 30)
    made.fit_context(300, 1, disliked)
    said = torch.arange(6, 6 + disliked).unsqueeze(0)
    batch = made.build(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[24]]), disliked=said)
    assert int(batch.positions.max()) < 300
    usual = PromptBuilder(_tokenizer(), load_template("movies", "binary"), titles, 5, 30)
    usual.fit_context(300, 1)
    assert (made.title_tokens < usual.title_tokens) == (disliked > 5)


def test_titles_that_fit_stay_as_they_are(tokenizer):
    made = builder(tokenizer)
    before = made.build(torch.tensor([[1, 2]]), torch.tensor([[4, 1]])).tokens
    made.fit_context(2048, 20)
    assert torch.equal(before, made.build(torch.tensor([[1, 2]]), torch.tensor([[4, 1]])).tokens)
