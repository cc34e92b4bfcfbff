"""What is checked of a job before it is accepted, whatever door it comes by."""

from __future__ import annotations

from wicore.config import ModelSettings, Settings
from wicore.errors import InvalidRequest, UnknownModel
from wicore.grammar import grammar_of, parts_of
from wicore.grammar.check import check_grammar
from wicore.model import Model
from wicore.request import JobBody
from wicore.text.images import ImageLimits
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
    check_images(body, model, settings.model)
    limits = image_limits(settings.model)
    return prepare(body, model.tokenizer, model.checkpoint.config, model.context, limits)


def takes_images(model: Model, settings: ModelSettings) -> bool:
    """Whether the model can see, and is to."""
    return settings.tower(model.checkpoint.config) is not None


def check_images(body: JobBody, model: Model, settings: ModelSettings) -> None:
    """Raises InvalidRequest, naming the first image, if none is taken and there is one."""
    if takes_images(model, settings):
        return
    for at, message in enumerate(body.messages or ()):
        for part, _ in message.images():
            raise text_alone(f"messages.{at}.content.{part}.type")


def text_alone(field: str) -> InvalidRequest:
    """What is said of an image, whose type is at `field`, where none can be seen."""
    what = "this model is served for text alone; send parts of type 'text' (got 'image_url')"
    return InvalidRequest(f"{field}: {what}", param=field)


def image_limits(settings: ModelSettings) -> ImageLimits:
    return ImageLimits(settings.max_images, settings.max_image_bytes, settings.max_image_pixels)


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
