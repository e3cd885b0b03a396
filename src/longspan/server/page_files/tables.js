// Tables beside the map: requests with progress and placement, ranks in numbers, strategies with reasons.

import { bytes, element, fitCanvas, number, onTheme, plural, rankColor, requestColor, seconds } from "./format.js";
import { light } from "./map.js";

const rows = new Map(); // by request id: the row, and its parts that change
let numRanks = 1;

function makeRow(id) {
  const parts = {
    swatch: element("i", { className: "swatch" }),
    phase: element("span", { className: "phase" }),
    bar: element("span", { className: "bar" }, element("i")),
    progress: element("span"),
    left: element("td", { className: "right" }),
    ribbon: element("canvas", { className: "ribbon" }),
    placement: element("span", { className: "note" }),
    drawn: "",
  };
  parts.ribbon.setAttribute("aria-hidden", "true");
  parts.row = element("tr", {},
    element("td", {}, parts.swatch, `${id}`),
    element("td", {}, parts.phase),
    element("td", {}, parts.bar, parts.progress),
    parts.left,
    element("td", {}, parts.ribbon, parts.placement),
  );
  parts.row.addEventListener("pointerenter", () => light(id));
  parts.row.addEventListener("pointerleave", () => light(null));
  return parts;
}

function drawRibbon(parts, request) {
  const key = `${request.num_stripes} ${request.stripes.length} ${request.stripes.at(-1)} ${numRanks}`;
  if (parts.drawn === key) return;
  parts.drawn = key;
  const [width, height] = [parts.ribbon.clientWidth || 170, 11];
  const context = fitCanvas(parts.ribbon, width, height);
  const pages = request.stripes.reduce((sum, [, count]) => sum + count, 0);
  let before = 0;
  for (const [rank, count] of request.stripes) {
    const [x, end] = [(before / pages) * width, ((before + count) / pages) * width];
    context.fillStyle = rankColor(rank, numRanks);
    context.fillRect(x, 0, Math.max(1, end - x - (end - x > 4 ? 1 : 0)), height);
    before += count;
  }
}

function placementText(request, pageSize) {
  if (!request.stripes.length) return "not placed yet";
  const ranks = new Set(request.stripes.map(([rank]) => rank));
  if (request.num_stripes === 1) return `rank ${request.stripes[0][0]}`;
  const shown = request.num_stripes > request.stripes.length ? `, the first ${request.stripes.length} shown` : "";
  return `${plural(ranks.size, "rank")}, ${number(request.num_stripes)} runs, first ${number(request.stripes[0][1] * pageSize)} tokens${shown}`;
}

function fillRow(parts, request, pageSize) {
  const isDecode = request.phase === "decode";
  parts.swatch.style.background = request.phase === "waiting" ? "" : requestColor(request.id);
  parts.phase.textContent = request.phase + (request.preemptions ? `, ${request.preemptions} × again` : "");
  parts.phase.className = `phase ${request.phase}`;
  parts.bar.className = `bar ${request.phase}`;
  const done = isDecode ? request.generated / request.max_tokens : Math.min(1, request.computed / request.prompt);
  parts.bar.firstChild.style.width = `${100 * done}%`;
  parts.progress.textContent = isDecode
    ? `${number(request.generated)} of up to ${number(request.max_tokens)}, prompt ${number(request.prompt)}`
    : `${number(Math.min(request.computed, request.prompt))} of ${number(request.prompt)} tokens` +
      (request.cached ? `, ${number(request.cached)} cached` : "");
  parts.left.textContent = isDecode ? "" : seconds(request.left_s);
  parts.placement.textContent = placementText(request, pageSize);
  drawRibbon(parts, request);
}

/** Show the requests of a state; rows of requests that stay are kept, so that nothing flickers. */
export function showRequests(state, pageSize) {
  numRanks = state.ranks.length;
  const body = document.getElementById("requests");
  const ids = new Set(state.requests.map((request) => request.id));
  for (const [id, parts] of rows) {
    if (!ids.has(id)) {
      parts.row.remove();
      rows.delete(id);
    }
  }
  let before = null;
  for (const request of state.requests) {
    if (!rows.has(request.id)) rows.set(request.id, makeRow(request.id));
    const parts = rows.get(request.id);
    const next = before === null ? body.firstChild : before.nextSibling;
    if (next !== parts.row) body.insertBefore(parts.row, next);
    fillRow(parts, request, pageSize);
    before = parts.row;
  }
  const hidden = state.running + state.waiting - state.requests.length;
  document.getElementById("requests-note").textContent = !state.running && !state.waiting
    ? "none now"
    : `${number(state.running)} running, ${number(state.waiting)} waiting${hidden > 0 ? `; ${number(hidden)} not shown` : ""}`;
}

let lastRanks = null; // {time_s, busy}: the state before, for shares of time

/** Show the ranks of a state as numbers, if somebody has opened them. */
export function showRanks(state) {
  const body = document.getElementById("ranks");
  const busy = state.ranks.map((rank) => rank.busy_s);
  const passed = lastRanks === null ? 0 : state.time_s - lastRanks.time_s;
  if (body.closest("details").open) {
    body.replaceChildren(...state.ranks.map((rank, i) => {
      const share = passed > 0 && lastRanks.busy.length === busy.length ? (busy[i] - lastRanks.busy[i]) / passed : 0;
      const cells = [
        i, number(rank.pages - rank.free - rank.cached), number(rank.cached), number(rank.free), number(rank.pages),
        `${Math.round(100 * Math.min(1, Math.max(0, share)))} %`, number(rank.tokens), `${(100 * rank.share).toFixed(1)} %`,
      ];
      return element("tr", {}, ...cells.map((cell) => element("td", {}, `${cell}`)));
    }));
  }
  lastRanks = { time_s: state.time_s, busy };
}

function strategyCard(choice) {
  const best = Math.max(...choice.candidates.map((one) => one.predicted_ms), 1e-9);
  const where = `${choice.phase}, KV group ${choice.group}`;
  const first = `first ${plural(choice.queries, "token")} of up to ${number(choice.keys)} on ${plural(choice.ranks, "rank")}`;
  const reason = choice.forced ? "asked for by an option" : !choice.candidates.length
    ? "nothing moves: every query has its keys on its own rank"
    : "least predicted time per layer";
  const order = [...choice.candidates].sort((a, b) => a.predicted_ms - b.predicted_ms);
  return element("div", { className: "strategy" },
    element("h3", {}, choice.strategy),
    element("p", { className: "note" }, `${where}; ${plural(choice.steps, "step")}; ${first}`),
    element("p", {}, reason),
    ...order.map((one) => {
      const length = element("span", { className: "length" });
      length.style.width = `${Math.max(1, (100 * one.predicted_ms) / best)}%`;
      const title = `compute ${one.compute_ms} ms, wait ${one.wait_ms} ms, copy ${one.copy_ms} ms; a rank sends ${bytes(one.sent_bytes)}`;
      const chosen = one.strategy === choice.strategy ? " chosen" : "";
      return element("div", { className: `candidate${chosen}`, title },
        element("span", {}, one.strategy), length, element("span", { className: "right" }, `${one.predicted_ms.toPrecision(3)} ms`));
    }),
  );
}

let lastStrategies = "";

/** Show the strategies of a state. */
export function showStrategies(state) {
  const text = JSON.stringify(state.strategies);
  if (text === lastStrategies || !state.strategies.length) return;
  lastStrategies = text;
  const cards = state.strategies.map(strategyCard);
  document.getElementById("strategies").replaceChildren(...cards);
}

onTheme(() => rows.forEach((parts) => (parts.drawn = "")));
