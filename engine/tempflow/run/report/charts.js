// Draws the charts of a report as inline SVG, in the page's width and colors and over the chosen x axis.
// The data are made by charts.py. No library: the page is one file that opens offline.
(() => {
"use strict";

const { frames, charts } = JSON.parse(document.getElementById("run-data").textContent);
const AXES = { iteration: "iteration", minutes: "minutes", images: "rewarded images", forwards: "transformer forwards" };
// Outlines of radius 1, one for each color, so that lines are told apart without it.
const SHAPES = ["M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", "M-.9-.9H.9V.9H-.9z", "M0-1.2 1.1.8H-1.1z", "M0-1.3 1.1 0 0 1.3-1.1 0z",
  "M0 1.2 1.1-.8H-1.1z", "M-.35-1.1h.7v.75h.75v.7H.35v.75h-.7V.35H-1.1v-.7h.75z", "M-.6-1.1H.6L1.1 0 .6 1.1H-.6L-1.1 0z", "M-1.2-.5H1.2V.5H-1.2z"];
// Pixels; the bottom holds the labels of the x axis and its name.
const MARGIN = { top: 10, right: 14, bottom: 38 };
const LABEL = 6.7; // width of a digit of the axis labels, px
let axis = "iteration";

const escape = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const known = values => values.filter(v => v !== null && v !== undefined);
const clamp = (v, lo, hi) => Math.min(hi, Math.max(lo, v));
const minus = text => text.replace(/-/g, "−");

function number(v, digits = 4) {
  if (v === null || v === undefined) return "–";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size < 1e-3 || size >= 1e9) return minus(Number(v.toPrecision(3)).toExponential());
  if (size >= 1000) return minus(v.toLocaleString("en-US", { maximumFractionDigits: 0 }));
  return minus(String(Number(v.toPrecision(digits))));
}

// A step of 1, 2 or 5 times a power of ten, with about `count` ticks between lo and hi.
function tickStep(lo, hi, count, whole) {
  const rough = (hi - lo) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999) || rough;
  return whole ? Math.max(1, Math.round(step)) : step;
}

function ticks(lo, hi, count, whole = false) {
  const step = tickStep(lo, hi, count, whole), out = [];
  // n * step, not a running sum, whose rounding errors would show as 0.30000000000000004.
  for (let n = Math.ceil(lo / step - 1e-9); n * step <= hi + step * 1e-9; n++) out.push(n * step);
  return { step, at: out };
}

function tickLabel(v, step) {
  const size = Math.abs(v);
  if (size < step * 1e-6) return "0";
  if (size >= 1e6) return minus(`${Number((v / 1e6).toFixed(2))}M`);
  if (size >= 1e4) return minus(`${Number((v / 1e3).toFixed(1))}k`);
  // Three digits tell ticks apart unless they are close together far from zero, as 1.0002 and 1.0004.
  if (step < 1e-3 && size < 1000 * step) return minus(Number(v.toPrecision(3)).toExponential());
  if (step < 1e-3) return minus(v.toFixed(clamp(Math.ceil(-Math.log10(step) - 1e-9), 0, 12)));
  return minus(v.toFixed(clamp(-Math.floor(Math.log10(step) + 1e-9), 0, 4)));
}

// The same class decides color, dashes (style.css) and shape.
function dot(style, x, y, r) {
  const shape = SHAPES[(style.match(/\bc(\d)\b/) || [0, style.includes("second") ? 1 : 0])[1]];
  return `<path class="dot ${style}" transform="translate(${x} ${y}) scale(${r})" d="${shape}"/>`;
}

function errorBar(style, x, low, high) {
  const end = y => `M${x - 3} ${y}h6`;
  return `<path class="error ${style}" d="M${x} ${low}V${high}${end(low)}${end(high)}"/>`;
}

