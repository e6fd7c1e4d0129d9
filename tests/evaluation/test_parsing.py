import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.evaluation.parsing import TitleParser, normalise_title


@pytest.mark.parametrize(
    ("titles", "text", "expected"),
    [
        (["Alien", "Aliens"], "Aliens", 1),
        (["Alien", "Aliens"], "Alien", 0),
        (["Alien", "Aliens"], "Alien and Aliens", None),
        (["The Matrix", "The Matrix Reloaded"], "I choose The Matrix Reloaded.", 1),
        (["The Matrix", "The Matrix Reloaded"], "The Matrix Reloaded, not The Matrix", None),
        (["Heat", "Cheaters"], "cheaters", 1),
        (["Up", "Heat"], "she went upstairs", None),
        (["Toy Story (1995)", "Heat (1995)"], 'Answer: "TOY STORY (1995)"', 0),
        (["Schindler's List", "Heat"], "Schindler\u2019s List", 0),
        (["Amélie", "Heat"], "AME\u0301LIE", 0),
        (["Straße", "Heat"], "STRASSE", 0),
        (["七人の侍", "Heat"], "七人の侍", 0),
        (["\uff21lien", "Heat"], "alien", 0),
        (["Heat", "Heat"], "Heat", None),
        (["", "Heat"], "", None),
        (["", "Heat"], "heat", 1),
        (["C++", "C"], "c++", 0),
        (["!!!", "Heat"], "wow!!!", 0),
        (["Heat", "Up"], "none of them", None),
        (["Heat", "Up"], "Heat Heat heat", 0),
        (["Star Wars", "Wars Star"], "star wars star", 0),
        (["a  b", "Up"], "A\n b", 0),
    ],
)
def test_cases(titles, text, expected):
    assert TitleParser(titles).parse(text) == expected


def test_removed_spans_do_not_join_their_neighbours():
    assert TitleParser(["star x wars", "ab"]).matches("a star x wars b") == [0]
    assert TitleParser(["long one", "a b"]).matches("a long one b") == [0]
    assert TitleParser(["!!!", "ab"]).matches("a!!!b") == [0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CeraVe Lotion, 8 O", 0),
        ("cerave lotion, 8 ounce!", 0),
        ("CeraVe Lotion", None),
        ("CeraVe Lotion, 8 Ounce and Red", None),  # the cut title takes the rest of its word and no more
        ("Redder", None),  # not cut, so its end is a word's end
    ],
)
def test_a_cut_title_may_end_within_a_word(text, expected):
    assert TitleParser(["CeraVe Lotion, 8 O", "Red"], [True, False]).parse(text) == expected


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.text(alphabet="abA \u00e9\u2019'1-", max_size=6), min_size=1, max_size=6), st.data())
def test_an_exact_title_is_found_whenever_it_is_the_only_match(titles, data):
    index = data.draw(st.integers(0, len(titles) - 1))
    found = TitleParser(titles).matches(titles[index].upper())
    name = normalise_title(titles[index])
    alike = [i for i, title in enumerate(titles) if normalise_title(title) == name]
    if name:
        assert found == alike  # the longest match takes the whole text
    else:
        assert found == []


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.permutations(["Alien", "Aliens", "Alien 3", "3", "The Alien"]), st.text(alphabet="Alien s3The ", max_size=20))
def test_order_of_candidates_is_irrelevant(order, text):
    reference = ["Alien", "Aliens", "Alien 3", "3", "The Alien"]
    answer = TitleParser(reference).parse(text)
    permuted = TitleParser(order).parse(text)
    assert (None if answer is None else reference[answer]) == (None if permuted is None else order[permuted])
