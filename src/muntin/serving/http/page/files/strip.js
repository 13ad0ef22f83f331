// The row of thumbnails. One of them is in the order of the Tab key; the arrow keys go to the others.

import { element } from "./dom.js";

const SIDE = 112; // pixels of a thumbnail

const STATES = { waiting: "waiting", running: "running", done: "answered", error: "failed" };

export class Strip {
  /** `select(item)`: called for the chosen one. */
  constructor(list, select) {
    this.list = list;
    this.select = select;
    this.buttons = new Map();
    list.addEventListener("keydown", (event) => this.key(event));
  }

  add(item) {
    const canvas = element("canvas", { width: SIDE, height: SIDE, ariaHidden: "true" });
    const button = element("button", { type: "button", tabIndex: -1, title: item.name }, canvas, element("span", { className: "state" }));
    button.addEventListener("click", () => this.select(item));
    this.buttons.set(item, button);
    this.list.append(element("li", {}, button));
    this.update(item);
  }

  clear() {
    this.buttons.clear();
    this.list.replaceChildren();
  }

  update(item) {
    const button = this.buttons.get(item);
    if (!button) return;
    button.dataset.state = item.state;
    button.setAttribute("aria-label", `${item.name}, ${STATES[item.state]}${item.error ? `: ${item.error}` : ""}`);
    button.lastChild.textContent = item.state === "error" ? "failed" : "";
  }

  /** Draws the thumbnail: the middle square of the picture. */
  draw(item, bitmap) {
    const canvas = this.buttons.get(item)?.firstChild;
    if (!canvas) return;
    const side = Math.min(bitmap.width, bitmap.height);
    const [x, y] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
    canvas.getContext("2d").drawImage(bitmap, x, y, side, side, 0, 0, SIDE, SIDE);
  }

  mark(item) {
    for (const [other, button] of this.buttons) {
      button.tabIndex = other === item ? 0 : -1;
      if (other === item) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    this.buttons.get(item)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  key(event) {
    const items = [...this.buttons.keys()];
    const at = items.findIndex((item) => this.buttons.get(item) === document.activeElement);
    const target = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
    if (target === undefined || at < 0 || !items[target]) return;
    event.preventDefault();
    this.buttons.get(items[target]).focus();
    this.select(items[target]);
  }
}
