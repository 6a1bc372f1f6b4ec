// Small plots: an effect over time with its band, and an interval beside what a guardrail allows.

import { svg } from "./dom.js";

const WIDTH = 280;
const HEIGHT = 64;
const EDGE = 4;

/**
 * The difference at each look, with its band. path: [time, difference, low, high], earliest first; null has no end yet.
 * Returns null if there is nothing to draw.
 */
export function effectOverTime(path, label) {
  const drawn = path.filter((point) => point.every((value) => value !== null));
  if (drawn.length < 2) return null;
  const widths = drawn.map(([, , low, high]) => Math.max(Math.abs(low), Math.abs(high))).sort((a, b) => a - b);
  const most = 2 * widths[Math.floor(widths.length / 2)] || 1; // the first bands are so wide that later ones were a line
  const [first, last] = [drawn[0][0], drawn[drawn.length - 1][0]];
  const x = (at) => (EDGE + ((at - first) / (last - first || 1)) * (WIDTH - 2 * EDGE)).toFixed(1);
  const y = (value) =>
    (EDGE + ((1 - Math.max(-most, Math.min(most, value)) / most) / 2) * (HEIGHT - 2 * EDGE)).toFixed(1);
  const upper = drawn.map(([at, , , high]) => `${x(at)},${y(high)}`);
  const lower = drawn.map(([at, , low]) => `${x(at)},${y(low)}`).reverse();
  const line = drawn.map(([at, difference]) => `${x(at)},${y(difference)}`);
  return svg(
    "svg",
    { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    svg("polygon", { class: "band", points: [...upper, ...lower].join(" ") }),
    svg("line", { class: "zero", x1: EDGE, x2: WIDTH - EDGE, y1: y(0), y2: y(0) }),
    svg("polyline", { class: "effect", points: line.join(" ") }),
  );
}

/** Where an interval is, beside no difference and what is allowed. All in one unit; null if an end is not known. */
export function intervalBeside(low, value, high, bound, label) {
  if ([low, value, high].some((each) => each === null)) return null;
  const most = 1.1 * Math.max(...[low, high, bound].map(Math.abs)) || 1;
  const x = (at) => (EDGE + ((at / most + 1) / 2) * (WIDTH - 2 * EDGE)).toFixed(1);
  return svg(
    "svg",
    { class: "plot", viewBox: `0 0 ${WIDTH} 24`, role: "img", "aria-label": label },
    svg("rect", { class: "band", x: x(low), y: 5, width: Math.max(1, x(high) - x(low)).toFixed(1), height: 14 }),
    svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 24 }),
    svg("line", { class: "bound", x1: x(bound), x2: x(bound), y1: 2, y2: 22 }),
    svg("circle", { class: "point", cx: x(value), cy: 12, r: 3.5 }),
  );
}
