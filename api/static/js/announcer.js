/** Says things to screen readers, politely: streamed text by the sentence, a few seconds apart. */

import { byId } from "./dom.js";

const APART_MS = 4000;

export function announce(text) {
  byId("announcer").textContent = text;
}

/** Collects streamed text and announces it as far as its last finished sentence. */
export class Reader {
  #text = "";
  #last = 0;

  add(text) {
    this.#text += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => this.#text.lastIndexOf(mark)));
    if (end < 0 || Date.now() - this.#last < APART_MS) return;
    announce(this.#text.slice(0, end + 1));
    this.#text = this.#text.slice(end + 1);
    this.#last = Date.now();
  }

  /** Announce what is left, and `remark`. */
  finish(remark) {
    announce(`${this.#text} ${remark}`.trim());
    this.#text = "";
  }
}
