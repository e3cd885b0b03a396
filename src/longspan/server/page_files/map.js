// The map: a tile of cells per rank, drawn on one canvas; pointed at by mouse, finger or arrow keys.

import { cssColor, fitCanvas, number, onTheme, plural, rankColor, requestColor } from "./format.js";

const FREE = -1;
const CACHED = -2;
const SHARED = -3;
const MAX_HEIGHT = 420;

const canvas = document.getElementById("map");
const tip = document.getElementById("tip");
const said = document.getElementById("map-said");

let ranks = []; // per rank: {owners, shades, state}
let slotsPerCell = 1;
let pageSize = 1;
let layout = null;
let chosen = null; // {rank, cell}
let lit = null; // id of the request that stands out
let lostRank = null;

function unpack(state) {
  return state.ranks.map((rank) => {
    const [owners, shades] = [[], []];
    for (let i = 0; i < rank.cells.length; i += 3) {
      for (let n = 0; n < rank.cells[i]; n += 1) {
        owners.push(rank.cells[i + 1]);
        shades.push(rank.cells[i + 2]);
      }
    }
    return { owners, shades, state: rank };
  });
}

/** Choose columns of tiles, and the largest cells with which all tiles fit. */
function makeLayout(width) {
  const numRanks = ranks.length;
  const numCells = Math.max(...ranks.map((rank) => rank.owners.length));
  const most = width < 520 ? (numRanks > 32 ? 8 : numRanks > 2 ? 4 : 1) : numRanks > 64 ? 16 : numRanks > 4 ? 8 : numRanks;
  const columns = Math.min(numRanks, numRanks <= 4 && width < 520 ? Math.min(2, numRanks) : most);
  const gap = numRanks > 16 ? 8 : 14;
  const label = numRanks > 16 ? 13 : 18;
  const tile = (width - gap * (columns - 1)) / columns;
  const rows = Math.ceil(numRanks / columns);
  for (let cell = 18; ; cell -= 0.5) {
    const across = Math.max(1, Math.floor(tile / cell));
    const down = Math.ceil(numCells / across);
    const height = rows * (label + down * cell) + gap * (rows - 1);
    if (height <= MAX_HEIGHT || cell <= 3) {
      return { columns, gap, label, tile, cell, across, down, rows, height: Math.ceil(height), width };
    }
  }
}

function corner(rank) {
  const { columns, gap, label, tile, cell, down } = layout;
  return [(rank % columns) * (tile + gap), Math.floor(rank / columns) * (label + down * cell + gap)];
}

function cellColor(owner, shade, colors) {
  if (owner === CACHED) return colors.cached;
  if (owner === SHARED) return colors.shared;
  return requestColor(owner, (shade & 1) === 1);
}

export function drawMap() {
  if (!ranks.length) return;
  layout = makeLayout(canvas.parentElement.clientWidth);
  canvas.style.height = `${layout.height}px`;
  const context = fitCanvas(canvas, layout.width, layout.height);
  const colors = {
    cell: cssColor("--cell"), cached: cssColor("--cached"), shared: cssColor("--shared"),
    dim: cssColor("--dim"), bad: cssColor("--bad"), text: cssColor("--text"),
  };
  const { cell, across, label } = layout;
  const space = cell >= 7 ? 1.5 : cell >= 4.5 ? 1 : 0.5;
  context.textBaseline = "top";
  context.font = `${label > 14 ? 12 : 10}px system-ui, "DejaVu Sans", sans-serif`;
  const seen = new Map(); // colours by owner and shade: making one takes longer than drawing
  ranks.forEach(({ owners, shades, state }, rank) => {
    const [left, top] = corner(rank);
    context.globalAlpha = 1;
    context.fillStyle = rankColor(rank, ranks.length);
    context.fillRect(left, top + 2, 3, label > 14 ? 11 : 8);
    context.fillStyle = rank === lostRank ? colors.bad : colors.dim;
    const used = state.pages ? Math.round((100 * (state.pages - state.free - state.cached)) / state.pages) : 0;
    const name = rank === lostRank ? `rank ${rank} lost` : label > 14 ? `rank ${rank}   ${used} % in use` : `${rank}`;
    context.fillText(name, left + 8, top + 1);
    owners.forEach((owner, i) => {
      const x = left + (i % across) * cell;
      const y = top + label + Math.floor(i / across) * cell;
      context.globalAlpha = 1;
      context.fillStyle = colors.cell;
      context.fillRect(x, y, cell - space, cell - space);
      if (owner === FREE) return;
      const key = owner * 16 + shades[i];
      if (!seen.has(key)) seen.set(key, cellColor(owner, shades[i], colors));
      context.fillStyle = seen.get(key);
      const fill = 0.25 + (0.75 * (shades[i] >> 1)) / 4;
      context.globalAlpha = lit !== null && owner !== lit ? fill * 0.18 : fill;
      context.fillRect(x, y, cell - space, cell - space);
    });
    if (rank === lostRank) {
      context.globalAlpha = 1;
      context.strokeStyle = colors.bad;
      context.lineWidth = 2;
      context.strokeRect(left + 1, top + label, layout.tile - 2, layout.down * cell);
    }
  });
  if (chosen !== null && chosen.rank < ranks.length) {
    const [left, top] = corner(chosen.rank);
    context.globalAlpha = 1;
    context.strokeStyle = colors.text;
    context.lineWidth = 2;
    const x = left + (chosen.cell % across) * cell;
    const y = top + label + Math.floor(chosen.cell / across) * cell;
    context.strokeRect(x - 1, y - 1, cell + 2 - space, cell + 2 - space);
  }
}

