// The sections of the page: each takes what the gateway said and gives elements, or null if it has nothing to show.
// To add one add an entry to `sections` at the end; contents and headings follow by themselves.

import { h } from "./dom.js";
import { effectOverTime, intervalBeside } from "./intervals.js";
import { plots } from "./plots.js";

const MOST = 100; // models, or endpoints of one upstream, shown at once; the filter finds the others
const SYMBOLS = { ready: "✓", fallback: "↷", down: "✕", suspect: "!", unprobed: "…", error: "✕", warning: "!" };

// What a failed attempt said, as docs/metrics.md has it.
const MEANINGS = {
  caller: "caller's fault",
  server: "server error",
  overloaded: "queue full",
  model_gone: "model gone",
  ended: "given up",
  late: "over attempt_timeout",
};

const ROLLOUT_BADGES = { promoted: "ready", running: "ready", paused: "warning", "rolled back": "warning" };

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const NONE = h("span", { class: "none" }, "–");
const none = () => NONE.cloneNode(true);

/** A state in words, with a symbol and a colour; never by colour alone. */
function badge(state, text = state) {
  return h(
    "span",
    { class: `badge ${state}` },
    h("span", { "aria-hidden": "true" }, SYMBOLS[state] ?? "•"),
    ` ${text}`,
  );
}

function milliseconds(value) {
  if (value === undefined || value === null) return none();
  return value >= 1000 ? `${number.format(value / 1000)}\u00a0s` : `${number.format(value)}\u00a0ms`;
}

function errorsText(calls) {
  const failed = Object.values(calls?.errors ?? {}).reduce((sum, count) => sum + count, 0);
  if (!calls?.calls || !failed) return calls?.calls ? "0" : none();
  const codes = Object.entries(calls.errors).map(([code, count]) => `${number.format(count)} ${code}`);
  const list = h("span", { class: "codes" }, breakable(codes.join(", ")));
  return h("span", { class: "bad" }, percent.format(failed / calls.calls), " ", list);
}

/** A text whose long names may be broken after an underscore. */
const breakable = (text) => text.split("_").map((part, index) => [index > 0 && ["_", h("wbr")], part]);

/** A table that scrolls by itself where it is too wide; the keyboard can reach it then. */
function table(label, columns, rows) {
  return h(
    "div",
    { class: "scroll", role: "region", "aria-label": label, tabindex: "0" },
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          columns.map((column) => h("th", { scope: "col" }, column)),
        ),
      ),
      h("tbody", null, rows),
    ),
  );
}

function row(key, title, ...cells) {
  return h(
    "tr",
    { "data-key": key },
    h("th", { scope: "row" }, title),
    cells.map((cell) => h("td", null, cell)),
  );
}

const anchor = (kind, name) => `${kind}-${encodeURIComponent(name)}`;
const numbersOf = ({ state, window }) =>
  state.traffic?.windows.find((each) => each.name === window) ?? { models: {}, endpoints: {} };
const matches = (view, ...names) => !view.filter || names.some((name) => name.toLowerCase().includes(view.filter));

// Head of the page

export function statusText(state) {
  const what = state.draining ? "Draining" : state.ready ? "Serving" : "Not ready";
  const notices = state.attention.length;
  if (notices === 0) return `${what}. Nothing needs attention.`;
  return `${what}. ${notices === 1 ? "1 thing needs" : `${notices} things need`} attention.`;
}

export function facts({ state, config }) {
  const workers = Object.keys(state.workers ?? {}).length || 1;
  const given = {
    Version: state.version ?? "–",
    Serves: state.listen ?? "–",
    Workers: workers,
    Config: configText(config),
  };
  return Object.entries(given).map(([name, value]) =>
    h("div", { "data-key": name }, h("dt", null, name), h("dd", null, String(value))),
  );
}

function configText({ current, changes }) {
  if (current) return `${current.digest.slice(0, 12)}, since ${when(current.time)}`;
  return changes.length ? "differs between workers" : "–";
}

