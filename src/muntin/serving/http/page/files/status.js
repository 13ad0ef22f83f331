// The server's state, asked for once a second while the tab is visible: versions and charts.

import * as api from "./api.js";
import { Chart, SPAN } from "./charts.js";
import { element, milliseconds, percent } from "./dom.js";

const EVERY = 1000; // milliseconds
const WINDOW = 30; // seconds over which answers are shared out among versions

/** Polls the server. `changed(status)` after each answer, `failed(error)` after each error. `again()` asks at once, and after a 401. */
export class Poller {
  constructor(changed, failed) {
    Object.assign(this, { changed, failed, timer: 0, asking: false });
    document.addEventListener("visibilitychange", () => this.again());
  }

  async again() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.asking = true;
    let refused = false;
    try {
      this.changed(await api.status());
    } catch (error) {
      refused = error.status === 401;
      this.failed(error);
    } finally {
      this.asking = false;
    }
    if (!document.hidden && !refused) this.timer = setTimeout(() => this.again(), EVERY);
  }
}

/** The table of versions and the charts. */
export class Board {
  constructor(table, charts) {
    this.table = table;
    this.samples = [];
    this.charts = [
      new Chart({ title: "Images a second", series: ["rate"], floor: 1, text: (sample) => sample.rate.toFixed(1) }),
      new Chart({ title: "Queue", series: ["waiting"], floor: 1, text: (sample) => `${sample.waiting} waiting` }),
      new Chart({ title: "Batch size", series: ["batch"], floor: 1, text: (sample) => sample.batch.toFixed(1) }),
      new Chart({
        title: "Latency", series: ["compute", "wait"], keys: ["compute", "+ wait"], floor: 1,
        text: (sample) => milliseconds(sample.compute + sample.wait),
        goal: (sample) => sample.objective, unit: milliseconds,
      }),
    ];
    charts.replaceChildren(...this.charts.map((chart) => chart.root));
  }

  show(status) {
    const now = performance.now() / 1000;
    this.samples.push(sampled(status, this.samples.at(-1), now));
    this.samples = this.samples.filter((sample) => now - sample.at <= SPAN);
    for (const chart of this.charts) chart.draw(this.samples, now);
    const since = this.samples.find((sample) => now - sample.at <= WINDOW);
    const rows = Object.fromEntries(status.versions.map(({ version, rows }) => [version, Math.max(0, rows - (since.rows[version] ?? 0))]));
    const total = Object.values(rows).reduce((sum, count) => sum + count, 0);
    this.table.replaceChildren(...status.versions.map((entry) => versionRow(entry, total ? rows[entry.version] / total : null)).reverse());
  }
}

// Means over the time since the last sample; null where nothing was computed.
function sampled(status, last, now) {
  const rows = Object.fromEntries(status.versions.map((entry) => [entry.version, entry.rows]));
  const mean = (name) => {
    const [count, sum] = status.sums[name].map((value, index) => value - (last?.sums[name][index] ?? value));
    return count > 0 ? sum / count : null;
  };
  const computed = Object.entries(rows).reduce((sum, [version, count]) => sum + (last ? Math.max(0, count - (last.rows[version] ?? 0)) : 0), 0);
  const inMilliseconds = (seconds) => (seconds === null ? null : 1000 * seconds);
  return {
    at: now,
    sums: status.sums,
    rows,
    rate: last ? computed / Math.max(now - last.at, 0.1) : 0,
    waiting: status.waiting,
    batch: mean("batch"),
    wait: inMilliseconds(mean("queue")),
    compute: inMilliseconds(mean("compute")),
    objective: inMilliseconds(status.objective),
  };
}

const KINDS = { READY: "integer", LOADING: "half", UNLOADING: "half", UNAVAILABLE: "unknown" };

function versionRow({ version, state, reason, rows }, share) {
  const bar = element("i", { ariaHidden: "true" });
  bar.style.setProperty("--share", share ?? 0);
  return element("tr", {},
    element("th", { scope: "row" }, version, element("small", {}, reason)),
    element("td", {}, element("span", { className: `chip ${KINDS[state] ?? "unknown"}` }, state.toLowerCase())),
    element("td", { className: "answers" }, element("span", {}, share === null ? "–" : percent(share)), bar),
    element("td", {}, rows.toLocaleString("en")));
}
