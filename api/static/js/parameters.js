/** The form of parameters: what is asked of the model besides the text. */

import { button, h, icon } from "./dom.js";

/** Fields of a job's body; what equals `off` is not sent. `slider`: both ends matter more than the digits. */
const NUMBERS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    off: 1,
    slider: true,
    hint: "0 takes the likeliest token",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0.01,
    max: 1,
    step: 0.01,
    off: 1,
    slider: true,
    hint: "Likeliest tokens up to this probability",
  },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 1,
    step: 0.01,
    off: 0,
    slider: true,
    hint: "Least share of the likeliest token",
  },
  { name: "top_k", label: "Top k", min: 0, step: 1, off: 0, hint: "0 is off" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, off: null, start: 256 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, off: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, off: 0 },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.05,
    max: 10,
    step: 0.05,
    off: 1,
    hint: "1 is off",
  },
  {
    name: "seed",
    label: "Seed",
    max: Number.MAX_SAFE_INTEGER,
    step: 1,
    off: null,
    start: "",
    placeholder: "random",
  },
];
const PRIORITIES = ["interactive", "normal", "batch", "background"];
const ALTERNATIVES = 5;

export class Parameters {
  #values;
  #inputs = new Map();
  #onChange;

  /** Fill `root` with the form over `values`, which it keeps up to date; `onChange` after every edit. */
  constructor(root, values, onChange) {
    this.#values = values;
    this.#onChange = onChange;
    this.#render(root);
  }

  /** The fields for a job's body. Values out of bounds go along: the API says what is wrong with them. */
  body() {
    const body = { priority: this.#values.priority ?? PRIORITIES[0] };
    for (const { name, off, start = off } of NUMBERS) {
      const value = this.#values[name] ?? start;
      if (value !== "" && value !== null && value !== off) body[name] = Number(value);
    }
    const stop = (this.#values.stop ?? "")
      .split("\n")
      .filter((line) => line !== "")
      .map(unescape);
    if (stop.length > 0) body.stop = stop;
    if (this.#values.logprobs) body.logprobs = ALTERNATIVES;
    return body;
  }

  get system() {
    return (this.#values.system ?? "").trim();
  }

  setMode(mode) {
    this.#inputs.get("system").closest(".field").hidden = mode !== "chat";
  }

  /** Mark the field that the API refused; null clears the mark. */
  showError(error) {
    for (const input of this.#inputs.values()) {
      input.removeAttribute("aria-invalid");
      input.closest(".field").querySelector(".field-error")?.remove();
    }
    const input = this.#inputs.get(error?.param?.split(".")[0]);
    if (input === undefined) return;
    const id = `${input.id}-error`;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", id);
    input.closest(".field").append(h("p", { id, class: "field-error" }, error.message));
  }

  #render(root) {
    const numbers = NUMBERS.map((field) => this.#number(field));
    root.replaceChildren(
      h(
        "details",
        { class: "parameters-panel", open: matchMedia("(min-width: 60rem)").matches },
        h("summary", {}, icon("sliders"), h("span", {}, "Parameters")),
        h(
          "form",
          { class: "fields", on: { submit: (event) => event.preventDefault() } },
          this.#area("system", "System prompt", { rows: 2, placeholder: "Set before the first turn" }),
          numbers.slice(0, 3),
          h("div", { class: "field-grid" }, numbers.slice(3)),
          this.#area("stop", "Stop strings", { rows: 2, placeholder: "One a line; \\n for a line break" }),
          this.#priority(),
          this.#logprobs(),
          button("Reset to defaults", { class: "quiet", on: { click: () => this.#reset(root) } }),
        ),
      ),
    );
  }

  #number({ name, label, hint, off, start = off, slider = false, placeholder, ...bounds }) {
    const id = `parameter-${name}`;
    const value = this.#values[name] ?? start ?? "";
    const input = h("input", { id, type: "number", inputmode: "decimal", placeholder, ...bounds, value });
    const range = slider && h("input", { type: "range", "aria-label": `${label}, slider`, ...bounds, value });
    const take = (from, to) => {
      if (to) to.value = from.value;
      this.#set(name, from.value);
    };
    input.addEventListener("input", () => take(input, range));
    if (range) range.addEventListener("input", () => take(range, input));
    this.#inputs.set(name, input);
    const head = h("div", { class: "field-head" }, h("label", { for: id, title: hint }, label), input);
    return h("div", { class: slider ? "field wide" : "field" }, head, range);
  }

  #area(name, label, attributes) {
    const id = `parameter-${name}`;
    const area = h("textarea", { id, ...attributes, on: { input: () => this.#set(name, area.value) } });
    area.value = this.#values[name] ?? "";
    this.#inputs.set(name, area);
    return h("div", { class: "field wide" }, h("label", { for: id }, label), area);
  }

  #priority() {
    const chosen = this.#values.priority ?? PRIORITIES[0];
    const options = PRIORITIES.map((level) =>
      h("option", { value: level, selected: level === chosen }, level),
    );
    const select = h(
      "select",
      { id: "parameter-priority", on: { change: () => this.#set("priority", select.value) } },
      options,
    );
    this.#inputs.set("priority", select);
    return h(
      "div",
      { class: "field" },
      h("div", { class: "field-head" }, h("label", { for: select.id }, "Priority"), select),
    );
  }

  #logprobs() {
    const box = h("input", {
      id: "parameter-logprobs",
      type: "checkbox",
      checked: Boolean(this.#values.logprobs),
      on: { change: () => this.#set("logprobs", box.checked) },
    });
    this.#inputs.set("logprobs", box);
    return h("div", { class: "field check" }, box, h("label", { for: box.id }, "Colour by probability"));
  }

  #set(name, value) {
    this.#values[name] = value;
    this.#onChange();
  }

  #reset(root) {
    for (const name of Object.keys(this.#values)) if (name !== "system") delete this.#values[name];
    const hidden = this.#inputs.get("system").closest(".field").hidden;
    this.#render(root);
    this.#inputs.get("system").closest(".field").hidden = hidden;
    this.#onChange();
    root.querySelector("summary").focus();
  }
}

/** `\n`, `\t` and `\\` as people write them. */
function unescape(text) {
  return text.replace(/\\([nt\\])/g, (_, what) => ({ n: "\n", t: "\t", "\\": "\\" })[what]);
}
