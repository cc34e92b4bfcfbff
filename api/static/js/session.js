/** What survives a reload of this tab: the conversation, its parameters, and how far each answer has come. */

const NAME = "wicore.playground";
const EVERY_MS = 400;

const FRESH = { mode: null, messages: [], prompt: "", completion: null, parameters: {} };

export class Session {
  #timer = null;

  constructor() {
    this.state = { ...structuredClone(FRESH), ...read() };
    addEventListener("pagehide", () => this.#write());
  }

  /** Store the state soon. Text and sequence number are written together, so that they always match. */
  save() {
    this.#timer ??= setTimeout(() => this.#write(), EVERY_MS);
  }

  #write() {
    clearTimeout(this.#timer);
    this.#timer = null;
    for (const left of [[], ["tokens"], ["tokens", "images"]]) {
      try {
        sessionStorage.setItem(
          NAME,
          JSON.stringify(this.state, (name, value) => (left.includes(name) ? undefined : value)),
        );
        return;
      } catch {
        // Full: leave out what takes most room and can best be missed.
      }
    }
  }
}

function read() {
  try {
    return JSON.parse(sessionStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}
