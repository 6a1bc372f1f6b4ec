// Asks the gateway every few seconds and shows what it says. No dependencies, no build, nothing from elsewhere.

import { h, morphChildren } from "./dom.js";
import { facts, sections, statusText } from "./sections.js";

const PERIOD = 5000; // ms, as often as the gateway looks at its numbers
const TIMEOUT = 4000;
const HISTORY_PERIOD = 30000; // it has a new point every minute

const byId = (id) => document.getElementById(id);
const form = byId("controls");
let last = null; // what the gateway said last
let silentSince = null; // when it stopped to answer
let history = null; // the last hour
let historyAt = -Infinity;

async function get(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT), cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer.json();
}

async function ask() {
  if (document.hidden) return;
  try {
    const [state, config] = await Promise.all([get("state"), get("config"), askHistory()]);
    const { verdicts } = state.experiments?.length ? await get("verdicts") : { verdicts: [] };
    last = { state, config, history, verdicts, at: new Date() };
    silentSince = null;
  } catch (error) {
    console.warn(error);
    silentSince ??= new Date();
  }
  show();
}

async function askHistory() {
  if (performance.now() - historyAt < HISTORY_PERIOD) return;
  historyAt = performance.now();
  try {
    history = await get("history");
  } catch (error) {
    console.warn(error); // the page is of use without it
  }
}

function show() {
  document.body.classList.toggle("silent", silentSince !== null);
  const silence = silentSince && `The gateway has not answered since ${silentSince.toLocaleTimeString()}`;
  if (silence || last) setText(byId("status"), silence ?? statusText(last.state));
  if (!last) return;
  const view = { ...last, window: form.elements.window.value, filter: form.elements.filter.value.trim().toLowerCase() };
  const shown = sections
    .map((section) => ({ ...section, content: section.render(view) }))
    .filter((section) => section.content !== null);
  morphChildren(byId("facts"), h("dl", null, facts(view)));
  morphChildren(
    byId("contents"),
    h(
      "ul",
      null,
      shown.map(({ id, title }) => h("li", { "data-key": id }, h("a", { href: `#${id}` }, title))),
    ),
  );
  morphChildren(byId("main"), h("main", null, shown.map(frame)));
  setText(byId("updated"), `As of ${last.at.toLocaleTimeString()}.`);
}

function frame({ id, title, content }) {
  const heading = h("h2", { id: `${id}-title` }, title);
  return h("section", { id, "data-key": id, "aria-labelledby": `${id}-title` }, heading, content);
}

/** A live region speaks when its content is set, so it is set only when it differs. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("visibilitychange", ask);
setInterval(ask, PERIOD);
ask();
