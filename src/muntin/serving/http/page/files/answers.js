// Answers of the versions to pictures. Files of answers are kept, so that a version can be compared with one that is gone.

import * as api from "./api.js";
import { pathOf } from "./files.js";
import { countLabels } from "./legend.js";
import { readLabels } from "./png.js";

const OUTPUTS = { segment: "labels", classify: "json", restore: "image" };

/** A picture of the page. `state`: waiting, running, done or error. */
export class Item {
  constructor(file) {
    this.file = file;
    this.name = pathOf(file) || "pasted picture";
    this.state = "waiting";
    this.error = "";
    this.passing = false; // the error may be gone when the picture is chosen again
    this.answers = new Map(); // version -> {blob, times, version, digest}
    this.served = ""; // the version that answered without being asked by name
    this.during = ""; // the artefact that served then
  }

  /** The picture's pixels, or null where the browser cannot decode the file. */
  async bitmap() {
    return createImageBitmap(this.file).catch(() => null);
  }
}

/** Descriptions of versions (`api.model`), by artefact. */
export class Models {
  constructor() {
    this.known = new Map();
  }

  /** `entry`: of the status. */
  async of({ version, digest }) {
    const key = `${version} ${digest}`;
    if (!this.known.has(key)) this.known.set(key, await api.model(version));
    return this.known.get(key);
  }
}

/** Asks for an answer and keeps it. `version`: "" for the one that the server chooses. `during`: the artefact that serves. */
export async function ask(item, { model, status, version, during, signal }) {
  const answer = await api.predict(item.file, { output: OUTPUTS[model.task], version, signal });
  answer.digest = status.versions.find((entry) => entry.version === answer.version)?.digest ?? "";
  item.answers.set(version || answer.version, answer);
  if (!version) [item.served, item.during] = [answer.version, during];
  return answer;
}

/** Decodes an answer: {labels, width, height, shares}, {best} or {bitmap, width, height}. */
export async function decode({ blob }, { task, classes }) {
  if (task === "classify") {
    const document = JSON.parse(await blob.text());
    return { best: new Map(document.classes.map(({ name, probability }) => [name, probability])) };
  }
  if (task === "restore") {
    const bitmap = await createImageBitmap(blob);
    return { bitmap, width: bitmap.width, height: bitmap.height };
  }
  const read = await readLabels(blob);
  const counts = countLabels(read.labels, classes.length);
  return { ...read, shares: [...counts].map((count) => count / read.labels.length) };
}

/** The share of pixels to which two decoded segmentations give the same class. */
export function agreement(one, two) {
  let equal = 0;
  for (let index = 0; index < one.labels.length; index += 1) equal += one.labels[index] === two.labels[index];
  return equal / one.labels.length;
}