function when(time) {
  const date = new Date(time);
  return date.toDateString() === new Date().toDateString() ? date.toLocaleTimeString() : date.toLocaleString();
}

// What needs attention

function attention({ state }) {
  if (!state.attention.length) return h("p", { "data-key": "none" }, badge("ready", "Nothing needs attention."));
  return h(
    "ul",
    { class: "notices", "data-key": "notices" },
    state.attention.map(({ severity, kind, name, text }) => {
      const target = kind === "endpoint" ? ["upstream", name.split("/")[0]] : [kind, name];
      const about = name ? h("a", { href: `#${anchor(...target)}` }, `${kind} ${name}`) : kind;
      return h(
        "li",
        { "data-key": `${kind} ${name} ${text}`, class: severity },
        badge(severity),
        " ",
        about,
        " ",
        text,
      );
    }),
  );
}

// Models → variants → endpoints

function models(view) {
  const { state } = view;
  const numbers = numbersOf(view);
  const noticed = new Set(state.attention.filter((each) => each.kind === "model").map((each) => each.name));
  const found = [...Object.keys(state.models), ...Object.keys(state.pipelines)].filter((name) => matches(view, name));
  const ordered =
    found.length <= MOST
      ? found
      : [...found.filter((name) => noticed.has(name)), ...found.filter((name) => !noticed.has(name))];
  const ofTriton = Object.keys(state.triton_models ?? {}).filter((name) => matches(view, name));
  return [
    found.length + ofTriton.length === 0 &&
      h("p", { "data-key": "none" }, view.filter ? "No model has such a name." : "No public model is configured."),
    ordered
      .slice(0, MOST)
      .map((name) =>
        state.models[name] ? model(view, name, numbers.models[name]) : pipeline(view, name, numbers.models[name]),
      ),
    found.length > MOST &&
      h("p", { "data-key": "more" }, `${MOST} of ${found.length} models are shown; the field above finds the others.`),
    tritonModels(view, ofTriton, numbers),
    ownNames(view, numbers),
  ];
}

function heading(view, name, kind, calls, stateBadge) {
  const inFlight = view.state.traffic?.in_flight[name] ?? 0;
  const shown = {
    "Calls/s": calls ? number.format(calls.per_second) : "0",
    Errors: errorsText(calls),
    p50: milliseconds(calls?.ms?.p50),
    p95: milliseconds(calls?.ms?.p95),
    p99: milliseconds(calls?.ms?.p99),
    "Gateway's own p99": milliseconds(calls?.overhead_ms?.p99),
    "In flight": number.format(inFlight),
    Fallbacks: calls?.fallbacks ? number.format(calls.fallbacks) : null,
    "Queue full": calls?.queue_full ? number.format(calls.queue_full) : null,
  };
  const entries = Object.entries(shown).filter(([, value]) => value !== null);
  return [
    h("h3", { "data-key": "name" }, name, " ", h("span", { class: "kind" }, kind), " ", stateBadge),
    h(
      "dl",
      { class: "numbers", "data-key": "numbers" },
      entries.map(([title, value]) => h("div", { "data-key": title }, h("dt", null, title), h("dd", null, value))),
    ),
  ];
}

