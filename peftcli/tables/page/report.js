"use strict";
// Draws the report from the JSON beside it. Text from runs only ever goes into textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function figure(value) {
  if (Math.abs(value) >= 1e5) return value.toExponential(3).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(5)));
}
const score = (value) => (data.per_cent ? figure(100 * value) + " %" : figure(value));

// -- Groups and their colours: runs and rows of the same first word ------------------------------
const hues = new Map();
function hue(label) {
  if (!hues.has(label)) hues.set(label, (hues.size * 137.5) % 360); // golden angle: far apart
  return `--hue:${hues.get(label)}`;
}

// -- Tables that sort by a click and hide what the filter does not find --------------------------
const filtered = []; // [text in lower case, nodes to hide]

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function table(host, header, rows) {
  const body = make("tbody");
  const shown = rows.map((cells) => {
    const row = make("tr", {}, ...cells.map(([text, , bold], i) =>
      make("td", header[i][1] ? { class: "number" } : {}, bold ? make("b", {}, text) : text)));
    filtered.push([cells.map((cell) => cell[0]).join(" ").toLowerCase(), [row]]);
    return { row, cells };
  });
  const heads = header.map(([title, isNumber], i) => {
    const button = make("button", { type: "button" }, title);
    const head = make("th", { scope: "col", ...(isNumber ? { class: "number" } : {}) }, button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      shown.sort(({ cells: a }, { cells: b }) => {
        const missing = (a[i][1] === null) - (b[i][1] === null); // last in both orders
        return missing || (a[i][1] === null ? 0 : sign * compare(a[i][1], b[i][1]));
      });
      body.append(...shown.map((one) => one.row));
    });
    return head;
  });
  body.append(...shown.map((one) => one.row));
  host.append(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
}

// -- Charts ---------------------------------------------------------------------------------------
const WIDTH = 1000, HEIGHT = 380, LEFT = 70, RIGHT = 20, TOP = 12, BOTTOM = 40;

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  const span = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / span) * (to - from);
}

function ticks(low, high, log) {
  if (log) {
    const powers = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) powers.push(10 ** p);
    const inside = powers.filter((v) => v >= low && v <= high);
    if (inside.length > 1) return inside;
  }
  const step = 10 ** Math.floor(Math.log10((high - low || 1) / 4));
  const nice = [1, 2, 5, 10].map((k) => k * step).find((s) => (high - low) / s <= 6) || step;
  const found = [];
  for (let v = Math.ceil(low / nice) * nice; v <= high + nice * 1e-9; v += nice) found.push(v);
  return found;
}

