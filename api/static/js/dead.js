/** Messages that were given up: look, try again, drop. */

import { call } from "./api.js";
import { announce } from "./announcer.js";
import { confirm, showJob } from "./dialogs.js";
import { button, h, keepOrder, setText } from "./dom.js";
import { clock, shortId } from "./format.js";

const EVERY_MS = 4000;
const SHOWN = 50;

export class DeadLetters {
  #timer = null;
  #lines = new Map(); // by letter's id

  constructor() {
    this.total = h("span", { class: "unit" });
    this.remark = h("p", { class: "hint", hidden: true });
    this.nothing = h("p", { class: "nothing" }, "Loading");
    this.list = h("ul", { class: "letters" });
    this.dropAll = button("Drop all", { class: "quiet", hidden: true, on: { click: () => this.#dropAll() } });
    this.element = h(
      "section",
      { class: "card dead-card" },
      h("header", {}, h("h2", {}, "Dead letters"), this.total, this.dropAll),
      this.remark,
      this.nothing,
      this.list,
    );
  }

  /** Look from time to time, or stop to. */
  watch(watched) {
    clearInterval(this.#timer);
    if (!watched) return;
    this.#look();
    this.#timer = setInterval(() => document.hidden || this.#look(), EVERY_MS);
  }

  async #look() {
    try {
      const { data, has_more: more } = await call(`v1/dead?limit=${SHOWN}`);
      for (const letter of data)
        if (!this.#lines.has(letter.id)) this.#lines.set(letter.id, this.#line(letter));
      const shown = data.map((letter) => letter.id);
      for (const id of this.#lines.keys()) if (!shown.includes(id)) this.#lines.delete(id);
      keepOrder(
        this.list,
        data.map((letter) => this.#lines.get(letter.id)),
      );
      setText(this.nothing, "None: no job was given up.");
      this.nothing.hidden = data.length > 0;
      this.dropAll.hidden = data.length < 2;
      setText(this.total, data.length > 0 ? `${data.length}${more ? " newest" : ""}` : "");
    } catch (error) {
      this.nothing.hidden = false;
      setText(this.nothing, error.status === 403 ? "Shown to operators only." : error.message);
    }
  }

  #line(letter) {
    const retry = button("Try again", { icon: "again", on: { click: () => this.#retry(letter, retry) } });
    const drop = button("Drop", { icon: "trash", class: "quiet", on: { click: () => this.#drop(letter) } });
    return h(
      "li",
      { class: "letter" },
      h(
        "div",
        { class: "letter-what" },
        h("p", {}, letter.reason),
        h(
          "p",
          { class: "hint" },
          `${clock(letter.at_ms)} · ${letter.priority ?? "unknown level"}`,
          letter.job && [
            " · ",
            h(
              "button",
              { type: "button", class: "link mono", on: { click: () => showJob(letter.job) } },
              `job ${shortId(letter.job)}`,
            ),
          ],
        ),
        h("details", {}, h("summary", {}, "Message"), h("pre", { class: "record" }, letter.message)),
      ),
      h("div", { class: "row" }, retry, drop),
    );
  }

  async #retry(letter, pressed) {
    pressed.disabled = true;
    await this.#act(async () => {
      const job = await call(`v1/dead/${letter.id}/retry`, { method: "POST" });
      this.#say(`Queued again as job ${shortId(job.id)}.`);
    });
    pressed.disabled = false;
  }

  async #drop(letter) {
    if (!(await confirm("Drop this letter?", "Its message is lost for good.", "Drop"))) return;
    await this.#act(() => call(`v1/dead/${letter.id}`, { method: "DELETE" }));
  }

  async #dropAll() {
    if (
      !(await confirm(
        "Drop all letters?",
        "Their messages are lost for good, those not shown here, too.",
        "Drop all",
      ))
    )
      return;
    await this.#act(() => call("v1/dead", { method: "DELETE" }));
  }

  async #act(action) {
    this.remark.hidden = true;
    try {
      await action();
    } catch (error) {
      this.#say(error.message);
    }
    await this.#look();
  }

  #say(text) {
    this.remark.hidden = false;
    setText(this.remark, text);
    announce(text);
  }
}