function model(view, name, calls) {
  const { variants, shares, fallback } = view.state.models[name];
  const names = Object.keys(variants);
  const ready = names.filter((each) => variants[each].ready);
  const isFull = names.every((each) => variants[each].ready || !shares[each]);
  const stateBadge =
    ready.length === 0
      ? badge("down", "no variant ready")
      : isFull
        ? badge("ready")
        : badge("fallback", "on its fallback");
  const total = Object.values(shares).reduce((sum, share) => sum + share, 0) || 1;
  const rows = names.map((each) => variantRow(view, variants[each], each, (shares[each] ?? 0) / total, calls));
  const columns = [
    "Variant",
    "State",
    "Share set",
    "Share now",
    "Calls/s",
    "Errors",
    "p50",
    "p99",
    "Triton model",
    "Endpoints",
  ];
  return h(
    "article",
    { id: anchor("model", name), "data-key": `model ${name}` },
    heading(view, name, "", calls, stateBadge),
    plots(name, view.history, limitsOf(view, variants)),
    table(`Variants of ${name}`, columns, rows),
    calledBy(view, name),
    names.length > 1 &&
      h("p", { class: "note", "data-key": "fallback" }, `Fallback: ${fallbackText(fallback, names)}.`),
  );
}

/** The limits of a model's variants over the last hour, each Triton model once. */
function limitsOf({ history }, variants) {
  const names = Object.values(variants).map((each) => `${each.upstream}/${each.model}`);
  return Object.fromEntries(names.filter((name) => history?.limits?.[name]).map((name) => [name, history.limits[name]]));
}

function fallbackText(fallback, names) {
  if (fallback === null) return `the others in order, ${names.join(" → ")}`;
  return fallback.length ? fallback.join(" → ") : "none";
}

function variantRow(view, variant, name, share, calls) {
  const own = calls?.variants[name];
  const now = calls?.calls ? (own?.calls ?? 0) / calls.calls : null;
  return row(
    name,
    name,
    variant.ready ? badge("ready") : badge("down", "unavailable"),
    percent.format(share),
    measuredShare(now),
    own ? number.format(own.per_second) : none(),
    errorsText(own),
    milliseconds(own?.ms?.p50),
    milliseconds(own?.ms?.p99),
    variant.version ? `${variant.model}, version ${variant.version}` : variant.model,
    endpointsOf(view, variant),
  );
}

/** share: of the calls, in [0, 1]; null if there were none. */
function measuredShare(share) {
  if (share === null) return none();
  return h(
    "span",
    { class: "share" },
    h("meter", { min: 0, max: 1, value: share, "aria-hidden": "true" }),
    ` ${percent.format(share)}`,
  );
}

function endpointsOf(view, variant) {
  const endpoints = view.state.upstreams[variant.upstream] ?? [];
  const key = variant.version ? `${variant.model}:${variant.version}` : variant.model;
  const able = endpoints.filter((each) => each.state !== "down" && each.models[key] !== false);
  const link = h("a", { href: `#${anchor("upstream", variant.upstream)}` }, variant.upstream);
  return [link, ` ${able.length} of ${endpoints.length}`];
}

/** The pipelines that call a model, whose calls count there. */
function calledBy({ state }, name) {
  const callers = Object.keys(state.pipelines).filter((each) => state.pipelines[each].calls.includes(name));
  if (!callers.length) return null;
  const links = callers.map((each, index) => [
    index > 0 && ", ",
    h("a", { href: `#${anchor("model", each)}` }, each),
  ]);
  return h("p", { class: "note", "data-key": "called by" }, "Called by ", links, "; the numbers here are without these.");
}

function pipeline(view, name, calls) {
  const { ready, calls: called } = view.state.pipelines[name];
  const links = called.map((each, index) => [
    index > 0 && ", ",
    view.state.models[each] ? h("a", { href: `#${anchor("model", each)}` }, each) : each,
  ]);
  const rows = [...new Set([...called, ...Object.keys(calls?.called ?? {})])] // a pipeline that it calls calls others
    .filter((each) => view.state.models[each])
    .flatMap((each) => calledRows(view.state.models[each], each, calls?.called?.[each] ?? {}));
  const columns = ["Model called", "Variant", "State", "Share set", "Share now", "Attempts", "Failed attempts"];
  return h(
    "article",
    { id: anchor("model", name), "data-key": `model ${name}` },
    heading(view, name, "pipeline", calls, ready ? badge("ready") : badge("down", "can't answer")),
    plots(name, view.history, {}),
    rows.length > 0 && table(`Variants behind ${name}`, columns, rows),
    h("p", { class: "note", "data-key": "calls" }, "Calls ", links, "."),
  );
}

