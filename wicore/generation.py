"""One job in a worker: from its prompt to its events and result.

Pure: tokens in, events out. It knows nothing of Redis, threads or the engine. An attempt that follows
another is given that one's events and goes on from the last of them: same text, next sequence number,
and, as sampling is keyed by (seed, position), the tokens that would have come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

from wicore.errors import WicoreError
from wicore.openai import ChoiceResult, logprob_entry, result_object
from wicore.request import (
    Event,
    FinishReason,
    JobBody,
    Priority,
    TerminalType,
    started_event,
    terminal_event,
    token_event,
    usage_of,
)
from wicore.sampling import Constraint, SampledToken, SamplingState, choice_seed, seed_of_job
from wicore.scheduler import SequenceRequest
from wicore.text.calls import read_answer
from wicore.text.detokenizer import Detokenizer
from wicore.text.prompt import Prompt, prompt_text
from wicore.text.tokenizer import Tokenizer


@dataclass
class _Choice:
    detokenizer: Detokenizer
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    constraint: Constraint | None = None

    def likelihood(self) -> float:
        """Mean log-probability of the tokens, whose log-probabilities must have been asked for."""
        return fmean(entry["logprob"] for entry in self.logprobs)


_Taken: TypeAlias = tuple[int, int, SampledToken, "str | None", "FinishReason | None"]
"""A token that no event tells of yet: sequence number, choice, token, text (None: not made yet), and why it
is the choice's last. A plain tuple: engines wait while it is made."""


