"""A generated federation with planted structure, and a text encoder without a model: for tests and first steps.

All domains share latent topics, a Markov chain over the topics and the words that express them; each has its own users
and items. What follows what is therefore readable from titles alone, in every domain in the same way, and a model that
reads text can carry it from one domain into another. Item ids carry nothing across domains.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_sfubm.datamodules.readers.base import RawDomain, fingerprint_files
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import derive_seed, numpy_generator

_WORD = re.compile(r"\w+")
_SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "ta", "ve", "wo", "zu")


class SyntheticReader:
    """Generates one domain of the planted federation; the same ``seed`` shares topics, chain and words.

    Args:
        domain_index: which domain; users, items and titles differ by it.
        num_users: U.
        num_items: N.
        num_topics: latent topics.
        mean_length: mean number of interactions of a user (at least 5, geometric above that).
        order: probability that the next topic is the one the chain prefers; the rest is uniform.
        popularity: exponent of item popularity within a topic; 0 = uniform.
        domain_words: words in each title that are the domain's own and say nothing of the topic.
        seed: root seed of the federation.
    """

    def __init__(
        self,
        domain_index: int = 0,
        num_users: int = 300,
        num_items: int = 120,
        num_topics: int = 12,
        mean_length: int = 12,
        order: float = 0.8,
        popularity: float = 0.5,
        domain_words: int = 1,
        seed: int = 1,
    ) -> None:
        if num_items < num_topics:
            raise ConfigError(f"num_items ({num_items}) must be at least num_topics ({num_topics})")
        if not 0 <= order <= 1:
            raise ConfigError(f"order must lie in [0, 1], not {order}")
        self.domain_index = domain_index
        self.num_users = num_users
        self.num_items = num_items
        self.num_topics = num_topics
        self.mean_length = mean_length
        self.order = order
        self.popularity = popularity
        self.domain_words = domain_words
        self.seed = seed

    def topics(self) -> np.ndarray:
        """(N,) topic of each item."""
        return numpy_generator(self.seed, "synthetic", "topics", self.domain_index).permutation(
            np.arange(self.num_items) % self.num_topics
        )

    def successors(self) -> np.ndarray:
        """(T,) preferred next topic of each topic: one cycle through all topics, shared by the domains."""
        cycle = numpy_generator(self.seed, "synthetic", "chain").permutation(self.num_topics)
        successors = np.empty(self.num_topics, dtype=np.int64)
        successors[cycle] = np.roll(cycle, -1)
        return successors

    def read(self, root: Path | None) -> RawDomain:
        """Generate the domain; ``root`` is ignored."""
        generator = numpy_generator(self.seed, "synthetic", "domain", self.domain_index)
        topics = self.topics()
        successors = self.successors()
        lengths = 4 + generator.geometric(1 / max(1, self.mean_length - 4), size=self.num_users)
        steps = int(lengths.max())
        topic = np.empty((self.num_users, steps), dtype=np.int64)
        topic[:, 0] = generator.integers(self.num_topics, size=self.num_users)
        for step in range(1, steps):
            free = generator.integers(self.num_topics, size=self.num_users)
            follows = generator.random(self.num_users) < self.order
            topic[:, step] = np.where(follows, successors[topic[:, step - 1]], free)
        weights = (1 + generator.permutation(self.num_items)) ** -float(self.popularity)
        items = np.empty_like(topic)
        for number in range(self.num_topics):
            members = np.flatnonzero(topics == number)
            chances = weights[members] / weights[members].sum()
            here = topic == number
            items[here] = generator.choice(members, size=int(here.sum()), p=chances)
        real = np.arange(steps) < lengths[:, None]
        users = np.repeat(np.arange(self.num_users), lengths)
        prefix = f"d{self.domain_index}"
        interactions = pa.table(
            {
                "user": pa.array([f"{prefix}-u{user}" for user in range(self.num_users)]).take(pa.array(users)),
                "item": pa.array([f"{prefix}-i{item}" for item in range(self.num_items)]).take(pa.array(items[real])),
                "order": pa.array(np.broadcast_to(np.arange(steps), real.shape)[real].astype(np.int64)),
            }
        )
        table = pa.table(
            {"item": [f"{prefix}-i{item}" for item in range(self.num_items)], "title": self._titles(topics, generator)}
        )
        return RawDomain(interactions, table, "position")

    def fingerprint(self, root: Path | None) -> str:
        """Hash of the settings."""
        return fingerprint_files([], {"reader": "synthetic", **vars(self)})

    def _titles(self, topics: np.ndarray, generator: np.random.Generator) -> list[str]:
        """Two of the topic's four words, the domain's own words, and a number that keeps titles distinct."""
        titles = []
        for item, topic in enumerate(topics):
            words = [_word(self.seed, "topic", topic, k) for k in generator.permutation(4)[:2]]
            own = [_word(self.seed, "own", self.domain_index, generator.integers(30)) for _ in range(self.domain_words)]
            titles.append(" ".join([*words, *own, str(item)]).capitalize())
        return titles


class HashingTextEncoder:
    """Bag of words under a fixed random projection: unit vectors without a model or a download.

    Each word has a Gaussian direction drawn from a stream named by the word; a text is the normalised sum of its
    words, numbers left out.

    Args:
        dim: D, at least 1.
        seed: of the directions.

    Raises:
        ConfigError: there is no dimension.
    """

    def __init__(self, dim: int = 64, seed: int = 0) -> None:
        if dim < 1:
            raise ConfigError(f"HashingTextEncoder: dim must be at least 1, not {dim}")
        self.dim = dim
        self.seed = seed
        self.fingerprint = f"hashing-{dim}-{seed}"
        self._directions: dict[str, Tensor] = {}

    def encode(self, texts: list[str]) -> Tensor:
        """(len(texts), D) float32 unit rows; a text without words gets the direction of the empty word."""
        vectors = [torch.stack([self._direction(word) for word in self._words(text)]).sum(dim=0) for text in texts]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=1) if vectors else torch.zeros(0, self.dim)

    @staticmethod
    def _words(text: str) -> list[str]:
        return [word for word in _WORD.findall(text.casefold()) if not word.isdigit()] or [""]

    def _direction(self, word: str) -> Tensor:
        if word not in self._directions:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "word", word))
            self._directions[word] = torch.randn(self.dim, generator=generator)
        return self._directions[word]


def _word(seed: int, *names: object) -> str:
    """A pronounceable made-up word of four syllables, fixed by its name."""
    value = derive_seed(seed, "word", *names)
    return "".join(_SYLLABLES[(value >> (8 * place)) % len(_SYLLABLES)] for place in range(4))