const CALLS = ["Calls/s", "Errors", "p50", "p99"];

const callsCells = (calls) => [
  calls ? number.format(calls.per_second) : "0",
  errorsText(calls),
  milliseconds(calls?.ms?.p50),
  milliseconds(calls?.ms?.p99),
];

/** Models that the config does not name, where all of Triton's may be called. */
function tritonModels(view, names, numbers) {
  if (!names.length) return null;
  const rows = names.slice(0, MOST).map((name) => {
    const model = view.state.triton_models[name];
    const said = model.ready ? badge("ready") : model.state ? badge("down", "unavailable") : badge("none", "not loaded");
    const reason = model.reason && [" ", h("span", { class: "reason" }, model.reason)];
    return row(name, h("span", { id: anchor("model", name) }, name), [said, reason], ...callsCells(numbers.models[name]));
  });
  const title = "Models of Triton, by their own names";
  return h(
    "article",
    { "data-key": "triton models" },
    h("h3", null, title),
    table(title, ["Model", "State", ...CALLS], rows),
    names.length > MOST &&
      h("p", { "data-key": "more" }, `${MOST} of ${names.length} models are shown; the field above finds the others.`),
  );
}

/** The variants of a model as a pipeline's calls of it saw them. made: attempts by variant and meaning. */
function calledRows({ variants, shares }, model, made) {
  const total = Object.values(shares).reduce((sum, share) => sum + share, 0) || 1;
  const sum = (attempts) => Object.values(attempts ?? {}).reduce((all, count) => all + count, 0);
  const all = Object.values(made).reduce((before, attempts) => before + sum(attempts), 0);
  return Object.keys(variants).map((each) => {
    const { ok = 0, ...failures } = made[each] ?? {};
    return row(
      `${model} ${each}`,
      h("a", { href: `#${anchor("model", model)}` }, model),
      each,
      variants[each].ready ? badge("ready") : badge("down", "unavailable"),
      percent.format((shares[each] ?? 0) / total),
      measuredShare(all ? sum(made[each]) / all : null),
      all ? number.format(sum(made[each])) : none(),
      failuresText(failures, ok),
    );
  });
}

/** Calls by names that are no models here: Triton's own of variants, and `other` for those that nobody configured. */
function ownNames(view, numbers) {
  const { state } = view;
  const isShown = (name) => state.models[name] || state.pipelines[name] || state.triton_models?.[name];
  const names = Object.keys(numbers.models).filter((name) => !isShown(name) && matches(view, name));
  if (!names.length) return null;
  const rows = names.map((name) => row(name, name, ...callsCells(numbers.models[name])));
  const columns = ["Name", ...CALLS];
  return h(
    "article",
    { "data-key": "own names" },
    h("h3", null, "Called by other names"),
    table("Called by other names", columns, rows),
  );
}

// Rollouts

