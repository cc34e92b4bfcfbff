/** The dashboard: what waits, what runs, how fast, on what, and what was given up. */

import { Chart } from "./charts.js";
import { DeadLetters } from "./dead.js";
import { byId, h, keepOrder, setText } from "./dom.js";
import { bytes, count, duration, percent, rate, shortId } from "./format.js";
import { Rates } from "./rates.js";
import { Sequences } from "./sequences.js";
import { Tiers } from "./tiers.js";

const LEVELS = ["interactive", "normal", "batch", "background", "suspect"];
const FULL_BAR = 20; // waiting jobs that fill a bar, until there are more

export class Dashboard {
  #service;
  #rates = new Rates();
  #shown = false;
  #charts = [
    new Chart({
      title: "Tokens",
      unit: "per second",
      show: rate,
      series: [
        { name: "generated", label: "generated", color: "--accent", area: true },
        { name: "prompt", label: "prompt", color: "--second" },
      ],
    }),
    new Chart({
      title: "Jobs ended",
      least: 0.4,
      unit: "per second",
      show: rate,
      series: [
        { name: "succeeded", label: "succeeded", color: "--accent", area: true },
        { name: "failed", label: "failed", color: "--danger" },
        { name: "called_off", label: "called off", color: "--second" },
      ],
    }),
    new Chart({
      title: "Prompt found in cache",
      unit: "last 30 s",
      show: percent,
      top: 1,
      series: [{ name: "hit_rate", label: "of tokens", color: "--accent", area: true }],
    }),
    new Chart({
      title: "Moved between tiers",
      unit: "per second",
      show: bytes,
      series: [
        { name: "raised", label: "raised", color: "--accent", area: true },
        { name: "demoted", label: "demoted", color: "--second" },
      ],
    }),
  ];

  constructor(service) {
    this.#service = service;
    this.sequences = new Sequences();
    this.tiers = new Tiers();
    this.dead = new DeadLetters();
    this.queue = new Queue();
    this.workers = new Workers();
    this.trouble = h("p", { class: "notice", role: "status", hidden: true });
    const parts = [this.queue, this.sequences, ...this.#charts, this.tiers, this.workers, this.dead];
    this.grid = h(
      "div",
      { class: "grid", data: { state: "loading" } },
      parts.map((part) => part.element),
    );
    byId("dashboard").append(this.trouble, this.grid);
    service.addEventListener("change", () => this.#take());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  set shown(shown) {
    this.#shown = shown;
    this.dead.watch(shown);
    if (!shown) this.sequences.rest();
  }

  /** The theme has changed. */
  redraw() {
    for (const chart of this.#charts) chart.redraw();
    this.tiers.redraw();
  }

  #take() {
    const { status, error } = this.#service;
    this.trouble.hidden = error === null;
    if (error) {
      const why =
        error.status === 403 ? "The dashboard needs an operator's key." : `${error.message}. Trying again.`;
      setText(this.trouble, why);
    }
    this.grid.dataset.state = error ? "stale" : "live";
    if (error || status === null) return;
    const rates = this.#rates.take(status);
    // Times are of Redis, like those in heartbeats: this machine's clock may be off.
    const now =
      Math.max(0, ...status.workers.map((worker) => worker.at_ms + worker.age_s * 1000)) || Date.now();
    for (const chart of this.#charts) chart.add(Date.now() / 1000, rates);
    this.queue.take(status);
    this.tiers.take(status);
    this.workers.take(status, rates.speeds, now);
    if (this.#shown) this.sequences.take(status, now);
  }
}

/** Jobs that wait, by priority. */
class Queue {
  #lines = new Map();

  constructor() {
    this.total = h("span", { class: "unit" });
    const lines = LEVELS.map((level) => {
      const bar = h("i");
      const waiting = h("dd", { class: "waiting-count" }, "–");
      this.#lines.set(level, { bar, waiting });
      return h(
        "div",
        { class: "level-line" },
        h("dt", {}, level),
        h("span", { class: "track", "aria-hidden": "true" }, bar),
        waiting,
      );
    });
    lines.at(-1).title = "Jobs whose worker died, waiting for the next one";
    this.element = h(
      "section",
      { class: "card queue-card" },
      h("header", {}, h("h2", {}, "Waiting"), this.total),
      h("dl", { class: "levels" }, lines),
    );
  }

  take({ queue }) {
    const most = Math.max(FULL_BAR, ...Object.values(queue));
    for (const [level, { bar, waiting }] of this.#lines) {
      bar.style.width = percent(queue[level] / most, 1);
      setText(waiting, count(queue[level]));
    }
    setText(this.total, `${count(Object.values(queue).reduce((sum, jobs) => sum + jobs, 0))} jobs`);
  }
}

/** A line for each worker. */
class Workers {
  #lines = new Map();

  constructor() {
    const heads = ["Worker", "Engine", "Slots", "Tokens/s", "KV in use", "Memory", "Up"].map((name) =>
      h("th", { scope: "col" }, name),
    );
    this.body = h("tbody");
    this.none = h(
      "p",
      { class: "nothing" },
      "No worker is running. Start one with ",
      h("code", {}, "wicore worker"),
      ".",
    );
    this.table = h("table", {}, h("thead", {}, h("tr", {}, heads)), this.body);
    this.element = h(
      "section",
      { class: "card workers-card" },
      h("header", {}, h("h2", {}, "Workers")),
      this.none,
      h("div", { class: "table-box", tabindex: 0, role: "region", "aria-label": "Workers" }, this.table),
    );
  }

  take({ workers }, speeds, now) {
    const lines = workers.map((worker) => {
      if (!this.#lines.has(worker.id))
        this.#lines.set(
          worker.id,
          h(
            "tr",
            {},
            Array.from({ length: 7 }, () => h("td")),
          ),
        );
      const line = this.#lines.get(worker.id);
      const memory = Object.values(worker.device_memory ?? {}).reduce((sum, size) => sum + size, 0);
      const texts = [
        shortWorker(worker),
        [worker.engine, worker.device, worker.weights].filter(Boolean).join(" · "),
        `${worker.running} of ${worker.slots}`,
        rate(speeds.get(worker.id)),
        inUse(worker.kv),
        memory > 0 ? bytes(memory) : "–",
        duration((now - worker.started_ms) / 1000),
      ];
      texts.forEach((text, i) => setText(line.children[i], text ?? "–"));
      line.children[0].title = `${worker.id}, ${worker.model}`;
      return line;
    });
    for (const id of this.#lines.keys())
      if (!workers.some((worker) => worker.id === id)) this.#lines.delete(id);
    keepOrder(this.body, lines);
    this.table.hidden = workers.length === 0;
    this.none.hidden = workers.length > 0;
  }
}

/** Share of the device's blocks that running sequences hold. */
function inUse(kv) {
  const pools = Object.values(kv?.tiers?.device ?? {});
  const sum = (name) => pools.reduce((total, pool) => total + pool[name], 0);
  return pools.length > 0 ? percent(sum("used") / sum("total")) : "–";
}

const shortWorker = ({ id, host, pid }) => (host ? `${host}:${pid}` : shortId(id));
