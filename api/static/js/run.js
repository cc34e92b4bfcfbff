/**
 * One job, from its submit to its terminal event, through reloads, lost networks and restarted servers.
 *
 * All that is known of it is in a plain object, an answer, which the session stores:
 *   body, key     what to submit, under which Idempotency-Key, so that a repeat makes no second job; no body
 *                 once it is accepted, as the tab's storage is small and a chat's images are in every body
 *   job, next     its id once accepted, and the number of the first event not in `text`
 *   status        sending, queued, running, then done, failed, cancelled or expired
 *   text, tokens  the text; with logprobs also [text, entry] of each event
 *   count, asked_ms, first_ms, last_ms   tokens, and when: submitted, first token, last token
 *   position, attempt, finish, usage, error, stopping
 */

import { call, randomId } from "./api.js";
import { isTerminal } from "./stream.js";

const PAUSES_MS = [500, 1000, 2000, 4000];

export const newAnswer = (body) => ({
  body,
  key: randomId(),
  job: null,
  next: 1,
  status: "sending",
  text: "",
  tokens: body.logprobs === undefined ? null : [],
  count: 0,
  asked_ms: Date.now(),
});

export const isRunning = (answer) => ["sending", "queued", "running"].includes(answer.status);

/** Tokens a second since the first one; null before there are two. */
export function tokenRate(answer) {
  return answer.count > 1
    ? (answer.count - 1) / Math.max(0.001, (answer.last_ms - answer.first_ms) / 1000)
    : null;
}

/** Carry an answer on from wherever it is. `onChange` is called after every change of it. */
export class Run {
  #stream;
  #onChange;

  constructor(answer, stream, onChange) {
    this.answer = answer;
    this.#stream = stream;
    this.#onChange = onChange;
    if (answer.job === null) this.#submit();
    else this.#follow();
  }

  /** Cancel the job; its last event says that it has ended. */
  async stop() {
    const { answer } = this;
    answer.stopping = true;
    this.#onChange();
    for (let attempt = 0; answer.job !== null && isRunning(answer); attempt++) {
      try {
        await call(`v1/jobs/${answer.job}`, { method: "DELETE" });
        return;
      } catch (error) {
        if (!error.transient) return this.#fail(error);
        await pause(attempt);
      }
    }
  }

  async #submit() {
    const { answer } = this;
    for (let attempt = 0; ; attempt++) {
      if (answer.stopping) return this.#end("cancelled");
      try {
        const headers = { "Idempotency-Key": answer.key };
        const accepted = await call("v1/jobs", { method: "POST", body: answer.body, headers });
        Object.assign(answer, {
          job: accepted.id,
          position: accepted.position,
          status: "queued",
          error: null,
        });
        delete answer.body;
        break;
      } catch (error) {
        if (!error.transient) return this.#fail(error);
        answer.error = { message: `${error.message}. Trying again.` };
        this.#onChange();
        await pause(attempt);
      }
    }
    this.#onChange();
    if (answer.stopping) this.stop();
    this.#follow();
  }

  #follow() {
    this.#stream.follow(
      this.answer.job,
      this.answer.next,
      (event) => this.#take(event),
      (error) => this.#fail(error),
    );
  }

  #take(event) {
    const { answer } = this;
    answer.next = event.seq + 1;
    if (event.type === "token") this.#takeToken(event);
    else if (isTerminal(event)) {
      Object.assign(answer, { finish: event.finish_reason, usage: event.usage, error: event.error ?? null });
      return this.#end(event.type);
    } else {
      answer.status = "running";
      answer.attempt = event.attempt;
    }
    this.#onChange();
  }

  #takeToken({ text, token_ids: ids, logprobs }) {
    const { answer } = this;
    answer.status = "running";
    answer.text += text;
    answer.count += ids.length;
    answer.last_ms = Date.now();
    answer.first_ms ??= answer.last_ms;
    answer.tokens?.push([text, logprobs === undefined ? null : compact(logprobs[0])]);
  }

  #fail({ message, code, param }) {
    this.answer.error = { message, code, param };
    this.#end("failed");
  }

  #end(status) {
    this.answer.status = status;
    this.answer.stopping = false;
    this.#onChange();
  }
}

/** [token, logprob, [[token, logprob], ...]] */
function compact({ token, logprob, top_logprobs: top }) {
  return [token, logprob, top.map((other) => [other.token, other.logprob])];
}

function pause(attempt) {
  return new Promise((resolve) => setTimeout(resolve, PAUSES_MS[Math.min(attempt, PAUSES_MS.length - 1)]));
}