function rollouts(view) {
  const found = (view.state.rollouts ?? []).filter((each) => matches(view, each.name, each.model));
  if (!found.length) return null;
  return found.map((each) =>
    h(
      "article",
      { id: anchor("rollout", each.name), "data-key": `rollout ${each.name}` },
      h(
        "h3",
        { "data-key": "name" },
        each.name,
        " ",
        h("span", { class: "kind" }, `${each.from} → ${each.to}`),
        " ",
        badge(ROLLOUT_BADGES[each.state] ?? "unprobed", each.state),
      ),
      h(
        "p",
        { class: "note", "data-key": "where" },
        "Model ",
        h("a", { href: `#${anchor("model", each.model)}` }, each.model),
        `. Step ${each.step} of ${each.steps}, ${percent.format(each.share)} of units`,
        each.units ? `, ${number.format(each.units)} seen` : "",
        each.waits.length ? `. Waits: ${each.waits.join("; ")}` : "",
        ".",
      ),
      each.trouble && h("p", { class: "bad", "data-key": "trouble" }, each.trouble),
      each.guardrails.length > 0 &&
        table(
          `Guardrails of ${each.name}`,
          ["Guardrail", "State", "Left", "In words"],
          each.guardrails.map((guardrail) =>
            row(
              guardrail.name,
              guardrail.name,
              badge({ held: "ready", breached: "error" }[guardrail.state] ?? "unprobed", guardrail.state),
              guardrail.distance === null ? none() : guardrail.distance.toPrecision(3),
              guardrail.text,
            ),
          ),
        ),
      each.history.length > 0 &&
        table(
          `History of ${each.name}`,
          ["When", "State", "Share", "Why"],
          [...each.history]
            .reverse()
            .map(({ at, state, share, reason }) =>
              row(
                `${at}`,
                h("time", { datetime: new Date(at * 1000).toISOString() }, when(at * 1000)),
                state,
                percent.format(share),
                reason,
              ),
            ),
        ),
    ),
  );
}

// Upstreams and their endpoints

function upstreams(view) {
  const { endpoints: attempts } = numbersOf(view);
  const found = Object.entries(view.state.upstreams).filter(([name, endpoints]) =>
    matches(view, name, ...endpoints.map((each) => each.address)),
  );
  if (!found.length) return h("p", { "data-key": "none" }, "No upstream has such a name.");
  return found.map(([name, endpoints]) => {
    const rows = endpoints.slice(0, MOST).map((each) => endpointRow(each, attempts[name]?.[each.address] ?? {}));
    const columns = ["Endpoint", "State", "In flight", "Attempts", "Failed attempts", "Models not ready"];
    return h(
      "article",
      { id: anchor("upstream", name), "data-key": `upstream ${name}` },
      h("h3", null, name),
      endpoints.length
        ? table(`Endpoints of ${name}`, columns, rows)
        : h("p", null, badge("down", "No address is known.")),
      endpoints.length > MOST && h("p", { "data-key": "more" }, `${MOST} of ${endpoints.length} endpoints are shown.`),
    );
  });
}

/** Failed attempts by what they said. ok: those that did not fail. */
function failuresText(failures, ok) {
  const told = Object.entries(failures).map(
    ([meaning, count]) => `${number.format(count)} ${MEANINGS[meaning] ?? meaning}`,
  );
  return told.length ? h("span", { class: "bad" }, told.join(", ")) : ok ? "0" : none();
}

function endpointRow(endpoint, attempts) {
  const { ok = 0, ...failures } = attempts;
  const made = Object.values(failures).reduce((sum, count) => sum + count, ok);
  const missing = Object.keys(endpoint.models).filter((name) => !endpoint.models[name]);
  const state =
    endpoint.state === "ready" || !endpoint.reason
      ? badge(endpoint.state)
      : [badge(endpoint.state), " ", h("span", { class: "reason" }, endpoint.reason)];
  return row(
    endpoint.address,
    endpoint.address,
    state,
    number.format(endpoint.in_flight),
    made ? number.format(made) : none(),
    failuresText(failures, ok),
    missing.length ? h("span", { class: "bad" }, missing.join(", ")) : none(),
  );
}

// Experiments

const ANSWERS = {
  treatment: ["ready", (verdict) => `${verdict.arm} is better`],
  baseline: ["ready", (verdict) => `${verdict.arm}, the baseline, is better`],
  equivalent: ["ready", () => "no difference worth knowing"],
  undecided: ["unprobed", () => "not decided yet"],
  invalid: ["error", () => "void"],
};

function experiments(view) {
  const found = (view.state.experiments ?? []).filter((each) => matches(view, each.name, each.model));
  if (!found.length) return null;
  const known = new Map(view.verdicts.map((each) => [each.name, each]));
  return found.map((each) => experiment(each, known.get(each.name)));
}

