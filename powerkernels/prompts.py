"""Prompts as people write them down: text or chat messages, and the chat template around them."""

from __future__ import annotations

from typing import Any


def prompt_of(record: Any, where: str) -> Any:
    """The prompt of a JSON object or a table's row: its "prompt" text, or its "messages".

    Raises:
        ValueError: it has neither; the message begins with `where`.
    """
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages:
        for message in messages:
            keys = ("role", "content")
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in keys
            ):
                raise ValueError(
                    f'{where}: each of "messages" must be {{"role": text, "content": text}}, '
                    f"got {message!r}"
                )
        return messages
    raise ValueError(
        f'{where}: expected an object with "prompt" (text) or "messages" (a list), '
        f"got {str(record)[:80]}"
    )


def has_chat_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def as_chat(prompt: Any, tokenizer: Any, chat: bool | None) -> Any:
    """Text becomes a chat of one message where a template is wanted; a chat stays a chat.

    Args:
        prompt: text, or a list of messages.
        tokenizer: whose template it is.
        chat: whether to use the template; None is "where there is one".

    Raises:
        ValueError: there is no template and one is needed, or it is needed and unwanted.
    """
    is_text = isinstance(prompt, str)
    has_template = has_chat_template(tokenizer)
    if not has_template and (chat or not is_text):
        reason = "--chat" if chat else '"messages"'
        raise ValueError(
            f"{reason}: this model's tokenizer has no chat template; "
            "use --no-chat and plain prompts"
        )
    if chat is False and not is_text:
        raise ValueError('--no-chat: the input has "messages", which need the chat template')
    if is_text and (chat or (chat is None and has_template)):
        return [{"role": "user", "content": prompt}]
    return prompt
