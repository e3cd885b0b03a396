// The row of key figures: rates from the differences of totals, KV, requests, prefix cache, recoveries.

import { bytes, cssColor, fitCanvas, number, onTheme, plural, rate, seconds } from "./format.js";

const WINDOW_S = 4; // a rate is a mean over so long: long chunks of prefill end seconds apart
const KEPT = 160; // points of a curve

const totals = []; // {time_s, prefill, decode}
const curves = { prefill: [], decode: [] };

function part(name) {
  const card = document.getElementById(`figure-${name}`);
  return {
    strong: card.querySelector("strong"),
    span: card.querySelector("span"),
    note: card.querySelector(".note"),
    canvas: card.querySelector("canvas"),
    card,
  };
}

const shown = Object.fromEntries(
  ["prefill", "decode", "kv", "requests", "cache", "recoveries"].map((name) => [name, part(name)]),
);

function note(state) {
  const computed = state.ranks.reduce((sum, rank) => sum + rank.tokens, 0);
  const now = { time_s: state.time_s, prefill: Math.max(0, computed - state.generated_tokens), decode: state.generated_tokens };
  const last = totals.at(-1);
  if (last && (now.time_s < last.time_s || now.decode < last.decode)) totals.length = 0; // another server
  if (last && now.time_s - last.time_s > 5 * WINDOW_S) totals.length = 0; // the page was hidden
  totals.push(now);
  while (totals.length > 2 && now.time_s - totals[1].time_s >= WINDOW_S) totals.shift();
  const first = totals[0];
  const passed = now.time_s - first.time_s;
  for (const phase of ["prefill", "decode"]) {
    const value = passed > 0 ? Math.max(0, now[phase] - first[phase]) / passed : 0;
    curves[phase].push(value);
    if (curves[phase].length > KEPT) curves[phase].shift();
    shown[phase].strong.textContent = rate(value);
  }
}

function drawCurves() {
  for (const phase of ["prefill", "decode"]) {
    const { canvas } = shown[phase];
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const context = fitCanvas(canvas, width, height);
    const values = curves[phase];
    const most = Math.max(1, ...values);
    const x = (i) => width - ((values.length - 1 - i) * width) / (KEPT - 1);
    const y = (value) => height - 2 - (value / most) * (height - 6);
    context.beginPath();
    values.forEach((value, i) => context.lineTo(x(i), y(value)));
    context.strokeStyle = cssColor(`--${phase}`);
    context.lineWidth = 1.5;
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(x(0), height);
    context.globalAlpha = 0.15;
    context.fillStyle = cssColor(`--${phase}`);
    context.fill();
    context.globalAlpha = 1;
  }
}

/** Show a state. */
export function showFigures(state, pageSize) {
  note(state);
  drawCurves();
  const pages = state.ranks.reduce((sum, rank) => sum + rank.pages, 0);
  const free = state.ranks.reduce((sum, rank) => sum + rank.free, 0);
  const cached = state.ranks.reduce((sum, rank) => sum + rank.cached, 0);
  const used = pages - free - cached;
  const share = (part) => (pages ? (100 * part) / pages : 0);
  const shareText = (part) => `${share(part) > 0 && share(part) < 10 ? share(part).toFixed(1) : Math.round(share(part))} %`;
  shown.kv.strong.textContent = shareText(used);
  shown.kv.card.querySelector(".used").style.width = `${share(used)}%`;
  shown.kv.card.querySelector(".idle").style.width = `${share(cached)}%`;
  shown.kv.note.textContent = `${number(used * pageSize)} of ${number(pages * pageSize)} tokens, ${shareText(cached)} cached`;
  shown.requests.strong.textContent = number(state.running);
  shown.requests.note.textContent = state.waiting ? `${plural(state.waiting, "request")} waiting` : "none waits";
  const asked = state.prefix_queries_tokens;
  shown.cache.strong.textContent = asked ? `${Math.round((100 * state.prefix_hit_tokens) / asked)} %` : "–";
  shown.cache.note.textContent = asked ? `${number(state.prefix_hit_tokens)} of ${number(asked)} found` : "nothing asked yet";
  shown.recoveries.strong.textContent = number(state.restarts);
  const moved = Object.values(state.bytes_per_strategy).reduce((sum, count) => sum + count, 0);
  shown.recoveries.note.textContent =
    (state.restarts ? `the last took ${seconds(state.last_recovery_s)}` : "no rank was lost") +
    (moved ? `; ${bytes(moved)} moved between ranks` : "");
}

onTheme(drawCurves);
addEventListener("resize", drawCurves);