/** What one cell holds, in words. */
function describe({ rank, cell }) {
  const { owners, shades, state } = ranks[rank];
  const first = cell * slotsPerCell;
  const last = Math.min(first + slotsPerCell, state.pages) - 1;
  const owner = owners[cell];
  const fill = ((shades[cell] >> 1) * 100) / 4;
  const what = owner === FREE ? "free" : owner === CACHED ? "cached, of no running request"
    : owner === SHARED ? "shared by several requests" : `request ${owner}`;
  const where = first === last ? `page ${number(first)}` : `pages ${number(first)} to ${number(last)}`;
  return `rank ${rank}, ${where}: ${what}${owner !== FREE && fill < 100 ? `, up to ${fill} % full` : ""}`;
}

function choose(place, x = null, y = null) {
  chosen = place;
  drawMap();
  if (place === null) {
    tip.hidden = true;
    return;
  }
  tip.hidden = false;
  tip.textContent = describe(place);
  const [left, top] = corner(place.rank);
  const { cell, across, label } = layout;
  const at = x ?? left + (place.cell % across) * cell;
  const down = y ?? top + label + Math.floor(place.cell / across) * cell;
  tip.style.left = `${Math.max(0, Math.min(at + 12, layout.width - tip.offsetWidth))}px`;
  tip.style.top = `${down + 18}px`;
}

function under(event) {
  if (layout === null) return null;
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const { columns, gap, label, tile, cell, across, down } = layout;
  const column = Math.floor(x / (tile + gap));
  const row = Math.floor(y / (label + down * cell + gap));
  const rank = row * columns + column;
  if (column >= columns || rank < 0 || rank >= ranks.length) return null;
  const [left, top] = corner(rank);
  const [i, j] = [Math.floor((x - left) / cell), Math.floor((y - top - label) / cell)];
  const index = j * across + i;
  if (i < 0 || j < 0 || i >= across || index >= ranks[rank].owners.length) return null;
  return [{ rank, cell: index }, x, y];
}

canvas.addEventListener("pointermove", (event) => choose(...(under(event) ?? [null])));
canvas.addEventListener("pointerdown", (event) => choose(...(under(event) ?? [null])));
canvas.addEventListener("pointerleave", () => choose(null));
canvas.addEventListener("blur", () => choose(null));
canvas.addEventListener("keydown", (event) => {
  if (!ranks.length) return;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layout.across, ArrowDown: layout.across }[event.key];
  if (event.key === "Escape") choose(null);
  if (step === undefined) return;
  event.preventDefault();
  let { rank, cell } = chosen ?? { rank: 0, cell: -step };
  cell += step;
  if (cell < 0 && rank > 0) [rank, cell] = [rank - 1, ranks[rank - 1].owners.length - 1];
  else if (cell >= ranks[rank].owners.length && rank + 1 < ranks.length) [rank, cell] = [rank + 1, 0];
  cell = Math.max(0, Math.min(cell, ranks[rank].owners.length - 1));
  choose({ rank, cell });
  said.textContent = describe(chosen);
});

/** Let one request stand out, or none (null). */
export function light(id) {
  lit = id;
  drawMap();
}

/** Mark a rank as lost, or none (null). */
export function markLost(rank) {
  lostRank = rank;
  drawMap();
}

/** Show a state. */
export function showMap(state, tokensPerPage) {
  [ranks, slotsPerCell, pageSize] = [unpack(state), state.slots_per_cell, tokensPerPage];
  drawMap();
  if (chosen !== null && chosen.rank < ranks.length) tip.textContent = describe(chosen);
  const cell = slotsPerCell === 1 ? "one page" : plural(slotsPerCell, "page");
  document.getElementById("map-scale").textContent =
    `A cell is ${cell}, ${plural(slotsPerCell * pageSize, "token")}.`;
  const pages = state.ranks.reduce((sum, rank) => sum + rank.pages, 0);
  const free = state.ranks.reduce((sum, rank) => sum + rank.free, 0);
  canvas.setAttribute("aria-label",
    `Map of pages: ${plural(ranks.length, "rank")}, ${number(pages - free)} of ${number(pages)} pages taken`);
}

onTheme(drawMap);
new ResizeObserver(drawMap).observe(canvas.parentElement);