// items: {label, points: [[x, y, words]], line}; returns the svg with the nearest point on hover
function chart(items, { xTitle, yText, log }) {
  const all = items.flatMap((item) => item.points);
  const svg = make("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": xTitle });
  if (!all.length) return svg;
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y] of all) {
    x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
  }
  const isLog = log && x0 > 0 && x1 / x0 > 30;
  const X = scale(x0, x1, LEFT, WIDTH - RIGHT, isLog);
  const Y = scale(y0, y1, HEIGHT - BOTTOM, TOP, false);
  for (const v of ticks(x0, x1, isLog)) {
    svg.append(make("svg:text", { x: X(v), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, figure(v)));
  }
  for (const v of ticks(y0, y1, false)) {
    svg.append(make("svg:line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: Y(v), y2: Y(v) }),
      make("svg:text", { x: LEFT - 6, y: Y(v) + 4, "text-anchor": "end" }, yText(v)));
  }
  svg.append(make("svg:text", { x: WIDTH / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xTitle));
  const near = [];
  for (const item of items) {
    const at = item.points.map(([x, y]) => [X(x), Y(y)]);
    const path = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const style = { style: hue(item.group) };
    item.node = item.line
      ? make("svg:path", { class: "curve", d: path, ...style })
      : make("svg:circle", { class: "dot", cx: at[0][0], cy: at[0][1], r: 5, ...style });
    svg.append(item.node);
    at.forEach((place, i) => near.push([place, item, item.points[i]]));
  }
  hover(svg, near);
  return { svg, X, Y };
}

function hover(svg, near) {
  const tip = byId("tip");
  let last = null;
  const leave = () => { tip.hidden = true; if (last) last.node.classList.remove("near"); last = null; };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), k = WIDTH / box.width;
    const x = (event.clientX - box.left) * k, y = (event.clientY - box.top) * k;
    let best = null, least = 40 ** 2; // farther than this from every point, nothing is meant
    for (const one of near) {
      const d = (one[0][0] - x) ** 2 + (one[0][1] - y) ** 2;
      if (d < least && !one[1].node.hasAttribute("hidden")) { least = d; best = one; }
    }
    leave();
    if (!best) return;
    last = best[1];
    last.node.classList.add("near");
    tip.textContent = best[2][2];
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
}

function drawCurves() {
  const name = byId("curve").value;
  const text = name === "eval_" + data.metric ? score : figure;
  const items = data.runs.filter((run) => run.curves[name]).map((run) => ({
    group: run.group, line: true, run,
    points: run.curves[name].map(([x, y]) => [x, y, `${run.name}: ${name} ${text(y)} at step ${x}`]),
  }));
  const drawn = chart(items, { xTitle: "step", yText: text, log: false });
  byId("curves").replaceChildren(drawn.svg || drawn);
  for (const run of data.runs) run.curve = null;
  for (const item of items) item.run.curve = item.node;
  find();
}

function drawCosts() {
  const name = byId("cost").value;
  const rows = data.costs[name];
  const items = rows.map(([label, x, y]) => ({
    group: label, line: false, points: [[x, y, `${label}: ${data.metric} ${score(y)}, ${name} ${figure(x)}`]],
  }));
  const drawn = chart(items, { xTitle: name, yText: score, log: true });
  if (drawn.svg) {
    const front = rows.filter((row) => row[3]).map(([, x, y]) => [drawn.X(x), drawn.Y(y)]);
    drawn.svg.prepend(make("svg:path", { class: "front", d: "M" + front.map((p) => p.join(" ")).join("L") }));
    rows.forEach(([label], i) => {
      const dot = items[i].node, x = Number(dot.getAttribute("cx")), left = x > WIDTH - 160;
      drawn.svg.append(make("svg:text",
        { x: x + (left ? -9 : 9), y: Number(dot.getAttribute("cy")) + 4, "text-anchor": left ? "end" : "start" }, label));
    });
  }
  byId("costs").replaceChildren(drawn.svg || drawn);
}

// -- The page -------------------------------------------------------------------------------------
function find() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const [text, nodes, run] of filtered) {
    const hidden = !words.every((word) => text.includes(word));
    for (const node of nodes) node.toggleAttribute("hidden", hidden);
    if (run) {
      count += !hidden;
      if (run.curve) run.curve.toggleAttribute("hidden", hidden);
    }
  }
  byId("count").textContent = `${count} of ${data.runs.length} runs`;
}

function choose(select, names, draw) {
  select.append(...names.map((name) => make("option", { value: name }, name)));
  select.addEventListener("change", draw);
  if (names.length) draw();
}

byId("title").textContent = document.title = data.title;
table(byId("table"), data.table.header, data.table.rows);
for (const [name, lines] of data.table.remarks) {
  const items = lines.map((line) => make("li", {}, name === "to fill" ? make("code", {}, line) : line));
  byId("remarks").append(make("h3", {}, name), make("ul", {}, ...items));
}
const place = filtered.length;
table(byId("runs"),
  [["run", false], ["state", false], [data.metric, true], ...data.keys.map((key, i) =>
    [key, data.runs.some((run) => typeof run.keys[i] === "number")])],
  data.runs.map((run) => [
    [run.name, run.name], [run.state, run.state], [run.value === null ? "-" : score(run.value), run.value],
    ...run.keys.map((value) => [value === null ? "-" : value, value]),
  ]));
data.runs.forEach((run, i) => filtered[place + i].push(run)); // curves follow their rows
const groups = [...new Set(data.runs.map((run) => run.group))];
byId("legend").append(...groups.map((group) => {
  const button = make("button", { type: "button", style: hue(group) }, group);
  button.addEventListener("click", () => { byId("filter").value = group; find(); });
  return button;
}));
choose(byId("curve"), [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))].sort().reverse(), drawCurves);
choose(byId("cost"), Object.keys(data.costs), drawCosts);
byId("filter").addEventListener("input", find);
find();
document.body.offsetHeight; // lays the page out
document.documentElement.dataset.renderedAfterMs = performance.now().toFixed(0);
