// Small line charts of the last minute and a half, drawn as SVG.

import { element } from "./dom.js";

const [WIDTH, HEIGHT, TOP] = [300, 84, 14];
export const SPAN = 90; // seconds shown

/**
 * A chart. `series`: keys of a sample, drawn one above the other; `text(sample)`: the value in words; `keys`: names of the
 * series, if there are several; `goal(sample)`: a value not to be exceeded, drawn as a line, or null; `unit(value)`: it in words. */
export class Chart {
  constructor({ title, series, text, floor, keys = [], goal = () => null, unit = String }) {
    Object.assign(this, { title, series, text, floor, goal, unit });
    this.value = element("b", {}, "–");
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" });
    this.base = shape("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 });
    this.grid = shape("line", { class: "grid", x1: 0, x2: WIDTH, y1: TOP, y2: TOP });
    this.aim = shape("line", { class: "aim", x1: 0, x2: WIDTH, visibility: "hidden" });
    this.paths = series.map((_, index) => ({ area: shape("path", { class: `area area-${index}` }), line: shape("path", { class: `line line-${index}` }) }));
    this.svg.append(this.grid, this.base, this.aim, ...this.paths.map(({ area }) => area), ...this.paths.map(({ line }) => line).reverse());
    this.top = element("span", { className: "top", ariaHidden: "true" });
    const words = keys.map((key, index) => element("span", { className: `key key-${index}` }, key));
    this.promise = element("span", { className: "key promise", hidden: true });
    const caption = element("figcaption", {}, element("span", {}, title, ...words, this.promise), this.value);
    this.root = element("figure", {}, caption, element("div", { className: "plot" }, this.svg, this.top));
  }

  /** Draws samples, each with its time in seconds as `at`. A value of null is a gap. */
  draw(samples, now) {
    const known = samples.filter((sample) => this.series.every((key) => sample[key] !== null));
    const sums = new Map(known.map((sample) => {
      let sum = 0;
      return [sample, this.series.map((key) => (sum += sample[key]))];
    }));
    const highest = Math.max(this.floor, ...[...sums.values()].map((row) => row.at(-1)));
    const goal = this.goal(samples.at(-1));
    const limit = roundUp(Math.max(highest, goal ?? 0));
    const x = (sample) => (WIDTH * (1 - (now - sample.at) / SPAN)).toFixed(1);
    const y = (value) => (HEIGHT - 1 - (value / limit) * (HEIGHT - 1 - TOP)).toFixed(1);
    const runs = [[]];
    for (const sample of samples) {
      if (sums.has(sample)) runs.at(-1).push(sample);
      else if (runs.at(-1).length) runs.push([]);
    }
    const drawn = runs.filter((run) => run.length);
    this.paths.forEach(({ area, line }, index) => {
      const lines = drawn.map((run) => `M${[...run, run.at(-1)].map((sample) => `${x(sample)} ${y(sums.get(sample)[index])}`).join("L")}`);
      line.setAttribute("d", lines.join(""));
      area.setAttribute("d", drawn.map((run, number) => `${lines[number]}V${HEIGHT - 1}H${x(run[0])}Z`).join(""));
    });
    const promise = goal === null ? "" : `objective ${this.unit(goal)}`;
    this.promise.hidden = goal === null;
    this.promise.textContent = promise;
    this.aim.setAttribute("visibility", goal === null ? "hidden" : "visible");
    for (const end of ["y1", "y2"]) this.aim.setAttribute(end, y(goal ?? 0));
    const text = known.length ? this.text(known.at(-1)) : "–";
    this.value.textContent = text;
    this.top.textContent = known.length || goal !== null ? String(limit) : "";
    this.svg.setAttribute("aria-label", `${this.title}: last ${text}; at most ${Number(highest.toPrecision(3))} in ${SPAN} seconds${promise && `; ${promise}`}`);
  }
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999) ?? value;
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