// The range of all values with their error bars and the level, and some room at the ends.
function yRange(chart) {
  const ends = s => s.error ? s.y.flatMap((v, n) => v === null || s.error[n] === null ? [v] : [v - s.error[n], v + s.error[n]]) : s.y;
  const values = known(chart.series.flatMap(ends).concat(chart.level ? [chart.level.y] : []));
  let lo = Math.min(...values), hi = Math.max(...values);
  if (chart.from_zero) lo = Math.min(0, lo);
  if (hi === lo) { const pad = Math.abs(hi) * 0.1 || 1; return [chart.from_zero ? lo : lo - pad, hi + pad]; }
  const pad = (hi - lo) * 0.06;
  return [chart.from_zero ? lo : lo - pad, hi + pad];
}

// The plot area and its axes; x maps data to pixels, and so does y.
function scene(width, height, [yLo, yHi], whole = false) {
  const yTicks = ticks(yLo, yHi, Math.max(2, Math.floor(height / 48)), whole);
  const labels = yTicks.at.map(v => tickLabel(v, yTicks.step));
  const left = Math.max(...labels.map(t => t.length), 2) * LABEL + 12;
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const y = v => bottom - (v - yLo) / (yHi - yLo) * (bottom - MARGIN.top);
  const grid = yTicks.at.map((v, n) => `<line class="rule" x1="${left}" x2="${right}" y1="${y(v)}" y2="${y(v)}"/>` +
    `<text class="tick" x="${left - 7}" y="${y(v) + 4}" text-anchor="end">${labels[n]}</text>`).join("");
  return { left, right, bottom, top: MARGIN.top, width, height, y, markup: grid };
}

function xAxis(area, marks, name) {
  const texts = marks.map(([px, text]) => {
    const anchor = px > area.right - 12 ? "end" : px < area.left + 4 ? "start" : "middle";
    return `<text class="tick" x="${px}" y="${area.bottom + 16}" text-anchor="${anchor}">${text}</text>`;
  }).join("");
  return `<line class="axis" x1="${area.left}" x2="${area.right}" y1="${area.bottom}" y2="${area.bottom}"/>${texts}` +
    `<text class="tick name" x="${(area.left + area.right) / 2}" y="${area.height - 5}" text-anchor="middle">${name}</text>`;
}

function path(xs, ys, x, y, bridge) {
  let out = "", pen = false;
  ys.forEach((v, n) => {
    if (v === null) { pen = pen && bridge; return; }
    // h0: a point between two gaps is drawn as a round cap; a lone M would draw nothing.
    out += pen ? `L${x(xs[n]).toFixed(1)} ${y(v).toFixed(1)}` : `M${x(xs[n]).toFixed(1)} ${y(v).toFixed(1)}h0`;
    pen = true;
  });
  return out;
}

function drawLines(chart, width, height) {
  const all = chart.series.flatMap(s => frames[s.frame][axis]);
  let lo = Math.min(...all), hi = Math.max(...all);
  if (hi === lo) { lo -= 1; hi += 1; }
  const area = scene(width, height, yRange(chart), chart.whole);
  const x = v => area.left + (v - lo) / (hi - lo) * (area.right - area.left);
  const xTicks = ticks(lo, hi, clamp((area.right - area.left) / 50, 3, 10), axis !== "minutes");
  let body = area.markup + xAxis(area, xTicks.at.map(v => [x(v), tickLabel(v, xTicks.step)]), AXES[axis]);
  const points = [];
  for (const s of [...chart.series].reverse()) { // the first lies on top
    const xs = frames[s.frame][axis];
    body += `<path class="line ${s.style}" d="${path(xs, s.y, x, area.y, s.frame.startsWith("eval") || s.style.includes("bridge"))}"/>`;
    s.y.forEach((v, n) => {
      if (v === null) return;
      const error = s.error ? s.error[n] : null;
      if (error !== null) body += errorBar(s.style, x(xs[n]), area.y(v - error), area.y(v + error));
      if (s.style.includes("dots")) body += dot(s.style, x(xs[n]), area.y(v), 3.5);
      if (s.tip !== false) points.push({ px: x(xs[n]), py: area.y(v), at: xs[n], name: s.name, style: s.style, v, error });
    });
  }
  if (chart.level) body += levelLine(chart.level, area); // last: its label lies over the lines
  return { area, body, points };
}

