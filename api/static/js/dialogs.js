/** What opens over the page: a job, the API key, help, and questions before something is lost. */

import { call, getKey, setKey } from "./api.js";
import { button, byId, h } from "./dom.js";

/** Show a dialog; Escape and its button close it, focus goes back to where it was. Returns the element. */
function open(title, content, { wide = false } = {}) {
  const close = button("Close", {
    icon: "close",
    small: true,
    class: "icon-button",
    on: { click: () => dialog.close() },
  });
  const dialog = h(
    "dialog",
    { class: wide ? "dialog wide" : "dialog", "aria-labelledby": "dialog-title" },
    h("header", {}, h("h2", { id: "dialog-title" }, title), close),
    content,
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  byId("dialogs").replaceChildren(dialog);
  dialog.showModal();
  return dialog;
}

export const isOpen = () => document.querySelector("dialog[open]") !== null;

/** A job's record, as the API gives it, and where else it can be reached. */
export async function showJob(id) {
  const record = h("pre", { class: "record", tabindex: 0, "aria-label": "Record" }, "Loading");
  // A link carries no key.
  const links = getKey()
    ? []
    : [
        ["Record", `v1/jobs/${id}`],
        ["Events", `v1/jobs/${id}/events`],
      ];
  open(
    "Job",
    h(
      "div",
      {},
      h("p", { class: "mono break" }, id),
      h(
        "p",
        { class: "links" },
        links.map(([label, href]) => h("a", { href, target: "_blank", rel: "noopener" }, label)),
      ),
      record,
    ),
    { wide: true },
  );
  try {
    record.textContent = JSON.stringify(await call(`v1/jobs/${encodeURIComponent(id)}`), null, 2);
  } catch (error) {
    record.textContent = error.message;
  }
}

/** Ask for the API key; `onChange` when another one was given. */
export function askForKey(onChange, remark = "") {
  const input = h("input", {
    id: "api-key",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    value: getKey(),
  });
  const save = (key) => {
    const changed = key !== getKey();
    setKey(key);
    dialog.close();
    if (changed) onChange();
  };
  const form = h(
    "form",
    { class: "stack", on: { submit: (event) => (event.preventDefault(), save(input.value.trim())) } },
    remark && h("p", { class: "problem" }, remark),
    h("label", { for: input.id }, "Key"),
    input,
    h(
      "p",
      { class: "hint" },
      "Kept in this tab until it is closed. Leave it empty if the service has no keys.",
    ),
    h(
      "div",
      { class: "row end" },
      button("Forget", { class: "quiet", on: { click: () => save("") } }),
      h("button", { type: "submit", class: "primary" }, "Use key"),
    ),
  );
  const dialog = open("API key", form);
  input.focus();
}

/** Resolves to whether the user agreed. */
export function confirm(title, text, action) {
  return new Promise((resolve) => {
    const done = (answer) => {
      resolve(answer);
      dialog.close();
    };
    const agree = h("button", { type: "button", class: "danger", on: { click: () => done(true) } }, action);
    const leave = h("button", { type: "button", autofocus: true, on: { click: () => done(false) } }, "Keep");
    const dialog = open(title, h("div", {}, h("p", {}, text), h("div", { class: "row end" }, leave, agree)));
    dialog.addEventListener("close", () => resolve(false));
  });
}

/** `keys`: [keys, what they do] pairs; `single`: whether single letters work, with `onSingle` to change it. */
export function showHelp(keys, single, onSingle) {
  const box = h("input", {
    id: "single-keys",
    type: "checkbox",
    checked: single,
    on: { change: () => onSingle(box.checked) },
  });
  const rows = keys.map(([combination, meaning]) =>
    h(
      "div",
      {},
      h(
        "dt",
        {},
        combination.split(" ").map((key) => h("kbd", {}, key)),
      ),
      h("dd", {}, meaning),
    ),
  );
  open(
    "Keyboard",
    h(
      "div",
      { class: "stack" },
      h("dl", { class: "keys" }, rows),
      h("div", { class: "field check" }, box, h("label", { for: box.id }, "Single-letter shortcuts")),
    ),
  );
}
