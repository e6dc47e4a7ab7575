"""A conversation through the tokenizer's chat template, and which of its tokens the assistant says.

A template that marks them with `{% generation %}` is believed; of another, the assistant's are those that the template
adds to what came before each of its turns.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.rows import Conversation

# The tag of transformers' chat templates that marks what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The conversation's ids, and which of them the assistant says, their end included; raise DataError if untold."""
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.place}: messages need a chat template, which the tokenizer lacks; add chat_template.jinja to the "
            "source, or write prompt and completion instead"
        )
    if _GENERATION.search(str(tokenizer.get_chat_template())):
        encoded = _template(
            row, tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(said) for said in encoded["assistant_masks"]]
    return _masked_by_prefix(row, tokenizer, messages)


def _masked_by_prefix(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Ids, and which of them the assistant says: what the template adds to what came before each of its turns."""
    whole = _template(row, tokenizer, messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(row, tokenizer, messages[:i], tokenize=False, add_generation_prompt=True)
            after = _template(row, tokenizer, messages[: i + 1], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{row.place}: the chat template renders message {i + 1} differently once more messages follow, so "
                    "the assistant's tokens cannot be told apart; mark them in the template with "
                    "{% generation %}, or end the conversation at its first assistant turn"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token that straddles the border, such as a space and a word, is the assistant's: its word must be learned.
    said = [any(start < last and first < end for first, last in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], said


def _template(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool
) -> Any:
    """What the chat template makes of `messages`; `options` are apply_chat_template's switches."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"{row.place}: the chat template refuses it ({error}); mind the order of roles that it expects"
        ) from error
