/** Images for the next message, chosen, dropped or pasted; offered only if the model takes them. */

import { button, h, setText } from "./dom.js";
import { bytes } from "./format.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

export class Images {
  urls = [];
  #limits = null;
  #said;

  /** `said` tells how many images the conversation has already: each request holds them all. */
  constructor(said) {
    this.#said = said;
    this.input = h("input", {
      type: "file",
      accept: TYPES.join(),
      multiple: true,
      hidden: true,
      on: { change: () => this.#choose() },
    });
    this.button = button("Attach images", {
      icon: "image",
      small: true,
      class: "icon-button",
      hidden: true,
      on: { click: () => this.input.click() },
    });
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.element = h("div", { class: "attached", hidden: true });
  }

  /** `limits` as `GET /v1/models` gives them; null: the model takes no images. */
  allow(limits) {
    this.#limits = limits;
    this.button.hidden = limits === null;
    if (limits?.bytes) this.button.title = `Attach images, up to ${bytes(limits.bytes)} each`;
  }

  /** The images as data URLs; they are no longer attached then. */
  take() {
    const taken = this.urls;
    this.urls = [];
    this.#draw();
    return taken;
  }

  /** Attach those of the files that are images within the limits, and say what is wrong with the others. */
  async add(files) {
    if (this.#limits === null) return;
    const problems = new Set();
    for (const file of files) {
      const problem = this.#problemOf(file);
      if (problem !== null) problems.add(problem);
      else this.urls.push(await asDataUrl(file));
    }
    this.#draw([...problems].join(" "));
  }

  /** Attach the files of a drop or paste; whether it had any. */
  takeFrom(event) {
    const files = (event.dataTransfer ?? event.clipboardData)?.files ?? [];
    if (this.#limits === null || files.length === 0) return false;
    event.preventDefault();
    this.add([...files]);
    return true;
  }

  async #choose() {
    const files = [...this.input.files];
    this.input.value = "";
    await this.add(files);
  }

  #problemOf({ name, type, size }) {
    const { images = Infinity, bytes: most = Infinity } = this.#limits;
    if (this.#said() + this.urls.length >= images) return `A conversation may have ${images} images.`;
    if (!TYPES.includes(type)) return `${name} is no PNG, JPEG, WebP, GIF or BMP.`;
    if (size > most) return `${name} has ${bytes(size)}; an image may have ${bytes(most)}.`;
    return null;
  }

  #draw(problem = "") {
    this.problem.hidden = problem === "";
    setText(this.problem, problem);
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