function levelLine(level, area) {
  const y = area.y(level.y), below = y + 18 < area.bottom;
  return `<line class="level" x1="${area.left}" x2="${area.right}" y1="${y}" y2="${y}"/>` +
    `<text class="tick level" x="${area.right}" y="${below ? y + 14 : y - 6}" text-anchor="end">${escape(level.name)} ${level.name === "base" && Math.abs(level.y) < 10 ? level.y.toFixed(3) : number(level.y)}</text>`;
}

// Evenly spaced columns, also over minutes or images, one for each stretch of iterations, labelled where there is room.
function columns(area) {
  const at = frames.coarse[axis], each = Math.min((area.right - area.left) / at.length, 140);
  const x = n => Math.round(area.left + n * each), // whole pixels: no seams between columns
    hi = at[at.length - 1];
  if (at.length === 1) return { each, x, marks: [[x(0.5), number(at[0])]] };
  const { step, at: round } = ticks(at[0], hi, clamp(at.length * each / 50, 2, 10), axis !== "minutes");
  return { each, x, marks: round.map(v => [x(at.findIndex(a => a >= v - step * 1e-9) + 0.5), tickLabel(v, step)]) };
}

function drawStack(chart, width, height) {
  const count = chart.series[0].y.length;
  const tops = frames.coarse[axis].map((_, n) => chart.series.reduce((sum, s) => sum + (s.y[n] || 0), 0));
  const area = scene(width, height, [0, (Math.max(...tops) || 1) * 1.05]);
  const { each, x, marks } = columns(area); // each: a column's width
  let body = area.markup + xAxis(area, marks, AXES[axis]);
  const points = [], base = new Array(count).fill(0), gap = each > 5 ? 1 : 0;
  for (const s of chart.series) s.y.forEach((v, n) => {
    const from = area.y(base[n]), to = area.y(base[n] += v || 0);
    body += `<rect class="fill ${s.style}" x="${x(n)}" y="${to}" width="${x(n + 1) - x(n) - gap}" height="${Math.max(0, from - to - (from - to > 3 ? 1 : 0))}"/>`; // a line between neighbors
    points.push({ px: x(n + 0.5), py: to, at: frames.coarse[axis][n], name: s.name, style: s.style, v, bare: true });
  });
  return { area, body, points };
}

function drawHeat(chart, width) {
  const rows = chart.series.length, row = clamp(220 / rows, 8, 28);
  const area = { left: 62, right: width - MARGIN.right, top: MARGIN.top, bottom: MARGIN.top + rows * row,
    height: MARGIN.top + rows * row + MARGIN.bottom, width };
  const { x, marks } = columns(area);
  const top = Math.max(...known(chart.series.flatMap(s => s.y)), 1e-12), points = [];
  let body = "";
  chart.series.forEach((s, r) => {
    const y = area.top + r * row;
    if (r % Math.ceil(13 / row) === 0) body += `<text class="tick" x="${area.left - 7}" y="${y + row / 2 + 4}" text-anchor="end">${escape(s.name)}</text>`;
    s.y.forEach((v, n) => {
      if (v === null) return;
      body += `<rect class="heat" x="${x(n)}" y="${y}" width="${x(n + 1) - x(n)}" height="${row - 1}" fill-opacity="${(0.04 + 0.96 * v / top).toFixed(3)}"/>`;
      points.push({ px: x(n + 0.5), py: y + row / 2, at: frames.coarse[axis][n], name: s.name, v, row: r, bare: true });
    });
  });
  return { area, body: body + xAxis(area, marks, AXES[axis]), points, rowAt: py => Math.floor((py - area.top) / row), scale: top };
}

function legend(chart, scale) {
  if (chart.kind === "heat") return `<p class="legend"><span>0</span><i class="ramp"></i><span>${number(scale, 3)}</span></p>`;
  if (chart.series.length < 2 && !chart.legend) return "";
  const key = s => chart.kind === "stack" ? `<i class="box ${s.style}"></i>`
    : `<svg class="key" width="30" height="12" aria-hidden="true"><path class="line ${s.style}" d="M1 6H29"/>${s.style.includes("dots") ? dot(s.style, 15, 6, 3.5) : ""}</svg>`;
  return `<p class="legend">${chart.series.map(s => `<span>${key(s)}${escape(s.name)}</span>`).join("")}</p>`;
}

