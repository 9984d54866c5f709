"""Text encoders: prompts to hidden states, with words that are vectors where they are asked for.

Shape letters: B batch, L D text tokens and width, P pooled width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError

# What is read of an encoder: its last state (SD, T5), or the one before it and the pooled state (SDXL, SD3).
Reads = Literal["last", "penultimate"]


class TextEncoder:
    """A transformers text encoder with its tokenizer. Prompts are padded to `longest` tokens."""

    def __init__(self, model: Any, tokenizer: Any, reads: Reads, longest: int, what: str):
        self.model, self.tokenizer = model, tokenizer
        self._reads, self._longest, self._what = reads, longest, what
        # T5's encoder looks words up in a table of its own, which only shares the weights of the model's
        looks_up = model.encoder if model.config.model_type == "t5" else model
        self._table = looks_up.get_input_embeddings()
        *self._opening, self._closing = tokenizer("").input_ids
        # of a place that a vector takes; any token but those that close or pad a prompt, which CLIP looks for
        self._stand_in = self._opening[0] if self._opening else tokenizer.pad_token_id

    def encode(self, prompt: str) -> tuple[Float[Tensor, "1 L D"], Float[Tensor, "1 P"] | None]:
        """One prompt at a time, so that its embedding depends on no other."""
        ids = self.tokenizer(prompt, padding="max_length", max_length=self._longest).input_ids
        self._demand_fit(len(ids), prompt)
        with torch.no_grad():
            return self._run([ids], 1)

    def encode_words(
        self, prompt: str, words: Mapping[str, Float[Tensor, "B D"]]
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B P"] | None]:
        """The words' vectors take the place of rows of the embedding table, which itself is never touched."""
        ids, places = self._ids_around(prompt, tuple(words))

        def put(_module: Any, _inputs: Any, output_BLD: Tensor) -> Tensor:
            output_BLD = output_BLD.clone()
            for place, word in places.items():
                output_BLD[:, place] = words[word].to(output_BLD.dtype)
            return output_BLD

        hook = self._table.register_forward_hook(put)
        try:
            return self._run([ids], len(next(iter(words.values()))))
        finally:
            hook.remove()

    def _run(self, ids: Sequence[Sequence[int]], batch: int) -> tuple[Tensor, Tensor | None]:
        ids_BL = torch.tensor(ids, device=self.model.device).expand(batch, -1)
        if self._reads == "last":
            return self.model(ids_BL)[0], None
        said = self.model(ids_BL, output_hidden_states=True)
        return said.hidden_states[-2], getattr(said, "text_embeds", None)  # of encoders that project it

    def _ids_around(self, prompt: str, words: tuple[str, ...]) -> tuple[list[int], dict[int, str]]:
        """The tokens of a prompt, with one that does not matter for each of `words`, and where those are."""
        for word in words:
            if word not in prompt:
                raise UserError(f"the prompt {prompt!r} does not have the word {word!r}")
        ids, places = list(self._opening), {}
        for part in re.split(f"({'|'.join(map(re.escape, words))})", prompt):
            if part in words:
                places[len(ids)] = part
                ids.append(self._stand_in)
            else:
                ids += self.tokenizer(part, add_special_tokens=False).input_ids
        ids.append(self._closing)
        self._demand_fit(len(ids), prompt)
        return ids + [self.tokenizer.pad_token_id] * (self._longest - len(ids)), places

    def _demand_fit(self, tokens: int, prompt: str) -> None:
        if tokens > self._longest:
            raise UserError(
                f"prompt of {tokens} tokens given, {self._what} reads {self._longest}: shorten {prompt!r}"
            )

    @property
    def width(self) -> int:
        """D of a word's vector."""
        return self._table.weight.shape[1]

    def word(self, text: str | None) -> Float[Tensor, " D"]:
        """The vector of a word of one token; of None, the mean of all."""
        table_VD = self._table.weight
        if text is None:
            return table_VD.float().mean(dim=0)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens of {self._what}; give a word of one token")
        return table_VD[ids[0]].float().clone()
