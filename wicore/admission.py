"""What is checked of a job before it is accepted, whatever door it comes by."""

from __future__ import annotations

from wicore.config import Settings
from wicore.errors import InvalidRequest, UnknownModel
from wicore.grammar import grammar_of, parts_of
from wicore.grammar.check import check_grammar
from wicore.model import Model
from wicore.request import JobBody
from wicore.text.prompt import Prompt, prepare
from wicore.webhooks.message import check_webhook


def admit(body: JobBody, model: Model, settings: Settings) -> Prompt:
    """Check what the form of a body cannot show, and tokenise it.

    Raises UnknownModel, TooLarge or InvalidRequest, naming the field.
    """
    check_model(body.model, model)
    slots = settings.scheduler.max_batch
    if body.sequences > slots:
        field = "n" if body.best_of is None else "best_of"
        raise InvalidRequest(
            f"{field}: must be at most scheduler.max_batch, {slots} (got {body.sequences})", param=field
        )
    _check_form(body)
    check_webhook(body.webhook_url, settings.webhooks)
    return prepare(body, model.tokenizer, model.checkpoint.config, model.context)


def _check_form(body: JobBody) -> None:
    """Raises InvalidRequest for a form of the output that cannot be honoured, naming the field at fault."""
    grammar = grammar_of(body)
    if grammar is None:
        return
    try:
        check_grammar(grammar)
    except InvalidRequest:
        for part in parts_of(body):
            check_grammar(part)
        raise


def check_model(name: str | None, model: Model) -> None:
    """Raises UnknownModel unless `name` is the served model's or left out."""
    if name not in (None, model.name):
        raise UnknownModel(f"model: {name!r} is not served here; the model is {model.name!r}", param="model")