function summaryText(chart) {
  return chart.title + ". " + chart.series.map(s => {
    const values = known(s.y);
    return values.length ? `${s.name}: ${number(values[0])} to ${number(values[values.length - 1])}` : `${s.name}: no values`;
  }).join("; ");
}

function draw(plot) {
  const chart = charts[plot.dataset.chart], width = plot.clientWidth;
  if (!width || !chart.series[0].y.length) return;
  const kinds = { line: drawLines, stack: drawStack, heat: drawHeat };
  const drawn = kinds[chart.kind](chart, width, chart.height || 200);
  const { area } = drawn;
  plot.innerHTML = `${legend(chart, drawn.scale)}<div class="canvas"><svg width="${width}" height="${area.height}" ` +
    `viewBox="0 0 ${width} ${area.height}" role="img" tabindex="0" aria-label="${escape(summaryText(chart))}">${drawn.body}` +
    `<g class="cursor"></g></svg><div class="tip" hidden></div></div>`;
  listen(plot, drawn);
}

function listen(plot, drawn) {
  const svg = plot.querySelector("svg"), stops = [...new Set(drawn.points.map(p => p.px))].sort((a, b) => a - b);
  const nearest = px => stops.reduce((best, s) => Math.abs(s - px) < Math.abs(best - px) ? s : best, stops[0]);
  let at = stops.length;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    at = stops.indexOf(nearest(event.clientX - box.left));
    show(plot, drawn, stops[at], event.clientY - box.top);
  });
  svg.addEventListener("pointerleave", () => hide(plot));
  svg.addEventListener("blur", () => hide(plot));
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    at = clamp(at + by, 0, stops.length - 1);
    show(plot, drawn, stops[at], drawn.area.top);
  });
}

function show(plot, drawn, px, py) {
  const row = drawn.rowAt ? clamp(drawn.rowAt(py), 0, 1e9) : null;
  const near = drawn.points.filter(p => Math.abs(p.px - px) < 3 && (row === null || p.row === row));
  if (!near.length) return hide(plot);
  const { area } = drawn, tip = plot.querySelector(".tip");
  plot.querySelector(".cursor").innerHTML = `<line x1="${px}" x2="${px}" y1="${area.top}" y2="${area.bottom}"/>` +
    near.filter(p => !p.bare).map(p => dot(p.style, p.px, p.py, 4.5)).join("");
  tip.innerHTML = `<b>${AXES[axis]} ${number(near[0].at, 5)}</b>` +
    near.map(p => `<span><span>${escape(p.name)}</span><span>${number(p.v)}${p.error ? ` ± ${number(p.error, 2)}` : ""}</span></span>`).join("");
  tip.hidden = false;
  const left = px + 14 + tip.offsetWidth > area.width ? px - 14 - tip.offsetWidth : px + 14;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${area.top}px`;
}

function hide(plot) {
  plot.querySelector(".tip").hidden = true;
  plot.querySelector(".cursor").innerHTML = "";
}

function searchConfig() {
  const field = document.getElementById("config-search");
  if (!field) return;
  const rows = [...document.querySelectorAll("#config tbody tr")];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    document.getElementById("config-none").hidden = rows.some(row => !row.hidden);
  });
}

// Redrawn, not scaled, when the width changes: scaled text would be too small on a phone.
const plots = [...document.querySelectorAll(".plot")], widths = new Map();
const observer = new ResizeObserver(entries => entries.forEach(({ target }) => {
  if (widths.get(target) === target.clientWidth) return; // its own drawing changed only the height
  widths.set(target, target.clientWidth);
  draw(target);
}));
plots.forEach(plot => observer.observe(plot));
document.getElementById("axis")?.addEventListener("change", event => { axis = event.target.value; plots.forEach(draw); });
searchConfig();
})();
