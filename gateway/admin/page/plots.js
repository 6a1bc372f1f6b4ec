// Small plots of the last hour: one line each, drawn from what the gateway remembers. Each says in words what it shows.

import { h, svg } from "./dom.js";

const WIDTH = 180;
const HEIGHT = 44;
const POINTS = 60; // of an hour
const COLOURS = 6; // that shares may have, in page.css; further variants are drawn together

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });

/** The plots of one model; null while there is no point yet. limits: for its variants, by name. */
export function plots(name, history, limits) {
  const found = history?.models?.[name];
  if (!found) return null;
  const { seconds } = history;
  const perSecond = (values) => values.map((value, index) => (seconds[index] ? value / seconds[index] : null));
  const figures = [
    line("Calls/s", perSecond(found.calls), number.format),
    line("Errors/s", perSecond(found.errors), number.format, "errors"),
    line("p99", found.p99_ms, (value) => `${number.format(value)} ms`),
    line("In flight", found.in_flight, number.format, "", sum(Object.values(limits))),
    shares(found.variants),
  ];
  return h("div", { class: "plots", "data-key": "plots" }, figures);
}

const x = (index, count) => ((POINTS - count + index) / (POINTS - 1)) * WIDTH;
const y = (value, most) => HEIGHT - 1 - (most ? value / most : 0) * (HEIGHT - 2);
const known = (values) => values.filter((value) => value !== null);

/** Point by point; null where nothing is known. */
function sum(rows) {
  if (!rows.length) return [];
  return rows[0].map((_, index) => {
    const values = known(rows.map((row) => row[index]));
    return values.length ? values.reduce((total, value) => total + value, 0) : null;
  });
}

function figure(title, said, drawn, more = null) {
  return h(
    "figure",
    { "data-key": title },
    h("figcaption", null, title, " ", h("span", { class: "now" }, said)),
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title} over the last hour: ${said}` },
      ...drawn,
    ),
    more,
  );
}

function line(title, values, format, kind = "", limit = []) {
  const seen = known(values);
  const bounds = known(limit);
  const most = Math.max(...seen, ...bounds, 0);
  const last = values.at(-1);
  const limited = bounds.length ? `, limit ${format(bounds.at(-1))}` : "";
  const said = seen.length ? `${last === null ? "–" : format(last)}, most ${format(Math.max(...seen))}${limited}` : "none";
  const drawn = [svg("path", { class: `line ${kind}`, d: path(values, most) })];
  if (bounds.length) drawn.push(svg("path", { class: "limit", d: path(limit, most) }));
  return figure(title, said, drawn);
}

/** A line with gaps where nothing is known. A point alone is a dot. */
function path(values, most) {
  let joined = false;
  return values
    .map((value, index) => {
      if (value === null) {
        joined = false;
        return "";
      }
      const at = `${x(index, values.length).toFixed(1)} ${y(value, most).toFixed(1)}`;
      const step = joined ? `L${at}` : `M${at}h0.1`;
      joined = true;
      return step;
    })
    .join("");
}

/** Who answered: a band for each variant, upon each other. One variant needs no plot. */
function shares(variants) {
  const names = Object.keys(variants);
  if (names.length < 2) return null;
  const rows = Object.entries(variants).sort(([, one], [, other]) => total(other) - total(one));
  const bands = rows.slice(0, COLOURS);
  const totals = sum(rows.map(([, values]) => values));
  const below = totals.map(() => 0);
  const drawn = bands.flatMap(([, values], band) =>
    totals.flatMap((all, index) => {
      const share = all ? values[index] / all : 0;
      const from = below[index];
      below[index] += share;
      if (!share) return [];
      const top = y(from + share, 1);
      const width = WIDTH / (POINTS - 1);
      const at = { x: (x(index, totals.length) - width).toFixed(1), y: top.toFixed(1) };
      return [
        svg("rect", { class: `band-${band}`, "shape-rendering": "crispEdges", ...at, width: (width + 0.2).toFixed(1), height: (y(from, 1) - top).toFixed(1) }),
      ];
    }),
  );
  const last = totals.findLastIndex((all) => all > 0);
  const said = bands.map(([name, values]) => `${name} ${last < 0 ? "–" : percent.format(values[last] / totals[last])}`);
  const legend = bands.map(([name], band) =>
    h("li", { "data-key": name }, h("span", { class: `key band-${band}`, "aria-hidden": "true" }), name),
  );
  return figure("Shares", said.join(", "), drawn, h("ul", { class: "legend", "data-key": "legend" }, legend));
}

const total = (values) => values.reduce((all, value) => all + value, 0);
