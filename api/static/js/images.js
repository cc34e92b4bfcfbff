/** Images for the next message; offered only if the model takes them. */

import { button, h } from "./dom.js";

export class Images {
  urls = [];

  constructor() {
    this.input = h("input", {
      type: "file",
      accept: "image/*",
      multiple: true,
      hidden: true,
      on: { change: () => this.#add() },
    });
    this.button = button("Attach images", {
      icon: "image",
      small: true,
      class: "icon-button",
      hidden: true,
      on: { click: () => this.input.click() },
    });
    this.element = h("div", { class: "attached", hidden: true });
  }

  allow(allowed) {
    this.button.hidden = !allowed;
  }

  /** The images as data URLs; they are no longer attached then. */
  take() {
    const taken = this.urls;
    this.urls = [];
    this.#draw();
    return taken;
  }

  async #add() {
    this.urls.push(...(await Promise.all([...this.input.files].map(asDataUrl))));
    this.input.value = "";
    this.#draw();
  }

  #draw() {
    this.element.hidden = this.urls.length === 0;
    this.element.replaceChildren(
      ...this.urls.map((url, i) => {
        const remove = () => {
          this.urls.splice(i, 1);
          this.#draw();
          this.button.focus();
        };
        const close = button(`Remove image ${i + 1}`, {
          icon: "close",
          small: true,
          class: "icon-button",
          on: { click: remove },
        });
        return h("figure", {}, h("img", { src: url, alt: `Image ${i + 1}` }), close);
      }),
    );
  }
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
