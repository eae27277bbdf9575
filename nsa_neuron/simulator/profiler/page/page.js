"use strict";
// Draws the page of a profile. `D` holds what data.py collected; times are ns.
const D = JSON.parse(document.getElementById("data").textContent);
const F = D.facts, N = D.count, TOTAL = D.total || 1;
const $ = id => document.getElementById(id);
const make = (tag, text, name) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (name) e.className = name;
  return e;
};
const KINDS = {f8: Float64Array, i4: Int32Array, i2: Int16Array};
const array = (text, kind) => {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new KINDS[kind](bytes.buffer);
};
const TYPES = {start: "f8", issue: "f8", begin: "f8", until: "f8", end: "f8", blocker: "i4",
  line: "i4", opcode: "i2", rule: "i4", lane: "i2", cause: "i2", bytes: "f8"};
const I = Object.fromEntries(Object.entries(TYPES).map(([k, t]) => [k, array(D.instructions[k], t)]));
const P = {index: array(D.path.index, "i4"), since: array(D.path.since, "f8"),
  until: array(D.path.until, "f8")};
const WAITS = ["", "data", "buffer", "buffer", "buffer", "order", "bank", "trigger"];
const WAIT_NAMES = {data: "waits for data", buffer: "waits for room", order: "waits in order",
  bank: "waits for a PSUM bank", trigger: "waits for the trigger"};
const style = getComputedStyle(document.documentElement);
const color = name => style.getPropertyValue("--" + name).trim();
const engine = name => name.split("-")[0];

const time = ns => ns >= 1e6 ? (ns / 1e6).toFixed(3) + " ms" : ns >= 1e4 ? (ns / 1e3).toFixed(2)
  + " µs" : ns >= 1e3 ? (ns / 1e3).toFixed(3) + " µs" : ns.toFixed(ns < 10 ? 1 : 0) + " ns";
const us = x => x >= 100 ? x.toFixed(1) : x >= 10 ? x.toFixed(2) : x.toFixed(3);
const percent = x => (100 * x).toFixed(x >= 0.0995 ? 0 : 1) + " %";
const bytes = n => n >= 1e9 ? (n / 1e9).toFixed(2) + " GB" : n >= 1e6 ? (n / 1e6).toFixed(1)
  + " MB" : n >= 1e3 ? (n / 1e3).toFixed(1) + " kB" : n + " B";
const place = n => {
  const l = D.lines[n];
  return l.file ? l.file.split(/[\\/]/).pop() + ":" + l.line : "unknown line";
};

// ---- rows: the lanes with instructions, core after core, with what a zoomed-out view needs ----
const rows = [];
D.lanes.forEach((lane, k) => {
  if (lane.used) rows.push({...lane, number: k, members: []});
});
const rowOf = new Map(rows.map((r, n) => [r.number, n]));
for (let k = 0; k < N; k++) rows[rowOf.get(I.lane[k])].members.push(k);
const union = (since, until) => { // maximal intervals, with the time covered before each
  const a = [], b = [], sum = [0];
  for (let i = 0; i < since.length; i++) {
    if (!(until[i] > since[i])) continue;
    if (a.length && since[i] <= b[b.length - 1]) {
      const more = Math.max(0, until[i] - b[b.length - 1]);
      b[b.length - 1] += more;
      sum[sum.length - 1] += more;
    } else {
      a.push(since[i]); b.push(until[i]); sum.push(sum[sum.length - 1] + until[i] - since[i]);
    }
  }
  return {a, b, sum};
};
const before = (xs, x) => { // how many of sorted xs are <= x
  let lo = 0, hi = xs.length;
  while (lo < hi) { const m = (lo + hi) >> 1; if (xs[m] <= x) lo = m + 1; else hi = m; }
  return lo;
};
const covered = (u, x) => { // ns covered before x
  const n = before(u.a, x);
  return n ? u.sum[n - 1] + Math.min(x, u.b[n - 1]) - u.a[n - 1] : 0;
};
for (const r of rows) {
  r.members.sort((x, y) => I.begin[x] - I.begin[y]);
  r.begins = r.members.map(k => I.begin[k]);
  let most = 0;
  r.reach = r.members.map(k => most = Math.max(most, I.until[k])); // for what began earlier
  r.busyTime = union(r.begins, r.members.map(k => Math.max(I.until[k], I.end[k])));
  const waits = r.members.filter(k => I.issue[k] > I.start[k]).sort((x, y) => I.start[x] - I.start[y]);
  r.waits = waits;
  r.waitBegins = waits.map(k => I.start[k]);
  let late = 0;
  r.waitReach = waits.map(k => late = Math.max(late, I.issue[k]));
  r.waitTime = union(r.waitBegins, waits.map(k => I.issue[k]));
}

