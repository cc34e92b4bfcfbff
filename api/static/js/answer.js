/** An answer on the page: its text as it comes, coloured by probability if asked, and what it took. */

import { Reader } from "./announcer.js";
import { showJob } from "./dialogs.js";
import { button, h, icon, setText } from "./dom.js";
import { count, rate, seconds, shortId } from "./format.js";
import { isRunning, tokenRate } from "./run.js";
import { paintTokens } from "./tokens.js";

const COPIED_MS = 1500;

export class AnswerView {
  #shownText = 0;
  #shownTokens = 0;
  #drawing = false;
  #wasRunning;
  #reader = new Reader();

  /** `actions` are buttons for when it has ended. */
  constructor(answer, { actions = [], label = "Answer" } = {}) {
    this.answer = answer;
    this.#wasRunning = isRunning(answer);
    this.text = h("div", { class: "answer-text", data: { testid: "answer" } });
    this.waiting = h("p", { class: "waiting" });
    this.problem = h("p", { class: "problem", hidden: true });
    this.figures = h("span", { class: "figures" });
    this.job = h("button", {
      type: "button",
      class: "link mono",
      hidden: true,
      "aria-haspopup": "dialog",
      on: { click: () => showJob(answer.job) },
    });
    this.copy = button("Copy", {
      icon: "copy",
      small: true,
      class: "icon-button needs-text",
      on: { click: () => this.#copy() },
    });
    this.actions = h("span", { class: "actions" }, this.copy, actions);
    this.element = h(
      "article",
      { class: "answer", "aria-label": label },
      this.text,
      this.waiting,
      this.problem,
      h("footer", { class: "meta" }, this.figures, this.job, this.actions),
    );
    this.#draw();
  }

  /** Show what has changed; any number of calls make one drawing a frame. */
  update() {
    if (this.#drawing) return;
    this.#drawing = true;
    // Without a frame (the tab is hidden) the text must still be there when somebody looks.
    const draw = () => {
      if (!this.#drawing) return;
      this.#drawing = false;
      this.#draw();
    };
    if (document.hidden) setTimeout(draw, 250);
    else requestAnimationFrame(draw);
  }

  #draw() {
    const { answer } = this;
    const running = isRunning(answer);
    this.element.dataset.status = answer.status;
    this.text.setAttribute("aria-busy", String(running));
    this.#drawText();
    this.waiting.hidden = !running || answer.count > 0;
    setText(this.waiting, waitingText(answer));
    this.problem.hidden = answer.status !== "failed" && answer.status !== "expired";
    if (!this.problem.hidden) setText(this.problem, answer.error?.message ?? "The job did not finish.");
    setText(this.figures, figures(answer));
    this.job.hidden = answer.job === null;
    if (answer.job !== null && this.job.title === "") {
      this.job.title = `Job ${answer.job}: record and links`;
      this.job.textContent = `job ${shortId(answer.job)}`;
      this.job.dataset.job = answer.job;
    }
    this.actions.hidden = running;
    if (this.#wasRunning && !running) this.#reader.finish(endingText(answer));
    this.#wasRunning = running;
  }

  #drawText() {
    const { answer } = this;
    const fresh = answer.text.slice(this.#shownText);
    this.#shownText = answer.text.length;
    if (answer.tokens) {
      paintTokens(this.text, answer.tokens.slice(this.#shownTokens));
      this.#shownTokens = answer.tokens.length;
    } else if (fresh !== "") {
      if (this.text.lastChild === null) this.text.append(fresh);
      else this.text.lastChild.appendData(fresh);
    }
    if (fresh !== "" && isRunning(answer)) this.#reader.add(fresh);
  }

  async #copy() {
    await copyText(this.answer.text);
    this.copy.replaceChildren(icon("check"));
    setTimeout(() => this.copy.replaceChildren(icon("copy")), COPIED_MS);
  }
}

function waitingText({ status, position, error, attempt }) {
  if (status === "sending") return error?.message ?? "Sending";
  if (status === "running") return attempt > 1 ? "Another worker goes on with it" : "Reading the prompt";
  return position > 0 ? `Queued; ${count(position)} ahead` : "Queued";
}

function figures(answer) {
  const parts = [];
  if (answer.count > 0) parts.push(`${count(answer.count)} ${answer.count === 1 ? "token" : "tokens"}`);
  if (tokenRate(answer) !== null) parts.push(`${rate(tokenRate(answer))} tok/s`);
  if (answer.first_ms !== undefined)
    parts.push(`first after ${seconds((answer.first_ms - answer.asked_ms) / 1000)}`);
  if (answer.attempt > 1) parts.push(`attempt ${answer.attempt}`);
  if (answer.stopping) parts.push("stopping");
  else if (answer.status === "cancelled") parts.push("stopped");
  else if (answer.finish === "length") parts.push("cut at max tokens");
  return parts.join(" · ");
}

function endingText(answer) {
  if (answer.status === "done") return `Answer complete, ${answer.count} tokens.`;
  if (answer.status === "cancelled") return "Stopped.";
  return `Failed: ${answer.error?.message ?? "the job did not finish"}`;
}

/** To the clipboard, also where the page may not use the newer interface (plain HTTP from another machine). */
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
