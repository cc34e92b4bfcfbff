/** Tokens coloured by how likely they were, with what else was likely on hover, or by arrow keys on focus. */

import { byId, h } from "./dom.js";
import { percent } from "./format.js";

const SURE = [0.9, 0.6, 0.3, 0.1]; // lower ends of the shades from "sure" to "guess"

const shade = (probability) => {
  const level = SURE.findIndex((least) => probability >= least);
  return level < 0 ? SURE.length : level;
};

/** Append [text, entry] pairs, as run.js keeps them, to an answer's text. Empty texts take no element. */
export function paintTokens(root, tokens) {
  for (const [text, entry] of tokens) {
    if (text === "") continue;
    if (entry === null) {
      root.append(text);
      continue;
    }
    const first = root.querySelector(".token") === null;
    const token = h(
      "span",
      { class: "token", tabindex: first ? 0 : -1, data: { shade: shade(Math.exp(entry[1])) } },
      text,
    );
    token.entry = entry;
    root.append(token);
  }
}

const isToken = (target) => target instanceof Element && target.classList.contains("token");

/** Listen for all tokens of the page. Call it once. */
export function watchTokens() {
  addEventListener("pointerover", ({ target }) => (isToken(target) ? show(target) : hide()));
  addEventListener("focusin", ({ target }) => (isToken(target) ? show(target) : hide()));
  addEventListener("scroll", hide, { capture: true, passive: true });
  addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Escape" && hide()) event.stopImmediatePropagation();
      if (isToken(event.target)) move(event);
    },
    { capture: true },
  );
}

/** Arrow keys go from token to token, so that an answer takes one stop of the Tab key. */
function move(event) {
  const tokens = [...event.target.parentElement.querySelectorAll(".token")];
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const at = tokens.indexOf(event.target);
  const next =
    { Home: tokens[0], End: tokens.at(-1) }[event.key] ?? (steps[event.key] && tokens[at + steps[event.key]]);
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function show(token) {
  const box = byId("alternatives");
  document.querySelector("[aria-describedby=alternatives]")?.removeAttribute("aria-describedby");
  token.setAttribute("aria-describedby", box.id);
  const [chosen, logprob, top] = token.entry;
  const listed = top.some(([text]) => text === chosen) ? top : [...top, [chosen, logprob]];
  box.replaceChildren(...listed.map(([text, value]) => row(text, Math.exp(value), text === chosen)));
  box.hidden = false;
  place(box, token.getClientRects()[0]);
}

function row(text, probability, chosen) {
  const bar = h("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = percent(probability, 1);
  return h(
    "div",
    { class: chosen ? "alternative chosen" : "alternative" },
    h("span", { class: "piece mono" }, visible(text)),
    h("span", { class: "track", "aria-hidden": "true" }, bar),
    h("span", { class: "share" }, percent(probability, 1)),
  );
}

/** Under the token, or over it where there is no room; never past the window's edge. */
function place(box, at) {
  const { width, height } = box.getBoundingClientRect();
  const below = at.bottom + 6 + height <= innerHeight;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  box.style.top = `${below ? at.bottom + 6 : at.top - height - 6}px`;
}

/** Whether there was something to hide. */
function hide() {
  const box = byId("alternatives");
  const shown = !box.hidden;
  box.hidden = true;
  return shown;
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
