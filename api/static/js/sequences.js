/** What runs now: a row for each sequence, which grows with every token. */

import { showJob } from "./dialogs.js";
import { h, keepOrder, setText } from "./dom.js";
import { count, duration, shortId } from "./format.js";
import { JobStream, isTerminal } from "./stream.js";

const SHOWN = 64;
const FOLLOWED = 24; // jobs whose tokens are shown as they come; the others move with each heartbeat
const BACK = 40; // tokens before now whose text a row begins with
const TAIL = 240; // characters
const LINGER_MS = 1200; // an ended row stays so long

export class Sequences {
  #rows = new Map(); // by job and index
  #stream = new JobStream();
  #followed = new Set();

  constructor() {
    this.list = h("ul", { class: "sequences" });
    this.none = h("p", { class: "nothing" }, "Nothing runs.");
    this.more = h("p", { class: "hint", hidden: true });
    this.total = h("span", { class: "unit" });
    this.element = h(
      "section",
      { class: "card running-card" },
      h("header", {}, h("h2", {}, "Running"), this.total),
      this.none,
      this.list,
      this.more,
    );
  }

  /** Take a `/status` in. */
  take(status, now) {
    const sequences = status.workers.flatMap((worker) =>
      (worker.sequences ?? []).map((one) => ({ ...one, worker: worker.id })),
    );
    sequences.sort((a, b) => a.waits - b.waits);
    const slots = status.workers.reduce((sum, worker) => sum + worker.slots, 0);
    const seen = new Set();
    for (const sequence of sequences.slice(0, SHOWN)) {
      const key = `${sequence.job} ${sequence.index}`;
      seen.add(key);
      if (!this.#rows.has(key)) this.#rows.set(key, new Row(sequence));
      this.#rows.get(key).take(sequence, now);
      this.#follow(sequence);
    }
    for (const [key, row] of this.#rows) if (!seen.has(key)) this.#leave(key, row);
    const left = sequences.length - SHOWN;
    this.more.hidden = left <= 0;
    setText(this.more, `and ${left} more`);
    setText(this.total, slots > 0 ? `${sequences.filter((one) => !one.waits).length} of ${slots} slots` : "");
    this.#draw();
  }

  /** Nobody looks any more. */
  rest() {
    this.#stream.close();
    this.#followed.clear();
    this.#rows.clear();
    this.#draw();
  }

  #follow({ job, tokens }) {
    if (this.#followed.has(job) || this.#followed.size >= FOLLOWED) return;
    this.#followed.add(job);
    const end = (status) => {
      this.#followed.delete(job);
      for (const [key, row] of this.#rowsOf(job)) {
        row.end(status);
        this.#leave(key, row);
      }
    };
    const take = (event) => {
      if (isTerminal(event)) return end(event.type);
      const alone = this.#rowsOf(job).length === 1;
      if (event.type === "token") this.#rows.get(`${job} ${event.index}`)?.takeToken(event, alone);
    };
    // Jobs of others may be hidden from this key: their rows move with the heartbeats alone.
    this.#stream.follow(job, Math.max(1, tokens - BACK), take, () => {});
  }

  /** [key, row] pairs. */
  #rowsOf(job) {
    return [...this.#rows].filter(([, row]) => row.job === job);
  }

  #leave(key, row) {
    if (row.leaving) return;
    row.leaving = true;
    row.element.classList.add("ended");
    setTimeout(() => {
      if (this.#rows.get(key) === row) this.#rows.delete(key);
      if (this.#rowsOf(row.job).length === 0) this.#followed.delete(row.job);
      this.#draw();
    }, LINGER_MS);
  }

  #draw() {
    const rows = [...this.#rows.values()].sort((a, b) => a.waits - b.waits);
    keepOrder(
      this.list,
      rows.map((row) => row.element),
    );
    this.none.hidden = this.#rows.size > 0;
  }
}

class Row {
  leaving = false;
  waits = false;
  #tokens = 0;
  #text = "";
  #drawing = false;

  constructor({ job, priority, prompt_tokens: prompt, max_tokens: most, attempt }) {
    Object.assign(this, { job, prompt, most, attempt });
    this.text = h("span", { class: "tail" });
    this.figures = h("span", { class: "row-figures" });
    this.age = h("span", { class: "row-age" });
    this.promptBar = h("i", { class: "prompt" });
    this.answerBar = h("i", { class: "answer-part" });
    this.element = h(
      "li",
      { class: "sequence" },
      h("span", { class: "level", data: { level: priority } }, priority),
      h(
        "button",
        {
          type: "button",
          class: "link mono",
          title: `Job ${job}`,
          "aria-haspopup": "dialog",
          on: { click: () => showJob(job) },
        },
        shortId(job),
      ),
      h("span", { class: "tail-box" }, this.text),
      this.figures,
      this.age,
      h("span", { class: "growth", "aria-hidden": "true" }, this.promptBar, this.answerBar),
    );
  }

  take({ tokens, attempt, waits, started_ms: started }, now) {
    this.attempt = attempt;
    this.waits = waits;
    this.element.classList.toggle("waits", waits);
    this.#tokens = Math.max(tokens, this.#tokens);
    setText(this.age, duration((now - started) / 1000));
    this.#draw();
  }

  /** `alone`: the job has no other choice, so that its event numbers count the tokens of this one. */
  takeToken({ seq, text }, alone) {
    if (alone) this.#tokens = Math.max(this.#tokens, seq - this.attempt);
    this.#text = (this.#text + text.replaceAll("\n", " ")).slice(-TAIL);
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
    });
  }

  end(status) {
    setText(this.age, status);
  }

  #draw() {
    const all = this.prompt + this.most;
    setText(this.text, this.#text);
    const remark = this.waits ? "gives way · " : this.attempt > 1 ? `attempt ${this.attempt} · ` : "";
    setText(this.figures, `${remark}${count(this.#tokens)} of ${count(this.most)}`);
    this.figures.title = `${count(this.prompt)} tokens of prompt, ${count(this.#tokens)} of at most ${count(this.most)} of answer`;
    this.promptBar.style.width = `${(100 * this.prompt) / all}%`;
    this.answerBar.style.width = `${(100 * this.#tokens) / all}%`;
  }
}