function experiment(each, verdict) {
  const said = verdict && !verdict.trouble ? verdict : null;
  const [state, text] = each.sample_ratio_mismatched ? ANSWERS.invalid : (ANSWERS[said?.answer] ?? ANSWERS.undecided);
  return h(
    "article",
    { id: anchor("experiment", each.name), "data-key": `experiment ${each.name}` },
    h(
      "h3",
      { "data-key": "name" },
      each.name,
      " ",
      h("span", { class: "kind" }, "of ", h("a", { href: `#${anchor("model", each.model)}` }, each.model)),
      " ",
      each.stopped_with ? badge("suspect", `stopped, all get ${each.stopped_with}`) : badge(state, text(said ?? {})),
    ),
    h("p", { class: "note", "data-key": "advice" }, verdictText(verdict)),
    armsTable(each, said),
    each.bandit && bandit(each.name, each.bandit),
    said?.primary.map((effect) => primary(effect)),
    said?.guardrails.length > 0 && guardrailsTable(each.name, said.guardrails),
    said?.doubts.length > 0 &&
      h(
        "ul",
        { class: "note", "data-key": "doubts" },
        said.doubts.map((doubt) => h("li", null, `May be wrong: ${doubt}`)),
      ),
    historyText(said),
  );
}

function verdictText(verdict) {
  if (!verdict) return "No verdict yet: one is found about once a minute.";
  if (verdict.trouble) return `No report: ${verdict.trouble}`;
  const advice = verdict.stopped ? `At its end: ${ANSWERS[verdict.answer][1](verdict)}.` : verdict.advice;
  return `${advice} As of ${when(verdict.at * 1000)}, after ${number.format(verdict.units)} units.`;
}

function armsTable(each, said) {
  const units = Object.keys(each.units).length ? each.units : (said?.arms ?? {});
  const total = Object.values(units).reduce((sum, count) => sum + count, 0);
  const planned = Object.values(said?.expected ?? {}).reduce((sum, count) => sum + count, 0);
  const rows = Object.entries(units).map(([arm, count]) =>
    row(
      arm,
      arm,
      number.format(count),
      total ? percent.format(count / total) : none(),
      planned ? percent.format(said.expected[arm] / planned) : none(),
    ),
  );
  return rows.length > 0 && table(`Arms of ${each.name}`, ["Arm", "Units", "Share seen", "Share planned"], rows);
}

function bandit(name, { epoch, epochs, shares, trouble, waits, history }) {
  const arms = Object.keys(shares);
  const rows = history.map((each, place) =>
    row(
      `${place}`,
      `${place + 1}`,
      h("time", { datetime: new Date(each.at * 1000).toISOString() }, when(each.at * 1000)),
      each.units ? number.format(each.units) : none(),
      ...arms.map((arm) => percent.format(each.shares[arm])),
    ),
  );
  return h(
    "div",
    { "data-key": "bandit" },
    h(
      "p",
      { class: "note" },
      epoch
        ? `A bandit in epoch ${epoch} of ${epochs}: better arms get more of the units that come to take part.`
        : "A bandit of which no epoch has begun: all units have the baseline.",
      waits && ` Another one is due: ${waits}.`,
    ),
    trouble && h("p", { class: "bad", "data-key": "trouble" }, trouble),
    rows.length > 0 && table(`Epochs of ${name}`, ["Epoch", "Since", "By rewards of", ...arms], rows.reverse()),
  );
}

const signed = (value) => (value === null ? "?" : `${value > 0 ? "+" : ""}${value.toPrecision(3)}`);
const signedPercent = (value) => (value === null ? "?" : `${value > 0 ? "+" : ""}${number.format(100 * value)}\u00a0%`);

