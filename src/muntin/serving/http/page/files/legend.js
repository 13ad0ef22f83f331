// The classes: their shares of a segmentation, or a classifier's best ones, of one answer or of two.

import { element, percent } from "./dom.js";

const ROWS = 24; // classes listed at most
const BEST = 8; // classes of a classifier listed at most

/** Returns the number of pixels of each class. Labels that are no class are not counted. */
export function countLabels(labels, classes) {
  const counts = new Float64Array(classes);
  for (let index = 0; index < labels.length; index += 1) if (labels[index] < classes) counts[labels[index]] += 1;
  return counts;
}

/** Lists shares of classes. `two`: shares of the answer on the right, or null. `hidden`: class numbers. `toggle(number, shown)`. */
export function listShares(list, note, { classes, one, two, hidden, toggle }) {
  const most = (index) => Math.max(one[index], two?.[index] ?? 0);
  const order = classes.map((_, index) => index).sort((a, b) => one[b] - one[a] || most(b) - most(a) || a - b);
  const present = order.filter((index) => most(index) > 0);
  const rows = order.slice(0, Math.max(Math.min(present.length, ROWS), Math.min(order.length, 12)));
  list.replaceChildren(...rows.map((index) => {
    const box = element("input", { type: "checkbox", checked: !hidden.has(index) });
    box.addEventListener("change", () => toggle(index, box.checked));
    const swatch = element("span", { className: "swatch" });
    swatch.style.setProperty("--class", `rgb(${classes[index].color.join(" ")})`);
    const name = element("label", { className: "name" }, box, swatch, element("span", {}, classes[index].name));
    return row(name, [one[index], ...(two ? [two[index]] : [])], most(index) === 0);
  }));
  tell(note, order.length - rows.length, Math.max(0, present.length - rows.length));
}

/** Lists the best classes of a classifier. `one`, `two`: Map of name -> probability, the best first; `two` may be null. */
export function listBest(list, note, { one, two }) {
  const names = [...one.keys()].slice(0, BEST);
  list.replaceChildren(...names.map((name) => {
    return row(element("span", { className: "name" }, element("span", {}, name)), [one.get(name), ...(two ? [two.get(name) ?? 0] : [])], false);
  }));
  tell(note, one.size - names.length, one.size - names.length);
}

function row(name, shares, absent) {
  const bars = element("span", { className: "bars", ariaHidden: "true" }, ...shares.map((share) => {
    const bar = element("i", {});
    bar.style.setProperty("--share", share);
    return bar;
  }));
  const values = element("span", { className: "values" }, ...shares.map((share) => element("b", {}, percent(share))));
  return element("li", { className: absent ? "absent" : "" }, name, values, bars);
}

function tell(note, left, present) {
  note.hidden = left === 0;
  note.textContent = left === 0 ? "" : `${left} more classes${present ? "" : ", without a pixel"}`;
}
