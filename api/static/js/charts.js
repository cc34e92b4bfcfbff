/** Line charts of the last minutes, drawn by uPlot (a global of its own script). */

import { h, setText } from "./dom.js";

const KEPT = 300; // points; a second each while the dashboard is open
const HEIGHT = 116;

/** A colour that CSS knows by a custom property, as canvases need it. */
export function colour(name) {
  const probe = h("i", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

/**
 * A card with a title, the value now, and a line for each series. `series`: {name, label, color, area?} with
 * a custom property as colour; `show` writes a value; `top` fixes the upper end of the scale, `least` is the
 * lowest that it may be.
 */
export class Chart {
  #times = [];
  #values;
  #plot = null;

  constructor({ title, series, show, unit = "", top = null, least = 1 }) {
    Object.assign(this, { title, series, show, unit, top, least });
    this.#values = series.map(() => []);
    this.now = series.map(() => h("span", { class: "now" }, "–"));
    this.canvas = h("div", { class: "chart", role: "img", "aria-label": `${title}, the last five minutes` });
    const legend = series.map(({ label, color }, i) => {
      const swatch = h("i", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `var(${color})`;
      return h(
        "span",
        { class: i === 0 ? "key first" : "key" },
        swatch,
        h("span", { class: "key-label" }, label),
        this.now[i],
      );
    });
    this.element = h(
      "section",
      { class: "card chart-card" },
      h("header", {}, h("h2", {}, title), unit && h("span", { class: "unit" }, unit)),
      h("div", { class: "keys-line" }, legend),
      this.canvas,
    );
    new ResizeObserver(() => this.#resize()).observe(this.canvas);
  }

  /** One more point; `values` by series name. */
  add(seconds, values) {
    const lists = [this.#times, ...this.#values];
    [seconds, ...this.series.map(({ name }) => values[name])].forEach((value, i) => lists[i].push(value));
    if (this.#times.length > KEPT) for (const list of lists) list.shift();
    this.series.forEach(({ name }, i) =>
      setText(this.now[i], values[name] === null ? "–" : this.show(values[name])),
    );
    this.#plot?.setData([this.#times, ...this.#values]);
  }

  /** Draw anew, in the colours of the theme as it is now. */
  redraw() {
    this.#plot?.destroy();
    this.#plot = null;
    this.#resize();
  }

  #resize() {
    const width = this.canvas.clientWidth;
    if (width === 0 || window.uPlot === undefined) return;
    if (this.#plot === null) this.#plot = this.#make(width);
    else if (this.#plot.width !== width) this.#plot.setSize({ width, height: HEIGHT });
  }

  #make(width) {
    const line = colour("--line");
    const axis = {
      stroke: colour("--muted"),
      font: `11px ${getComputedStyle(document.body).fontFamily}`,
      ticks: { show: false },
      grid: { stroke: line, width: 1 },
    };
    const options = {
      width,
      height: HEIGHT,
      legend: { show: false },
      cursor: { show: false },
      padding: [6, 20, 0, 0],
      scales: {
        x: { time: true, range: (_, min, max) => [Math.min(min, max - 60), max] },
        y: { range: (_, min, max) => [0, this.top ?? Math.max(this.least, max * 1.15)] },
      },
      axes: [
        { ...axis, size: 22, space: 90, grid: { show: false }, values: (_, ticks) => ticks.map(timeOfDay) },
        { ...axis, size: 46, space: 32, values: (_, ticks) => ticks.map((tick) => this.show(tick)) },
      ],
      series: [{}, ...this.series.map((one) => this.#line(one))],
    };
    return new window.uPlot(options, [this.#times, ...this.#values], this.canvas);
  }

  #line({ label, color, area = false }) {
    const stroke = colour(color);
    return {
      label,
      stroke,
      width: 1.6,
      fill: area ? colour("--accent-wash") : undefined,
      points: { show: false },
      spanGaps: true,
    };
  }
}

function timeOfDay(seconds) {
  const time = new Date(seconds * 1000);
  return [time.getHours(), time.getMinutes(), time.getSeconds()]
    .map((part) => String(part).padStart(2, "0"))
    .join(":");
}
