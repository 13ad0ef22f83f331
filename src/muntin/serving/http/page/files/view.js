// The shown picture and what is known of its answers: layers, times, classes, the file to save.

import { agreement } from "./answers.js";
import { byId, milliseconds, percent } from "./dom.js";
import { listBest, listShares } from "./legend.js";
import { Stage } from "./stage.js";

export class View {
  constructor() {
    this.stage = new Stage(byId);
    this.hidden = new Set(); // class numbers that are not painted
    this.address = null; // of the file to save
  }

  /**
   * Shows a picture and its answers. `one`, `two`: decoded, with their `classes`; null while there is none. `besidePicture`: the divider is
   * between the picture and `one`.
   */
  draw(item, { bitmap, model, one = null, two = null, besidePicture = false }) {
    const { stage } = this;
    const size = one?.width ? one : (bitmap ?? { width: 4, height: 3 });
    stage.resize(size.width, size.height);
    if (bitmap) stage.drawPicture(bitmap, item.name);
    else stage.clearPicture();
    byId("file-size").textContent = bitmap ? `${bitmap.width} × ${bitmap.height}` : "this browser cannot show such a file; its answer is shown alone";
    besidePicture &&= bitmap !== null; // a picture that the browser cannot show is no half of the stage
    const divided = model.task !== "classify" && one !== null && (besidePicture || two !== null);
    const sides = besidePicture ? [null, one] : [one, two]; // before on the left, after on the right
    sides.forEach((answer, side) => stage.paint(side, this.layer(answer)));
    stage.compare(divided ? sides.map((answer) => (answer === null ? "picture" : `version ${answer.version}`)) : null);
    stage.opacity = model.task === "restore" || !bitmap ? 100 : byId("opacity").value;
    stage.pointed = (x, y) => {
      const names = x === null ? [] : [one, two].map((answer) => classAt(answer, x, y));
      byId("readout").textContent = names.filter(Boolean).join(" | ");
    };
    byId("opacity-row").hidden = model.task !== "segment";
    byId("by").textContent = one === null ? "…" : `version ${one.version}`;
    for (const part of ["total", "compute", "wait", "round"]) byId(`time-${part}`).textContent = milliseconds(one?.times[part]);
    byId("classes").hidden = one === null || model.task === "restore";
    if (one !== null && model.task !== "restore") this.listClasses(one, two, sides);
    this.offerFile(item, model.task, one);
  }

  layer(answer) {
    if (answer === null || answer.best) return null;
    if (answer.bitmap) return answer;
    return { ...answer, colors: answer.classes.map(({ color }, index) => (this.hidden.has(index) ? null : color)) };
  }

  listClasses(one, two, sides) {
    const [list, note, equal] = [byId("legend"), byId("absent"), byId("agreement")];
    equal.hidden = !(one.labels && two && one.labels.length === two.labels.length);
    if (!equal.hidden) equal.textContent = `Same class on ${percent(agreement(one, two))} of the pixels`;
    byId("classes-title").textContent = two ? `Classes, version ${one.version} | ${two.version}` : "Classes";
    const toggle = (index, visible) => {
      if (visible) this.hidden.delete(index);
      else this.hidden.add(index);
      sides.forEach((answer, side) => this.stage.paint(side, this.layer(answer)));
    };
    if (one.best) listBest(list, note, { one: one.best, two: two?.best ?? null });
    else listShares(list, note, { classes: one.classes, one: one.shares, two: two?.shares ?? null, hidden: this.hidden, toggle });
  }

  offerFile(item, task, answer) {
    const link = byId("save");
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = null;
    link.hidden = answer === null || task === "classify";
    if (link.hidden) return;
    this.address = link.href = URL.createObjectURL(answer.blob);
    const [what, text] = task === "segment" ? ["labels", "Save class numbers (PNG)"] : ["restored", "Save picture (PNG)"];
    link.download = `${item.file.name.replace(/\.[^.]*$/, "") || "picture"}-${what}.png`;
    link.textContent = text;
  }
}

/** The name of the class at a place, both from 0 to 1, or "". */
function classAt(answer, x, y) {
  if (!answer?.labels) return "";
  const [column, row] = [Math.floor(x * answer.width), Math.floor(y * answer.height)];
  return answer.classes[answer.labels[row * answer.width + column]]?.name ?? "no class";
}

/** The result in a line, to be spoken. */
export function summary(item, answer) {
  if (answer === null) return "";
  const shares = answer.best ? [...answer.best] : (answer.shares ?? []).map((share, index) => [answer.classes[index].name, share]);
  const highest = shares.filter(([, share]) => share > 0).sort((a, b) => b[1] - a[1]).slice(0, 3);
  const words = highest.map(([name, share]) => `${name} ${percent(share)}`);
  return [`${item.name}: version ${answer.version}, ${milliseconds(answer.times.total)}`, ...words].join(", ");
}
