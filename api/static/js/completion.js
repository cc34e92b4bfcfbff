/** The completion: a text, and how the model goes on. */

import { button, h, icon, keepOrder } from "./dom.js";

const EXAMPLES = [
  "Once upon a time in a small village,",
  "The three laws of thermodynamics are",
  "def quicksort(items):",
];

/** `host` is what playground.js lets a pane do. */
export class Completion {
  #host;

  constructor(host) {
    this.#host = host;
    this.input = h("textarea", {
      id: "completion-input",
      rows: 5,
      placeholder: "Text to be continued",
      on: {
        input: () => ((host.state.prompt = this.input.value), host.save()),
        keydown: (event) => {
          if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
          event.preventDefault();
          if (!host.running()) this.#runOrStop();
        },
      },
    });
    this.input.value = host.state.prompt;
    this.run = h("button", { type: "button", class: "primary", on: { click: () => this.#runOrStop() } });
    this.examples = h(
      "div",
      { class: "examples" },
      EXAMPLES.map((text) =>
        h("button", { type: "button", class: "example", on: { click: () => this.#try(text) } }, text),
      ),
    );
    this.output = h("div", { class: "output" });
    this.element = h(
      "div",
      { class: "pane" },
      h(
        "div",
        { class: "scroller" },
        h("label", { class: "pane-label", for: this.input.id }, "Prompt"),
        this.input,
        h(
          "div",
          { class: "row run-line" },
          this.run,
          h("span", { class: "hint" }, h("kbd", {}, "Ctrl"), " ", h("kbd", {}, "Enter")),
        ),
        this.examples,
        this.output,
      ),
    );
  }

  focusInput() {
    this.input.focus();
  }

  clear() {
    this.#host.stop();
    Object.assign(this.#host.state, { prompt: "", completion: null });
    this.input.value = "";
    this.#host.save();
    this.update();
  }

  update() {
    const { completion } = this.#host.state;
    this.examples.hidden = completion !== null || this.input.value !== "";
    keepOrder(this.output, completion === null ? [] : [this.#view(completion).element]);
    const running = this.#host.running();
    if (this.run.dataset.stop === String(running)) return;
    this.run.dataset.stop = running;
    this.run.replaceChildren(
      icon(running ? "stop" : "more"),
      h("span", {}, running ? "Stop" : "Continue text"),
    );
  }

  #view(answer) {
    const more = button("Take over and go on", {
      icon: "more",
      small: true,
      class: "icon-button needs-text",
      on: { click: () => this.#takeOver(answer) },
    });
    const again = button("Again", {
      icon: "again",
      small: true,
      class: "icon-button",
      on: { click: () => this.#runOrStop() },
    });
    return this.#host.view(answer, { actions: [again, more], label: "Continuation" });
  }

  #try(text) {
    this.input.value = this.#host.state.prompt = text;
    this.#runOrStop();
  }

  /** Add the continuation to the prompt, and ask for more. */
  #takeOver(answer) {
    this.#try(this.input.value + answer.text);
  }

  #runOrStop() {
    const { state } = this.#host;
    if (this.#host.stop()) return;
    if (state.prompt === "") return this.input.focus();
    state.completion = this.#host.ask({ kind: "completion", prompt: state.prompt });
    this.#host.save();
    this.update();
  }
}