// ---- the view: [from, to] ns, shared by all pictures ----
const LEFT = 104, RIGHT = 12, ROW = 30, HEAD = 22;
const view = {from: 0, to: TOTAL};
let chosen = -1; // a line of D.lines
let hovered = -1;
const canvas = $("timeline"), overview = $("overview"), memory = $("memory");
const cores = F.cores.length;
const tops = [];
{ let y = HEAD, core = -1;
  for (const r of rows) {
    if (cores > 1 && r.core !== core) { y += core < 0 ? 14 : 22; }
    core = r.core; tops.push(y); y += ROW;
  }
  canvas.height = Math.max(y + 6, 60); }
const HEIGHT = canvas.height;
canvas.style.height = HEIGHT + "px"; overview.style.height = "34px"; memory.style.height = "150px";
const context = (c, height) => {
  const ratio = window.devicePixelRatio || 1, width = c.clientWidth;
  c.width = Math.round(width * ratio); c.height = Math.round(height * ratio);
  const g = c.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  g.textBaseline = "middle";
  return [g, width];
};
const scale = width => (width - LEFT - RIGHT) / (view.to - view.from);
const ticks = (g, width, y0, y1) => {
  const k = scale(width), rough = 90 / k, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const large = view.to >= 1e4, digits = Math.max(0, -Math.floor(Math.log10(step / (large ? 1e3 : 1)) + 1e-9));
  g.strokeStyle = color("edge"); g.fillStyle = color("quiet"); g.textAlign = "center"; g.lineWidth = 1;
  g.beginPath();
  for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
    const x = Math.round(LEFT + (t - view.from) * k) + .5;
    g.moveTo(x, y0); g.lineTo(x, y1);
    if (x < width - 28) g.fillText((t / (large ? 1e3 : 1)).toFixed(digits) + (large ? " µs" : " ns"), x, 10);
  }
  g.stroke();
};
const lit = k => chosen < 0 || I.line[k] === chosen;

function drawRow(g, width, r, y) {
  const k = scale(width), right = width - RIGHT;
  const clip = (a, b, least) => {
    const x = Math.max(LEFT, LEFT + (a - view.from) * k);
    const w = Math.min(right, LEFT + (b - view.from) * k) - x;
    return [x, Math.max(w, least)];
  };
  const first = (begins, reach) => { // the first whose end may be in view
    let lo = 0, hi = reach.length;
    while (lo < hi) { const m = (lo + hi) >> 1; if (reach[m] < view.from) lo = m + 1; else hi = m; }
    return lo;
  };
  const hue = color(engine(r.name));
  const from = first(r.begins, r.reach), to = before(r.begins, view.to);
  const wfrom = first(r.waitBegins, r.waitReach), wto = before(r.waitBegins, view.to);
  g.fillStyle = color("row"); g.fillRect(LEFT, y, right - LEFT, ROW - 6);
  if (Math.max(to - from, wto - wfrom) > 3 * (right - LEFT)) { // shares of each pixel's time
    for (let x = LEFT; x < right; x++) {
      const a = view.from + (x - LEFT) / k, b = a + 1 / k;
      const wait = (covered(r.waitTime, b) - covered(r.waitTime, a)) * k;
      const busy = (covered(r.busyTime, b) - covered(r.busyTime, a)) * k;
      const h = ROW - 6;
      g.fillStyle = color("wait-data"); g.fillRect(x, y + h * (1 - Math.min(1, busy + wait)), 1, h * Math.min(1, wait));
      g.fillStyle = hue; g.fillRect(x, y + h * (1 - Math.min(1, busy)), 1, h * Math.min(1, busy));
    }
    if (chosen >= 0) {
      g.fillStyle = color("mark");
      for (let n = from; n < to; n++) if (I.line[r.members[n]] === chosen) {
        const [x] = clip(I.begin[r.members[n]], I.until[r.members[n]], 1);
        g.fillRect(x, y + ROW - 8, 1, 2);
      }
    }
    return;
  }
  for (let n = wfrom; n < wto; n++) {
    const i = r.waits[n];
    const [x, w] = clip(I.start[i], I.issue[i], 0);
    if (w > 0) { g.fillStyle = color("wait-" + (WAITS[I.cause[i]] || "data")); g.fillRect(x, y + 8, w, ROW - 22); }
  }
  const overlap = r.name.startsWith("dma");
  for (let n = from; n < to; n++) {
    const i = r.members[n];
    const [x, w] = clip(I.begin[i], I.until[i], 1);
    if (x > right) continue;
    g.globalAlpha = lit(i) ? (overlap ? .72 : 1) : .18;
    g.fillStyle = hue;
    g.fillRect(x, y, w > 3 ? w - .7 : w, ROW - 6);
    if (!overlap && I.end[i] > I.until[i]) { // it goes on in the pipeline
      const [x2, w2] = clip(I.until[i], I.end[i], 0);
      g.globalAlpha *= .35;
      if (w2 > 0) g.fillRect(x2, y + 6, w2, ROW - 18);
    }
    g.globalAlpha = 1;
    if (i === hovered) { g.strokeStyle = color("ink"); g.lineWidth = 1.5; g.strokeRect(x + .75, y + .75, Math.max(w - 1.5, 1), ROW - 7.5); }
    if (w > 60) {
      g.save(); g.beginPath(); g.rect(x, y, w - 4, ROW - 6); g.clip();
      g.fillStyle = lit(i) ? "#fff" : color("quiet"); g.textAlign = "left";
      g.fillText(D.opcodes[I.opcode[i]], x + 5, y + (ROW - 6) / 2 + .5); g.restore();
    }
  }
}

