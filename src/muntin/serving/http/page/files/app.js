// The page: which picture is shown, by which versions, and what the server says meanwhile.

import { ask, decode, Item, Models } from "./answers.js";
import * as api from "./api.js";
import { byId, element } from "./dom.js";
import { collectFiles } from "./files.js";
import { Board, Poller } from "./status.js";
import { Strip } from "./strip.js";
import { summary, View } from "./view.js";

const [PICTURE, NOTHING] = ["picture", ""]; // choices of `against` beside versions, which are numbers
const view = new View();
const board = new Board(byId("versions"), byId("charts"));
const strip = new Strip(byId("strip"), (item) => show(item));
const models = new Models();
let status = null;
let model = null; // the description of the current version
let described = ""; // its name and digest
let items = [];
let shown = null;
let running = null; // AbortController of the pictures in work
let drawings = 0; // number of the latest drawing: an older one gives up

// ---- pictures ----

collectFiles({ target: byId("stage"), filePicker: byId("pick-files"), folderPicker: byId("pick-folder"), add });
byId("more").addEventListener("click", () => byId("pick-files").click());
byId("more-folder").addEventListener("click", () => byId("pick-folder").click());
byId("clear").addEventListener("click", clear);

function add(files, leftOut) {
  if (model?.refusal) return say("This model takes no pictures.");
  const added = files.map((file) => new Item(file));
  for (const item of added) strip.add(item);
  items = items.concat(added);
  const words = [added.length === 1 ? added[0].name : `${added.length} pictures`, ...(leftOut ? [`${leftOut} other ${leftOut === 1 ? "file" : "files"} left out`] : [])];
  say(`Added: ${words.join(", ")}.`);
  if (added.length) show(added[0]);
  else progress();
  run();
}

function clear() {
  running?.abort();
  items = [];
  shown = null;
  drawings += 1;
  strip.clear();
  for (const id of ["tray", "panel", "shown", "failure"]) byId(id).hidden = true;
  byId("empty").hidden = false;
  byId("pick-files").focus();
  say("All pictures removed.");
}

/** Answers the waiting pictures one at a time, the shown one first. */
async function run() {
  if (running || !model || model.refusal) return;
  const work = (running = new AbortController());
  let done = 0;
  for (let item; (item = shown?.state === "waiting" ? shown : items.find(({ state }) => state === "waiting")); done += 1) {
    item.state = "running";
    strip.update(item);
    progress();
    if (item === shown) refresh();
    try {
      await ask(item, { model, status, version: "", during: serving(), signal: work.signal });
      [item.state, item.error] = ["done", ""];
      if (item === shown && item.during !== serving()) item.state = "waiting"; // another version took over meanwhile
      item.bitmap().then((bitmap) => {
        if (bitmap) strip.draw(item, bitmap);
        bitmap?.close();
      });
    } catch (error) {
      if (work.signal.aborted) break;
      if (error.status === 401) {
        item.state = "waiting";
        askToken();
        break;
      }
      [item.state, item.error, item.passing] = ["error", error.message, error.status === 0 || error.status >= 500];
    }
    strip.update(item);
    if (item === shown) await refresh(true);
  }
  if (running === work) running = null;
  progress();
  const failed = items.filter(({ state }) => state === "error").length;
  if (done > 1) say(`${items.length} pictures: ${items.length - failed} answered, ${failed} failed.`);
  if (work.signal.aborted) run(); // pictures that were added since
}

function progress() {
  const count = (state) => items.filter((item) => item.state === state).length;
  const failed = count("error");
  byId("progress").textContent = `${count("done")} of ${items.length} answered${failed ? `, ${failed} failed` : ""}`;
  byId("tray").hidden = items.length === 0;
}

// ---- what is shown ----

function show(item) {
  shown = item;
  strip.mark(item);
  progress();
  const old = item.state === "done" && item.during !== serving(); // another version serves now
  if (old || (item.state === "error" && item.passing)) [item.state, item.error] = ["waiting", ""];
  byId("empty").hidden = true;
  byId("panel").hidden = false;
  refresh();
  run();
}

/** Draws the shown picture and its answers. `spoken`: the result is announced. */
async function refresh(spoken = false) {
  if (!shown || !model) return;
  const [item, drawing] = [shown, (drawings += 1)];
  offerVersions();
  byId("file-name").textContent = item.name;
  const bitmap = await item.bitmap();
  await drawAnswers(item, bitmap, drawing, spoken);
  bitmap?.close();
}

async function drawAnswers(item, bitmap, drawing, spoken) {
  if (drawing !== drawings) return;
  if (item.error) {
    fail(item.error, bitmap, item);
    return;
  }
  const [one, two] = [byId("version").value, model.task === "classify" && byId("against").value === PICTURE ? NOTHING : byId("against").value];
  let answers;
  try {
    answers = await Promise.all([one || item.served, two].map((version) => answerOf(item, version)));
  } catch (error) {
    if (drawing === drawings) fail(error.message, bitmap, item);
    return;
  }
  if (drawing !== drawings) return;
  byId("failure").hidden = true;
  byId("shown").hidden = false;
  view.draw(item, { bitmap, model, one: answers[0], two: answers[1], besidePicture: two === PICTURE });
  if (spoken) say(summary(item, answers[0]));
}