class Generation:
    """A job being generated.

    The caller runs `requests()` through a scheduler, hands each token to `take`, publishes what `events`
    returns in order, and calls `end` once when `finished`, or earlier when the job is called off.
    """

    def __init__(
        self,
        job_id: str,
        body: JobBody,
        prompt: Prompt,
        tokenizer: Tokenizer,
        *,
        priority: Priority,
        attempt: int = 1,
        log: Sequence[Event] = (),
        constrain: Callable[[], Constraint] | None = None,
    ) -> None:
        """`log` are the events that earlier attempts published, complete and in order; `constrain` makes what
        a choice's output is held to, at its beginning."""
        self.job_id = job_id
        self.body = body
        self.prompt = prompt
        self._tokenizer = tokenizer
        self._priority = priority
        self._sampling = body.sampling()
        self._use = body.tool_use()
        self._seed = seed_of_job(job_id) if body.seed is None else body.seed
        self._constrain = constrain
        self._choices = [_Choice(Detokenizer(tokenizer, body.stop)) for _ in range(body.sequences)]
        self.error: WicoreError | None = None
        """Why the job cannot go on, if it cannot; known when `take` has returned."""
        self.seq = 0
        """Sequence number of the last event."""
        for event in log:
            self._replay(event)
        self._cached: int | None = None
        """Tokens of the prompt that were cached; None: unknown."""
        self._untold: list[Event] = [started_event(job_id, self._next(), attempt)]
        self._taken: list[_Taken] = []

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    def requests(self, first_key: int) -> Iterator[tuple[int, SequenceRequest]]:
        """(choice index, sequence) for every choice that is not finished; keys count up from `first_key`."""
        for index, choice in enumerate(self._choices):
            if choice.finish_reason is None:
                state = self._sampling_state(index, choice.ids)
                yield (
                    index,
                    SequenceRequest(
                        key=first_key + index,
                        prompt=self.prompt.token_ids,
                        generated=choice.ids,
                        max_tokens=self.prompt.max_tokens,
                        sampling=state,
                        priority=self._priority,
                    ),
                )

    def take(self, index: int, token: SampledToken) -> bool:
        """Add a token, which the choice's sampling state has observed; whether it was the choice's last.

        Engines wait for this, so it does no more than that takes: without stop strings the text is made
        only in `events`.
        """
        choice, prompt = self._choices[index], self.prompt
        constraint, ids, token_id = choice.constraint, choice.ids, token.id
        reason: FinishReason | None = None
        text: str | None = None
        if constraint is not None and constraint.error is not None:
            self.error = constraint.error  # what was drawn is no part of an answer
            return True
        ids.append(token_id)
        if token_id in prompt.stop_ids:
            reason, text = "stop", ""
        elif self.body.stop:
            text = choice.detokenizer.push(token_id)
            if choice.detokenizer.stopped:
                reason = "stop"
        if constraint is not None and constraint.complete:
            reason = "stop"
        if reason is None and len(ids) >= prompt.max_tokens:
            reason = "length"
        self.seq = seq = self.seq + 1
        self._taken.append((seq, index, token, text, reason))
        if reason is None:
            return False
        choice.finish_reason = reason
        return True

    def events(self) -> list[Event]:
        """What is to be published since the last call: the first event of this attempt, then one for each
        token taken, with a `finish_reason` when it was its choice's last."""
        events, self._untold = self._untold, []
        taken, self._taken = self._taken, []
        return events + [self._event(*one) for one in taken]

    def end(self, kind: TerminalType, error: dict[str, object] | None = None) -> Event:
        """The terminal event, with the usage so far; it comes after those of `events`."""
        reason = self._choices[0].finish_reason if kind == "done" else None
        return terminal_event(
            self.job_id, self._next(), kind, finish_reason=reason, usage=self.usage(), error=error
        )

    def found_cached(self, tokens: int | None) -> None:
        """Note how many of a choice's tokens were cached when it started. Of several choices the one that
        found least counts: the others find what it computed."""
        if tokens is not None:
            known = len(self.prompt.token_ids) if self._cached is None else self._cached
            self._cached = min(known, tokens)

    def usage(self) -> dict[str, Any]:
        completion = sum(len(choice.ids) for choice in self._choices)
        return usage_of(len(self.prompt.token_ids), completion, self._cached)

    def generated(self, index: int) -> int:
        """Tokens that a choice has, those of earlier attempts included."""
        return len(self._choices[index].ids)

    def result(self, model: str, created_s: int, fingerprint: str | None = None) -> dict[str, object]:
        """The job's result, in OpenAI's form. Call it after `events`, which makes the text."""
        with_logprobs = self.body.logprobs is not None
        echoed = prompt_text(self.body, self._tokenizer) if self.body.echo else ""
        choices = [
            ChoiceResult(echoed + "".join(c.text), c.finish_reason, c.logprobs if with_logprobs else None)
            for c in self._best()
        ]
        return result_object(
            self.job_id, self.body, model, created_s, choices, self.usage(), fingerprint=fingerprint
        )

    def _best(self) -> list[_Choice]:
        """The choices that the result has: with `best_of`, the likeliest, by the mean of their tokens."""
        if self.body.sequences == self.body.n:
            return self._choices
        return sorted(self._choices, key=_Choice.likelihood, reverse=True)[: self.body.n]

    def _event(
        self, seq: int, index: int, token: SampledToken, text: str | None, reason: FinishReason | None
    ) -> Event:
        choice = self._choices[index]
        if text is None:
            text = choice.detokenizer.push(token.id)
        if reason is not None:
            text += choice.detokenizer.flush()
        choice.text.append(text)
        if reason is not None and self._use is not None and read_answer("".join(choice.text)).called:
            choice.finish_reason = reason = "tool_calls"
        entries = None
        if self._sampling.logprobs is not None:
            entries = [self._logprob_entry(token)]
            choice.logprobs += entries
        return token_event(self.job_id, seq, index, text, [token.id], entries, reason)

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _replay(self, event: Event) -> None:
        self.seq = event["seq"]
        if event["type"] != "token":
            return
        choice = self._choices[event["index"]]
        choice.ids += event["token_ids"]
        choice.text.append(event["text"])
        choice.logprobs += event.get("logprobs", [])
        choice.finish_reason = event.get("finish_reason")
        for token_id in event["token_ids"]:
            # What it returns is in the event already; what matters is what it holds back.
            choice.detokenizer.push(token_id)

    def _sampling_state(self, index: int, generated: list[int]) -> SamplingState:
        seed = choice_seed(self._seed, index)
        constraint = self._choices[index].constraint = self._constrain() if self._constrain else None
        return SamplingState(self._sampling, seed, self.prompt.token_ids, generated, constraint)

    def _logprob_entry(self, token: SampledToken) -> dict[str, object]:
        spell = self._tokenizer.piece_bytes
        top = [(spell(token_id), logprob) for token_id, logprob in token.top]
        assert token.logprob is not None
        return logprob_entry(spell(token.id), token.logprob, top)