function drawTimeline() {
  const [g, width] = context(canvas, HEIGHT);
  ticks(g, width, HEAD - 4, HEIGHT);
  let core = -1;
  rows.forEach((r, n) => {
    const y = tops[n];
    if (cores > 1 && r.core !== core) {
      g.fillStyle = color("quiet"); g.textAlign = "left"; g.fillText("core " + r.core, 2, y - 10);
    }
    core = r.core;
    drawRow(g, width, r, y);
    g.textAlign = "left"; g.fillStyle = color("ink"); g.fillText(r.name, 2, y + 8);
    g.fillStyle = color("quiet"); g.font = "10.5px system-ui, 'DejaVu Sans', sans-serif";
    g.fillText(percent(r.busy) + " busy", 2, y + 20);
    g.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  });
  if ($("path").checked) drawPath(g, width);
  $("range").textContent = view.from === 0 && view.to === TOTAL ? "all of " + time(TOTAL)
    : time(view.from) + " to " + time(view.to) + " (" + time(view.to - view.from) + ")";
}

function drawPath(g, width) { // steps under their rows, joined by thin lines
  const k = scale(width), right = width - RIGHT;
  const from = Math.max(0, before(P.since, view.from) - 1), to = before(P.since, view.to);
  const thin = to - from > 4 * width;
  g.strokeStyle = g.fillStyle = color("path"); g.lineWidth = 1; g.globalAlpha = .75;
  let last = null;
  for (let n = from; n < to; n++) {
    const i = P.index[n], y = tops[rowOf.get(I.lane[i])] + ROW - 5;
    const x = Math.max(LEFT, LEFT + (P.since[n] - view.from) * k);
    const w = Math.min(right, LEFT + (P.until[n] - view.from) * k) - x;
    if (w <= 0 && !thin) continue;
    g.fillRect(x, y, Math.max(w, .6), 2);
    if (!thin && last && last !== y) { g.beginPath(); g.moveTo(x, last + 1); g.lineTo(x, y + 1); g.stroke(); }
    last = y;
  }
  g.globalAlpha = 1;
}