/** The kept answer of a version, decoded; a version in service is asked for one. Null for no version, and while the server computes. */
async function answerOf(item, version) {
  if (!version || version === PICTURE) return null;
  const entry = status.versions.find((one) => one.version === version && one.digest);
  let answer = item.answers.get(version);
  const old = answer && entry && answer.digest !== entry.digest; // the version was loaded again with other content
  if (!answer || old) answer = await ask(item, { model, status, version, signal: new AbortController().signal });
  const description = entry ? await models.of(entry) : model;
  return { ...answer, classes: description.classes, ...(await decode(answer, description)) };
}

function fail(message, bitmap, item) {
  byId("failure").textContent = item ? `${item.name}: ${message}` : message;
  byId("failure").hidden = false;
  view.draw(item, { bitmap, model });
  byId("by").textContent = "–";
  byId("shown").hidden = bitmap === null;
}

// ---- choices ----

byId("version").addEventListener("change", () => refresh(true));
byId("against").addEventListener("change", () => refresh(true));
byId("opacity").addEventListener("input", () => {
  const percentage = byId("opacity").value;
  view.stage.opacity = percentage;
  byId("opacity-value").textContent = `${percentage} %`;
});

/** Fills both lists: versions in service, and those that answered the shown picture. */
function offerVersions() {
  const open = status.versions.filter(({ digest }) => digest).map(({ version }) => version);
  const kept = shown ? [...shown.answers.keys()].filter((version) => !open.includes(version)) : [];
  const versions = [...open, ...kept].map((version) => [version, kept.includes(version) ? `${version} (kept answer)` : version]);
  const picture = model.task === "classify" ? [] : [[PICTURE, "the picture"]];
  offer(byId("version"), [["", "as served"], ...versions]);
  offer(byId("against"), [[NOTHING, "nothing"], ...picture, ...versions]);
}

function offer(select, choices) {
  if (JSON.stringify(choices) === select.dataset.choices) return; // an open list stays open
  const value = select.value;
  select.replaceChildren(...choices.map(([key, text]) => element("option", { value: key }, text)));
  select.dataset.choices = JSON.stringify(choices);
  select.value = choices.some(([key]) => key === value) ? value : choices[0][0];
}

// ---- the server ----

const poller = new Poller(changed, (error) => (error.status === 401 ? askToken() : trouble(error.message)));

const serving = () => {
  const entry = status?.versions.find(({ version }) => version === status.current);
  return entry ? `${entry.version} ${entry.digest}` : "";
};

async function changed(next) {
  status = next;
  trouble("");
  byId("token").hidden = true;
  byId("forget").hidden = !api.hasToken();
  byId("model").textContent = status.model;
  document.title = `${status.model} · muntin`;
  const chip = byId("serving");
  chip.className = `chip ${status.ready ? "integer" : "float"}`;
  chip.textContent = status.ready ? `version ${status.current} serves` : "not ready";
  board.show(status);
  if (shown && model) offerVersions();
  if (!status.current || serving() === described) return;
  const key = serving();
  const nextModel = await models.of(status.versions.find(({ version }) => version === status.current)).catch(() => null);
  if (nextModel === null) return;
  const first = model === null;
  [model, described] = [nextModel, key];
  if (first && model.task === "restore") {
    offer(byId("against"), [[NOTHING, "nothing"], [PICTURE, "the picture"]]);
    byId("against").value = PICTURE;
  }
  byId("invitation").textContent = model.refusal ? `${model.refusal}. Its versions and load are below.` : "Drop a picture or a folder here, or paste one.";
  byId("pick").hidden = byId("formats").hidden = Boolean(model.refusal);
  if (!first) say(`Version ${status.current} serves now.`);
  if (shown) show(shown);
  run();
}

function trouble(message) {
  const notice = byId("trouble");
  if (notice.textContent !== message) notice.textContent = message;
  notice.hidden = message === "";
  if (message) Object.assign(byId("serving"), { className: "chip float", textContent: "no answer" });
}

function askToken() {
  const [form, field] = [byId("token"), byId("token-field")];
  if (api.hasToken()) byId("token-wrong").textContent = "The server does not take this token.";
  api.forgetToken();
  byId("forget").hidden = true;
  Object.assign(byId("serving"), { className: "chip half", textContent: "token needed" });
  if (!form.hidden) return;
  form.hidden = false;
  field.focus();
}

byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  api.keepToken(byId("token-field").value.trim());
  byId("token-field").value = byId("token-wrong").textContent = "";
  poller.again().then(() => run());
});
byId("forget").addEventListener("click", () => {
  api.forgetToken();
  location.reload();
});

function say(text) {
  byId("live").textContent = text;
}

poller.again();
