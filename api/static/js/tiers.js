/** The tiers of the KV cache as heat maps: each pool over time, and what it holds now. */

import { colour } from "./charts.js";
import { h, keepOrder, setText } from "./dom.js";
import { count, percent } from "./format.js";

const COLUMNS = 150;
const STATES = ["used", "cached"]; // what is neither is free
const NAMES = { device: "Device", host: "Host memory", nvme: "File" };
const CELL_HEIGHT = 13;

export class Tiers {
  #maps = new Map(); // PoolMap by tier and pool

  constructor() {
    this.list = h("div", { class: "tiers" });
    this.none = h("p", { class: "nothing" }, "No worker tells of a cache.");
    const legend = h(
      "p",
      { class: "scale", "aria-hidden": "true" },
      "empty",
      [0, 1, 2, 3, 4].map((step) => h("i", { class: "heat", data: { step } })),
      "full",
    );
    this.element = h(
      "section",
      { class: "card tiers-card" },
      h("header", {}, h("h2", {}, "KV cache"), legend),
      this.none,
      this.list,
    );
  }

  /** Take a `/status` in. */
  take({ kv }) {
    const maps = [];
    for (const [tier, pools] of Object.entries(kv.tiers ?? {})) {
      for (const [pool, blocks] of Object.entries(pools)) {
        if (blocks.total === 0) continue;
        const key = `${tier} ${pool}`;
        if (!this.#maps.has(key)) this.#maps.set(key, new PoolMap(NAMES[tier] ?? tier, pool));
        this.#maps.get(key).add(blocks);
        maps.push(this.#maps.get(key).element);
      }
    }
    keepOrder(this.list, maps);
    this.none.hidden = maps.length > 0;
  }

  redraw() {
    for (const map of this.#maps.values()) map.draw();
  }
}

/** One pool of one tier: a line for each state, a column for each look, the fuller the stronger. */
class PoolMap {
  #columns = [];

  constructor(tier, pool) {
    this.name = `${tier}, ${pool}`;
    this.canvas = h("canvas", { role: "img", height: STATES.length * CELL_HEIGHT });
    this.figures = h("span", { class: "pool-figures" });
    this.element = h(
      "div",
      { class: "pool" },
      h("span", { class: "pool-name" }, tier, " ", h("span", { class: "unit" }, pool)),
      this.figures,
      h(
        "span",
        { class: "pool-states", "aria-hidden": "true" },
        STATES.map((state) => h("span", {}, state)),
      ),
      this.canvas,
    );
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  add({ total, free, ...blocks }) {
    this.#columns.push(STATES.map((state) => blocks[state] / total));
    if (this.#columns.length > COLUMNS) this.#columns.shift();
    const [used, cached] = STATES.map((state) => count(blocks[state]));
    const text = `${used} used · ${cached} cached · ${count(free)} free`;
    setText(this.figures, text);
    this.canvas.setAttribute(
      "aria-label",
      `${this.name}: ${text}, of ${count(total)} blocks; ${percent(1 - free / total)} full`,
    );
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const width = canvas.clientWidth;
    if (width === 0) return;
    const scale = devicePixelRatio;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(STATES.length * CELL_HEIGHT * scale);
    const context = canvas.getContext("2d");
    const [empty, full] = [colour("--heat-empty"), colour("--accent")];
    const cell = canvas.width / COLUMNS;
    const line = canvas.height / STATES.length;
    context.fillStyle = empty;
    STATES.forEach((_, y) => context.fillRect(0, y * line, canvas.width, line - scale));
    context.fillStyle = full;
    const first = COLUMNS - this.#columns.length;
    this.#columns.forEach((shares, x) =>
      shares.forEach((share, y) => {
        context.globalAlpha = share === 0 ? 0 : 0.12 + 0.88 * Math.sqrt(share);
        const left = Math.round((first + x) * cell);
        context.fillRect(left, y * line, Math.round((first + x + 1) * cell) - left, line - scale);
      }),
    );
  }
}