function drawOverview() {
  const [g, width] = context(overview, 34);
  const right = width - RIGHT, step = TOTAL / (right - LEFT), h = 30 / Math.max(rows.length, 1);
  g.fillStyle = color("row"); g.fillRect(LEFT, 2, right - LEFT, 30);
  rows.forEach((r, n) => {
    g.fillStyle = color(engine(r.name));
    for (let x = LEFT; x < right; x++) {
      const a = (x - LEFT) * step;
      const share = (covered(r.busyTime, a + step) - covered(r.busyTime, a)) / step;
      if (share > 0) { g.globalAlpha = .15 + .85 * Math.min(1, share); g.fillRect(x, 2 + n * h, 1, Math.max(h - .6, .7)); }
    }
  });
  g.globalAlpha = 1;
  const x0 = LEFT + view.from / step, x1 = LEFT + view.to / step;
  g.fillStyle = color("paper"); g.globalAlpha = .72;
  g.fillRect(LEFT, 2, x0 - LEFT, 30); g.fillRect(x1, 2, right - x1, 30);
  g.globalAlpha = 1; g.strokeStyle = color("mark"); g.lineWidth = 1.5;
  g.strokeRect(x0 + .75, 2.75, Math.max(x1 - x0 - 1.5, 2), 28.5);
  g.fillStyle = color("quiet"); g.textAlign = "left"; g.fillText("overview", 2, 17);
}

const curves = D.memory.map(core => Object.fromEntries(Object.entries(core).map(([k, m]) =>
  [k, {at: array(m.at, "f8"), used: array(m.used, "f8"), limit: m.limit}])));
function drawMemory() {
  const [g, width] = context(memory, 150), k = scale(width), right = width - RIGHT;
  const top = 20, bottom = 142;
  ticks(g, width, top, bottom);
  const y = share => bottom - share * (bottom - top);
  g.textAlign = "right"; g.fillStyle = color("quiet"); g.strokeStyle = color("edge");
  for (const s of [0, .5, 1]) {
    g.fillText(100 * s + " %", LEFT - 8, y(s));
    g.beginPath(); g.moveTo(LEFT, y(s) + .5); g.lineTo(right, y(s) + .5); g.stroke();
  }
  curves.forEach((core, c) => {
    for (const [buffer, m] of Object.entries(core)) {
      const from = Math.max(0, before(m.at, view.from) - 1), to = Math.min(m.at.length, before(m.at, view.to) + 1);
      g.beginPath();
      let level = null;
      for (let n = from; n < to; n++) {
        const x = Math.min(right, Math.max(LEFT, LEFT + (m.at[n] - view.from) * k));
        if (level === null) g.moveTo(x, y(m.used[n] / m.limit)); else g.lineTo(x, level);
        level = y(m.used[n] / m.limit);
        g.lineTo(x, level);
      }
      if (level !== null) g.lineTo(Math.min(right, LEFT + (Math.min(view.to, TOTAL) - view.from) * k), level);
      g.strokeStyle = color(buffer); g.lineWidth = 1.6; g.setLineDash(c ? [5, 3] : []); g.stroke(); g.setLineDash([]);
      if (!c && level !== null) {
        g.lineTo(Math.min(right, LEFT + (TOTAL - view.from) * k), bottom); g.lineTo(LEFT, bottom);
        g.globalAlpha = .12; g.fillStyle = color(buffer); g.fill(); g.globalAlpha = 1;
      }
    }
  });
}

let asked = false;
function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; drawTimeline(); drawOverview(); drawMemory(); });
}
function show(from, to) {
  const least = Math.min(TOTAL, 20), width = Math.min(Math.max(to - from, least), TOTAL);
  const middle = (from + to) / 2;
  view.from = Math.min(Math.max(0, middle - width / 2), TOTAL - width);
  view.to = view.from + width;
  draw();
}
function zoom(factor, at = (view.from + view.to) / 2) {
  const width = Math.min(Math.max((view.to - view.from) * factor, Math.min(TOTAL, 20)), TOTAL);
  const part = (at - view.from) / (view.to - view.from);
  const from = Math.min(Math.max(0, at - part * width), TOTAL - width);
  view.from = from; view.to = from + width;
  draw();
}