function primary(effect) {
  const interval = `${signed(effect.difference)} [${signed(effect.low)}, ${signed(effect.high)}]`;
  const relative = `${signedPercent(effect.relative)} [${signedPercent(effect.relative_low)}, ${signedPercent(effect.relative_high)}]`;
  const confidence = percent.format(1 - effect.alpha);
  return h(
    "div",
    { "data-key": `primary ${effect.arm}` },
    h(
      "p",
      { class: "note" },
      `${effect.outcome} of ${effect.arm} less ${effect.baseline}: ${interval}, ${relative}, `,
      `at ${confidence} confidence at every look; ${effect.judgement}.`,
      effect.method && ` Method: ${effect.method}.`,
      effect.past && ` ${pastText(effect.past)}`,
    ),
    effectOverTime(effect.path, `${effect.outcome} of ${effect.arm} less ${effect.baseline} over time, with its interval`),
  );
}

/** By how much a unit's past has made the interval narrower (CUPED). */
const pastText = ({ units, removed }) =>
  `The past of ${number.format(units)} units takes ${number.format(100 * removed)}\u00a0% of the variance away (CUPED).`;

function guardrailsTable(name, guardrails) {
  const rows = guardrails.map((each) => {
    const ends = each.worse_by.is_relative
      ? [each.relative_low, each.relative, each.relative_high]
      : [each.low, each.difference, each.high];
    const bound = each.better === "higher" ? -each.worse_by.size : each.worse_by.size;
    const worst = each.better === "higher" ? ends[0] : ends[2];
    const told = each.worse_by.is_relative ? signedPercent : signed;
    const left = worst === null ? none() : told(Math.abs(bound) - (each.better === "higher" ? -worst : worst));
    const state = { held: "ready", breached: "error" }[each.state] ?? "unprobed";
    return row(
      `${each.outcome} ${each.arm}`,
      `${each.outcome} of ${each.arm}`,
      [badge(state, each.state), each.breached_at ? ` first known ${when(each.breached_at * 1000)}` : ""],
      `${told(ends[1])} [${told(ends[0])}, ${told(ends[2])}]`,
      told(bound),
      left,
      intervalBeside(...ends, bound, `${each.outcome} of ${each.arm} beside what is allowed`) ?? none(),
    );
  });
  const columns = ["Guardrail", "State", "Difference", "Allowed", "Left at the worst end", "Interval"];
  return table(`Guardrails of experiment ${name}`, columns, rows);
}

function historyText(said) {
  if (!said) return null;
  const first = said.since ?? said.primary[0]?.path[0]?.[0];
  const ended = said.stopped && `; stopped ${when(said.stopped.at * 1000)}, everybody gets ${said.stopped.arm}`;
  return (
    first &&
    h(
      "p",
      { class: "note", "data-key": "history" },
      `Units since ${when(first * 1000)}${ended || ""}.`,
      said.left_out && ` Left out: ${said.left_out}.`,
    )
  );
}

// Config

function changes({ config }) {
  const rows = config.changes.map((change) =>
    row(
      `${change.time} ${change.digest} ${change.accepted}`,
      h("time", { datetime: change.time }, when(change.time)),
      change.accepted ? badge("ready", "in force") : badge("error", "refused"),
      change.digest ? h("code", null, change.digest.slice(0, 12)) : none(),
      change.source,
      change.findings.length
        ? h(
            "ul",
            null,
            change.findings.map((finding) => h("li", null, finding)),
          )
        : none(),
    ),
  );
  const columns = ["When", "Result", "Digest", "From", "Findings"];
  return h("div", { class: "stacks", "data-key": "table" }, table("Recent changes of the config", columns, rows));
}

export const sections = [
  { id: "attention", title: "Needs attention", render: attention },
  { id: "models", title: "Models", render: models },
  { id: "rollouts", title: "Rollouts", render: rollouts },
  { id: "experiments", title: "Experiments", render: experiments },
  { id: "upstreams", title: "Upstreams", render: upstreams },
  { id: "changes", title: "Config changes", render: changes },
];
