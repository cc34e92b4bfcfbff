/** The chat: turns, of which each can be edited or asked again, and the composer. */

import { button, h, icon, keepOrder } from "./dom.js";
import { Images } from "./images.js";

const EXAMPLES = [
  "Explain what a message queue is to a ten-year-old.",
  "Write a haiku about waiting in line.",
  "Name three uses of a paper clip, with a reason each.",
];
const NEAR_END = 120; // pixels from the end within which the view follows the text

/**
 * One message is {role, text, images?} or {role: "assistant", answer}. `host` is what playground.js lets a pane do.
 */
export class Chat {
  #host;
  #elements = new WeakMap();
  #talks = true;

  constructor(host) {
    this.#host = host;
    this.turns = h("div", { class: "turns" });
    this.empty = h("div", { class: "empty" });
    this.input = h("textarea", {
      id: "chat-input",
      rows: 1,
      placeholder: "Message",
      "aria-label": "Message",
      enterkeyhint: "send",
      on: {
        input: () => this.#grow(),
        keydown: (event) => this.#key(event),
        paste: (event) => this.images.takeFrom(event),
      },
    });
    this.images = new Images(() => host.state.messages.flatMap((message) => message.images ?? []).length);
    this.send = h("button", {
      type: "button",
      class: "primary round",
      on: { click: () => this.#sendOrStop() },
    });
    this.scroller = h("div", { class: "scroller", tabindex: -1 }, this.empty, this.turns);
    this.element = h(
      "div",
      {
        class: "pane",
        on: {
          // Else the browser would open what is dropped.
          dragover: (event) => event.dataTransfer.types.includes("Files") && event.preventDefault(),
          drop: (event) => event.dataTransfer.files.length > 0 && this.#drop(event),
        },
      },
      this.scroller,
      h(
        "div",
        { class: "composer" },
        this.images.problem,
        this.images.element,
        h(
          "div",
          { class: "composer-line" },
          this.images.button,
          this.images.input,
          this.input,
          this.send,
        ),
      ),
    );
  }

  /** `images`: the limits of images, or null if the model takes none. */
  setModel({ talks, images }) {
    this.#talks = talks;
    this.images.allow(images);
    this.update();
  }

  focusInput() {
    this.input.focus();
  }

  clear() {
    this.#host.stop();
    this.#host.state.messages = [];
    this.#changed();
  }

  update() {
    const { messages } = this.#host.state;
    const follow =
      this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < NEAR_END;
    keepOrder(
      this.turns,
      messages.map((message) => this.#element(message)),
    );
    this.empty.hidden = messages.length > 0;
    if (messages.length === 0) this.#drawEmpty();
    this.#drawSend();
    if (follow) requestAnimationFrame(() => (this.scroller.scrollTop = this.scroller.scrollHeight));
  }

  #drawEmpty() {
    if (this.empty.dataset.talks === String(this.#talks)) return;
    this.empty.dataset.talks = this.#talks;
    const examples = EXAMPLES.map((text) =>
      h("button", { type: "button", class: "example", on: { click: () => this.#submit(text, []) } }, text),
    );
    const remark = this.#talks
      ? "Every answer is a job on the queue: reload this page, or close the lid, and it goes on."
      : "If this is a base model, it was not trained to chat: it continues text, for which there is Completion.";
    this.empty.replaceChildren(
      h("h2", {}, "Ask something"),
      h("p", {}, remark),
      h("div", { class: "examples" }, examples),
    );
  }

  #drawSend() {
    const running = this.#host.running();
    if (this.send.dataset.stop === String(running)) return;
    this.send.dataset.stop = running;
    this.send.replaceChildren(icon(running ? "stop" : "send"));
    this.send.setAttribute("aria-label", running ? "Stop" : "Send");
    this.send.title = running ? "Stop (Esc)" : "Send (Enter)";
  }

  #element(message) {
    if (!this.#elements.has(message)) {
      this.#elements.set(message, message.role === "user" ? this.#question(message) : this.#answer(message));
    }
    return this.#elements.get(message);
  }

  #question(message) {
    const edit = button("Edit", {
      icon: "edit",
      small: true,
      class: "icon-button",
      on: { click: () => this.#edit(message) },
    });
    return h(
      "article",
      { class: "question", "aria-label": "You" },
      message.images?.length > 0 &&
        h(
          "div",
          { class: "question-images" },
          message.images.map((url) => h("img", { src: url, alt: "Attached image" })),
        ),
      h("div", { class: "question-text" }, message.text),
      edit,
    );
  }

  #answer(message) {
    const again = button("Ask again", {
      icon: "again",
      small: true,
      class: "icon-button",
      on: { click: () => this.#again(message) },
    });
    return this.#host.view(message.answer, { actions: [again] }).element;
  }

  /** Turn a question into a form; sending it leaves out all that came after. */
  #edit(message) {
    const element = this.#elements.get(message);
    const area = h("textarea", {
      "aria-label": "Edit message",
      rows: Math.min(8, message.text.split("\n").length + 1),
    });
    area.value = message.text;
    const cancel = () => {
      form.replaceWith(element);
      element.querySelector("button").focus();
    };
    const submit = () => {
      form.replaceWith(element);
      if (this.#cutBefore(message)) this.#submit(area.value, message.images ?? []);
    };
    const form = h(
      "form",
      {
        class: "editing",
        on: {
          submit: (event) => (event.preventDefault(), submit()),
          keydown: (event) => {
            if (event.key === "Escape") (event.stopPropagation(), cancel());
            else if (isSend(event)) (event.preventDefault(), submit());
          },
        },
      },
      area,
      h(
        "div",
        { class: "row end" },
        button("Cancel", { class: "quiet", on: { click: cancel } }),
        h("button", { type: "submit", class: "primary" }, "Send"),
      ),
    );
    element.replaceWith(form);
    area.focus();
  }

  #again(message) {
    if (this.#cutBefore(message)) this.#askModel();
  }

  /** Take off this message and all after it; false while something runs. */
  #cutBefore(message) {
    if (this.#host.running()) return false;
    const { state } = this.#host;
    state.messages = state.messages.slice(0, state.messages.indexOf(message));
    return true;
  }

  #drop(event) {
    event.preventDefault();
    this.images.takeFrom(event);
    this.focusInput();
  }

  #key(event) {
    if (!isSend(event)) return;
    event.preventDefault();
    if (!this.#host.running()) this.#sendOrStop();
  }

  #sendOrStop() {
    if (this.#host.stop()) return;
    const text = this.input.value;
    if (text.trim() === "" && this.images.urls.length === 0) return this.input.focus();
    this.input.value = "";
    this.#grow();
    this.#submit(text, this.images.take());
  }

  #submit(text, images) {
    if (this.#host.running()) return;
    this.#host.state.messages.push({ role: "user", text, ...(images.length > 0 ? { images } : {}) });
    this.#askModel();
  }

  #askModel() {
    const { state } = this.#host;
    const messages = state.messages
      .filter((message) => message.role === "user" || message.answer.text !== "")
      .map(asSent);
    const system = this.#host.system();
    if (system !== "") messages.unshift({ role: "system", content: system });
    state.messages.push({ role: "assistant", answer: this.#host.ask({ kind: "chat", messages }) });
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#changed();
  }

  #changed() {
    this.#host.save();
    this.update();
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight, 200)}px`;
  }
}

/** Enter sends, with Shift it breaks the line; not while an input method composes. */
function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function asSent({ role, text, images, answer }) {
  if (role === "assistant") return { role, content: answer.text };
  if (images === undefined) return { role, content: text };
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: text.trim() === "" ? parts : [...parts, { type: "text", text }] };
}
