/** Starts the page: views, header, theme, keyboard. */

import { call, events, getKey } from "./api.js";
import { Dashboard } from "./dashboard.js";
import { askForKey, isOpen, showHelp } from "./dialogs.js";
import { byId, icon, setText } from "./dom.js";
import { Playground } from "./playground.js";
import { Service, summary } from "./service.js";
import { watchTokens } from "./tokens.js";

const VIEWS = ["playground", "dashboard"];
const MODEL_AGAIN_MS = 3000;

const playground = new Playground();
const service = new Service();
const dashboard = new Dashboard(service);

// --- views ---------------------------------------------------------------------------------------

function showView() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  for (const name of VIEWS) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  document.title = view === "dashboard" ? "Dashboard · WiCore" : "WiCore";
  service.fast = dashboard.shown = view === "dashboard";
}

/** Not by location.hash: that moves the focus too, and may do so later than we do. */
function goTo(view) {
  if (location.hash !== `#${view}`) history.pushState(null, "", `#${view}`);
  showView();
}

// --- header --------------------------------------------------------------------------------------

let modelName = "";

async function learnModel() {
  try {
    const { data } = await call("v1/models");
    modelName = data[0].id;
    playground.setModel(data[0]);
    showService();
  } catch {
    setTimeout(learnModel, MODEL_AGAIN_MS);
  }
}

function showService() {
  if (service.status === null && service.error === null) return;
  const [state, text] = summary(service);
  byId("service").dataset.state = state;
  setText(byId("service-text"), modelName === "" ? text : `${modelName} · ${text}`);
}

let refused = null; // the key that was found wanting last: nobody is asked twice for the same one

function keyRefused() {
  if (isOpen() || refused === getKey()) return;
  refused = getKey();
  changeKey("The service needs an API key.");
}

function changeKey(remark) {
  askForKey(() => {
    playground.reconnect();
    service.fast = document.body.dataset.view === "dashboard";
    learnModel();
  }, remark);
}

// --- theme ---------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

const theme = () => document.documentElement.dataset.theme ?? "auto";

function showTheme() {
  const label = `Theme: ${theme() === "auto" ? "as the system" : theme()}`;
  byId("theme-button").replaceChildren(icon(theme()));
  byId("theme-button").setAttribute("aria-label", label);
  byId("theme-button").title = `${label} (t)`;
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  store("wicore.theme", next);
  showTheme();
  dashboard.redraw();
}

function store(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Forbidden: it holds until the page is closed.
  }
}

// --- keyboard ------------------------------------------------------------------------------------

const LETTERS = {
  p: ["Playground", () => goTo("playground")],
  d: ["Dashboard", () => goTo("dashboard")],
  "/": ["Write", () => (goTo("playground"), playground.focusInput())],
  n: ["Start anew", () => (goTo("playground"), playground.startAnew())],
  t: ["Next theme", nextTheme],
  "?": ["This help", help],
};

let letters = localStorage.getItem("wicore.letters") !== "off";

function help() {
  const fixed = [
    ["Enter", "Send the message"],
    ["Shift Enter", "Break the line"],
    ["Ctrl Enter", "Continue the text"],
    ["Esc", "Stop what runs; close what is open"],
    ["← →", "In a coloured answer: from token to token"],
  ];
  const single = Object.entries(LETTERS).map(([letter, [meaning]]) => [letter, meaning]);
  showHelp([...fixed, ...single], letters, (on) => {
    letters = on;
    store("wicore.letters", on ? "on" : "off");
  });
}

function isWriting({ target }) {
  return target.matches("textarea, select, input:not([type=checkbox], [type=range]), [contenteditable]");
}

function takeKey(event) {
  if (isOpen() || event.defaultPrevented) return;
  if (event.key === "Escape") {
    if (document.body.dataset.view === "playground") playground.stop();
    return;
  }
  if (!letters || event.ctrlKey || event.metaKey || event.altKey || isWriting(event)) return;
  if (!(event.key in LETTERS)) return;
  event.preventDefault();
  LETTERS[event.key][1]();
}

byId("key-button").append(icon("key"));
byId("key-button").addEventListener("click", () => changeKey());
byId("theme-button").addEventListener("click", nextTheme);
byId("help-button").addEventListener("click", help);
events.addEventListener("unauthorized", keyRefused);
service.addEventListener("change", showService);
addEventListener("keydown", takeKey);
addEventListener("hashchange", showView);
watchTokens();
showTheme();
showView();
learnModel();
