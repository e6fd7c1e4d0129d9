"""Prompts as token arrays: titles are tokenised once per catalogue, prompts are assembled by array operations.

A prompt is a sequence of *segments*: fixed texts, and for every item its history entry, its candidate entry and its
answer. All segments lie in one flat array; assembling a batch gathers slices of it, without a Python loop over rows.
Soft tokens are negative codes (``prompt_batch``) that the LLM head replaces by vectors.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sfubm.datamodules.prompt_batch import CANDIDATE, ITEM, USER, PromptBatch
from lightning_sfubm.datamodules.prompt_templates import FIELD, PromptTemplate
from lightning_sfubm.errors import ConfigError

#: what a chat template calls for today's date, in front of the template: any day will do, as long as it stays the same
_SOME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


class PromptBuilder:
    """Builds the prompts of one domain for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: texts of the form.
        titles: N + 1 titles, index 0 unused.
        history_length: the newest items that are mentioned.
        title_tokens: longer titles are cut to this many tokens and counted in :attr:`cut_titles`.
        user_token: keep the place of the user's soft token.
        history_tokens: keep the places of the history items' soft tokens.
        candidate_tokens: keep the places of the candidates' soft tokens.

    Attributes:
        answer_ids: ``binary``: the token of a yes and that of a no.
        cut_titles: number of titles cut.
        unnamed: number of blank titles; they are spoken of as "unnamed <noun>".
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        titles: list[str],
        history_length: int = 10,
        title_tokens: int = 12,
        user_token: bool = True,
        history_tokens: bool = True,
        candidate_tokens: bool = True,
    ) -> None:
        if history_length < 1 or title_tokens < 1:
            raise ConfigError(f"need history_length, title_tokens >= 1, got {history_length} and {title_tokens}")
        self.tokenizer = tokenizer
        self.template = template
        self.history_length = history_length
        self.title_tokens = title_tokens
        self.num_items = len(titles) - 1
        self.pad_id = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
        self.cut_titles = 0
        self.unnamed = sum(not title.strip() for title in titles[1:])
        self._titles = [" ".join(title.split()) or f"unnamed {template.noun}" for title in titles]
        self._codes = {
            "user": [USER] if user_token else [],
            "history": [ITEM] if history_tokens else [],
            "candidate": [CANDIDATE] if candidate_tokens else [],
        }
        self._tokenised: dict[str, tuple[list[list[int]], list[bool]]] = {}
        first = tokenizer.convert_ids_to_tokens(self._tokens(["a"])[0][:1])
        self._adds_space = bool(first) and str(first[0]).startswith(("▁", "Ġ"))
        self._build_segments()

    # ------------------------------------------------------------------------------------------------ segments

    def _build_segments(self) -> None:
        texts, form = self.template.texts, self.template.form
        head, tail = self._wrapping()
        fixed = ("opening", "question", "no_history", "choices", "disliked")
        segments = {name: [self._fixed(texts[name])] for name in fixed if name in texts}
        segments["opening"][0] = head + segments["opening"][0]
        segments["history"] = self._per_item(texts["history"], self._codes["history"])
        if form == "binary":
            # the title belongs to the question, so the chat format closes after it
            lead, self.answer_ids = self._answer_tokens()
            judged = self._per_item(texts["candidate"], [])
            segments["branch"] = [row + tail + lead for row in judged]
        else:
            segments["question"][0] = segments["question"][0] + tail
            segments["no_history"][0] = head + segments["no_history"][0] + tail
        if form == "branch":
            segments["branch"] = self._per_item(texts["candidate"], self._codes["candidate"])
        elif form == "list":
            if self.tokenizer.eos_token_id is None:
                raise ConfigError("the list prompt form needs a tokenizer with an end-of-sequence token")
            segments["choice"] = self._per_item(texts["choice"], self._codes["candidate"])
            answers = self._per_item(texts["answer"], [])
            segments["branch"] = [[*answer, self.tokenizer.eos_token_id] for answer in answers]
        self._first: dict[str, int] = {}
        flat: list[list[int]] = []
        for name, rows in segments.items():
            self._first[name] = len(flat)
            flat.extend(rows)
        self._lengths = np.array([len(row) for row in flat], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        self._flat = np.array([token for row in flat for token in row], dtype=np.int64)
        self._answers = segments["branch"]
        self._spoken: tuple[list[str], list[bool]] | None = None

    def fit_context(self, context: int, num_candidates: int, num_disliked: int = 0) -> int:
        """Shorten titles, all to the same limit, until the longest possible prompt fits; candidates are never left out.

        Args:
            context: tokens the model takes.
            num_candidates: C.
            num_disliked: M, the most items said to be disliked (``binary`` only); there is room for ``history_length``.

        Returns:
            Number of titles cut, as :attr:`cut_titles`.

        Raises:
            ConfigError: not even titles of one token fit.
        """
        while (excess := self._longest(num_candidates, num_disliked) - context) > 0:
            mentioned = self.history_length + 1 + (num_candidates if self.template.form == "list" else 0)
            shorter = self.title_tokens - -(-excess // mentioned)
            if shorter < 1 and self.title_tokens == 1:
                others = "num_disliked" if self.template.form == "binary" else "the number of candidates"
                raise ConfigError(
                    f"the prompt needs {context + excess} tokens with titles of one token, but the model takes {context}; "
                    f"lower history_length (now {self.history_length}) or {others}"
                )
            self.limit_titles(max(1, shorter))
        return self.cut_titles

    def limit_titles(self, tokens: int) -> None:
        """Cut titles to this many tokens from now on, where that is less than before."""
        if tokens < self.title_tokens:
            self.title_tokens = tokens
            self._tokenised.clear()
            self._build_segments()

    def _longest(self, num_candidates: int, num_disliked: int = 0) -> int:
        """Tokens of the longest prompt that these titles can make."""
        ends = [*self._first.values(), len(self._lengths)][1:]
        most = {
            name: int(self._lengths[start:end].max())
            for (name, start), end in zip(self._first.items(), ends, strict=True)
        }
        times = {"history": self.history_length, "choice": num_candidates, "no_history": 0}
        if self.template.form == "binary":
            times["history"] += max(self.history_length, num_disliked)
        return sum(length * times.get(name, 1) for name, length in most.items())

    def _answer_tokens(self) -> tuple[list[int], tuple[int, int]]:
        """Tokens that the answers yes and no both begin with, and the first ones in which they differ.

        In a chat format the answer opens the reply, so it loses its leading space.
        """
        texts = [self.template.texts[name] for name in ("answer_yes", "answer_no")]
        yes, no = self._ids([text.lstrip() if self.template.chat else text for text in texts])
        for index, pair in enumerate(zip(yes, no, strict=False)):
            if pair[0] != pair[1]:
                return yes[:index], pair
        raise ConfigError(f"the answers {texts[0]!r} and {texts[1]!r} begin with the same tokens; reword one of them")

    def _wrapping(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the prompt: the chat format, or whatever the tokenizer puts in front of a text."""
        if self.template.chat:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ConfigError("the template asks for a chat format, but the tokenizer has none; set 'chat: false'")
            mark = "PLACE-OF-THE-PROMPT"
            messages = [{"role": "system", "content": self.template.system}] if self.template.system else []
            messages.append({"role": "user", "content": mark})
            template = self.tokenizer.get_chat_template()
            if "strftime_now" in template:  # some write today's date, and a prompt must not depend on the day
                template = _SOME_DAY + template
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            before, after = text.split(mark)
            return self._tokens([before], special=True)[0], self._ids([after], special=True)[0]
        probe = "a"
        full = self.tokenizer(probe)["input_ids"]
        plain = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return full[:start], []

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Token ids. Titles come from users' data: a special token's name inside one is read as plain text.

        Some tokenizers (SentencePiece's) put a space before a text. Within a prompt there is none, so that pieces are then
        tokenised behind a line break, whose tokens are taken off again.
        """
        plain = self._tokens(texts, special)
        if not self._adds_space:
            return plain
        lead = self._tokens(["\n"], special)[0]
        behind = self._tokens([f"\n{text}" for text in texts], special)
        return [row[len(lead) :] if row[: len(lead)] == lead else own for own, row in zip(plain, behind, strict=True)]

    def _tokens(self, texts: list[str], special: bool = False) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not special)[
            "input_ids"
        ]
        return found

    def _fixed(self, text: str) -> list[int]:
        """A text without a title; soft token fields become codes."""
        ids: list[int] = []
        for index, piece in enumerate(FIELD.split(text)):
            if index % 2:
                ids += self._codes.get(piece, [])
            elif piece:
                ids += self._ids([piece])[0]
        return ids

    def _per_item(self, text: str, item_code: list[int]) -> list[list[int]]:
        """The text for each of the N + 1 items. Spaces right before {title} are tokenised together with the title."""
        before, after = re.split(r"\{title\}", text)
        lead = _lead(before)
        opening = before[: len(before) - len(lead)]
        pieces = [p for p in re.split(r"(\{item\})", opening) if p]
        front = [t for p in pieces for t in (item_code if p == "{item}" else self._ids([p])[0])]
        pieces = [p for p in re.split(r"(\{item\})", after) if p]
        back = [t for p in pieces for t in (item_code if p == "{item}" else self._ids([p])[0])]
        return [front + title + back for title in self._title_ids(lead)[0]]

    def _title_ids(self, lead: str) -> tuple[list[list[int]], list[bool]]:
        """Token ids of the N + 1 titles after ``lead``, cut to ``title_tokens``, and which ones are cut."""
        if lead not in self._tokenised:
            full = self._ids([lead + title for title in self._titles])
            cut = [len(ids) > self.title_tokens for ids in full]
            self.cut_titles = sum(cut[1:])
            self._tokenised[lead] = [ids[: self.title_tokens] for ids in full], cut
        return self._tokenised[lead]

    @property
    def spoken_titles(self) -> tuple[list[str], list[bool]]:
        """N + 1 titles as an answer of the ``list`` form says them, and which ones are cut: they may end within a word."""
        if self._spoken is None:
            shown, cut = self._title_ids(_lead(self.template.texts["answer"].split("{title}")[0]))
            said = [
                # a cut within a character leaves a replacement character, which no answer need repeat
                self.tokenizer.decode(ids).strip().rstrip("\ufffd") if is_cut else title
                for title, ids, is_cut in zip(self._titles, shown, cut, strict=True)
            ]
            self._spoken = said, cut
        return self._spoken

    @property
    def title_token_ids(self) -> list[list[int]]:
        """N + 1 cut token id lists, as the titles stand in the history."""
        return self._title_ids(" ")[0]

    # ------------------------------------------------------------------------------------------------ batches

    def answers(self, candidates: np.ndarray) -> list[list[list[int]]]:
        """Token ids of each candidate's answer, (B, C) nested lists; in the ``list`` form they end in EOS."""
        return [[self._answers[item] for item in row] for row in candidates]

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, the EOS of the ``list`` form among them."""
        return max(map(len, self._answers))

    def build(
        self,
        history: Tensor,
        candidates: Tensor,
        branches: Tensor | None = None,
        with_history: bool = True,
        disliked: Tensor | None = None,
    ) -> PromptBatch:
        """Prompts for a batch.

        Args:
            history: (B, L) left-padded with 0; the newest ``history_length`` items are mentioned.
            candidates: (B, C); they stand in the prompt in the ``list`` form.
            branches: (B, C') items whose branch follows the prefix: the candidates by default; C' may be 0.
            with_history: False for the same question about nobody: the prior of the candidates (not in ``binary``).
            disliked: (B, M) items said to be disliked, padded with 0 (``binary`` only).
        """
        past = history.cpu().numpy()[:, -self.history_length :]
        choices = candidates.cpu().numpy()
        ends = choices if branches is None else branches.cpu().numpy()
        rows = len(past)
        segments: list[np.ndarray] = []
        items: list[np.ndarray] = []
        slots: list[np.ndarray] = []

        def fixed(name: str) -> None:
            add(np.full((rows, 1), self._first[name]), np.zeros((rows, 1), np.int64), -np.ones((rows, 1), np.int64))

        def add(segment: np.ndarray, item: np.ndarray, slot: np.ndarray) -> None:
            segments.append(segment)
            items.append(item)
            slots.append(slot)

        def per_item(name: str, of: np.ndarray, numbered: bool) -> None:
            numbers = np.arange(of.shape[1]) if numbered else np.full(of.shape[1], -1)
            add(np.where(of > 0, self._first[name] + of, -1), of, np.broadcast_to(numbers, of.shape))

        if with_history:
            fixed("opening")
            per_item("history", past, numbered=False)
            if self.template.form == "list":
                fixed("choices")
                per_item("choice", choices, numbered=True)
            elif self.template.form == "binary":
                fixed("disliked")
                if disliked is not None:
                    per_item("history", disliked.cpu().numpy(), numbered=False)
            fixed("question")
        else:
            fixed("no_history")
        prefix_segments = sum(block.shape[1] for block in segments)
        per_item("branch", ends, numbered=True)
        return self._gather(np.hstack(segments), np.hstack(items), np.hstack(slots), prefix_segments)

    def _gather(self, segments: np.ndarray, items: np.ndarray, slots: np.ndarray, prefix: int) -> PromptBatch:
        """Lay out the segments (B, M) of each row, left-padded; the first ``prefix`` ones form the shared prefix."""
        rows, columns = segments.shape
        lengths = np.where(segments >= 0, self._lengths[segments], 0)
        ends = np.cumsum(lengths, axis=1)
        totals = ends[:, -1]
        width = int(totals.max(initial=0))  # B may be 0
        pad = (width - totals)[:, None]
        flat_lengths = lengths.ravel()
        which = np.repeat(np.arange(rows * columns), flat_lengths)  # the segment of each token
        inside = np.arange(len(which)) - np.repeat(np.cumsum(flat_lengths) - flat_lengths, flat_lengths)
        column = (pad + ends - lengths).ravel()[which] + inside
        row = which // columns
        branch_of_segment = np.concatenate([np.zeros(prefix, np.int64), np.arange(1, columns - prefix + 1)])
        branch = branch_of_segment[which % columns]
        prefix_length = ends[:, prefix - 1]
        base = np.where(np.arange(columns) < prefix, ends - lengths, prefix_length[:, None])

        def place(values: np.ndarray, fill: int) -> Tensor:
            out = np.full((rows, width), fill, dtype=np.int64)
            out[row, column] = values
            return torch.from_numpy(out)

        return PromptBatch(
            tokens=place(self._flat[self._starts[segments.ravel()[which]] + inside], self.pad_id),
            branch=place(branch, -1),
            positions=place(base.ravel()[which] + inside, 0),
            items=place(items.ravel()[which], 0),
            slots=place(slots.ravel()[which], -1),
            prefix_end=torch.from_numpy(pad[:, 0] + prefix_length - 1),
            branch_end=torch.from_numpy(pad + ends[:, prefix:] - 1),
        )


def _lead(before_title: str) -> str:
    """The spaces right before a title, which are tokenised together with it."""
    return before_title[len(before_title.rstrip(" ")) :]