// ---- pointing ----
const timeAt = (c, x) => view.from + (x - LEFT) / scale(c.clientWidth);
function under(x, y) {
  const n = rows.findIndex((r, m) => y >= tops[m] && y < tops[m] + ROW - 5);
  if (n < 0 || x < LEFT) return -1;
  const r = rows[n], t = timeAt(canvas, x), slack = 1.5 / scale(canvas.clientWidth);
  for (let m = before(r.begins, t + slack) - 1, tries = 0; m >= 0 && tries < 200; m--, tries++) {
    const k = r.members[m];
    if (I.until[k] >= t - slack) return k;
    if (r.reach[m] < t - slack) break;
  }
  return -1;
}
function tell(k, x, y) {
  const tip = $("tip");
  if (k < 0) { tip.hidden = true; return; }
  tip.replaceChildren(make("b", D.opcodes[I.opcode[k]] + " on " + D.lanes[I.lane[k]].name
    + (cores > 1 ? ", core " + D.lanes[I.lane[k]].core : "")));
  const add = text => tip.append(make("div", text));
  add(time(I.begin[k]) + " to " + time(I.end[k]) + ": " + time(I.end[k] - I.begin[k])
    + (I.bytes[k] ? ", " + bytes(I.bytes[k]) : ""));
  if (I.issue[k] > I.start[k]) {
    const b = I.blocker[k];
    add("waited " + time(I.issue[k] - I.start[k]) + ": " + D.causes[I.cause[k]]
      + (b < 0 ? "" : " " + D.lanes[I.lane[b]].name + " " + D.opcodes[I.opcode[b]] + " at " + place(I.line[b])));
  }
  add("cost: " + D.rules[I.rule[k]]);
  tip.append(make("code", place(I.line[k])));
  tip.hidden = false;
  const w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - w - 8)) + "px";
  tip.style.top = Math.max(4, y + 18 + h > innerHeight ? y - h - 12 : y + 18) + "px";
}
let drag = null;
canvas.addEventListener("pointerdown", e => {
  drag = {x: e.clientX, from: view.from, to: view.to, moved: false};
  canvas.setPointerCapture(e.pointerId);
});
canvas.addEventListener("pointermove", e => {
  if (drag) {
    const by = (drag.x - e.clientX) / scale(canvas.clientWidth);
    drag.moved ||= Math.abs(drag.x - e.clientX) > 3;
    if (drag.moved) show(drag.from + by, drag.to + by);
    return;
  }
  const k = under(e.offsetX, e.offsetY);
  tell(k, e.clientX, e.clientY);
  if (k !== hovered) { hovered = k; mark(k < 0 ? chosen : I.line[k], false); draw(); }
});
canvas.addEventListener("pointerup", e => {
  if (drag && !drag.moved) { const k = under(e.offsetX, e.offsetY); choose(k < 0 ? -1 : I.line[k], true); }
  drag = null;
});
canvas.addEventListener("pointerleave", () => { hovered = -1; $("tip").hidden = true; mark(chosen, false); draw(); });
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
    const by = (e.deltaX || e.deltaY) / scale(canvas.clientWidth);
    show(view.from + by, view.to + by);
  } else zoom(Math.exp(e.deltaY * .0018), timeAt(canvas, e.offsetX));
}, {passive: false});
canvas.addEventListener("dblclick", () => show(0, TOTAL));
canvas.addEventListener("keydown", e => {
  const by = (view.to - view.from) / 6;
  const keys = {ArrowLeft: () => show(view.from - by, view.to - by), ArrowRight: () => show(view.from + by, view.to + by),
    ArrowUp: () => zoom(.6), "+": () => zoom(.6), "=": () => zoom(.6), ArrowDown: () => zoom(1 / .6), "-": () => zoom(1 / .6),
    "0": () => show(0, TOTAL), Home: () => show(0, view.to - view.from),
    End: () => show(TOTAL - view.to + view.from, TOTAL), Escape: () => choose(-1, false)};
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
let sliding = false;
const slide = e => {
  const at = (e.offsetX - LEFT) / (overview.clientWidth - LEFT - RIGHT) * TOTAL, half = (view.to - view.from) / 2;
  show(at - half, at + half);
};
overview.addEventListener("pointerdown", e => { sliding = true; overview.setPointerCapture(e.pointerId); slide(e); });
overview.addEventListener("pointermove", e => { if (sliding) slide(e); });
overview.addEventListener("pointerup", () => { sliding = false; });
memory.addEventListener("pointermove", e => {
  const t = timeAt(memory, e.offsetX);
  if (t < view.from || t > view.to) { $("memory-note").textContent = ""; return; }
  $("memory-note").textContent = "at " + time(t) + ": " + curves.map((core, c) => (cores > 1 ? "core " + c + " " : "")
    + Object.entries(core).map(([b, m]) => b.toUpperCase() + " " + bytes(m.used[Math.max(0, before(m.at, t) - 1)])).join(", ")).join("; ")
    + " per partition";
});
memory.addEventListener("pointerleave", noteMemory);
$("in").onclick = () => zoom(.6);
$("out").onclick = () => zoom(1 / .6);
$("fit").onclick = () => show(0, TOTAL);
$("path").onchange = draw;
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// ---- source ----
const lineRows = new Map();
const WORDS = /("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(#.*$)|\b(def|return|for|in|if|elif|else|while|with|as|import|from|class|lambda|not|and|or|is|None|True|False|pass|yield|raise|assert|range)\b/g;
function coloured(text) {
  const span = make("span");
  let at = 0;
  for (const m of text.matchAll(WORDS)) {
    span.append(text.slice(at, m.index), make(m[1] ? "s" : m[2] ? "q" : "em", m[0]));
    at = m.index + m[0].length;
  }
  span.append(text.slice(at));
  return span;
}
function fillSource() {
  const most = Math.max(1e-9, ...D.lines.map(l => l.path_us));
  const known = new Map(D.lines.map((l, n) => [l.file + ":" + l.line, n]));
  for (const file of D.files) {
    const title = make("h3", file.name);
    title.title = file.path;
    $("source").append(title);
    file.pieces.forEach((piece, p) => {
      if (p) $("source").append(make("hr"));
      piece.text.forEach((text, k) => {
        const n = known.get(file.path + ":" + (piece.first + k));
        const row = make("div", undefined, "l");
        const spent = make("span", "", "t");
        if (n !== undefined) {
          const l = D.lines[n];
          row.classList.add("hot");
          lineRows.set(n, row);
          spent.textContent = l.path_us ? us(l.path_us) + " µs" : "";
          spent.style.setProperty("--to", 100 * l.path_us / most + "%");
          row.title = l.count + " instructions; " + us(l.path_us) + " µs of the critical path, " + us(l.work_us) + " µs of work";
          row.onclick = () => choose(chosen === n ? -1 : n, false);
        }
        row.append(spent, make("span", piece.first + k, "n"), coloured(text));
        $("source").append(row);
      });
    });
  }
  if (!D.files.length) $("source").append(make("p", "The kernel's source is not available.", "quiet"));
}
let marked = null;
function mark(n, scroll) {
  if (marked) marked.classList.remove("on");
  marked = lineRows.get(n) || null;
  if (!marked) return;
  marked.classList.add("on");
  if (scroll) {
    const box = $("source"), r = marked.getBoundingClientRect(), b = box.getBoundingClientRect();
    if (r.top < b.top || r.bottom > b.bottom) box.scrollTop += r.top - b.top - box.clientHeight / 2;
  }
}
function choose(n, scroll) { chosen = n; mark(n, scroll); draw(); }

// ---- words ----
function fillWords() {
  const t = F.time_us;
  $("kernel").textContent = F.kernel + " on " + F.target;
  $("arguments").textContent = F.arguments.join(" · ");
  $("time").querySelector("b").textContent = us(t.central) + " µs modelled";
  $("time").querySelector("span").textContent = us(t.low) + " to " + us(t.high) + "; not measured, not run on hardware";
  const tile = (name, value, share, hue) => {
    const e = make("div", undefined, "tile");
    e.append(make("span", name, "quiet"), make("b", value));
    if (share !== undefined) {
      const bar = make("i");
      bar.style.setProperty("--to", 100 * Math.min(1, share) + "%");
      if (hue) bar.style.setProperty("--hue", "var(--" + hue + ")");
      e.append(bar);
    }
    $("tiles").append(e);
  };
  const r = F.roofline;
  if (r.share_of_ceiling !== null) tile("of the roof (" + r.bound + ")", percent(r.share_of_ceiling), r.share_of_ceiling);
  tile("HBM traffic", r.bandwidth_gb_s.toFixed(0) + " GB/s", r.bandwidth_gb_s / r.bandwidth_peak_gb_s, "dma");
  const busiest = [...rows].sort((a, b) => b.busy - a.busy)[0];
  if (busiest) tile("busiest: " + busiest.name, percent(busiest.busy), busiest.busy, engine(busiest.name));
  const util = Math.max(...F.cores.map(c => c.tensor.utilisation));
  if (util) tile("multiplier array in use", percent(util), util, "tensor");
  const sbuf = Math.max(...F.cores.map(c => c.memory.sbuf.peak / c.memory.sbuf.limit));
  tile("SBUF at most", percent(sbuf), sbuf, "sbuf");
  tile("instructions", F.instructions.toLocaleString("en"));
  const legend = (hue, text, where = "legend") => {
    const s = make("span"), box = make("i");
    box.style.setProperty("--hue", "var(--" + hue + ")");
    s.append(box, text);
    $(where).append(s);
  };
  const waits = new Set();
  for (const row of rows) for (const k of row.waits) waits.add(WAITS[I.cause[k]]);
  for (const w of Object.keys(WAIT_NAMES)) if (waits.has(w)) legend("wait-" + w, WAIT_NAMES[w]);
  $("legend").append(make("span", "wheel or + and − zoom, drag or arrows move, click chooses a line"));
  canvas.setAttribute("aria-label", "timeline of " + rows.map(x => x.name + " " + percent(x.busy) + " busy").join(", "));
  if (F.assumptions.length) F.assumptions.forEach(a => $("assumed").querySelector("ul").append(make("li", a)));
  else $("assumed").hidden = true;
  for (const b of ["sbuf", "psum"]) legend(b, b.toUpperCase() + ", share of a partition's " + bytes(F.cores[0].memory[b].limit), "memory-legend");
  if (cores > 1) $("memory-legend").append(make("span", "dashed: core 1"));
  noteMemory();
}
function noteMemory() {
  $("memory-note").textContent = "per partition at most: " + F.cores.map((c, n) => (cores > 1 ? "core " + n + " " : "")
    + ["sbuf", "psum"].map(b => b.toUpperCase() + " " + bytes(c.memory[b].peak)).join(", ")).join("; ");
}
function fillAdvice() {
  const box = $("advice"), both = F.together;
  if (!F.advice.length) { box.append(make("p", "No rule promises 1 % or more.", "quiet")); return; }
  if (both) {
    const numbers = both.of.map(n => n + 1);
    const p = make("p", undefined, "together");
    p.append(make("b", both.speedup.toFixed(2) + " times as fast"), " with " + numbers.slice(0, -1).join(", ") + " and "
      + numbers.slice(-1) + " together: " + us(both.gain_us) + " µs less");
    box.append(p);
  }
  const known = new Map(D.lines.map((l, n) => [l.file + ":" + l.line, n]));
  F.advice.forEach((a, k) => {
    const e = make("div", undefined, "piece"), left = make("div"), right = make("div");
    left.append(make("b", "−" + percent(a.gain_share)), make("div", us(a.gain_us) + " µs", "quiet"));
    right.append(make("div", k + 1 + ". " + a.rule + ", line " + a.line, "where"), make("code", a.text), make("div", a.message));
    e.append(left, right);
    e.onclick = () => choose(known.get(a.file + ":" + a.line) ?? -1, true);
    box.append(e);
  });
  box.append(make("p", "Modelled: the same program scheduled again as if changed.", "quiet"));
}
const svg = (tag, attributes, text) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
};
function fillRoofline() {
  const r = F.roofline, box = $("roofline");
  const flops = r.unit === "flop" && r.intensity !== null;
  const picture = svg("svg", {viewBox: flops ? "0 0 300 190" : "0 0 300 150", role: "img"});
  if (flops) drawRoof(picture, r); else drawBars(picture, r);
  const words = r.share_of_ceiling === null ? "No matrix products and no HBM traffic: no roof."
    : percent(r.share_of_ceiling) + " of the roof (" + r.bound + "). " + (r.unit === "flop"
      ? (r.achieved_g_per_s / 1e3).toFixed(2) + " of " + (r.ceiling_g_per_s / 1e3).toFixed(2) + " Tflop/s."
      : "No matrix products: needed bytes against bandwidth.");
  const again = r.work_done > 1.005 * r.work ? " " + (r.unit === "flop" ? "Products are computed " : "Bytes are moved ")
    + (r.work_done / r.work).toFixed(2) + " times as often as needed." : "";
  picture.setAttribute("aria-label", words);
  box.append(picture, make("p", words + again, "quiet"));
}
function drawRoof(s, r) {
  const x0 = 36, x1 = 292, y0 = 12, y1 = 160, band = Math.min(r.bandwidth_peak_gb_s, r.dma_peak_gb_s);
  const lo = Math.log10(Math.min(r.intensity, r.ridge) / 8), hi = Math.log10(Math.max(r.intensity, r.ridge) * 8);
  const top = Math.log10(r.peak_g_per_s * 2), bottom = Math.min(Math.log10(10 ** lo * band), Math.log10(r.achieved_g_per_s)) - .3;
  const x = v => x0 + (Math.log10(v) - lo) / (hi - lo) * (x1 - x0), y = v => y1 - (Math.log10(v) - bottom) / (top - bottom) * (y1 - y0);
  const roof = (rate, attributes) => s.append(svg("polyline", {fill: "none", points: [[10 ** lo, 10 ** lo * rate],
    [r.peak_g_per_s / rate, r.peak_g_per_s], [10 ** hi, r.peak_g_per_s]].map(([a, b]) => x(a) + "," + y(b)).join(" "), ...attributes}));
  for (let p = Math.ceil(lo); p <= hi; p++) {
    s.append(svg("line", {x1: x(10 ** p), x2: x(10 ** p), y1: y0, y2: y1, stroke: "var(--edge)"}));
    s.append(svg("text", {x: x(10 ** p), y: y1 + 14, "text-anchor": "middle", class: "q"}, 10 ** p));
  }
  roof(Math.max(r.bandwidth_peak_gb_s, r.dma_peak_gb_s), {stroke: "var(--quiet)", "stroke-dasharray": "4 3"});
  roof(band, {stroke: "var(--ink)", "stroke-width": 2});
  const name = (rate, label) => { // left of the higher line, right of the lower one
    const low = rate === band, at = 10 ** (lo + (low ? .13 : .3) * (hi - lo));
    s.append(svg("text", {x: x(at) + (low ? 6 : -7), y: y(at * rate) + (low ? 14 : -3), class: low ? "" : "q",
      "text-anchor": low ? "start" : "end"}, label + " " + rate.toFixed(0) + (low ? " GB/s" : "")));
  };
  name(r.bandwidth_peak_gb_s, "HBM");
  name(r.dma_peak_gb_s, "DMA engines");
  s.append(svg("text", {x: x1, y: y(r.peak_g_per_s) - 5, "text-anchor": "end"}, (r.peak_g_per_s / 1e3).toFixed(1) + " Tflop/s"));
  s.append(svg("line", {x1: x(r.intensity), x2: x(r.intensity), y1: y(r.achieved_g_per_s), y2: y(r.ceiling_g_per_s),
    stroke: "var(--mark)", "stroke-dasharray": "2 3"}));
  s.append(svg("circle", {cx: x(r.intensity), cy: y(r.achieved_g_per_s), r: 5.5, fill: "var(--mark)"}));
  s.append(svg("text", {x: (x0 + x1) / 2, y: y1 + 28, "text-anchor": "middle", class: "q"}, "flop per needed HBM byte"));
}
function drawBars(s, r) {
  const needed = r.unit === "byte" ? r.achieved_g_per_s : TOTAL ? r.needed_bytes / TOTAL : 0;
  const bars = [["HBM at most", r.bandwidth_peak_gb_s, "var(--quiet)"], ["DMA engines at most", r.dma_peak_gb_s, "var(--quiet)"],
    ["moved", r.bandwidth_gb_s, "color-mix(in srgb, var(--dma) 55%, var(--card))"], ["needed", needed, "var(--dma)"]];
  const most = Math.max(...bars.map(b => b[1]), 1);
  bars.forEach(([label, value, hue], n) => {
    const y = 6 + 36 * n;
    s.append(svg("text", {x: 0, y: y + 9, class: "q"}, label), svg("text", {x: 300, y: y + 9, "text-anchor": "end"}, value.toFixed(0) + " GB/s"),
      svg("rect", {x: 0, y: y + 15, width: Math.max(300 * value / most, 1), height: 9, rx: 2, fill: hue}));
  });
}

fillWords(); fillSource(); fillAdvice(); fillRoofline(); draw();
