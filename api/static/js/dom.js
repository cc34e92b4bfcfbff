/** Making elements. Text goes in as text nodes only, so nothing that a model or server says can become markup. */

/**
 * An element. `props`: `class`, `on` (listeners by event), `data` (dataset), anything else an attribute;
 * true sets an empty attribute, false, null and undefined leave it out. Children: nodes, texts, nested lists.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "on")
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An icon of icons.svg; decoration only, so whatever holds it needs a name of its own. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `static/icons.svg#${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon and a label, which `small` leaves to screen readers and the tooltip. */
export function button(label, { icon: name, small = false, ...props } = {}) {
  const named = small ? { "aria-label": label, title: label } : {};
  return h(
    "button",
    { type: "button", ...named, ...props },
    name && icon(name),
    !small && h("span", {}, label),
  );
}

export const byId = (id) => document.getElementById(id);

/** Set text only when it differs: an untouched node costs no layout. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make `parent`'s children exactly `wanted`, in order, moving no more than needed (focus stays). */
export function keepOrder(parent, wanted) {
  const set = new Set(wanted);
  for (const child of [...parent.children]) if (!set.has(child)) child.remove();
  wanted.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
}
