// Small line charts of the last minute and a half, drawn as SVG.

import { element } from "./dom.js";

const [WIDTH, HEIGHT, TOP] = [300, 84, 14];
export const SPAN = 90; // seconds shown

/** A chart. `series`: keys of a sample, drawn one above the other; `text(sample)`: the present value. */
export class Chart {
  constructor({ title, series, text, floor }) {
    Object.assign(this, { title, series, text, floor });
    this.value = element("b", {}, "–");
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" });
    this.base = shape("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 });
    this.grid = shape("line", { class: "grid", x1: 0, x2: WIDTH, y1: TOP, y2: TOP });
    this.paths = series.map((_, index) => ({ area: shape("path", { class: `area area-${index}` }), line: shape("path", { class: `line line-${index}` }) }));
    this.svg.append(this.grid, this.base, ...this.paths.map(({ area }) => area), ...this.paths.map(({ line }) => line));
    this.top = element("span", { className: "top", ariaHidden: "true" });
    const caption = element("figcaption", {}, title, this.value);
    this.root = element("figure", {}, caption, element("div", { className: "plot" }, this.svg, this.top));
  }

  /** Draws samples, each with its time in seconds as `at`. */
  draw(samples, now) {
    const sums = samples.map((sample) => {
      let sum = 0;
      return this.series.map((key) => (sum += sample[key] ?? 0));
    });
    const highest = Math.max(this.floor, ...sums.map((row) => row.at(-1)));
    const limit = roundUp(highest);
    const x = (sample) => (WIDTH * (1 - (now - sample.at) / SPAN)).toFixed(1);
    const y = (value) => (HEIGHT - 1 - (value / limit) * (HEIGHT - 1 - TOP)).toFixed(1);
    this.paths.forEach(({ area, line }, index) => {
      const points = samples.map((sample, number) => `${x(sample)} ${y(sums[number][index])}`);
      line.setAttribute("d", points.length ? `M${points.join("L")}` : "");
      const ends = points.length ? `L${x(samples.at(-1))} ${HEIGHT - 1}L${x(samples[0])} ${HEIGHT - 1}Z` : "";
      area.setAttribute("d", points.length ? `M${points.join("L")}${ends}` : "");
    });
    const text = samples.length ? this.text(samples.at(-1)) : "–";
    this.value.textContent = text;
    this.top.textContent = String(limit);
    this.svg.setAttribute("aria-label", `${this.title}: now ${text}; at most ${Number(highest.toPrecision(3))} in ${SPAN} seconds`);
  }
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999) ?? value;
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
