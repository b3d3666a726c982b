"""A chat and its answer as a scorer's chat template writes them."""

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data_prep.errors import UserError
from data_prep.models.tokens import as_text
from data_prep.prompts.messages import Prompt, as_messages
from data_prep.prompts.templates import write_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    response: str,
    *,
    key: str,
    advice: str,
    add_generation_prompt: bool = False,
) -> str:
    """Write a conversation with a response, control tokens in the user's words marked as text.

    response: marked already (`as_text`); key: names the scorer in messages; advice: what to do
    where the template refuses the messages. Raises UserError there.
    """
    messages = [
        {"role": message["role"], "content": as_text(tokenizer, message["content"])}
        for message in as_messages(prompt)
    ]
    messages.append({"role": "assistant", "content": response})
    try:
        return write_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{key}: its chat template refuses messages of {roles} ({reason}); {advice}"
        ) from error
